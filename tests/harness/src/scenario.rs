//! One run from power-on to judgement.
//!
//! ```text
//!  build the network ─► start both hosts' daemons ─► paired ─► guest listens ─► witness connects and appends
//!                                                                                        │ the fault's moment
//!  judge ◄─ survivor's disk ◄─ processes end ◄─ witness audits, powers off ◄─ goes on ◄──┘ fault
//! ```

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{HarnessError, IoContext};
use crate::events::{CONSOLE, Event, Events, SOCKET, WaitError};
use crate::faults::{self, Expected, Fault, FaultPlan};
use crate::judge::{Connection, Transcript, judge};
use crate::ledger::DiskImage;
use crate::process::{EXITED, Exit, HostProcesses, ProcessSpec};
use crate::report::{Report, Timeline, since};
use crate::roles::{BLK, FT_LOG, NET, PROCESSES, Roles, SHIM};
use crate::topology::{GUEST, GUEST_MAC, HostId, TAP, Topology};
use crate::witness::{Plan, Witness};

/// Bytes of each host's disk image.
pub const IMAGE_BYTES: u64 = 16 << 20;
/// Records that fit on it: sector 0 is the header.
pub const RECORDS_MAX: u64 = IMAGE_BYTES / crate::ledger::SECTOR as u64 - 1;
/// Name of the virtual machine.
pub const VM: &str = "ledger";
/// Environment variable that names a crash point to binaries built with `crash-points`.
pub const CRASH_VARIABLE: &str = "FT_CRASH_AT";

/// How long the pair may take to boot, and to end.
const BOOT: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(20);
/// How long the witness waits for an answer before it gives the machine up.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a new socket may take from bind to listen.
const LISTEN: Duration = Duration::from_secs(5);

/// What to run.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Where the four daemons are.
    pub bin_dir: PathBuf,
    /// The guest.
    pub guest: PathBuf,
    /// Seeds payloads and the fault's moment.
    pub seed: u64,
    /// Records to append.
    pub records: u64,
    /// Records a second.
    pub rate: u32,
    /// What is done to the pair.
    pub plan: FaultPlan,
    /// More arguments for both ft-logs (heartbeat timers).
    pub ft_log_arguments: Vec<String>,
    /// Tell on stderr what is going on.
    pub verbose: bool,
}

impl Setup {
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
        if !self.guest.is_file() {
            let advice = "run `cargo build --release` in guest/ledger".to_owned();
            return Err(HarnessError::Missing {
                path: self.guest.clone(),
                advice,
            });
        }
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

/// What a run showed.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The figures.
    pub report: Report,
    /// The fault's moments.
    pub timeline: Timeline,
    /// Everything the witness saw.
    pub transcript: Transcript,
    /// Everything the processes said.
    pub events: Vec<Event>,
}

/// Carries a run out in `directory`, which must be empty.
///
/// # Errors
/// When the run cannot be carried out; what it shows is never an error.
pub fn run(setup: &Setup, directory: &Path) -> Result<Outcome, HarnessError> {
    let mut run = Run::new(setup, directory)?;
    run.boot()?;
    let stream = Witness::connect(run.topology.client(), GUEST.into(), Instant::now() + BOOT)?;
    let plan = Plan {
        seed: setup.seed,
        records: setup.records,
        rate: setup.rate,
        patience: PATIENCE,
    };
    let witness = Witness::start(stream, plan)?;
    run.say("the witness is connected");
    let fault_ns = run.inject(&witness)?;
    let transcript = witness.finish();
    run.say("the witness is done");
    if transcript.connection == Connection::Intact {
        run.wait_for_the_end();
    }
    run.judge(transcript, fault_ns)
}

struct Host {
    id: HostId,
    processes: HostProcesses,
}

struct Run<'a> {
    setup: &'a Setup,
    directory: &'a Path,
    // Dropped in this order: processes before the network and the event list they report to.
    hosts: [Host; 2],
    topology: Topology,
    events: Events,
}

impl<'a> Run<'a> {
    fn new(setup: &'a Setup, directory: &'a Path) -> Result<Self, HarnessError> {
        let make = |path: PathBuf| fs::create_dir_all(&path).context(|| format!("create {}", path.display()));
        for name in ["events", "logs", "arbiter", "A/journal", "B/journal"] {
            make(directory.join(name))?;
        }
        for id in HostId::BOTH {
            let image = directory.join(id.name()).join("disk.img");
            File::create_new(&image)
                .and_then(|file| file.set_len(IMAGE_BYTES))
                .context(|| format!("create {}", image.display()))?;
        }
        let events = Events::watch(&directory.join("events"))?;
        let topology = Topology::new()?;
        let logs = directory.join("logs");
        let hosts = HostId::BOTH.map(|id| Host {
            id,
            processes: HostProcesses::new(id, &logs, events.sink()),
        });
        Ok(Self {
            setup,
            directory,
            hosts,
            topology,
            events,
        })
    }

    fn say(&self, what: &str) {
        if self.setup.verbose {
            eprintln!("[{:.3}] {what}", crate::clock::ms(crate::clock::now_ns()) / 1e3);
        }
    }

    /// Starts everything; returns when the guest listens.
    fn boot(&mut self) -> Result<(), HarnessError> {
        let deadline = Instant::now() + BOOT;
        // The backup first: it listens, the primary connects.
        for stage in [&[FT_LOG][..], &[BLK, NET], &[SHIM]] {
            for index in [1, 0] {
                for process in stage {
                    self.start(index, process)?;
                }
            }
            for id in HostId::BOTH {
                for process in stage.iter().filter(|process| **process != SHIM) {
                    self.wait_for_socket(id, process, deadline)?;
                }
            }
        }
        self.say("everything is started");
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
        )?;
        self.say("paired");
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

    fn start(&mut self, index: usize, process: &'static str) -> Result<(), HarnessError> {
        let id = self.hosts[index].id;
        let environment = match &self.setup.plan {
            FaultPlan::CrashPoint { host, at } if *host == id => vec![(CRASH_VARIABLE.to_owned(), at.clone())],
            _ => Vec::new(),
        };
        let spec = ProcessSpec {
            name: process,
            binary: self.setup.bin_dir.join(process),
            arguments: self.arguments(id, process),
            environment,
        };
        self.hosts[index].processes.start(self.topology.host(id), &spec)
    }

    fn arguments(&self, id: HostId, process: &str) -> Vec<OsString> {
        let own = self.directory.join(id.name());
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |name: &str, value: &dyn AsRef<std::ffi::OsStr>| {
            arguments.push(name.into());
            arguments.push(value.as_ref().into());
        };
        match process {
            FT_LOG => {
                add("--vm", &VM);
                add("--role", &if id == HostId::A { "primary" } else { "backup" });
                add("--socket-path", &self.events.socket(id, FT_LOG));
                add("--arbiter", &self.directory.join("arbiter"));
                add("--journal", &own.join("journal"));
                add("--listen", &id.log_address().to_string());
                add("--peer", &id.peer().log_address().to_string());
                add("--host-name", &id.name());
                add("--devices", &"blk0,net0");
            }
            SHIM => {
                add("run", &"--vm");
                arguments.push(VM.into());
                let mut add = |name: &str, value: &dyn AsRef<std::ffi::OsStr>| {
                    arguments.push(name.into());
                    arguments.push(value.as_ref().into());
                };
                add("--ft-log", &self.events.socket(id, FT_LOG));
                add("--kernel", &self.setup.guest);
                add("--cmdline", &format!("ip={}/24 port={}", GUEST.ip(), GUEST.port()));
                add("--blk", &self.events.socket(id, BLK));
                add("--net", &self.events.socket(id, NET));
                add("--console", &self.events.file(id, CONSOLE));
            }
            device => {
                add("--socket-path", &self.events.socket(id, device));
                add("--ft-log", &self.events.socket(id, FT_LOG));
                add("--vm", &VM);
                if device == BLK {
                    add("--blk-file", &own.join("disk.img"));
                    add("--device", &"blk0");
                } else {
                    add("--tap", &TAP);
                    add("--mac", &GUEST_MAC);
                    add("--device", &"net0");
                }
            }
        }
        arguments.push("--events".into());
        arguments.push(self.events.file(id, process).into());
        if process == FT_LOG {
            arguments.extend(self.setup.ft_log_arguments.iter().map(OsString::from));
        }
        arguments
    }

    fn wait_for_socket(&self, id: HostId, process: &str, deadline: Instant) -> Result<(), HarnessError> {
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

    fn wait_for<T>(
        &self,
        awaited: &str,
        id: HostId,
        process: &str,
        deadline: Instant,
        pick: impl FnMut(&[Event]) -> Option<T>,
    ) -> Result<T, HarnessError> {
        let may_die = match &self.setup.plan {
            FaultPlan::CrashPoint { host, .. } => Some(*host),
            FaultPlan::At(..) | FaultPlan::CutThenKill { .. } => None,
        };
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

    /// The last lines of a process' log, for an error message.
    fn log_tail(&self, id: HostId, process: &str) -> String {
        let path = HostProcesses::log_file(&self.directory.join("logs"), id, process);
        let log = fs::read(&path).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(15)..];
        format!("\n--- end of the log of {process} on host {id}:\n{}", tail.join("\n"))
    }

    /// Waits for the fault's moment and lets it strike. Returns when it did, if the plan has a moment at all.
    fn inject(&self, witness: &Witness) -> Result<Option<u64>, HarnessError> {
        let [a, b] = &self.hosts;
        let at = |moment: &faults::Moment| {
            let reached = witness.wait_until(|progress| progress.answered >= moment.answers);
            if reached {
                // Not waiting for anything: this is the moment the seed chose.
                thread::sleep(moment.offset);
            }
            reached
        };
        let (moment, fault) = match &self.setup.plan {
            FaultPlan::At(Fault::None, _) | FaultPlan::CrashPoint { .. } => return Ok(None),
            FaultPlan::At(fault, moment) => (moment, Some(*fault)),
            FaultPlan::CutThenKill { moment, .. } => (moment, None),
        };
        if !at(moment) {
            return Ok(None);
        }
        self.say("the fault strikes");
        match (fault, &self.setup.plan) {
            (Some(Fault::KillPrimary), _) => faults::kill_host(&self.topology, a.id, &a.processes).map(Some),
            (Some(Fault::KillBackup), _) => faults::kill_host(&self.topology, b.id, &b.processes).map(Some),
            (Some(Fault::Partition), _) => faults::partition(&self.topology).map(Some),
            (None, FaultPlan::CutThenKill { requests, .. }) => {
                let fault_ns = faults::partition(&self.topology)?;
                let sent = witness.progress().sent;
                // When all records are sent before that, the primary dies at the end of them.
                let _ = witness
                    .wait_until(|progress| progress.sent >= sent + requests || progress.sent == self.setup.records);
                faults::kill_host(&self.topology, a.id, &a.processes)?;
                Ok(Some(fault_ns))
            }
            (None | Some(Fault::None), _) => unreachable!("these were sorted out above"),
        }
    }

    /// Everything that is expected to end gets the time to do so; whether it did is for [`Roles`] to say.
    fn wait_for_the_end(&self) {
        let ends = |events: &[Event]| {
            let roles = Roles::new(events, 0);
            let ended = |id: &HostId| PROCESSES.iter().all(|process| roles.exit(*id, process).is_some());
            match self.setup.plan.expected() {
                Expected::Both | Expected::One => HostId::BOTH.iter().all(ended),
                Expected::Only(survivor) => ended(&survivor),
            }
            .then_some(())
        };
        let waited = self.events.wait(Instant::now() + END, ends, |_| None);
        self.say(if waited.is_ok() {
            "everything has ended"
        } else {
            "not everything has ended"
        });
    }

    fn judge(self, transcript: Transcript, fault_ns: Option<u64>) -> Result<Outcome, HarnessError> {
        let plan = &self.setup.plan;
        let events = self.events.all();
        let fault_ns = fault_ns.or_else(|| {
            let died = |event: &&Event| Some(event.host) == plan.victim() && event.name == EXITED;
            events.iter().find(died).map(|event| event.t_ns)
        });
        let roles = Roles::new(&events, since(plan, fault_ns));
        let mut problems = roles.problems(plan.expected());
        if let (FaultPlan::CrashPoint { host, at }, None) = (plan, fault_ns) {
            problems.insert(0, format!("host {host} never reached the crash point {at}"));
        }
        let survivor = roles.survivor(plan.expected());
        let image = self.image(survivor)?;
        let disk = DiskImage::read(&image).map_err(|source| HarnessError::Ledger {
            what: format!("disk image of host {survivor}"),
            source,
        })?;
        if plan.expected() == Expected::Both && self.image(survivor.peer())? != image {
            problems.push("after an orderly end the two hosts' disk images differ".to_owned());
        }
        let verdict = judge(&transcript, &disk);
        let timeline = Timeline::new(&events, plan, fault_ns);
        let report = Report::new(
            plan,
            self.setup.seed,
            &transcript,
            &verdict,
            &problems,
            &events,
            &timeline,
        );
        Ok(Outcome {
            report,
            timeline,
            transcript,
            events,
        })
    }

    fn image(&self, id: HostId) -> Result<Vec<u8>, HarnessError> {
        let path = self.directory.join(id.name()).join("disk.img");
        fs::read(&path).context(|| format!("read {}", path.display()))
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
