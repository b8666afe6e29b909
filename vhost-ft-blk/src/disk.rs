//! What requests do.
//!
//! ```text
//!  request ─► [waits for overlapping ones] ─► io_uring ─► completion ─► input (alone: delivered at once; live: logged first)
//!  mirrored:  as alone; what changes the image is logged, and completes when that is committed
//!  following: writes and flushes run, reads wait for their data from the log, completions wait for theirs
//!  go live:   what has no delivered completion is completed from here: reads start, what was done already is reported
//! ```

mod device;
mod mirrored;
mod resync;

use std::{collections::VecDeque, io};

use ft_client::crash;
use ft_vhost::{
    device::{Buffer, Fallocate, Life, Uring},
    exit::End,
    guest_side::{
        BOUNCE,
        blk::{
            BlkGuestSide, ById, COMPLETION_HEADER_BYTES, Geometry, ID_BYTES, Kind, Request, SECTOR_BYTES,
            STATUS_IO_ERROR, STATUS_OK, completion_header,
        },
    },
};
use nix::{errno::Errno, libc};
use tracing::warn;

pub use crate::space::OnEnospc;
use crate::{
    cache::CacheMode,
    image::Image,
    overlap::{Access, Schedule},
    replication::{Replication, Stage},
    resync::{self as blocks, Resync},
    space::Starving,
    standing::Half,
    transfer::{Buffers, Data, Prepared},
};

/// What GET_ID answers unless the operator says otherwise.
pub const SERIAL: &str = "ft-blk";
/// Zeroes written at once where the image cannot make them itself.
const ZEROES_BYTES: usize = 1 << 20;
/// Completions are put together in one input up to this size.
const INPUT_BYTES_MERGED: usize = 64 << 10;

/// A request on its way to the image or back.
#[derive(Debug)]
struct Job {
    request: Request,
    data: Data,
    /// Bytes done.
    done: usize,
    /// Zeroes are written out: the image cannot make them itself.
    by_hand: bool,
    /// What the image was told to make is there, and is being made durable.
    settling: bool,
    /// How far the log is with it.
    stage: Stage,
    /// It is done here.
    is_done: bool,
}

/// A completion the guest has not got yet.
#[derive(Debug)]
struct Done {
    id: u64,
    queue: u16,
    /// Header and data, as in a payload.
    completion: Vec<u8>,
}

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct Policy {
    /// What GET_ID answers, cut to what the driver can be told.
    pub serial: String,
    /// Every write is durable before the guest is told that it is done, unless the driver chooses otherwise.
    pub write_through: bool,
    /// Writes without space.
    pub on_enospc: OnEnospc,
    /// How long, at most, to look for more work before sleeping.
    pub poll_ns_max: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            serial: SERIAL.into(),
            write_through: false,
            on_enospc: OnEnospc::Report,
            poll_ns_max: 0,
        }
    }
}

/// How zeroes are made: with a hole where the driver allows it.
fn zeroing(unmap: bool) -> Fallocate {
    match unmap {
        true => Fallocate::PunchHole,
        false => Fallocate::ZeroRange,
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

/// The device.
#[derive(Debug)]
pub struct Disk {
    guest: BlkGuestSide,
    image: Image,
    life: Life,
    policy: Policy,
    cache: CacheMode,
    schedule: Schedule,
    jobs: ById<Job>,
    buffers: Buffers,
    /// Jobs that could not start: how each ends.
    ended: Vec<(u64, Option<Errno>)>,
    /// Jobs that wait for a buffer.
    hungry: VecDeque<u64>,
    starving: Starving,
    /// Engine `device`, primary.
    replication: Option<Replication>,
    /// Engine `device`, live side.
    resync: Resync,
    /// Blocks that differ and found no room in the log.
    waiting_blocks: Vec<(u64, Vec<u8>)>,
    /// Engine `device`: the image as one of two.
    half: Option<Half>,
    /// Following: requests whose result comes from the log.
    passive: VecDeque<Request>,
    done: VecDeque<Done>,
    /// Alone: the completions of each queue, as one payload.
    batches: Vec<Vec<u8>>,
    requests: Vec<Request>,
    startable: Vec<u64>,
}

impl Disk {
    /// A disk on `image` that its driver sees as `geometry`.
    #[must_use]
    pub fn new(image: Image, geometry: Geometry, policy: Policy) -> Self {
        Self {
            guest: BlkGuestSide::new(geometry),
            image,
            life: Life::Alone,
            cache: CacheMode::new(policy.write_through),
            starving: Starving::new(policy.on_enospc),
            replication: None,
            resync: Resync::default(),
            waiting_blocks: Vec::new(),
            half: None,
            policy,
            schedule: Schedule::default(),
            jobs: ById::default(),
            buffers: Buffers::default(),
            ended: Vec::new(),
            hungry: VecDeque::new(),
            passive: VecDeque::new(),
            done: VecDeque::new(),
            batches: (0..geometry.queues).map(|_| Vec::new()).collect(),
            requests: Vec::new(),
            startable: Vec::new(),
        }
    }

    /// The same, whose image is one of two: engine `device`.
    #[must_use]
    pub fn as_half(self, half: Option<Half>) -> Self {
        Self { half, ..self }
    }

    fn take(&mut self, mut request: Request, io: &mut Uring) {
        let sectors = || request.sector..request.sector + u64::from(request.length) / SECTOR_BYTES;
        let access = match request.kind {
            Kind::Write | Kind::Discard | Kind::WriteZeroes { .. } => Access::Write(sectors()),
            Kind::Flush => Access::Flush,
            _ if self.life == Life::Follows => {
                self.passive.push_back(request);
                return;
            }
            Kind::Read => Access::Read(sectors()),
            Kind::GetId => {
                let mut id = [0; ID_BYTES];
                let serial = self.policy.serial.as_bytes();
                let serial = &serial[..serial.len().min(ID_BYTES)];
                id[..serial.len()].copy_from_slice(serial);
                let length = id.len().min(request.length as usize);
                self.report(request.id, request.queue, STATUS_OK, &id[..length]);
                return;
            }
            Kind::Refused(status) => {
                self.report(request.id, request.queue, status, &[]);
                return;
            }
        };
        let id = request.id;
        let mut data = Data::default();
        if request.kind == Kind::Write && self.life != Life::Alone {
            data.bounced = request.data.len();
            self.buffers.bounced += data.bounced;
            data.buffer = Buffer::Bytes(std::mem::take(&mut request.data));
        }
        let job = Job {
            request,
            data,
            done: 0,
            by_hand: false,
            settling: false,
            stage: Stage::default(),
            is_done: false,
        };
        self.jobs.insert(id, job);
        if self.schedule.arrive(id, access) {
            self.start_job(id, io);
        }
    }

    fn start_job(&mut self, id: u64, io: &mut Uring) {
        if blocks::is_block(id) {
            self.read_block(id, io);
            return;
        }
        let Self { jobs, image, .. } = self;
        let Job {
            request,
            done,
            by_hand,
            settling,
            ..
        } = jobs.get_mut(&id).expect("a startable request has a job");
        let left = (request.length as usize - *done) as u64;
        let offset = request.sector * SECTOR_BYTES + *done as u64;
        match request.kind {
            _ if *settling => io.datasync(image.fd(), id),
            Kind::Flush => {
                if self.is_logged(id) {
                    crash::point("blk.flush.before");
                    io.datasync(self.image.fd(), id);
                }
            }
            Kind::WriteZeroes { unmap } if !*by_hand => io.fallocate(image.fd(), zeroing(unmap), offset, left, id),
            Kind::Discard => io.fallocate(image.fd(), Fallocate::PunchHole, offset, left, id),
            _ => self.transfer(id, io),
        }
    }

    /// Reads or writes what is left of a job.
    fn transfer(&mut self, id: u64, io: &mut Uring) {
        let Self {
            jobs,
            image,
            buffers,
            guest,
            ..
        } = self;
        let job = jobs.get_mut(&id).expect("a startable request has a job");
        let kind = job.request.kind;
        let (length, done) = (job.request.length as usize, job.done);
        if let Kind::WriteZeroes { .. } = kind {
            let part = (length - done).min(ZEROES_BYTES);
            let (mut zeroes, from) = buffers.aligned(part, image.alignment());
            zeroes.resize(from + part, 0);
            crash::point("blk.write.before");
            let offset = job.request.sector * SECTOR_BYTES + done as u64;
            io.write(
                image.fd(),
                offset,
                zeroes,
                from,
                part,
                self.cache.is_write_through(),
                id,
            );
            return;
        }
        if matches!(job.data.buffer, Buffer::None) {
            let prepared = match self.life {
                Life::Alone => {
                    let copied = kind == Kind::Write && self.replication.is_some();
                    let bounces = copied || image.may_be_read_after_us();
                    buffers.direct(guest, id, length, kind == Kind::Write, image.alignment(), bounces)
                }
                _ => {
                    let mut bytes = buffers.take();
                    bytes.resize(COMPLETION_HEADER_BYTES + length, 0);
                    Ok(Prepared::Ready(Data {
                        buffer: Buffer::Bytes(bytes),
                        from: COMPLETION_HEADER_BYTES,
                        bounced: 0,
                    }))
                }
            };
            match prepared {
                Ok(Prepared::Ready(data)) => job.data = data,
                Ok(Prepared::Later) => {
                    self.hungry.push_back(id);
                    return;
                }
                Ok(Prepared::Forgotten) => {
                    self.ended.push((id, None));
                    return;
                }
                Ok(Prepared::Failed(errno)) => {
                    self.ended.push((id, Some(errno)));
                    return;
                }
                Err(_) => {
                    self.ended.push((id, Some(Errno::EFAULT)));
                    return;
                }
            }
        }
        if kind == Kind::Write && !self.is_logged(id) {
            return;
        }
        let Self { jobs, image, .. } = self;
        let job = jobs.get_mut(&id).expect("a startable request has a job");
        let (fd, offset) = (image.fd(), job.request.sector * SECTOR_BYTES + done as u64);
        let from = job.data.from + done;
        if kind == Kind::Write {
            crash::point("blk.write.before");
        }
        match (kind, std::mem::take(&mut job.data.buffer)) {
            (Kind::Write, Buffer::Guest(buffer)) => {
                io.write_guest(fd, offset, buffer, self.cache.is_write_through(), id)
            }
            (_, Buffer::Guest(buffer)) => io.read_guest(fd, offset, buffer, id),
            (Kind::Write, buffer) => {
                io.write(
                    fd,
                    offset,
                    buffer.into_bytes(),
                    from,
                    length - done,
                    self.cache.is_write_through(),
                    id,
                );
            }
            (_, buffer) => io.read(fd, offset, buffer.into_bytes(), from, length - done, id),
        }
    }

    /// A completion without a job, or one whose data is in guest memory.
    fn report(&mut self, id: u64, queue: u16, status: u8, data: &[u8]) {
        let header = completion_header(id, status, data.len() as u32);
        if self.life == Life::Alone {
            let batch = &mut self.batches[usize::from(queue)];
            batch.extend_from_slice(&header);
            batch.extend_from_slice(data);
            return;
        }
        let mut completion = self.buffers.take();
        completion.extend_from_slice(&header);
        completion.extend_from_slice(data);
        self.done.push_back(Done { id, queue, completion });
    }

    fn finish_job(&mut self, id: u64, result: Result<(), io::Error>, io: &mut Uring) -> Result<(), End> {
        let Job { request, mut data, .. } = self.jobs.remove(&id).expect("it just completed");
        let Request {
            kind,
            queue,
            sector,
            length,
            ..
        } = request;
        let status = match result {
            Ok(()) => STATUS_OK,
            // Where the image cannot give space back a discard is advice that is not taken, here and on the other host.
            Err(error) if kind == Kind::Discard && is_unsupported(&error) => STATUS_OK,
            Err(error) if self.life == Life::Follows => {
                return Err(End::Replica(format!(
                    "{kind:?} of {length} bytes at sector {sector} failed here and not on the primary: the images are not \
                     equal any more: {error}"
                )));
            }
            Err(error) => {
                warn!(?kind, sector, length, %error, "a request failed; the guest is told");
                STATUS_IO_ERROR
            }
        };
        match kind {
            Kind::Write => crash::point("blk.write.after"),
            Kind::Flush => crash::point("blk.flush.after"),
            _ => {}
        }
        // The guest may have reset the device, or the log may have completed the request already.
        if self.guest.is_outstanding(id) {
            let brings = kind == Kind::Read && status == STATUS_OK;
            match std::mem::take(&mut data.buffer) {
                Buffer::Guest(buffer) if brings => {
                    self.guest.arrived(id);
                    data.buffer = Buffer::Guest(buffer);
                    self.report(id, queue, status, &[]);
                }
                Buffer::Bytes(bytes) if brings && self.life == Life::Alone => {
                    let brought = self.guest.write_ahead(id, &bytes[data.from..][..length as usize]);
                    data.buffer = Buffer::Bytes(bytes);
                    let status = brought.map_or_else(
                        |error| {
                            warn!(sector, length, %error, "what was read has no place any more; the guest is told");
                            STATUS_IO_ERROR
                        },
                        |()| status,
                    );
                    self.report(id, queue, status, &[]);
                }
                Buffer::Bytes(mut completion) if brings => {
                    completion[..COMPLETION_HEADER_BYTES].copy_from_slice(&completion_header(id, status, length));
                    if !BOUNCE {
                        self.guest.write_ahead(id, &completion[COMPLETION_HEADER_BYTES..])?;
                    }
                    self.done.push_back(Done { id, queue, completion });
                }
                other => {
                    data.buffer = other;
                    self.report(id, queue, status, &[]);
                }
            }
        }
        self.buffers.release(data);
        let mut startable = std::mem::take(&mut self.startable);
        self.schedule.finish(id, &mut startable);
        startable.extend(self.hungry.pop_front());
        for id in startable.drain(..) {
            self.start_job(id, io);
        }
        self.startable = startable;
        Ok(())
    }

    /// Ends the jobs that could not start, and those that wait for the end of them.
    fn finish_ended(&mut self, io: &mut Uring) -> Result<(), End> {
        while let Some((id, errno)) = self.ended.pop() {
            let result = errno.map_or(Ok(()), |errno| Err(errno.into()));
            self.settle(id, result, io)?;
        }
        Ok(())
    }
}
