//! The real daemon under a gate: the test is ft-log and the shim.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::Command,
};

use ft_client::gate::{Answer, GateError, Request};
use ft_protocol::{Generation, Lsn, Role};
use support::{
    daemon::{Daemon, text},
    driver::{BlkDriver, memory, readable, writable},
    frontend::Session,
    ft_log::{FtLog, Joined},
};
use tempfile::TempDir;

const SECTORS: u64 = 2048;
const ALL_FEATURES: u64 = u64::MAX;

/// One host: image, daemon, ft-log and shim, and the guest.
struct Host {
    directory: TempDir,
    image: PathBuf,
    daemon: Daemon,
    joined: Joined,
    driver: BlkDriver,
    _session: Session,
    kicks: u64,
}

impl Host {
    fn start(live: bool) -> Self {
        let directory = TempDir::new().unwrap();
        let path = |name: &str| directory.path().join(name);
        let (socket, image) = (path("socket"), path("image"));
        File::create(&image).unwrap().set_len(SECTORS * 512).unwrap();
        let log = FtLog::listen(&path("ft-log"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
        command.args(["--socket-path", text(&socket), "--blk-file", text(&image)]);
        command.args(["--ft-log", text(&log.path), "--vm", "ledger", "--device", "blk0"]);
        command.args(["--events", text(&path("events"))]);
        let daemon = Daemon::listening(&mut command);
        let role = if live { Role::Recording } else { Role::Replaying };
        let mut joined = log.welcome(0, role);
        assert_eq!(joined.join.vm, "ledger");
        let memory = memory();
        let driver = BlkDriver::new(&memory, true);
        // As the shim does: memory and queues by vhost-user, then the gate.
        let session = Session::start(&socket, &memory, ALL_FEATURES, &[&driver.ring]);
        assert_eq!(joined.shim.call(&Request::Start { live }).unwrap(), Answer::default());
        Self {
            image,
            daemon,
            joined,
            driver,
            _session: session,
            kicks: 0,
            directory,
        }
    }

    fn try_kick(&mut self) -> Result<Answer, GateError> {
        self.kicks += 1;
        self.joined.shim.call(&Request::Kick {
            queue: 0,
            marker: Lsn(self.kicks),
            generation: Generation(1),
        })
    }

    fn kick(&mut self) -> Answer {
        assert!(self.driver.ring.wants_kick(), "the device asked for the next kick");
        self.try_kick().unwrap()
    }

    fn deliver(&mut self, through: u64) -> Answer {
        self.joined.wait_inputs(through);
        self.joined.shim.call(&Request::Deliver { through }).unwrap()
    }

    fn deliver_logged(&mut self, sequence: u64, payload: &[u8]) -> Answer {
        let request = Request::DeliverLogged {
            sequence,
            queue: 0,
            payload,
        };
        self.joined.shim.call(&request).unwrap()
    }

    fn go_live(&mut self, inputs: u64) {
        let generation = Generation(2);
        self.joined.region.publish(Role::Live, generation, Lsn(0));
        self.joined.shim.call(&Request::GoLive { inputs, generation }).unwrap();
    }

    fn guest_memory(&self) -> Vec<u8> {
        self.driver.ring.read(0, 16 << 20)
    }

    fn events(&self, name: &str) -> Vec<serde_json::Value> {
        let file = File::open(self.directory.path().join("events")).unwrap();
        BufReader::new(file)
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap())
            .filter(|event| event["event"] == name)
            .collect()
    }
}

#[test]
fn completions_reach_the_guest_when_they_are_delivered_and_not_before() {
    let mut host = Host::start(true);
    let write = host.driver.write(9, &[7; 4096]);
    let answer = host.kick();
    assert!(!answer.interrupt);
    let (lsn, sequence, payload) = host.joined.next_input();
    assert_eq!((lsn, sequence, payload.len()), (1, 1, 16));
    host.joined.wait_inputs(1);
    assert_eq!(host.driver.status(write), 0xff);
    assert!(host.driver.ring.take_used().is_none());
    assert!(host.deliver(1).interrupt);
    assert_eq!(host.driver.status(write), 0);
    assert_eq!(host.driver.ring.take_used(), Some((write.head, 1)));

    let before = host.guest_memory();
    let read = host.driver.read(9, 4096);
    host.kick();
    let (_, sequence, payload) = host.joined.next_input();
    assert_eq!((sequence, payload.len()), (2, 16 + 4096));
    host.joined.wait_inputs(2);
    assert_eq!(host.driver.data(read), [0xee; 4096]);
    assert_ne!(before, host.guest_memory());
    assert!(host.deliver(2).interrupt);
    assert_eq!(host.driver.data(read), [7; 4096]);
    // Nothing to deliver twice.
    assert_eq!(host.deliver(2), Answer::default());
}

/// Runs the same requests on both hosts; the backup gets the primary's inputs from the log.
fn follow(primary: &mut Host, backup: &mut Host, inputs: &mut u64, seed: u64) {
    let requests = |host: &mut Host| {
        let sector = seed * 13 % 1000;
        host.driver.write(sector, &[seed as u8; 8192]);
        host.driver.write(sector + 4, &[seed as u8 ^ 0xff; 2048]);
        host.driver.read(sector, 8192);
        host.driver.other(8, 20);
        host.driver.other(99, 0);
        host.driver.flush();
        host.kick()
    };
    assert_eq!(requests(primary), requests(backup));
    let mut left = 6;
    while left != 0 {
        let (_, sequence, payload) = primary.joined.next_input();
        *inputs += 1;
        assert_eq!(sequence, *inputs);
        let mine = primary.deliver(sequence);
        let logged = backup.deliver_logged(sequence, &payload);
        // The digest of one delivery of the primary is the fold of its parts.
        assert_eq!(mine.interrupt, logged.interrupt);
        assert!(
            primary.guest_memory() == backup.guest_memory(),
            "guests differ after input {sequence}"
        );
        while let Some(used) = primary.driver.ring.take_used() {
            assert_eq!(backup.driver.ring.take_used(), Some(used));
            left -= 1;
        }
        assert_eq!(backup.driver.ring.take_used(), None);
    }
}

#[test]
fn a_backup_follows_and_goes_live_with_the_same_guest_and_the_same_disk() {
    let (mut primary, mut backup) = (Host::start(true), Host::start(false));
    assert_eq!(primary.joined.join.fingerprint, backup.joined.join.fingerprint);
    let mut inputs = 0;
    for seed in 1..=50 {
        follow(&mut primary, &mut backup, &mut inputs, seed);
    }
    // The primary dies with a write, a read, an identity and a flush whose completions nobody logged.
    let write = backup.driver.write(2000, &[0xaa; 4096]);
    let read = backup.driver.read(1999, 1024);
    let id = backup.driver.other(8, 20);
    let flush = backup.driver.flush();
    backup.kick();
    drop(primary.daemon);
    assert_eq!(backup.joined.shim.inputs(), 0);
    backup.go_live(inputs);
    assert_eq!(backup.events("reissued")[0]["count"], 4);
    let mut used = 0;
    while used != 4 {
        let (_, sequence, _) = backup.joined.next_input();
        inputs += 1;
        assert_eq!(sequence, inputs);
        backup.deliver(sequence);
        while backup.driver.ring.take_used().is_some() {
            used += 1;
        }
    }
    for request in [write, read, id, flush] {
        assert_eq!(backup.driver.status(request), 0);
    }
    assert_eq!(backup.driver.data(read)[512..], [0xaa; 512]);
    let (survivor, lost) = (
        std::fs::read(&backup.image).unwrap(),
        std::fs::read(&primary.image).unwrap(),
    );
    assert!(survivor[..1999 * 512] == lost[..1999 * 512]);
    assert_eq!(survivor[2000 * 512..][..4096], [0xaa; 4096]);

    backup.joined.publish(Role::Off);
    assert_eq!(backup.daemon.wait().0, Some(0));
}

#[test]
fn each_end_of_a_replica_has_its_exit_code() {
    let host = Host::start(true);
    host.joined.publish(Role::Halted);
    let (code, said) = host.daemon.wait();
    assert_eq!(code, Some(4));
    assert!(said.contains("halted: ft-log's log says why"), "{said}");

    let host = Host::start(true);
    host.joined.publish(Role::Off);
    assert_eq!(host.daemon.wait().0, Some(0));

    let host = Host::start(false);
    drop(host.joined.stream);
    let (code, said) = host.daemon.wait();
    assert_eq!(code, Some(6));
    assert!(said.contains("ft-log is gone"), "{said}");

    let host = Host::start(false);
    host.daemon.terminate();
    assert_eq!(host.daemon.wait().0, Some(0));
}

#[test]
fn a_daemon_that_waits_for_ft_log_can_be_asked_to_end() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("image"), [0; 512]).unwrap();
    let log = FtLog::listen(&path("ft-log"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
    command.args([
        "--socket-path",
        text(&path("socket")),
        "--blk-file",
        text(&path("image")),
    ]);
    command.args(["--ft-log", text(&log.path), "--vm", "ledger", "--device", "blk0"]);
    let mut daemon = Daemon::listening(&mut command);
    daemon.wait_line("fingerprinted");
    daemon.terminate();
    assert_eq!(daemon.wait().0, Some(0));
    assert!(!path("socket").exists());
}

#[test]
fn a_guest_that_breaks_its_ring_ends_its_replica_with_a_reason() {
    let mut host = Host::start(true);
    host.driver.ring.add(&[readable(1 << 40, 16), writable(0, 1)]);
    assert!(matches!(host.try_kick(), Err(GateError::Refused { .. })));
    let mut report = String::new();
    BufReader::new(&host.joined.stream).read_line(&mut report).unwrap();
    assert!(
        report.contains("failed") && report.contains("outside guest memory"),
        "{report}"
    );
    assert_eq!(host.daemon.wait().0, Some(6));
}
