//! A bit flips in the backup's guest memory: the backup notices, says where and with which registers, and ends; the primary
//! goes on alone, and what it remembers names the first stop at which the two were not the same.

mod lab;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ft_harness::faults::{Fault, FaultPlan, Moment};
use ft_harness::judge::Connection;
use ft_harness::pair::{Pair, VM};
use ft_harness::process::Exit;
use ft_harness::roles::{FT_LOG, SHIM};
use ft_harness::topology::{GUEST, HostId};
use ft_harness::witness::{Plan, Witness};
use lab::{Build, setup, variable};
use serde_json::Value;

/// Daemons of a host in the order they are started: the shim comes last.
const SHIM_INDEX: usize = 3;
/// A constant of SHA-256 as it stands in the guest's code. With another one every hash of the ledger is another.
const SHA_CONSTANT: [u8; 4] = 0xb5c0_fbcf_u32.to_le_bytes();

/// The guest memory of a shim, as its host could damage it.
fn guest_memory(process_id: u32) -> File {
    let descriptors = fs::read_dir(format!("/proc/{process_id}/fd")).expect("the shim runs");
    let memory = descriptors
        .map(|entry| entry.expect("a descriptor").path())
        .find(|path| fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("guest-ram")))
        .expect("the shim has guest memory");
    File::options()
        .read(true)
        .write(true)
        .open(memory)
        .expect("root may open it")
}

/// Flips a bit in each copy of the constant; how many there were.
fn flip_a_bit(memory: &File) -> usize {
    let mut bytes = vec![0; usize::try_from(memory.metadata().expect("a size").len()).expect("it fits")];
    memory.read_exact_at(&mut bytes, 0).expect("readable");
    let places: Vec<usize> = bytes
        .windows(SHA_CONSTANT.len())
        .enumerate()
        .filter_map(|(at, window)| (window == SHA_CONSTANT).then_some(at))
        .collect();
    for at in &places {
        memory
            .write_all_at(&[SHA_CONSTANT[0] ^ 1], *at as u64)
            .expect("writable");
    }
    places.len()
}

fn bisect(arguments: &[&Path]) -> (Option<i32>, String, Value) {
    let output = Command::new(Build::Release.directory().join("ft-vcpu-shim"))
        .arg("bisect")
        .args(arguments)
        .output()
        .expect("the shim runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let json = text.lines().find(|line| line.starts_with('{')).unwrap_or("null");
    let json = serde_json::from_str(json).expect("JSON");
    (output.status.code(), text, json)
}

#[test]
fn a_flipped_bit_on_the_backup_is_found_reported_and_survived() {
    let directory = tempfile::tempdir().expect("a directory");
    let moment = Moment {
        answers: 1,
        offset: Duration::ZERO,
    };
    let setup = setup(Build::Release, 83, FaultPlan::At(Fault::None, moment));
    let deadline = Instant::now() + setup.guest.patience().boot;
    let mut pair = Pair::new(setup.pair(), directory.path()).expect("a pair");
    pair.start(deadline).expect("it starts");
    pair.wait_for_pairing(deadline).expect("paired");
    pair.wait_for_guest(deadline).expect("a guest");
    let stream = Witness::connect(pair.topology().client(), GUEST.into(), deadline).expect("connected");
    let plan = Plan {
        seed: setup.seed,
        records: setup.records,
        rate: setup.rate,
        patience: Duration::from_secs(30),
    };
    let witness = Witness::start(stream, plan).expect("a witness");
    assert!(witness.wait_until(|progress| progress.answered >= 20), "20 records");
    let backup = pair.host(HostId::B).process_id(SHIM_INDEX).expect("a shim");
    assert!(flip_a_bit(&guest_memory(backup)) > 0, "the guest has no such constant");

    let soon = Instant::now() + Duration::from_secs(30);
    let ended = pair.wait_for_exit(HostId::B, SHIM, soon).expect("the backup ends");
    assert_eq!(ended, Exit::Code(5));
    let transcript = witness.finish();
    assert_eq!(transcript.connection, Connection::Intact, "the primary goes on");
    pair.wait_for_exit(HostId::A, SHIM, soon).expect("the power-off");

    let events = pair.events().all();
    let diverged = events
        .iter()
        .find(|event| event.is(HostId::B, SHIM, "diverged"))
        .expect("an event");
    assert!(diverged.number("entry").is_some() && diverged.text("what").is_some());
    assert!(
        events.iter().any(|event| event.is(HostId::A, FT_LOG, "backup_gone")),
        "the primary does not know that it is unprotected"
    );
    let file =
        |host: &str, kind: &str| -> PathBuf { directory.path().join(host).join(format!("journal/{VM}.g1.{kind}")) };
    let text = fs::read_to_string(file("B", "diverged.txt")).expect("a report");
    for part in [
        "registers of the replay",
        "instructions around",
        "log and replay agreed at entry",
    ] {
        assert!(text.contains(part), "'{part}' is missing: {text}");
    }

    // Both sides' registers: what the backup reported, and what the primary remembered.
    let (report, stops) = (file("B", "diverged.json"), file("A", "stops.jsonl"));
    let (status, text, found) = bisect(&["--report".as_ref(), &report, "--stops".as_ref(), &stops]);
    assert_eq!(status, Some(1), "{text}");
    let exits = found["exits"].as_u64().expect("a stop");
    assert!(exits <= diverged.number("exits").expect("a stop"), "{text}");
    assert!(text.contains("recorded         replayed"), "{text}");

    // The primary's own journal, replayed, is what the primary did, at every stop and not only at those in the log.
    let cmdline = format!("ip={}/24 port={}", GUEST.ip(), GUEST.port());
    let guest = variable("FT_GUEST");
    let journal = directory.path().join("A/journal");
    let machine: [&Path; 5] = [
        &journal,
        "--kernel".as_ref(),
        &guest,
        "--cmdline".as_ref(),
        cmdline.as_ref(),
    ];
    let arguments = [&machine[..], &["--stops".as_ref(), &stops]].concat();
    // The journal is that of the pair; the primary's stops begin with it and end where it lost its backup.
    let (status, text, _) = bisect(&arguments);
    assert_eq!(status, Some(0), "{text}");
}
