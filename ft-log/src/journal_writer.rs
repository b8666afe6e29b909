//! Writes the journal, one step at a time, beside the acknowledgement path; in it only where the primary asked for durable
//! acknowledgements.
//!
//! ```text
//!  append ──► the last queued Write (grows) ──► one operation in flight ──► file
//!             Open, Sync, Close stand in the same queue, so that segments end between entries
//!  durable acknowledgements: Write ──► Sync ──► durable(); what was appended meanwhile is the next Write
//! ```
//! The format is `ft_client::journal`'s. A journal that fails, or falls behind by more than [`JournalSettings::backlog_bytes`], ends with one
//! clear error; whether the VM goes on is the operator's choice (`--journal-failure`).

use std::{
    collections::VecDeque,
    ffi::CString,
    io,
    os::fd::OwnedFd,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    rc::Rc,
};

use ft_client::journal::{SEGMENT_BYTES, SEGMENT_BYTES_MAX, SEGMENT_HEADER_BYTES, SegmentHeader};
use ft_protocol::ids::{Generation, Lsn};
use thiserror::Error;
use tracing::warn;

use crate::{
    control::shared::JournalState,
    token::{Done, Ring, Token},
    uring::{Memory, Operation, Spent},
};

/// A write that is smaller waits for more, for [`JournalSettings::write_delay_ns`].
const WRITE_BYTES: usize = 64 * 1024;
/// Largest batch that one call may append, so that no segment exceeds its limit.
pub const BATCH_BYTES_MAX: usize = (SEGMENT_BYTES_MAX - SEGMENT_BYTES) as usize;

/// Why the journal ended before its VM.
#[derive(Debug, Error)]
pub enum JournalFailure {
    /// There is one already.
    #[error("{path}: the journal of this VM and generation is already here: move it away, or give another --journal")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file system said no.
    #[error("{path}: cannot {what}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The disk is too slow.
    #[error("{path}: {bytes} bytes wait to be written, the disk does not keep up")]
    Behind {
        /// The file.
        path: PathBuf,
        /// How many.
        bytes: usize,
    },
}

/// Where a journal is, and how much of it.
#[derive(Clone, Debug)]
pub struct JournalSettings {
    /// Without one there is no journal.
    pub directory: Option<PathBuf>,
    /// A segment that has reached this size is followed by the next one; at most [`SEGMENT_BYTES`].
    pub segment_bytes: u64,
    /// Segments that are kept, the current one included; 0 for all.
    pub keep_segments: u32,
    /// How long a write that could be larger waits for more.
    pub write_delay_ns: u64,
    /// Bytes that may wait for the disk.
    pub backlog_bytes: usize,
}

#[derive(Debug)]
enum Step {
    Remove(PathBuf),
    Open(SegmentHeader),
    /// Makes the new file's name last, where somebody waits for what is in it.
    SyncDirectory,
    /// Whole frames; the last entry of them.
    Write(Vec<u8>, Lsn),
    Sync,
    Close,
}

#[derive(Clone, Copy, Debug)]
enum Running {
    Remove,
    Open,
    SyncDirectory,
    Write { from: usize, through: Lsn },
    Sync,
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Open,
    Ended,
}

/// The journal of one VM on this host.
#[derive(Debug)]
pub struct JournalWriter {
    settings: JournalSettings,
    vm: String,
    state: State,
    header: SegmentHeader,
    /// The first segment that was written.
    first_index: u32,
    steps: VecDeque<Step>,
    running: Option<Running>,
    file: Option<Rc<OwnedFd>>,
    path: PathBuf,
    written: u64,
    /// Bytes of the current segment, those that wait included.
    planned: u64,
    waiting_bytes: usize,
    waiting_since_ns: u64,
    spare: Vec<u8>,
    /// The next entry begins a segment.
    rotates: bool,
    has_failed: bool,
    /// Every write is flushed before the next one: somebody waits for it.
    flushes: bool,
    flushable: Lsn,
    durable: Lsn,
}

/// What a journal is doing.
#[derive(Clone, Copy, Debug)]
pub struct JournalStatus {
    /// Its state.
    pub state: JournalState,
    /// Number of the segment that entries go to.
    pub segment: u32,
    /// Bytes of that segment, those that wait for the disk included.
    pub segment_bytes: u64,
    /// Bytes that wait for the disk.
    pub waiting_bytes: u64,
}

impl JournalWriter {
    /// The journal of `vm`; without a directory it takes everything and keeps nothing.
    #[must_use]
    pub fn new(settings: JournalSettings, vm: &str) -> Self {
        let header = SegmentHeader {
            vm: vm.into(),
            generation: Generation(0),
            index: 0,
            first: Lsn(1),
        };
        Self {
            settings,
            vm: vm.into(),
            state: State::Idle,
            header,
            first_index: 0,
            steps: VecDeque::new(),
            running: None,
            file: None,
            path: PathBuf::new(),
            written: 0,
            planned: 0,
            waiting_bytes: 0,
            waiting_since_ns: 0,
            spare: Vec::new(),
            rotates: false,
            has_failed: false,
            flushes: false,
            flushable: Lsn::ZERO,
            durable: Lsn::ZERO,
        }
    }

    /// The last entry that is on stable storage, with everything before it.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        self.durable
    }

    /// Begins the journal of a generation, or goes on in one where it had ended, at entry `first`. With `flushes`, outputs wait for [`JournalWriter::durable`]: everything is written and
    /// flushed as soon as the flush before it is done.
    pub fn start(&mut self, generation: Generation, first: Lsn, flushes: bool) {
        self.flushes = flushes;
        if self.settings.directory.is_none() || self.state == State::Open || self.has_failed {
            return;
        }
        self.state = State::Open;
        self.begin_segment(SegmentHeader {
            vm: self.vm.clone(),
            generation,
            // The segment with number 0 is the one with entry 1.
            index: u32::from(first > Lsn(1)),
            first,
        });
        self.first_index = self.header.index;
    }

    fn begin_segment(&mut self, header: SegmentHeader) {
        let bytes = header.encode();
        self.steps.push_back(Step::Open(header.clone()));
        if self.flushes {
            self.steps.push_back(Step::SyncDirectory);
        }
        self.steps
            .push_back(Step::Write(bytes.to_vec(), Lsn(header.first.0 - 1)));
        self.waiting_bytes += bytes.len();
        self.planned = SEGMENT_HEADER_BYTES as u64;
        self.header = header;
    }

    /// Whether [`JournalWriter::append`] takes so many bytes more, or needs none.
    #[must_use]
    pub fn has_room(&self, bytes: usize) -> bool {
        self.state != State::Open || self.waiting_bytes + bytes <= self.settings.backlog_bytes
    }

    /// Appends whole frames, entries `first` to `through`.
    ///
    /// # Errors
    /// When the disk is too far behind: the journal has ended.
    ///
    /// # Panics
    /// For a batch above [`BATCH_BYTES_MAX`]: the caller's bug.
    pub fn append(&mut self, frames: &[u8], first: Lsn, through: Lsn, now_ns: u64) -> Result<(), JournalFailure> {
        if self.state != State::Open {
            return Ok(());
        }
        assert!(frames.len() <= BATCH_BYTES_MAX, "a batch of {} bytes", frames.len());
        if !self.has_room(frames.len()) {
            let bytes = self.waiting_bytes;
            self.abandon();
            return Err(JournalFailure::Behind {
                path: self.path.clone(),
                bytes,
            });
        }
        if self.planned >= self.settings.segment_bytes || std::mem::take(&mut self.rotates) {
            self.steps.extend([Step::Sync, Step::Close]);
            let next = SegmentHeader {
                index: self.header.index + 1,
                first,
                ..self.header.clone()
            };
            self.begin_segment(next);
            self.remove_oldest();
        }
        if self.waiting_bytes == 0 {
            self.waiting_since_ns = now_ns;
        }
        match self.steps.back_mut() {
            Some(Step::Write(bytes, last)) => {
                bytes.extend_from_slice(frames);
                *last = through;
            }
            _ => {
                let mut bytes = std::mem::take(&mut self.spare);
                bytes.extend_from_slice(frames);
                self.steps.push_back(Step::Write(bytes, through));
            }
        }
        self.planned += frames.len() as u64;
        self.waiting_bytes += frames.len();
        Ok(())
    }

    /// Lets the segment go that is one too many, once the one after it is there.
    fn remove_oldest(&mut self) {
        let (keep, current) = (self.settings.keep_segments, &self.header);
        let oldest = current.index.checked_sub(keep);
        let oldest = oldest.filter(|index| keep > 0 && *index >= self.first_index);
        if let (Some(index), Some(directory)) = (oldest, &self.settings.directory) {
            let header = SegmentHeader {
                index,
                ..current.clone()
            };
            let path = directory.join(header.file_name());
            self.steps.push_back(Step::Remove(path));
        }
    }

    /// Goes on with a new segment at the next entry, unless the current one has none yet.
    pub fn rotate(&mut self) {
        self.rotates = self.planned > SEGMENT_HEADER_BYTES as u64;
    }

    /// What it is doing.
    #[must_use]
    pub fn status(&self) -> JournalStatus {
        JournalStatus {
            state: match self.state {
                State::Idle => JournalState::Idle,
                State::Open => JournalState::Open,
                State::Ended if self.has_failed => JournalState::Failed,
                State::Ended => JournalState::Ended,
            },
            segment: self.header.index,
            segment_bytes: self.planned,
            waiting_bytes: self.waiting_bytes as u64,
        }
    }

    /// Ends the journal: what was appended is written and flushed.
    pub fn finish(&mut self) {
        if self.state == State::Open {
            self.state = State::Ended;
            self.steps.extend([Step::Sync, Step::Close]);
        }
    }

    /// Whether everything is on disk that ever will be.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.steps.is_empty() && self.running.is_none()
    }

    fn abandon(&mut self) {
        self.has_failed = true;
        self.state = State::Ended;
        self.steps.clear();
        self.waiting_bytes = 0;
        if self.running.is_none() && self.file.is_some() {
            self.steps.push_back(Step::Close);
        }
    }

    /// When [`JournalWriter::pump`] has something to do that it has not now.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        let waits = self.running.is_none() && matches!(self.steps.front(), Some(Step::Write(..)));
        waits.then(|| self.waiting_since_ns + self.settings.write_delay_ns)
    }

    /// Starts the next step if it is due.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn pump(&mut self, ring: &mut Ring, now_ns: u64) -> io::Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        if let Some(Step::Write(bytes, _)) = self.steps.front() {
            let due = self.flushes
                || self.steps.len() > 1
                || bytes.len() >= WRITE_BYTES
                || now_ns >= self.waiting_since_ns + self.settings.write_delay_ns;
            if !due {
                return Ok(());
            }
        }
        let Some(step) = self.steps.pop_front() else {
            return Ok(());
        };
        let (running, operation) = match (step, &self.file) {
            (Step::Remove(path), _) => {
                let path = CString::new(path.into_os_string().into_vec())?;
                (Running::Remove, Operation::Unlink(None, path))
            }
            (Step::Open(header), _) => {
                let directory = self
                    .settings
                    .directory
                    .as_deref()
                    .expect("an open journal has a directory");
                self.path = directory.join(header.file_name());
                let path = CString::new(self.path.as_os_str().as_bytes())?;
                let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
                (Running::Open, Operation::Open(None, path, flags))
            }
            (Step::SyncDirectory, _) => {
                let directory = self
                    .settings
                    .directory
                    .as_deref()
                    .expect("an open journal has a directory");
                let path = CString::new(directory.as_os_str().as_bytes())?;
                (
                    Running::SyncDirectory,
                    Operation::Open(None, path, libc::O_RDONLY | libc::O_DIRECTORY),
                )
            }
            (Step::Write(bytes, through), Some(file)) => (
                Running::Write { from: 0, through },
                Operation::Write(Rc::clone(file), bytes, 0, self.written),
            ),
            (Step::Sync, Some(file)) => (Running::Sync, Operation::Sync(Rc::clone(file))),
            (Step::Close, Some(_)) => {
                let file = self.file.take().and_then(Rc::into_inner);
                let Some(file) = file else { return Ok(()) };
                (Running::Close, Operation::Close(file))
            }
            (Step::Write(..) | Step::Sync | Step::Close, None) => return Ok(()),
        };
        self.running = Some(running);
        ring.submit(Token::Journal, operation)
    }

    /// Takes the completion of the running step.
    ///
    /// # Errors
    /// [`JournalFailure`]: the journal has ended.
    ///
    /// # Panics
    /// Without a running step: a bug.
    pub fn completed(&mut self, ring: &mut Ring, done: Done) -> Result<(), JournalFailure> {
        let running = self.running.take().expect("a journal step was running");
        match (running, done.result) {
            (Running::Open, Ok(_)) => {
                self.file = done.descriptor.map(Rc::new);
                self.written = 0;
            }
            (Running::Open, Err(error)) if error.raw_os_error() == Some(libc::EEXIST) => {
                self.abandon();
                return Err(JournalFailure::Exists {
                    path: self.path.clone(),
                });
            }
            (Running::SyncDirectory, Ok(_)) => {
                // Opened now; flushed next, by the same name.
                if let Some(directory) = done.descriptor {
                    self.running = Some(Running::Sync);
                    ring.submit(Token::Journal, Operation::Sync(Rc::new(directory)))
                        .map_err(|error| self.failed("flush the directory", error))?;
                }
            }
            (Running::Write { from, through }, Ok(count)) if count > 0 => {
                self.written += count as u64;
                self.waiting_bytes = self.waiting_bytes.saturating_sub(count);
                self.write_on(ring, done.memory.into_bytes(), from + count, through)?;
            }
            (Running::Write { .. }, Ok(_)) => {
                return Err(self.failed("write", io::ErrorKind::WriteZero.into()));
            }
            // A segment that stays takes room and does no harm.
            (Running::Remove, Err(error)) => {
                let path = match &done.memory {
                    Memory::Spent(Spent::Path(path)) => path.to_string_lossy(),
                    _ => self.path.to_string_lossy(),
                };
                warn!("{path}: an old segment could not be removed: {error}");
            }
            (Running::Remove | Running::Close, Ok(_)) => {}
            (Running::Sync, Ok(_)) => self.durable = self.flushable,
            (Running::SyncDirectory, Err(error)) => return Err(self.failed("open the directory", error)),
            (Running::Open, Err(error)) => return Err(self.failed("create", error)),
            (Running::Write { .. }, Err(error)) => return Err(self.failed("write", error)),
            (Running::Sync, Err(error)) => return Err(self.failed("flush", error)),
            (Running::Close, Err(error)) => return Err(self.failed("close", error)),
        }
        Ok(())
    }

    /// Goes on with a write that was done in part, or keeps its buffer for the next one.
    fn write_on(
        &mut self,
        ring: &mut Ring,
        mut bytes: Vec<u8>,
        from: usize,
        through: Lsn,
    ) -> Result<(), JournalFailure> {
        match &self.file {
            Some(file) if from < bytes.len() => {
                self.running = Some(Running::Write { from, through });
                let operation = Operation::Write(Rc::clone(file), bytes, from, self.written);
                ring.submit(Token::Journal, operation)
                    .map_err(|error| self.failed("write", error))?;
            }
            _ => {
                bytes.clear();
                if bytes.capacity() > self.spare.capacity() {
                    self.spare = bytes;
                }
                self.flushable = through;
                if self.flushes && !matches!(self.steps.front(), Some(Step::Sync)) {
                    self.steps.push_front(Step::Sync);
                }
            }
        }
        Ok(())
    }

    fn failed(&mut self, what: &'static str, source: io::Error) -> JournalFailure {
        self.abandon();
        JournalFailure::Io {
            path: self.path.clone(),
            what,
            source,
        }
    }
}
