//! Both sides' journals hold exactly the log, and every damage is found where it is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use ft_client::journal::{JournalError, JournalReader, SEGMENT_HEADER_BYTES};
use ft_protocol::{
    DeviceId, Lsn, Role,
    entry::{Body, Entry},
    limits::PAYLOAD_BYTES_MAX,
};
use nix::sys::signal::Signal;

use crate::world::{DEADLINE, Daemon, FINGERPRINT, Host, HostId, SUSPICIOUS, VM, World};

/// The frames in a journal, and whether its tail is torn.
fn read(directory: &Path) -> Result<(Vec<u8>, Lsn, bool), JournalError> {
    let mut reader = JournalReader::open(directory)?;
    let mut all = Vec::new();
    while let Some((_, bytes)) = reader.next_entry()? {
        all.extend_from_slice(bytes);
    }
    Ok((all, reader.last_good().lsn, reader.torn_tail().is_some()))
}

/// Runs a pair to its power-off; what the backup replayed.
fn run_to_the_end(world: &World, entries: u64) -> (Vec<u8>, Lsn) {
    let (mut a, mut b) = world.pair();
    a.append(entries);
    let last = a.power_off();
    assert_eq!(a.daemon.wait_code(), 0);
    let replayed = b.replay_through(Lsn(1), last);
    assert_eq!(b.daemon.wait_code(), 0);
    (replayed, last)
}

#[test]
fn both_journals_hold_the_log_as_it_was_replayed() {
    let world = World::new();
    let (replayed, last) = run_to_the_end(&world, 1000);
    for host in [HostId::A, HostId::B] {
        let (journal, end, torn) = read(&world.journal(host)).unwrap();
        assert!(journal == replayed, "the journal of {host:?} is another log");
        assert_eq!((end, torn), (last, false));
    }
}

/// Waits until a file of a journal has so many bytes: it is written beside the log, not before it.
fn wait_written(directory: &Path, bytes: u64) {
    let deadline = Instant::now() + DEADLINE;
    let has_them = || {
        let mut files = fs::read_dir(directory).unwrap();
        files.any(|file| file.unwrap().metadata().unwrap().len() >= bytes)
    };
    while !has_them() {
        assert!(Instant::now() < deadline, "nothing is written");
        std::thread::yield_now();
    }
}

fn only_file(directory: &Path) -> PathBuf {
    let mut segments = ft_client::journal::segments(directory).unwrap();
    assert_eq!(segments.len(), 1, "{segments:?}");
    segments.remove(0).path
}

#[test]
fn a_flipped_byte_is_reported_with_its_entry_and_place_and_a_torn_tail_is_an_end() {
    let world = World::new();
    let (replayed, last) = run_to_the_end(&world, 50);
    let path = only_file(&world.journal(HostId::B));
    let good = fs::read(&path).unwrap();
    // Entry 20 and where it starts.
    let mut start = SEGMENT_HEADER_BYTES;
    for _ in 1..20 {
        start += u32::from_le_bytes(good[start..start + 4].try_into().unwrap()) as usize;
    }
    let mut bad = good.clone();
    bad[start + 30] ^= 0x10;
    fs::write(&path, &bad).unwrap();
    let error = read(&world.journal(HostId::B)).unwrap_err().to_string();
    for part in [
        path.display().to_string(),
        format!("entry 20 at byte {start}"),
        "last good entry is 19".into(),
    ] {
        assert!(error.contains(&part), "'{part}' is not in: {error}");
    }
    fs::write(&path, &good[..good.len() - 5]).unwrap();
    let (whole, end, torn) = read(&world.journal(HostId::B)).unwrap();
    assert_eq!((end.0, torn), (last.0 - 1, true));
    assert!(replayed.starts_with(&whole));
}

#[test]
fn a_long_log_goes_on_in_further_segments() {
    let world = World::new();
    let (mut a, mut b) = world.pair();
    let payload = vec![0x5a; PAYLOAD_BYTES_MAX];
    let count = 150;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for sequence in 1..=count {
                let body = Body::Input {
                    sequence,
                    payload: &payload,
                };
                a.devices[0]
                    .log
                    .append(DeviceId(0), 0, &body, ft_client::log::Urgency::Now)
                    .unwrap();
            }
        });
        b.replay_through(Lsn(1), Lsn(count));
    });
    a.wait_committed(Lsn(count));
    a.power_off();
    b.replay_through(Lsn(count + 1), Lsn(count + 1));
    for host in [&mut a, &mut b] {
        assert_eq!(host.daemon.wait_code(), 0, "{}", host.daemon.logged);
    }
    for host in [HostId::A, HostId::B] {
        assert_eq!(fs::read_dir(world.journal(host)).unwrap().count(), 2);
        let (_, end, torn) = read(&world.journal(host)).unwrap();
        assert_eq!((end, torn), (Lsn(count + 1), false));
    }
}

#[test]
fn what_a_killed_daemon_wrote_is_a_prefix_of_the_log() {
    let world = World::new();
    let (mut a, mut b) = world.pair_with(SUSPICIOUS);
    let last = a.append(5000);
    a.wait_committed(last);
    a.daemon.signal(Signal::SIGKILL);
    a.daemon.wait();
    let replayed = b.replay_through(Lsn(1), last);
    let (journal, ..) = read(&world.journal(HostId::A)).unwrap();
    assert!(replayed.starts_with(&journal));
    b.wait_role(Role::Live);
    // The backup's ended in good order when it went live.
    b.daemon.signal(Signal::SIGTERM);
    assert_eq!(b.daemon.wait_code(), 0);
    let (journal, end, torn) = read(&world.journal(HostId::B)).unwrap();
    assert!(journal == replayed);
    assert_eq!((end, torn), (last, false));
}

#[test]
fn a_full_disk_ends_the_journal_and_not_the_vm() {
    let world = World::new();
    let daemon = world.start_limited(HostId::A, &["--vm", VM]);
    let mut a = Host::join(daemon, &world.socket(HostId::A), &FINGERPRINT);
    let mut b = world.host_with(HostId::B, &[]);
    b.wait_role(Role::Replaying);
    a.wait_role(Role::Recording);
    let count = 12_000;
    std::thread::scope(|scope| {
        let (shim, devices) = (&mut a.locals.shim, &mut a.locals.devices);
        scope.spawn(move || crate::world::append(shim, devices, count));
        b.replay_through(Lsn(1), Lsn(count));
    });
    a.wait_committed(Lsn(count));
    a.daemon.wait_event("journal_failed");
    let line = a.daemon.wait_log("the journal ends here");
    assert!(
        line.contains("cannot write") && line.contains("goes on without a journal"),
        "{line}"
    );
    a.power_off();
    assert_eq!(a.daemon.wait_code(), 0);
    // What is there can be used.
    let mut reader = JournalReader::open(&world.journal(HostId::A)).unwrap();
    let mut last = Lsn::ZERO;
    while let Some((Entry { lsn, .. }, _)) = reader.next_entry().unwrap() {
        last = lsn;
    }
    assert!(last > Lsn(1000));
}

#[test]
fn a_journal_keeps_as_many_segments_as_it_is_told_to() {
    let world = World::new();
    let (mut a, mut b) = world.pair_with(&["--journal-segment-kib", "64", "--journal-keep-segments", "3"]);
    let mut last = Lsn::ZERO;
    // A segment ends between batches: many small ones.
    for _ in 0..40 {
        last = a.append(20);
        a.wait_committed(last);
    }
    b.replay_through(Lsn(1), last);
    let last = a.power_off();
    b.replay_through(last, last);
    for (host, id) in [(&mut a, HostId::A), (&mut b, HostId::B)] {
        assert_eq!(host.daemon.wait_code(), 0, "{}", host.daemon.logged);
        let mut files: Vec<_> = fs::read_dir(world.journal(id))
            .unwrap()
            .map(|file| file.unwrap().path())
            .collect();
        files.sort();
        assert_eq!(files.len(), 3, "{files:?}");
        let name = ft_client::journal::journals(&world.journal(id)).unwrap().remove(0);
        assert!(matches!(
            JournalReader::open(&world.journal(id)),
            Err(JournalError::Missing { .. })
        ));
        let mut reader = JournalReader::open_retained(&world.journal(id), name).unwrap();
        while reader.next_entry().unwrap().is_some() {}
        assert_eq!((reader.last_good().lsn, reader.torn_tail()), (last, None));
    }
}

#[test]
fn a_full_disk_ends_this_side_where_that_is_the_policy_and_the_other_one_goes_on() {
    let world = World::new();
    let daemon = world.start_limited(HostId::A, &["--vm", VM, "--journal-failure", "stop"]);
    let mut a = Host::join(daemon, &world.socket(HostId::A), &FINGERPRINT);
    let mut b = world.host_with(HostId::B, &[]);
    a.wait_role(Role::Recording);
    let mut replayed = Lsn::ZERO;
    let mut replay = |b: &mut Host| {
        while let Some(lsn) = b.try_replay() {
            replayed = lsn;
        }
        b.consumed(replayed);
    };
    // The disk may be full in the middle of it.
    while a.region().role() == Role::Recording && a.try_append(100).is_ok() {
        replay(&mut b);
    }
    while b.region().role() != Role::Live {
        replay(&mut b);
    }
    assert_eq!(a.daemon.wait_event("journal_failed")["stops"], true);
    assert_eq!(a.daemon.wait_code(), 3);
    assert!(
        a.daemon.logged.contains("so does this side (--journal-failure)"),
        "{}",
        a.daemon.logged
    );
}

#[test]
fn a_restart_recovers_the_journal_of_the_earlier_run_and_puts_it_aside() {
    let world = World::new();
    let (mut a, b) = world.pair();
    let last = a.append(500);
    a.wait_committed(last);
    wait_written(&world.journal(HostId::A), 100_000);
    a.daemon.signal(Signal::SIGKILL);
    a.daemon.wait();
    drop((a, b));
    // The kill may have come between two writes: a tail that is torn for certain.
    let path = only_file(&world.journal(HostId::A));
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    let mut refused = Daemon::spawn(world.command(HostId::A).args(["--vm", VM]));
    assert_eq!(refused.wait_code(), 3);
    assert!(
        refused.logged.contains("--journal-earlier archive"),
        "{}",
        refused.logged
    );
    let mut daemon = world.start_with(HostId::A, &["--vm", VM, "--journal-earlier", "archive"]);
    assert!(
        daemon.logged.contains("cut off, everything before it is whole"),
        "{}",
        daemon.logged
    );
    let mut found = fs::read_dir(world.journal(HostId::A))
        .unwrap()
        .map(|found| found.unwrap().path());
    let place = found.find(|path| path.is_dir()).unwrap();
    let verified = Command::new(env!("CARGO_BIN_EXE_ft-log"))
        .arg("verify")
        .arg(&place)
        .output()
        .unwrap();
    assert_eq!(
        verified.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&verified.stdout)
    );
    let (_, end, _) = read(&place).unwrap();
    assert!(end > Lsn::ZERO && end < last.next());
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_code(), 0);
}

/// What nobody may change while a daemon writes it: neither another daemon nor a person with `verify`.
#[test]
fn a_journal_that_is_being_written_is_neither_cut_nor_archived_nor_written_by_another() {
    let world = World::new();
    let (mut a, _b) = world.pair();
    let last = a.append(200);
    a.wait_committed(last);
    let holder = format!("process {}", a.daemon.pid());
    let directory = world.journal(HostId::A);
    let verify = || {
        let output = Command::new(env!("CARGO_BIN_EXE_ft-log"))
            .args(["verify", "--cut-torn-tail"])
            .arg(&directory)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = verify();
    assert!(
        code == Some(3) && said.contains(&holder) && said.contains("end that one"),
        "{said}"
    );
    // The same journal from another daemon: its own socket, the same directory and VM.
    for policy in ["refuse", "archive"] {
        let mut second = Command::new(env!("CARGO_BIN_EXE_ft-log"));
        second
            .args(["--vm", VM, "--role", "primary", "--alone", "--journal-earlier", policy])
            .arg("--socket-path")
            .arg(world.path("second.sock"))
            .arg("--arbiter")
            .arg(world.path("arbiter"))
            .arg("--journal")
            .arg(&directory);
        let mut second = Daemon::spawn(&mut second);
        assert_eq!(second.wait_code(), 3, "{}", second.logged);
        assert!(second.logged.contains(&holder), "{}", second.logged);
    }
    // The writer is not disturbed, and the lock ends with it whatever it dies of.
    let last = a.append(200);
    a.wait_committed(last);
    wait_written(&directory, 2 * SEGMENT_HEADER_BYTES as u64);
    let only = only_file(&directory);
    a.daemon.signal(Signal::SIGKILL);
    a.daemon.wait();
    // Torn for certain: in the middle of the first entry's header.
    let bytes = fs::read(&only).unwrap();
    fs::write(&only, &bytes[..SEGMENT_HEADER_BYTES + 10]).unwrap();
    let (code, said) = verify();
    assert_eq!((code, said.as_str()), (Some(7), ""));
    assert!(!read(&directory).unwrap().2, "the tail is still torn");
}

#[test]
fn an_old_segment_that_stays_is_named() {
    let world = World::new();
    let (mut a, _b) = world.pair_with(&["--journal-segment-kib", "64", "--journal-keep-segments", "1"]);
    let directory = world.journal(HostId::A);
    let deadline = Instant::now() + DEADLINE;
    while ft_client::journal::segments(&directory).unwrap().is_empty() {
        assert!(Instant::now() < deadline, "no segment was begun");
        std::thread::yield_now();
    }
    // A directory in its place cannot be unlinked. The writer has the file open and goes on with it.
    let oldest = only_file(&directory);
    fs::rename(&oldest, world.path("moved")).unwrap();
    fs::create_dir(&oldest).unwrap();
    // More than a segment, and an entry that begins the next one.
    for _ in 0..20 {
        let last = a.append(20);
        a.wait_committed(last);
    }
    let line = a.daemon.wait_log("an old segment could not be removed");
    assert!(line.contains(oldest.to_str().unwrap()), "{line}");
    assert_eq!(a.region().role(), Role::Recording);
}
