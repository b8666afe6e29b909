//! A journal reads back, a torn tail is an end, and every other change is reported with its place.

use ft_protocol::{
    entry::{Body, Stop},
    ids::DeviceId,
};

use super::*;

fn entry_bytes(lsn: u64) -> Vec<u8> {
    let payload = vec![lsn as u8; 10 + lsn as usize % 50];
    let body = match lsn % 3 {
        0 => Body::Sync(Stop::default()),
        1 => Body::Input {
            sequence: lsn,
            payload: &payload,
        },
        _ => Body::Time {
            stop: Stop::default(),
            now_ns: lsn,
        },
    };
    let entry = Entry {
        lsn: Lsn(lsn),
        generation: Generation(1),
        device: DeviceId(0),
        queue: 0,
        body,
    };
    let mut bytes = vec![0; body.frame_bytes()];
    entry.encode(&mut bytes);
    bytes
}

fn segment(index: u32, lsns: std::ops::RangeInclusive<u64>) -> (String, Vec<u8>) {
    let header = SegmentHeader {
        vm: "ledger".into(),
        generation: Generation(1),
        index,
        first: Lsn(*lsns.start()),
    };
    let mut bytes = header.encode().to_vec();
    lsns.for_each(|lsn| bytes.extend(entry_bytes(lsn)));
    (header.file_name(), bytes)
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ft-journal-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, (name, bytes): &(String, Vec<u8>)) {
        fs::write(self.0.join(name), bytes).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn read_all(directory: &Path) -> Result<(u64, Option<TornTail>), JournalError> {
    let mut reader = JournalReader::open(directory)?;
    let mut last = 0;
    while let Some((entry, bytes)) = reader.next_entry()? {
        last += 1;
        assert_eq!((entry.lsn, bytes), (Lsn(last), entry_bytes(last).as_slice()));
    }
    Ok((last, reader.torn_tail().cloned()))
}

#[test]
fn headers_and_names_read_back() {
    let header = SegmentHeader {
        vm: "a.g7.b".into(),
        generation: Generation(12),
        index: 3,
        first: Lsn(1 << 40),
    };
    assert_eq!(SegmentHeader::decode(&header.encode()), Ok(header.clone()));
    let (name, index) = parse_file_name(&header.file_name()).unwrap();
    assert_eq!((name.vm, name.generation, index), (header.vm, header.generation, 3));
    assert_eq!(parse_file_name("ledger.g1.journal"), None);
}

#[test]
fn segments_are_read_in_order_as_one_log() {
    let scratch = Scratch::new("order");
    scratch.write(&segment(0, 1..=20));
    scratch.write(&segment(1, 21..=25));
    assert_eq!(read_all(&scratch.0).unwrap(), (25, None));
    fs::remove_file(scratch.0.join("ledger.g1.000000.journal")).unwrap();
    assert!(matches!(read_all(&scratch.0), Err(JournalError::Missing { .. })));
}

#[test]
fn every_cut_is_a_torn_tail_with_all_whole_entries_before_it() {
    let scratch = Scratch::new("torn");
    let (name, bytes) = segment(0, 1..=9);
    let mut ends = vec![SEGMENT_HEADER_BYTES];
    (1..=9).for_each(|lsn| ends.push(ends[lsn as usize - 1] + entry_bytes(lsn).len()));
    for length in 0..bytes.len() {
        scratch.write(&(name.clone(), bytes[..length].to_vec()));
        let (whole, torn) = read_all(&scratch.0).unwrap();
        let expected = ends.iter().skip(1).filter(|end| **end <= length).count();
        assert_eq!(whole as usize, expected, "cut at {length}");
        assert_eq!(torn.is_some(), !ends.contains(&length), "cut at {length}");
    }
    let zeros = [bytes.clone(), vec![0; 5000]].concat();
    scratch.write(&(name, zeros));
    let (whole, torn) = read_all(&scratch.0).unwrap();
    assert_eq!((whole, torn.unwrap().offset as usize), (9, bytes.len()));
}

#[test]
fn every_flipped_byte_is_reported_at_its_entry() {
    let scratch = Scratch::new("flip");
    let (name, bytes) = segment(0, 1..=6);
    let mut ends = vec![SEGMENT_HEADER_BYTES];
    (1..=6).for_each(|lsn| ends.push(ends[lsn as usize - 1] + entry_bytes(lsn).len()));
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << bit;
            scratch.write(&(name.clone(), bad));
            let error = read_all(&scratch.0).expect_err("a flipped bit was not seen");
            if at < SEGMENT_HEADER_BYTES {
                assert!(matches!(error, JournalError::Segment { .. }));
                continue;
            }
            let whole = ends.iter().filter(|end| **end <= at).count();
            let JournalError::Damaged {
                offset, lsn, last_good, ..
            } = &error
            else {
                panic!("byte {at}: {error}");
            };
            assert_eq!(
                (*offset as usize, lsn.0 as usize),
                (ends[whole - 1], whole),
                "byte {at}: {error}"
            );
            assert_eq!(last_good.lsn.0 as usize, whole - 1);
            assert!(error.to_string().contains(&format!("entry {whole} at byte {offset}")));
        }
    }
}

#[test]
fn a_segment_that_is_cut_before_another_one_is_damage() {
    let scratch = Scratch::new("cut");
    let (name, bytes) = segment(0, 1..=9);
    scratch.write(&(name, bytes[..bytes.len() - 3].to_vec()));
    scratch.write(&segment(1, 10..=12));
    let error = read_all(&scratch.0).unwrap_err();
    assert!(
        matches!(
            &error,
            JournalError::Damaged {
                lsn: Lsn(9),
                defect: Defect::Cut,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn several_journals_in_a_directory_are_not_guessed_about() {
    let scratch = Scratch::new("several");
    assert!(matches!(
        JournalReader::open(&scratch.0),
        Err(JournalError::Nothing { .. })
    ));
    scratch.write(&segment(0, 1..=2));
    scratch.write(&("other.g1.000000.journal".into(), Vec::new()));
    let error = JournalReader::open(&scratch.0).unwrap_err().to_string();
    assert!(
        error.contains("'ledger' generation 1") && error.contains("'other'"),
        "{error}"
    );
    let name = JournalName {
        vm: "ledger".into(),
        generation: Generation(1),
    };
    assert!(JournalReader::open_named(&scratch.0, name).is_ok());
}

#[test]
fn what_is_behind_damage_can_still_be_looked_at() {
    let scratch = Scratch::new("skip");
    let (name, mut bytes) = segment(0, 1..=9);
    // One bit in entry 3, one in the header of the second of three segments.
    let third = SEGMENT_HEADER_BYTES + entry_bytes(1).len() + entry_bytes(2).len();
    bytes[third + 30] ^= 1;
    scratch.write(&(name, bytes));
    let (name, mut bytes) = segment(1, 10..=12);
    bytes[20] ^= 1;
    scratch.write(&(name, bytes));
    scratch.write(&segment(2, 13..=14));
    let mut reader = JournalReader::open(&scratch.0).unwrap();
    let (mut lsns, mut errors) = (Vec::new(), Vec::new());
    loop {
        match reader.next_entry() {
            Ok(Some((entry, _))) => lsns.push(entry.lsn.0),
            Ok(None) => break,
            Err(error) => {
                errors.push(error.to_string());
                if !reader.skip_damage() {
                    break;
                }
            }
        }
    }
    assert_eq!(lsns, [1, 2, 4, 5, 6, 7, 8, 9, 13, 14]);
    assert_eq!(errors.len(), 2);
    assert!(
        errors[0].contains("entry 3 at byte") && errors[1].contains("checksum of its header"),
        "{errors:?}"
    );
}

#[test]
fn a_journal_that_keeps_its_last_segments_only_is_read_from_there_when_asked_to() {
    let scratch = Scratch::new("retained");
    scratch.write(&segment(2, 21..=25));
    scratch.write(&segment(3, 26..=27));
    assert!(matches!(
        JournalReader::open(&scratch.0),
        Err(JournalError::Missing { .. })
    ));
    let name = journals(&scratch.0).unwrap().remove(0);
    let mut reader = JournalReader::open_retained(&scratch.0, name.clone()).unwrap();
    let mut lsns = Vec::new();
    while let Some((entry, _)) = reader.next_entry().unwrap() {
        lsns.push(entry.lsn.0);
    }
    assert_eq!((reader.first_index(), lsns), (2, (21..=27).collect()));
    // One in the middle is another matter.
    scratch.write(&segment(5, 40..=41));
    assert!(matches!(
        JournalReader::open_retained(&scratch.0, name),
        Err(JournalError::Missing { .. })
    ));
    let mut one = JournalReader::open_segment_file(&scratch.0.join("ledger.g1.000005.journal")).unwrap();
    assert_eq!(one.next_entry().unwrap().unwrap().0.lsn, Lsn(40));
}

#[test]
fn a_torn_tail_that_was_cut_off_leaves_a_whole_journal() {
    let scratch = Scratch::new("cut-off");
    let (name, bytes) = segment(0, 1..=4);
    for length in [bytes.len() - 3, SEGMENT_HEADER_BYTES + 1, SEGMENT_HEADER_BYTES - 1, 0] {
        scratch.write(&(name.clone(), bytes[..length].to_vec()));
        let (whole, torn) = read_all(&scratch.0).unwrap();
        let torn = torn.unwrap();
        torn.cut(&JournalLock::of_segment(&torn.path).unwrap()).unwrap();
        match read_all(&scratch.0) {
            Ok(read) => assert_eq!(read, (whole, None)),
            Err(error) => assert!(length < SEGMENT_HEADER_BYTES && matches!(error, JournalError::Nothing { .. })),
        }
    }
}

#[test]
fn a_journal_has_one_lock_at_a_time() {
    let scratch = Scratch::new("lock");
    let segment = scratch.0.join("ledger.g1.000000.journal");
    let held = JournalLock::take(&scratch.0, "ledger").unwrap();
    assert!(held.covers(&segment) && !held.covers(&scratch.0.join("other.g1.000000.journal")));
    let refused = JournalLock::of_segment(&segment).unwrap_err();
    assert!(matches!(refused, LockError::Held { .. }));
    for part in [
        "VM 'ledger'",
        &format!("process {}", std::process::id()),
        "end that one",
    ] {
        assert!(refused.to_string().contains(part), "'{part}' is not in: {refused}");
    }
    let other = JournalLock::take(&scratch.0, "other").unwrap();
    drop((held, other));
    assert_eq!(
        fs::read_dir(&scratch.0).unwrap().count(),
        0,
        "the files go with the locks"
    );
    // What a process left that was killed.
    fs::write(scratch.0.join("ledger.lock"), "1").unwrap();
    JournalLock::of_segment(&segment).unwrap();
    assert!(JournalLock::of_segment(&scratch.0.join("ledger.txt")).is_err());
}

/// Found by a fuzzer: behind the last LSN there is is no further one.
#[test]
fn impossible_lsns_are_damage() {
    let scratch = Scratch::new("impossible");
    let (name, mut bytes) = segment(0, 1..=1);
    bytes.extend(entry_bytes(9));
    bytes.extend(entry_bytes(u64::MAX));
    bytes.extend(entry_bytes(u64::MAX));
    scratch.write(&(name, bytes));
    let mut reader = JournalReader::open(&scratch.0).unwrap();
    assert_eq!(reader.next_entry().unwrap().unwrap().0.lsn, Lsn(1));
    assert!(reader.next_entry().is_err() && reader.skip_damage());
    assert_eq!(reader.next_entry().unwrap().unwrap().0.lsn, Lsn(9));
    assert!(reader.next_entry().is_err() && !reader.skip_damage());
    for first in [0, u64::MAX] {
        let header = SegmentHeader {
            vm: "ledger".into(),
            generation: Generation(1),
            index: 0,
            first: Lsn(first),
        };
        assert!(SegmentHeader::decode(&header.encode()).is_err());
    }
}

/// Found by a fuzzer: behind damage the next segment may say where it begins, but not that the log went back.
#[test]
fn a_log_does_not_go_back_behind_damage() {
    let scratch = Scratch::new("back");
    let (name, mut bytes) = segment(0, 1..=2);
    bytes.extend(entry_bytes(20));
    scratch.write(&(name, bytes));
    scratch.write(&segment(1, 3..=5));
    scratch.write(&segment(2, 21..=22));
    let mut reader = JournalReader::open(&scratch.0).unwrap();
    let mut lsns = Vec::new();
    loop {
        match reader.next_entry() {
            Ok(Some((entry, _))) => lsns.push(entry.lsn.0),
            Ok(None) => break,
            Err(_) => assert!(reader.skip_damage()),
        }
    }
    assert_eq!(lsns, [1, 2, 20, 21, 22]);
}
