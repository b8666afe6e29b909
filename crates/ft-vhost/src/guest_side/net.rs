//! The guest side of a network device: queue 0 receives, queue 1 transmits.
//!
//! ```text
//!  kick(1): chain ─► [Frame] in a bounce buffer, chain completed at once ─► take_frames ─► the daemon holds and sends it
//!  kick(0): buffers were added ─► frames that waited for some go to guest memory
//!  deliver: payload = frames ─► next receive chains, used ring; frame = u32 length, bytes
//! ```
//! Of a plain device no offload is offered, so the header before each frame says nothing: it is zero towards the guest and towards the
//! TAP, whatever the guest writes. A free one ([`Shape::free`]: nobody replays it) has what the TAP has; then a payload's frames come with
//! their headers, and what a guest writes to the header of a frame is [judged](header::judge).

use std::{collections::VecDeque, sync::Arc};

use ft_client::counters::{Counters, Lost, OfQueue};
use tracing::debug;
use virtio_bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_net::VIRTIO_NET_F_MRG_RXBUF};
use xxhash_rust::xxh3::Xxh3;

use super::{
    GuestSide, Outcome, QueueSetup, RingError,
    dirty::GuestMemoryMmap,
    ring::{Ring, Segment, copy_from_guest, copy_to_guest, skip_bytes, total_bytes},
};

pub mod header;
mod shape;

pub use shape::{MTUS, PAIRS_MAX, Shape};

/// Index of the first receive queue; that of pair n is 2n.
pub const RECEIVE: u16 = 0;
/// Index of the first transmit queue; that of pair n is 2n + 1.
pub const TRANSMIT: u16 = 1;
/// Bytes of `virtio_net_hdr_v1`, which stands before every frame in a ring and on the TAP.
pub const HEADER_BYTES: usize = 12;
/// Longest frame: what an interface with the largest MTU sends, with a VLAN tag.
pub const FRAME_BYTES_MAX: usize = 65535 + 18;
/// Shortest frame: an Ethernet header.
pub const FRAME_BYTES_MIN: usize = 14;
/// Frames that wait for receive buffers; beyond it the oldest is dropped.
pub const WAITING_FRAMES_MAX: usize = 256;
/// Bytes before each frame of a payload.
pub const LENGTH_BYTES: usize = 4;

/// Where the header says how many buffers a frame takes.
const BUFFERS: std::ops::Range<usize> = 10..12;
/// Bytes of the header for a driver of before the specification, without mergeable buffers.
const LEGACY_HEADER_BYTES: usize = 10;
/// What a free device takes from a ring before its frames are sent: the processor's cache holds that much.
const BATCH_FRAMES_MAX: u16 = 64;
const BATCH_BYTES_MAX: u64 = 256 << 10;
/// `num_buffers` = 1, all else zero.
const RECEIVE_HEADER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

const _: () = assert!(LENGTH_BYTES + FRAME_BYTES_MAX <= ft_protocol::limits::PAYLOAD_BYTES_MAX);

/// A frame the guest sent: a header of [`HEADER_BYTES`] for the TAP, then the frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    bytes: Vec<u8>,
    pair: u16,
}

impl Frame {
    /// A frame of the device itself.
    #[must_use]
    pub fn new(frame: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes.extend_from_slice(frame);
        Self { bytes, pair: 0 }
    }

    /// Header and frame, as a TAP with a header of 12 bytes takes them.
    #[must_use]
    pub fn with_header(&self) -> &[u8] {
        &self.bytes
    }

    /// The frame alone.
    #[must_use]
    pub fn ethernet(&self) -> &[u8] {
        &self.bytes[HEADER_BYTES..]
    }

    /// The pair of queues it came from.
    #[must_use]
    pub fn pair(&self) -> usize {
        self.pair.into()
    }
}

/// Frames of one call, and their bytes: told to the counters when it is over.
#[derive(Clone, Copy, Debug, Default)]
struct Passed {
    frames: u64,
    bytes: u64,
}

impl Passed {
    fn note(&mut self, frame_bytes: usize) {
        self.frames += 1;
        self.bytes += frame_bytes as u64;
    }
}

/// The guest side of a network device.
#[derive(Debug)]
pub struct NetGuestSide {
    shape: Shape,
    /// What the driver took of what a free device offers.
    features: u64,
    memory: Option<Arc<GuestMemoryMmap>>,
    rings: Vec<Ring>,
    frames: Vec<Frame>,
    /// Of each pair.
    waiting: Vec<VecDeque<Vec<u8>>>,
    counters: Counters,
    passed: Passed,
    segments: Vec<Segment>,
    /// Buffers for one frame, and the chains they are of.
    gathered: Vec<Segment>,
    chains: Vec<(u16, u32)>,
    spare: Vec<Vec<u8>>,
}

impl NetGuestSide {
    /// A plain device with this MAC address.
    #[must_use]
    pub fn new(mac: [u8; 6]) -> Self {
        Self::with_shape(Shape::plain(mac))
    }

    /// A device of this shape.
    #[must_use]
    pub fn with_shape(shape: Shape) -> Self {
        Self {
            shape,
            features: 0,
            memory: None,
            rings: (0..shape.queues()).map(Ring::new).collect(),
            frames: Vec::new(),
            waiting: (0..shape.pairs).map(|_| VecDeque::new()).collect(),
            counters: Counters::own(shape.queues()),
            passed: Passed::default(),
            segments: Vec::new(),
            gathered: Vec::new(),
            chains: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// What the device is.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The driver took these features.
    pub fn set_features(&mut self, features: u64) {
        self.features = features & self.shape.features();
    }

    fn took(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Bytes of the header in the driver's buffers.
    fn header_bytes(&self) -> usize {
        let old = self.shape.free && !self.took(VIRTIO_F_VERSION_1) && !self.took(VIRTIO_NET_F_MRG_RXBUF);
        if old { LEGACY_HEADER_BYTES } else { HEADER_BYTES }
    }

    /// Whether frames of this pair wait for buffers of the guest.
    #[must_use]
    pub fn waits(&self, pair: usize) -> bool {
        self.waiting.get(pair).is_some_and(|waiting| !waiting.is_empty())
    }

    /// Moves the frames of the kicks so far to `into`, in order.
    pub fn take_frames(&mut self, into: &mut Vec<Frame>) {
        into.append(&mut self.frames);
    }

    /// Takes back a frame that is no longer needed.
    pub fn recycle(&mut self, frame: Frame) {
        self.recycle_buffer(frame.bytes);
    }

    fn recycle_buffer(&mut self, mut buffer: Vec<u8>) {
        if self.spare.len() < WAITING_FRAMES_MAX {
            buffer.clear();
            self.spare.push(buffer);
        }
    }

    /// What is counted of the queues.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Counts there from here on: with the other threads of the device, or where ft-log shows it.
    pub fn count_in(&mut self, counters: Counters) {
        self.counters = counters;
    }

    /// A call for `queue` is over.
    fn count(&mut self, queue: u16) {
        let Passed { frames, bytes } = std::mem::take(&mut self.passed);
        let ring = self.rings[usize::from(queue)].take_tally();
        for (what, count) in [
            (OfQueue::Frames, frames),
            (OfQueue::Bytes, bytes),
            (OfQueue::UsedBatches, ring.batches),
            (OfQueue::UsedBuffers, ring.buffers),
            (OfQueue::InterruptsRaised, ring.interrupts),
            (OfQueue::InterruptsSuppressed, ring.suppressed),
        ] {
            if count != 0 {
                self.counters.add(queue, what, count);
            }
        }
    }

    /// Negative control (see [`super::BOUNCE`]): the first frame of a payload reaches the guest's next buffer now, ahead of its delivery.
    ///
    /// # Errors
    /// As [`GuestSide::deliver`].
    pub fn write_ahead(&mut self, payload: &[u8]) -> Result<(), RingError> {
        let (Some(memory), Some(Ok(frame))) = (self.memory.clone(), frames(payload).next()) else {
            return Ok(());
        };
        let ring = &mut self.rings[usize::from(RECEIVE)];
        if let Some(head) = ring.pop(&memory, &mut self.segments)? {
            ring.push_back(head);
            skip_bytes(&mut self.segments, HEADER_BYTES as u64);
            copy_to_guest(&memory, &self.segments, frame)?;
        }
        Ok(())
    }

    /// Puts a frame, which a free device has with its header, into the next receive chains; `false` if there are not enough.
    fn put(&mut self, memory: &GuestMemoryMmap, pair: usize, packet: &[u8]) -> Result<bool, RingError> {
        let header_bytes = self.header_bytes();
        let (mut header, frame) = match packet.split_first_chunk() {
            Some((header, frame)) if self.shape.free => (*header, frame),
            _ => (RECEIVE_HEADER, packet),
        };
        let bytes = header_bytes + frame.len();
        let merges = self.took(VIRTIO_NET_F_MRG_RXBUF);
        if !self.gather(memory, pair, bytes as u64, merges)? {
            return Ok(false);
        }
        let ring = &mut self.rings[2 * pair];
        if total_bytes(&self.gathered) < bytes as u64 {
            // The buffers stay for a frame that fits.
            self.chains.iter().rev().for_each(|(head, _)| ring.push_back(*head));
            self.counters.lose(2 * pair as u16, Lost::TooLarge, 1);
            return Ok(true);
        }
        header[BUFFERS].copy_from_slice(&(self.chains.len() as u16).to_le_bytes());
        copy_to_guest(memory, &self.gathered, &header[..header_bytes])?;
        skip_bytes(&mut self.gathered, header_bytes as u64);
        copy_to_guest(memory, &self.gathered, frame)?;
        let mut left = bytes as u32;
        for (_, length) in &mut self.chains {
            *length = left.min(*length);
            left -= *length;
        }
        ring.complete_together(memory, &self.chains)?;
        self.passed.note(frame.len());
        Ok(true)
    }

    /// Takes receive chains for so many bytes: one, or `many`. `false` if there are not enough by now, and the driver was asked to tell of
    /// more. What was taken is too little if no more can come.
    fn gather(&mut self, memory: &GuestMemoryMmap, pair: usize, bytes: u64, many: bool) -> Result<bool, RingError> {
        let ring = &mut self.rings[2 * pair];
        self.gathered.clear();
        self.chains.clear();
        let mut room = 0;
        loop {
            let Some(head) = ring.pop(memory, &mut self.segments)? else {
                // A plain device asks when it has served what waits.
                if self.shape.free && ring.want_kick(memory)? {
                    continue;
                }
                self.chains.iter().rev().for_each(|(head, _)| ring.push_back(*head));
                return Ok(false);
            };
            self.segments.retain(|segment| segment.writable);
            let length = total_bytes(&self.segments);
            self.gathered.append(&mut self.segments);
            self.chains.push((head, u32::try_from(length).unwrap_or(u32::MAX)));
            room += length;
            if room >= bytes || !many || self.chains.len() == usize::from(ring.size()) {
                return Ok(true);
            }
        }
    }

    fn put_or_wait(&mut self, memory: &GuestMemoryMmap, pair: usize, frame: &[u8]) -> Result<(), RingError> {
        if self.waits(pair) || !self.put(memory, pair, frame)? {
            if self.waiting[pair].len() == WAITING_FRAMES_MAX {
                let oldest = self.waiting[pair].pop_front().unwrap_or_default();
                self.recycle_buffer(oldest);
                self.counters.lose(2 * pair as u16, Lost::NoBuffers, 1);
            }
            let mut buffer = self.spare.pop().unwrap_or_default();
            buffer.extend_from_slice(frame);
            self.waiting[pair].push_back(buffer);
        }
        Ok(())
    }

    /// Frames that wait go to the buffers there are, as many as the ring has; gives how many went.
    fn serve_waiting(&mut self, memory: &GuestMemoryMmap, pair: usize) -> Result<u64, RingError> {
        let mut delivered = 0;
        loop {
            while let Some(frame) = self.waiting[pair].pop_front() {
                if !self.put(memory, pair, &frame)? {
                    self.waiting[pair].push_front(frame);
                    break;
                }
                delivered += 1;
                self.recycle_buffer(frame);
            }
            let ring = &mut self.rings[2 * pair];
            if self.shape.free {
                // Nothing waits: buffers that are added now are no news. Else the driver has been asked.
                if self.waiting[pair].is_empty() {
                    ring.want_no_kick(memory)?;
                }
                return Ok(delivered);
            }
            // The same, asked here.
            let more = ring.want_kick(memory)? && !self.waiting[pair].is_empty();
            if !more {
                return Ok(delivered);
            }
        }
    }

    /// Gives the guest the frames of a payload, or has them wait; whether it is to be interrupted.
    fn give(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: u16,
        payload: &[u8],
        bytes_max: usize,
    ) -> Result<bool, RingError> {
        let pair = usize::from(queue / 2);
        for frame in records(payload, bytes_max) {
            self.put_or_wait(memory, pair, frame?)?;
        }
        if self.waits(pair) {
            self.serve_waiting(memory, pair)?;
        }
        self.rings[usize::from(queue)].take_interrupt(memory)
    }

    fn kick_receive(&mut self, memory: &GuestMemoryMmap, queue: u16) -> Result<Outcome, RingError> {
        let delivered = self.serve_waiting(memory, usize::from(queue / 2))?;
        Ok(Outcome {
            interrupt: self.rings[usize::from(queue)].take_interrupt(memory)?,
            digest: super::fold(u64::from(queue), delivered),
            ..Outcome::default()
        })
    }

    /// Takes the frame in `segments`, if it is one.
    fn take_frame(&mut self, memory: &GuestMemoryMmap, queue: u16, digest: &mut Xxh3) -> Result<(), RingError> {
        let header_bytes = self.header_bytes();
        self.segments.retain(|segment| !segment.writable);
        let mut buffer = self.spare.pop().unwrap_or_default();
        if self.shape.free && total_bytes(&self.segments) > header_bytes as u64 {
            copy_from_guest(memory, &self.segments, header_bytes, &mut buffer)?;
        }
        buffer.resize(HEADER_BYTES, 0);
        skip_bytes(&mut self.segments, header_bytes as u64);
        let bytes = total_bytes(&self.segments);
        digest.update(&bytes.to_le_bytes());
        if !(FRAME_BYTES_MIN as u64..=FRAME_BYTES_MAX as u64).contains(&bytes) {
            let too_short = bytes < FRAME_BYTES_MIN as u64;
            let why = if too_short { Lost::TooShort } else { Lost::TooLong };
            self.counters.lose(queue, why, 1);
            self.recycle_buffer(buffer);
            return Ok(());
        }
        copy_from_guest(memory, &self.segments, bytes as usize, &mut buffer)?;
        if let (true, Some((header, frame))) = (self.shape.free, buffer.split_first_chunk_mut()) {
            match header::judge(header, frame, self.features) {
                Ok(judged) => *header = judged,
                Err(lie) => {
                    debug!(queue, %lie, "a frame is not sent");
                    self.counters.lose(queue, lie.into(), 1);
                    self.recycle_buffer(buffer);
                    return Ok(());
                }
            }
        } else {
            digest.update(&buffer[HEADER_BYTES..]);
        }
        self.passed.note(bytes as usize);
        self.frames.push(Frame {
            bytes: buffer,
            pair: queue / 2,
        });
        Ok(())
    }

    fn kick_transmit(&mut self, memory: &GuestMemoryMmap, queue: u16) -> Result<Outcome, RingError> {
        let mut digest = Xxh3::new();
        let index = usize::from(queue);
        // A running guest could add for ever, and is asked again; a stopped one has at most a ring full.
        let (mut left, bytes_max) = match self.shape.free {
            true => (BATCH_FRAMES_MAX, BATCH_BYTES_MAX),
            false => (self.rings[index].size(), u64::MAX),
        };
        let (mut bytes, mut found) = (0, false);
        let more = loop {
            while left != 0 && bytes < bytes_max {
                let Some(head) = self.rings[index].pop(memory, &mut self.segments)? else {
                    break;
                };
                left -= 1;
                found = true;
                bytes += total_bytes(&self.segments);
                self.take_frame(memory, queue, &mut digest)?;
                self.rings[index].complete(memory, head, 0)?;
            }
            let full = left == 0 || bytes >= bytes_max;
            if full && self.shape.free {
                // Looked at again before the driver is asked for anything.
                break true;
            }
            let more = self.rings[index].want_kick(memory)?;
            if !more || full {
                break more;
            }
        };
        Ok(Outcome {
            interrupt: self.rings[index].take_interrupt(memory)?,
            digest: digest.digest(),
            more,
            found,
        })
    }
}

/// Reads the frames of a plain device's payload.
///
/// # Errors
/// In the place of the first frame that is malformed.
pub fn frames(payload: &[u8]) -> impl Iterator<Item = Result<&[u8], RingError>> {
    records(payload, FRAME_BYTES_MAX)
}

fn records(payload: &[u8], bytes_max: usize) -> impl Iterator<Item = Result<&[u8], RingError>> {
    let mut rest = payload;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let at = payload.len() - rest.len();
        let split = rest.split_first_chunk::<LENGTH_BYTES>().and_then(|(length, behind)| {
            let length = u32::from_le_bytes(*length) as usize;
            (length <= bytes_max).then_some(())?;
            behind.split_at_checked(length)
        });
        let Some((frame, behind)) = split else {
            rest = &[];
            return Some(Err(RingError::Payload(at)));
        };
        rest = behind;
        Some(Ok(frame))
    })
}

impl GuestSide for NetGuestSide {
    fn queue_count(&self) -> u16 {
        self.shape.queues()
    }

    fn features(&self) -> u64 {
        self.shape.features()
    }

    fn config(&self) -> Vec<u8> {
        self.shape.config()
    }

    fn set_memory(&mut self, memory: GuestMemoryMmap) {
        self.memory = Some(Arc::new(memory));
    }

    fn configure_queue(&mut self, index: u16, setup: &QueueSetup) -> Result<(), RingError> {
        let memory = self.memory.as_ref().ok_or(RingError::NoMemory)?;
        self.rings
            .get_mut(usize::from(index))
            .ok_or(RingError::NoQueue(index))?
            .configure(memory, setup)
    }

    fn stop_queue(&mut self, index: u16) -> u16 {
        if let (true, Some(waiting)) = (index.is_multiple_of(2), self.waiting.get_mut(usize::from(index / 2)))
            && !waiting.is_empty()
        {
            self.counters.lose(index, Lost::Stopped, waiting.len() as u64);
            waiting.clear();
        }
        self.rings.get_mut(usize::from(index)).map_or(0, Ring::stop)
    }

    fn is_configured(&self, index: u16) -> bool {
        self.rings.get(usize::from(index)).is_some_and(Ring::is_configured)
    }

    fn kick(&mut self, queue: u16) -> Result<Outcome, RingError> {
        if queue >= self.queue_count() {
            return Err(RingError::NoQueue(queue));
        }
        if !self.is_configured(queue) {
            return Ok(Outcome::default());
        }
        let memory = Arc::clone(self.memory.as_ref().ok_or(RingError::NoMemory)?);
        let outcome = match queue.is_multiple_of(2) {
            true => self.kick_receive(&memory, queue),
            false => self.kick_transmit(&memory, queue),
        };
        self.count(queue);
        outcome
    }

    fn deliver(&mut self, sequence: u64, queue: u16, payload: &[u8]) -> Result<Outcome, RingError> {
        // A plain device has one queue that receives, whatever the log says.
        let queue = if self.shape.free { queue } else { RECEIVE };
        if queue >= self.queue_count() || !queue.is_multiple_of(2) {
            return Err(RingError::NoQueue(queue));
        }
        let bytes_max = FRAME_BYTES_MAX + if self.shape.free { HEADER_BYTES } else { 0 };
        let mut interrupt = false;
        if self.is_configured(queue) {
            let memory = Arc::clone(self.memory.as_ref().ok_or(RingError::NoMemory)?);
            let given = self.give(&memory, queue, payload, bytes_max);
            self.count(queue);
            interrupt = given?;
        } else {
            let frames = records(payload, bytes_max).filter(Result::is_ok).count();
            self.counters.lose(queue, Lost::NoDriver, frames as u64);
        }
        let digest = match self.shape.free {
            true => 0,
            false => super::fold(sequence, xxhash_rust::xxh3::xxh3_64(payload)),
        };
        Ok(Outcome {
            interrupt,
            digest,
            ..Outcome::default()
        })
    }

    fn discard_outputs(&mut self) {
        for frame in std::mem::take(&mut self.frames) {
            self.recycle(frame);
        }
    }
}
