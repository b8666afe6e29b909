//! Engine `device`, live side: blocks for a new backup, between the guest's requests. What is due is in [`crate::resync`].

use std::io;

use ft_client::events::Events;
use ft_protocol::{Body, message::Digest};
use ft_vhost::{
    device::{Completion, Logged, Uring},
    guest_side::blk::SECTOR_BYTES,
};
use serde_json::json;
use tracing::{error, info};

use super::Disk;
use crate::overlap::Access;

/// When to look again for room in the log, and for what the new backup has applied.
const LOOK_NS: u64 = 1_000_000;

impl Disk {
    /// A synchronisation of a new backup begins, or ends.
    pub(super) fn synchronise_with(&mut self, number: Option<u32>) {
        if number == self.resync.number() {
            return;
        }
        self.resync.begin(number, self.image.sectors());
        match number {
            Some(_) => info!(
                sectors = self.image.sectors(),
                "a new backup's image is being brought up"
            ),
            None => info!("no backup is being synchronised any more"),
        }
    }

    pub(super) fn answered(&mut self, sector: u64, digests: &[Digest]) {
        self.resync.answered(sector, digests);
    }

    /// Asks, reads and copies what is due; gives when to be called again.
    pub(super) fn bring_up(&mut self, now_ns: u64, io: &mut Uring, events: &mut Events) -> Option<u64> {
        if !self.resync.is_active() && self.waiting_blocks.is_empty() {
            return None;
        }
        let Some(replication) = &mut self.replication else {
            return None;
        };
        self.resync.applied(replication.peer_applied());
        while let Some(range) = self.resync.question() {
            let sectors = (range.end - range.start) as u32;
            let question = Body::Compare {
                sector: range.start,
                sectors,
            };
            match replication.append(&question) {
                Logged::At(_) => self.resync.asked(range),
                Logged::Unprotected | Logged::NotNow => break,
            }
        }
        for (id, bytes) in std::mem::take(&mut self.waiting_blocks) {
            self.copy_block(id, bytes, io);
        }
        while let Some((id, sectors)) = self.resync.next_turn() {
            if self.schedule.arrive(id, Access::Write(sectors)) {
                self.read_block(id, io);
            }
        }
        if self.resync.is_complete()
            && let Some(replication) = &mut self.replication
            && let Logged::At(_) = replication.append(&Body::Transferred)
        {
            let done = self.resync.said_last();
            info!(
                compared = done.compared,
                copied = done.copied,
                "the new backup's image is brought up"
            );
            events.emit("resynced", json!({ "compared": done.compared, "copied": done.copied }));
        }
        self.announce();
        self.resync.is_active().then_some(now_ns + LOOK_NS)
    }

    /// A block has its turn.
    pub(super) fn read_block(&mut self, id: u64, io: &mut Uring) {
        let Some(block) = self.resync.block(id) else {
            self.finish_block(id, io);
            return;
        };
        let (offset, length) = (block.sectors.start * SECTOR_BYTES, block.bytes());
        io.read(self.image.fd(), offset, vec![0; length], 0, length, id);
    }

    /// What this image holds there is here.
    pub(super) fn block_read(&mut self, completion: Completion, io: &mut Uring) {
        let Completion {
            token: id,
            result,
            buffer,
            ..
        } = completion;
        let bytes = buffer.into_bytes();
        let Some(block) = self.resync.block(id) else {
            self.finish_block(id, io);
            return;
        };
        if usize::try_from(result) != Ok(bytes.len()) {
            let error = match result {
                0.. => io::Error::from(io::ErrorKind::UnexpectedEof),
                errno => io::Error::from_raw_os_error(-errno),
            };
            error!(sector = block.sectors.start, %error, "this image cannot be read there: the new backup cannot be synchronised");
            self.resync.begin(self.resync.number(), 0);
            self.resync.said_last();
            self.finish_block(id, io);
            return;
        }
        if block.differs(&bytes) {
            self.copy_block(id, bytes, io);
        } else {
            self.resync.finished(id, None);
            self.finish_block(id, io);
        }
    }

    /// Logs a block that differs; where the log has no room, it keeps its turn.
    fn copy_block(&mut self, id: u64, bytes: Vec<u8>, io: &mut Uring) {
        if let (Some(block), Some(replication)) = (self.resync.block(id), &mut self.replication) {
            let sector = block.sectors.start;
            let body = match bytes.iter().all(|byte| *byte == 0) {
                true => Body::Zeroes {
                    sector,
                    sectors: (block.sectors.end - sector) as u32,
                    unmap: true,
                },
                false => Body::Write {
                    sector,
                    payload: &bytes,
                },
            };
            match replication.append(&body) {
                Logged::At(lsn) => self.resync.finished(id, Some(lsn)),
                Logged::Unprotected => self.resync.finished(id, None),
                Logged::NotNow => {
                    self.waiting_blocks.push((id, bytes));
                    return;
                }
            }
        }
        self.finish_block(id, io);
    }

    /// A block's turn is over.
    fn finish_block(&mut self, id: u64, io: &mut Uring) {
        let mut startable = Vec::new();
        self.schedule.finish(id, &mut startable);
        for id in startable {
            self.start_job(id, io);
        }
    }
}
