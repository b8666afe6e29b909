//! The guest side of a network device that nobody replays: headers, mergeable buffers, pairs of queues.

mod support;

use ft_client::counters::{Lost, OfQueue};
use ft_vhost::guest_side::{
    GuestSide, RingError,
    net::{Frame, NetGuestSide, RECEIVE, Shape, TRANSMIT},
};
use proptest::prelude::*;
use support::driver::{Buffer, Driver, memory, readable, writable};

const VERSION_1: u64 = 1 << 32;
const MRG_RXBUF: u64 = 1 << 15;
const CSUM: u64 = 1 << 0;
const HEADER: u64 = 12;
const FRAMES: u64 = 16 << 20;

fn shape(pairs: u16) -> Shape {
    Shape {
        mac: [2; 6],
        mtu: None,
        pairs,
        offloads: u64::MAX,
        free: true,
    }
}

/// A device, and the drivers of its queues.
struct World {
    side: NetGuestSide,
    drivers: Vec<Driver>,
}

impl World {
    fn new(pairs: u16, features: u64, event_idx: bool) -> Self {
        let memory = memory();
        let mut side = NetGuestSide::with_shape(shape(pairs));
        side.set_features(features);
        side.set_memory(memory.clone());
        let drivers: Vec<_> = (1..=2 * u64::from(pairs))
            .map(|place| Driver::new(&memory, 0x1_0000 * place, 64, event_idx))
            .collect();
        for (queue, driver) in (0..).zip(&drivers) {
            side.configure_queue(queue, &driver.setup()).unwrap();
        }
        Self { side, drivers }
    }

    /// Makes a frame available, with what the driver writes before it.
    fn send(&mut self, queue: u16, header: &[u8], frame: &[u8]) {
        let driver = &mut self.drivers[usize::from(queue)];
        let at = FRAMES + (u64::from(queue) * 64 + u64::from(driver.next_head())) * 0x1000;
        driver.write(at, header);
        driver.write(at + header.len() as u64, frame);
        driver.add(&[readable(at, (header.len() + frame.len()) as u32)]);
    }

    /// Frames of a queue that were lost, by the reasons that there were.
    fn lost(&self, queue: u16) -> Vec<(&'static str, u64)> {
        let all = Lost::of(queue)
            .iter()
            .map(|(why, name)| (*name, self.side.counters().lost(queue, *why)));
        all.filter(|(_, frames)| *frames != 0).collect()
    }

    /// Frames, bytes, interrupts that were wanted and not, updates of the used index, used buffers. Kicks are the loop's.
    fn counted(&self, queue: u16) -> [u64; 6] {
        let counts = OfQueue::ALL.map(|(what, ..)| self.side.counters().of_queue(queue, what));
        let [frames, bytes, 0, raised, suppressed, batches, buffers] = counts else {
            panic!("{counts:?}")
        };
        [frames, bytes, raised, suppressed, batches, buffers]
    }

    fn sent(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        self.side.take_frames(&mut frames);
        frames
    }
}

/// Where buffer `number` is, and how long.
fn buffer(number: u64, length: u32) -> Buffer {
    writable((1 << 20) + number * 0x1_0000, length)
}

fn payload(packets: &[&[u8]]) -> Vec<u8> {
    let with_length = |packet: &&[u8]| [&(packet.len() as u32).to_le_bytes()[..], packet].concat();
    packets.iter().flat_map(with_length).collect()
}

/// A frame with a header of the TAP's before it.
fn packet(frame: &[u8]) -> Vec<u8> {
    [&[1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0][..], frame].concat()
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs_and_says_so() {
    for event_idx in [true, false] {
        let mut world = World::new(1, VERSION_1 | MRG_RXBUF, event_idx);
        for number in 0..5 {
            world.drivers[0].add(&[buffer(number, 40)]);
        }
        let frame: Vec<u8> = (0..100).collect();
        let all = packet(&frame);
        let outcome = world.side.deliver(1, RECEIVE, &payload(&[&all, &all[..40]])).unwrap();
        assert!(outcome.interrupt);
        let receive = &mut world.drivers[0];
        // Seen together, or not at all.
        assert_eq!(receive.unseen(), 4);
        let used: Vec<_> = std::iter::from_fn(|| receive.take_used()).collect();
        assert_eq!(used, [(0, 40), (1, 40), (2, 32), (3, 40)]);
        let mut bytes = receive.read(1 << 20, 40);
        bytes.extend(receive.read((1 << 20) + 0x1_0000, 40));
        bytes.extend(receive.read((1 << 20) + 0x2_0000, 32));
        let mut expected = all.clone();
        expected[10] = 3;
        assert_eq!(bytes, expected);
        assert_eq!(receive.read((1 << 20) + 0x3_0000 + 10, 2), [1, 0]);
    }
}

#[test]
fn a_frame_waits_until_there_are_buffers_enough_and_the_driver_is_asked_for_them() {
    for event_idx in [true, false] {
        let mut world = World::new(1, VERSION_1 | MRG_RXBUF, event_idx);
        let receive = &mut world.drivers[0];
        receive.add(&[buffer(0, 64)]);
        receive.wants_kick();
        let long = packet(&[7; 150]);
        assert!(!world.side.deliver(1, RECEIVE, &payload(&[&long])).unwrap().interrupt);
        assert!(world.side.waits(0));
        for number in 1..3 {
            let receive = &mut world.drivers[0];
            assert_eq!(receive.take_used(), None);
            receive.add(&[buffer(number, 64)]);
            assert!(receive.wants_kick(), "one buffer more may be enough");
            let interrupt = world.side.kick(RECEIVE).unwrap().interrupt;
            assert_eq!(interrupt, number == 2);
        }
        assert!(!world.side.waits(0));
        let receive = &mut world.drivers[0];
        assert_eq!(std::iter::from_fn(|| receive.take_used()).count(), 3);
        // Nothing waits: more buffers are no news.
        receive.add(&[buffer(3, 64)]);
        assert!(!receive.wants_kick());
    }
}

#[test]
fn a_frame_for_which_the_whole_ring_is_too_small_is_dropped() {
    let mut world = World::new(1, VERSION_1 | MRG_RXBUF, true);
    for number in 0..64 {
        world.drivers[0].add(&[buffer(number, 20)]);
    }
    let (long, short) = (packet(&[7; 2000]), packet(&[8; 20]));
    world.side.deliver(1, RECEIVE, &payload(&[&long, &short])).unwrap();
    assert_eq!(world.lost(RECEIVE), [("too_large", 1)]);
    assert_eq!(world.drivers[0].take_used(), Some((0, 20)));
    assert_eq!(world.drivers[0].take_used(), Some((1, 12)));
}

#[test]
fn without_mergeable_buffers_a_frame_has_one_chain() {
    let mut world = World::new(1, VERSION_1, true);
    world.drivers[0].add(&[buffer(0, 60)]);
    let (long, short) = (packet(&[7; 100]), packet(&[8; 48]));
    world.side.deliver(1, RECEIVE, &payload(&[&long, &short])).unwrap();
    assert_eq!(world.lost(RECEIVE), [("too_large", 1)]);
    assert_eq!(world.drivers[0].take_used(), Some((0, 60)));
}

#[test]
fn a_driver_of_before_the_specification_has_a_shorter_header() {
    let mut world = World::new(1, CSUM, true);
    world.drivers[0].add(&[buffer(0, 100)]);
    world.side.deliver(1, RECEIVE, &payload(&[&packet(&[7; 60])])).unwrap();
    assert_eq!(world.drivers[0].take_used(), Some((0, 70)));
    let mut expected = packet(&[7; 60]);
    expected.drain(10..12);
    assert_eq!(world.drivers[0].read(1 << 20, 70), expected);
    world.send(TRANSMIT, &[1, 0, 0, 0, 0, 0, 20, 0, 4, 0], &[9; 60]);
    world.side.kick(TRANSMIT).unwrap();
    let sent = world.sent();
    assert_eq!(sent[0].with_header()[..12], [1, 0, 0, 0, 0, 0, 20, 0, 4, 0, 0, 0]);
    assert_eq!(sent[0].ethernet(), [9; 60]);
}

#[test]
fn what_a_frame_contradicts_is_completed_and_not_sent() {
    let mut world = World::new(1, VERSION_1 | CSUM, true);
    world.send(TRANSMIT, &[1, 0, 0, 0, 0, 0, 60, 0, 0, 0, 0, 0], &[1; 60]);
    world.send(TRANSMIT, &[0, 1, 0, 0, 99, 9, 20, 0, 4, 0, 0, 0], &[2; 60]);
    world.send(TRANSMIT, &[1, 0, 0, 0, 0, 0, 20, 0, 4, 0, 0, 0], &[3; 60]);
    world.send(TRANSMIT, &[0; 12], &[4; 13]);
    world.send(TRANSMIT, &[0; 5], &[]);
    world.side.kick(TRANSMIT).unwrap();
    let sent = world.sent();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].ethernet(), [3; 60]);
    assert_eq!(
        world.lost(TRANSMIT),
        [("too_short", 2), ("not_negotiated", 1), ("checksum", 1)]
    );
    assert_eq!(std::iter::from_fn(|| world.drivers[1].take_used()).count(), 5);
}

#[test]
fn each_pair_has_its_own_frames_and_its_own_end() {
    let mut world = World::new(3, VERSION_1 | MRG_RXBUF, true);
    for pair in 0..3 {
        world.send(2 * pair + 1, &[0; 12], &[pair as u8; 60]);
        world.drivers[2 * usize::from(pair)].add(&[buffer(pair.into(), 100)]);
    }
    for pair in 0..3 {
        world.side.kick(2 * pair + 1).unwrap();
        world
            .side
            .deliver(1, 2 * pair, &payload(&[&packet(&[pair as u8; 60])]))
            .unwrap();
    }
    for (pair, frame) in world.sent().iter().enumerate() {
        assert_eq!((frame.pair(), frame.ethernet()[0]), (pair, pair as u8));
        assert!(world.drivers[2 * pair].take_used().is_some());
        let bytes = world.drivers[2 * pair].read((1 << 20) + pair as u64 * 0x1_0000 + HEADER, 60);
        assert_eq!(bytes, [pair as u8; 60]);
    }
    // A driver that breaks one.
    world.drivers[3].publish_head(200);
    assert_eq!(world.side.kick(3), Err(RingError::Descriptor { index: 200, size: 64 }));
    world.side.stop_queue(3);
    world.send(5, &[0; 12], &[9; 60]);
    assert!(world.side.kick(5).unwrap().found);
    assert_eq!(world.side.kick(6), Err(RingError::NoQueue(6)));
    assert_eq!(world.side.deliver(1, 3, &[]), Err(RingError::NoQueue(3)));
}

#[test]
fn each_count_moves_when_its_thing_happens_and_no_other() {
    let mut world = World::new(2, VERSION_1 | MRG_RXBUF | CSUM, true);
    let nothing = [0; 6];
    // Two frames of 60 and one of 100, by one kick: the driver hears once.
    for length in [60, 60, 100] {
        world.send(3, &[0; 12], &vec![1; length]);
    }
    world.side.kick(3).unwrap();
    assert_eq!(world.counted(3), [3, 220, 1, 0, 3, 3]);
    // Nothing there: nothing is counted.
    world.side.kick(3).unwrap();
    assert_eq!(world.counted(3), [3, 220, 1, 0, 3, 3]);
    // The driver has not looked since: it wants no interrupt. A frame that is refused is a used buffer all the same.
    world.send(3, &[0; 12], &[1; 60]);
    world.send(3, &[0; 12], &[1; 13]);
    world.side.kick(3).unwrap();
    assert_eq!(world.counted(3), [4, 280, 1, 1, 5, 5]);
    assert_eq!(world.lost(3), [("too_short", 1)]);
    assert_eq!([0, 1, 2].map(|queue| world.counted(queue)), [nothing; 3]);

    // One frame in three buffers: one update of the index.
    for number in 0..4 {
        world.drivers[2].add(&[buffer(number, 40)]);
    }
    let long = packet(&[7; 100]);
    world.side.deliver(1, 2, &payload(&[&long])).unwrap();
    assert_eq!(world.counted(2), [1, 100, 1, 0, 1, 3]);
    // It waits, which is no arrival; then the queue stops.
    world.side.deliver(2, 2, &payload(&[&long, &long])).unwrap();
    assert_eq!(world.counted(2), [1, 100, 1, 0, 1, 3]);
    assert_eq!(world.lost(2), []);
    world.side.stop_queue(2);
    assert_eq!(world.lost(2), [("stopped", 2)]);
    world.side.deliver(3, 2, &payload(&[&long])).unwrap();
    assert_eq!(world.lost(2), [("no_driver", 1), ("stopped", 2)]);
    assert_eq!(world.counted(2), [1, 100, 1, 0, 1, 3]);
    assert_eq!([0, 1].map(|queue| world.counted(queue)), [nothing; 2]);
    assert_eq!([0, 1].map(|queue| world.lost(queue)), [vec![], vec![]]);
}

#[test]
fn a_frame_is_refused_for_its_own_reason() {
    const TSO4: u64 = 1 << 11;
    let tcp = || {
        let mut frame = vec![0; 14 + 20 + 20 + 400];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[23] = 6;
        frame[34 + 12] = 5 << 4;
        frame
    };
    let honest = [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0];
    type Change = fn(&mut [u8; 12], &mut Vec<u8>);
    let lies: [(&str, Change); 7] = [
        ("too_short", |_, frame| frame.truncate(13)),
        ("too_long", |_, frame| frame.resize(65_536 + 18, 0)),
        ("not_negotiated", |header, _| header[1] = 4),
        ("checksum", |header, _| header[6..8].fill(0xff)),
        ("gso_kind", |header, _| header[1] = 2),
        ("gso_size", |header, _| header[4] = 7),
        ("gso_protocol", |_, frame| frame[23] = 17),
    ];
    for (number, (reason, lie)) in lies.into_iter().enumerate() {
        let mut world = World::new(1, VERSION_1 | CSUM | TSO4, true);
        let (mut header, mut frame) = (honest, tcp());
        lie(&mut header, &mut frame);
        world.send(TRANSMIT, &header, &frame);
        world.side.kick(TRANSMIT).unwrap();
        assert_eq!(world.lost(TRANSMIT), [(reason, 1)], "{number}");
        assert_eq!(world.counted(TRANSMIT), [0, 0, 1, 0, 1, 1]);
        assert_eq!(world.sent(), []);
    }
    let mut world = World::new(1, VERSION_1 | CSUM | TSO4, true);
    world.send(TRANSMIT, &honest, &tcp());
    world.side.kick(TRANSMIT).unwrap();
    assert_eq!((world.lost(TRANSMIT), world.sent().len()), (vec![], 1));
}

#[test]
fn a_full_ring_is_taken_in_parts_and_the_driver_asked_at_the_end() {
    let mut world = World::new(1, VERSION_1, true);
    for number in 0..64u8 {
        world.send(TRANSMIT, &[0; 12], &[number; 60]);
    }
    let first = world.side.kick(TRANSMIT).unwrap();
    assert!(first.more && first.found);
    assert_eq!(world.sent().len(), 64);
    let second = world.side.kick(TRANSMIT).unwrap();
    assert!(!second.more && !second.found);
    while world.drivers[1].take_used().is_some() {}
    world.drivers[1].wants_kick();
    world.send(TRANSMIT, &[0; 12], &[1; 60]);
    assert!(world.drivers[1].wants_kick());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Frames of any length into buffers of any length: what arrives is what was delivered, in order, whenever buffers come.
    #[test]
    fn every_frame_arrives_whole_and_in_order(frames in proptest::collection::vec(14usize..3000, 1..12), buffers in proptest::collection::vec(64u32..2000, 1..63), before in 0usize..60, event_idx in any::<bool>()) {
        let mut world = World::new(1, VERSION_1 | MRG_RXBUF, event_idx);
        let before = before.min(buffers.len());
        let add = |world: &mut World, from: usize, to: usize| {
            for (number, length) in (from as u64..).zip(&buffers[from..to]) {
                world.drivers[0].add(&[buffer(number, *length)]);
            }
        };
        add(&mut world, 0, before);
        let packets: Vec<_> = frames.iter().enumerate().map(|(number, length)| packet(&vec![number as u8; *length])).collect();
        let refs: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
        world.side.deliver(1, RECEIVE, &payload(&refs)).unwrap();
        add(&mut world, before, buffers.len());
        world.side.kick(RECEIVE).unwrap();
        let mut arrived = 0;
        while let Some((head, length)) = world.drivers[0].take_used() {
            let at = |head: u16| (1 << 20) + u64::from(head) * 0x1_0000;
            let mut bytes = world.drivers[0].read(at(head), length as usize);
            let count = u16::from_le_bytes([bytes[10], bytes[11]]);
            for _ in 1..count {
                let (head, length) = world.drivers[0].take_used().expect("the rest of the frame");
                bytes.extend(world.drivers[0].read(at(head), length as usize));
            }
            bytes[10..12].fill(0);
            prop_assert_eq!(&bytes, &packets[arrived]);
            arrived += 1;
        }
        prop_assert!(arrived == packets.len() || world.side.waits(0));
    }
}
