//! The real daemon, alone, driven by a frontend without a VM.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

use std::{fs::File, path::Path, process::Command};

use support::{
    daemon::{Daemon, fails, text},
    driver::{BlkDriver, memory, readable, writable},
    frontend::{Session, complete},
};
use tempfile::TempDir;

const SECTORS: u64 = 2048;
const ALL_FEATURES: u64 = u64::MAX;
const EVENT_IDX: u64 = 1 << 29;

fn image(directory: &TempDir, bytes: u64) -> std::path::PathBuf {
    let path = directory.path().join("image");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn command(socket: &Path, image: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
    command.args(["--socket-path", text(socket), "--blk-file", text(image)]);
    command
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_image() {
    for features in [ALL_FEATURES, ALL_FEATURES & !EVENT_IDX] {
        let directory = TempDir::new().unwrap();
        let (socket, image) = (directory.path().join("socket"), image(&directory, SECTORS * 512));
        let daemon = Daemon::listening(&mut command(&socket, &image));
        let memory = memory();
        let mut driver = BlkDriver::new(&memory, features & EVENT_IDX != 0);
        let mut session = Session::start(&socket, &memory, features, &[&driver.ring]);
        assert_eq!(session.config(60)[..8], SECTORS.to_le_bytes());

        let data: Vec<u8> = (0..16384u32).map(|byte| (byte / 7) as u8).collect();
        let write = driver.write(100, &data);
        complete(&session, &mut driver, &[write]);
        let flush = driver.flush();
        complete(&session, &mut driver, &[flush]);
        // Overlapping requests in one kick: the last write wins, the read sees it.
        let first = driver.write(50, &[1; 4096]);
        let second = driver.write(52, &[2; 4096]);
        let read = driver.read(50, 6144);
        complete(&session, &mut driver, &[first, second, read]);
        let data_read = driver.read(100, 16384);
        complete(&session, &mut driver, &[data_read]);
        for request in [write, flush, first, second, read, data_read] {
            assert_eq!(driver.status(request), 0);
        }
        let mut expected = vec![1; 1024];
        expected.resize(5120, 2);
        expected.resize(6144, 0);
        assert!(driver.data(read) == expected);
        assert!(driver.data(data_read) == data);
        let content = std::fs::read(&image).unwrap();
        assert!(content[100 * 512..][..16384] == data);
        assert!(content[50 * 512..][..5120] == expected[..5120]);

        daemon.terminate();
        assert_eq!(daemon.wait().0, Some(0));
        assert!(!socket.exists());
    }
}

#[test]
fn many_requests_in_flight_are_all_right() {
    let directory = TempDir::new().unwrap();
    let (socket, image) = (directory.path().join("socket"), image(&directory, SECTORS * 512));
    let _daemon = Daemon::listening(&mut command(&socket, &image));
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let session = Session::start(&socket, &memory, ALL_FEATURES, &[&driver.ring]);
    for round in 0u8..40 {
        let writes: Vec<_> = (0..16)
            .map(|slot| driver.write(slot * 64, &[round ^ slot as u8; 32768]))
            .collect();
        complete(&session, &mut driver, &writes);
        let reads: Vec<_> = (0..16).map(|slot| driver.read(slot * 64, 32768)).collect();
        complete(&session, &mut driver, &reads);
        for (slot, read) in reads.iter().enumerate() {
            assert!(
                driver.data(*read) == [round ^ slot as u8; 32768],
                "round {round} slot {slot}"
            );
        }
    }
}

#[test]
fn requests_that_cannot_be_are_refused_one_by_one() {
    let directory = TempDir::new().unwrap();
    let (socket, image) = (directory.path().join("socket"), image(&directory, SECTORS * 512));
    let _daemon = Daemon::listening(&mut command(&socket, &image));
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let session = Session::start(&socket, &memory, ALL_FEATURES, &[&driver.ring]);
    let beyond = driver.write(SECTORS - 1, &[0; 1024]);
    let far = driver.read(u64::MAX, 512);
    let misaligned = driver.write(0, &[0; 100]);
    let unknown = driver.other(77, 0);
    let id = driver.other(8, 20);
    let good = driver.write(1, &[9; 512]);
    complete(&session, &mut driver, &[beyond, far, misaligned, unknown, id, good]);
    let status = [beyond, far, misaligned, unknown, id, good].map(|request| driver.status(request));
    assert_eq!(status, [1, 1, 1, 2, 0, 0]);
    assert_eq!(driver.data(id)[..7], *b"ft-blk\0");
}

#[test]
fn a_frontend_that_leaves_makes_room_for_the_next() {
    let directory = TempDir::new().unwrap();
    let (socket, image) = (directory.path().join("socket"), image(&directory, SECTORS * 512));
    let _daemon = Daemon::listening(&mut command(&socket, &image));
    for round in 1u8..=3 {
        let memory = memory();
        let mut driver = BlkDriver::new(&memory, true);
        let session = Session::start(&socket, &memory, ALL_FEATURES, &[&driver.ring]);
        let read = driver.read(7, 512);
        let write = driver.write(7, &[round; 512]);
        complete(&session, &mut driver, &[read, write]);
        assert!(driver.data(read) == [round - 1; 512]);
    }
}

#[test]
fn a_stopped_queue_says_where_it_was_and_goes_on_there() {
    use vhost::VhostBackend;
    let directory = TempDir::new().unwrap();
    let (socket, image) = (directory.path().join("socket"), image(&directory, SECTORS * 512));
    let _daemon = Daemon::listening(&mut command(&socket, &image));
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let mut session = Session::start(&socket, &memory, ALL_FEATURES, &[&driver.ring]);
    for round in 1..=5u32 {
        let writes: Vec<_> = (0..10)
            .map(|slot| driver.write(slot * 8, &[round as u8; 4096]))
            .collect();
        session.kick(0);
        // The answer comes after everything in flight is complete.
        let base = session.frontend.get_vring_base(0).unwrap();
        let mut used = 0;
        while driver.ring.take_used().is_some() {
            used += 1;
        }
        let taken = base - 10 * (round - 1);
        assert_eq!(taken, used);
        session.start_queue(0, &driver.ring);
        let rest: Vec<_> = writes
            .into_iter()
            .filter(|write| driver.status(*write) == 0xff)
            .collect();
        session.kick(0);
        complete(&session, &mut driver, &rest);
    }
}

#[test]
fn a_broken_ring_stops_its_queue_and_not_the_daemon() {
    let directory = TempDir::new().unwrap();
    let (socket, image) = (directory.path().join("socket"), image(&directory, SECTORS * 512));
    let mut daemon = Daemon::listening(&mut command(&socket, &image));
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let session = Session::start(&socket, &memory, ALL_FEATURES, &[&driver.ring]);
    driver.ring.add(&[readable(u64::MAX - 8, 16), writable(0, 1)]);
    session.kick(0);
    daemon.wait_line("broke this queue");
    drop(session);
    let mut driver = BlkDriver::new(&memory, true);
    memory_clear(&driver);
    let session = Session::start(&socket, &memory, ALL_FEATURES, &[&driver.ring]);
    let flush = driver.flush();
    complete(&session, &mut driver, &[flush]);
}

/// A fresh driver starts with fresh rings.
fn memory_clear(driver: &BlkDriver) {
    driver.ring.write(0x1_0000, &[0; 0x1_0000]);
}

#[test]
fn a_read_only_disk_refuses_writes_and_says_so() {
    let directory = TempDir::new().unwrap();
    let (socket, image) = (directory.path().join("socket"), image(&directory, SECTORS * 512));
    let _daemon = Daemon::listening(command(&socket, &image).arg("--read-only"));
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let session = Session::start(&socket, &memory, ALL_FEATURES, &[&driver.ring]);
    assert_ne!(session.features & (1 << 5), 0);
    let write = driver.write(0, &[1; 512]);
    let read = driver.read(0, 512);
    complete(&session, &mut driver, &[write, read]);
    assert_eq!((driver.status(write), driver.status(read)), (1, 0));
}

#[test]
fn a_bad_environment_is_one_clear_line() {
    let directory = TempDir::new().unwrap();
    let (socket, image) = (directory.path().join("socket"), image(&directory, SECTORS * 512));
    let small = directory.path().join("small");
    std::fs::write(&small, "tiny").unwrap();
    let missing = directory.path().join("missing");
    let _daemon = Daemon::listening(&mut command(&socket, &image));
    let other_socket = directory.path().join("other");
    for (socket, image, says) in [
        (&other_socket, &image, "locked"),
        (&other_socket, &small, "too small"),
        (&other_socket, &missing, "cannot open image"),
        (&missing.join("socket"), &small, "too small"),
    ] {
        let (code, said) = fails(&mut command(socket, image));
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains(says), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!other_socket.exists());
    }
    let second = directory.path().join("second");
    std::fs::write(&second, [0; 512]).unwrap();
    let (code, said) = fails(&mut command(&socket, &second));
    assert_eq!((code, said.lines().count()), (Some(3), 1), "{said}");
    assert!(said.contains("in use by a running process"), "{said}");
    let (code, said) =
        fails(command(&other_socket, &second).args(["--ft-log", text(&missing), "--vm", "v", "--device", "d"]));
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("cannot reach ft-log"), "{said}");
    let (code, _) = fails(command(&other_socket, &second).args(["--ft-log", "x"]));
    assert_eq!(code, Some(2));
}
