//! What requests do.
//!
//! ```text
//!  request ─► [waits for overlapping ones] ─► io_uring ─► completion ─► input (alone: delivered at once; live: logged first)
//!  following: writes and flushes run, reads wait for their data from the log, completions wait for theirs
//!  go live:   what has no delivered completion is completed from here: reads start, what was done already is reported
//! ```

use std::{collections::VecDeque, io};

use ft_client::{crash, events::Events};
use ft_protocol::Lsn;
use ft_vhost::{
    device::{Buffer, Completion, Device, Fallocate, Input, Life, Uring},
    exit::End,
    guest_side::{
        BOUNCE, GuestSide,
        blk::{
            BlkGuestSide, ById, COMPLETION_HEADER_BYTES, CONFIG_WRITEBACK_OFFSET, FEATURE_CONFIG_WCE, FEATURE_FLUSH,
            Geometry, ID_BYTES, Kind, Request, SECTOR_BYTES, STATUS_IO_ERROR, STATUS_OK, completion_header,
        },
    },
};
use nix::{errno::Errno, libc};
use serde_json::json;
use tracing::{error, info, warn};

use crate::{
    image::Image,
    overlap::{Access, Schedule},
    transfer::{BOUNCE_BYTES_MAX, Buffers, Data, Prepared},
};

/// What GET_ID answers unless the operator says otherwise.
pub const SERIAL: &str = "ft-blk";
/// Zeroes written at once where the image cannot make them itself.
const ZEROES_BYTES: usize = 1 << 20;
/// Completions are put together in one input up to this size.
const INPUT_BYTES_MERGED: usize = 64 << 10;
/// How often a write that found no space is tried again.
const RETRY_NS: u64 = 1_000_000_000;

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
}

/// A completion the guest has not got yet.
#[derive(Debug)]
struct Done {
    id: u64,
    queue: u16,
    /// Header and data, as in a payload.
    completion: Vec<u8>,
}

/// What happens to a write that finds no space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnEnospc {
    /// The guest gets an error.
    Report,
    /// It waits, and is tried again every second.
    Stop,
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

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// The device.
#[derive(Debug)]
pub struct Disk {
    guest: BlkGuestSide,
    image: Image,
    life: Life,
    policy: Policy,
    write_through: bool,
    /// The driver may have chosen write-through, and nobody here knows.
    unknown_mode: bool,
    /// The driver can choose.
    chooses: bool,
    schedule: Schedule,
    jobs: ById<Job>,
    buffers: Buffers,
    /// Jobs that could not start: how each ends.
    ended: Vec<(u64, Option<Errno>)>,
    /// Jobs that wait for a buffer.
    hungry: VecDeque<u64>,
    /// Jobs that wait for space on the image's file system.
    starving: Vec<u64>,
    retry_at_ns: u64,
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
            write_through: policy.write_through,
            unknown_mode: false,
            chooses: false,
            policy,
            schedule: Schedule::default(),
            jobs: ById::default(),
            buffers: Buffers::default(),
            ended: Vec::new(),
            hungry: VecDeque::new(),
            starving: Vec::new(),
            retry_at_ns: 0,
            passive: VecDeque::new(),
            done: VecDeque::new(),
            batches: (0..geometry.queues).map(|_| Vec::new()).collect(),
            requests: Vec::new(),
            startable: Vec::new(),
        }
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
        };
        self.jobs.insert(id, job);
        if self.schedule.arrive(id, access) {
            self.start_job(id, io);
        }
    }

    fn start_job(&mut self, id: u64, io: &mut Uring) {
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
                crash::point("blk.flush.before");
                io.datasync(image.fd(), id);
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
            io.write(image.fd(), offset, zeroes, from, part, self.write_through, id);
            return;
        }
        if matches!(job.data.buffer, Buffer::None) {
            let prepared = match self.life {
                Life::Alone => {
                    let bounces = image.may_be_read_after_us();
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
        let (fd, offset) = (image.fd(), job.request.sector * SECTOR_BYTES + done as u64);
        let from = job.data.from + done;
        if kind == Kind::Write {
            crash::point("blk.write.before");
        }
        match (kind, std::mem::take(&mut job.data.buffer)) {
            (Kind::Write, Buffer::Guest(buffer)) => io.write_guest(fd, offset, buffer, self.write_through, id),
            (_, Buffer::Guest(buffer)) => io.read_guest(fd, offset, buffer, id),
            (Kind::Write, buffer) => {
                io.write(
                    fd,
                    offset,
                    buffer.into_bytes(),
                    from,
                    length - done,
                    self.write_through,
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
            self.finish_job(id, result, io)?;
        }
        Ok(())
    }
}

impl Device for Disk {
    fn guest(&mut self) -> &mut dyn GuestSide {
        &mut self.guest
    }

    fn set_features(&mut self, features: u64) {
        // A driver that can choose the mode finds the one that was chosen last; one that can neither choose nor flush relies on us.
        if features & FEATURE_CONFIG_WCE == 0 {
            self.write_through = self.policy.write_through || features & FEATURE_FLUSH == 0;
        } else if self.unknown_mode {
            self.write_through = true;
        }
        self.chooses = features & FEATURE_CONFIG_WCE != 0;
    }

    fn resume(&mut self) {
        // A driver that chose write-through flushes nothing; one that did not loses time and no data.
        self.unknown_mode = true;
        self.write_through |= self.chooses;
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), String> {
        match (offset, bytes) {
            (CONFIG_WRITEBACK_OFFSET, [writeback]) if *writeback <= 1 => {
                self.write_through = *writeback == 0;
                self.unknown_mode = false;
                Ok(())
            }
            _ => Err(format!(
                "only the cache mode can be set, not {} bytes at {offset} of the configuration space",
                bytes.len()
            )),
        }
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
        config[CONFIG_WRITEBACK_OFFSET as usize] = u8::from(!self.write_through);
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
        self.finish_ended(io)
    }

    fn complete(&mut self, completion: Completion, io: &mut Uring) -> Result<(), End> {
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
            Ok(_) if is_allocation && self.write_through && !job.settling => {
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
            Err(error) if self.life == Life::Alone && self.policy.on_enospc == OnEnospc::Stop && is_full(&error) => {
                if self.starving.is_empty() {
                    let sector = job.request.sector;
                    warn!(sector, %error, "a write waits: it is tried again every second. Make space for the image");
                }
                self.starving.push(id);
                Ok(())
            }
            result => {
                self.finish_job(id, result, io)?;
                self.finish_ended(io)
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

    fn has_room(&self) -> bool {
        self.buffers.bounced < BOUNCE_BYTES_MAX
    }

    fn tick(&mut self, now_ns: u64, io: &mut Uring, _events: &mut Events) -> Result<Option<u64>, End> {
        if self.starving.is_empty() {
            self.retry_at_ns = now_ns + RETRY_NS;
            return Ok(None);
        }
        if now_ns >= self.retry_at_ns {
            self.retry_at_ns = now_ns + RETRY_NS;
            for id in std::mem::take(&mut self.starving) {
                self.start_job(id, io);
            }
        }
        Ok(Some(self.retry_at_ns))
    }

    fn give_up(&mut self, io: &mut Uring) -> Result<(), End> {
        let starving = std::mem::take(&mut self.starving).into_iter();
        self.ended.extend(starving.map(|id| (id, Some(Errno::ENOSPC))));
        self.finish_ended(io)
    }

    fn poll_ns_max(&self) -> u64 {
        self.policy.poll_ns_max
    }

    fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }
}
