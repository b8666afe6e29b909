//! `--pcap` of the real daemon on a real TAP: what is in the file is what went over the wire, and a full disk is no matter of the network.
//! Needs root, `ip`, `mount` and /dev/net/tun: feature `real-hosts`.

#![cfg(feature = "real-hosts")]

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

mod wire;

use std::{path::Path, process::Command};

use ft_client::gate::Request;
use ft_protocol::{Generation, Lsn, Role};
use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use nix::sched::{CloneFlags, unshare};
use pcap_file::pcapng::{Block, PcapNgReader};
use support::{
    daemon::{Daemon, fails, text},
    driver::{Driver, memory, readable, writable},
    frontend::Session,
    ft_log::{FtLog, Joined},
};
use wire::{Wire, frame, host::Host};

const TAP: &str = "tap-capture";
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The interfaces of the file.
const RECEIVED: u32 = 0;
const HELD: u32 = 1;
const RELEASED: u32 = 2;
const DISCARDED: u32 = 3;
const SENT: u32 = 4;

impl Host {
    fn new() -> Self {
        Self::on(Wire::in_a_new_namespace(TAP))
    }

    fn capturing(&self, pcap: &Path) -> Command {
        self.command(&["--tap", TAP, "--pcap", text(pcap)])
    }
}

/// The drivers of a guest.
fn drivers(memory: &GuestMemoryMmap) -> [Driver; 2] {
    [0x1_0000, 0x3_0000].map(|at| Driver::new(memory, at, 64, true))
}

fn send(driver: &mut Driver, frame: &[u8]) {
    let at = (8 << 20) + u64::from(driver.next_head()) * (128 << 10);
    driver.write(at, &[0; 12]);
    driver.write(at + 12, frame);
    driver.add(&[readable(at, 12 + frame.len() as u32)]);
}

/// Interface and bytes of each frame of a file, which is whole.
fn captured(path: &Path) -> Vec<(u32, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let mut reader = PcapNgReader::new(&bytes[..]).unwrap();
    let mut frames = Vec::new();
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(packet) = block.unwrap() {
            frames.push((packet.interface_id, packet.data.to_vec()));
        }
    }
    frames
}

fn kick(joined: &mut Joined, queue: usize, marker: u64) {
    let request = Request::Kick {
        queue: queue as u16,
        marker: Lsn(marker),
        generation: Generation(1),
    };
    joined.shim.call(&request).unwrap();
}

#[test]
fn the_file_of_a_protected_device_is_what_went_over_the_wire() {
    let host = Host::new();
    let pcap = host.path("pcap");
    let log = FtLog::listen(&host.path("ft-log"));
    let mut command = host.capturing(&pcap);
    command.args(["--ft-log", text(&log.path), "--vm", "ledger", "--device", "net0"]);
    let daemon = Daemon::listening(&mut command);
    let mut joined = log.welcome(1, Role::Recording);
    let memory = memory();
    let [mut receive, mut transmit] = drivers(&memory);
    let _session = Session::start(&host.path("socket"), &memory, u64::MAX, &[&receive, &transmit]);
    joined.shim.call(&Request::Start { live: true }).unwrap();
    receive.add(&[writable(1 << 20, 2048)]);
    kick(&mut joined, RECEIVE, 1);
    host.wire.wait_for_link(TAP);
    let mut expected = Vec::new();
    let arrives = frame(50, 500);
    host.wire.send(&arrives);
    joined.next_input();
    expected.push((RECEIVED, arrives));
    let frames: Vec<_> = (0..4).map(|number| frame(number, 100 + number as usize)).collect();
    for (pair, marker) in frames.chunks(2).zip([10, 20]) {
        pair.iter().for_each(|frame| send(&mut transmit, frame));
        kick(&mut joined, TRANSMIT, marker);
    }
    expected.extend(frames.iter().map(|frame| (HELD, frame.clone())));
    joined.commit(10);
    for _ in 0..2 {
        expected.push((RELEASED, host.wire.receive()));
    }
    let arrives = frame(51, 64);
    host.wire.send(&arrives);
    joined.next_input();
    expected.push((RECEIVED, arrives));
    // The other two are never sent.
    joined.region.publish(Role::Halted, Generation(1), Lsn(0));
    joined.commit(20);
    joined.publish(Role::Halted);
    assert_eq!(daemon.wait().0, Some(4));
    expected.extend(frames[2..].iter().map(|frame| (DISCARDED, frame.clone())));
    let found = captured(&pcap);
    assert_eq!(found.len(), expected.len());
    for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(found == expected, "{place}: {found:?} is not {expected:?}");
    }
    let told = host.events("counters").pop().unwrap();
    assert_eq!((&told["captured"], &told["capture_lost"]), (&10.into(), &0.into()));
    let ended = host.events("capture_ended").pop().unwrap();
    assert_eq!(ended["frames"], 10);
}

#[test]
fn a_full_disk_ends_the_capture_and_nothing_else() {
    let host = Host::new();
    let disk = host.path("disk");
    std::fs::create_dir(&disk).unwrap();
    // A disk of this thread and of the daemon it starts.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let mount = |arguments: &[&str]| {
        let status = Command::new("mount").args(arguments).status().unwrap();
        assert!(status.success(), "mount {arguments:?}");
    };
    mount(&["--make-rprivate", "/"]);
    mount(&["-t", "tmpfs", "-o", "size=512k", "none", text(&disk)]);
    let pcap = disk.join("pcap");
    let mut daemon = Daemon::listening(&mut host.capturing(&pcap));
    let memory = memory();
    let [receive, mut transmit] = drivers(&memory);
    let session = Session::start(&host.path("socket"), &memory, u64::MAX, &[&receive, &transmit]);
    daemon.wait_line("attached");
    let mut sent = Vec::new();
    // More than the disk and a buffer hold.
    for number in 0..1000 {
        let frame = frame(number, 1400);
        send(&mut transmit, &frame);
        session.kick(TRANSMIT);
        assert!(host.wire.receive() == frame, "frame {number}");
        while transmit.take_used().is_none() {
            session.wait_call(TRANSMIT);
        }
        sent.push((SENT, frame));
    }
    daemon.wait_line("cannot be written");
    let last = frame(9999, 80);
    send(&mut transmit, &last);
    session.kick(TRANSMIT);
    assert_eq!(host.wire.receive(), last);
    daemon.terminate();
    assert_eq!(daemon.wait().0, Some(0));
    let ended = host.events("capture_ended").pop().unwrap();
    assert!(ended["reason"].as_str().unwrap().contains("No space left"), "{ended}");
    // Whole blocks, in order, as far as they go.
    let found = captured(&pcap);
    assert_eq!(ended["frames"], found.len());
    assert_eq!(ended["bytes"], std::fs::metadata(&pcap).unwrap().len());
    assert!(found.len() > 256 && found.len() < sent.len(), "{}", found.len());
    assert!(found == sent[..found.len()]);
}

#[test]
fn a_file_that_cannot_be_is_one_clear_line() {
    let host = Host::new();
    let (code, said) = fails(&mut host.capturing(Path::new("/nowhere/pcap")));
    let last = said.lines().last().unwrap();
    assert_eq!(code, Some(3), "{said}");
    assert!(last.contains("/nowhere/pcap") && last.contains("--pcap"), "{said}");
    let (code, said) = fails(host.capturing(&host.path("pcap")).args(["--pcap-limit-mib", "0"]));
    assert_eq!(code, Some(2), "{said}");
}
