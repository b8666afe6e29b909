//! Engine `device`: the card of a stock VMM whose disk is replicated. The test is ft-log, the disk's daemon and the guest.
//! Needs root, `ip` and /dev/net/tun: feature `real-hosts`.

#![cfg(feature = "real-hosts")]
#![cfg_attr(feature = "control-no-hold", allow(dead_code, reason = "the control has one test"))]

#[path = "../../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

#[cfg(not(feature = "control-no-hold"))]
mod promises;
#[cfg(not(feature = "control-no-hold"))]
mod whole;
#[path = "../wire/mod.rs"]
mod wire;

use std::{path::Path, time::Duration};

use ft_protocol::Role;
use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use support::{
    daemon::{Daemon, text},
    driver::{Driver, memory, readable},
    frontend::Session,
    ft_log::{FtLog, Joined},
};
use wire::{frame, host::Host};

const TAP: &str = "tap-engine";
/// Number of the card; that of the disk is 0.
const DEVICE: u8 = 1;
const TRANSMIT: usize = 1;
/// What the disk logs before the guest sends.
const WRITES: u64 = 7;
/// Long enough for a frame that leaks to be seen.
const A_WHILE: Duration = Duration::from_millis(200);

/// A card that has joined, in a role.
fn joined(host: &Host, role: Role) -> (Daemon, Joined) {
    let log = FtLog::listen(&host.path("ft-log"));
    let mut command = host.command(&["--tap", TAP, "--engine", "device", "--ft-log", text(&log.path)]);
    command.args(["--vm", "stock", "--device", "net0"]);
    let mut daemon = Daemon::spawn(&mut command);
    let joined = log.welcome(DEVICE, role);
    daemon.wait_line("joined");
    (daemon, joined)
}

/// A guest that only sends.
struct Guest {
    _memory: GuestMemoryMmap,
    _receive: Driver,
    transmit: Driver,
    session: Session,
}

impl Guest {
    fn at(socket: &Path) -> Self {
        let memory = memory();
        let [receive, transmit] = [0x1_0000, 0x3_0000].map(|at| Driver::new(&memory, at, 64, true));
        let session = Session::start(socket, &memory, u64::MAX, &[&receive, &transmit]);
        Self {
            _memory: memory,
            _receive: receive,
            transmit,
            session,
        }
    }

    fn send(&mut self, numbers: std::ops::Range<u32>) {
        for number in numbers {
            let at = (8 << 20) + u64::from(self.transmit.next_head()) * 2048;
            self.transmit.write(at, &[0; 12]);
            self.transmit.write(at + 12, &frame(number, 100));
            self.transmit.add(&[readable(at, 112)]);
        }
        self.session.kick(TRANSMIT);
    }

    /// Waits until the daemon has taken so many frames: they are completed at once.
    fn taken(&mut self, count: usize) {
        for _ in 0..count {
            while self.transmit.take_used().is_none() {
                self.session.wait_call(TRANSMIT);
            }
        }
    }
}

/// A primary whose disk has logged some writes, and its guest.
fn primary(host: &Host) -> (Daemon, Joined, Guest) {
    let (mut daemon, joined) = joined(host, Role::Recording);
    assert!(!host.path("socket").exists(), "nobody would take over yet");
    joined.log_through(WRITES);
    joined.commit(1);
    daemon.wait_line("listening");
    let guest = Guest::at(&host.path("socket"));
    (daemon, joined, guest)
}

fn arrive(host: &Host, numbers: std::ops::Range<u32>) {
    for number in numbers {
        assert_eq!(host.wire.receive(), frame(number, 100));
    }
}

/// A build that does not hold sends before the commit, and the judge sees it.
#[cfg(feature = "control-no-hold")]
#[test]
fn sending_before_the_commit_is_caught() {
    let host = Host::on(wire::Wire::with_options(TAP, &[]));
    let (_daemon, _joined, mut guest) = primary(&host);
    guest.send(0..3);
    arrive(&host, 0..3);
}
