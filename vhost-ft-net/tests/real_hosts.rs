//! The real daemon on a real TAP in a network namespace of its own. Needs root, `ip` and /dev/net/tun: feature `real-hosts`.
//!
//! Each test enters a fresh namespace with its thread; the daemon it spawns lives there too. The other end of the TAP is a
//! packet socket: it sees what the daemon sends, and what it sends the daemon receives.

#![cfg(feature = "real-hosts")]

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

mod wire;

use std::{process::Command, time::Duration};

use ft_client::{
    counters::{OfDevice, OfQueue},
    gate::{Answer, Request},
};
use ft_protocol::{Generation, Lsn, Role};
use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use support::{
    daemon::{Daemon, fails, text},
    driver::{Driver, memory, readable, writable},
    frontend::Session,
    ft_log::{FtLog, Joined},
};
use wire::{Wire, frame, host::Host};

const ALL_FEATURES: u64 = u64::MAX;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const TAP: &str = "tap-test";
/// Long enough for a frame that leaks to be seen.
const A_WHILE: Duration = Duration::from_millis(200);

/// The guest: both drivers, buffers of 2 KiB each from 1 MiB (receive) and 8 MiB (transmit) on.
struct Nic {
    receive: Driver,
    transmit: Driver,
    sent: u64,
    /// What it writes before a frame.
    header: [u8; 12],
}

impl Nic {
    fn new(memory: &GuestMemoryMmap) -> Self {
        Self {
            receive: Driver::new(memory, 0x1_0000, 64, true),
            transmit: Driver::new(memory, 0x3_0000, 64, true),
            sent: 0,
            // Full of lies: a protected guest is offered no offload, and nobody looks.
            header: [0xff; 12],
        }
    }

    fn add_receive(&mut self, count: u64) {
        for _ in 0..count {
            // One buffer each: heads come back in any order, so the address follows from the head.
            let address = |head: u16| (1 << 20) + u64::from(head) * 2048;
            let head = self.receive.next_head();
            assert_eq!(self.receive.add(&[writable(address(head), 2048)]), head);
        }
    }

    fn take_received(&mut self) -> Option<Vec<u8>> {
        let (head, length) = self.receive.take_used()?;
        let bytes = self.receive.read((1 << 20) + u64::from(head) * 2048, length as usize);
        assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        Some(bytes[12..].to_vec())
    }

    fn send(&mut self, frame: &[u8]) {
        let at = (8 << 20) + (self.sent % 64) * 2048;
        self.sent += 1;
        self.transmit.write(at, &self.header);
        self.transmit.write(at + 12, frame);
        let length = 12 + frame.len() as u32;
        self.transmit.add(&[readable(at, 20), readable(at + 20, length - 20)]);
    }
}

impl Host {
    fn new() -> Self {
        Self::on(Wire::in_a_new_namespace(TAP))
    }

    fn on_tap(&self) -> Command {
        self.command(&["--tap", TAP])
    }

    fn joined(&self, live: bool) -> (Daemon, Joined, Nic, Session) {
        let log = FtLog::listen(&self.path("ft-log"));
        let mut command = self.on_tap();
        command.args(["--ft-log", text(&log.path), "--vm", "ledger", "--device", "net0"]);
        let daemon = Daemon::listening(&mut command);
        let mut joined = log.welcome(1, if live { Role::Recording } else { Role::Replaying });
        let memory = memory();
        let nic = Nic::new(&memory);
        let socket = self.path("socket");
        let session = Session::start(&socket, &memory, ALL_FEATURES, &[&nic.receive, &nic.transmit]);
        joined.shim.call(&Request::Start { live }).unwrap();
        (daemon, joined, nic, session)
    }
}

fn kick(joined: &mut Joined, queue: usize, marker: u64) -> Answer {
    let request = Request::Kick {
        queue: queue as u16,
        marker: Lsn(marker),
        generation: Generation(1),
    };
    joined.shim.call(&request).unwrap()
}

#[test]
fn alone_frames_pass_both_ways() {
    let host = Host::new();
    let daemon = Daemon::listening(&mut host.on_tap());
    let memory = memory();
    let mut nic = Nic::new(&memory);
    nic.header = [0; 12];
    let mut session = Session::start(
        &host.path("socket"),
        &memory,
        ALL_FEATURES,
        &[&nic.receive, &nic.transmit],
    );
    assert_eq!(session.config(12)[..6], [0x52, 0x54, 0, 1, 2, 3]);
    nic.add_receive(4);
    session.kick(RECEIVE);
    host.wire.wait_for_link(TAP);
    let mut kicks = [1, 0];
    for round in 0..100 {
        let (out, back) = (frame(round, 100), frame(round + 1000, 1400));
        nic.send(&out);
        if nic.transmit.wants_kick() {
            session.kick(TRANSMIT);
            kicks[TRANSMIT] += 1;
        }
        assert_eq!(host.wire.receive(), out);
        session.wait_call(TRANSMIT);
        assert!(nic.transmit.take_used().is_some());
        host.wire.send(&back);
        let received = loop {
            if let Some(received) = nic.take_received() {
                break received;
            }
            session.wait_call(RECEIVE);
        };
        assert_eq!(received, back);
        nic.add_receive(1);
        if nic.receive.wants_kick() {
            session.kick(RECEIVE);
            kicks[RECEIVE] += 1;
        }
    }
    daemon.terminate();
    assert_eq!(daemon.wait().0, Some(0));
    // What the device tells at its end is all that happened.
    let told = host.events("counters").pop().unwrap();
    for (queue, bytes) in [(RECEIVE, 140_000), (TRANSMIT, 10_000)] {
        let of_queue = &told["queues"][queue];
        for (what, count) in [
            ("frames", 100),
            ("bytes", bytes),
            ("used_buffers", 100),
            ("kicks", kicks[queue]),
        ] {
            assert_eq!(of_queue[what], count, "{what} of {queue} in {told}");
        }
        assert_eq!(of_queue["lost"], serde_json::json!({}));
    }
    assert_eq!((&told["held"], &told["announced"]), (&0.into(), &0.into()));
}

#[test]
fn alone_a_guest_without_buffers_gets_its_frames_once_it_has_some() {
    let host = Host::new();
    let mut daemon = Daemon::listening(&mut host.on_tap());
    let memory = memory();
    let mut nic = Nic::new(&memory);
    let session = Session::start(
        &host.path("socket"),
        &memory,
        ALL_FEATURES,
        &[&nic.receive, &nic.transmit],
    );
    daemon.wait_line("attached");
    host.wire.wait_for_link(TAP);
    let sent: Vec<_> = (0..20).map(|number| frame(number, 200)).collect();
    sent.iter().for_each(|frame| host.wire.send(frame));
    let mut received = Vec::new();
    while received.len() < sent.len() {
        nic.add_receive(3);
        if nic.receive.wants_kick() {
            session.kick(RECEIVE);
        }
        let all = sent.len().min(received.len() + 3);
        while received.len() < all {
            match nic.take_received() {
                Some(frame) => received.push(frame),
                None => session.wait_call(RECEIVE),
            }
        }
    }
    assert_eq!(received, sent);
}

#[test]
fn a_held_frame_is_not_on_the_wire_before_its_commit() {
    let host = Host::new();
    let (daemon, mut joined, mut nic, _session) = host.joined(true);
    let frames: Vec<_> = (0..6).map(|number| frame(number, 300)).collect();
    for (pair, marker) in frames.chunks(2).zip([10, 20, 30]) {
        pair.iter().for_each(|frame| nic.send(frame));
        // Completed to the guest at once: it does not wait for the backup.
        assert!(kick(&mut joined, TRANSMIT, marker).interrupt);
        assert!(nic.transmit.take_used().is_some() && nic.transmit.take_used().is_some());
    }
    let counters = joined.counters.clone();
    let held = || {
        let all = [OfDevice::Held, OfDevice::Released, OfDevice::Discarded];
        all.map(|what| counters.of_device(what))
    };
    let bytes = || [OfDevice::HeldBytes, OfDevice::HeldBytesMax].map(|what| counters.of_device(what));
    assert_eq!((held(), bytes()), ([6, 0, 0], [6 * 312; 2]));
    assert_eq!(counters.of_queue(1, OfQueue::Kicks), 3);
    assert!(!host.wire.anything_within(A_WHILE));
    joined.commit(9);
    assert!(!host.wire.anything_within(A_WHILE));
    joined.commit(10);
    assert_eq!([host.wire.receive(), host.wire.receive()], frames[..2]);
    assert!(!host.wire.anything_within(A_WHILE));
    joined.commit(30);
    assert_eq!([(); 4].map(|()| host.wire.receive()), frames[2..]);
    assert_eq!((held(), bytes()), ([6, 6, 0], [0, 6 * 312]));
    let times = counters.hold_times();
    assert_eq!(times.iter().map(|(_, frames)| frames).sum::<u64>(), 6);
    // All but the first two were held during two looks at the wire that found nothing.
    let long = times
        .iter()
        .filter(|(upper, _)| u128::from(*upper) > A_WHILE.as_micros());
    assert!(long.map(|(_, frames)| frames).sum::<u64>() >= 4, "{times:?}");
    // Committed already: it leaves at once.
    nic.send(&frames[0]);
    kick(&mut joined, TRANSMIT, 30);
    assert_eq!(host.wire.receive(), frames[0]);

    // What a halted side holds is never sent.
    nic.send(&frames[1]);
    kick(&mut joined, TRANSMIT, 40);
    joined.region.publish(Role::Halted, Generation(1), Lsn(0));
    joined.commit(40);
    joined.publish(Role::Halted);
    assert_eq!(daemon.wait().0, Some(4));
    assert!(!host.wire.anything_within(A_WHILE));
    assert_eq!((held(), bytes()), ([8, 7, 1], [0, 6 * 312]));
    assert_eq!(host.events("counters").last().unwrap()["discarded"], 1);
    let counted: u64 = host.events("hold").last().unwrap()["buckets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|bucket| bucket[1].as_u64().unwrap())
        .sum();
    assert!(counted > 0);
}

#[test]
fn received_frames_are_logged_and_reach_the_guest_when_delivered() {
    let host = Host::new();
    let (_daemon, mut joined, mut nic, _session) = host.joined(true);
    nic.add_receive(8);
    kick(&mut joined, RECEIVE, 1);
    host.wire.wait_for_link(TAP);
    let sent: Vec<_> = (0..5).map(|number| frame(number, 500)).collect();
    let buffers = |nic: &Nic| nic.receive.read(1 << 20, 64 * 2048);
    let mut before = buffers(&nic);
    sent.iter().for_each(|frame| host.wire.send(frame));
    let mut received = Vec::new();
    let mut inputs = 0;
    while received.len() < sent.len() {
        let (_, sequence, payload) = joined.next_input();
        inputs += 1;
        assert_eq!(sequence, inputs);
        assert_eq!(payload.len() % 504, 0);
        joined.wait_inputs(inputs);
        assert!(nic.take_received().is_none());
        assert!(buffers(&nic) == before, "guest memory changes only at delivery");
        assert!(
            joined
                .shim
                .call(&Request::Deliver { through: inputs })
                .unwrap()
                .interrupt
        );
        received.extend(std::iter::from_fn(|| nic.take_received()));
        before = buffers(&nic);
    }
    assert_eq!(received, sent);
    let counted = [
        OfQueue::Frames,
        OfQueue::Bytes,
        OfQueue::UsedBuffers,
        OfQueue::InterruptsRaised,
    ];
    let counted = counted.map(|what| joined.counters.of_queue(0, what));
    assert_eq!(counted, [5, 2500, 5, inputs]);
}

#[test]
fn a_backup_counts_what_it_hears() {
    let host = Host::new();
    let (_daemon, joined, ..) = host.joined(false);
    host.wire.wait_for_link(TAP);
    (0..3).for_each(|number| host.wire.send(&frame(number, 100)));
    let deadline = std::time::Instant::now() + support::frontend::PATIENCE;
    while joined.counters.of_device(OfDevice::Overheard) != 3 {
        assert!(std::time::Instant::now() < deadline, "nothing is heard");
        std::thread::yield_now();
    }
    assert_eq!(joined.counters.of_queue(0, OfQueue::Frames), 0);
}

#[test]
fn a_backup_sends_nothing_until_it_goes_live_and_then_announces_itself() {
    let host = Host::new();
    let (_daemon, mut joined, mut nic, _session) = host.joined(false);
    nic.add_receive(8);
    kick(&mut joined, RECEIVE, 1);
    let last: Vec<_> = (0..3).map(|number| frame(number, 300)).collect();
    for frame in &last {
        nic.send(frame);
        kick(&mut joined, TRANSMIT, 2);
    }
    let from_log = frame(77, 400);
    let mut payload = 400u32.to_le_bytes().to_vec();
    payload.extend_from_slice(&from_log);
    let request = Request::DeliverLogged {
        sequence: 1,
        queue: 0,
        payload: &payload,
    };
    assert!(joined.shim.call(&request).unwrap().interrupt);
    assert_eq!(nic.take_received(), Some(from_log));
    joined.commit(u64::MAX);
    assert!(!host.wire.anything_within(A_WHILE));
    let counters = joined.counters.clone();
    let counted = || {
        let all = [OfDevice::Kept, OfDevice::SentAgain, OfDevice::Announced, OfDevice::Held];
        all.map(|what| counters.of_device(what))
    };
    assert_eq!(counted(), [3, 0, 0, 0]);

    joined.region.publish(Role::Live, Generation(2), Lsn(0));
    let generation = Generation(2);
    joined.shim.call(&Request::GoLive { inputs: 1, generation }).unwrap();
    let arp = host.wire.receive();
    assert_eq!((&arp[12..14], &arp[28..32]), (&[8, 6][..], &wire::GUEST[..]));
    assert_eq!(host.wire.receive()[12..14], [0x80, 0x35]);
    assert_eq!([(); 3].map(|()| host.wire.receive()), last[..]);
    assert_eq!(host.events("announced").len(), 1);
    let [kept, again, announced, held] = counted();
    assert_eq!([kept, again, held], [3, 3, 0]);
    assert!(announced >= 2);
    // Twice more, a little later.
    for _ in 0..2 {
        assert_eq!(host.wire.receive(), arp);
        assert_eq!(host.wire.receive()[12..14], [0x80, 0x35]);
    }
    let next = frame(99, 300);
    nic.send(&next);
    kick(&mut joined, TRANSMIT, 1);
    assert_eq!(host.wire.receive(), next);
    host.wire.wait_for_link(TAP);
    host.wire.send(&next);
    assert_eq!(joined.next_input().1, 2);
}

#[test]
fn a_tap_that_cannot_be_had_is_one_clear_line() {
    let host = Host::new();
    let _daemon = Daemon::listening(&mut host.on_tap());
    // Wait until the first one has it.
    let mut other = Command::new(env!("CARGO_BIN_EXE_vhost-ft-net"));
    other.args(["--socket-path", text(&host.path("other")), "--tap", "nothing"]);
    let (code, said) = fails(&mut other);
    assert_eq!((code, said.lines().count()), (Some(3), 1), "{said}");
    assert!(said.contains("no network interface 'nothing'"), "{said}");
    let mut other = Command::new(env!("CARGO_BIN_EXE_vhost-ft-net"));
    other.args(["--socket-path", text(&host.path("other")), "--tap", "lo"]);
    let (code, said) = fails(&mut other);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("cannot attach to TAP 'lo'"), "{said}");
}
