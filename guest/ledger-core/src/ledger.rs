//! The ledger itself: what a request means, given what is committed, what is being committed and what the disk says.
//!
//! Commands go to a `BlockDevice`, completions come back by tag. An answer exists only once the flush that covers it is
//! back: there is no other way to one.

use crate::chain::{Hash, Head, Record, SECTOR_BYTES, Sector};
use crate::group::{FLUSH_TAG, Group, GroupSectors, Settled};
use crate::limits::{PAYLOAD_BYTES_MAX, READS_MAX};
use crate::protocol::{Answer, Operation, Request, Status};

/// A disk that takes requests and finishes them later. A tag is in use from the request until its completion.
pub trait BlockDevice {
    /// Starts a read.
    ///
    /// # Safety
    /// The buffer must stay valid and untouched until the completion of `tag`.
    unsafe fn read(&mut self, tag: u8, sector: u64, buffer: *mut u8, bytes: usize);

    /// Starts a write.
    ///
    /// # Safety
    /// The buffer must stay valid and unchanged until the completion of `tag`.
    unsafe fn write(&mut self, tag: u8, sector: u64, buffer: *const u8, bytes: usize);

    /// Starts a flush.
    fn flush(&mut self, tag: u8);
}

/// The end of a disk request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Whose.
    pub tag: u8,
    /// Whether the disk did it.
    pub ok: bool,
}

/// The memory that the disk reads and writes.
pub struct Buffers {
    /// Of the current group; at boot, of the chain being read.
    pub group: GroupSectors,
    /// Of the records being read.
    pub reads: [Sector; READS_MAX],
}

impl Buffers {
    /// Zeroed memory.
    pub const fn new() -> Self {
        Buffers {
            group: [[0; SECTOR_BYTES]; _],
            reads: [[0; SECTOR_BYTES]; _],
        }
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Self::new()
    }
}

/// Index of a read in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadSlot(usize);

impl ReadSlot {
    fn tag(self) -> u8 {
        FLUSH_TAG + 1 + self.0 as u8
    }
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// Nothing yet: ask again after the next completion.
    Wait,
    /// It is answered.
    Answered(Answer),
    /// Record n is in the group; `Settled` tells.
    Appending(u64),
    /// The disk is reading; `read_answer` tells.
    Reading(ReadSlot),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadState {
    Free,
    Reading,
    /// Nobody waits for it any more, but the disk still writes there.
    Abandoned,
    Done {
        ok: bool,
    },
}

struct Read {
    state: ReadState,
    n: u64,
    /// Of a repeated APPEND: what the record should hold.
    expected: Option<([u8; PAYLOAD_BYTES_MAX], usize)>,
}

/// The ledger.
pub struct Ledger<'b> {
    committed: Head,
    /// The last record that fits.
    n_max: u64,
    group: Group<'b>,
    reads: [Read; READS_MAX],
    read_sectors: &'b mut [Sector; READS_MAX],
}

impl<'b> Ledger<'b> {
    /// A ledger whose chain ends at `head`, on a disk of `sectors` sectors.
    pub fn new(buffers: &'b mut Buffers, head: Head, sectors: u64) -> Self {
        Ledger {
            committed: head,
            n_max: sectors.saturating_sub(1),
            group: Group::new(&mut buffers.group, head),
            reads: [const {
                Read {
                    state: ReadState::Free,
                    n: 0,
                    expected: None,
                }
            }; READS_MAX],
            read_sectors: &mut buffers.reads,
        }
    }

    /// The last record that is on the disk.
    pub fn committed(&self) -> Head {
        self.committed
    }

    /// Whether no append is under way.
    pub fn is_settled(&self) -> bool {
        self.group.is_empty()
    }

    /// Begins a request. `own_appends`: the same client has appends in the group, which this request comes after.
    pub fn begin(
        &mut self,
        request: &Request<'_>,
        own_appends: bool,
        uptime_ns: u64,
        device: &mut impl BlockDevice,
    ) -> Begun {
        let n = request.n;
        let committed = self.committed;
        match request.operation {
            Operation::Append | Operation::Read if 0 < n && n <= committed.n => self.begin_read(request, device),
            Operation::Append if n == self.group.last() + 1 => {
                if n > self.n_max {
                    return Begun::Answered(Answer::refusal(Status::Full, n));
                }
                if !self.group.is_open() {
                    return Begun::Wait;
                }
                self.group.push(uptime_ns, request.payload);
                Begun::Appending(n)
            }
            // Someone is just appending this record: wait, then compare.
            Operation::Append if committed.n < n && n <= self.group.last() => Begun::Wait,
            _ if own_appends => Begun::Wait,
            Operation::Append => Begun::Answered(Answer {
                status: Status::Sequence,
                n: committed.n,
                hash: committed.hash,
            }),
            Operation::Read => Begun::Answered(Answer::refusal(Status::NotFound, n)),
            Operation::Head => Begun::Answered(Answer {
                status: Status::Ok,
                n: committed.n,
                hash: committed.hash,
            }),
            Operation::PowerOff if !self.is_settled() => Begun::Wait,
            Operation::PowerOff => Begun::Answered(Answer {
                status: Status::Ok,
                n: committed.n,
                hash: committed.hash,
            }),
        }
    }

    fn begin_read(&mut self, request: &Request<'_>, device: &mut impl BlockDevice) -> Begun {
        let Some(index) = self.reads.iter().position(|read| read.state == ReadState::Free) else {
            return Begun::Wait;
        };
        let slot = ReadSlot(index);
        let expected = (request.operation == Operation::Append).then(|| {
            let mut payload = [0; PAYLOAD_BYTES_MAX];
            payload[..request.payload.len()].copy_from_slice(request.payload);
            (payload, request.payload.len())
        });
        self.reads[index] = Read {
            state: ReadState::Reading,
            n: request.n,
            expected,
        };
        let sector = &mut self.read_sectors[index];
        // SAFETY: the sector is looked at only in state Done, which the completion sets.
        unsafe { device.read(slot.tag(), request.n, sector.as_mut_ptr(), SECTOR_BYTES) };
        Begun::Reading(slot)
    }

    /// Sends the collected appends to the disk, unless a group is under way.
    pub fn submit(&mut self, device: &mut impl BlockDevice) {
        self.group.submit(device);
    }

    /// A disk request is back. Tells if that settled the group.
    pub fn complete(&mut self, completion: Completion, device: &mut impl BlockDevice) -> Option<Settled> {
        let Completion { tag, ok } = completion;
        if tag <= FLUSH_TAG {
            let settled = self.group.complete(ok, self.committed, device)?;
            if let Some(head) = settled.head {
                self.committed = head;
            }
            return Some(settled);
        }
        let read = &mut self.reads[usize::from(tag - FLUSH_TAG - 1)];
        read.state = match read.state {
            ReadState::Reading => ReadState::Done { ok },
            ReadState::Abandoned => ReadState::Free,
            ReadState::Free | ReadState::Done { .. } => panic!("a read came back that was never sent"),
        };
        None
    }

    /// Answer to the append of record n, whose group just settled. `first` is the group's first record.
    pub fn append_answer(&self, n: u64, first: u64, settled: Settled) -> Answer {
        match (settled.head, self.group.record((n - first) as usize)) {
            (Some(_), Some(record)) => Answer {
                status: Status::Ok,
                n,
                hash: record.hash,
            },
            _ => Answer::refusal(Status::Io, n),
        }
    }

    /// Answer and payload of a read, once the disk has it.
    pub fn read_answer(&self, slot: ReadSlot) -> Option<(Answer, &[u8])> {
        let read = &self.reads[slot.0];
        let ReadState::Done { ok } = read.state else {
            return None;
        };
        let record = Record::read(&self.read_sectors[slot.0]).filter(|record| ok && record.n == read.n);
        let Some(record) = record else {
            return Some((Answer::refusal(Status::Io, read.n), &[]));
        };
        let answer = |status, hash: Hash| Answer {
            status,
            n: read.n,
            hash,
        };
        Some(match &read.expected {
            None => (answer(Status::Ok, record.hash), record.payload),
            Some((payload, length)) if payload[..*length] == *record.payload => (answer(Status::Ok, record.hash), &[]),
            Some(_) => (answer(Status::Conflict, record.hash), &[]),
        })
    }

    /// Gives a slot back, its read finished or not.
    pub fn release(&mut self, slot: ReadSlot) {
        let read = &mut self.reads[slot.0];
        read.state = match read.state {
            ReadState::Reading => ReadState::Abandoned,
            _ => ReadState::Free,
        };
        read.expected = None;
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
