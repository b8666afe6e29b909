//! What the daemon counts, where operators read it: at the real ft-log's endpoint, and among its own events. Needs root, `ip`,
//! /dev/net/tun and ft-log of the same build: feature `real-hosts`.

#![cfg(feature = "real-hosts")]

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

mod wire;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

use ft_client::{gate::Request, handshake::join_shim};
use ft_protocol::{Generation, Lsn};
use support::{
    daemon::{Daemon, text},
    driver::{Driver, memory, readable},
    frontend::Session,
};
use wire::{Wire, frame, host::Host, ip};

const TAP: &str = "tap-counting";
const VM: &str = "ledger";

impl Host {
    fn new(options: &[&str]) -> Self {
        Self::on(Wire::with_options(TAP, options))
    }

    fn daemon(&self, options: &[&str]) -> Daemon {
        Daemon::listening(self.command(&["--tap", TAP]).args(options))
    }
}

/// Makes a frame of 100 bytes available.
fn send(driver: &mut Driver, number: u32) {
    let at = (8 << 20) + u64::from(driver.next_head()) * 2048;
    driver.write(at, &[0; 12]);
    driver.write(at + 12, &frame(number, 100));
    driver.add(&[readable(at, 112)]);
}

/// ft-log of this build, which is another package's.
fn ft_log() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_vhost-ft-net")).with_file_name("ft-log");
    assert!(path.exists(), "{} is not there: cargo build -p ft-log", path.display());
    path
}

#[test]
fn ft_log_shows_what_the_device_counts() {
    let host = Host::new(&[]);
    std::fs::create_dir(host.path("arbiter")).unwrap();
    let metrics = format!("unix:{}", text(&host.path("metrics")));
    let mut log = Command::new(ft_log());
    log.args(["--vm", VM, "--role", "primary", "--alone", "--devices", "net0"]);
    log.args(["--socket-path", text(&host.path("log"))]);
    log.args(["--arbiter", text(&host.path("arbiter")), "--metrics", &metrics]);
    let mut log = Daemon::spawn(&mut log);
    log.wait_line("waiting for");
    let _daemon = host.daemon(&["--ft-log", text(&host.path("log")), "--vm", VM, "--device", "net0"]);
    let mut shim = join_shim(&host.path("log"), VM, &[7; 32]).unwrap();
    let memory = memory();
    let drivers = [0x1_0000, 0x3_0000].map(|at| Driver::new(&memory, at, 64, true));
    let [receive, mut transmit] = drivers;
    let _session = Session::start(&host.path("socket"), &memory, u64::MAX, &[&receive, &transmit]);
    let gate = &mut shim.gates[0];
    gate.call(&Request::Start { live: true }).unwrap();
    (0..3).for_each(|number| send(&mut transmit, number));
    // One that is none.
    transmit.add(&[readable(8 << 20, 20)]);
    let request = Request::Kick {
        queue: 1,
        marker: Lsn(1),
        generation: Generation(1),
    };
    gate.call(&request).unwrap();
    // Nobody else has to commit anything.
    for number in 0..3 {
        assert_eq!(host.wire.receive(), frame(number, 100));
    }
    let mut stream = UnixStream::connect(host.path("metrics")).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut found = String::new();
    stream.read_to_string(&mut found).unwrap();
    let of = format!("vm=\"{VM}\",device=\"net0\"");
    for line in [
        format!("ft_log_net_frames_total{{{of},queue=\"transmit0\"}} 3"),
        format!("ft_log_net_bytes_total{{{of},queue=\"transmit0\"}} 300"),
        format!("ft_log_net_kicks_total{{{of},queue=\"transmit0\"}} 1"),
        format!("ft_log_net_lost_total{{{of},queue=\"transmit0\",reason=\"too_short\"}} 1"),
        format!("ft_log_net_used_buffers_total{{{of},queue=\"transmit0\"}} 4"),
        format!("ft_log_net_frames_total{{{of},queue=\"receive0\"}} 0"),
        format!("ft_log_net_released_total{{{of}}} 3"),
        format!("ft_log_net_hold_seconds_count{{{of}}} 3"),
        format!("ft_log_net_held_bytes{{{of}}} 0"),
        format!("ft_log_net_held_bytes_max{{{of}}} 336"),
    ] {
        assert!(found.lines().any(|other| other == line), "'{line}' is not in:\n{found}");
    }
}

#[test]
fn threads_count_together_and_what_the_interface_does_not_take_is_counted() {
    let host = Host::new(&[]);
    // The queue that transmits is the other thread's.
    let mut daemon = host.daemon(&["--io-threads", "2"]);
    let memory = memory();
    let drivers = [0x1_0000, 0x3_0000].map(|at| Driver::new(&memory, at, 64, true));
    let [receive, mut transmit] = drivers;
    let session = Session::start(&host.path("socket"), &memory, u64::MAX, &[&receive, &transmit]);
    daemon.wait_line("attached");
    send(&mut transmit, 1);
    session.kick(1);
    assert_eq!(host.wire.receive(), frame(1, 100));
    ip(&["link", "set", TAP, "down"]);
    send(&mut transmit, 2);
    session.kick(1);
    daemon.wait_line("takes no frames");
    daemon.terminate();
    assert_eq!(daemon.wait().0, Some(0));
    let told = host.counters();
    assert_eq!(told["queues"][1]["frames"], 2);
    assert_eq!(told["queues"][1]["lost"], serde_json::json!({ "interface": 1 }));
    assert_eq!(told["queues"][0]["frames"], 0);
}
