//! The io_uring of a device thread, with an interface that cannot be misused.
//!
//! A buffer belongs to the ring from submission to completion, so no code can touch or free what the kernel works on; guest memory
//! stays mapped as long. This is the one home of `unsafe` of the data path.

use std::{collections::VecDeque, io, os::fd::RawFd, sync::Arc, time::Duration};

use io_uring::{
    IoUring, cqueue, opcode, squeue,
    types::{Fd, FsyncFlags, SubmitArgs, Timespec},
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::guest_side::{dirty::GuestMemoryMmap, ring::Segment};

const ENTRIES: u32 = 256;
/// Index of the one registered file.
const REGISTERED: RawFd = 0;

/// Guest memory as the kernel is to read or write it.
#[derive(Debug)]
pub struct GuestBuffer {
    /// Keeps the mapping that `parts` point into.
    _mapping: Arc<GuestMemoryMmap>,
    parts: Vec<libc::iovec>,
}

impl GuestBuffer {
    /// The buffer that `segments` are; `parts` is memory for reuse. `None` if they are no longer guest memory, or too many pieces for
    /// one system call.
    #[must_use]
    pub fn new(memory: Arc<GuestMemoryMmap>, segments: &[Segment], mut parts: Vec<libc::iovec>) -> Option<Self> {
        parts.clear();
        for segment in segments {
            // A segment may go on from one region into the next.
            for slice in memory.get_slices(GuestAddress(segment.address), segment.length as usize) {
                let slice = slice.ok()?;
                parts.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        (parts.len() <= libc::UIO_MAXIOV as usize).then_some(Self {
            _mapping: memory,
            parts,
        })
    }

    /// Leaves out the first `bytes`, which are done.
    pub fn skip(&mut self, mut bytes: usize) {
        self.parts.retain_mut(|part| {
            let done = bytes.min(part.iov_len);
            bytes -= done;
            part.iov_base = part.iov_base.wrapping_byte_add(done);
            part.iov_len -= done;
            part.iov_len != 0
        });
    }

    /// Whether every piece begins and ends at a multiple of `alignment` in this process' memory.
    #[must_use]
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let aligned = |part: &libc::iovec| (part.iov_base.addr() | part.iov_len).is_multiple_of(alignment);
        self.parts.iter().all(aligned)
    }

    /// The memory for the pieces of the next one.
    #[must_use]
    pub fn into_parts(self) -> Vec<libc::iovec> {
        self.parts
    }
}

/// What an operation works on.
#[derive(Debug, Default)]
pub enum Buffer {
    /// Nothing.
    #[default]
    None,
    /// Bytes of our own.
    Bytes(Vec<u8>),
    /// Guest memory.
    Guest(GuestBuffer),
}

impl Buffer {
    /// Our own bytes; none otherwise.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes,
            _ => Vec::new(),
        }
    }
}

/// A finished operation.
#[derive(Debug)]
pub struct Completion {
    /// What the operation was submitted with.
    pub token: u64,
    /// Its result: bytes, or a negative errno.
    pub result: i32,
    /// What it worked on.
    pub buffer: Buffer,
    /// The operation goes on: of a poll of all signals, there will be more.
    pub more: bool,
}

#[derive(Debug)]
struct Operation {
    token: u64,
    buffer: Buffer,
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
    /// Completions that made room for submissions, before those in the ring.
    reaped: VecDeque<cqueue::Entry>,
    free: Vec<usize>,
    /// A file that is looked up once, not with each operation.
    registered: Option<RawFd>,
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
        // Completions are worked up when this thread looks for them, and not by interrupting it. Kernels before 6.1 have only the other.
        let deferred = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(ENTRIES);
        let ring = deferred
            .or_else(|_| {
                IoUring::builder()
                    .setup_coop_taskrun()
                    .setup_taskrun_flag()
                    .build(ENTRIES)
            })
            .map_err(|error| io::Error::new(error.kind(), format!("io_uring is not available: {error}")))?;
        Ok(Self {
            ring,
            operations: Vec::new(),
            reaped: VecDeque::new(),
            free: Vec::new(),
            registered: None,
        })
    }

    /// The file of most operations.
    ///
    /// # Errors
    /// As io_uring_register(2).
    pub fn register(&mut self, fd: RawFd) -> io::Result<()> {
        self.ring.submitter().register_files(&[fd])?;
        self.registered = Some(fd);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.operations.len() - self.free.len()
    }

    /// The place of an operation, which keeps its buffer until its completion.
    fn place(&mut self, token: u64, buffer: Buffer) -> u64 {
        let operation = Some(Operation { token, buffer });
        match self.free.pop() {
            Some(slot) => {
                self.operations[slot] = operation;
                slot as u64
            }
            None => {
                self.operations.push(operation);
                self.operations.len() as u64 - 1
            }
        }
    }

    /// Registers an operation and submits it to the queue. The entry must only point into `buffer`'s heap memory, or at what it keeps.
    fn push(&mut self, token: u64, buffer: Buffer, entry: squeue::Entry) -> u64 {
        let slot = self.place(token, buffer);
        self.push_entry(&entry.user_data(slot));
        slot
    }

    /// The same, on a file that may be registered: `build` gives the entry for a descriptor.
    fn push_file(&mut self, token: u64, fd: RawFd, buffer: Buffer, build: impl FnOnce(Fd) -> squeue::Entry) {
        let entry = if self.registered == Some(fd) {
            build(Fd(REGISTERED)).flags(squeue::Flags::FIXED_FILE)
        } else {
            build(Fd(fd))
        };
        self.push(token, buffer, entry);
    }

    fn push_entry(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the entry points at nothing, or into a heap buffer or guest memory that `operations` keeps unmoved and mapped
            // until its completion (or for ever, see `Drop`). Our own bytes are untouched meanwhile; guest memory is shared with the
            // guest anyway and never borrowed.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // A kernel whose completion queue is full may take nothing.
            self.reaped.extend(self.ring.completion());
            self.submit();
        }
    }

    /// Completes with `token` when `fd` is readable.
    pub fn poll(&mut self, fd: RawFd, token: u64) -> PollHandle {
        let entry = opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).build();
        PollHandle(self.push(token, Buffer::None, entry))
    }

    /// Completes with `token` each time `fd` becomes readable, without anybody reading it: for an eventfd, with each signal. The kernel
    /// ends it when it finds no room for a completion: the last one says so ([`Completion::more`]), whatever its result.
    pub fn poll_always(&mut self, fd: RawFd, token: u64) -> PollHandle {
        let entry = opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).multi(true).build();
        PollHandle(self.push(token, Buffer::None, entry))
    }

    /// Ends a poll; it completes with an error if it had not completed before.
    pub fn cancel(&mut self, poll: PollHandle) {
        let entry = opcode::PollRemove::new(poll.0).build().user_data(OWN);
        self.push_entry(&entry);
    }

    /// Reads from `offset` of a file into `buffer[from..from + length]`.
    ///
    /// # Panics
    /// If that is beyond the buffer.
    pub fn read(&mut self, fd: RawFd, offset: u64, mut buffer: Vec<u8>, from: usize, length: usize, token: u64) {
        let part = &mut buffer[from..from + length];
        let (start, length) = (part.as_mut_ptr(), length as u32);
        self.push_file(token, fd, Buffer::Bytes(buffer), |fd| {
            opcode::Read::new(fd, start, length).offset(offset).build()
        });
    }

    /// Writes `buffer[from..from + length]` at `offset` of a file; `durable`: and completes when it would survive a power cut.
    ///
    /// # Panics
    /// If that is beyond the buffer.
    #[expect(clippy::too_many_arguments, reason = "as pwritev2(2)")]
    pub fn write(
        &mut self,
        fd: RawFd,
        offset: u64,
        buffer: Vec<u8>,
        from: usize,
        length: usize,
        durable: bool,
        token: u64,
    ) {
        let part = &buffer[from..from + length];
        let (start, length) = (part.as_ptr(), length as u32);
        self.push_file(token, fd, Buffer::Bytes(buffer), |fd| {
            opcode::Write::new(fd, start, length)
                .offset(offset)
                .rw_flags(durability(durable))
                .build()
        });
    }

    /// Reads from `offset` of a file into guest memory.
    pub fn read_guest(&mut self, fd: RawFd, offset: u64, buffer: GuestBuffer, token: u64) {
        let parts = buffer.parts.as_slice();
        let (first, count) = (parts.as_ptr(), parts.len() as u32);
        let one = (count == 1).then(|| parts[0]);
        self.push_file(token, fd, Buffer::Guest(buffer), |fd| match one {
            // One piece needs no list for the kernel to copy.
            Some(part) => opcode::Read::new(fd, part.iov_base.cast(), part.iov_len as u32)
                .offset(offset)
                .build(),
            None => opcode::Readv::new(fd, first, count).offset(offset).build(),
        });
    }

    /// Writes guest memory at `offset` of a file; `durable`: and completes when it would survive a power cut.
    pub fn write_guest(&mut self, fd: RawFd, offset: u64, buffer: GuestBuffer, durable: bool, token: u64) {
        let parts = buffer.parts.as_slice();
        let (first, count, flags) = (parts.as_ptr(), parts.len() as u32, durability(durable));
        let one = (count == 1).then(|| parts[0]);
        self.push_file(token, fd, Buffer::Guest(buffer), |fd| match one {
            Some(part) => opcode::Write::new(fd, part.iov_base.cast(), part.iov_len as u32)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            None => opcode::Writev::new(fd, first, count)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        });
    }

    /// Changes how `length` bytes from `offset` of a file are stored. Its size stays.
    pub fn fallocate(&mut self, fd: RawFd, how: Fallocate, offset: u64, length: u64, token: u64) {
        self.push_file(token, fd, Buffer::None, |fd| {
            opcode::Fallocate::new(fd, length)
                .offset(offset)
                .mode(how as i32)
                .build()
        });
    }

    /// Makes everything written to a file before durable.
    pub fn datasync(&mut self, fd: RawFd, token: u64) {
        self.push_file(token, fd, Buffer::None, |fd| {
            opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build()
        });
    }

    /// Hands what was pushed to the kernel, and lets it work up what completed. Does not sleep.
    pub fn submit(&mut self) {
        let (waits, works) = {
            let submission = self.ring.submission();
            (!submission.is_empty(), submission.taskrun() || submission.cq_overflow())
        };
        if works {
            // A wait for nothing: the kernel works up what is due, and comes back.
            let arguments = SubmitArgs::new();
            Self::check(self.ring.submitter().submit_with_args(0, &arguments).map(drop));
        } else if waits {
            Self::check(self.ring.submit().map(drop));
        }
    }

    /// Hands what was pushed to the kernel and sleeps until something completed or `timeout` passed.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        // What was reaped already is not waited for.
        let timeout = if self.reaped.is_empty() {
            timeout
        } else {
            Some(Duration::ZERO)
        };
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
            let entry = self.reaped.pop_front().or_else(|| self.ring.completion().next())?;
            let slot = entry.user_data();
            if slot == OWN {
                continue;
            }
            if cqueue::more(entry.flags()) {
                let operation = self.operations[slot as usize].as_ref();
                return Some(Completion {
                    token: operation.expect("the kernel has not ended it").token,
                    result: entry.result(),
                    buffer: Buffer::None,
                    more: true,
                });
            }
            let Operation { token, buffer } = self.operations[slot as usize]
                .take()
                .expect("the kernel completes what was submitted, once");
            self.free.push(slot as usize);
            return Some(Completion {
                token,
                result: entry.result(),
                buffer,
                more: false,
            });
        }
    }
}

fn durability(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may still work on these buffers: they must outlive the ring.
        std::mem::forget(std::mem::take(&mut self.operations));
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    #[test]
    fn more_operations_than_the_rings_hold_all_complete() {
        use std::os::fd::AsRawFd;
        let mut io = Uring::new().unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        event.write(1).unwrap();
        let count = u64::from(ENTRIES) * 5;
        for token in 0..count {
            io.poll(event.as_raw_fd(), token);
        }
        assert!(!io.reaped.is_empty(), "the completion queue was emptied for them");
        let mut seen = Vec::new();
        while seen.len() < count as usize {
            io.wait(Some(Duration::from_secs(20)));
            let before = seen.len();
            seen.extend(std::iter::from_fn(|| io.next_completion()).map(|completion| completion.token));
            assert_ne!(seen.len(), before, "operations were lost");
        }
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..count));
        assert_eq!(io.in_flight(), 0);
    }
}
