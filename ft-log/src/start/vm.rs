//! One VM of the process: its thread, and everything that may be missing or taken, found before anything starts.

use std::{io, sync::Arc};

use ft_client::{events::Events, journal::JournalLock};
use tracing::error_span;

use super::{
    kernel,
    sockets::{SocketFile, local_socket, sockets},
};
use crate::{
    arbiter::{Arbiter, ArbiterAddress},
    config::Config,
    control::Shared,
    daemon::{Daemon, Over, Parts},
    earlier_journal,
    exit::StartError,
    local::Local,
    tls::Identity,
    uring::Uring,
};

/// Starts the thread of a VM. `up` is called in it when local processes can join; `ended` when it is over, or cannot be started.
pub(super) fn start(
    config: Config,
    shared: Arc<Shared>,
    is_one_of_several: bool,
    up: impl FnOnce() + Send + 'static,
    ended: impl FnOnce(Result<Over, StartError>) + Clone + Send + 'static,
) {
    let name = config.vm.clone();
    let told = ended.clone();
    let body = move || {
        let _abort = AbortOnPanic;
        // Of several, every line says which.
        let span = is_one_of_several.then(|| error_span!("vm", name = %config.vm).entered());
        let over = run(config, shared, up);
        drop(span);
        ended(over);
    };
    if let Err(source) = std::thread::Builder::new().name(format!("vm {name}")).spawn(body) {
        told(Err(kernel("start the VM's thread")(source)));
    }
}

/// A thread that panics leaves no half of a daemon behind, however the program was built.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

fn run(config: Config, shared: Arc<Shared>, up: impl FnOnce()) -> Result<Over, StartError> {
    raise_priority();
    // Both go after the daemon.
    let (daemon, _held) = open(config, Arc::clone(&shared))?;
    shared.set_up();
    up();
    daemon.run().map_err(kernel("go on with io_uring"))
}

/// What a VM's thread holds beside the daemon.
struct Held {
    _socket: SocketFile,
    _journal: Option<JournalLock>,
}

fn open(config: Config, shared: Arc<Shared>) -> Result<(Daemon, Held), StartError> {
    let socket = local_socket(&config.socket_path)?;
    let socket_file = SocketFile(config.socket_path.clone());
    let events = Events::open("ft-log", config.events.as_deref()).map_err(|source| StartError::Path {
        path: config.events.clone().unwrap_or_default(),
        what: "open the events file",
        source,
    })?;
    let prepare = |directory| earlier_journal::prepare(directory, &config.vm, config.journal_earlier);
    let journal = config.journal.as_deref().map(prepare).transpose()?;
    // Later it may come and go; a backup with a mistyped path would learn of it at the failover.
    if let ArbiterAddress::Directory(path) = &config.arbiter {
        std::fs::read_dir(path).map_err(|source| StartError::Path {
            path: path.clone(),
            what: "read the arbiter's directory (--arbiter)",
            source,
        })?;
    }
    let identity = identity(&config)?;
    let (listener, heartbeats) = sockets(&config, identity.is_some())?;
    let local = Local::new(&config.devices).map_err(kernel("make shared memory for the VM"))?;
    shared.set_counters(local.counters());
    let arbiter = Arbiter::new(&config.arbiter, &config.vm, &config.host())
        .map_err(kernel("read random bytes and start the arbiter's thread"))?;
    let instance = random().map_err(kernel("read random bytes"))?;
    let ring = Uring::new().map_err(kernel(
        "set up io_uring (kernel 5.11 or newer, and not disabled by sysctl)",
    ))?;
    let parts = Parts {
        ring,
        events: events.about(&config.vm),
        socket: socket.into(),
        listener,
        heartbeats,
        local,
        arbiter,
        shared,
        identity,
        instance,
    };
    let daemon = Daemon::new(config, parts).map_err(kernel("go on with io_uring"))?;
    let held = Held {
        _socket: socket_file,
        _journal: journal,
    };
    Ok((daemon, held))
}

/// Who this side is, where TLS is wanted; [`Config::check`] made sure that it is given wherever it must be.
fn identity(config: &Config) -> Result<Option<Identity>, StartError> {
    match (&config.tls_cert, &config.tls_key, &config.tls_peer) {
        (Some(certificate), Some(key), Some(peer)) if !config.alone => {
            Ok(Some(Identity::read(certificate, key, peer)?))
        }
        _ => Ok(None),
    }
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Heartbeats must not be late on a loaded host. Without the right to do so this stays an ordinary thread; Linux keeps this for each
/// thread, whatever the call's name says.
fn raise_priority() {
    const NICE: i32 = -10;
    // SAFETY: no memory is involved.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}
