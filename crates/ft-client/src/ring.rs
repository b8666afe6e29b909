//! Single-producer single-consumer ring of frames in shared memory.
//!
//! ```text
//!   0  u64 read      bytes consumed, ever        (written by the consumer)
//!  64  u64 written   bytes produced, ever        (written by the producer)
//! 128  u32 consumer sleeps   the producer must ring the doorbell
//! 192  u32 space     bumped and woken (futex) by the consumer when a waiting producer may go on
//! 196  u32 producer waits
//! 4096 data, a power of two
//! ```
//! A record is one frame, 8-byte aligned and contiguous; a length of [`WRAP`] skips to the start. Each side trusts only its own
//! counter: the other's is checked, and every frame is copied out before it is looked at. Each remembers what it last saw of the other's
//! counter, and looks again only when that does not suffice, and tells the other of its own no more often than needed: their lines travel
//! between processors once a batch.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::atomic::{Ordering, fence},
    time::Duration,
};

use ft_protocol::{
    frame,
    limits::{FRAME_BYTES_MAX, RING_BYTES},
};
use thiserror::Error;

use crate::{futex, shm::SharedMemory};

const READ: usize = 0;
const WRITTEN: usize = 64;
const CONSUMER_SLEEPS: usize = 128;
const SPACE: usize = 192;
const PRODUCER_WAITS: usize = 196;
const DATA: usize = 4096;
const WRAP: u32 = u32::MAX;
/// What a consumer may have taken before the producer gets the room back.
const RELEASE_BYTES: u64 = 64 * 1024;
const _: () = assert!(RELEASE_BYTES as usize + 3 * FRAME_BYTES_MAX <= RING_BYTES);

/// The other side broke the ring's rules.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("corrupt ring: {0}")]
pub struct RingError(&'static str);

fn aligned(length: usize) -> usize {
    length.next_multiple_of(8)
}

/// Makes a ring; the memory is handed to both sides.
///
/// # Errors
/// As [`SharedMemory::create`].
pub fn create(name: &str) -> io::Result<SharedMemory> {
    SharedMemory::create(name, DATA + RING_BYTES)
}

/// The writing side.
#[derive(Debug)]
pub struct Producer {
    memory: SharedMemory,
    written: u64,
    /// What was last seen of the consumer's counter.
    read_seen: u64,
}

impl Producer {
    /// Takes the writing side of a ring.
    ///
    /// # Errors
    /// A descriptor that is not a ring.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self::on(SharedMemory::open(fd, DATA + RING_BYTES)?))
    }

    /// Takes the writing side of a ring in memory that is mapped already.
    #[must_use]
    pub fn on(memory: SharedMemory) -> Self {
        let written = memory.long(WRITTEN).load(Ordering::Relaxed);
        let read_seen = memory.long(READ).load(Ordering::Acquire);
        Self {
            memory,
            written,
            read_seen,
        }
    }

    /// Descriptor of the ring's memory.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// Whether at most `bytes` are used, as far as was seen; if not, after another look.
    #[inline]
    fn uses_at_most(&mut self, bytes: u64) -> bool {
        if self.written.wrapping_sub(self.read_seen) <= bytes {
            return true;
        }
        self.read_seen = self.memory.long(READ).load(Ordering::Acquire);
        self.written.wrapping_sub(self.read_seen) <= bytes
    }

    /// Bytes a record takes, the skip to the start included.
    #[inline]
    fn cost(&self, length: usize) -> usize {
        let offset = self.written as usize % RING_BYTES;
        let to_end = RING_BYTES - offset;
        let need = aligned(length);
        if need <= to_end { need } else { to_end + need }
    }

    /// Whether a frame of `length` bytes fits now.
    #[must_use]
    #[inline]
    pub fn fits(&mut self, length: usize) -> bool {
        // A hostile `read` beyond `written` makes what is used huge: no room, and the ring stops. That harms only its own VM.
        (RING_BYTES as u64)
            .checked_sub(self.cost(length) as u64)
            .is_some_and(|rest| self.uses_at_most(rest))
    }

    /// Sleeps until a frame of `length` bytes may fit or `timeout` passes.
    pub fn wait_for_space(&mut self, length: usize, timeout: Duration) {
        let seen = self.memory.word(SPACE).load(Ordering::Acquire);
        self.memory.word(PRODUCER_WAITS).store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if !self.fits(length) {
            futex::wait(self.memory.word(SPACE), seen, Some(timeout));
        }
        self.memory.word(PRODUCER_WAITS).store(0, Ordering::Relaxed);
    }

    /// Appends one frame of exactly `length` bytes that `fill` writes in place.
    ///
    /// # Panics
    /// If the frame does not fit: ask [`Producer::fits`] first.
    #[inline]
    pub fn push(&mut self, length: usize, fill: impl FnOnce(&mut [u8])) {
        self.stage(length, fill);
        self.publish();
    }

    /// As [`Producer::push`], but the consumer sees the frame only with the next [`Producer::publish`].
    ///
    /// # Panics
    /// As [`Producer::push`].
    #[inline]
    pub fn stage(&mut self, length: usize, fill: impl FnOnce(&mut [u8])) {
        assert!(
            length <= FRAME_BYTES_MAX && self.fits(length),
            "frame of {length} bytes does not fit"
        );
        let mut offset = self.written as usize % RING_BYTES;
        if aligned(length) > RING_BYTES - offset {
            self.memory.write(DATA + offset, &WRAP.to_le_bytes());
            self.written += (RING_BYTES - offset) as u64;
            offset = 0;
        }
        self.memory.write_in_place(DATA + offset, length, fill);
        self.written += aligned(length) as u64;
    }

    /// Shows the consumer what was staged.
    #[inline]
    pub fn publish(&mut self) {
        self.memory.long(WRITTEN).store(self.written, Ordering::Release);
    }

    /// Whether the consumer sleeps, and nobody has been told so since it lay down: whoever is told must ring its doorbell.
    pub fn must_ring(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let sleeps = self.memory.word(CONSUMER_SLEEPS);
        sleeps.load(Ordering::Relaxed) != 0 && sleeps.swap(0, Ordering::AcqRel) != 0
    }
}

/// The reading side.
#[derive(Debug)]
pub struct Consumer {
    memory: SharedMemory,
    read: u64,
    /// What the producer knows of `read`.
    released: u64,
    /// What was last seen of the producer's counter.
    written_seen: u64,
}

impl Consumer {
    /// Takes the reading side of a ring.
    ///
    /// # Errors
    /// A descriptor that is not a ring.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self::on(SharedMemory::open(fd, DATA + RING_BYTES)?))
    }

    /// Takes the reading side of a ring in memory that is mapped already.
    #[must_use]
    pub fn on(memory: SharedMemory) -> Self {
        let read = memory.long(READ).load(Ordering::Relaxed);
        Self {
            memory,
            read,
            released: read,
            written_seen: read,
        }
    }

    /// Descriptor of the ring's memory.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// Tells the producer whether this side is about to sleep. After `true` look once more for frames before sleeping.
    pub fn set_sleeping(&self, sleeping: bool) {
        self.memory
            .word(CONSUMER_SLEEPS)
            .store(u32::from(sleeping), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Bytes that wait, as far as was seen; if that are none, after another look.
    #[inline]
    fn available(&mut self) -> Result<usize, RingError> {
        if self.written_seen == self.read {
            self.written_seen = self.memory.long(WRITTEN).load(Ordering::Acquire);
        }
        let available = self.written_seen.wrapping_sub(self.read);
        if available > RING_BYTES as u64 || !available.is_multiple_of(8) {
            return Err(RingError("the write counter is impossible"));
        }
        Ok(available as usize)
    }

    /// Whether a frame is waiting.
    ///
    /// # Errors
    /// [`RingError`] when the producer broke the rules.
    #[inline]
    pub fn is_empty(&mut self) -> Result<bool, RingError> {
        Ok(self.available()? == 0)
    }

    /// LSN in the header of the next frame, unchecked but for bounds: lets a merger choose among rings. `None` if empty.
    ///
    /// # Errors
    /// [`RingError`] when the producer broke the rules.
    #[inline]
    pub fn peek_lsn(&mut self) -> Result<Option<u64>, RingError> {
        Ok(self.next_record()?.map(|(offset, _)| self.lsn_at(offset)))
    }

    #[inline]
    fn lsn_at(&self, offset: usize) -> u64 {
        self.memory.long(DATA + offset + 8).load(Ordering::Relaxed)
    }

    /// Offset and length of the next record, past a wrap marker.
    #[inline]
    fn next_record(&mut self) -> Result<Option<(usize, usize)>, RingError> {
        let mut available = self.available()?;
        if available == 0 {
            return Ok(None);
        }
        let mut offset = self.read as usize % RING_BYTES;
        let mut length = self.memory.word(DATA + offset).load(Ordering::Relaxed);
        if length == WRAP {
            let skip = RING_BYTES - offset;
            if skip >= available {
                return Err(RingError("a wrap marker with nothing behind it"));
            }
            self.read += skip as u64;
            available -= skip;
            offset = 0;
            length = self.memory.word(DATA).load(Ordering::Relaxed);
        }
        let length = match frame::peek_length(&length.to_le_bytes()) {
            Ok(Some(length)) => length,
            _ => return Err(RingError("an impossible frame length")),
        };
        if aligned(length) > available || aligned(length) > RING_BYTES - offset {
            return Err(RingError("a frame that reaches beyond what was written"));
        }
        Ok(Some((offset, length)))
    }

    /// Appends the next frame to `out` and gives its length; `None` if the ring is empty. The frame is *not* validated. The producer gets
    /// the room back in pieces, and all of it when the ring is found empty: whoever waits for room has filled the ring with more than a piece.
    ///
    /// # Errors
    /// [`RingError`] when the producer broke the rules.
    #[inline]
    pub fn pop(&mut self, out: &mut Vec<u8>) -> Result<Option<usize>, RingError> {
        let taken = self.take(out);
        if !matches!(taken, Ok(Some(_))) || self.read - self.released >= RELEASE_BYTES {
            self.release();
        }
        taken
    }

    /// As [`Consumer::pop`], but the producer gets the room back only with the next [`Consumer::release`].
    ///
    /// # Errors
    /// [`RingError`] when the producer broke the rules.
    #[inline]
    pub fn take(&mut self, out: &mut Vec<u8>) -> Result<Option<usize>, RingError> {
        let record = self.next_record()?;
        Ok(record.map(|(offset, length)| self.take_record(offset, length, out)))
    }

    /// As [`Consumer::take`], if the next frame has this LSN in its (unchecked) header.
    ///
    /// # Errors
    /// [`RingError`] when the producer broke the rules.
    #[inline]
    pub fn take_lsn(&mut self, lsn: u64, out: &mut Vec<u8>) -> Result<Option<usize>, RingError> {
        let record = self.next_record()?.filter(|(offset, _)| self.lsn_at(*offset) == lsn);
        Ok(record.map(|(offset, length)| self.take_record(offset, length, out)))
    }

    #[inline]
    fn take_record(&mut self, offset: usize, length: usize, out: &mut Vec<u8>) -> usize {
        let start = out.len();
        self.memory.append_to(DATA + offset, length, out);
        // The length was read before the copy; a producer that changed it since is caught here.
        out[start..start + 4].copy_from_slice(&(length as u32).to_le_bytes());
        self.read += aligned(length) as u64;
        length
    }

    /// Gives the producer the room of what was taken.
    pub fn release(&mut self) {
        if self.released == self.read {
            return;
        }
        self.released = self.read;
        self.memory.long(READ).store(self.read, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.memory.word(PRODUCER_WAITS).load(Ordering::Relaxed) != 0 {
            self.memory.word(SPACE).fetch_add(1, Ordering::Release);
            futex::wake(self.memory.word(SPACE));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair() -> (Producer, Consumer) {
        let memory = create("test-ring").unwrap();
        let other = memory.fd().try_clone_to_owned().unwrap();
        (Producer::on(memory), Consumer::new(other).unwrap())
    }

    fn fill(length: usize, tag: u8) -> impl FnOnce(&mut [u8]) {
        move |out| {
            out.fill(tag);
            out[..4].copy_from_slice(&(length as u32).to_le_bytes());
        }
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(lengths in proptest::collection::vec(24usize..300_000, 1..80)) {
            let (mut producer, mut consumer) = pair();
            let mut expected = std::collections::VecDeque::new();
            let mut out = Vec::new();
            for (index, length) in lengths.iter().copied().enumerate() {
                while !producer.fits(length) {
                    let (length, tag) = expected.pop_front().unwrap();
                    out.clear();
                    prop_assert_eq!(consumer.pop(&mut out).unwrap(), Some(length));
                    prop_assert!(out[4..].iter().all(|byte| *byte == tag));
                }
                producer.push(length, fill(length, index as u8));
                expected.push_back((length, index as u8));
            }
            for (length, tag) in expected {
                out.clear();
                prop_assert_eq!(consumer.pop(&mut out).unwrap(), Some(length));
                prop_assert!(out[4..].iter().all(|byte| *byte == tag));
            }
            prop_assert_eq!(consumer.pop(&mut out).unwrap(), None);
        }

        #[test]
        fn a_hostile_producer_gets_an_error_and_nothing_else(written in any::<u64>(), words in proptest::collection::vec(any::<u32>(), 8)) {
            let (producer, mut consumer) = pair();
            for (index, word) in words.iter().enumerate() {
                producer.memory.word(DATA + 4 * index).store(*word, Ordering::Relaxed);
            }
            producer.memory.long(WRITTEN).store(written, Ordering::Relaxed);
            let mut out = Vec::new();
            for _ in 0..10 {
                if consumer.pop(&mut out).is_err() {
                    break;
                }
            }
            prop_assert!(out.len() <= 10 * FRAME_BYTES_MAX);
        }
    }

    #[test]
    fn a_sleeping_consumer_is_reported_once_each_time_it_lies_down() {
        let (mut producer, consumer) = pair();
        assert!(!producer.must_ring());
        for _ in 0..2 {
            consumer.set_sleeping(true);
            assert!(producer.must_ring());
            assert!(!producer.must_ring());
        }
        consumer.set_sleeping(true);
        consumer.set_sleeping(false);
        assert!(!producer.must_ring());
    }

    #[test]
    fn a_batch_is_seen_and_its_room_given_back_at_once() {
        let (mut producer, mut consumer) = pair();
        let mut out = Vec::new();
        for tag in 1..=2 {
            producer.stage(24, fill(24, tag));
            assert_eq!(consumer.take(&mut out), Ok(None));
        }
        producer.publish();
        assert_eq!(consumer.take(&mut out), Ok(Some(24)));
        assert_eq!(consumer.take(&mut out), Ok(Some(24)));
        assert_eq!(consumer.take(&mut out), Ok(None));
        assert_eq!((out.len(), out[23], out[47]), (48, 1, 2));
        assert!(producer.uses_at_most(48) && !producer.uses_at_most(47));
        consumer.release();
        assert!(producer.uses_at_most(0));
    }

    #[test]
    fn room_comes_back_in_pieces_and_all_of_it_when_the_ring_is_empty() {
        const LENGTH: usize = 4096;
        let (mut producer, mut consumer) = pair();
        let mut out = Vec::new();
        for _ in 0..20 {
            producer.push(LENGTH, fill(LENGTH, 1));
        }
        assert_eq!(consumer.pop(&mut out), Ok(Some(LENGTH)));
        assert!(!producer.uses_at_most(19 * LENGTH as u64));
        for _ in 1..16 {
            assert_eq!(consumer.pop(&mut out), Ok(Some(LENGTH)));
        }
        assert!(producer.uses_at_most(4 * LENGTH as u64));
        for _ in 16..20 {
            assert_eq!(consumer.pop(&mut out), Ok(Some(LENGTH)));
        }
        assert!(!producer.uses_at_most(0));
        assert_eq!(consumer.pop(&mut out), Ok(None));
        assert!(producer.uses_at_most(0));
    }

    #[test]
    fn a_waiting_producer_goes_on_when_a_frame_is_taken() {
        let (mut producer, mut consumer) = pair();
        while producer.fits(FRAME_BYTES_MAX) {
            producer.push(FRAME_BYTES_MAX, fill(FRAME_BYTES_MAX, 1));
        }
        let waiter = std::thread::spawn(move || {
            while !producer.fits(FRAME_BYTES_MAX) {
                producer.wait_for_space(FRAME_BYTES_MAX, Duration::from_secs(60));
            }
            producer.fits(FRAME_BYTES_MAX)
        });
        let mut out = Vec::new();
        while consumer.pop(&mut out).unwrap().is_some() {
            out.clear();
        }
        assert!(waiter.join().unwrap());
    }
}
