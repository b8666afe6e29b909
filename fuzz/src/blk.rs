//! What the fuzzers of the block device run, and `vhost-ft-blk/tests/fuzz.rs` runs over its corpus: requests, and whole rings that keep no
//! rule. Nothing may panic or hang, and what is to be performed lies within the disk and within guest memory.

use ft_vhost::guest_side::{
    GuestSide, QueueSetup,
    blk::{BlkGuestSide, COMPLETION_HEADER_BYTES, Geometry, Kind, Request, completion_header},
    dirty::GuestMemoryMmap,
};
use vm_memory::{Bytes, GuestAddress};

/// What is run on each input.
pub type Target = fn(&[u8]);

/// Every target, by name.
#[allow(dead_code, reason = "each fuzzer runs one")]
pub const TARGETS: [(&str, Target); 2] = [("blk-request", blk_request), ("blk-rings", blk_rings)];

const MEMORY_BYTES: usize = 1 << 20;
/// Where the rings of a queue are, of 16 entries each; buffers lie anywhere.
const RING_BYTES: u64 = 0x1000;
const ENTRIES: u16 = 16;
const QUEUES: u16 = 2;
const SECTORS: u64 = 1000;
const SECTOR_BYTES: u64 = 512;
/// Where a request is that breaks no rule of the rings.
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x8000;
const STATUS: u64 = 0x3000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("a mebibyte of memory")
}

fn setup(queue: u16) -> QueueSetup {
    let base = u64::from(queue) * RING_BYTES;
    QueueSetup {
        size: ENTRIES,
        descriptor_table: base,
        available_ring: base + 0x400,
        used_ring: base + 0x800,
        next_available: 0,
        event_idx: queue.is_multiple_of(2),
    }
}

/// A disk, read-only, of large blocks, or protected as the bits say.
fn disk(bits: u8, memory: &GuestMemoryMmap) -> BlkGuestSide {
    let protected = bits & 4 != 0;
    let mut side = BlkGuestSide::new(Geometry {
        capacity_sectors: SECTORS,
        read_only: bits & 1 != 0,
        queues: QUEUES,
        block_bytes: if bits & 2 != 0 { 4096 } else { 512 },
        protected,
    });
    if !protected {
        side.copy_nothing();
    }
    side.set_memory(memory.clone());
    for queue in 0..QUEUES {
        side.configure_queue(queue, &setup(queue))
            .expect("a layout as the specification has it");
    }
    side
}

/// What a device may rely on when it performs a request.
fn judge(side: &BlkGuestSide, bits: u8, request: &Request) {
    let (sector, length) = (request.sector, u64::from(request.length));
    assert!(request.queue < QUEUES && side.is_outstanding(request.id));
    let changes = !matches!(request.kind, Kind::Read | Kind::Flush | Kind::GetId | Kind::Refused(_));
    assert!(!changes || bits & 1 == 0, "a read-only disk is changed");
    if changes || request.kind == Kind::Read {
        let end = sector.checked_add(length.div_ceil(SECTOR_BYTES));
        assert!(end.is_some_and(|end| end <= SECTORS), "beyond the disk");
        assert_eq!(length % SECTOR_BYTES, 0, "a part of a sector");
    }
    match request.kind {
        Kind::Write if bits & 4 != 0 => {
            assert_eq!(request.data.len() as u64, length, "a bounce buffer of another size")
        }
        Kind::Write | Kind::Read => {
            assert!(request.data.is_empty());
            let (_, segments) = side.data(request.id).expect("it is outstanding");
            let bytes: u64 = segments.iter().map(|segment| u64::from(segment.length)).sum();
            assert_eq!(bytes, length, "memory of another size");
            for segment in segments {
                let end = segment.address.checked_add(segment.length.into());
                assert!(
                    end.is_some_and(|end| end <= MEMORY_BYTES as u64),
                    "outside of guest memory"
                );
            }
        }
        _ => assert!(request.data.is_empty()),
    }
}

/// Takes what came, judges it, and completes what `reports` says.
fn perform(side: &mut BlkGuestSide, bits: u8, taken: &mut Vec<Request>, reports: Option<u64>) {
    let before = taken.len();
    side.take_requests(taken);
    taken[before..].iter().for_each(|request| judge(side, bits, request));
    assert!(
        side.outstanding() <= usize::from(QUEUES * ENTRIES),
        "more than the rings hold"
    );
    let Some(reports) = reports.filter(|_| !taken.is_empty()) else {
        return;
    };
    let request = taken.swap_remove(reports as usize % taken.len());
    let status = (reports >> 8) as u8;
    let mut payload = vec![0; COMPLETION_HEADER_BYTES];
    // A read brings data where it is bounced; and nothing if it failed.
    let brings = request.kind == Kind::Read && status == 0 && bits & 4 != 0;
    let length = if brings { request.length } else { 0 };
    payload[..].copy_from_slice(&completion_header(request.id, status, length));
    payload.resize(COMPLETION_HEADER_BYTES + length as usize, 0xa5);
    let _ = side.deliver(reports, request.queue, &payload);
    side.recycle(request.data);
}

/// A kind of disk, then the header of one request and the lengths of its parts: the ring is right, the request is anything.
pub fn blk_request(input: &[u8]) {
    let Some((fixed, content)) = input.split_first_chunk::<24>() else {
        return;
    };
    let bits = fixed[0];
    let memory = memory();
    let mut side = disk(bits, &memory);
    let put = |bytes: &[u8], address| {
        memory
            .write_slice(bytes, GuestAddress(address))
            .expect("within the memory");
    };
    put(&fixed[8..], HEADER);
    put(&content[..content.len().min(4096)], DATA);
    let length = |at: usize| u32::from(u16::from_le_bytes([fixed[at], fixed[at + 1]])) << (fixed[1] & 7);
    // Header, data either way, status.
    let parts = [
        (HEADER, u32::from(fixed[6] % 33), 0),
        (DATA, length(2), 0),
        (DATA, length(4), WRITE),
        (STATUS, u32::from(fixed[7] % 3), WRITE),
    ];
    for (index, (address, length, flags)) in (0u16..).zip(parts) {
        let more = if usize::from(index) + 1 < parts.len() { NEXT } else { 0 };
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&length.to_le_bytes());
        descriptor[12..14].copy_from_slice(&(flags | more).to_le_bytes());
        descriptor[14..].copy_from_slice(&(index + 1).to_le_bytes());
        put(&descriptor, 16 * u64::from(index));
    }
    put(&1u16.to_le_bytes(), 0x402);
    let _ = side.kick(0);
    let mut taken = Vec::new();
    perform(&mut side, bits, &mut taken, None);
    perform(&mut side, bits, &mut taken, Some(0));
    assert!(taken.is_empty(), "one chain is one request");
}

/// A kind of disk, then steps of nine bytes: writes to guest memory, kicks, completions, ends and starts of queues. Memory changes between a
/// request's arrival and its end.
pub fn blk_rings(input: &[u8]) {
    let Some((bits, steps)) = input.split_first() else {
        return;
    };
    let memory = memory();
    let mut side = disk(*bits, &memory);
    let mut taken = Vec::new();
    for step in steps.chunks_exact(9) {
        let (what, value) = (step[0], number(&step[1..]));
        let queue = u16::from(what >> 4) % QUEUES;
        let mut reports = None;
        match what % 16 {
            0..=7 => {
                // The lower the place in a queue's page, the more it does.
                let at = u64::from(queue) * RING_BYTES + u64::from(what % 8) * 0x100 + (value >> 56) * 8;
                memory
                    .write_obj(value & ((1 << 56) - 1), GuestAddress(at))
                    .expect("within the memory");
            }
            8 | 9 => {
                let _ = side.kick(queue);
            }
            10 => {
                let _ = side.poll(queue);
            }
            11..=13 => reports = Some(value),
            14 => {
                let _ = side.deliver(value, queue, &step[1..]);
            }
            _ => {
                side.stop_queue(queue);
                taken.retain(|request: &Request| side.is_outstanding(request.id));
                let _ = side.configure_queue(queue, &setup(queue));
            }
        }
        perform(&mut side, *bits, &mut taken, reports);
        taken.retain(|request| side.is_outstanding(request.id));
    }
}
