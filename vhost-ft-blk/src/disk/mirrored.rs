//! Engine `device`, primary: what the log has to do with a job. See [`crate::replication`].

use std::io;

use ft_vhost::{
    device::{Buffer, Uring},
    exit::End,
    guest_side::blk::{Kind, Request},
};

use super::{Disk, is_unsupported};
use crate::replication::{Replication, Stage};

impl Disk {
    /// Logs a write or flush that is about to start, once. `false`: not yet, and it must not start.
    pub(super) fn is_logged(&mut self, id: u64) -> bool {
        let (Some(replication), Some(job)) = (&mut self.replication, self.jobs.get_mut(&id)) else {
            return true;
        };
        if job.stage == Stage::Unlogged {
            let data = match &job.data.buffer {
                Buffer::Bytes(bytes) => &bytes[job.data.from..],
                _ => &[],
            };
            let length = (job.request.length as usize).min(data.len());
            job.stage = replication.log(id, &job.request, &data[..length]);
        }
        job.stage != Stage::Unlogged
    }

    /// A job is done here, or failed. Its guest is told when the other host cannot lose it any more.
    pub(super) fn settle(&mut self, id: u64, result: Result<(), io::Error>, io: &mut Uring) -> Result<(), End> {
        let job = self.jobs.get_mut(&id).expect("it just completed");
        let Request {
            kind, sector, length, ..
        } = job.request;
        let Some(replication) = &self.replication else {
            return self.finish_job(id, result, io);
        };
        match (Replication::logs_first(kind), &result) {
            (None, _) => return self.finish_job(id, result, io),
            // Nothing was changed, and nothing will be.
            (Some(true), Err(_)) if job.stage == Stage::Unlogged => return self.finish_job(id, result, io),
            (_, Err(error)) if kind == Kind::Discard && is_unsupported(error) => {
                return self.finish_job(id, result, io);
            }
            (_, Err(error)) if replication.has_backup() => {
                return Err(End::Replica(format!(
                    "{kind:?} of {length} bytes at sector {sector} failed here, and the backup has it: this side ends, so that \
                     the backup takes over: {error}"
                )));
            }
            (_, Err(_)) => return self.finish_job(id, result, io),
            (_, Ok(())) => job.is_done = true,
        }
        // Zeroes are logged now; what was logged before may be committed by now.
        if self.is_logged(id) && self.jobs[&id].stage == Stage::Free {
            return self.finish_job(id, Ok(()), io);
        }
        Ok(())
    }

    /// Tries again what found no room in the log.
    pub(super) fn unpark(&mut self, io: &mut Uring) -> Result<(), End> {
        let parked = self.replication.as_ref().map_or(0, Replication::parked);
        for _ in 0..parked {
            let Some(replication) = &mut self.replication else {
                break;
            };
            let Some(id) = replication.unpark() else { break };
            if !self.jobs[&id].is_done {
                self.start_job(id, io);
            } else if self.is_logged(id) && self.jobs[&id].stage == Stage::Free {
                self.finish_job(id, Ok(()), io)?;
            }
        }
        self.finish_ended(io)
    }

    pub(super) fn announce(&mut self) {
        if let Some(replication) = &mut self.replication {
            replication.announce();
        }
    }
}
