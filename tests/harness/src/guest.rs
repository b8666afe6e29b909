//! What runs in the machine: the bundled guest, or a stock Linux with the same service and an HTTP server.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::HarnessError;
use crate::topology::GUEST;

/// Bytes of the disk that the ledger uses. What lies behind is a Linux guest's load's.
pub const LEDGER_BYTES: u64 = 16 << 20;

/// A guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guest {
    /// The freestanding program of `guest/ledger`.
    Bundled(PathBuf),
    /// A distribution's kernel with the initrd that `scripts/lib.sh` makes of `guest/ledger-linux`.
    Linux(Linux),
}

/// A stock Linux.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linux {
    /// Its kernel, a bzImage.
    pub kernel: PathBuf,
    /// Its initrd.
    pub initrd: PathBuf,
    /// Its memory.
    pub ram_mib: u32,
    /// What it does beside its service.
    pub work: Option<Work>,
}

/// Work of a Linux guest beside its service (`guest/ledger-linux/load`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Everything that an execution is hard to follow under, at once, for so many seconds of the guest.
    Everything {
        /// How long.
        seconds: u32,
    },
    /// So many rounds of compile-like work, after a pause in which it does nothing.
    Compile {
        /// How often.
        rounds: u32,
    },
}

impl Work {
    /// The word for it on the kernel's command line.
    fn word(self) -> String {
        match self {
            Self::Everything { seconds } => format!("ft.load={seconds}"),
            Self::Compile { rounds } => format!("ft.compile={rounds}"),
        }
    }
}

impl Work {
    /// What is wrong with the work, by what the guest wrote to its console. `to_the_end`: nothing cut the run off.
    #[must_use]
    pub fn problems<'a>(self, console: impl Iterator<Item = &'a str> + Clone, to_the_end: bool) -> Vec<String> {
        let Self::Everything { .. } = self else {
            return Vec::new();
        };
        let bad = console.clone().filter(|line| line.contains("READS BACK ANOTHER THING"));
        let mut problems: Vec<String> = bad.map(|line| format!("the guest says: {line}")).collect();
        if to_the_end {
            for part in PARTS_OF_EVERYTHING {
                let rounds = console.clone().find_map(|line| {
                    let count = line.split_once(part)?.1.split_whitespace().next()?;
                    count.parse::<u64>().ok()
                });
                if rounds.is_none_or(|rounds| rounds == 0) {
                    problems.push(format!(
                        "the guest's work did not come to its end: no round of `{}`",
                        part.trim()
                    ));
                }
            }
        }
        problems
    }
}

/// What [`Work::Everything`] says when all of its parts have ended.
pub const WORK_DONE: &str = "load: done";

/// What each part of [`Work::Everything`] says at its end, before its number of rounds (`guest/ledger-linux/load`).
const PARTS_OF_EVERYTHING: [&str; 4] = ["load: hog: ", "load: compile: ", "load: forks: ", "load: disk: "];

/// How long the harness waits for a guest. Not a judgement: a run that takes longer is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For the boot.
    pub boot: Duration,
    /// For an answer.
    pub answer: Duration,
    /// For the processes to end after the power-off.
    pub end: Duration,
}

impl From<PathBuf> for Guest {
    fn from(elf: PathBuf) -> Self {
        Self::Bundled(elf)
    }
}

impl Guest {
    /// Its name in reports.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bundled(_) => "ledger",
            Self::Linux(_) => "linux",
        }
    }

    /// Whether it serves files over HTTP.
    #[must_use]
    pub fn has_http(&self) -> bool {
        matches!(self, Self::Linux(_))
    }

    /// Checks that its files are there.
    ///
    /// # Errors
    /// Names the first that is not.
    pub fn check(&self) -> Result<(), HarnessError> {
        let (paths, advice) = match self {
            Self::Bundled(elf) => (vec![elf], "run `cargo build --release` in guest/ledger"),
            Self::Linux(linux) => (
                vec![&linux.kernel, &linux.initrd],
                "run `scripts/demo --guest linux`, which makes it",
            ),
        };
        match paths.into_iter().find(|path| !path.is_file()) {
            None => Ok(()),
            Some(path) => Err(HarnessError::Missing {
                path: path.clone(),
                advice: advice.to_owned(),
            }),
        }
    }

    /// The shim's options that make the machine.
    #[must_use]
    pub fn machine(&self) -> Vec<(&'static str, String)> {
        let service = format!("ip={}/24 port={}", GUEST.ip(), GUEST.port());
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        match self {
            Self::Bundled(elf) => vec![("--kernel", path(elf)), ("--cmdline", service)],
            Self::Linux(linux) => {
                let work = linux.work.map(|work| format!(" {}", work.word())).unwrap_or_default();
                vec![
                    ("--kernel", path(&linux.kernel)),
                    ("--initrd", path(&linux.initrd)),
                    ("--ram-mib", linux.ram_mib.to_string()),
                    (
                        "--cmdline",
                        format!(
                            "console=ttyS0 quiet panic=-1 nolapic noapic lpj=1000000 randomize_kstack_offset=off {service}{work}"
                        ),
                    ),
                ]
            }
        }
    }

    /// Bytes of its disk.
    #[must_use]
    pub fn image_bytes(&self) -> u64 {
        match self {
            Self::Bundled(_) => LEDGER_BYTES,
            Self::Linux(_) => 4 * LEDGER_BYTES,
        }
    }

    /// How long to wait for it. A Linux may run on an emulated processor.
    #[must_use]
    pub fn patience(&self) -> Patience {
        match self {
            Self::Bundled(_) => Patience {
                boot: Duration::from_secs(60),
                answer: Duration::from_secs(20),
                end: Duration::from_secs(20),
            },
            Self::Linux(_) => Patience {
                boot: Duration::from_secs(300),
                answer: Duration::from_secs(60),
                end: Duration::from_secs(60),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_failed_or_did_not_end_is_a_problem() {
        let work = Work::Everything { seconds: 5 };
        let ended = [
            "load: hog: 3 rounds",
            "load: compile: 2 rounds",
            "load: forks: 9 rounds of 24 processes",
            "load: disk: 4 rounds",
        ];
        let problems = |lines: &[&'static str], to_the_end| work.problems(lines.iter().copied(), to_the_end);
        assert_eq!(problems(&ended, true), Vec::<String>::new());
        assert_eq!(problems(&ended[1..], true).len(), 1, "the hog is missing");
        assert_eq!(problems(&ended[1..], false), Vec::<String>::new(), "cut off by a fault");
        let none = ["load: hog: 3 rounds", ended[1], ended[2], "load: disk: 0 rounds"];
        assert_eq!(problems(&none, true).len(), 1);
        let corrupt = problems(&["load: disk: ROUND 2 READS BACK ANOTHER THING"], false);
        assert!(corrupt[0].contains("ROUND 2"), "{corrupt:?}");
    }
}
