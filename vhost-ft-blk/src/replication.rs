//! Engine `device`, primary: which change of the image is which entry, and which completions wait.
//!
//! ```text
//!  write, flush:      logged when it starts here  ─┬─ done here ──────┐
//!                                                  └─ committed ──────┴─► the guest is told, overlapping requests start
//!  zeroes, discard:   done here ─► logged ─► committed ─► the guest is told
//!  no room in the log: parked, and asked again when something is committed
//! ```
//! Overlapping requests wait until the one before is committed, so a read shows nothing that the other host may not have, and the
//! order of the entries is that of the changes here. A discard is logged as the zeroes it made: where this image cannot give space back, it made
//! none, and the other image keeps its content too.

use std::collections::VecDeque;

use ft_protocol::{Body, Committed, Held, Lsn};
use ft_vhost::{
    device::{Logged, Mirror},
    guest_side::blk::{Kind, REQUEST_BYTES_MAX, Request, SECTOR_BYTES},
};

const _: () = assert!(
    REQUEST_BYTES_MAX <= ft_protocol::limits::PAYLOAD_BYTES_MAX,
    "every write is one entry: none is ever split"
);

/// How far the log is with a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Nothing is logged.
    #[default]
    Unlogged,
    /// Its entry is on the way.
    Logged,
    /// Its entry is committed, or there is no backup.
    Free,
}

/// The jobs that the log has to do with.
#[derive(Debug)]
pub(crate) struct Replication {
    mirror: Mirror,
    /// Jobs in the order of their entries.
    held: VecDeque<Held<u64>>,
    /// Jobs whose entries found no room.
    parked: VecDeque<u64>,
}

impl Replication {
    pub(crate) fn new(mirror: Mirror) -> Self {
        Self {
            mirror,
            held: VecDeque::new(),
            parked: VecDeque::new(),
        }
    }

    /// Whether a request changes the image, and at which time it is logged: `Some(true)` when it starts, `Some(false)` when it is done here.
    pub(crate) fn logs_first(kind: Kind) -> Option<bool> {
        match kind {
            Kind::Write | Kind::Flush => Some(true),
            Kind::Discard | Kind::WriteZeroes { .. } => Some(false),
            Kind::Read | Kind::GetId | Kind::Refused(_) => None,
        }
    }

    /// Logs a job, whose data this is; parks it if that cannot be now.
    pub(crate) fn log(&mut self, id: u64, request: &Request, data: &[u8]) -> Stage {
        let Request {
            sector, length, queue, ..
        } = *request;
        let zeroes = |unmap| Body::Zeroes {
            sector,
            sectors: length / SECTOR_BYTES as u32,
            unmap,
        };
        let body = match request.kind {
            Kind::Write => Body::Write { sector, payload: data },
            Kind::Flush => Body::Flush,
            Kind::Discard => zeroes(true),
            Kind::WriteZeroes { unmap } => zeroes(unmap),
            Kind::Read | Kind::GetId | Kind::Refused(_) => return Stage::Free,
        };
        match self.mirror.append(queue, &body) {
            Logged::At(marker) => {
                self.held.push_back(Held::new(marker, id));
                Stage::Logged
            }
            Logged::Unprotected => Stage::Free,
            Logged::NotNow => {
                self.parked.push_back(id);
                Stage::Unlogged
            }
        }
    }

    /// The next job whose entry is committed.
    pub(crate) fn next_committed(&mut self, committed: Committed) -> Option<u64> {
        match self.held.pop_front()?.release(committed) {
            Ok(id) => Some(id),
            Err(held) => {
                self.held.push_front(held);
                None
            }
        }
    }

    /// The entry that is waited for first.
    pub(crate) fn marker(&self) -> Option<Lsn> {
        self.held.front().map(Held::marker)
    }

    /// A job that was parked, to be tried again.
    pub(crate) fn unpark(&mut self) -> Option<u64> {
        self.parked.pop_front()
    }

    /// How many are parked.
    pub(crate) fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Logs something about the disk that is no request.
    pub(crate) fn append(&mut self, body: &Body<'_>) -> Logged {
        self.mirror.append(0, body)
    }

    /// Live side: the last entry that the new backup has applied.
    pub(crate) fn peer_applied(&self) -> Lsn {
        self.mirror.peer_applied()
    }

    pub(crate) fn announce(&mut self) {
        self.mirror.announce();
    }

    pub(crate) fn power_off(&mut self) {
        self.mirror.power_off();
    }

    /// Whether there is a backup that a failure here must not leave behind.
    pub(crate) fn has_backup(&self) -> bool {
        self.mirror.has_backup()
    }
}
