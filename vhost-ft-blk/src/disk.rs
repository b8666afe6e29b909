//! What requests do.
//!
//! ```text
//!  request ─► [waits for overlapping ones] ─► io_uring ─► completion ─► input (alone: delivered at once; live: logged first)
//!  following: writes and flushes run, reads wait for their data from the log, completions wait for theirs
//!  go live:   what has no delivered completion is completed from here: reads start, what was done already is reported
//! ```

use std::{
    collections::{HashMap, VecDeque},
    io,
};

use ft_client::{crash, events::Events};
use ft_protocol::Lsn;
use ft_vhost::{
    device::{Completion, Device, Fallocate, Input, Life, Uring},
    exit::End,
    guest_side::{
        BOUNCE, GuestSide,
        blk::{
            BlkGuestSide, COMPLETION_HEADER_BYTES, CONFIG_WRITEBACK_OFFSET, FEATURE_CONFIG_WCE, FEATURE_FLUSH,
            Geometry, ID_BYTES, Kind, Request, SECTOR_BYTES, STATUS_IO_ERROR, STATUS_OK, completion_header,
        },
    },
};
use nix::libc;
use serde_json::json;
use tracing::{error, info, warn};

use crate::{
    image::Image,
    overlap::{Access, Schedule},
};

/// What GET_ID answers unless the operator says otherwise.
pub const SERIAL: &str = "ft-blk";
/// Zeroes written at once where the image cannot make them itself.
const ZEROES_BYTES: usize = 1 << 20;
/// Write data in bounce buffers beyond which no further kick is answered.
const BOUNCE_BYTES_MAX: usize = 32 << 20;
/// Completions are put together in one input up to this size.
const INPUT_BYTES_MERGED: usize = 64 << 10;
/// Buffers kept for reuse.
const SPARE_BUFFERS: usize = 64;

/// A request on its way to the image or back.
#[derive(Debug)]
struct Job {
    request: Request,
    /// Bytes done.
    done: usize,
    /// Zeroes are written out: the image cannot make them itself.
    by_hand: bool,
}

/// A completion the guest has not got yet.
#[derive(Debug)]
struct Done {
    id: u64,
    queue: u16,
    /// Header and data, as in a payload.
    completion: Vec<u8>,
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
    serial: String,
    write_through: bool,
    schedule: Schedule,
    jobs: HashMap<u64, Job>,
    bounce_bytes: usize,
    /// Following: requests whose result comes from the log.
    passive: VecDeque<Request>,
    done: VecDeque<Done>,
    requests: Vec<Request>,
    startable: Vec<u64>,
    spare: Vec<Vec<u8>>,
}

impl Disk {
    /// A disk on `image` that its driver sees as `geometry`; `serial` is cut to what the driver can be told.
    #[must_use]
    pub fn new(image: Image, geometry: Geometry, serial: &str) -> Self {
        Self {
            guest: BlkGuestSide::new(geometry),
            image,
            life: Life::Alone,
            serial: serial.into(),
            write_through: false,
            schedule: Schedule::default(),
            jobs: HashMap::new(),
            bounce_bytes: 0,
            passive: VecDeque::new(),
            done: VecDeque::new(),
            requests: Vec::new(),
            startable: Vec::new(),
            spare: Vec::new(),
        }
    }

    fn take(&mut self, request: Request, io: &mut Uring) {
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
                let serial = &self.serial.as_bytes()[..self.serial.len().min(ID_BYTES)];
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
        self.bounce_bytes += request.data.len();
        let job = Job {
            request,
            done: 0,
            by_hand: false,
        };
        self.jobs.insert(id, job);
        if self.schedule.arrive(id, access) {
            self.start_job(id, io);
        }
    }

    fn start_job(&mut self, id: u64, io: &mut Uring) {
        let Self { jobs, image, spare, .. } = self;
        let Job { request, done, by_hand } = jobs.get_mut(&id).expect("a startable request has a job");
        let left = request.length as usize - *done;
        let offset = request.sector * SECTOR_BYTES + *done as u64;
        match request.kind {
            Kind::Write => {
                crash::point("blk.write.before");
                let data = std::mem::take(&mut request.data);
                io.write(image.fd(), offset, data, *done, self.write_through, id);
            }
            Kind::Flush => {
                crash::point("blk.flush.before");
                io.datasync(image.fd(), id);
            }
            Kind::WriteZeroes { .. } if *by_hand => {
                crash::point("blk.write.before");
                let mut zeroes = std::mem::take(&mut request.data);
                zeroes.resize(left.min(ZEROES_BYTES), 0);
                io.write(image.fd(), offset, zeroes, 0, self.write_through, id);
            }
            Kind::WriteZeroes { unmap } => io.fallocate(image.fd(), zeroing(unmap), offset, left as u64, id),
            Kind::Discard => io.fallocate(image.fd(), Fallocate::PunchHole, offset, left as u64, id),
            _ => {
                let mut buffer = match *done {
                    0 => spare.pop().unwrap_or_default(),
                    _ => std::mem::take(&mut request.data),
                };
                buffer.resize(COMPLETION_HEADER_BYTES + request.length as usize, 0);
                io.read(image.fd(), offset, buffer, COMPLETION_HEADER_BYTES + *done, id);
            }
        }
    }

    /// A completion without a job.
    fn report(&mut self, id: u64, queue: u16, status: u8, data: &[u8]) {
        let mut completion = self.spare.pop().unwrap_or_default();
        completion.clear();
        completion.extend_from_slice(&completion_header(id, status, data.len() as u32));
        completion.extend_from_slice(data);
        self.done.push_back(Done { id, queue, completion });
    }

    fn finish_job(&mut self, id: u64, result: Result<(), io::Error>, io: &mut Uring) -> Result<(), End> {
        let Job { mut request, .. } = self.jobs.remove(&id).expect("it just completed");
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
            Kind::Write => {
                crash::point("blk.write.after");
                self.bounce_bytes -= request.length as usize;
                self.guest.recycle(std::mem::take(&mut request.data));
            }
            Kind::Flush => crash::point("blk.flush.after"),
            _ => {}
        }
        // The guest may have reset the device, or the log may have completed the request already.
        if self.guest.is_outstanding(id) {
            if kind == Kind::Read && status == STATUS_OK {
                let mut completion = std::mem::take(&mut request.data);
                completion[..COMPLETION_HEADER_BYTES].copy_from_slice(&completion_header(id, status, length));
                if !BOUNCE {
                    self.guest.write_ahead(id, &completion[COMPLETION_HEADER_BYTES..])?;
                }
                self.done.push_back(Done { id, queue, completion });
            } else {
                self.report(id, queue, status, &[]);
            }
        }
        self.recycle(request.data);
        let mut startable = std::mem::take(&mut self.startable);
        self.schedule.finish(id, &mut startable);
        for id in startable.drain(..) {
            self.start_job(id, io);
        }
        self.startable = startable;
        Ok(())
    }
}

impl Device for Disk {
    fn guest(&mut self) -> &mut dyn GuestSide {
        &mut self.guest
    }

    fn set_features(&mut self, features: u64) {
        self.write_through = features & (FEATURE_FLUSH | FEATURE_CONFIG_WCE) == 0;
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), String> {
        match (offset, bytes) {
            (CONFIG_WRITEBACK_OFFSET, [writeback]) if *writeback <= 1 => {
                self.write_through = *writeback == 0;
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
        let mut config = self.guest.config();
        config[CONFIG_WRITEBACK_OFFSET as usize] = u8::from(!self.write_through);
        Ok(config)
    }

    fn start(&mut self, life: Life, _io: &mut Uring) -> Result<(), End> {
        self.life = life;
        Ok(())
    }

    fn perform(&mut self, _marker: Option<Lsn>, io: &mut Uring) -> Result<(), End> {
        let mut requests = std::mem::take(&mut self.requests);
        self.guest.take_requests(&mut requests);
        for request in requests.drain(..) {
            self.take(request, io);
        }
        self.requests = requests;
        Ok(())
    }

    fn complete(&mut self, completion: Completion, io: &mut Uring) -> Result<(), End> {
        let Completion {
            token: id,
            result,
            buffer,
        } = completion;
        let job = self.jobs.get_mut(&id).expect("the ring completes what was submitted");
        job.request.data = buffer;
        let is_zeroing = matches!(job.request.kind, Kind::WriteZeroes { .. });
        let result = match u32::try_from(result) {
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
            Ok(_) if matches!(job.request.kind, Kind::Flush | Kind::Discard) => Ok(()),
            Ok(_) if is_zeroing && !job.by_hand => Ok(()),
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image became shorter")),
            Ok(bytes) => {
                job.done += bytes as usize;
                if job.done < job.request.length as usize {
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
            Err(error) if is_zeroing && !job.by_hand && is_unsupported(&error) => {
                job.by_hand = true;
                self.start_job(id, io);
                Ok(())
            }
            result => self.finish_job(id, result, io),
        }
    }

    fn take_input(&mut self, _io: &mut Uring) -> Result<Option<Input>, End> {
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
        if (1..ZEROES_BYTES).contains(&payload.capacity()) && self.spare.len() < SPARE_BUFFERS {
            self.spare.push(payload);
        }
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
        self.bounce_bytes < BOUNCE_BYTES_MAX
    }

    fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }
}
