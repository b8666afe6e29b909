//! From the command line to running VMs, and to the end of the last one.
//!
//! ```text
//!  main's thread ──► [supervise] ◄─ up, ended ─┬─ thread of VM a: [vm] opens everything, then `Daemon::run`
//!     ▲                  │                     └─ thread of VM b: ...
//!     └─ SIGTERM ─► stop to all               control plane: its own threads, see `control`
//! ```
//! A VM that cannot start, or ends, takes no other one with it: it is told of in the log, the status and the metrics, its local
//! processes lose their socket, and the others go on. The process ends when the last VM does, with the greatest of their statuses. A
//! bug is another matter: a panic in any thread aborts the process.

mod files;
mod sockets;
mod vm;

use std::{
    io,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
};

use nix::sys::signal::{SigSet, Signal};
use sd_notify::NotifyState;
use tracing::{error, info, warn};

use self::sockets::{SocketFile, clear_stale_socket};
use crate::{
    config::Process,
    control::{Control, Shared, shared::StoppedBy},
    daemon::Over,
    exit::{Exit, StartError},
};

/// What the supervisor hears.
enum Notice {
    /// A VM is up: its local processes can join.
    Up,
    /// A VM's thread is over. Boxed: an error has more to say than the other notices.
    Ended(usize, Box<Result<Over, StartError>>),
    /// SIGTERM or SIGINT.
    Terminate,
}

fn kernel(what: &'static str) -> impl Fn(io::Error) -> StartError {
    move |source| StartError::Kernel { what, source }
}

/// Starts, runs and ends the VMs of this process.
///
/// # Errors
/// [`StartError`]: nothing was started, and nothing that was there is damaged. One of several VMs that cannot start is no error here,
/// unless it is all of them.
pub fn run(process: Process) -> Result<Exit, StartError> {
    files::allow(process.vms.len())?;
    // Before there is another thread: each has them blocked then.
    let signals = block_signals().map_err(kernel("block signals"))?;
    let shared = process.vms.iter().map(|config| Shared::new(config).map(Arc::new));
    let vms: Vec<_> = shared
        .collect::<io::Result<_>>()
        .map_err(kernel("make an eventfd for orders"))?;
    let _socket_files = start_control(&process, &vms)?;
    let (tell, notices) = channel();
    watch_signals(signals, tell.clone()).map_err(kernel("start the thread for signals"))?;
    let is_one_of_several = vms.len() > 1;
    for (at, (config, shared)) in process.vms.into_iter().zip(&vms).enumerate() {
        let tell_up = tell.clone();
        let tell_end = tell.clone();
        let up = move || drop(tell_up.send(Notice::Up));
        let ended = move |over| drop(tell_end.send(Notice::Ended(at, Box::new(over))));
        vm::start(config, Arc::clone(shared), is_one_of_several, up, ended);
    }
    supervise(&vms, &notices)
}

/// Waits for the end of the last VM.
fn supervise(vms: &[Arc<Shared>], notices: &Receiver<Notice>) -> Result<Exit, StartError> {
    let service = Service { vms };
    let mut running = vms.len();
    let mut exit = Exit::Ordinary;
    let mut failed = Vec::new();
    while running > 0 {
        // The thread for signals has a sender for ever.
        let Ok(notice) = notices.recv() else { break };
        match notice {
            Notice::Up => service.tell(),
            Notice::Ended(at, over) => {
                running -= 1;
                match *over {
                    Ok(over) => {
                        exit = exit.worse(over.exit);
                        vms[at].set_ended(over.exit, over.reason);
                    }
                    Err(error) => {
                        exit = exit.worse(Exit::Environment);
                        vms[at].set_ended(Exit::Environment, error.to_string());
                        failed.push(error);
                    }
                }
                if vms.len() > 1 {
                    tell_end(&vms[at], running);
                }
                service.tell();
            }
            Notice::Terminate => {
                service.stopping();
                vms.iter().for_each(|vm| vm.order_stop(StoppedBy::Signal));
            }
        }
    }
    match failed.pop() {
        // Whoever has one VM is told by the error itself.
        Some(error) if vms.len() == 1 => Err(error),
        _ => Ok(exit),
    }
}

/// One of several VMs is over.
fn tell_end(vm: &Shared, running: usize) {
    let Some(ended) = vm.ended() else { return };
    let (name, status, reason) = (&vm.identity.vm, ended.exit as u8, &ended.reason);
    match ended.exit {
        Exit::Ordinary => info!("VM '{name}' is over: {reason}; {running} of this process go on"),
        _ => error!("VM '{name}' is over (status {status}): {reason}; {running} of this process go on"),
    }
}

/// What systemd is told.
struct Service<'a> {
    vms: &'a [Arc<Shared>],
}

impl Service<'_> {
    /// Ready as soon as every VM is up or has been given up, unless there is none left. Who goes on is told whenever that changes.
    fn tell(&self) {
        let is_decided = |vm: &Arc<Shared>| vm.is_up() || vm.ended().is_some();
        let over: Vec<_> = self.vms.iter().filter(|vm| vm.ended().is_some()).collect();
        if !self.vms.iter().all(is_decided) || over.len() == self.vms.len() {
            return;
        }
        let names: Vec<_> = over.iter().map(|vm| vm.identity.vm.as_str()).collect();
        let (left, all) = (self.vms.len() - over.len(), self.vms.len());
        let status = match names[..] {
            [] => format!("{all} VMs"),
            _ => format!("{left} of {all} VMs; over: {}", names.join(", ")),
        };
        notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
    }

    fn stopping(&self) {
        notify(&[NotifyState::Stopping]);
    }
}

fn notify(states: &[NotifyState<'_>]) {
    match sd_notify::notify(states) {
        Ok(()) => {}
        // Nobody asked to be told.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => warn!("the service manager cannot be told: {error}"),
    }
}

/// Starts the management plane; its socket files go with what this gives.
fn start_control(process: &Process, vms: &[Arc<Shared>]) -> Result<Vec<SocketFile>, StartError> {
    let control = Control {
        socket: process.control().cloned(),
        metrics: process.metrics().cloned(),
    };
    control.socket_files().try_for_each(clear_stale_socket)?;
    let guards = control.socket_files().map(|path| SocketFile(path.to_owned())).collect();
    control.start(vms.to_vec()).map_err(|error| StartError::Control {
        address: error.address,
        source: error.source,
    })?;
    Ok(guards)
}

fn block_signals() -> io::Result<SigSet> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    Ok(set)
}

/// A thread that waits for signals and does nothing else.
fn watch_signals(signals: SigSet, tell: Sender<Notice>) -> io::Result<()> {
    let watch = move || {
        loop {
            match signals.wait() {
                Ok(_) => {
                    if tell.send(Notice::Terminate).is_err() {
                        return;
                    }
                }
                Err(error) => warn!("waiting for signals: {error}"),
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(watch)
        .map(drop)
}
