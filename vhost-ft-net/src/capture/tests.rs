//! Captures without a device.

use std::path::Path;

use pcap_file::pcapng::{Block, PcapNgReader};
use serde_json::Value;
use tempfile::TempDir;

use super::*;

const LIMIT: u64 = 1 << 20;

/// Kind, time and bytes of each frame of a file, which is whole.
fn read(path: &Path) -> Vec<(u32, Duration, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let mut reader = PcapNgReader::new(&bytes[..]).unwrap();
    let mut frames = Vec::new();
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(packet) = block.unwrap() {
            assert_eq!(packet.original_len as usize, packet.data.len());
            frames.push((packet.interface_id, packet.timestamp, packet.data.to_vec()));
        }
    }
    let names: Vec<_> = reader
        .interfaces()
        .iter()
        .map(|interface| format!("{:?}", interface.options[0]))
        .collect();
    for (name, (_, kind)) in names.iter().zip(Kind::ALL) {
        assert!(name.contains(kind), "{name} is not {kind}");
    }
    frames
}

struct World {
    directory: TempDir,
    recorder: Recorder,
    writer: Writer,
    counters: Counters,
}

impl World {
    fn new(bytes_max: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let events = Events::open("net", Some(&directory.path().join("events"))).unwrap();
        let (recorder, writer) = start(directory.path().join("pcap"), bytes_max, "tap0", events).unwrap();
        Self {
            directory,
            recorder,
            writer,
            counters: Counters::own(2),
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("pcap")
    }

    fn counted(&self) -> [u64; 2] {
        [OfDevice::Captured, OfDevice::CaptureLost].map(|what| self.counters.of_device(what))
    }

    /// The event of its end.
    fn ended(directory: &TempDir) -> Value {
        let events = std::fs::read_to_string(directory.path().join("events")).unwrap();
        assert_eq!(events.lines().count(), 1);
        serde_json::from_str(&events).unwrap()
    }
}

#[test]
fn what_was_noted_reads_back_in_order_with_its_time() {
    let world = World::new(LIMIT);
    let mut capture = world.recorder.capture().unwrap();
    let before = wall_ns();
    let noted: Vec<(Kind, Vec<u8>)> = (0..300usize)
        .map(|number| (Kind::ALL[number % 5].0, vec![number as u8; 14 + number * 7]))
        .collect();
    for (kind, frame) in &noted {
        capture.note(*kind, frame, &world.counters);
    }
    let after = wall_ns();
    let path = world.path();
    assert_eq!(world.counted(), [300, 0]);
    world.writer.finish();
    let found = read(&path);
    assert_eq!(found.len(), noted.len());
    for ((interface, _, frame), (kind, bytes)) in found.iter().zip(&noted) {
        assert_eq!((*interface, frame), (*kind as u32, bytes));
    }
    assert!(found.iter().map(|(_, time, _)| time).is_sorted());
    assert!(found[0].1 >= Duration::from_nanos(before) && found[299].1 <= Duration::from_nanos(after));
    let ended = World::ended(&world.directory);
    assert_eq!(ended["event"], "capture_ended");
    assert_eq!(ended["frames"], 300);
    assert_eq!(ended["bytes"], std::fs::metadata(&path).unwrap().len());
}

#[test]
fn a_capture_ends_at_its_limit_with_whole_blocks() {
    let world = World::new(LIMIT);
    let mut capture = world.recorder.capture().unwrap();
    let frame = [7; 1500];
    // Twice as much as it may have, and less than a ring holds.
    for _ in 0..2 * LIMIT / 1500 {
        capture.note(Kind::Received, &frame, &world.counters);
    }
    let path = world.path();
    world.writer.finish();
    let frames = read(&path).len() as u64;
    let bytes = std::fs::metadata(&path).unwrap().len();
    assert!(bytes <= LIMIT && bytes + 1532 > LIMIT, "{bytes} bytes");
    let ended = World::ended(&world.directory);
    assert!(ended["reason"].as_str().unwrap().contains("limit"), "{ended}");
    assert_eq!((&ended["frames"], &ended["bytes"]), (&frames.into(), &bytes.into()));
    // Over is over.
    let counted = [OfDevice::Captured, OfDevice::CaptureLost].map(|what| world.counters.of_device(what));
    capture.note(Kind::Received, &frame, &world.counters);
    let now = [OfDevice::Captured, OfDevice::CaptureLost].map(|what| world.counters.of_device(what));
    assert_eq!(now, counted);
}

#[test]
fn without_room_a_copy_is_not_made_and_counted() {
    let memory = ring::create("test").unwrap();
    let shared = Arc::new(Shared {
        bell: EventFd::new(0).unwrap(),
        over: AtomicBool::new(false),
        stop: AtomicBool::new(false),
    });
    let mut consumer = Consumer::new(memory.fd().try_clone_to_owned().unwrap()).unwrap();
    let mut capture = Capture {
        ring: Producer::on(memory),
        shared,
    };
    let counters = Counters::own(2);
    let frame = vec![1; 60_000];
    (0..200).for_each(|_| capture.note(Kind::Held, &frame, &counters));
    let counted = || [OfDevice::Captured, OfDevice::CaptureLost].map(|what| counters.of_device(what));
    let [captured, lost] = counted();
    assert_eq!(captured + lost, 200);
    assert!(captured >= 100 && lost >= 50, "{captured} {lost}");
    // Room again.
    let mut bytes = Vec::new();
    for _ in 0..2 {
        consumer.pop(&mut bytes).unwrap();
    }
    capture.note(Kind::Held, &frame, &counters);
    assert_eq!(counted(), [captured + 1, lost]);
}

#[test]
fn the_file_of_before_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pcap");
    std::fs::write(&path, "precious").unwrap();
    let events = || Events::open("net", None).unwrap();
    let (_, writer) = start(path.clone(), LIMIT, "tap0", events()).unwrap();
    writer.finish();
    assert_eq!(read(&path), []);
    assert_eq!(std::fs::read(directory.path().join("pcap.old")).unwrap(), b"precious");
    let nowhere = start(directory.path().join("nowhere/pcap"), LIMIT, "tap0", events());
    assert!(nowhere.unwrap_err().to_string().contains("nowhere/pcap"));
}
