//! How the shim ends: every way is one exit code and one clear line.

use ft_client::{gate::GateError, handshake::JoinError, log::Ended};
use ft_protocol::{FrameError, Position, replica::Role};
use thiserror::Error;

use crate::lockstep::divergence::Divergence;

/// Why the shim cannot go on.
#[derive(Debug, Error)]
pub enum Error {
    /// A file, socket, device or the host is not as it must be. The text says what to do.
    #[error("{0}")]
    Environment(String),
    /// The guest did something this machine does not have, or KVM could not run it.
    #[error("the guest stopped at exit {} (RIP {:#x}): {reason}", .position.exits, .position.rip)]
    Guest {
        /// Where.
        position: Position,
        /// What.
        reason: String,
    },
    /// The replay is not the recorded execution any more.
    #[error("{0}")]
    Diverged(Box<Divergence>),
    /// The log is damaged.
    #[error("the log is damaged after entry {after}: {source}")]
    Log {
        /// The last good entry.
        after: ft_protocol::Lsn,
        /// What is wrong.
        source: FrameError,
    },
    /// A journal that cannot be read, or is damaged. The text says where.
    #[error("{0}")]
    Journal(String),
    /// The log ends in the middle of something.
    #[error("{0}")]
    LogEnds(String),
    /// ft-log ended this replica.
    #[error(transparent)]
    Ended(#[from] Ended),
    /// A device daemon failed or the replica ended while it was asked.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// Joining failed.
    #[error(transparent)]
    Join(#[from] JoinError),
}

impl Error {
    /// An [`Error::Environment`].
    pub fn environment(text: impl Into<String>) -> Self {
        Self::Environment(text.into())
    }

    /// The exit code of docs/interfaces.md §3.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Environment(_) | Self::Join(_) | Self::LogEnds(_) => 3,
            Self::Ended(Ended { role: Role::Halted }) => 4,
            Self::Diverged(_) | Self::Log { .. } | Self::Journal(_) => 5,
            Self::Guest { .. } | Self::Ended(_) | Self::Gate(_) => 6,
        }
    }
}
