//! Where frontends come from: a socket of our own, one that was inherited (listening or connected), or systemd.

use std::{
    fmt, io,
    os::{
        fd::{AsFd, FromRawFd, OwnedFd, RawFd},
        unix::{
            fs::FileTypeExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::socket::{AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt},
};
use thiserror::Error;

use super::Accepting;

/// First descriptor that is not one of the standard streams.
const FIRST_FREE_FD: RawFd = 3;

/// Why the socket cannot be had.
#[derive(Debug, Error)]
pub enum ListenError {
    /// A live process has it.
    #[error("{0} is in use by a running process: stop that one, or choose another --socket-path")]
    InUse(PathBuf),
    /// Something that is not a socket is there; it is left alone.
    #[error("{0} exists and is not a socket: remove it, or choose another --socket-path")]
    NotASocket(PathBuf),
    /// The kernel says no.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// Socket path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The inherited descriptor is not one that frontends can come from.
    #[error("descriptor {fd} is {what}: hand over a Unix stream socket, listening or connected")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What it is instead.
        what: String,
    },
    /// systemd handed over nothing, or too much.
    #[error(
        "systemd handed over {0} sockets, one is needed: a .socket unit with one ListenStream=, or --socket-path or --fd"
    )]
    Activation(usize),
}

/// What the operator named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A path to bind.
    Path(PathBuf),
    /// An inherited descriptor (`--fd`).
    Descriptor(RawFd),
    /// The socket of a systemd unit (`LISTEN_FDS`, sd_listen_fds(3)).
    Activation,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Descriptor(fd) => write!(f, "descriptor {fd}"),
            Self::Activation => f.write_str("the socket of systemd"),
        }
    }
}

/// Where frontends come from.
#[derive(Debug)]
pub enum Frontends {
    /// One after the other.
    Listening(Listener),
    /// This one, and no other.
    Connected(UnixStream),
}

impl Frontends {
    /// Takes what the operator named.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn open(source: &Source) -> Result<Self, ListenError> {
        match source {
            Source::Path(path) => Listener::bind(path).map(Self::Listening),
            Source::Descriptor(fd) => Self::inherit(*fd),
            Source::Activation => {
                let mut handed = sd_notify::listen_fds().map_err(|_| ListenError::Activation(0))?;
                match (handed.len(), handed.next()) {
                    (1, Some(fd)) => Self::inherit(fd),
                    (count, _) => Err(ListenError::Activation(count)),
                }
            }
        }
    }

    /// Whether the socket is not of our making.
    #[must_use]
    pub fn is_inherited(&self) -> bool {
        !matches!(self, Self::Listening(Listener { path: Some(_), .. }))
    }

    /// A handle for the control thread. What stays here removes the socket's file when the daemon ends.
    ///
    /// # Errors
    /// As dup(2).
    pub fn accepting(&self) -> io::Result<Accepting> {
        match self {
            Self::Listening(listener) => listener.try_clone().map(Accepting::From),
            Self::Connected(stream) => stream.try_clone().map(Accepting::Only),
        }
    }

    /// A listening and a connected socket are told apart by `SO_ACCEPTCONN`.
    fn inherit(fd: RawFd) -> Result<Self, ListenError> {
        let refused = |what: &str| ListenError::Descriptor { fd, what: what.into() };
        if fd < FIRST_FREE_FD {
            return Err(refused("a standard stream"));
        }
        // SAFETY: a descriptor number that the operator or systemd gave to this process, for it to own; it is taken once, at the
        // start, before anything here was opened under that number, and the next line finds out whether it is open at all.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        if fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).is_err() {
            // Not open: there is nothing to close.
            std::mem::forget(owned);
            return Err(refused("not open"));
        }
        match getsockopt(&owned, sockopt::SockType) {
            Ok(SockType::Stream) => {}
            Ok(other) => return Err(refused(&format!("a socket of type {other:?}"))),
            Err(_) => return Err(refused("not a socket")),
        }
        if !is_unix(&owned) {
            return Err(refused("not a Unix socket"));
        }
        match getsockopt(&owned, sockopt::AcceptConn) {
            Ok(true) => Ok(Self::Listening(Listener {
                listener: owned.into(),
                path: None,
            })),
            Ok(false) => Ok(Self::Connected(owned.into())),
            Err(errno) => Err(refused(&format!("not to be examined: {errno}"))),
        }
    }
}

fn is_unix(fd: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd;
    getsockname::<SockaddrStorage>(fd.as_fd().as_raw_fd())
        .is_ok_and(|address| address.family() == Some(AddressFamily::Unix))
}

/// A listening socket; the file of one that was bound here goes with it.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: Option<PathBuf>,
}

impl Listener {
    /// Binds `path`. A socket that nobody serves any more is replaced.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let io = |source| ListenError::Io {
            path: path.into(),
            source,
        };
        if let Ok(metadata) = path.symlink_metadata() {
            if !metadata.file_type().is_socket() {
                return Err(ListenError::NotASocket(path.into()));
            }
            if UnixStream::connect(path).is_ok() {
                return Err(ListenError::InUse(path.into()));
            }
            std::fs::remove_file(path).map_err(io)?;
        }
        let listener = UnixListener::bind(path).map_err(io)?;
        Ok(Self {
            listener,
            path: Some(path.into()),
        })
    }

    /// Another handle on the listening socket.
    ///
    /// # Errors
    /// As dup(2).
    pub fn try_clone(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let first = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::InUse(_))));
        drop(first);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let second = Listener::bind(&path).unwrap();
        drop(second);
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    fn inherited(fd: OwnedFd) -> Result<Frontends, ListenError> {
        use std::os::fd::IntoRawFd;
        Frontends::inherit(fd.into_raw_fd())
    }

    #[test]
    fn an_inherited_socket_is_told_by_whether_it_listens() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let frontends = inherited(listener.into());
        assert!(matches!(frontends, Ok(Frontends::Listening(_))), "{frontends:?}");
        drop(frontends);
        assert!(path.exists(), "the file belongs to whoever bound it");
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(matches!(inherited(ours.into()), Ok(Frontends::Connected(_))));
    }

    #[test]
    fn what_no_frontend_can_come_from_is_refused() {
        let file = inherited(tempfile::tempfile().unwrap().into());
        assert!(matches!(&file, Err(ListenError::Descriptor { what, .. }) if what == "not a socket"));
        let datagram = inherited(std::os::unix::net::UnixDatagram::unbound().unwrap().into());
        assert!(matches!(&datagram, Err(ListenError::Descriptor { what, .. }) if what.contains("Datagram")));
        let tcp = inherited(std::net::TcpListener::bind("127.0.0.1:0").unwrap().into());
        assert!(matches!(&tcp, Err(ListenError::Descriptor { what, .. }) if what == "not a Unix socket"));
        let stream = Frontends::inherit(1);
        assert!(matches!(&stream, Err(ListenError::Descriptor { what, .. }) if what == "a standard stream"));
        let closed = Frontends::inherit(100_000);
        assert!(matches!(&closed, Err(ListenError::Descriptor { what, .. }) if what == "not open"));
    }
}
