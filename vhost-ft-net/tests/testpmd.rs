//! DPDK's testpmd drives the daemon without a VM: its virtio-user port is a guest's driver that polls. Two pairs of queues, split rings.
//! Needs the machine's root, `ip`, /dev/net/tun, two processors and dpdk-testpmd (Debian: dpdk-dev): feature `testpmd`.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

mod wire;

use std::{
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Instant,
};

use serde_json::{Value, json};
use support::{
    daemon::{Daemon, text},
    frontend::PATIENCE,
};
use tempfile::TempDir;
use wire::{Wire, frame};

const TAP: &str = "tap-testpmd";
/// Frames that are waited for before the generator stops.
const FRAMES_MIN: usize = 2000;
const FLOWS: u32 = 100;
const ECHOES: u32 = 20;

/// A running testpmd, and what it says.
struct Testpmd {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Testpmd {
    fn start(socket: &str) -> Self {
        let port = format!("net_virtio_user0,path={socket},queues=2,mac={}", wire::GUEST_MAC);
        // Line by line, although it writes to a pipe.
        let mut command = Command::new("stdbuf");
        command.args("-oL dpdk-testpmd --no-huge -m 256 --no-pci -l 0,1".split(' '));
        command.args(["--file-prefix", &format!("ft{}", std::process::id()), "--vdev", &port]);
        command.args("-- -i --rxq=2 --txq=2 --total-num-mbufs=4096".split(' '));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the tool `stdbuf` (coreutils)");
        Self {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn say(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    fn wait_line(&mut self, text: &str) -> String {
        let mut line = String::new();
        while self.stdout.read_line(&mut line).unwrap() != 0 {
            eprint!("testpmd: {line}");
            if line.contains(text) {
                return line;
            }
            line.clear();
        }
        panic!("testpmd ended without saying '{text}': {:?}", self.child.wait());
    }

    fn number(&mut self, name: &str) -> u64 {
        let line = self.wait_line(name);
        let (_, behind) = line.split_once(name).unwrap();
        let digits: String = behind.trim_start().chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    }

    /// Frames received and sent since the last start.
    fn totals(&mut self, command: &str) -> (u64, u64) {
        self.say(command);
        self.wait_line("Accumulated forward statistics");
        (self.number("RX-packets:"), self.number("TX-packets:"))
    }

    fn forwards(&mut self, mode: &str) {
        self.say(&format!("set fwd {mode}"));
        self.say("start");
        self.wait_line(&format!("{mode} packet forwarding packets/burst"));
    }

    fn quit(mut self) {
        self.say("quit");
        self.wait_line("Bye");
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Frames that the TAP has taken from the daemon, as the kernel counts them.
fn taken_by_the_tap() -> u64 {
    let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let of_tap = devices
        .lines()
        .find_map(|line| line.trim().strip_prefix(&format!("{TAP}:")));
    of_tap.unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Frames that differ in what the kernel chooses the queue by.
fn flow(number: u32) -> Vec<u8> {
    let mut frame = frame(number, 100);
    frame[14..24].copy_from_slice(&[0x45, 0, 0, 86, 0, 1, 0, 0, 64, 17]);
    frame[30..34].copy_from_slice(&[10, 77, 1, number as u8]);
    frame[34..38].copy_from_slice(&[number as u8, 1, 7, number as u8]);
    frame
}

#[test]
fn testpmd_sends_receives_and_echoes_over_two_pairs_of_queues() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| -> PathBuf { directory.path().join(name) };
    let wire = Wire::with_options(TAP, &["multi_queue"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-net"));
    command.args([
        "--socket-path",
        text(&path("socket")),
        "--tap",
        TAP,
        "--queue-pairs",
        "2",
    ]);
    command.args(["--mac", wire::GUEST_MAC, "--events", text(&path("events"))]);
    let mut daemon = Daemon::listening(&mut command);
    let mut testpmd = Testpmd::start(text(&path("socket")));
    testpmd.wait_line("Port 0: ");
    for _ in 0..2 {
        daemon.wait_line("attached");
    }
    wire.wait_for_link(TAP);

    // It sends as fast as it can. Every frame that the rings took was counted by the TAP.
    testpmd.forwards("txonly");
    for _ in 0..FRAMES_MIN {
        wire.receive();
    }
    let (received, sent) = testpmd.totals("stop");
    assert_eq!(received, 0);
    assert!(sent >= FRAMES_MIN as u64);
    let deadline = Instant::now() + PATIENCE;
    while taken_by_the_tap() != sent {
        assert!(
            Instant::now() < deadline,
            "{} of {sent} frames left",
            taken_by_the_tap()
        );
        std::thread::yield_now();
    }

    // It receives: each flow once, whichever queue it is for.
    wire.drain();
    let deadline = Instant::now() + PATIENCE;
    testpmd.forwards("rxonly");
    (0..FLOWS).for_each(|number| wire.send(&flow(number)));
    while testpmd.totals("show fwd stats all").0 != u64::from(FLOWS) {
        assert!(Instant::now() < deadline, "not all frames came");
    }
    assert_eq!(testpmd.totals("stop"), (u64::from(FLOWS), 0));

    // What it sends back is what it was sent.
    testpmd.forwards("macswap");
    for number in 0..ECHOES {
        let mut expected = flow(number);
        wire.send(&expected);
        let (to, from) = expected[..12].split_at_mut(6);
        to.swap_with_slice(from);
        assert_eq!(wire.receive(), expected);
    }
    assert_eq!(testpmd.totals("stop"), (u64::from(ECHOES), u64::from(ECHOES)));
    testpmd.quit();
    daemon.wait_line("the frontend left");
    daemon.terminate();
    assert_eq!(daemon.wait().0, Some(0));

    // And the daemon counted the same.
    let events = std::fs::read_to_string(path("events")).unwrap();
    let mut events = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let told = events.rfind(|event| event["event"] == "counters").unwrap();
    let frames = [0, 1, 2, 3].map(|queue| told["queues"][queue]["frames"].as_u64().unwrap());
    assert_eq!(frames[0] + frames[2], u64::from(FLOWS + ECHOES), "{told}");
    assert_eq!(frames[1] + frames[3], sent + u64::from(ECHOES), "{told}");
    assert!(!frames.contains(&0), "a queue is idle: {told}");
    for queue in 0..4 {
        assert_eq!(told["queues"][queue]["lost"], json!({}));
    }
}
