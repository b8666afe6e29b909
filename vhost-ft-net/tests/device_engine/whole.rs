//! Two hosts on this machine: the real ft-log, the real disk and the real card, twice.

use std::{path::Path, process::Command};

use nix::sys::signal::Signal;

use super::{
    A_WHILE, Guest, TAP, arrive,
    support::daemon::{Daemon, text},
    wire::{self, Wire, host::Host},
};

/// A program of this build, which is another package's.
fn program(name: &str) -> Command {
    let path = Path::new(env!("CARGO_BIN_EXE_vhost-ft-net")).with_file_name(name);
    assert!(path.exists(), "{} is not there: cargo build -p {name}", path.display());
    Command::new(path)
}

/// The three processes of a host of a VM with a disk and a card, and what names their files.
fn side(host: &Host, role: &str, [listen, peer]: [&str; 2], tap: &str) -> [Daemon; 3] {
    let path = |name: &str| host.path(&format!("{role}-{name}"));
    std::fs::write(path("image"), [0; 1 << 16]).unwrap();
    let mut log = program("ft-log");
    log.args([
        "--vm",
        "stock",
        "--role",
        role,
        "--devices",
        "blk0,net0",
        "--socket-path",
        text(&path("log")),
    ]);
    log.args([
        "--arbiter",
        text(&host.path("arbiter")),
        "--listen",
        listen,
        "--peer",
        peer,
    ]);
    // A busy machine is no failure, and a side that stands still for a moment neither.
    log.args([
        "--heartbeat-interval-ms",
        "100",
        "--heartbeat-misses",
        "10000",
        // A killed ft-log need not have said that it is over.
        "--channel-timeout-ms",
        "10000",
    ]);
    let mut log = Daemon::spawn(&mut log);
    log.wait_line("waiting for");
    let member = |mut command: Command, device: &str, socket: &str| {
        command.args([
            "--socket-path",
            text(&path(socket)),
            "--engine",
            "device",
            "--ft-log",
            text(&path("log")),
        ]);
        Daemon::spawn(command.args(["--vm", "stock", "--device", device]))
    };
    let mut disk = program("vhost-ft-blk");
    disk.args(["--blk-file", text(&path("image"))]);
    let mut card = program("vhost-ft-net");
    card.args(["--tap", tap, "--mac", wire::GUEST_MAC]);
    [log, member(disk, "blk0", "disk"), member(card, "net0", "socket")]
}

/// The whole of it but for the VM: two hosts' ft-log, disk and card.
#[test]
fn a_card_and_a_disk_are_a_pair_and_fail_over_together() {
    let host = Host::on(Wire::with_options(TAP, &[]));
    wire::ip(&["link", "set", "lo", "up"]);
    wire::ip(&["tuntap", "add", "tap-other", "mode", "tap"]);
    std::fs::create_dir(host.path("arbiter")).unwrap();
    let addresses = ["127.0.0.1:7700", "127.0.0.2:7700"];
    let mut backup = side(&host, "backup", [addresses[1], addresses[0]], "tap-other");
    let mut primary = side(&host, "primary", addresses, TAP);
    primary[1].wait_line("listening");
    primary[2].wait_line("listening");
    let mut guest = Guest::at(&host.path("primary-socket"));
    guest.send(0..50);
    arrive(&host, 0..50);
    // While the other host says nothing, nothing leaves.
    backup[0].stop();
    guest.send(50..53);
    guest.taken(53);
    assert!(
        !host.wire.anything_within(A_WHILE),
        "the other host has not acknowledged it"
    );
    backup[0].signal(Signal::SIGCONT);
    arrive(&host, 50..53);
    assert!(!host.path("backup-socket").exists() && !host.path("backup-disk").exists());
    primary.into_iter().rev().for_each(Daemon::kill);
    backup[1].wait_line("listening");
    backup[2].wait_line("listening");
    drop(guest);
    Guest::at(&host.path("backup-socket")).send(0..1);
    backup[2].wait_line("attached");
}
