//! From the command line to a running daemon: everything that may be missing or taken is found here, before anything starts.
//!
//! Sockets are made and bound by plain system calls: that happens once, and io_uring has these operations only on newer kernels.

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener, UdpSocket},
    os::{
        fd::OwnedFd,
        unix::{
            fs::FileTypeExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ft_client::events::Events;
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};

use crate::{
    arbiter::{Arbiter, ArbiterAddress},
    config::{Config, Side},
    control::{Control, Shared},
    daemon::{Daemon, Parts},
    earlier_journal,
    exit::{Exit, StartError},
    heartbeat::Heartbeats,
    local::Local,
    tls::Identity,
    uring::Uring,
};

/// Starts, runs and ends the daemon.
///
/// # Errors
/// [`StartError`]: nothing was started, and nothing that was there is damaged.
pub fn run(config: Config) -> Result<Exit, StartError> {
    let kernel = |what: &'static str| move |source: io::Error| StartError::Kernel { what, source };
    let signals = signals().map_err(kernel("watch for signals"))?;
    let socket = local_socket(&config.socket_path)?;
    let _guard = SocketFile(config.socket_path.clone());
    let events = Events::open("ft-log", config.events.as_deref()).map_err(|source| StartError::Path {
        path: config.events.clone().unwrap_or_default(),
        what: "open the events file",
        source,
    })?;
    let prepare = |directory| earlier_journal::prepare(directory, &config.vm, config.journal_earlier);
    let _journal_lock = config.journal.as_deref().map(prepare).transpose()?;
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
    let arbiter = Arbiter::new(&config.arbiter, &config.vm, &config.host())
        .map_err(kernel("read random bytes and start the arbiter's thread"))?;
    let instance = random().map_err(kernel("read random bytes"))?;
    let ring = Uring::new().map_err(kernel(
        "set up io_uring (kernel 5.11 or newer, and not disabled by sysctl)",
    ))?;
    let shared = Arc::new(Shared::new(&config));
    shared.set_doorbell(
        local
            .doorbell()
            .map_err(kernel("hand the doorbell to the management plane"))?,
    );
    let _control_guards = start_control(&config, &shared)?;
    raise_priority();
    let daemon = Daemon::new(
        config,
        Parts {
            ring,
            events,
            signals,
            socket: socket.into(),
            listener,
            heartbeats,
            local,
            arbiter,
            shared,
            identity,
            instance,
        },
    );
    daemon.and_then(Daemon::run).map_err(kernel("go on with io_uring"))
}

/// Starts the management plane; its socket files go with what this gives.
fn start_control(config: &Config, shared: &Arc<Shared>) -> Result<Vec<SocketFile>, StartError> {
    let control = Control {
        socket: config.control.clone(),
        metrics: config.metrics.clone(),
    };
    control.socket_files().try_for_each(clear_stale_socket)?;
    let guards = control.socket_files().map(|path| SocketFile(path.to_owned())).collect();
    control.start(Arc::clone(shared)).map_err(|error| StartError::Control {
        address: error.address,
        source: error.source,
    })?;
    Ok(guards)
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Our socket file, which goes with us.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn signals() -> io::Result<OwnedFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?;
    use std::os::fd::AsFd;
    signals.as_fd().try_clone_to_owned()
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

fn sockets(config: &Config, is_authenticated: bool) -> Result<(Option<OwnedFd>, Option<Heartbeats>), StartError> {
    let (Some(listen), Some(peer)) = (config.listen, config.peer) else {
        return Ok((None, None));
    };
    if config.alone {
        return Ok((None, None));
    }
    let failed = |what: &'static str| {
        move |source: io::Error| StartError::Address {
            address: listen,
            what,
            source,
        }
    };
    let heartbeats = patiently(|| UdpSocket::bind(listen)).map_err(failed("bind the heartbeats' UDP socket"))?;
    let listener = match config.role {
        // The standard library sets SO_REUSEADDR.
        Side::Backup => {
            Some(patiently(|| TcpListener::bind(listen)).map_err(failed("listen for the logging channel"))?)
        }
        Side::Primary => None,
    };
    let address: SocketAddr = peer;
    Ok((
        listener.map(OwnedFd::from),
        Some(Heartbeats::new(
            heartbeats.into(),
            address,
            &config.vm,
            is_authenticated,
        )),
    ))
}

/// Listens on `path`. A socket file that nobody listens on any more is replaced.
fn local_socket(path: &Path) -> Result<UnixListener, StartError> {
    let failed = |what: &'static str| {
        move |source: io::Error| StartError::Path {
            path: path.to_owned(),
            what,
            source,
        }
    };
    clear_stale_socket(path)?;
    UnixListener::bind(path).map_err(failed("listen on the socket"))
}

/// Tries again for a moment what fails because an address is in use: the io_uring of a daemon that was just killed keeps its
/// sockets until the kernel has cancelled what was in flight.
fn patiently<T>(attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    const ATTEMPTS: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(10);
    for _ in 1..ATTEMPTS {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::AddrInUse => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
    attempt()
}

/// Removes a socket file that nobody listens on any more; anything else is left alone.
fn clear_stale_socket(path: &Path) -> Result<(), StartError> {
    let failed = |what: &'static str| {
        move |source: io::Error| StartError::Path {
            path: path.to_owned(),
            what,
            source,
        }
    };
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(StartError::NotASocket { path: path.to_owned() });
        }
        let is_free = || match UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(ErrorKind::AddrInUse.into()),
        };
        match patiently(is_free) {
            Ok(()) => std::fs::remove_file(path).map_err(failed("replace the stale socket"))?,
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                return Err(StartError::SocketInUse { path: path.to_owned() });
            }
            Err(error) => return Err(failed("find out whether the socket is in use")(error)),
        }
    }
    Ok(())
}

/// Heartbeats must not be late on a loaded host. Without the right to do so this stays an ordinary process.
fn raise_priority() {
    const NICE: i32 = -10;
    // SAFETY: no memory is involved.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}
