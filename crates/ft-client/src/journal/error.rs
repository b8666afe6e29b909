//! What can be wrong with a journal, and how it is told.

use std::{fmt, fs, io, path::PathBuf};

use ft_protocol::{
    frame::FrameError,
    ids::{Generation, Lsn},
};
use thiserror::Error;

use super::{JournalLock, SEGMENT_HEADER_BYTES, SUFFIX, lock::directory_of};

/// The last entry that is whole, and where it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LastGood {
    /// Its LSN; 0 if there is none.
    pub lsn: Lsn,
    /// File it is in.
    pub path: PathBuf,
    /// Offset of the first byte behind it.
    pub end: u64,
}

impl fmt::Display for LastGood {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.lsn == Lsn::ZERO {
            return f.write_str("no entry before it is whole");
        }
        let (lsn, path, end) = (self.lsn, self.path.display(), self.end);
        write!(f, "the last good entry is {lsn}, which ends at byte {end} of {path}")
    }
}

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Defect {
    /// The frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A whole entry of another LSN.
    #[error("entry {found} stands here")]
    Order {
        /// Its LSN.
        found: Lsn,
    },
    /// A whole entry of another generation.
    #[error("the entry is of generation {found}")]
    Generation {
        /// Its generation.
        found: Generation,
    },
    /// The frame's length was changed: it reaches beyond the end, but its own bytes or later entries are whole.
    #[error("the frame's length was changed to {length}")]
    Length {
        /// The length it claims.
        length: usize,
    },
    /// The segment ends inside the entry and another segment follows.
    #[error("the segment ends inside the entry, and another one follows")]
    Cut,
}

/// Why a journal cannot be read.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The file system.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No journal there.
    #[error("{directory}: no journal here (files named <vm>.g<generation>.<index>{SUFFIX})")]
    Nothing {
        /// The directory.
        directory: PathBuf,
    },
    /// Several journals there.
    #[error("{directory}: several journals here ({found}): put the one that is meant into a directory of its own")]
    Several {
        /// The directory.
        directory: PathBuf,
        /// Which.
        found: String,
    },
    /// A segment is not there.
    #[error("{path}: this segment is missing; {last_good}")]
    Missing {
        /// The file that should be there.
        path: PathBuf,
        /// What can be used.
        last_good: LastGood,
    },
    /// A segment is not what its name and place say.
    #[error("{path}: {reason}; {last_good}")]
    Segment {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: &'static str,
        /// What can be used.
        last_good: LastGood,
    },
    /// Bytes of an entry are wrong.
    #[error("{path}: entry {lsn} at byte {offset} is damaged: {defect}; {last_good}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the entry starts.
        offset: u64,
        /// Which entry should be there.
        lsn: Lsn,
        /// What is wrong.
        defect: Defect,
        /// What can be used.
        last_good: LastGood,
    },
}

/// Where a journal ends in the middle of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornTail {
    /// The file.
    pub path: PathBuf,
    /// Where the torn entry starts.
    pub offset: u64,
    /// Bytes of it that are there.
    pub bytes: u64,
}

impl fmt::Display for TornTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, offset, bytes) = (self.path.display(), self.offset, self.bytes);
        write!(
            f,
            "{path}: torn at byte {offset} ({bytes} bytes of an unfinished entry)"
        )
    }
}

impl TornTail {
    /// Takes the unfinished entry off the file, for good: nobody writes it, as the lock says, and nobody was told that it is there. A
    /// segment that does not even have its header goes altogether. The tail must have been found while the lock was held.
    ///
    /// # Errors
    /// As truncate(2), unlink(2) and fsync(2).
    ///
    /// # Panics
    /// With the lock of another journal: the caller's bug.
    pub fn cut(&self, lock: &JournalLock) -> io::Result<()> {
        assert!(lock.covers(&self.path), "{lock:?} is not of {}", self.path.display());
        if self.offset >= SEGMENT_HEADER_BYTES as u64 {
            let file = fs::File::options().write(true).open(&self.path)?;
            file.set_len(self.offset)?;
            return file.sync_all();
        }
        fs::remove_file(&self.path)?;
        fs::File::open(directory_of(&self.path))?.sync_all()
    }
}
