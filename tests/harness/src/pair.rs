//! The two hosts' daemons, their files and their network: a protected machine to experiment on.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{HarnessError, IoContext};
use crate::events::{CONSOLE, Event, Events, SOCKET, WaitError};
use crate::guest::Guest;
use crate::process::{EXITED, Exit, HostProcesses, ProcessSpec};
use crate::roles::{BLK, FT_LOG, NET, PROCESSES, SHIM};
use crate::topology::{GUEST_MAC, HostId, TAP, Topology};

/// Name of the virtual machine.
pub const VM: &str = "ledger";
/// Environment variable that names a crash point to binaries built with `crash-points`.
pub const CRASH_VARIABLE: &str = "FT_CRASH_AT";

/// How long a new socket may take from bind to listen.
const LISTEN: Duration = Duration::from_secs(5);

/// What to start.
#[derive(Debug, Clone)]
pub struct PairSetup {
    /// Where the four daemons are.
    pub bin_dir: PathBuf,
    /// The guest.
    pub guest: Guest,
    /// More arguments for both ft-logs.
    pub ft_log_arguments: Vec<String>,
    /// More arguments for both shims.
    pub shim_arguments: Vec<String>,
    /// The host that is to die at a crash point, and the `POINT:NTH`.
    pub crash: Option<(HostId, String)>,
}

impl PairSetup {
    /// Checks that everything a run starts is there.
    ///
    /// # Errors
    /// Names the first thing that is not.
    pub fn check(&self) -> Result<(), HarnessError> {
        for process in PROCESSES {
            let path = self.bin_dir.join(process);
            if !path.is_file() {
                return Err(HarnessError::Missing {
                    path,
                    advice: "run `cargo build --release`".to_owned(),
                });
            }
        }
        self.guest.check()?;
        for device in ["/dev/kvm", "/dev/net/tun"] {
            File::options().read(true).write(true).open(device).map_err(|error| {
                HarnessError::Environment(format!(
                    "cannot open {device}: {error} (does it exist, and may you use it?)"
                ))
            })?;
        }
        Ok(())
    }
}

/// Both hosts. Dropping it ends everything.
#[derive(Debug)]
pub struct Pair {
    setup: PairSetup,
    directory: PathBuf,
    // Dropped in this order: processes before the network they are in and the event list they report to.
    host_a: HostProcesses,
    host_b: HostProcesses,
    topology: Topology,
    events: Events,
}

impl Pair {
    /// Lays out the files in `directory`, which must be empty, and builds the network. Nothing runs yet.
    ///
    /// # Errors
    /// When the machine refuses any of it.
    pub fn new(setup: PairSetup, directory: &Path) -> Result<Self, HarnessError> {
        for name in ["events", "logs", "arbiter", "A/journal", "B/journal"] {
            let path = directory.join(name);
            fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
        }
        let events = Events::watch(&directory.join("events"))?;
        let topology = Topology::new()?;
        let logs = directory.join("logs");
        let host = |id| HostProcesses::new(id, &logs, events.sink());
        let pair = Self {
            setup,
            directory: directory.to_owned(),
            host_a: host(HostId::A),
            host_b: host(HostId::B),
            topology,
            events,
        };
        for id in HostId::BOTH {
            let image = pair.image(id);
            File::create_new(&image)
                .and_then(|file| file.set_len(pair.setup.guest.image_bytes()))
                .context(|| format!("create {}", image.display()))?;
        }
        Ok(pair)
    }

    /// What was to be started.
    #[must_use]
    pub fn setup(&self) -> &PairSetup {
        &self.setup
    }

    /// The network.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// What the processes say.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The processes of a host.
    #[must_use]
    pub fn host(&self, id: HostId) -> &HostProcesses {
        match id {
            HostId::A => &self.host_a,
            HostId::B => &self.host_b,
        }
    }

    /// A host's disk image.
    #[must_use]
    pub fn image(&self, id: HostId) -> PathBuf {
        self.directory.join(id.name()).join("disk.img")
    }

    /// A host's journal.
    #[must_use]
    pub fn journal(&self, id: HostId) -> PathBuf {
        self.directory.join(id.name()).join("journal")
    }

    /// Starts all daemons of both hosts; returns when every socket is there and both shims are started.
    ///
    /// # Errors
    /// When one of them ends or its socket does not come.
    pub fn start(&mut self, deadline: Instant) -> Result<(), HarnessError> {
        // The backup first: it listens, the primary connects.
        self.start_hosts(&[HostId::B, HostId::A], deadline)
    }

    /// Starts all daemons of these hosts, each kind on all of them before the next kind.
    ///
    /// # Errors
    /// When one of them ends or its socket does not come.
    pub fn start_hosts(&mut self, hosts: &[HostId], deadline: Instant) -> Result<(), HarnessError> {
        for stage in [&[FT_LOG][..], &[BLK, NET], &[SHIM]] {
            for id in hosts {
                for process in stage {
                    self.start_process(*id, process, &[])?;
                }
            }
            for id in hosts {
                for process in stage.iter().filter(|process| **process != SHIM) {
                    self.wait_for_socket(*id, process, deadline)?;
                }
            }
        }
        Ok(())
    }

    /// Starts one daemon with its usual arguments and `more`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_process(&mut self, id: HostId, process: &'static str, more: &[&str]) -> Result<(), HarnessError> {
        let environment = match &self.setup.crash {
            Some((host, at)) if *host == id => vec![(CRASH_VARIABLE.to_owned(), at.clone())],
            _ => Vec::new(),
        };
        let mut arguments = self.arguments(id, process);
        arguments.extend(more.iter().map(OsString::from));
        let spec = ProcessSpec {
            name: process,
            binary: self.setup.bin_dir.join(process),
            arguments,
            environment,
        };
        let host = match id {
            HostId::A => &mut self.host_a,
            HostId::B => &mut self.host_b,
        };
        host.start(self.topology.host(id), &spec)
    }

    fn arguments(&self, id: HostId, process: &str) -> Vec<OsString> {
        let role = if id == HostId::A { "primary" } else { "backup" };
        let mut list = Arguments::default();
        match process {
            FT_LOG => list
                .option("--vm", VM)
                .option("--role", role)
                .option("--socket-path", self.events.socket(id, FT_LOG))
                .option("--arbiter", self.directory.join("arbiter"))
                .option("--journal", self.journal(id))
                .option("--listen", id.log_address().to_string())
                .option("--peer", id.peer().log_address().to_string())
                // Between namespaces of one machine, where whoever can listen is root already.
                .word("--plaintext")
                .option("--host-name", id.name())
                .option("--devices", "blk0,net0"),
            SHIM => list
                .word("run")
                .option("--vm", VM)
                .option("--ft-log", self.events.socket(id, FT_LOG))
                .options(self.setup.guest.machine())
                .option("--blk", self.events.socket(id, BLK))
                .option("--net", self.events.socket(id, NET))
                .option("--console", self.events.file(id, CONSOLE))
                .option("--reports", self.journal(id)),
            device => {
                list.option("--socket-path", self.events.socket(id, device))
                    .option("--ft-log", self.events.socket(id, FT_LOG))
                    .option("--vm", VM);
                if device == BLK {
                    list.option("--blk-file", self.image(id)).option("--device", "blk0")
                } else {
                    list.option("--tap", TAP)
                        .option("--mac", GUEST_MAC)
                        .option("--device", "net0")
                }
            }
        };
        list.option("--events", self.events.file(id, process));
        let more: &[String] = match process {
            FT_LOG => &self.setup.ft_log_arguments,
            SHIM => &self.setup.shim_arguments,
            _ => &[],
        };
        for argument in more {
            list.word(argument);
        }
        list.0
    }

    /// Waits until a daemon's socket listens.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_for_socket(&self, id: HostId, process: &str, deadline: Instant) -> Result<(), HarnessError> {
        let awaited = format!("the socket of {process} on host {id}");
        self.wait_for(&awaited, id, process, deadline, |events| {
            events.iter().any(|event| event.is(id, process, SOCKET)).then_some(())
        })?;
        // The file appears at bind; whoever connects before listen, an instant later, is refused.
        let path = self.events.socket(id, process);
        let patience = Instant::now() + LISTEN;
        while !self
            .topology
            .host(id)
            .run(|| listening(&path))
            .context(|| "read /proc/net/unix".to_owned())?
        {
            if Instant::now() >= patience {
                let context = self.log_tail(id, process);
                return Err(HarnessError::Deadline {
                    awaited: format!("{awaited} to listen"),
                    context,
                });
            }
            thread::yield_now();
        }
        Ok(())
    }

    /// Waits until the two sides are paired.
    ///
    /// # Errors
    /// When they are not in time, or a process ends.
    pub fn wait_for_pairing(&self, deadline: Instant) -> Result<(), HarnessError> {
        self.wait_for(
            "ft-log's event `paired` on host A",
            HostId::A,
            FT_LOG,
            deadline,
            |events| {
                events
                    .iter()
                    .any(|event| event.is(HostId::A, FT_LOG, "paired"))
                    .then_some(())
            },
        )
    }

    /// Waits until the guest, wherever it runs, says that it listens.
    ///
    /// # Errors
    /// When it does not in time, or a process ends.
    pub fn wait_for_guest(&self, deadline: Instant) -> Result<(), HarnessError> {
        self.wait_for(
            "the guest's console line `ledger: listening`",
            HostId::A,
            SHIM,
            deadline,
            |events| {
                let listening = |event: &Event| {
                    event.source == CONSOLE
                        && event
                            .text("text")
                            .is_some_and(|line| line.contains("ledger: listening"))
                };
                events.iter().any(listening).then_some(())
            },
        )
    }

    /// Waits until a process has ended; says how. Other processes may end before it.
    ///
    /// # Errors
    /// When it has not in time.
    pub fn wait_for_exit(&self, id: HostId, process: &str, deadline: Instant) -> Result<Exit, HarnessError> {
        let ended = |events: &[Event]| {
            events
                .iter()
                .find(|event| event.is(id, process, EXITED))
                .and_then(Exit::from_event)
        };
        self.events
            .wait(deadline, ended, |_| None)
            .map_err(|_| HarnessError::Deadline {
                awaited: format!("the end of {process} on host {id}"),
                context: self.log_tail(id, process),
            })
    }

    /// Waits for what `pick` finds in the events. A process that ends meanwhile, unless its host is to die at a crash point,
    /// ends the wait. `id` and `process` say whose log explains it if it does not come.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn wait_for<T>(
        &self,
        awaited: &str,
        id: HostId,
        process: &str,
        deadline: Instant,
        pick: impl FnMut(&[Event]) -> Option<T>,
    ) -> Result<T, HarnessError> {
        let may_die = self.setup.crash.as_ref().map(|(host, _)| *host);
        let mut dead: Option<(HostId, String)> = None;
        let waited = self.events.wait(deadline, pick, |events| {
            let event = events
                .iter()
                .find(|event| event.name == EXITED && Some(event.host) != may_die)?;
            dead = Some((event.host, event.source.clone()));
            let exit = Exit::from_event(event).expect("an exit has a status");
            Some(format!("{} on host {} ended with {exit}", event.source, event.host))
        });
        waited.map_err(|error| match error {
            WaitError::Deadline => HarnessError::Deadline {
                awaited: awaited.to_owned(),
                context: self.log_tail(id, process),
            },
            WaitError::Aborted(happened) => HarnessError::Unexpected {
                awaited: awaited.to_owned(),
                happened,
                context: dead
                    .map(|(id, process)| self.log_tail(id, &process))
                    .unwrap_or_default(),
            },
        })
    }

    /// What a process wrote to stderr so far.
    #[must_use]
    pub fn log(&self, id: HostId, process: &str) -> String {
        let path = HostProcesses::log_file(&self.directory.join("logs"), id, process);
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    /// The last lines of a process' log, for an error message.
    fn log_tail(&self, id: HostId, process: &str) -> String {
        let log = self.log(id, process);
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(15)..];
        format!("\n--- end of the log of {process} on host {id}:\n{}", tail.join("\n"))
    }
}

/// An argument list under construction.
#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn word(&mut self, word: impl AsRef<OsStr>) -> &mut Self {
        self.0.push(word.as_ref().to_owned());
        self
    }

    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.word(name).word(value)
    }

    fn options(&mut self, options: impl IntoIterator<Item = (&'static str, String)>) -> &mut Self {
        for (name, value) in options {
            self.option(name, value);
        }
        self
    }
}

/// Whether a unix socket of this network namespace listens at `path`.
fn listening(path: &Path) -> std::io::Result<bool> {
    /// `__SO_ACCEPTCON`, as /proc/net/unix prints the flags.
    const ACCEPTS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/thread-self/net/unix")?;
    let path = path.to_string_lossy();
    Ok(sockets
        .lines()
        .any(|line| line.ends_with(&*path) && line.split_whitespace().nth(3) == Some(ACCEPTS)))
}
