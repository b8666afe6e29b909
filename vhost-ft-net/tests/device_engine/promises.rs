//! What a build that is whole keeps.

use ft_client::counters::OfDevice;
use ft_protocol::Role;

use super::{
    A_WHILE, Guest, TAP, WRITES, arrive, joined, primary,
    support::daemon::{fails, text},
    wire::{Wire, frame, host::Host},
};

#[test]
fn frames_leave_when_every_write_before_them_is_committed() {
    let host = Host::on(Wire::with_options(TAP, &[]));
    let (daemon, mut joined, mut guest) = primary(&host);
    guest.send(0..3);
    guest.taken(3);
    assert!(!host.wire.anything_within(A_WHILE), "nothing is committed");
    joined.commit(WRITES);
    assert!(
        !host.wire.anything_within(A_WHILE),
        "the other side may have gone live behind the last write"
    );
    joined.commit(WRITES + 1);
    arrive(&host, 0..3);
    assert_eq!(
        joined.take_entry(),
        Some((WRITES + 1, 1, "kick")),
        "one marker for the three"
    );
    assert_eq!(joined.take_entry(), None);

    // The disk writes on; who loses its backup waits for the arbiter, and holds nothing once it is alone.
    joined.log_through(20);
    guest.send(3..4);
    guest.taken(1);
    joined.publish(Role::Arbitrating);
    guest.send(4..5);
    guest.taken(1);
    assert!(!host.wire.anything_within(A_WHILE), "the arbiter has not decided");
    joined.publish(Role::Live);
    joined.commit(u64::MAX);
    arrive(&host, 3..5);
    guest.send(5..9);
    arrive(&host, 5..9);
    assert!(joined.counters.of_device(OfDevice::Held) >= 5);

    // Only the disk ends a VM in order.
    drop(guest);
    daemon.terminate();
    joined.publish(Role::Off);
    assert_eq!(daemon.wait().0, Some(0));
}

#[test]
fn a_side_that_lost_sends_nothing_more() {
    let host = Host::on(Wire::with_options(TAP, &[]));
    let (daemon, joined, mut guest) = primary(&host);
    guest.send(0..3);
    guest.taken(3);
    joined.publish(Role::Halted);
    let (code, said) = daemon.wait();
    assert_eq!(code, Some(4), "{said}");
    assert!(!host.wire.anything_within(A_WHILE));
}

#[test]
fn a_backup_waits_and_tells_the_network_when_its_guest_is_there() {
    let host = Host::on(Wire::with_options(TAP, &[]));
    let (mut daemon, joined) = joined(&host, Role::Replaying);
    daemon.wait_line("waiting");
    host.wire.send(&frame(1, 100));
    joined.publish(Role::GoingLive);
    daemon.wait_line("GoingLive");
    assert!(!host.path("socket").exists(), "nobody may start the VM there");
    assert!(!host.wire.anything_within(A_WHILE));
    joined.publish(Role::Live);
    joined.commit(u64::MAX);
    daemon.wait_line("listening");
    let mut guest = Guest::at(&host.path("socket"));
    guest.send(0..1);
    let announced = host.wire.receive();
    assert_eq!(announced[12..14], [0x80, 0x35], "a RARP comes first: {announced:?}");
    assert_eq!(announced[6..12], [0x52, 0x54, 0, 1, 2, 3]);
    arrive(&host, 0..1);
    // Asked to end while a guest runs: there is nobody to hand over to.
    daemon.terminate();
    assert_eq!(daemon.wait().0, Some(0));
}

#[test]
fn what_does_not_go_together_is_said() {
    let host = Host::on(Wire::with_options(TAP, &[]));
    let log = host.path("ft-log");
    let engine = [
        "--engine",
        "device",
        "--ft-log",
        text(&log),
        "--vm",
        "stock",
        "--device",
        "net0",
    ];
    let (code, said) = fails(host.command(&["--tap", TAP, "--io-threads", "2"]).args(engine));
    assert_eq!(code, Some(3));
    assert!(said.contains("leave --io-threads out"), "{said}");
    let (code, said) = fails(&mut host.command(&["--tap", TAP, "--engine", "device"]));
    assert_eq!(code, Some(2));
    assert!(said.contains("--ft-log"), "{said}");
}
