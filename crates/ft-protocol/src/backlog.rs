//! The entries that the backup may not have yet: kept until it acknowledges them, sent again when the channel was lost.
//!
//! ```text
//!   chunks   [acknowledged: gone] [sent, kept] [sent, kept] │ [unsent] [tail, collects]
//!                                                           └ next: what the channel takes
//!   rewind(after) moves `next` back to the chunk that holds the entry after `after`
//! ```
//! Frames are collected where they are sent from: nothing is copied on the way to the channel, and buffers are used again. A chunk
//! travels whole, so entries that the backup has already may come again with it; the backup drops those.

use std::collections::VecDeque;

use crate::{
    ids::Lsn,
    limits::{BACKLOG_CHUNK_BYTES, BACKLOG_SPARES_MAX},
};

/// What a chunk costs besides its bytes.
const CHUNK_OVERHEAD_BYTES: usize = 64;

#[derive(Debug)]
struct Chunk {
    serial: u64,
    /// Last entry of the sealed bytes; meaningless while `sealed` is 0.
    through: Lsn,
    /// Bytes of whole, ordered entries; what is behind them is being collected.
    sealed: usize,
    bytes: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub struct Backlog {
    chunks: VecDeque<Chunk>,
    /// The first chunk that the current channel has not taken.
    next: usize,
    /// The chunk whose bytes are with the channel.
    out: Option<u64>,
    serials: u64,
    bytes: usize,
    bytes_max: usize,
    spare: Vec<Vec<u8>>,
}

impl Backlog {
    /// An empty backlog that is full at `bytes_max`.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self {
            chunks: VecDeque::new(),
            next: 0,
            out: None,
            serials: 0,
            bytes: 0,
            bytes_max,
            spare: Vec::new(),
        }
    }

    /// Whether no more entries may be collected: the producers stop until the backup has acknowledged some. One batch may go beyond.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.bytes >= self.bytes_max
    }

    /// Bytes of the entries that are kept.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    // ---- collecting --------------------------------------------------------------------------------------------------

    /// Where the frames of the next entries are appended to. [`Backlog::seal`] or [`Backlog::retract`] must follow.
    pub fn tail(&mut self) -> &mut Vec<u8> {
        let fits = |chunk: &Chunk, at: usize| at >= self.next && chunk.sealed < BACKLOG_CHUNK_BYTES;
        let last = self.chunks.len().wrapping_sub(1);
        let collects = self
            .chunks
            .back()
            .is_some_and(|chunk| fits(chunk, last) && self.out != Some(chunk.serial));
        if !collects {
            self.serials += 1;
            self.bytes += CHUNK_OVERHEAD_BYTES;
            self.chunks.push_back(Chunk {
                serial: self.serials,
                through: Lsn::ZERO,
                sealed: 0,
                bytes: self.spare.pop().unwrap_or_default(),
            });
        }
        &mut self.chunks.back_mut().expect("one was just made").bytes
    }

    /// What was appended to the tail since the last seal.
    #[must_use]
    pub fn collected(&self) -> &[u8] {
        self.chunks
            .back()
            .map_or(&[], |chunk| &chunk.bytes[chunk.sealed.min(chunk.bytes.len())..])
    }

    /// What was appended to the tail are whole entries, the last of which is `through`.
    pub fn seal(&mut self, through: Lsn) {
        if let Some(chunk) = self.chunks.back_mut() {
            self.bytes += chunk.bytes.len() - chunk.sealed;
            chunk.sealed = chunk.bytes.len();
            chunk.through = through;
        }
    }

    /// Takes back what was appended to the tail and not sealed.
    pub fn retract(&mut self) {
        let Some(chunk) = self.chunks.back_mut() else { return };
        if chunk.sealed == 0 {
            let chunk = self.chunks.pop_back().expect("it is there");
            self.drop_chunk(chunk);
        } else if self.out != Some(chunk.serial) {
            chunk.bytes.truncate(chunk.sealed);
        }
    }

    // ---- sending -----------------------------------------------------------------------------------------------------

    /// Whether [`Backlog::take`] would give something.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.out.is_none() && self.chunks.get(self.next).is_some_and(|chunk| chunk.sealed > 0)
    }

    /// The bytes to send next, in order; `None` if there are none, or the ones before have not come back.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        if !self.is_ready() {
            return None;
        }
        let chunk = &mut self.chunks[self.next];
        debug_assert_eq!(chunk.sealed, chunk.bytes.len(), "taken while it collects");
        self.next += 1;
        self.out = Some(chunk.serial);
        Some(std::mem::take(&mut chunk.bytes))
    }

    /// The bytes that were taken come back, sent or not.
    pub fn give_back(&mut self, bytes: Vec<u8>) {
        let serial = self.out.take();
        match self.chunks.iter_mut().find(|chunk| Some(chunk.serial) == serial) {
            Some(chunk) => chunk.bytes = bytes,
            None => self.keep_spare(bytes),
        }
    }

    /// A new channel: everything after `after` is sent (again).
    pub fn rewind(&mut self, after: Lsn) {
        self.acknowledge(after);
        self.next = 0;
    }

    // ---- forgetting --------------------------------------------------------------------------------------------------

    /// The backup has everything through `lsn`.
    pub fn acknowledge(&mut self, lsn: Lsn) {
        while self
            .chunks
            .front()
            .is_some_and(|chunk| chunk.sealed > 0 && chunk.through <= lsn && chunk.sealed >= chunk.bytes.len())
        {
            let chunk = self.chunks.pop_front().expect("it is there");
            self.next = self.next.saturating_sub(1);
            self.drop_chunk(chunk);
        }
    }

    /// There is no backup any more.
    pub fn clear(&mut self) {
        while let Some(chunk) = self.chunks.pop_back() {
            self.drop_chunk(chunk);
        }
        self.next = 0;
    }

    fn drop_chunk(&mut self, chunk: Chunk) {
        self.bytes -= chunk.sealed + CHUNK_OVERHEAD_BYTES;
        self.keep_spare(chunk.bytes);
    }

    fn keep_spare(&mut self, mut bytes: Vec<u8>) {
        let is_usable = (1..=4 * BACKLOG_CHUNK_BYTES).contains(&bytes.capacity());
        if is_usable && self.spare.len() < BACKLOG_SPARES_MAX {
            bytes.clear();
            self.spare.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn append(backlog: &mut Backlog, lsn: u64) {
        backlog.tail().push(lsn as u8);
        backlog.seal(Lsn(lsn));
    }

    fn send(backlog: &mut Backlog) -> Vec<u8> {
        let mut sent = Vec::new();
        while let Some(bytes) = backlog.take() {
            sent.extend_from_slice(&bytes);
            backlog.give_back(bytes);
        }
        sent
    }

    #[test]
    fn what_is_not_acknowledged_is_sent_again_and_the_rest_is_not_kept() {
        let mut backlog = Backlog::new(1 << 20);
        for lsn in 1..=4 {
            append(&mut backlog, lsn);
            assert_eq!(send(&mut backlog), [lsn as u8]);
        }
        backlog.acknowledge(Lsn(2));
        append(&mut backlog, 5);
        backlog.rewind(Lsn(2));
        assert_eq!(send(&mut backlog), [3, 4, 5]);
        backlog.acknowledge(Lsn(5));
        assert_eq!((backlog.bytes(), send(&mut backlog)), (0, vec![]));
    }

    #[test]
    fn a_chunk_that_is_out_collects_nothing_and_outlives_its_acknowledgement() {
        let mut backlog = Backlog::new(1 << 20);
        append(&mut backlog, 1);
        let out = backlog.take().unwrap();
        append(&mut backlog, 2);
        assert_eq!(backlog.take(), None, "the first has not come back");
        // The channel breaks with the first in the kernel's hands.
        backlog.rewind(Lsn::ZERO);
        append(&mut backlog, 3);
        assert_eq!(backlog.take(), None);
        backlog.give_back(out);
        assert_eq!(send(&mut backlog), [1, 2, 3]);
        append(&mut backlog, 4);
        let out = backlog.take().unwrap();
        backlog.acknowledge(Lsn(4));
        backlog.give_back(out);
        assert_eq!((backlog.bytes(), backlog.is_ready()), (0, false));
    }

    #[test]
    fn what_was_retracted_is_gone_and_a_full_one_says_so() {
        let mut backlog = Backlog::new(100);
        append(&mut backlog, 1);
        backlog.tail().extend([9, 9]);
        assert_eq!(backlog.collected(), [9, 9]);
        backlog.retract();
        backlog.retract();
        assert!(!backlog.is_full());
        backlog.tail().extend([2; 60]);
        backlog.seal(Lsn(2));
        assert!(backlog.is_full());
        assert_eq!(send(&mut backlog)[..2], [1, 2]);
        backlog.tail().push(7);
        backlog.retract();
        backlog.acknowledge(Lsn(2));
        assert_eq!(backlog.bytes(), 0);
    }

    proptest! {
        /// Against an oracle: whatever happens to the channel, the receiver's stream, without what it has, is dense.
        #[test]
        fn the_receiver_gets_every_entry_once_whatever_breaks(steps in proptest::collection::vec(0u8..8, 1..200)) {
            let mut backlog = Backlog::new(1 << 20);
            let (mut last, mut received, mut told, mut out) = (0u64, 0u64, 0u64, None::<Vec<u8>>);
            for step in steps {
                match step {
                    0..3 => {
                        last += 1;
                        backlog.tail().extend_from_slice(&last.to_le_bytes());
                        backlog.seal(Lsn(last));
                    }
                    3 => out = out.or_else(|| backlog.take()),
                    4 => if let Some(bytes) = out.take() {
                        for word in bytes.chunks(8) {
                            let lsn = u64::from_le_bytes(word.try_into().unwrap());
                            prop_assert!(lsn <= received + 1, "a gap: {lsn} after {received}");
                            received = received.max(lsn);
                        }
                        backlog.give_back(bytes);
                    },
                    5 => {
                        told = received;
                        backlog.acknowledge(Lsn(told));
                    }
                    _ => {
                        // The channel breaks; what was under way may be lost.
                        if let Some(bytes) = out.take() {
                            backlog.give_back(bytes);
                        }
                        told = told.max(if step == 6 { received } else { told });
                        backlog.rewind(Lsn(told));
                    }
                }
            }
            if let Some(bytes) = out.take() {
                backlog.give_back(bytes);
            }
            backlog.rewind(Lsn(received));
            while let Some(bytes) = backlog.take() {
                for word in bytes.chunks(8) {
                    let lsn = u64::from_le_bytes(word.try_into().unwrap());
                    prop_assert!(lsn <= received + 1);
                    received = received.max(lsn);
                }
                backlog.give_back(bytes);
            }
            prop_assert_eq!(received, last);
            backlog.acknowledge(Lsn(last));
            prop_assert_eq!(backlog.bytes(), 0);
        }
    }
}
