//! The guest sides in this process: what a kick drains, what a delivery changes, and what a hostile driver can do.

mod support;

use ft_client::counters::Lost;
use ft_vhost::guest_side::{
    GuestSide, QueueSetup, RingError,
    blk::{BlkGuestSide, Geometry, Kind, REQUEST_BYTES_MAX, completion_header, completions},
    dirty::GuestMemoryMmap,
    inflight::InflightRegion,
    net::{NetGuestSide, RECEIVE, TRANSMIT, WAITING_FRAMES_MAX},
    ring::Ring,
};
use proptest::prelude::*;
use support::driver::{BlkDriver, Buffer, Driver, MEMORY_BYTES, memory, readable, writable};
use vm_memory::{Bytes, GuestAddress};

const SECTORS: u64 = 1000;

fn blk(event_idx: bool) -> (BlkGuestSide, BlkDriver) {
    let memory = memory();
    let driver = BlkDriver::new(&memory, event_idx);
    let mut side = BlkGuestSide::new(Geometry::plain(SECTORS, false));
    side.set_memory(memory);
    side.configure_queue(0, &driver.ring.setup()).unwrap();
    (side, driver)
}

fn requests(side: &mut BlkGuestSide) -> Vec<(u64, Kind, u64, u32, Vec<u8>)> {
    let mut taken = Vec::new();
    side.take_requests(&mut taken);
    taken
        .into_iter()
        .map(|request| (request.id, request.kind, request.sector, request.length, request.data))
        .collect()
}

fn completion(id: u64, status: u8, data: &[u8]) -> Vec<u8> {
    let mut payload = completion_header(id, status, data.len() as u32).to_vec();
    payload.extend_from_slice(data);
    payload
}

#[test]
fn a_kick_takes_requests_and_their_data_there_and_then() {
    let (mut side, mut driver) = blk(true);
    driver.write(3, &[5; 1024]);
    let read = driver.read(7, 2048);
    driver.flush();
    let first = side.kick(0).unwrap();
    assert!(!first.interrupt && !first.more);
    assert_eq!(
        requests(&mut side),
        [
            (0, Kind::Write, 3, 1024, vec![5; 1024]),
            (1, Kind::Read, 7, 2048, vec![]),
            (2, Kind::Flush, 0, 0, vec![])
        ]
    );
    assert_eq!(side.outstanding(), 3);
    // Both in one payload, out of order.
    let mut payload = completion(2, 0, &[]);
    payload.extend(completion(1, 0, &[8; 2048]));
    assert!(side.deliver(1, 0, &payload).unwrap().interrupt);
    assert_eq!(driver.data(read), [8; 2048]);
    assert_eq!((driver.status(read), side.outstanding()), (0, 1));
    assert_eq!(side.deliver(2, 0, &payload), Err(RingError::UnknownRequest(2)));
    assert_eq!(
        side.deliver(2, 0, &completion(9, 0, &[])),
        Err(RingError::UnknownRequest(9))
    );
    assert_eq!(side.deliver(2, 0, &payload[..5]), Err(RingError::Payload(0)));
}

#[test]
fn the_digest_covers_header_and_data() {
    let digest = |sector, byte, event_idx| {
        let (mut side, mut driver) = blk(event_idx);
        driver.write(sector, &[byte; 512]);
        side.kick(0).unwrap().digest
    };
    assert_eq!(digest(3, 5, true), digest(3, 5, false));
    assert_ne!(digest(3, 5, true), digest(4, 5, true));
    assert_ne!(digest(3, 5, true), digest(3, 6, true));
}

#[test]
fn what_cannot_be_performed_gets_a_number_and_is_refused() {
    let (mut side, mut driver) = blk(true);
    driver.write(SECTORS, &[0; 512]);
    driver.write(0, &[0; 511]);
    driver.other(0, 0);
    driver.other(8, 21);
    driver.other(11, 0);
    let long = readable(4 << 20, REQUEST_BYTES_MAX as u32 + 512);
    driver.ring.write(3 << 20, &support::driver::blk_header(1, 0));
    driver.ring.add(&[readable(3 << 20, 16), long, writable(3 << 20, 1)]);
    // A header cut short.
    driver.ring.add(&[readable(3 << 20, 15), writable(3 << 20, 1)]);
    side.kick(0).unwrap();
    let kinds: Vec<_> = requests(&mut side)
        .into_iter()
        .map(|(id, kind, ..)| (id, kind))
        .collect();
    let refused = [1, 1, 1, 1, 2, 1, 1].map(Kind::Refused);
    assert_eq!(kinds, (0..).zip(refused).collect::<Vec<_>>());
}

#[test]
fn a_reset_forgets_and_completions_of_before_are_ignored() {
    let (mut side, mut driver) = blk(true);
    driver.flush();
    driver.flush();
    side.kick(0).unwrap();
    side.deliver(1, 0, &completion(1, 0, &[])).unwrap();
    assert_eq!(side.stop_queue(0), 2);
    assert_eq!(side.kick(0), Ok(ft_vhost::guest_side::Outcome::default()));
    assert!(!side.deliver(2, 0, &completion(0, 0, &[])).unwrap().interrupt);
    assert_eq!(
        side.deliver(3, 0, &completion(2, 0, &[])),
        Err(RingError::UnknownRequest(2))
    );
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    side.set_memory(memory);
    side.configure_queue(0, &driver.ring.setup()).unwrap();
    driver.flush();
    side.kick(0).unwrap();
    let mut taken = Vec::new();
    side.take_requests(&mut taken);
    assert_eq!(taken.last().unwrap().id, 2);
}

#[test]
fn interrupts_come_as_the_driver_asked() {
    for event_idx in [true, false] {
        let (mut side, mut driver) = blk(event_idx);
        for _ in 0..4 {
            driver.flush();
        }
        side.kick(0).unwrap();
        let mut deliver = |id| side.deliver(id + 1, 0, &completion(id, 0, &[])).unwrap().interrupt;
        assert!(deliver(0));
        // With EVENT_IDX the driver has not asked again, since it has not looked.
        assert_eq!(deliver(1), !event_idx);
        while driver.ring.take_used().is_some() {}
        assert!(deliver(2));
        if !event_idx {
            // VRING_AVAIL_F_NO_INTERRUPT
            driver.ring.write(driver.ring.setup().available_ring, &[1, 0]);
            assert!(!deliver(3));
        }
    }
}

#[test]
fn impossible_setups_are_refused() {
    let memory = memory();
    let driver = Driver::new(&memory, 0x1_0000, 64, true);
    let mut side = BlkGuestSide::new(Geometry::plain(SECTORS, false));
    assert_eq!(side.configure_queue(0, &driver.setup()), Err(RingError::NoMemory));
    side.set_memory(memory);
    assert_eq!(side.configure_queue(1, &driver.setup()), Err(RingError::NoQueue(1)));
    assert_eq!(side.kick(1), Err(RingError::NoQueue(1)));
    let good = driver.setup();
    for bad in [
        QueueSetup { size: 0, ..good },
        QueueSetup { size: 48, ..good },
        QueueSetup { size: 2048, ..good },
        QueueSetup {
            descriptor_table: 8,
            ..good
        },
        QueueSetup {
            available_ring: 0x2_0001,
            ..good
        },
        QueueSetup {
            used_ring: 0x2_0002,
            ..good
        },
        QueueSetup {
            used_ring: MEMORY_BYTES - 8,
            ..good
        },
        QueueSetup {
            descriptor_table: u64::MAX - 15,
            ..good
        },
    ] {
        assert!(side.configure_queue(0, &bad).is_err(), "{bad:?}");
        assert!(!side.is_configured(0));
    }
    side.configure_queue(0, &good).unwrap();
}

#[test]
fn broken_chains_are_named() {
    let kick = |break_it: &dyn Fn(&mut Driver)| {
        let (mut side, mut driver) = blk(true);
        break_it(&mut driver.ring);
        side.kick(0).unwrap_err()
    };
    let descriptor = |ring: &Driver, index: u64, flags: u16, next: u16| {
        let at = ring.setup().descriptor_table + 16 * index;
        ring.write(at, &(1u64 << 20).to_le_bytes());
        ring.write(at + 8, &16u32.to_le_bytes());
        ring.write(at + 12, &flags.to_le_bytes());
        ring.write(at + 14, &next.to_le_bytes());
    };
    let chain = |buffers: &[Buffer]| {
        kick(&|ring| {
            ring.add(buffers);
        })
    };
    let outside = chain(&[readable(1 << 40, 16), writable(0, 1)]);
    assert!(matches!(outside, RingError::OutsideMemory { what: "a buffer", .. }));
    let order = chain(&[writable(0, 1), readable(0, 16)]);
    assert!(matches!(order, RingError::Order { .. }));
    let short = chain(&[readable(0, 16)]);
    assert!(matches!(short, RingError::TooShort { .. }));
    let loops = kick(&|ring| {
        let head = ring.add(&[readable(0, 16)]);
        descriptor(ring, head.into(), 1, head);
    });
    assert_eq!(loops, RingError::Loop { head: 0 });
    let index = kick(&|ring| {
        let head = ring.add(&[readable(0, 16)]);
        descriptor(ring, head.into(), 1, 64);
    });
    assert_eq!(index, RingError::Descriptor { index: 64, size: 64 });
    let nested = kick(&|ring| {
        let head = ring.add_indirect(1 << 20, &[readable(0, 16), writable(0, 1)]);
        assert_eq!(head, 0);
        ring.write((1 << 20) + 12, &4u16.to_le_bytes());
    });
    assert_eq!(nested, RingError::Indirect { head: 0 });
    let ahead = kick(&|ring| ring.write(ring.setup().available_ring + 2, &65u16.to_le_bytes()));
    assert_eq!(ahead, RingError::AvailableIndex(0));
    let head = kick(&|ring| {
        ring.publish_head(64);
    });
    assert_eq!(head, RingError::Descriptor { index: 64, size: 64 });
    let twice = kick(&|ring| {
        let head = ring.add(&[readable(0, 16), writable(0, 1)]);
        ring.publish_head(head);
    });
    assert_eq!(twice, RingError::Busy { head: 0 });
}

fn net(event_idx: bool) -> (NetGuestSide, Driver, Driver) {
    let memory = memory();
    let receive = Driver::new(&memory, 0x1_0000, 64, event_idx);
    let transmit = Driver::new(&memory, 0x3_0000, 64, event_idx);
    let mut side = NetGuestSide::new([2, 0, 0, 0, 0, 1]);
    side.set_memory(memory);
    side.configure_queue(RECEIVE, &receive.setup()).unwrap();
    side.configure_queue(TRANSMIT, &transmit.setup()).unwrap();
    (side, receive, transmit)
}

fn frames_payload(frames: &[Vec<u8>]) -> Vec<u8> {
    let parts = frames
        .iter()
        .flat_map(|frame| [&(frame.len() as u32).to_le_bytes()[..], frame].concat());
    parts.collect()
}

#[test]
fn transmitted_frames_come_out_without_their_header_and_are_completed_at_once() {
    for event_idx in [true, false] {
        let (mut side, _, mut transmit) = net(event_idx);
        transmit.write(1 << 20, &[0xff; 12]);
        transmit.write((1 << 20) + 12, &[7; 100]);
        let at = |offset: u64, length| readable((1 << 20) + offset, length);
        transmit.add(&[at(0, 112)]);
        transmit.add(&[at(0, 5), at(5, 7), at(12, 60), at(72, 40)]);
        transmit.add_indirect(2 << 20, &[at(0, 12), at(12, 100)]);
        // Neither of these is a frame; both are completed.
        transmit.add(&[at(0, 20)]);
        transmit.add(&[at(0, 12), readable(3 << 20, 70_000)]);
        let outcome = side.kick(TRANSMIT).unwrap();
        assert!(outcome.interrupt && !outcome.more);
        let mut frames = Vec::new();
        side.take_frames(&mut frames);
        assert_eq!(frames.len(), 3);
        for frame in &frames {
            assert_eq!(frame.ethernet(), [7; 100]);
            assert_eq!(frame.with_header()[..12], [0; 12]);
        }
        assert_eq!(std::iter::from_fn(|| transmit.take_used()).count(), 5);
        let lost = [Lost::TooShort, Lost::TooLong].map(|why| side.counters().lost(TRANSMIT, why));
        assert_eq!(lost, [1, 1]);
    }
}

#[test]
fn frames_wait_for_buffers_and_the_oldest_makes_room() {
    let (mut side, mut receive, _) = net(true);
    let sent: Vec<_> = (0..WAITING_FRAMES_MAX + 10)
        .map(|number| vec![number as u8; 60])
        .collect();
    assert!(!side.deliver(1, RECEIVE, &frames_payload(&sent)).unwrap().interrupt);
    assert_eq!(side.counters().lost(RECEIVE, Lost::NoBuffers), 10);
    receive.add(&[writable(1 << 20, 50)]);
    receive.add(&[writable(2 << 20, 2000)]);
    assert!(receive.wants_kick(), "the device waits for buffers");
    assert!(!side.kick(RECEIVE).unwrap().interrupt);
    // The first buffer was too small for any: each frame that met it was dropped, and it is still there.
    assert_eq!(receive.take_used(), None);
    let too_large = side.counters().lost(RECEIVE, Lost::TooLarge);
    assert_eq!(too_large, WAITING_FRAMES_MAX as u64);

    let (mut side, mut receive, _) = net(true);
    side.deliver(1, RECEIVE, &frames_payload(&sent)).unwrap();
    receive.add(&[writable(1 << 20, 12), writable(2 << 20, 60)]);
    assert!(side.kick(RECEIVE).unwrap().interrupt);
    assert_eq!(receive.take_used(), Some((0, 72)));
    assert_eq!(receive.read(2 << 20, 60), sent[10]);
    assert_eq!(receive.read((1 << 20) + 10, 2), [1, 0]);
}

#[test]
fn a_guest_without_a_driver_hears_nothing() {
    let mut side = NetGuestSide::new([2, 0, 0, 0, 0, 1]);
    let payload = frames_payload(&[vec![1; 60], vec![2; 60]]);
    assert!(!side.deliver(1, RECEIVE, &payload).unwrap().interrupt);
    assert_eq!(side.counters().lost(RECEIVE, Lost::NoDriver), 2);
    assert_eq!(side.kick(RECEIVE), Ok(ft_vhost::guest_side::Outcome::default()));
    assert_eq!(side.kick(2), Err(RingError::NoQueue(2)));
}

#[test]
fn configuration_spaces_say_what_the_specification_says() {
    let blk = BlkGuestSide::new(Geometry::plain(0x1234, true));
    let config = blk.config();
    assert_eq!(config.len(), 60);
    assert_eq!(config[..2], [0x34, 0x12]);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(word(8) as usize * word(12) as usize, REQUEST_BYTES_MAX);
    assert_eq!(word(20), 512);
    assert_ne!(blk.features() & 1 << 5, 0);
    assert_eq!(BlkGuestSide::new(Geometry::plain(1, false)).features() & 1 << 5, 0);
    let net = NetGuestSide::new([1, 2, 3, 4, 5, 6]);
    assert_eq!(net.config()[..6], [1, 2, 3, 4, 5, 6]);
    assert_eq!(net.features(), 1 << 32 | 1 << 29 | 1 << 28 | 1 << 5);
}

/// Writes hostile values where rings and indirect tables are: small numbers more often than large ones, since they do more.
fn hostile() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let address = prop_oneof![
        0x1_0000u64..0x1_0400,
        0x1_8000u64..0x1_8090,
        0x1_a000u64..0x1_a210,
        0x10_0000u64..0x10_0400
    ];
    let value = prop_oneof![
        0u64..70,
        any::<u64>(),
        Just(0x10_0000u64),
        any::<u16>().prop_map(|flags| u64::from(flags % 8) << 32 | 16)
    ];
    proptest::collection::vec((address.prop_map(|address| address & !7), value), 0..120)
}

fn strew(memory: &GuestMemoryMmap, writes: &[(u64, u64)]) {
    for (address, value) in writes {
        memory.write_obj(*value, GuestAddress(*address)).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_ring_makes_a_guest_side_panic_or_hang(writes in hostile(), more in hostile(), available in 0u16..70, event_idx in any::<bool>(), payload in proptest::collection::vec(any::<u8>(), 0..200)) {
        let memory = memory();
        let driver = Driver::new(&memory, 0x1_0000, 64, event_idx);
        strew(&memory, &writes);
        memory.write_obj(available, GuestAddress(driver.setup().available_ring + 2)).unwrap();
        let mut blk = BlkGuestSide::new(Geometry::plain(SECTORS, false));
        let mut net = NetGuestSide::new([2; 6]);
        let sides: [&mut dyn GuestSide; 2] = [&mut blk, &mut net];
        for side in sides {
            side.set_memory(memory.clone());
            for queue in 0..side.queue_count() {
                side.configure_queue(queue, &driver.setup()).unwrap();
            }
            for queue in 0..side.queue_count() {
                let _ = side.kick(queue);
                let _ = side.deliver(1, queue, &payload);
                let _ = side.deliver(2, queue, &frames_payload(&[vec![1; 60], vec![2; 1500]]));
                let _ = side.deliver(3, queue, &completion(0, 0, &[1; 600]));
            }
            strew(&memory, &more);
            for queue in 0..side.queue_count() {
                let _ = side.kick(queue);
            }
            side.discard_outputs();
            side.reset();
        }
    }

    #[test]
    fn completions_read_back(parts in proptest::collection::vec((any::<u64>(), any::<u8>(), proptest::collection::vec(any::<u8>(), 0..50)), 0..10)) {
        let payload: Vec<u8> = parts.iter().flat_map(|(id, status, data)| completion(*id, *status, data)).collect();
        let read: Vec<_> = completions(&payload).map(|part| part.map(|part| (part.id, part.status, part.data.to_vec())).unwrap()).collect();
        prop_assert_eq!(read, parts);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Two guests that start equal and get the same calls stay equal, outcome by outcome and byte by byte.
    #[test]
    fn the_same_calls_have_the_same_effect(steps in proptest::collection::vec((0u8..4, 0u64..1100, 0u32..3, any::<u8>()), 1..60), event_idx in any::<bool>()) {
        let run = || {
            let (mut side, mut driver) = blk(event_idx);
            let mut pending: Vec<(u64, u32)> = Vec::new();
            let mut sequence = 0;
            let mut outcomes = Vec::new();
            for (step, sector, parts, byte) in &steps {
                if pending.len() > 15 || *step == 3 {
                    if pending.is_empty() {
                        continue;
                    }
                    let (id, length) = pending.swap_remove(usize::from(*byte) % pending.len());
                    sequence += 1;
                    outcomes.push(side.deliver(sequence, 0, &completion(id, *byte, &vec![*byte; length as usize])).unwrap());
                    while driver.ring.take_used().is_some() {}
                    continue;
                }
                match step {
                    0 => driver.write(*sector, &vec![*byte; *parts as usize * 512]),
                    1 => driver.read(*sector, (*parts + 1) * 512),
                    _ => driver.flush(),
                };
                outcomes.push(side.kick(0).unwrap());
                pending.extend(requests(&mut side).into_iter().map(|(id, kind, _, length, _)| (id, if kind == Kind::Read { length } else { 0 })));
            }
            (outcomes, driver.ring.read(0, MEMORY_BYTES as usize))
        };
        let (one, other) = (run(), run());
        prop_assert!(one == other);
    }
}

/// Each successor is killed when it has taken one chain again: the next one takes all of them, and in the order of the first.
#[test]
fn successors_killed_while_they_take_up_chains_keep_their_order() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0x1_0000, 8, true);
    let heads: Vec<u16> = (0..4).map(|_| driver.add(&[readable(1 << 20, 512)])).collect();
    let file = tempfile::tempfile().unwrap();
    let bytes = InflightRegion::bytes(1, 8) as u64;
    file.set_len(bytes).unwrap();
    let region = InflightRegion::map(file, 0, bytes, 1, 8).unwrap();
    let take = |count: usize| {
        let mut ring = Ring::new(0);
        ring.track(region.queue(0));
        ring.configure(&memory, &driver.setup()).unwrap();
        let mut segments = Vec::new();
        let mut pop = || ring.pop(&memory, &mut segments).unwrap();
        (0..count).map_while(|_| pop()).collect::<Vec<_>>()
    };
    assert_eq!(take(3), heads[..3]);
    for successor in 0..3 {
        assert_eq!(take(1), heads[..1], "successor {successor}");
    }
    // What nobody had taken comes behind what somebody had.
    assert_eq!(take(5), heads);
    assert_eq!(take(5), heads);
}
