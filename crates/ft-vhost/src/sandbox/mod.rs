//! The sandbox: what is left to a daemon that a guest or a frontend has taken over.
//!
//! ```text
//!  files, sockets, image opened ─► [Sandbox::enter] ─► threads, frontends, guests
//!                                   ├ [places]  Landlock: files only where this daemon makes them, no TCP, no signals to others
//!                                   └ [calls]   seccomp: the system calls of its work; another one ends it (SIGSYS, then SIGABRT)
//! ```
//! Entered before the first thread, so that every thread is in it. Operations of an io_uring are no system calls: seccomp does not see
//! them, Landlock does.

use std::path::{Path, PathBuf};

use thiserror::Error;
use tracing::{info, warn};

use crate::exit::End;

mod calls;
mod places;
mod violation;

/// Whether a daemon confines itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Confinement {
    /// To the files and system calls it needs.
    #[default]
    On,
    /// Not at all.
    Off,
}

/// Why a daemon cannot confine itself.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// Landlock failed.
    #[error("Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter of system calls cannot be made.
    #[error("seccomp: {0}")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel does not take it.
    #[error("seccomp: {0}")]
    Seccomp(#[from] seccompiler::Error),
    /// No handler for SIGSYS.
    #[error("SIGSYS: {0}")]
    Handler(#[from] nix::Error),
}

/// What a daemon needs once it has started, beside its open files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    sockets: Vec<PathBuf>,
    files: Vec<PathBuf>,
    appended: Vec<PathBuf>,
    network: bool,
}

impl Sandbox {
    /// A socket that it binds and removes.
    pub fn binds(&mut self, path: &Path) {
        self.sockets.push(path.into());
    }

    /// A file that it makes, reads, replaces and removes, with others beside it.
    pub fn keeps(&mut self, path: &Path) {
        self.files.push(path.into());
    }

    /// A file that is there, and grows.
    pub fn appends(&mut self, path: &Path) {
        self.appended.push(path.into());
    }

    /// TAP interfaces and packet sockets, as long as it lives.
    pub fn networks(&mut self) {
        self.network = true;
    }

    /// Confines this thread, and those that it starts from here on, for good.
    ///
    /// # Errors
    /// [`SandboxError`], for the operator. Without Landlock, which a kernel may lack, the log says so and seccomp is all there is.
    pub fn enter(&self) -> Result<(), End> {
        let refused = |error: SandboxError| {
            End::environment(format!(
                "the sandbox cannot be entered ({error}): --sandbox off does without it"
            ))
        };
        violation::end_clearly().map_err(|errno| refused(errno.into()))?;
        match places::confine(self).map_err(refused)? {
            true => info!("in the sandbox"),
            false => warn!(
                "in the sandbox, without Landlock: this kernel does not have it, and files are as open as they are to this user"
            ),
        }
        calls::confine(self).map_err(refused)
    }
}
