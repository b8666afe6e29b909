//! Group commit: the records that share one flush.
//!
//! ```text
//! Collecting ──submit──► Writing (a request a page, all in flight) ──all written──► Flushing ──► settled ──► Collecting
//!                           └── one failed: once all are back, settled as failed ──────────────────┘
//! ```
//!
//! One group at a time: what arrives meanwhile waits and makes the next group, so groups grow with the load.

use crate::chain::{Head, Record, SECTOR_BYTES, Sector};
use crate::ledger::BlockDevice;
use crate::limits::{GROUP_RECORDS_MAX, GROUP_WRITES_MAX, WRITE_RECORDS_MAX};

/// Tag of the flush; the writes have those below it.
pub const FLUSH_TAG: u8 = GROUP_WRITES_MAX as u8;

/// Sectors of a group.
pub type GroupSectors = [Sector; GROUP_RECORDS_MAX];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Collecting,
    Writing { left: usize, failed: bool },
    Flushing,
}

/// A group that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// The head with the group, if it is on the disk now.
    pub head: Option<Head>,
}

/// The current group.
pub struct Group<'b> {
    sectors: &'b mut GroupSectors,
    count: usize,
    /// Where the chain stands with the group.
    head: Head,
    stage: Stage,
}

impl<'b> Group<'b> {
    /// An empty group after `head`.
    pub fn new(sectors: &'b mut GroupSectors, head: Head) -> Self {
        Group {
            sectors,
            count: 0,
            head,
            stage: Stage::Collecting,
        }
    }

    /// Number of the last record, this group included.
    pub fn last(&self) -> u64 {
        self.head.n
    }

    /// Whether the group has no records.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether one more record can join.
    pub fn is_open(&self) -> bool {
        self.stage == Stage::Collecting && self.count < GROUP_RECORDS_MAX
    }

    /// Adds the next record.
    ///
    /// # Panics
    /// If the group is not open.
    pub fn push(&mut self, uptime_ns: u64, payload: &[u8]) {
        assert!(self.is_open());
        self.head = self.head.next(payload);
        let record = Record {
            n: self.head.n,
            hash: self.head.hash,
            uptime_ns,
            payload,
        };
        record.write(&mut self.sectors[self.count]);
        self.count += 1;
    }

    /// Sends the records on their way, if there are any and nothing is under way.
    pub fn submit(&mut self, device: &mut impl BlockDevice) {
        if self.stage != Stage::Collecting || self.count == 0 {
            return;
        }
        let mut sector = self.head.n + 1 - self.count as u64;
        let mut left = 0;
        for (tag, records) in self.sectors[..self.count].chunks(WRITE_RECORDS_MAX).enumerate() {
            // SAFETY: the sectors change again only in `push`, which the stage forbids until every write is back.
            unsafe { device.write(tag as u8, sector, records.as_ptr().cast(), records.len() * SECTOR_BYTES) };
            sector += records.len() as u64;
            left += 1;
        }
        self.stage = Stage::Writing { left, failed: false };
    }

    /// A write or the flush is back. `committed` is the head without the group.
    ///
    /// # Panics
    /// If nothing of the group was in flight.
    pub fn complete(&mut self, ok: bool, committed: Head, device: &mut impl BlockDevice) -> Option<Settled> {
        match self.stage {
            Stage::Collecting => panic!("a group request came back that was never sent"),
            Stage::Writing { left, failed } => {
                let (left, failed) = (left - 1, failed || !ok);
                self.stage = Stage::Writing { left, failed };
                if left > 0 {
                    return None;
                }
                if failed {
                    return Some(self.settle(false, committed));
                }
                // A flush covers the writes completed before it was sent, not those before it in the queue.
                device.flush(FLUSH_TAG);
                self.stage = Stage::Flushing;
                None
            }
            Stage::Flushing => Some(self.settle(ok, committed)),
        }
    }

    fn settle(&mut self, ok: bool, committed: Head) -> Settled {
        self.stage = Stage::Collecting;
        self.count = 0;
        if !ok {
            self.head = committed;
        }
        Settled {
            head: ok.then_some(self.head),
        }
    }

    /// A record of the group that settled last; valid until the next `push`.
    pub fn record(&self, index: usize) -> Option<Record<'_>> {
        Record::read(&self.sectors[index])
    }
}
