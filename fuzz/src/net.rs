//! What the fuzzers of the network device run, and `vhost-ft-net/tests/fuzz.rs` runs over its corpus: what a guest writes to the header of
//! a frame, and to the rings of a device that nobody replays. Nothing may panic or hang, and what passes lies within its frame.

use ft_vhost::guest_side::{
    GuestSide, QueueSetup,
    dirty::GuestMemoryMmap,
    net::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, Frame, HEADER_BYTES, NetGuestSide, Shape, header},
};
use vm_memory::{Bytes, GuestAddress};

/// What is run on each input.
pub type Target = fn(&[u8]);

/// Every target, by name.
#[allow(dead_code, reason = "each fuzzer runs one")]
pub const TARGETS: [(&str, Target); 2] = [("net-header", net_header), ("net-rings", net_rings)];

const MEMORY_BYTES: usize = 1 << 20;
/// Where the rings of a queue are, of 16 entries each; buffers lie anywhere.
const RING_BYTES: u64 = 0x1000;
const PAIRS: u16 = 2;

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Features, a header, and a frame behind them.
pub fn net_header(input: &[u8]) {
    let Some((features, rest)) = input.split_first_chunk::<8>() else {
        return;
    };
    let Some((header, frame)) = rest.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    // Half of them from a driver that took everything.
    let features = if features[7] & 1 == 0 {
        u64::MAX
    } else {
        number(features)
    };
    let Ok(out) = header::judge(header, frame, features) else {
        return;
    };
    let word = |at: usize| usize::from(u16::from_le_bytes([out[at], out[at + 1]]));
    assert_eq!(out[0] & !1, 0, "a flag that the host does not know");
    assert!(
        out[0] == 0 || word(6) + word(8) + 2 <= frame.len(),
        "a checksum outside the frame"
    );
    assert!(out[1] == 0 || out[0] == 1, "pieces without a checksum");
    assert!(
        out[1] == 0 || word(4) >= 8 && word(2) <= frame.len(),
        "impossible pieces"
    );
    assert_eq!(word(10), 0);
}

fn setup(queue: u16) -> QueueSetup {
    let base = u64::from(queue) * RING_BYTES;
    QueueSetup {
        size: 16,
        descriptor_table: base,
        available_ring: base + 0x400,
        used_ring: base + 0x800,
        next_available: 0,
        event_idx: queue.is_multiple_of(2),
    }
}

/// Features, then steps of nine bytes: writes to guest memory, kicks, deliveries, ends and starts of queues.
pub fn net_rings(input: &[u8]) {
    let Some((features, steps)) = input.split_first_chunk::<8>() else {
        return;
    };
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("a mebibyte of memory");
    let mut side = NetGuestSide::with_shape(Shape {
        mac: [2; 6],
        mtu: Some(1500),
        pairs: PAIRS,
        offloads: u64::MAX,
        free: true,
    });
    side.set_features(number(features));
    side.set_memory(memory.clone());
    for queue in 0..side.queue_count() {
        side.configure_queue(queue, &setup(queue))
            .expect("a layout as the specification has it");
    }
    let mut frames: Vec<Frame> = Vec::new();
    for step in steps.chunks_exact(9) {
        let (what, value) = (step[0], number(&step[1..]));
        let queue = u16::from(what >> 4) % (2 * PAIRS);
        match what % 16 {
            0..=7 => {
                // The lower the place in a queue's page, the more it does.
                let at = u64::from(queue) * RING_BYTES + u64::from(what % 8) * 0x100 + (value >> 56) * 8;
                memory
                    .write_obj(value & ((1 << 56) - 1), GuestAddress(at))
                    .expect("within the memory");
            }
            8..=11 => {
                let _ = side.kick(queue);
            }
            12 | 13 => {
                let length = (value as usize % 4000).max(1);
                let mut payload = (length as u32).to_le_bytes().to_vec();
                payload.resize(4 + length, value as u8);
                let _ = side.deliver(value, queue, &payload);
            }
            14 => {
                let _ = side.deliver(value, queue, &step[1..]);
            }
            _ => {
                side.stop_queue(queue);
                let _ = side.configure_queue(queue, &setup(queue));
            }
        }
        side.take_frames(&mut frames);
        for frame in frames.drain(..) {
            let bytes = frame.ethernet().len();
            assert!(
                (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes),
                "a runt or a giant"
            );
            side.recycle(frame);
        }
    }
}
