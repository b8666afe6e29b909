//! The disk as a device of the loop.

use std::io;

use ft_client::events::Events;
use ft_protocol::{Body, Committed, Lsn, message::Digest};
use ft_vhost::{
    device::{Buffer, Completion, Device, Input, Life, Mirror, Part, Uring},
    exit::End,
    guest_side::{
        GuestSide,
        blk::{CONFIG_WRITEBACK_OFFSET, Kind},
    },
};
use nix::errno::Errno;
use serde_json::json;
use tracing::{error, info};

use super::{Disk, Done, INPUT_BYTES_MERGED, is_unsupported};
use crate::{
    replication::{Replication, Stage},
    resync,
    transfer::BOUNCE_BYTES_MAX,
};

impl Device for Disk {
    fn guest(&mut self) -> &mut dyn GuestSide {
        &mut self.guest
    }

    fn set_features(&mut self, features: u64) {
        self.cache.set_features(features);
    }

    fn resume(&mut self) {
        self.cache.resume();
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), String> {
        self.cache.set_config(offset, bytes)
    }

    fn attach(&mut self) -> Result<(), String> {
        self.image.attach()
    }

    fn detach(&mut self) {
        if let Err(error) = self.image.detach() {
            error!(%error, "the image cannot be made durable, and stays locked");
        }
    }

    fn resize(&mut self, bytes: Option<u64>) -> Result<Vec<u8>, String> {
        self.image.resize(bytes)?;
        self.guest.resize(self.image.sectors());
        Ok(self.config())
    }

    fn config(&mut self) -> Vec<u8> {
        let mut config = self.guest.config();
        config[CONFIG_WRITEBACK_OFFSET as usize] = u8::from(!self.cache.is_write_through());
        config
    }

    fn start(&mut self, life: Life, io: &mut Uring) -> Result<(), End> {
        self.life = life;
        if life == Life::Alone {
            self.guest.copy_nothing();
        }
        io.register(self.image.fd()).map_err(End::environment)
    }

    fn perform(&mut self, _marker: Option<Lsn>, io: &mut Uring) -> Result<(), End> {
        let mut requests = std::mem::take(&mut self.requests);
        self.guest.take_requests(&mut requests);
        for request in requests.drain(..) {
            self.take(request, io);
        }
        self.requests = requests;
        self.finish_ended(io)?;
        self.announce();
        Ok(())
    }

    fn complete(&mut self, completion: Completion, io: &mut Uring) -> Result<(), End> {
        if resync::is_block(completion.token) {
            self.block_read(completion, io);
            return Ok(());
        }
        let Completion {
            token: id,
            result,
            buffer,
            ..
        } = completion;
        let job = self.jobs.get_mut(&id).expect("the ring completes what was submitted");
        job.data.buffer = buffer;
        let is_zeroing = matches!(job.request.kind, Kind::WriteZeroes { .. }) && !job.by_hand;
        let is_allocation = is_zeroing || job.request.kind == Kind::Discard;
        let result = match u32::try_from(result) {
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
            // fallocate(2) has no flag for it, as writes have.
            Ok(_) if is_allocation && self.cache.is_write_through() && !job.settling => {
                job.settling = true;
                self.start_job(id, io);
                return Ok(());
            }
            Ok(_) if is_allocation || job.request.kind == Kind::Flush => Ok(()),
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image became shorter")),
            Ok(bytes) => {
                job.done += bytes as usize;
                if job.done < job.request.length as usize {
                    if let Buffer::Guest(buffer) = &mut job.data.buffer {
                        buffer.skip(bytes as usize);
                    }
                    self.start_job(id, io);
                    return Ok(());
                }
                Ok(())
            }
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                self.start_job(id, io);
                Ok(())
            }
            Err(error) if is_zeroing && is_unsupported(&error) => {
                job.by_hand = true;
                self.start_job(id, io);
                Ok(())
            }
            Err(error) if self.life == Life::Alone && self.starving.is_about(&error) => {
                self.starving.wait(id, job.request.sector, &error);
                Ok(())
            }
            result => {
                self.settle(id, result, io)?;
                self.finish_ended(io)?;
                self.announce();
                Ok(())
            }
        }
    }

    fn take_input(&mut self, _io: &mut Uring) -> Result<Option<Input>, End> {
        if self.life == Life::Alone {
            let waits = self.batches.iter().position(|batch| !batch.is_empty());
            return Ok(waits.map(|queue| Input {
                queue: queue as u16,
                payload: std::mem::replace(&mut self.batches[queue], self.buffers.take()),
            }));
        }
        let Some(Done {
            completion: mut payload,
            queue,
            ..
        }) = self.done.pop_front()
        else {
            return Ok(None);
        };
        while let Some(next) = self.done.front() {
            if next.queue != queue || payload.len() + next.completion.len() > INPUT_BYTES_MERGED {
                break;
            }
            payload.extend_from_slice(&next.completion);
            if let Some(next) = self.done.pop_front() {
                self.recycle(next.completion);
            }
        }
        Ok(Some(Input { queue, payload }))
    }

    fn recycle(&mut self, payload: Vec<u8>) {
        self.buffers.recycle(payload);
    }

    fn followed(&mut self) {
        let guest = &self.guest;
        self.passive.retain(|request| guest.is_outstanding(request.id));
        self.done.retain(|done| guest.is_outstanding(done.id));
    }

    fn go_live(&mut self, io: &mut Uring, events: &mut Events) -> Result<(), End> {
        self.life = Life::Live;
        self.followed();
        let count = self.guest.outstanding();
        for request in std::mem::take(&mut self.passive) {
            self.take(request, io);
        }
        info!(
            count,
            "requests without a delivered completion are issued or reported again"
        );
        events.emit("reissued", json!({ "count": count }));
        Ok(())
    }

    fn take_part(&mut self, part: Part) -> Result<(), End> {
        self.half.as_mut().map_or(Ok(()), |half| half.take(part))
    }

    fn mirror(&mut self, mirror: Mirror) -> Result<(), End> {
        self.replication = Some(Replication::new(mirror));
        Ok(())
    }

    fn shape(&self) -> Option<[u8; 32]> {
        Some(self.image.shape())
    }

    fn synchronise(&mut self, number: Option<u32>) {
        self.synchronise_with(number);
    }

    fn compare(&mut self, sector: u64, digests: &[Digest]) {
        self.answered(sector, digests);
    }

    fn digests(&mut self, sector: u64, sectors: u32) -> Result<Vec<Digest>, End> {
        self.image.digests(sector, sectors).map_err(End::Replica)
    }

    fn committed(&mut self, committed: Committed, io: &mut Uring) -> Result<Option<Lsn>, End> {
        while let Some(id) = self.replication.as_mut().and_then(|log| log.next_committed(committed)) {
            let job = self
                .jobs
                .get_mut(&id)
                .expect("a job stays until its entry is committed");
            job.stage = Stage::Free;
            if job.is_done {
                self.finish_job(id, Ok(()), io)?;
            }
        }
        self.unpark(io)?;
        self.announce();
        Ok(self.replication.as_ref().and_then(Replication::marker))
    }

    fn power_off(&mut self) {
        if let Some(replication) = &mut self.replication {
            replication.power_off();
        }
    }

    fn apply(&mut self, body: &Body<'_>) -> Result<(), End> {
        self.image.apply(body).map_err(End::Replica)
    }

    fn has_room(&self) -> bool {
        self.buffers.bounced < BOUNCE_BYTES_MAX
    }

    fn tick(&mut self, now_ns: u64, io: &mut Uring, events: &mut Events) -> Result<Option<u64>, End> {
        let look_ns = self.bring_up(now_ns, io, events);
        for id in self.starving.due(now_ns) {
            self.start_job(id, io);
        }
        Ok(self.starving.deadline_ns().into_iter().chain(look_ns).min())
    }

    fn give_up(&mut self, io: &mut Uring) -> Result<(), End> {
        let starving = self.starving.take();
        self.ended
            .extend(starving.into_iter().map(|id| (id, Some(Errno::ENOSPC))));
        self.finish_ended(io)
    }

    fn poll_ns_max(&self) -> u64 {
        self.policy.poll_ns_max
    }

    fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }
}
