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
//! Versions of the format: 1, the first. The table of all formats is in docs/log-format.md.
//!
//! A journal ends where its writer was when it died. Bytes that are only *missing* at the very end are a [`TornTail`]: the
//! reader ends there and says so. Bytes that are *wrong*, anywhere, are an error that names the entry and the place.
//! Whoever writes a journal, cuts its tail off or moves it holds its [`JournalLock`].

mod error;
mod lock;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use ft_protocol::{
    entry::Entry,
    frame,
    ids::{Generation, Lsn},
    limits::{FRAME_BYTES_MAX, HEADER_BYTES, VM_NAME_BYTES_MAX},
};

pub use self::{
    error::{Defect, JournalError, LastGood, TornTail},
    lock::{JournalLock, LockError},
};

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
        let checksum = crc_fast::crc32_iscsi(&out[16..]);
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
        if word(12) != crc_fast::crc32_iscsi(&bytes[16..]) {
            return Err("the checksum of its header does not match");
        }
        if word(32) != frame::VERSION {
            return Err("it was written by a release with another frame format");
        }
        let first = Lsn(u64::from(word(24)) | u64::from(word(28)) << 32);
        if matches!(first, Lsn::ZERO | Lsn::MAX) {
            return Err("no entry can have the LSN that it begins with");
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
            first,
        })
    }

    /// The segment's file name.
    #[must_use]
    pub fn file_name(&self) -> String {
        let (vm, generation) = (self.vm.clone(), self.generation);
        segment_file_name(&JournalName { vm, generation }, self.index)
    }
}

fn segment_file_name(journal: &JournalName, index: u32) -> String {
    format!("{}.g{}.{index:06}{SUFFIX}", journal.vm, journal.generation)
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

/// A segment, as its file name says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentFile {
    /// The journal it belongs to.
    pub journal: JournalName,
    /// Its number.
    pub index: u32,
    /// Where it is.
    pub path: PathBuf,
}

/// Every segment in `directory`, in order.
///
/// # Errors
/// A directory that cannot be read.
pub fn segments(directory: &Path) -> Result<Vec<SegmentFile>, JournalError> {
    let failed = |source| JournalError::Io {
        path: directory.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Some((journal, index)) = entry.file_name().to_str().and_then(parse_file_name) {
            let path = entry.path();
            found.push(SegmentFile { journal, index, path });
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
    let mut names: Vec<_> = segments(directory)?.into_iter().map(|file| file.journal).collect();
    names.dedup();
    Ok(names)
}

/// Reads one journal, entry by entry.
#[derive(Debug)]
pub struct JournalReader {
    name: JournalName,
    segments: Vec<PathBuf>,
    /// Number of the first of them.
    first_index: u32,
    /// The next segment says where it begins: the first one of a journal whose beginning is not here, or one after damage.
    trusts_first: bool,
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
        Self::open_from(directory, name, Some(0))
    }

    /// Opens a journal whose first segments may be gone, because it keeps the last ones only: begins with what is there.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open_retained(directory: &Path, name: JournalName) -> Result<Self, JournalError> {
        Self::open_from(directory, name, None)
    }

    fn open_from(directory: &Path, name: JournalName, first: Option<u32>) -> Result<Self, JournalError> {
        let mut found = segments(directory)?;
        found.retain(|file| file.journal == name);
        let Some(lowest) = found.first().map(|file| file.index) else {
            return Err(JournalError::Nothing {
                directory: directory.to_owned(),
            });
        };
        let first_index = first.unwrap_or(lowest);
        for (file, expected) in found.iter().zip(first_index..) {
            if file.index != expected {
                return Err(JournalError::Missing {
                    path: directory.join(segment_file_name(&name, expected)),
                    last_good: LastGood::default(),
                });
            }
        }
        let paths = found.into_iter().map(|file| file.path).collect();
        Ok(Self::over(name, paths, first_index))
    }

    /// Opens one segment by itself.
    ///
    /// # Errors
    /// A file whose name is not a segment's.
    pub fn open_segment_file(path: &Path) -> Result<Self, JournalError> {
        let name = path.file_name().and_then(|name| name.to_str());
        let (name, index) = name.and_then(parse_file_name).ok_or_else(|| JournalError::Segment {
            path: path.to_owned(),
            reason: "its name is not that of a journal segment (<vm>.g<generation>.<index>.journal)",
            last_good: LastGood::default(),
        })?;
        let mut reader = Self::over(name, vec![path.to_owned()], index);
        reader.trusts_first = true;
        Ok(reader)
    }

    fn over(name: JournalName, segments: Vec<PathBuf>, first_index: u32) -> Self {
        Self {
            name,
            segments,
            first_index,
            trusts_first: first_index > 0,
            opened: 0,
            bytes: Vec::new(),
            offset: 0,
            next: Lsn(1),
            last_good: LastGood::default(),
            torn: None,
        }
    }

    /// The segments it reads, in order.
    #[must_use]
    pub fn segment_paths(&self) -> &[PathBuf] {
        &self.segments
    }

    /// Number of the first segment; 0 unless the beginning is not here.
    #[must_use]
    pub fn first_index(&self) -> u32 {
        self.first_index
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

    /// After an error: goes on at the next whole entry behind the damage, in this segment or a later one. `false` if there is none.
    /// What was skipped is lost; a replay cannot go on there, but whoever looks for damage can.
    pub fn skip_damage(&mut self) -> bool {
        if self.opened > 0 && self.offset >= SEGMENT_HEADER_BYTES {
            let (generation, least) = (self.name.generation, self.next);
            let is_later = |bytes: &[u8]| {
                let entry = whole_entry(bytes)
                    .filter(|entry| entry.generation == generation && (least..Lsn::MAX).contains(&entry.lsn));
                entry.map(|entry| entry.lsn)
            };
            let starts = self.offset..self.bytes.len().saturating_sub(HEADER_BYTES - 1);
            if let Some((at, lsn)) = starts
                .into_iter()
                .find_map(|at| Some((at, is_later(&self.bytes[at..])?)))
            {
                (self.offset, self.next) = (at, lsn);
                return true;
            }
        }
        // A header that was refused is one of a segment that is not open yet.
        let is_header = self.opened == 0 || self.offset == self.bytes.len();
        if is_header && self.opened < self.segments.len() {
            self.opened += 1;
        }
        (self.bytes, self.offset, self.trusts_first) = (Vec::new(), 0, true);
        self.opened < self.segments.len()
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
            if u64::from(header.index) != u64::from(self.first_index) + self.opened as u64 {
                return Err(wrong("it is another segment than its name says"));
            }
            if header.first < self.next || header.first > self.next && !self.trusts_first {
                return Err(wrong("it does not go on where the segment before it ends"));
            }
            self.next = header.first;
            self.trusts_first = false;
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
        if entry.lsn != self.next || entry.lsn == Lsn::MAX {
            return Err(self.damaged(Defect::Order { found: entry.lsn }));
        }
        Ok(())
    }
}

/// The entry whose whole frame starts `bytes`.
fn whole_entry(bytes: &[u8]) -> Option<Entry<'_>> {
    let length = frame::peek_length(bytes).ok()??;
    Entry::decode(bytes.get(..length)?).ok()
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
mod tests;
