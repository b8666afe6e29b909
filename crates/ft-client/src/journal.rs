//! The journal: every entry of one generation of a VM, on disk, as it came. Format and reader; `ft-log` writes it.
//!
//! ```text
//! DIR/<vm>.g<generation>.<index>.journal    index from 000000; a new segment begins at an entry
//!
//! segment = header, then frames (see `ft_protocol::frame`) with dense LSNs
//!   0 magic "FTJOURNL"     8 u32 format version    12 u32 crc32c over bytes 16..128
//!  16 u32 generation      20 u32 index             24 u64 first LSN
//!  32 u32 frame version   36 u8 length of the VM's name   40 the name, zero padded   104 zeros to 128
//! ```
//! Versions of the format: 1, the first.
//!
//! A journal ends where its writer was when it died. Bytes that are only *missing* at the very end are a [`TornTail`]: the
//! reader ends there and says so. Bytes that are *wrong*, anywhere, are an error that names the entry and the place.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use ft_protocol::{
    entry::Entry,
    frame::{self, FrameError},
    ids::{Generation, Lsn},
    limits::{FRAME_BYTES_MAX, HEADER_BYTES, VM_NAME_BYTES_MAX},
};
use thiserror::Error;

/// Version of the segment format.
pub const JOURNAL_VERSION: u32 = 1;
/// Bytes of a segment header.
pub const SEGMENT_HEADER_BYTES: usize = 128;
/// A segment that has reached this size is followed by the next one.
pub const SEGMENT_BYTES: u64 = 64 * 1024 * 1024;
/// No segment is larger: the writer begins a new one before it would be.
pub const SEGMENT_BYTES_MAX: u64 = SEGMENT_BYTES + 16 * 1024 * 1024;

const MAGIC: [u8; 8] = *b"FTJOURNL";
const NAME: usize = 40;
const SUFFIX: &str = ".journal";

const _: () = assert!(NAME + VM_NAME_BYTES_MAX <= SEGMENT_HEADER_BYTES);

/// What a segment says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The VM.
    pub vm: String,
    /// The generation that wrote the entries.
    pub generation: Generation,
    /// Number of the segment, from 0.
    pub index: u32,
    /// LSN of its first entry.
    pub first: Lsn,
}

impl SegmentHeader {
    /// The header's bytes.
    ///
    /// # Panics
    /// If the VM's name is longer than [`VM_NAME_BYTES_MAX`]: it is checked where it enters the program.
    #[must_use]
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        assert!(self.vm.len() <= VM_NAME_BYTES_MAX);
        let mut out = [0; SEGMENT_HEADER_BYTES];
        out[0..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&JOURNAL_VERSION.to_le_bytes());
        out[16..20].copy_from_slice(&self.generation.0.to_le_bytes());
        out[20..24].copy_from_slice(&self.index.to_le_bytes());
        out[24..32].copy_from_slice(&self.first.0.to_le_bytes());
        out[32..36].copy_from_slice(&frame::VERSION.to_le_bytes());
        out[36] = self.vm.len() as u8;
        out[NAME..NAME + self.vm.len()].copy_from_slice(self.vm.as_bytes());
        let checksum = crc32c::crc32c(&out[16..]);
        out[12..16].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads the header at the start of a segment.
    ///
    /// # Errors
    /// What is wrong with it, for a person.
    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let bytes = bytes.get(..SEGMENT_HEADER_BYTES).ok_or("it is too short")?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[0..8] != MAGIC {
            return Err("it is not a journal segment");
        }
        if word(8) != JOURNAL_VERSION {
            return Err("it was written by a release with another journal format");
        }
        if word(12) != crc32c::crc32c(&bytes[16..]) {
            return Err("the checksum of its header does not match");
        }
        if word(32) != frame::VERSION {
            return Err("it was written by a release with another frame format");
        }
        let name = bytes
            .get(NAME..NAME + usize::from(bytes[36]))
            .and_then(|name| String::from_utf8(name.to_vec()).ok())
            .filter(|name| name.len() <= VM_NAME_BYTES_MAX)
            .ok_or("the VM's name in its header is malformed")?;
        Ok(Self {
            vm: name,
            generation: Generation(word(16)),
            index: word(20),
            first: Lsn(u64::from(word(24)) | u64::from(word(28)) << 32),
        })
    }

    /// The segment's file name.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("{}.g{}.{:06}{SUFFIX}", self.vm, self.generation, self.index)
    }
}

/// One journal: a VM and a generation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JournalName {
    /// The VM.
    pub vm: String,
    /// The generation.
    pub generation: Generation,
}

impl fmt::Display for JournalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM '{}' generation {}", self.vm, self.generation)
    }
}

fn parse_file_name(name: &str) -> Option<(JournalName, u32)> {
    let (rest, index) = name.strip_suffix(SUFFIX)?.rsplit_once('.')?;
    let (vm, generation) = rest.rsplit_once(".g")?;
    let journal = JournalName {
        vm: vm.into(),
        generation: Generation(generation.parse().ok()?),
    };
    Some((journal, index.parse().ok()?))
}

/// Every segment in `directory`, in order.
fn segments(directory: &Path) -> Result<Vec<(JournalName, u32, PathBuf)>, JournalError> {
    let failed = |source| JournalError::Io {
        path: directory.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Some((journal, index)) = entry.file_name().to_str().and_then(parse_file_name) {
            found.push((journal, index, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// The journals in `directory`.
///
/// # Errors
/// A directory that cannot be read.
pub fn journals(directory: &Path) -> Result<Vec<JournalName>, JournalError> {
    let mut names: Vec<_> = segments(directory)?.into_iter().map(|(name, ..)| name).collect();
    names.dedup();
    Ok(names)
}

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

/// Reads one journal, entry by entry.
#[derive(Debug)]
pub struct JournalReader {
    name: JournalName,
    segments: Vec<PathBuf>,
    /// Segments opened so far; the last of them is in `bytes`.
    opened: usize,
    bytes: Vec<u8>,
    offset: usize,
    next: Lsn,
    last_good: LastGood,
    torn: Option<TornTail>,
}

impl JournalReader {
    /// Opens the only journal in `directory`.
    ///
    /// # Errors
    /// [`JournalError`]; none or several journals are errors too.
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        let mut names = journals(directory)?;
        let several = names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let Some(name) = names.pop() else {
            return Err(JournalError::Nothing {
                directory: directory.to_owned(),
            });
        };
        if !names.is_empty() {
            return Err(JournalError::Several {
                directory: directory.to_owned(),
                found: several,
            });
        }
        Self::open_named(directory, name)
    }

    /// Opens one journal of several.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open_named(directory: &Path, name: JournalName) -> Result<Self, JournalError> {
        let mut found = Vec::new();
        for (_, index, path) in segments(directory)?.into_iter().filter(|(of, ..)| *of == name) {
            if index as usize != found.len() {
                let missing = SegmentHeader {
                    vm: name.vm.clone(),
                    generation: name.generation,
                    index: found.len() as u32,
                    first: Lsn::ZERO,
                };
                return Err(JournalError::Missing {
                    path: directory.join(missing.file_name()),
                    last_good: LastGood::default(),
                });
            }
            found.push(path);
        }
        if found.is_empty() {
            return Err(JournalError::Nothing {
                directory: directory.to_owned(),
            });
        }
        Ok(Self {
            name,
            segments: found,
            opened: 0,
            bytes: Vec::new(),
            offset: 0,
            next: Lsn(1),
            last_good: LastGood::default(),
            torn: None,
        })
    }

    /// Which journal this is.
    #[must_use]
    pub fn name(&self) -> &JournalName {
        &self.name
    }

    /// The last entry that was read, and where it ended.
    #[must_use]
    pub fn last_good(&self) -> &LastGood {
        &self.last_good
    }

    /// Where the journal was torn; known once [`JournalReader::next_entry`] gave `None`.
    #[must_use]
    pub fn torn_tail(&self) -> Option<&TornTail> {
        self.torn.as_ref()
    }

    /// The next entry, with the bytes of its frame; `None` at the end.
    ///
    /// # Errors
    /// [`JournalError`]: something is missing or damaged. The journal cannot be read beyond that.
    pub fn next_entry(&mut self) -> Result<Option<(Entry<'_>, &[u8])>, JournalError> {
        while self.torn.is_none() && self.offset == self.bytes.len() {
            if self.opened == self.segments.len() {
                return Ok(None);
            }
            self.open_segment()?;
        }
        if self.torn.is_some() {
            return Ok(None);
        }
        let start = self.offset;
        let Some(length) = self.whole_frame()? else {
            self.tear();
            return Ok(None);
        };
        self.check(start, length)?;
        self.offset += length;
        self.last_good = LastGood {
            lsn: self.next,
            path: self.path().to_owned(),
            end: self.offset as u64,
        };
        self.next = self.next.next();
        let bytes = &self.bytes[start..start + length];
        let entry = Entry::decode(bytes).map_err(|source| JournalError::Damaged {
            path: self.segments[self.opened - 1].clone(),
            offset: start as u64,
            lsn: self.last_good.lsn,
            defect: source.into(),
            last_good: self.last_good.clone(),
        })?;
        Ok(Some((entry, bytes)))
    }

    fn path(&self) -> &Path {
        &self.segments[self.opened - 1]
    }

    fn is_last_segment(&self) -> bool {
        self.opened == self.segments.len()
    }

    fn open_segment(&mut self) -> Result<(), JournalError> {
        let path = self.segments[self.opened].clone();
        let failed = |source| JournalError::Io {
            path: path.clone(),
            source,
        };
        let wrong = |reason| JournalError::Segment {
            path: path.clone(),
            reason,
            last_good: self.last_good.clone(),
        };
        if fs::metadata(&path).map_err(failed)?.len() > SEGMENT_BYTES_MAX {
            return Err(wrong("it is larger than a segment can be"));
        }
        let bytes = fs::read(&path).map_err(failed)?;
        let last = self.opened + 1 == self.segments.len();
        let unfinished = bytes.len() < SEGMENT_HEADER_BYTES || bytes.iter().all(|byte| *byte == 0);
        if !(last && unfinished) {
            let header = SegmentHeader::decode(&bytes).map_err(wrong)?;
            if header.vm != self.name.vm || header.generation != self.name.generation {
                return Err(wrong("it belongs to another VM or generation than its name says"));
            }
            if header.index as usize != self.opened {
                return Err(wrong("it is another segment than its name says"));
            }
            if header.first != self.next {
                return Err(wrong("it does not go on where the segment before it ends"));
            }
        }
        self.offset = if last && unfinished { 0 } else { SEGMENT_HEADER_BYTES };
        self.bytes = bytes;
        self.opened += 1;
        if last && unfinished {
            self.tear();
        }
        Ok(())
    }

    fn tear(&mut self) {
        self.torn = Some(TornTail {
            path: self.path().to_owned(),
            offset: self.offset as u64,
            bytes: (self.bytes.len() - self.offset) as u64,
        });
    }

    fn damaged(&self, defect: impl Into<Defect>) -> JournalError {
        JournalError::Damaged {
            path: self.path().to_owned(),
            offset: self.offset as u64,
            lsn: self.next,
            defect: defect.into(),
            last_good: self.last_good.clone(),
        }
    }

    /// Length of the frame at `offset`, all of whose bytes are there; `None` for a torn tail.
    fn whole_frame(&self) -> Result<Option<usize>, JournalError> {
        let rest = &self.bytes[self.offset..];
        let torn = || match self.is_last_segment() {
            true => Ok(None),
            false => Err(self.damaged(Defect::Cut)),
        };
        // Space that was reserved and never written.
        if rest.iter().take(HEADER_BYTES).all(|byte| *byte == 0) && rest.iter().all(|byte| *byte == 0) {
            return torn();
        }
        match frame::peek_length(rest) {
            Err(error) => Err(self.damaged(error)),
            Ok(None) => torn(),
            Ok(Some(length)) if length <= rest.len() => Ok(Some(length)),
            Ok(Some(length)) if is_length_changed(rest, self.next) => Err(self.damaged(Defect::Length { length })),
            Ok(Some(_)) => torn(),
        }
    }

    fn check(&self, start: usize, length: usize) -> Result<(), JournalError> {
        let entry = Entry::decode(&self.bytes[start..start + length]).map_err(|error| self.damaged(error))?;
        if entry.generation != self.name.generation {
            return Err(self.damaged(Defect::Generation {
                found: entry.generation,
            }));
        }
        if entry.lsn != self.next {
            return Err(self.damaged(Defect::Order { found: entry.lsn }));
        }
        Ok(())
    }
}

/// Whether a frame that reaches beyond `rest` does so only because its length is wrong: with the length that the end of the
/// file gives it, it is whole, or whole frames of later entries stand behind it. A torn entry has neither.
fn is_length_changed(rest: &[u8], lsn: Lsn) -> bool {
    let is_whole = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        let length = bytes.len() as u32;
        bytes[0..4].copy_from_slice(&length.to_le_bytes());
        frame::read(&bytes).is_ok()
    };
    if rest.len() >= HEADER_BYTES && rest.len() <= FRAME_BYTES_MAX && is_whole(rest) {
        return true;
    }
    // Only the frame of the very next entry is searched for: whatever stands behind it, that one comes first.
    let next = lsn.next().0.to_le_bytes();
    (HEADER_BYTES..rest.len().saturating_sub(HEADER_BYTES - 1)).any(|at| {
        rest[at + 8..at + 16] == next
            && matches!(frame::peek_length(&rest[at..]), Ok(Some(length)) if rest.get(at..at + length).is_some_and(|bytes| frame::read(bytes).is_ok()))
    })
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
