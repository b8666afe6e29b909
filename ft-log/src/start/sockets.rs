//! The sockets of one VM and of the management plane: bound, or found to be taken by somebody who lives.
//!
//! By plain system calls: that happens once, and io_uring has these operations only on newer kernels.

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
    time::Duration,
};

use crate::{config::Config, exit::StartError, heartbeat::Heartbeats};

/// Our socket file, which goes with us.
pub(super) struct SocketFile(pub(super) PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Listener of the logging channel and socket of the heartbeats, unless the VM runs alone.
pub(super) fn sockets(
    config: &Config,
    is_authenticated: bool,
) -> Result<(Option<OwnedFd>, Option<Heartbeats>), StartError> {
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
    // A primary connects, and listens for a new backup once it is live. The standard library sets SO_REUSEADDR.
    let listener = patiently(|| TcpListener::bind(listen)).map_err(failed("listen for the logging channel"))?;
    let address: SocketAddr = peer;
    Ok((
        Some(listener.into()),
        Some(Heartbeats::new(
            heartbeats.into(),
            address,
            &config.vm,
            is_authenticated,
        )),
    ))
}

/// Listens on `path`. A socket file that nobody listens on any more is replaced.
pub(super) fn local_socket(path: &Path) -> Result<UnixListener, StartError> {
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
pub(super) fn clear_stale_socket(path: &Path) -> Result<(), StartError> {
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
