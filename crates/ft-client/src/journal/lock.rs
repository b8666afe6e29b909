//! One writer a journal: whoever writes a VM's journal in a directory, or changes what a writer left there, holds its lock.
//!
//! ```text
//! DIR/<vm>.lock     flock(2), exclusive, for as long as the journal is open; the number of the process that has it, for people
//! ```
//! The kernel takes the lock from a process that dies, whatever it dies of. The file goes with the lock when that is given back in
//! order; one that a dead process left holds nothing up. Readers need no lock.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use thiserror::Error;

use super::parse_file_name;

/// Bytes of a process' number, of which no more is read.
const HOLDER_BYTES_MAX: u64 = 20;

/// Why a journal cannot be locked.
#[derive(Debug, Error)]
pub enum LockError {
    /// Somebody writes it.
    #[error(
        "{path}: the journal of VM '{vm}' here is being written by a running ft-log (process {holder}): end that one first, or use another directory"
    )]
    Held {
        /// The lock file.
        path: PathBuf,
        /// The VM.
        vm: String,
        /// The process, as it said.
        holder: String,
    },
    /// The file system.
    #[error("{path}: cannot lock the journal: {source}")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The right to write and to change one VM's journals in one directory.
#[derive(Debug)]
pub struct JournalLock {
    directory: PathBuf,
    vm: String,
    path: PathBuf,
    _file: Flock<File>,
}

impl JournalLock {
    /// Locks the journals of `vm` in `directory`, which must be there. Does not wait.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn take(directory: &Path, vm: &str) -> Result<Self, LockError> {
        let path = directory.join(format!("{vm}.lock"));
        let failed = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        loop {
            let mut options = File::options();
            let file = options.read(true).write(true).create(true).truncate(false).open(&path);
            let mut file = match Flock::lock(file.map_err(failed)?, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((file, Errno::EWOULDBLOCK)) => {
                    let (vm, holder) = (vm.into(), holder(file));
                    return Err(LockError::Held { path, vm, holder });
                }
                Err((_, error)) => return Err(failed(error.into())),
            };
            // Whoever had it may have removed the file between the two calls: then this is a lock on nothing.
            if !is_same(&file, &path).map_err(failed)? {
                continue;
            }
            // For people only; a full disk must not keep anybody from starting.
            let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
            return Ok(Self {
                directory: directory.to_owned(),
                vm: vm.into(),
                path,
                _file: file,
            });
        }
    }

    /// Locks the journal that a segment belongs to.
    ///
    /// # Errors
    /// [`LockError`]; a file that is no segment's is one too.
    pub fn of_segment(segment: &Path) -> Result<Self, LockError> {
        let name = segment.file_name().and_then(|name| name.to_str());
        let Some((journal, _)) = name.and_then(parse_file_name) else {
            return Err(LockError::Io {
                path: segment.to_owned(),
                source: io::Error::new(io::ErrorKind::InvalidInput, "this is no segment of a journal"),
            });
        };
        Self::take(directory_of(segment), &journal.vm)
    }

    /// Whether the lock is the one of this segment's journal.
    #[must_use]
    pub fn covers(&self, segment: &Path) -> bool {
        let name = segment.file_name().and_then(|name| name.to_str());
        let is_of_vm = name
            .and_then(parse_file_name)
            .is_some_and(|(journal, _)| journal.vm == self.vm);
        is_of_vm && directory_of(segment) == self.directory
    }
}

impl Drop for JournalLock {
    fn drop(&mut self) {
        // While it is held: who waits for it then locks a file of its own making.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Where a segment is, for system calls.
pub(super) fn directory_of(segment: &Path) -> &Path {
    match segment.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

fn is_same(file: &File, path: &Path) -> io::Result<bool> {
    let held = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok((held.dev(), held.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn holder(file: File) -> String {
    let mut text = String::new();
    let _ = file.take(HOLDER_BYTES_MAX).read_to_string(&mut text);
    match text.is_empty() {
        true => "unknown".into(),
        false => text,
    }
}
