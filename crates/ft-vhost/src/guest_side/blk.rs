//! The guest side of a block device.
//!
//! ```text
//!  kick:    chain ─► [Request], write data in its bounce buffer ─► take_requests ─► the daemon performs it
//!  deliver: payload = completions ─► data to guest memory, status byte, used ring
//!           completion = u64 id, u8 status, u8[3] 0, u32 data length, data
//! ```
//! Requests are numbered densely from 0 over the life of the device, also past a reset: a completion of a request that a reset
//! forgot is told from one that never was.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::Arc,
};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, bitmap::Bitmap};
use xxhash_rust::xxh3::Xxh3;

use super::{
    GuestSide, Outcome, QueueSetup, RingError,
    dirty::GuestMemoryMmap,
    inflight::InflightRegion,
    ring::{Ring, Segment, copy_from_guest, copy_to_guest, skip_bytes, total_bytes},
};

mod geometry;
mod payload;

pub use payload::{COMPLETION_HEADER_BYTES, Completion, completion_header, completions};

pub use geometry::{CONFIG_WRITEBACK_OFFSET, FEATURE_CONFIG_WCE, FEATURE_FLUSH, Geometry, QUEUES_MAX};

/// Bytes of a sector, as the specification counts them.
pub const SECTOR_BYTES: u64 = 512;
/// Most data of one request that goes through a bounce buffer.
pub const REQUEST_BYTES_MAX: usize = (geometry::SEGMENTS_MAX * geometry::SEGMENT_BYTES_MAX) as usize;
/// Bytes of the identity string.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Status of a request that was performed.
pub const STATUS_OK: u8 = VIRTIO_BLK_S_OK as u8;
/// Status of a request that failed, or is malformed.
pub const STATUS_IO_ERROR: u8 = VIRTIO_BLK_S_IOERR as u8;
/// Status of a request the device does not know.
pub const STATUS_UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;

const REQUEST_HEADER_BYTES: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, sectors, flags.
const EXTENT_BYTES: usize = 16;
/// The one flag of an extent: zeroes may be made by unmapping.
const EXTENT_UNMAP: u32 = 1;

const _: () = assert!(REQUEST_BYTES_MAX + COMPLETION_HEADER_BYTES <= ft_protocol::limits::PAYLOAD_BYTES_MAX);

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Sectors to the guest.
    Read,
    /// Sectors from the guest.
    Write,
    /// What was written before must last.
    Flush,
    /// The content of sectors is of no more use.
    Discard,
    /// Sectors become zero; `unmap`: their space may be given back.
    WriteZeroes {
        /// The driver allows a hole.
        unmap: bool,
    },
    /// The identity string.
    GetId,
    /// Anything that cannot be performed: complete it with this status.
    Refused(u8),
}

/// What the daemon is to perform.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// Number of the request.
    pub id: u64,
    /// What is asked.
    pub kind: Kind,
    /// Queue it came by.
    pub queue: u16,
    /// First sector it is about.
    pub sector: u64,
    /// Bytes it is about: data to the guest (read, identity) or from it (write), or of the disk (discard, zeroes).
    pub length: u32,
    /// Bounce buffer of a write; empty otherwise, and where the data stays in guest memory.
    pub data: Vec<u8>,
}

/// Requests by their number: dense, and chosen by nobody outside.
pub type ById<T> = HashMap<u64, T, BuildHasherDefault<IdHasher>>;

/// Spreads dense numbers.
#[derive(Debug, Default)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("only numbers are hashed");
    }

    fn write_u64(&mut self, id: u64) {
        // The odd number nearest to 2^64 divided by the golden ratio.
        self.0 = id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// What the guest waits for.
#[derive(Debug)]
struct Outstanding {
    queue: u16,
    head: u16,
    status_address: u64,
    /// Where the data of a read goes; without bounce buffers, where that of a write comes from too.
    data: Vec<Segment>,
    /// Bytes that are there already.
    arrived: Option<u32>,
}

/// The guest side of a block device.
#[derive(Debug)]
pub struct BlkGuestSide {
    geometry: Geometry,
    memory: Option<Arc<GuestMemoryMmap>>,
    rings: Vec<Ring>,
    /// Data goes between guest memory and the image; no digests. Not for a guest that is to have an equal.
    zero_copy: bool,
    outstanding: ById<Outstanding>,
    next_id: u64,
    /// Requests below it may have been forgotten by a reset.
    forgotten_below: u64,
    requests: Vec<Request>,
    segments: Vec<Segment>,
    spare_segments: Vec<Vec<Segment>>,
    spare_data: Vec<Vec<u8>>,
}

impl BlkGuestSide {
    /// A disk of this geometry.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            memory: None,
            rings: (0..geometry.queues).map(Ring::new).collect(),
            zero_copy: false,
            outstanding: ById::default(),
            next_id: 0,
            forgotten_below: 0,
            requests: Vec::new(),
            segments: Vec::new(),
            spare_segments: Vec::new(),
            spare_data: Vec::new(),
        }
    }

    /// The disk became larger or smaller: requests that come from now on are judged by it.
    pub fn resize(&mut self, capacity_sectors: u64) {
        self.geometry.capacity_sectors = capacity_sectors;
    }

    /// Moves the requests of the kicks so far to `into`, in the order of their numbers.
    pub fn take_requests(&mut self, into: &mut Vec<Request>) {
        into.append(&mut self.requests);
    }

    /// Takes back a bounce buffer that is no longer needed.
    pub fn recycle(&mut self, mut data: Vec<u8>) {
        if data.capacity() != 0 && self.spare_data.len() < 64 {
            data.clear();
            self.spare_data.push(data);
        }
    }

    /// Whether the guest still waits for request `id`.
    #[must_use]
    pub fn is_outstanding(&self, id: u64) -> bool {
        self.outstanding.contains_key(&id)
    }

    /// Requests the guest waits for.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// From here on data goes directly between guest memory and the image, whenever the device performs a request. For a guest
    /// that nobody protects: its memory changes at any time, and there are no digests.
    pub fn copy_nothing(&mut self) {
        self.zero_copy = true;
    }

    /// The data of a request in guest memory, if the guest still waits for it. Its ranges were guest memory when it was taken.
    #[must_use]
    pub fn data(&self, id: u64) -> Option<(Arc<GuestMemoryMmap>, &[Segment])> {
        let data = &self.outstanding.get(&id)?.data;
        Some((Arc::clone(self.memory.as_ref()?), data))
    }

    /// The data of a read is in guest memory: the device wrote it there itself.
    pub fn arrived(&mut self, id: u64) {
        let (Some(memory), Some(waiting)) = (&self.memory, self.outstanding.get_mut(&id)) else {
            return;
        };
        for segment in &waiting.data {
            let slices = memory.get_slices(GuestAddress(segment.address), segment.length as usize);
            for slice in slices.flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
        waiting.arrived = Some(total_bytes(&waiting.data) as u32);
    }

    /// The data of a read reaches guest memory now, ahead of its delivery: because nobody protects the guest, or as a negative
    /// control (see [`super::BOUNCE`]).
    ///
    /// # Errors
    /// A range that is no longer guest memory.
    pub fn write_ahead(&mut self, id: u64, data: &[u8]) -> Result<(), RingError> {
        if let (Some(memory), Some(waiting)) = (&self.memory, self.outstanding.get_mut(&id)) {
            let written = copy_to_guest(memory, &waiting.data, data)?;
            waiting.arrived = self.zero_copy.then_some(written as u32);
        }
        Ok(())
    }

    /// What a write is to write, from guest memory, for a buffer of one's own; nothing if the guest no longer waits.
    ///
    /// # Errors
    /// A range that is no longer guest memory.
    pub fn read_out(&self, id: u64, into: &mut Vec<u8>) -> Result<(), RingError> {
        match self.data(id) {
            Some((memory, data)) => copy_from_guest(&memory, data, total_bytes(data) as usize, into),
            None => Ok(()),
        }
    }

    /// Makes requests of the chains that are available; `true` if there were some.
    fn take_chains(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: u16,
        mut digest: Option<&mut Xxh3>,
    ) -> Result<bool, RingError> {
        let mut some = false;
        while let Some(head) = self.rings[usize::from(queue)].pop(memory, &mut self.segments)? {
            self.take_chain(memory, queue, head, digest.as_deref_mut())?;
            some = true;
        }
        Ok(some)
    }

    /// Makes a request of the chain in `self.segments`.
    fn take_chain(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: u16,
        head: u16,
        mut digest: Option<&mut Xxh3>,
    ) -> Result<(), RingError> {
        let mut seen = |bytes: &[u8]| {
            if let Some(digest) = &mut digest {
                digest.update(bytes);
            }
        };
        let segments = &mut self.segments;
        let split = segments.partition_point(|segment| !segment.writable);
        let too_short = |what| RingError::TooShort { head, what };
        // The last writable byte is the status.
        let last = segments[split..].last_mut().ok_or(too_short("the status"))?;
        last.length -= 1;
        let status_address = last.address + u64::from(last.length);

        let mut header = [0; REQUEST_HEADER_BYTES];
        let readable_bytes = total_bytes(&segments[..split]);
        let whole = readable_bytes >= REQUEST_HEADER_BYTES as u64;
        let mut spare = self.spare_data.pop().unwrap_or_default();
        if whole {
            copy_from_guest(memory, &segments[..split], REQUEST_HEADER_BYTES, &mut spare)?;
            header.copy_from_slice(&spare);
            spare.clear();
        }
        let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
        let mut sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        seen(&header);

        let mut data = self.spare_segments.pop().unwrap_or_default();
        data.clear();
        let (out_bytes, in_bytes) = (
            readable_bytes.saturating_sub(REQUEST_HEADER_BYTES as u64),
            total_bytes(&segments[split..]),
        );
        let mut extent_bytes = 0;
        let kind = match kind {
            _ if !whole => Kind::Refused(STATUS_IO_ERROR),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if out_bytes == EXTENT_BYTES as u64 => {
                segments.truncate(split);
                skip_bytes(segments, REQUEST_HEADER_BYTES as u64);
                copy_from_guest(memory, segments, EXTENT_BYTES, &mut spare)?;
                seen(&spare);
                let judged = self.judge_extent(kind, &spare);
                spare.clear();
                match judged {
                    Ok((kind, start, bytes)) => {
                        (sector, extent_bytes) = (start, bytes);
                        kind
                    }
                    Err(status) => Kind::Refused(status),
                }
            }
            _ => self.judge(kind, sector, out_bytes, in_bytes),
        };
        let segments = &mut self.segments;
        let length = match kind {
            Kind::Read | Kind::GetId => {
                data.extend(segments[split..].iter().filter(|segment| segment.length != 0));
                in_bytes
            }
            Kind::Write => {
                segments.truncate(split);
                skip_bytes(segments, REQUEST_HEADER_BYTES as u64);
                if self.zero_copy {
                    data.extend_from_slice(segments);
                } else {
                    copy_from_guest(memory, segments, out_bytes as usize, &mut spare)?;
                    seen(&spare);
                }
                out_bytes
            }
            Kind::Discard | Kind::WriteZeroes { .. } => extent_bytes,
            Kind::Flush | Kind::Refused(_) => 0,
        } as u32;
        seen(&length.to_le_bytes());
        let id = self.next_id;
        self.next_id += 1;
        let outstanding = Outstanding {
            queue,
            head,
            status_address,
            data,
            arrived: None,
        };
        self.outstanding.insert(id, outstanding);
        self.requests.push(Request {
            id,
            kind,
            queue,
            sector,
            length,
            data: spare,
        });
        Ok(())
    }

    /// What a discard or write-zeroes with this extent is: kind, first sector, bytes; or the status it fails with.
    fn judge_extent(&self, kind: u32, extent: &[u8]) -> Result<(Kind, u64, u64), u8> {
        let (Some(sector), Some(tail)) = (extent.first_chunk(), extent.last_chunk::<8>()) else {
            return Err(STATUS_IO_ERROR);
        };
        let sector = u64::from_le_bytes(*sector);
        let [count, flags] = [&tail[..4], &tail[4..]].map(|word| u32::from_le_bytes(word.try_into().expect("4 bytes")));
        let geometry = &self.geometry;
        let (kind, allowed_flags, offered) = match kind {
            VIRTIO_BLK_T_DISCARD => (Kind::Discard, 0, geometry.discards()),
            _ => {
                let unmap = flags & EXTENT_UNMAP != 0;
                (Kind::WriteZeroes { unmap }, EXTENT_UNMAP, geometry.discards())
            }
        };
        // Unknown flags, and those of another command, must be refused as unsupported (VIRTIO 1.2 §5.2.6.2).
        if !offered || flags & !allowed_flags != 0 {
            return Err(STATUS_UNSUPPORTED);
        }
        let within = count != 0
            && count <= geometry::EXTENT_SECTORS_MAX
            && sector
                .checked_add(count.into())
                .is_some_and(|end| end <= geometry.capacity_sectors);
        if !within {
            return Err(STATUS_IO_ERROR);
        }
        Ok((kind, sector, u64::from(count) * SECTOR_BYTES))
    }

    /// What a request with this header and this much room is.
    fn judge(&self, kind: u32, sector: u64, out_bytes: u64, in_bytes: u64) -> Kind {
        let refused = Kind::Refused(STATUS_IO_ERROR);
        let fits = |bytes: u64| {
            bytes != 0
                && bytes.is_multiple_of(SECTOR_BYTES)
                && bytes <= self.geometry.request_bytes_max()
                && sector
                    .checked_add(bytes / SECTOR_BYTES)
                    .is_some_and(|end| end <= self.geometry.capacity_sectors)
        };
        match kind {
            VIRTIO_BLK_T_IN if fits(in_bytes) => Kind::Read,
            VIRTIO_BLK_T_OUT if fits(out_bytes) && !self.geometry.read_only => Kind::Write,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID if (1..=ID_BYTES as u64).contains(&in_bytes) => Kind::GetId,
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_GET_ID => refused,
            _ => Kind::Refused(STATUS_UNSUPPORTED),
        }
    }

    /// Completes one request of `queue`, and forgets it.
    fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: u16,
        id: u64,
        status: u8,
        data: &[u8],
    ) -> Result<(), RingError> {
        let mut request = match self.outstanding.remove(&id) {
            Some(request) if request.queue == queue => request,
            None if id < self.forgotten_below => return Ok(()),
            other => {
                self.outstanding.extend(other.map(|request| (id, request)));
                return Err(RingError::UnknownRequest(id));
            }
        };
        let written = match request.arrived {
            Some(bytes) => bytes as usize,
            None => copy_to_guest(memory, &request.data, data)?,
        };
        memory
            .write_obj(status, GuestAddress(request.status_address))
            .map_err(|_| RingError::OutsideMemory {
                what: "the status",
                address: request.status_address,
                length: 1,
            })?;
        self.rings[usize::from(request.queue)].complete(memory, request.head, written as u32 + 1)?;
        request.data.clear();
        self.spare_segments.push(request.data);
        Ok(())
    }
}

impl GuestSide for BlkGuestSide {
    fn queue_count(&self) -> u16 {
        self.geometry.queues
    }

    fn features(&self) -> u64 {
        self.geometry.features()
    }

    fn config(&self) -> Vec<u8> {
        self.geometry.config()
    }

    fn set_memory(&mut self, memory: GuestMemoryMmap) {
        self.memory = Some(Arc::new(memory));
    }

    fn tracks_inflight(&self) -> bool {
        true
    }

    fn set_inflight(&mut self, region: Option<InflightRegion>) {
        for (index, ring) in self.rings.iter_mut().enumerate() {
            ring.track(region.as_ref().and_then(|region| region.queue(index as u16)));
        }
    }

    fn configure_queue(&mut self, index: u16, setup: &QueueSetup) -> Result<(), RingError> {
        self.stop_queue(index);
        let memory = self.memory.as_ref().ok_or(RingError::NoMemory)?;
        self.rings
            .get_mut(usize::from(index))
            .ok_or(RingError::NoQueue(index))?
            .configure(memory, setup)
    }

    fn stop_queue(&mut self, index: u16) -> u16 {
        let Some(ring) = self.rings.get_mut(usize::from(index)) else {
            return 0;
        };
        let next = ring.stop();
        self.outstanding.retain(|_, request| request.queue != index);
        self.forgotten_below = self.next_id;
        next
    }

    fn is_configured(&self, index: u16) -> bool {
        self.rings.get(usize::from(index)).is_some_and(Ring::is_configured)
    }

    fn kick(&mut self, queue: u16) -> Result<Outcome, RingError> {
        let index = usize::from(queue);
        let ring = self.rings.get(index).ok_or(RingError::NoQueue(queue))?;
        if !ring.is_configured() {
            return Ok(Outcome::default());
        }
        let memory = Arc::clone(self.memory.as_ref().ok_or(RingError::NoMemory)?);
        let mut digest = (!self.zero_copy).then(Xxh3::new);
        // A ring never has more chains out than it has entries, so this ends whatever the guest does meanwhile.
        let mut found = false;
        loop {
            found |= self.take_chains(&memory, queue, digest.as_mut())?;
            if !self.rings[index].want_kick(&memory)? {
                break;
            }
        }
        Ok(Outcome {
            interrupt: false,
            digest: digest.map_or(0, |digest| digest.digest()),
            more: false,
            found,
        })
    }

    fn poll(&mut self, queue: u16) -> Result<bool, RingError> {
        let ring = self
            .rings
            .get_mut(usize::from(queue))
            .ok_or(RingError::NoQueue(queue))?;
        if !ring.is_configured() {
            return Ok(false);
        }
        let memory = Arc::clone(self.memory.as_ref().ok_or(RingError::NoMemory)?);
        ring.want_no_kick(&memory)?;
        self.take_chains(&memory, queue, None)
    }

    fn deliver(&mut self, sequence: u64, queue: u16, payload: &[u8]) -> Result<Outcome, RingError> {
        let memory = Arc::clone(self.memory.as_ref().ok_or(RingError::NoMemory)?);
        for completion in completions(payload) {
            let Completion { id, status, data } = completion?;
            self.complete(&memory, queue, id, status, data)?;
        }
        let ring = self
            .rings
            .get_mut(usize::from(queue))
            .ok_or(RingError::NoQueue(queue))?;
        let interrupt = ring.is_configured() && ring.take_interrupt(&memory)?;
        Ok(Outcome {
            interrupt,
            digest: match self.zero_copy {
                true => 0,
                false => super::fold(sequence, xxhash_rust::xxh3::xxh3_64(payload)),
            },
            ..Outcome::default()
        })
    }

    fn discard_outputs(&mut self) {
        for request in std::mem::take(&mut self.requests) {
            self.recycle(request.data);
        }
    }
}
