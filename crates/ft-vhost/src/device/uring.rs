//! The io_uring of the device thread, with an interface that cannot be misused.
//!
//! A buffer belongs to the ring from submission to completion, so no code can touch or free what the kernel works on.
//! This is the one home of `unsafe` of the data path.

use std::{io, os::fd::RawFd, time::Duration};

use io_uring::{
    IoUring, opcode, squeue,
    types::{Fd, FsyncFlags, SubmitArgs, Timespec},
};

const ENTRIES: u32 = 256;

/// A finished operation.
#[derive(Debug)]
pub struct Completion {
    /// What the operation was submitted with.
    pub token: u64,
    /// Its result: bytes, or a negative errno.
    pub result: i32,
    /// Its buffer; empty for those without.
    pub buffer: Vec<u8>,
}

#[derive(Debug)]
struct Operation {
    token: u64,
    buffer: Vec<u8>,
}

/// What fallocate(2) does to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Fallocate {
    /// Gives its space back; it reads as zeroes.
    PunchHole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
    /// Zeroes that keep their space.
    ZeroRange = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
}

/// A poll that waits, to cancel it.
#[derive(Clone, Copy, Debug)]
pub struct PollHandle(u64);

/// Marks completions of the ring's own operations (cancellations).
const OWN: u64 = u64::MAX;

/// The ring.
pub struct Uring {
    ring: IoUring,
    operations: Vec<Option<Operation>>,
    free: Vec<usize>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.in_flight()).finish()
    }
}

impl Uring {
    /// A new ring, for this thread alone.
    ///
    /// # Errors
    /// Where the kernel has no io_uring, or forbids it.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .build(ENTRIES)
            .map_err(|error| io::Error::new(error.kind(), format!("io_uring is not available: {error}")))?;
        Ok(Self {
            ring,
            operations: Vec::new(),
            free: Vec::new(),
        })
    }

    fn in_flight(&self) -> usize {
        self.operations.len() - self.free.len()
    }

    /// Registers an operation and submits it to the queue. The entry must only point into `buffer`'s heap memory.
    fn push(&mut self, token: u64, mut buffer: Vec<u8>, entry: impl FnOnce(&mut Vec<u8>) -> squeue::Entry) -> u64 {
        let entry = entry(&mut buffer);
        let operation = Some(Operation { token, buffer });
        let slot = match self.free.pop() {
            Some(slot) => {
                self.operations[slot] = operation;
                slot
            }
            None => {
                self.operations.push(operation);
                self.operations.len() - 1
            }
        };
        self.push_entry(&entry.user_data(slot as u64));
        slot as u64
    }

    fn push_entry(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the entry points at nothing, or into a heap buffer that `operations` keeps unmoved and untouched until
            // its completion (or for ever, see `Drop`).
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            self.submit();
        }
    }

    /// Completes with `token` when `fd` is readable.
    pub fn poll(&mut self, fd: RawFd, token: u64) -> PollHandle {
        let entry = opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).build();
        PollHandle(self.push(token, Vec::new(), |_| entry))
    }

    /// Ends a poll; it completes with an error if it had not completed before.
    pub fn cancel(&mut self, poll: PollHandle) {
        let entry = opcode::PollRemove::new(poll.0).build().user_data(OWN);
        self.push_entry(&entry);
    }

    /// Reads from `offset` of a file into `buffer[from..]`.
    ///
    /// # Panics
    /// If `from` is beyond the buffer.
    pub fn read(&mut self, fd: RawFd, offset: u64, buffer: Vec<u8>, from: usize, token: u64) {
        self.push(token, buffer, |buffer| {
            let part = &mut buffer[from..];
            opcode::Read::new(Fd(fd), part.as_mut_ptr(), part.len() as u32)
                .offset(offset)
                .build()
        });
    }

    /// Writes `buffer[from..]` at `offset` of a file; `durable`: and completes when it would survive a power cut.
    ///
    /// # Panics
    /// If `from` is beyond the buffer.
    pub fn write(&mut self, fd: RawFd, offset: u64, buffer: Vec<u8>, from: usize, durable: bool, token: u64) {
        self.push(token, buffer, |buffer| {
            let part = &buffer[from..];
            opcode::Write::new(Fd(fd), part.as_ptr(), part.len() as u32)
                .offset(offset)
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build()
        });
    }

    /// Changes how `length` bytes from `offset` of a file are stored. Its size stays.
    pub fn fallocate(&mut self, fd: RawFd, how: Fallocate, offset: u64, length: u64, token: u64) {
        let entry = opcode::Fallocate::new(Fd(fd), length)
            .offset(offset)
            .mode(how as i32)
            .build();
        self.push(token, Vec::new(), |_| entry);
    }

    /// Makes everything written to a file before durable.
    pub fn datasync(&mut self, fd: RawFd, token: u64) {
        let entry = opcode::Fsync::new(Fd(fd)).flags(FsyncFlags::DATASYNC).build();
        self.push(token, Vec::new(), |_| entry);
    }

    /// Hands what was pushed to the kernel.
    pub fn submit(&mut self) {
        if !self.ring.submission().is_empty() {
            Self::check(self.ring.submit().map(drop));
        }
    }

    /// Hands what was pushed to the kernel and sleeps until something completed or `timeout` passed.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        let result = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                let arguments = SubmitArgs::new().timespec(&timespec);
                self.ring.submitter().submit_with_args(1, &arguments)
            }
        };
        Self::check(result.map(drop));
    }

    fn check(result: io::Result<()>) {
        if let Err(error) = result {
            let passes = [libc::ETIME, libc::EINTR, libc::EBUSY, libc::EAGAIN];
            let known = error.raw_os_error().is_some_and(|code| passes.contains(&code));
            assert!(known, "io_uring_enter failed: {error}");
        }
    }

    /// The next finished operation.
    pub fn next_completion(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            let slot = entry.user_data();
            if slot == OWN {
                continue;
            }
            let Operation { token, buffer } = self.operations[slot as usize]
                .take()
                .expect("the kernel completes what was submitted, once");
            self.free.push(slot as usize);
            return Some(Completion {
                token,
                result: entry.result(),
                buffer,
            });
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may still work on these buffers: they must outlive the ring.
        std::mem::forget(std::mem::take(&mut self.operations));
    }
}
