//! Engine `device`, live side: which blocks of this image a new backup needs, and when.
//!
//! ```text
//!  ask ─► compare{range} ─► digests of the new backup's image ─► due
//!  due ─► turn: no overlapping request is under way ─► read here ─┬─ equal: done
//!                                                                 └─ differs: write{block} in the log ─► applied there
//!  nothing asked, due or under way ─► transferred
//! ```
//! - *Order.* A block is read and logged while it has its turn among the guest's requests ([`crate::overlap`]): a write of the guest is either
//!   done before the block is read, or logged behind it. So no block that is copied takes the place of something newer.
//! - *Digests may be older than the block they are compared with.* What was written meanwhile is in the log behind them, and the new backup applies
//!   it too: where its block was equal to what is here now, it is equal once it has applied the log up to here.
//! - *Pace.* What is copied and not yet applied there is bounded, and so is what is asked and read at once: the guest's writes find room in the
//!   log, and its requests a disk that has time for them.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
};

use ft_protocol::{
    Lsn,
    limits::{BLOCK_BYTES, DIGESTS_MAX},
    message::Digest,
};
use ft_vhost::guest_side::blk::SECTOR_BYTES;
use sha2::{Digest as _, Sha256};

/// Sectors of a block.
pub(crate) const BLOCK_SECTORS: u64 = BLOCK_BYTES as u64 / SECTOR_BYTES;
/// Numbers of blocks as jobs start here: no request of a guest has one of them.
const FIRST_ID: u64 = 1 << 62;
/// Ranges that are asked about and not answered.
const ASKED_MAX: usize = 2;
/// Blocks that are read, or wait for their turn.
const TURNS_MAX: usize = 2;
/// Bytes that are copied and not applied by the new backup.
const AHEAD_BYTES_MAX: usize = 4 << 20;
const _: () = assert!(AHEAD_BYTES_MAX * 2 <= ft_protocol::limits::BACKLOG_BYTES_MAX);

/// What both sides call a block by.
pub(crate) fn digest(bytes: &[u8]) -> Digest {
    let whole: [u8; 32] = Sha256::digest(bytes).into();
    *whole.first_chunk().expect("a digest is half of it")
}

/// Whether a job is a block, and no request.
pub(crate) fn is_block(id: u64) -> bool {
    id >= FIRST_ID
}

/// A part of the image that is compared by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) sectors: Range<u64>,
    /// What the new backup has there.
    theirs: Digest,
}

impl Block {
    pub(crate) fn bytes(&self) -> usize {
        ((self.sectors.end - self.sectors.start) * SECTOR_BYTES) as usize
    }

    pub(crate) fn differs(&self, ours: &[u8]) -> bool {
        digest(ours) != self.theirs
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) compared: u64,
    pub(crate) copied: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Resync {
    /// Which synchronisation this is for.
    number: Option<u32>,
    end: u64,
    next: u64,
    asked: VecDeque<Range<u64>>,
    due: VecDeque<Block>,
    /// Blocks that have their turn or wait for it.
    turns: HashMap<u64, Block>,
    ids: u64,
    /// Entries with blocks, and their bytes.
    ahead: VecDeque<(Lsn, usize)>,
    ahead_bytes: usize,
    said_last: bool,
    done: Done,
}

impl Resync {
    /// Another synchronisation goes on, or none. Blocks of the one before that have their turn keep it until they are finished.
    pub(crate) fn begin(&mut self, number: Option<u32>, sectors: u64) {
        *self = Self {
            number,
            end: sectors,
            ids: self.ids,
            ..Self::default()
        };
    }

    pub(crate) fn number(&self) -> Option<u32> {
        self.number
    }

    /// Whether there is something to do.
    pub(crate) fn is_active(&self) -> bool {
        self.number.is_some() && !self.said_last
    }

    /// The range to ask about next.
    pub(crate) fn question(&self) -> Option<Range<u64>> {
        let has_place = self.is_active() && self.asked.len() < ASKED_MAX && self.due.len() < DIGESTS_MAX;
        let end = self.end.min(self.next + DIGESTS_MAX as u64 * BLOCK_SECTORS);
        (has_place && self.next < end).then_some(self.next..end)
    }

    /// The question is in the log.
    pub(crate) fn asked(&mut self, range: Range<u64>) {
        self.next = range.end;
        self.asked.push_back(range);
    }

    /// The new backup's answer. One that was not asked for, as after another attempt, is none.
    pub(crate) fn answered(&mut self, sector: u64, digests: &[Digest]) {
        let is_asked = |range: &Range<u64>| {
            range.start == sector && (range.end - range.start).div_ceil(BLOCK_SECTORS) == digests.len() as u64
        };
        if !self.asked.front().is_some_and(is_asked) {
            return;
        }
        let Some(range) = self.asked.pop_front() else { return };
        self.due.extend(digests.iter().zip(0..).map(|(theirs, number)| {
            let start = range.start + number * BLOCK_SECTORS;
            Block {
                sectors: start..range.end.min(start + BLOCK_SECTORS),
                theirs: *theirs,
            }
        }));
    }

    /// The next block that may have its turn, and its number as a job.
    pub(crate) fn next_turn(&mut self) -> Option<(u64, Range<u64>)> {
        if self.turns.len() >= TURNS_MAX || self.ahead_bytes + self.turns.len() * BLOCK_BYTES >= AHEAD_BYTES_MAX {
            return None;
        }
        let block = self.due.pop_front()?;
        let id = FIRST_ID + self.ids;
        self.ids += 1;
        let sectors = block.sectors.clone();
        self.turns.insert(id, block);
        Some((id, sectors))
    }

    /// A block that has its turn; `None` if it is of an earlier synchronisation.
    pub(crate) fn block(&self, id: u64) -> Option<&Block> {
        self.turns.get(&id)
    }

    /// A block's turn is over; `copied` is its entry, if it needed one.
    pub(crate) fn finished(&mut self, id: u64, copied: Option<Lsn>) {
        let Some(block) = self.turns.remove(&id) else { return };
        self.done.compared += 1;
        if let Some(lsn) = copied {
            self.done.copied += 1;
            self.ahead_bytes += block.bytes();
            self.ahead.push_back((lsn, block.bytes()));
        }
    }

    /// The new backup has applied every entry up to here.
    pub(crate) fn applied(&mut self, lsn: Lsn) {
        while let Some((_, bytes)) = self.ahead.front().filter(|(entry, _)| *entry <= lsn) {
            self.ahead_bytes -= bytes;
            self.ahead.pop_front();
        }
    }

    /// Whether all is compared, and what differed is in the log: the last word is due.
    pub(crate) fn is_complete(&self) -> bool {
        self.is_active()
            && self.next == self.end
            && self.asked.is_empty()
            && self.due.is_empty()
            && self.turns.is_empty()
    }

    /// The last word is in the log.
    pub(crate) fn said_last(&mut self) -> Done {
        self.said_last = true;
        self.done
    }
}

#[cfg(test)]
mod tests;
