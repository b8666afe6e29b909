//! How this process ends: the exit codes of docs/interfaces.md §3.

use std::{io, net::SocketAddr, path::PathBuf};

use thiserror::Error;

/// Exit status. Wrong usage (2) is clap's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The guest powered off, or the operator ended this daemon.
    Ordinary = 0,
    /// A file, a socket or the peer is missing, refused or broken.
    Environment = 3,
    /// The arbiter gave the generation to somebody else.
    LostArbitration = 4,
    /// The local replay is not the primary's execution.
    Diverged = 5,
    /// A local sibling ended or broke the rules: so did this replica.
    LocalFailure = 6,
    /// `dump`, `verify`, `stats`: the journal's last entry was not finished; everything before it is whole.
    TornJournal = 7,
    /// `dump`, `verify`, `stats`: something in the journal was changed, or is missing in its middle.
    DamagedJournal = 8,
}

impl Exit {
    /// The status of a process with several VMs, of which one ended with `other`: the greater one.
    #[must_use]
    pub fn worse(self, other: Self) -> Self {
        if other as u8 > self as u8 { other } else { self }
    }
}

/// Why the daemon cannot start. Each is one line that tells the operator what to do.
#[derive(Debug, Error)]
pub enum StartError {
    /// A live daemon has the socket.
    #[error(
        "{path}: another ft-log is listening on this socket: end it, or give another path (--socket-path, --control, --metrics)"
    )]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket is in its place.
    #[error("{path}: this file exists and is not a socket: give another path (--socket-path, --control, --metrics)")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// A file or directory cannot be used.
    #[error("{path}: cannot {what}: {source}")]
    Path {
        /// The path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// An address cannot be used.
    #[error("{address}: cannot {what}: {source} (--listen must be a free address of this host)")]
    Address {
        /// The address.
        address: SocketAddr,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// There is a journal already.
    #[error(
        "{directory}: the journal of {name} is already here: move it away, give another --journal, or let --journal-earlier archive do it"
    )]
    JournalExists {
        /// The directory.
        directory: PathBuf,
        /// Which journal.
        name: String,
    },
    /// Somebody else writes the journal.
    #[error(transparent)]
    JournalLocked(#[from] ft_client::journal::LockError),
    /// The management plane cannot listen.
    #[error("{address}: cannot listen for --control or --metrics: {source}")]
    Control {
        /// Where.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// The identities of the pair cannot be used.
    #[error(transparent)]
    Identity(#[from] crate::tls::IdentityError),
    /// The host does not let the process have enough files.
    #[error(
        "{vms} VMs need up to {needed} open files, and this process may have {hard}: raise its limit (LimitNOFILE= of the unit, or ulimit -n)"
    )]
    OpenFiles {
        /// VMs of the configuration.
        vms: usize,
        /// Files they need.
        needed: u64,
        /// The hard limit.
        hard: u64,
    },
    /// The kernel refuses something.
    #[error("cannot {what}: {source}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}
