//! The real daemons of one host, as one failure unit.
//!
//! All processes of a host are in one process group, so that one `killpg` is the power cord of that host. None outlives
//! the harness (PR_SET_PDEATHSIG), however it ends. A process that ended stays a zombie until the host is dropped, so
//! that its id, which is also the group's, cannot come to mean something else.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use serde_json::{Map, Value};

use crate::clock::now_ns;
use crate::error::{HarnessError, IoContext};
use crate::events::{Event, EventSink};
use crate::netns::Namespace;
use crate::topology::HostId;

/// The event that reports the end of a process.
pub const EXITED: &str = "exited";

/// What to start.
#[derive(Debug, Clone)]
pub struct ProcessSpec {
    /// Its name, also that of its log file.
    pub name: &'static str,
    /// Its binary.
    pub binary: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Environment variables to set.
    pub environment: Vec<(String, String)>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// Reads it from an `exited` event.
    #[must_use]
    pub fn from_event(event: &Event) -> Option<Self> {
        let number = |field: &str| event.number(field).and_then(|value| i32::try_from(value).ok());
        number("code")
            .map(Self::Code)
            .or_else(|| number("signal").map(Self::Signal))
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => unreachable!("an ended process has a code or a signal"),
        }
    }
}

struct Running {
    child: Child,
    watcher: JoinHandle<()>,
}

/// The processes of one host.
pub struct HostProcesses {
    host: HostId,
    log_directory: PathBuf,
    sink: EventSink,
    /// The group's id is the first one's process id; it is not reaped before the others.
    running: Vec<Running>,
}

impl HostProcesses {
    /// A host on which nothing runs yet.
    #[must_use]
    pub fn new(host: HostId, log_directory: &Path, sink: EventSink) -> Self {
        Self {
            host,
            log_directory: log_directory.to_owned(),
            sink,
            running: Vec::new(),
        }
    }

    /// Where a process' stderr goes.
    #[must_use]
    pub fn log_file(log_directory: &Path, host: HostId, process: &str) -> PathBuf {
        log_directory.join(format!("{host}.{process}.log"))
    }

    /// Starts a process in the host's namespace and process group. Its end will be an `exited` event.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&mut self, namespace: &Namespace, spec: &ProcessSpec) -> Result<(), HarnessError> {
        let log = Self::log_file(&self.log_directory, self.host, spec.name);
        let log = File::create(&log).context(|| format!("create {}", log.display()))?;
        let output = log.try_clone().context(|| "duplicate a log file".to_owned())?;
        let mut command = Command::new(&spec.binary);
        command
            .args(&spec.arguments)
            .envs(spec.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(log)
            .process_group(self.group().map_or(0, Pid::as_raw));
        namespace.enter_on_exec(&mut command);
        die_with_the_harness(&mut command);
        let child = command.spawn().context(|| format!("start {}", spec.binary.display()))?;
        let pid = pid_of(&child);
        let (host, name, sink) = (self.host, spec.name, self.sink.clone());
        let watcher = thread::Builder::new()
            .name(format!("{host}.{name}"))
            .spawn(move || watch(pid, host, name, &sink))
            .context(|| "start a thread".to_owned())?;
        self.running.push(Running { child, watcher });
        Ok(())
    }

    /// Kills everything on the host at once.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Asks everything on the host to end.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Sends a signal to everything on the host.
    pub fn signal(&self, signal: Signal) {
        if let Some(group) = self.group() {
            // ESRCH: all of them are zombies already.
            let _ = killpg(group, signal);
        }
    }

    /// The process id of the `index`th process started.
    #[must_use]
    pub fn process_id(&self, index: usize) -> Option<u32> {
        self.running.get(index).map(|running| running.child.id())
    }

    fn group(&self) -> Option<Pid> {
        self.running.first().map(|leader| pid_of(&leader.child))
    }
}

impl Drop for HostProcesses {
    fn drop(&mut self) {
        self.kill();
        // The leader last: its id is the group's.
        for Running { mut child, watcher } in self.running.drain(..).rev() {
            // Killed, hence soon dead; nothing is to be learned from its status, its watcher reported it.
            let _ = child.wait();
            let _ = watcher.join();
        }
    }
}

impl std::fmt::Debug for HostProcesses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostProcesses")
            .field("host", &self.host)
            .field("running", &self.running.len())
            .finish()
    }
}

/// Waits for the end of a process, leaving it to be reaped, and reports it.
fn watch(pid: Pid, host: HostId, name: &str, sink: &EventSink) {
    let exit = loop {
        match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::Exited(_, code)) => break Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => break Exit::Signal(signal as i32),
            // EINTR or a stop: not its end.
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            // Reaped by the host's Drop: nobody wants to know any more.
            Err(_) => return,
        }
    };
    let field = match exit {
        Exit::Code(code) => ("code".to_owned(), Value::from(code)),
        Exit::Signal(signal) => ("signal".to_owned(), Value::from(signal)),
    };
    sink.push(Event {
        t_ns: now_ns(),
        host,
        source: name.to_owned(),
        name: EXITED.to_owned(),
        fields: Map::from_iter([field]),
    });
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("process ids fit in an i32"))
}

/// Makes the kernel kill the process when the thread that started it ends, which is when the run ends.
fn die_with_the_harness(command: &mut Command) {
    let harness = std::process::id();
    let arm = move || -> io::Result<()> {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The harness may have died before the line above.
        if nix::unistd::getppid().as_raw().unsigned_abs() == harness {
            Ok(())
        } else {
            Err(io::Error::from(io::ErrorKind::BrokenPipe))
        }
    };
    // SAFETY: the closure makes two system calls and allocates nothing, so it may run between fork and exec.
    unsafe {
        command.pre_exec(arm);
    }
}
