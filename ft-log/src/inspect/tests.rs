//! Small journals, whole and hurt in every way.

use std::{fs, path::Path};

use clap::Parser;
use ft_client::journal::{SEGMENT_HEADER_BYTES, SegmentHeader};
use ft_protocol::{
    DeviceId, Generation, Lsn, Position, Stop,
    entry::{Body, Entry},
};
use serde_json::Value;

use super::{Inspect, InspectError, run};
use crate::exit::Exit;

#[derive(Parser)]
struct CommandLine {
    #[command(subcommand)]
    inspect: Inspect,
}

/// In memory where that is possible: these tests write thousands of files.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    }
    .unwrap()
}

fn entry(lsn: u64, generation: u32) -> Vec<u8> {
    let stop = Stop {
        position: Position {
            exits: lsn * 10,
            ..Position::default()
        },
        digest: lsn,
    };
    let (device, body) = match lsn % 4 {
        0 => (DeviceId(0), Body::Kick(stop)),
        1 => (
            DeviceId(1),
            Body::Input {
                sequence: lsn,
                payload: b"a frame",
            },
        ),
        2 => (DeviceId::SHIM, Body::Time { stop, now_ns: 99 }),
        _ => (DeviceId(1), Body::Deliver { stop, through: lsn - 2 }),
    };
    let entry = Entry {
        lsn: Lsn(lsn),
        generation: Generation(generation),
        device,
        queue: 1,
        body,
    };
    let mut bytes = vec![0; body.frame_bytes()];
    entry.encode(&mut bytes);
    bytes
}

fn write_segment(directory: &Path, generation: u32, index: u32, lsns: std::ops::RangeInclusive<u64>) {
    let header = SegmentHeader {
        vm: "ledger".into(),
        generation: Generation(generation),
        index,
        first: Lsn(*lsns.start()),
    };
    let mut bytes = header.encode().to_vec();
    lsns.for_each(|lsn| bytes.extend(entry(lsn, generation)));
    fs::write(directory.join(header.file_name()), bytes).unwrap();
}

/// Runs a subcommand on a journal; the JSON objects it gave, or its lines as strings.
fn inspect(directory: &Path, arguments: &[&str]) -> (Exit, Vec<Value>) {
    let mut words = vec!["ft-log", arguments[0], directory.to_str().unwrap()];
    words.extend(&arguments[1..]);
    let mut out = Vec::new();
    let exit = run(&CommandLine::try_parse_from(words).unwrap().inspect, &mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    let value = |line: &str| serde_json::from_str(line).unwrap_or_else(|_| Value::String(line.to_owned()));
    (exit, text.lines().map(value).collect())
}

#[test]
fn verify_finds_every_flipped_bit() {
    let scratch = scratch();
    write_segment(scratch.path(), 1, 0, 1..=5);
    write_segment(scratch.path(), 1, 1, 6..=8);
    assert_eq!(inspect(scratch.path(), &["verify"]).0, Exit::Ordinary);
    for index in [0, 1] {
        let path = scratch.path().join(format!("ledger.g1.{index:06}.journal"));
        let good = fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, bad).unwrap();
            let (exit, found) = inspect(scratch.path(), &["verify", "--format", "json"]);
            assert_eq!(exit, Exit::DamagedJournal, "segment {index}, bit {bit}");
            let damage = found[0]["damage"].to_string();
            assert!(
                damage.contains(path.to_str().unwrap()),
                "segment {index}, bit {bit}: {damage}"
            );
            // Everything but the damaged entry, or but the segment whose header it is, is still counted.
            let lost = match (bit / 8 < SEGMENT_HEADER_BYTES, index) {
                (false, _) => 1,
                (true, 0) => 5,
                (true, _) => 3,
            };
            assert_eq!(found[0]["entries"], 8 - lost, "segment {index}, bit {bit}");
        }
        fs::write(&path, good).unwrap();
    }
}

#[test]
fn verify_finds_every_cut_and_cuts_the_torn_tail_off_when_asked_to() {
    let scratch = scratch();
    write_segment(scratch.path(), 1, 0, 1..=5);
    let path = scratch.path().join("ledger.g1.000000.journal");
    let good = fs::read(&path).unwrap();
    let mut ends = vec![SEGMENT_HEADER_BYTES];
    (1..=5).for_each(|lsn| ends.push(ends[lsn as usize - 1] + entry(lsn, 1).len()));
    for length in 0..good.len() {
        fs::write(&path, &good[..length]).unwrap();
        let (exit, found) = inspect(scratch.path(), &["verify", "--format", "json", "--cut-torn-tail"]);
        let whole = ends.iter().filter(|end| **end <= length).count().saturating_sub(1);
        assert_eq!(found[0]["entries"], whole, "cut at {length}");
        // An entry's end is an end like any other: nothing tells that there was more.
        let is_end = ends.contains(&length);
        assert_eq!(
            exit,
            if is_end { Exit::Ordinary } else { Exit::TornJournal },
            "cut at {length}"
        );
        if whole > 0 || is_end {
            assert_eq!(
                inspect(scratch.path(), &["verify"]).0,
                Exit::Ordinary,
                "cut at {length}"
            );
        }
    }
}

#[test]
fn verify_names_missing_segments_and_says_where_a_shortened_journal_begins() {
    let scratch = scratch();
    (0..4).for_each(|index| {
        write_segment(
            scratch.path(),
            1,
            index,
            u64::from(index) * 3 + 1..=u64::from(index) * 3 + 3,
        )
    });
    fs::remove_file(scratch.path().join("ledger.g1.000000.journal")).unwrap();
    let (exit, found) = inspect(scratch.path(), &["verify"]);
    assert_eq!(exit, Exit::Ordinary);
    assert!(found[1].to_string().contains("begins at entry 4"), "{found:?}");
    fs::remove_file(scratch.path().join("ledger.g1.000002.journal")).unwrap();
    let (exit, found) = inspect(scratch.path(), &["verify"]);
    assert_eq!(exit, Exit::DamagedJournal);
    assert!(
        found[0].to_string().contains("000002.journal: this segment is missing"),
        "{found:?}"
    );
}

#[test]
fn dump_shows_what_is_asked_for() {
    let scratch = scratch();
    write_segment(scratch.path(), 1, 0, 1..=8);
    write_segment(scratch.path(), 2, 0, 1..=4);
    let lsns = |arguments: &[&str]| -> Vec<(u64, u64)> {
        let arguments: Vec<_> = ["dump", "--format", "json"].iter().chain(arguments).copied().collect();
        let (exit, lines) = inspect(scratch.path(), &arguments);
        assert_eq!(exit, Exit::Ordinary);
        let number = |line: &Value, key: &str| line[key].as_u64().unwrap();
        lines
            .iter()
            .map(|line| (number(line, "generation"), number(line, "lsn")))
            .collect()
    };
    assert_eq!(lsns(&[]).len(), 12);
    assert_eq!(lsns(&["--generation", "2", "--lsn", "2..3"]), [(2, 2), (2, 3)]);
    assert_eq!(
        lsns(&["--kind", "kick,time", "--generation", "1"]),
        [(1, 2), (1, 4), (1, 6), (1, 8)]
    );
    let unknown = CommandLine::try_parse_from(["ft-log", "dump", "x", "--kind", "kicks"]);
    let unknown = unknown.err().unwrap().to_string();
    assert!(unknown.contains("kicks") && unknown.contains("power-off"), "{unknown}");
    assert_eq!(lsns(&["--device", "shim"]), [(1, 2), (1, 6), (2, 2)]);
    assert_eq!(lsns(&["--lsn", "7.."]), [(1, 7), (1, 8)]);
    assert_eq!(lsns(&["--limit", "3"]).len(), 3);
    let (_, lines) = inspect(
        scratch.path(),
        &["dump", "--format", "json", "--lsn", "1..2", "--payload"],
    );
    assert_eq!(
        (&lines[0]["kind"], &lines[0]["payload"]),
        (&"input".into(), &"61206672616d65".into())
    );
    assert_eq!((&lines[1]["exits"], &lines[1]["now_ns"]), (&20.into(), &99.into()));
    let (_, table) = inspect(scratch.path(), &["dump", "--lsn", "4"]);
    let row = table[1].as_str().unwrap();
    assert_eq!(
        row.split_whitespace().take(7).collect::<Vec<_>>(),
        ["4", "1", "kick", "0", "1", "60", "40"]
    );
}

#[test]
fn dump_and_stats_stop_at_damage_and_say_so() {
    let scratch = scratch();
    write_segment(scratch.path(), 1, 0, 1..=8);
    let path = scratch.path().join("ledger.g1.000000.journal");
    let mut bytes = fs::read(&path).unwrap();
    let third = SEGMENT_HEADER_BYTES + entry(1, 1).len() + entry(2, 1).len();
    bytes[third + 30] ^= 1;
    fs::write(&path, bytes).unwrap();
    let (exit, lines) = inspect(scratch.path(), &["dump"]);
    assert_eq!((exit, lines.len()), (Exit::DamagedJournal, 4));
    assert!(lines[3].as_str().unwrap().contains("entry 3 at byte"));
    let (exit, found) = inspect(scratch.path(), &["stats", "--format", "json"]);
    assert_eq!((exit, &found[0]["entries"]), (Exit::DamagedJournal, &2.into()));
    assert!(found[0]["reason"].as_str().unwrap().contains("entry 3"));
}

#[test]
fn stats_add_up() {
    let scratch = scratch();
    write_segment(scratch.path(), 3, 0, 1..=6);
    write_segment(scratch.path(), 3, 1, 7..=8);
    let (exit, found) = inspect(scratch.path(), &["stats", "--format", "json"]);
    let bytes: usize = (1..=8).map(|lsn| entry(lsn, 3).len()).sum();
    let stats = &found[0];
    assert_eq!(
        (exit, &stats["entries"], &stats["bytes"]),
        (Exit::Ordinary, &8.into(), &bytes.into())
    );
    assert_eq!(
        (&stats["lsns"], &stats["segments"]),
        (&serde_json::json!([1, 8]), &2.into())
    );
    assert_eq!(stats["kinds"]["input"]["entries"], 2);
    assert_eq!(stats["devices"]["1"]["entries"], 4);
    assert_eq!(stats["exits"], serde_json::json!([20, 80]));
}

#[test]
fn what_cannot_be_read_is_no_verdict() {
    let scratch = scratch();
    let words = |journal: &Path, more: &[&str]| {
        let mut words = vec!["ft-log".to_owned(), "verify".to_owned(), journal.display().to_string()];
        words.extend(more.iter().map(|word| (*word).to_owned()));
        run(&CommandLine::try_parse_from(words).unwrap().inspect, &mut Vec::new())
    };
    assert!(matches!(
        words(&scratch.path().join("none"), &[]),
        Err(InspectError::Journal(_))
    ));
    assert!(matches!(words(scratch.path(), &[]), Err(InspectError::Journal(_))));
    write_segment(scratch.path(), 1, 0, 1..=2);
    let error = words(scratch.path(), &["--generation", "7"]).unwrap_err().to_string();
    assert!(error.contains("'ledger' generation 1"), "{error}");
}
