//! How a daemon ends. Only `main` exits; everybody else returns an [`End`].

use std::process::ExitCode;

use thiserror::Error;

/// Exit codes, the same for both daemons. Wrong usage (2) is clap's; a bug (101 or SIGABRT) is a panic's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// SIGTERM, or the guest powered off.
    Ordinary = 0,
    /// A file, socket, device or peer is missing or refused.
    Environment = 3,
    /// The replica halted: it lost the arbitration, or another of its processes failed. ft-log's log says which.
    Halted = 4,
    /// This replica failed: its ft-log died, or the device cannot stay equal to the other host's.
    ReplicaFailed = 6,
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        Self::from(status as u8)
    }
}

/// Why a daemon ends other than in the ordinary way.
#[derive(Debug, Error)]
pub enum End {
    /// The environment does not let it start or go on.
    #[error("{0}")]
    Environment(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The replica halted.
    #[error("halted: ft-log's log says why")]
    Halted,
    /// The connection to ft-log ended.
    #[error("ft-log is gone: this replica is over")]
    LogGone,
    /// The guest's driver broke the rules of its rings, or an input of the log is not one of this device.
    #[error("the guest or the log broke the rules of the device: {0}")]
    Ring(#[from] crate::guest_side::RingError),
    /// The device cannot stay equal to its other half.
    #[error("{0}")]
    Replica(String),
}

impl End {
    /// An environment failure.
    pub fn environment(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Environment(source.into())
    }

    /// The exit code.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::Environment(_) => Status::Environment,
            Self::Halted => Status::Halted,
            Self::LogGone | Self::Ring(_) | Self::Replica(_) => Status::ReplicaFailed,
        }
    }
}

impl From<ft_client::log::Ended> for End {
    fn from(_: ft_client::log::Ended) -> Self {
        Self::Halted
    }
}
