//! The in-flight region of vhost-user: which chains the device holds, in memory that outlives the daemon.
//!
//! ```text
//!  taken: counter, inflight = 1 ─► ... ─► last_batch_head = head ─► used ring ─► inflight = 0 ─► used_idx = the ring's
//!                                                                └ killed here: the ring is ahead of used_idx, so
//!                                                                  last_batch_head was completed; it is not taken again
//! ```
//! A daemon that takes over from one that was killed takes every chain again that is still marked, in the order in which they
//! were first taken: their counters stay as they are, however often that happens. The layout for split rings is the protocol's own (vhost-user, "Inflight I/O tracking"). The
//! frontend holds the region for us and may write to it: nothing in it is trusted beyond its bounds.

use std::{
    fs::File,
    io,
    sync::{Arc, atomic::Ordering},
};

use thiserror::Error;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, mmap::MmapRegionError};

use crate::shared_file::keep_length;

const VERSION: u16 = 1;
const HEADER_BYTES: usize = 16;
const DESCRIPTOR_BYTES: usize = 16;
/// Queues begin at multiples of this.
const QUEUE_ALIGNMENT: usize = 64;

const VERSION_AT: usize = 8;
const SIZE_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_INDEX_AT: usize = 14;

/// Why a region is refused.
#[derive(Debug, Error)]
pub enum InflightError {
    /// The kernel cannot make or examine it.
    #[error("the in-flight region cannot be had: {0}")]
    Io(#[from] io::Error),
    /// The kernel cannot map it.
    #[error("the in-flight region cannot be mapped: {0}")]
    Map(#[from] MmapRegionError),
    /// It is not as large as its queues need, or not all of it is there.
    #[error("the in-flight region has {bytes} bytes at {offset} of a file of {length}, {needed} are needed")]
    Size {
        /// Its size.
        bytes: u64,
        /// Where it begins.
        offset: u64,
        /// Bytes of the file.
        length: u64,
        /// What its queues need.
        needed: usize,
    },
    /// A queue that was tracked with another size.
    #[error("the in-flight region tracks {found} chains of queue {queue}, which has {size}")]
    QueueSize {
        /// Queue.
        queue: u16,
        /// Its size now.
        size: u16,
        /// What the region says.
        found: u16,
    },
}

fn queue_bytes(size: u16) -> usize {
    (HEADER_BYTES + DESCRIPTOR_BYTES * usize::from(size)).next_multiple_of(QUEUE_ALIGNMENT)
}

/// The region of all queues, shared with the frontend.
#[derive(Clone, Debug)]
pub struct InflightRegion {
    mapping: Arc<MmapRegion>,
    queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Bytes of a region for this many queues of this size.
    #[must_use]
    pub fn bytes(queues: u16, queue_size: u16) -> usize {
        usize::from(queues) * queue_bytes(queue_size)
    }

    /// Maps a region. The file must be that long already, so that no access can end the process.
    ///
    /// # Errors
    /// [`InflightError`].
    pub fn map(file: File, offset: u64, bytes: u64, queues: u16, queue_size: u16) -> Result<Self, InflightError> {
        let needed = Self::bytes(queues, queue_size);
        keep_length(&file);
        let length = file.metadata()?.len();
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= length);
        if !inside || bytes < needed as u64 || needed == 0 {
            return Err(InflightError::Size {
                bytes,
                offset,
                length,
                needed,
            });
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), needed)?;
        Ok(Self {
            mapping: Arc::new(mapping),
            queues,
            queue_size,
        })
    }

    /// Whether a device tracked chains here before.
    #[must_use]
    pub fn is_used(&self) -> bool {
        let mut queues = (0..self.queues).filter_map(|queue| self.queue(queue));
        queues.any(|queue| queue.load::<u16>(VERSION_AT) != 0)
    }

    /// The tracking of one queue, if the region has it.
    #[must_use]
    pub fn queue(&self, queue: u16) -> Option<InflightQueue> {
        (queue < self.queues).then(|| InflightQueue {
            mapping: Arc::clone(&self.mapping),
            at: usize::from(queue) * queue_bytes(self.queue_size),
            queue,
            region_size: self.queue_size,
            counter: 0,
        })
    }
}

/// The tracking of one queue.
#[derive(Debug)]
pub struct InflightQueue {
    mapping: Arc<MmapRegion>,
    at: usize,
    queue: u16,
    region_size: u16,
    counter: u64,
}

impl InflightQueue {
    fn load<T: vm_memory::AtomicAccess>(&self, at: usize) -> T {
        let slice = self.mapping.as_volatile_slice();
        slice
            .load(self.at + at, Ordering::Acquire)
            .expect("offsets are within the queue's part")
    }

    fn store<T: vm_memory::AtomicAccess>(&self, value: T, at: usize) {
        let slice = self.mapping.as_volatile_slice();
        slice
            .store(value, self.at + at, Ordering::Release)
            .expect("offsets are within the queue's part");
    }

    /// Where the state of chain `head` is: inflight u8, padding, next u16 at 6, counter u64 at 8.
    fn descriptor(&self, head: u16) -> usize {
        assert!(
            head < self.region_size,
            "heads are bounded by the ring, the ring by the region"
        );
        HEADER_BYTES + DESCRIPTOR_BYTES * usize::from(head)
    }

    /// Takes up the queue where the last device left it: `size` is the ring's, `used_index` what its used ring says. Gives the
    /// chains that the device still holds, oldest first.
    ///
    /// # Errors
    /// [`InflightError::QueueSize`].
    pub fn recover(&mut self, size: u16, used_index: u16) -> Result<Vec<u16>, InflightError> {
        let mismatch = |found| InflightError::QueueSize {
            queue: self.queue,
            size,
            found,
        };
        if size > self.region_size {
            return Err(mismatch(self.region_size));
        }
        if self.load::<u16>(VERSION_AT) == 0 {
            self.store(size, SIZE_AT);
            self.store(used_index, USED_INDEX_AT);
            self.store(VERSION, VERSION_AT);
            return Ok(Vec::new());
        }
        let tracked: u16 = self.load(SIZE_AT);
        if tracked != size {
            return Err(mismatch(tracked));
        }
        let last: u16 = self.load(LAST_BATCH_HEAD_AT);
        if self.load::<u16>(USED_INDEX_AT) != used_index {
            if last < size {
                self.store(0u8, self.descriptor(last));
            }
            self.store(used_index, USED_INDEX_AT);
        }
        let mut held: Vec<(u64, u16)> = (0..size)
            .filter(|head| self.load::<u8>(self.descriptor(*head)) == 1)
            .map(|head| (self.load(self.descriptor(head) + 8), head))
            .collect();
        held.sort_unstable();
        self.counter = held.last().map_or(0, |(counter, _)| *counter);
        Ok(held.into_iter().map(|(_, head)| head).collect())
    }

    /// The device takes a chain for the first time.
    pub fn taken(&mut self, head: u16) {
        self.counter = self.counter.wrapping_add(1);
        let at = self.descriptor(head);
        self.store(self.counter, at + 8);
        self.store(1u8, at);
    }

    /// The chain is about to appear in the used ring.
    pub fn completing(&mut self, head: u16) {
        let at = self.descriptor(head);
        self.store(self.load::<u16>(LAST_BATCH_HEAD_AT), at + 6);
        self.store(head, LAST_BATCH_HEAD_AT);
    }

    /// The chain is in the used ring, whose index is now `used_index`.
    pub fn completed(&mut self, head: u16, used_index: u16) {
        self.store(0u8, self.descriptor(head));
        self.store(used_index, USED_INDEX_AT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;
    const NOTHING: [u16; 0] = [];

    fn region(queues: u16) -> InflightRegion {
        let file = tempfile::tempfile().unwrap();
        let bytes = InflightRegion::bytes(queues, SIZE) as u64;
        file.set_len(bytes).unwrap();
        InflightRegion::map(file, 0, bytes, queues, SIZE).unwrap()
    }

    /// The next device on the same region.
    fn successor(region: &InflightRegion, used_index: u16) -> Vec<u16> {
        region.queue(0).unwrap().recover(SIZE, used_index).unwrap()
    }

    #[test]
    fn what_was_held_is_taken_again_in_its_order() {
        let region = region(1);
        let mut queue = region.queue(0).unwrap();
        assert_eq!(queue.recover(SIZE, 5).unwrap(), NOTHING);
        for head in [3, 1, 7] {
            queue.taken(head);
        }
        assert_eq!(successor(&region, 5), [3, 1, 7]);
        queue.completing(1);
        queue.completed(1, 6);
        queue.taken(1);
        assert_eq!(successor(&region, 6), [3, 7, 1]);
    }

    /// Dies after each step of a completion; `used_index` is what the ring says by then.
    #[test]
    fn a_chain_in_the_used_ring_is_not_taken_again() {
        for (steps, used_index, expected) in [(0, 0, vec![2, 4]), (1, 0, vec![2, 4]), (2, 1, vec![4]), (3, 1, vec![4])]
        {
            let region = region(1);
            let mut queue = region.queue(0).unwrap();
            assert_eq!(queue.recover(SIZE, 0).unwrap(), NOTHING);
            queue.taken(2);
            queue.taken(4);
            if steps > 0 {
                queue.completing(2);
            }
            if steps > 2 {
                queue.completed(2, 1);
            }
            assert_eq!(successor(&region, used_index), expected, "{steps} steps");
            assert_eq!(successor(&region, used_index), expected, "{steps} steps, twice");
        }
    }

    #[test]
    fn queues_do_not_share() {
        let region = region(2);
        let mut second = region.queue(1).unwrap();
        assert_eq!(second.recover(SIZE, 0).unwrap(), NOTHING);
        second.taken(0);
        assert_eq!(successor(&region, 0), NOTHING);
        assert!(region.queue(2).is_none());
    }

    #[test]
    fn regions_that_lie_are_refused() {
        let file = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(256).unwrap();
            file
        };
        for (offset, bytes, queues) in [
            (0, 512, 1),
            (u64::MAX, 256, 1),
            (128, 192, 1),
            (0, 128, 1),
            (0, 256, 2),
            (0, 256, 0),
        ] {
            let refused = InflightRegion::map(file(), offset, bytes, queues, SIZE);
            assert!(
                matches!(refused, Err(InflightError::Size { .. })),
                "{offset} {bytes} {queues}"
            );
        }
        let region = region(1);
        let mut queue = region.queue(0).unwrap();
        assert_eq!(queue.recover(4, 0).unwrap(), NOTHING);
        let other = queue.recover(SIZE, 0);
        assert!(matches!(other, Err(InflightError::QueueSize { found: 4, .. })));
        assert!(matches!(queue.recover(16, 0), Err(InflightError::QueueSize { .. })));
    }

    #[test]
    fn a_hostile_region_gives_no_head_beyond_the_ring() {
        let region = region(1);
        let mut queue = region.queue(0).unwrap();
        queue.recover(SIZE, 0).unwrap();
        queue.store(0xffffu16, LAST_BATCH_HEAD_AT);
        queue.store(0xffffu16, USED_INDEX_AT);
        for head in 0..SIZE {
            queue.store(1u8, queue.descriptor(head));
            queue.store(u64::MAX, queue.descriptor(head) + 8);
        }
        let held = successor(&region, 3);
        assert_eq!(held, (0..SIZE).collect::<Vec<_>>());
        queue.recover(SIZE, 3).unwrap();
        queue.taken(1);
    }
}
