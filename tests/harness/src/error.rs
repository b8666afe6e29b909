//! What can go wrong in the harness itself, as opposed to what the witness finds.

use std::io;
use std::path::PathBuf;

use crate::ledger::LedgerError;

/// A run that could not be carried out. What a run *showed* is never an error: see [`crate::judge`] and [`crate::roles`].
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// The machine lacks something the harness needs; the text says what to do.
    #[error("{0}")]
    Environment(String),
    /// A system call on behalf of the harness failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was attempted.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// An `ip` command failed.
    #[error("`ip {command}` in namespace {namespace} failed: {stderr}")]
    Ip {
        /// The namespace it ran in.
        namespace: String,
        /// Its arguments or its batch.
        command: String,
        /// What it said.
        stderr: String,
    },
    /// An event did not come before the run's deadline.
    #[error("waited for {awaited}, which did not come{context}")]
    Deadline {
        /// What was awaited.
        awaited: String,
        /// The tail of the logs concerned.
        context: String,
    },
    /// Something happened that makes waiting pointless.
    #[error("while waiting for {awaited}: {happened}{context}")]
    Unexpected {
        /// What was awaited.
        awaited: String,
        /// What happened instead.
        happened: String,
        /// The tail of the logs concerned.
        context: String,
    },
    /// The guest's bytes make no sense.
    #[error("{what}: {source}")]
    Ledger {
        /// Which bytes.
        what: String,
        /// What is wrong with them.
        source: LedgerError,
    },
    /// A file that must exist does not.
    #[error("{} is missing: {advice}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What to do.
        advice: String,
    },
}

/// Adds what was attempted to an [`io::Error`].
pub trait IoContext<T> {
    /// Names the action that failed.
    ///
    /// # Errors
    /// The same error, with the action.
    fn context(self, action: impl FnOnce() -> String) -> Result<T, HarnessError>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T, HarnessError> {
        self.map_err(|source| HarnessError::Io {
            action: action(),
            source: source.into(),
        })
    }
}
