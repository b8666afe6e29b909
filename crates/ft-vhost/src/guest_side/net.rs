//! The guest side of a network device: queue 0 receives, queue 1 transmits.
//!
//! ```text
//!  kick(1): chain ─► [Frame] in a bounce buffer, chain completed at once ─► take_frames ─► the daemon holds and sends it
//!  kick(0): buffers were added ─► frames that waited for some go to guest memory
//!  deliver: payload = frames ─► next receive chains, used ring; frame = u32 length, bytes
//! ```
//! No offload is offered, so the header before each frame says nothing: it is zero towards the guest and towards the TAP,
//! whatever the guest writes.

use std::{collections::VecDeque, sync::Arc};

use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_net::VIRTIO_NET_F_MAC,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use xxhash_rust::xxh3::Xxh3;

use super::{
    GuestSide, Outcome, QueueSetup, RingError,
    dirty::GuestMemoryMmap,
    ring::{Ring, Segment, copy_from_guest, copy_to_guest, skip_bytes, total_bytes},
};

/// Index of the receive queue.
pub const RECEIVE: u16 = 0;
/// Index of the transmit queue.
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

const QUEUES: u16 = 2;
const CONFIG_BYTES: usize = 12;
/// `num_buffers` = 1, all else zero.
const RECEIVE_HEADER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

const _: () = assert!(LENGTH_BYTES + FRAME_BYTES_MAX <= ft_protocol::limits::PAYLOAD_BYTES_MAX);

/// A frame the guest sent: a zero header of [`HEADER_BYTES`], then the frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(Vec<u8>);

impl Frame {
    /// A frame of the device itself.
    #[must_use]
    pub fn new(frame: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes.extend_from_slice(frame);
        Self(bytes)
    }

    /// Header and frame, as a TAP with a header of 12 bytes takes them.
    #[must_use]
    pub fn with_header(&self) -> &[u8] {
        &self.0
    }

    /// The frame alone.
    #[must_use]
    pub fn ethernet(&self) -> &[u8] {
        &self.0[HEADER_BYTES..]
    }
}

/// Frames that did not reach their destination, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Received before the driver had set up the receive queue.
    pub no_driver: u64,
    /// Received while the guest had no buffers, and too many waited already.
    pub no_buffers: u64,
    /// Received, and longer than the guest's buffer.
    pub buffer_too_small: u64,
    /// Transmitted, but not between the shortest and the longest frame.
    pub impossible_length: u64,
}

/// The guest side of a network device.
#[derive(Debug)]
pub struct NetGuestSide {
    mac: [u8; 6],
    memory: Option<Arc<GuestMemoryMmap>>,
    rings: [Ring; QUEUES as usize],
    frames: Vec<Frame>,
    waiting: VecDeque<Vec<u8>>,
    dropped: Dropped,
    segments: Vec<Segment>,
    spare: Vec<Vec<u8>>,
}

impl NetGuestSide {
    /// A device with this MAC address.
    #[must_use]
    pub fn new(mac: [u8; 6]) -> Self {
        Self {
            mac,
            memory: None,
            rings: std::array::from_fn(|index| Ring::new(index as u16)),
            frames: Vec::new(),
            waiting: VecDeque::new(),
            dropped: Dropped::default(),
            segments: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// Moves the frames of the kicks so far to `into`, in order.
    pub fn take_frames(&mut self, into: &mut Vec<Frame>) {
        into.append(&mut self.frames);
    }

    /// Takes back a frame that is no longer needed.
    pub fn recycle(&mut self, frame: Frame) {
        self.recycle_buffer(frame.0);
    }

    fn recycle_buffer(&mut self, mut buffer: Vec<u8>) {
        if self.spare.len() < WAITING_FRAMES_MAX {
            buffer.clear();
            self.spare.push(buffer);
        }
    }

    /// What was dropped so far.
    #[must_use]
    pub fn dropped(&self) -> Dropped {
        self.dropped
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

    /// Puts a frame into the next receive chain; `false` if there is none.
    fn put(&mut self, memory: &GuestMemoryMmap, frame: &[u8]) -> Result<bool, RingError> {
        let ring = &mut self.rings[usize::from(RECEIVE)];
        let Some(head) = ring.pop(memory, &mut self.segments)? else {
            return Ok(false);
        };
        let segments = &mut self.segments;
        segments.retain(|segment| segment.writable);
        let bytes = HEADER_BYTES + frame.len();
        if total_bytes(segments) < bytes as u64 {
            // The buffer stays for a frame that fits.
            ring.push_back(head);
            self.dropped.buffer_too_small += 1;
            return Ok(true);
        }
        copy_to_guest(memory, segments, &RECEIVE_HEADER)?;
        skip_bytes(segments, HEADER_BYTES as u64);
        copy_to_guest(memory, segments, frame)?;
        ring.complete(memory, head, bytes as u32)?;
        Ok(true)
    }

    fn put_or_wait(&mut self, memory: &GuestMemoryMmap, frame: &[u8]) -> Result<(), RingError> {
        if !self.waiting.is_empty() || !self.put(memory, frame)? {
            if self.waiting.len() == WAITING_FRAMES_MAX {
                let oldest = self.waiting.pop_front().unwrap_or_default();
                self.recycle_buffer(oldest);
                self.dropped.no_buffers += 1;
            }
            let mut buffer = self.spare.pop().unwrap_or_default();
            buffer.extend_from_slice(frame);
            self.waiting.push_back(buffer);
        }
        Ok(())
    }

    /// Frames that wait go to the buffers there are, as many as the ring has; gives how many went.
    fn serve_waiting(&mut self, memory: &GuestMemoryMmap) -> Result<u64, RingError> {
        let mut delivered = 0;
        loop {
            while let Some(frame) = self.waiting.pop_front() {
                if !self.put(memory, &frame)? {
                    self.waiting.push_front(frame);
                    break;
                }
                delivered += 1;
                self.recycle_buffer(frame);
            }
            // Nothing waits: buffers that are added now are no news. Else the next buffer is, or was added meanwhile.
            let more = self.rings[usize::from(RECEIVE)].want_kick(memory)? && !self.waiting.is_empty();
            if !more {
                return Ok(delivered);
            }
        }
    }

    fn kick_receive(&mut self, memory: &GuestMemoryMmap) -> Result<Outcome, RingError> {
        let delivered = self.serve_waiting(memory)?;
        Ok(Outcome {
            interrupt: self.rings[usize::from(RECEIVE)].take_interrupt(memory)?,
            digest: super::fold(u64::from(RECEIVE), delivered),
            ..Outcome::default()
        })
    }

    fn kick_transmit(&mut self, memory: &GuestMemoryMmap) -> Result<Outcome, RingError> {
        let mut digest = Xxh3::new();
        let ring = &mut self.rings[usize::from(TRANSMIT)];
        // A running guest could add for ever, and is asked again; a stopped one has at most a ring full.
        let mut left = ring.size();
        let more = loop {
            while left != 0 {
                let Some(head) = ring.pop(memory, &mut self.segments)? else {
                    break;
                };
                left -= 1;
                let segments = &mut self.segments;
                segments.retain(|segment| !segment.writable);
                skip_bytes(segments, HEADER_BYTES as u64);
                let bytes = total_bytes(segments);
                digest.update(&bytes.to_le_bytes());
                if (FRAME_BYTES_MIN as u64..=FRAME_BYTES_MAX as u64).contains(&bytes) {
                    let mut frame = self.spare.pop().unwrap_or_default();
                    frame.resize(HEADER_BYTES, 0);
                    copy_from_guest(memory, segments, bytes as usize, &mut frame)?;
                    digest.update(&frame[HEADER_BYTES..]);
                    self.frames.push(Frame(frame));
                } else {
                    self.dropped.impossible_length += 1;
                }
                ring.complete(memory, head, 0)?;
            }
            let more = ring.want_kick(memory)?;
            if !more || left == 0 {
                break more;
            }
        };
        Ok(Outcome {
            interrupt: ring.take_interrupt(memory)?,
            digest: digest.digest(),
            more,
            ..Outcome::default()
        })
    }
}

/// Reads the frames of a payload.
///
/// # Errors
/// In the place of the first frame that is malformed.
pub fn frames(payload: &[u8]) -> impl Iterator<Item = Result<&[u8], RingError>> {
    let mut rest = payload;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let at = payload.len() - rest.len();
        let split = rest.split_first_chunk::<LENGTH_BYTES>().and_then(|(length, behind)| {
            let length = u32::from_le_bytes(*length) as usize;
            (length <= FRAME_BYTES_MAX).then_some(())?;
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
        QUEUES
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_MAC,
        ]
        .into_iter()
        .fold(0, |bits, bit| bits | 1 << bit)
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        config[..6].copy_from_slice(&self.mac);
        // One pair of queues.
        config[8] = 1;
        config
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
        if index == RECEIVE {
            self.waiting.clear();
        }
        self.rings.get_mut(usize::from(index)).map_or(0, Ring::stop)
    }

    fn is_configured(&self, index: u16) -> bool {
        self.rings.get(usize::from(index)).is_some_and(Ring::is_configured)
    }

    fn kick(&mut self, queue: u16) -> Result<Outcome, RingError> {
        if queue >= QUEUES {
            return Err(RingError::NoQueue(queue));
        }
        if !self.is_configured(queue) {
            return Ok(Outcome::default());
        }
        let memory = Arc::clone(self.memory.as_ref().ok_or(RingError::NoMemory)?);
        match queue {
            RECEIVE => self.kick_receive(&memory),
            _ => self.kick_transmit(&memory),
        }
    }

    fn deliver(&mut self, sequence: u64, _queue: u16, payload: &[u8]) -> Result<Outcome, RingError> {
        let mut interrupt = false;
        if self.is_configured(RECEIVE) {
            let memory = Arc::clone(self.memory.as_ref().ok_or(RingError::NoMemory)?);
            for frame in frames(payload) {
                self.put_or_wait(&memory, frame?)?;
            }
            if !self.waiting.is_empty() {
                self.serve_waiting(&memory)?;
            }
            interrupt = self.rings[usize::from(RECEIVE)].take_interrupt(&memory)?;
        } else {
            self.dropped.no_driver += frames(payload).count() as u64;
        }
        Ok(Outcome {
            interrupt,
            digest: super::fold(sequence, xxhash_rust::xxh3::xxh3_64(payload)),
            ..Outcome::default()
        })
    }

    fn discard_outputs(&mut self) {
        for frame in std::mem::take(&mut self.frames) {
            self.recycle(frame);
        }
    }
}
