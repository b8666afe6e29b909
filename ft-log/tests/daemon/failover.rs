//! A pair replicates; whoever survives goes live, once.

use ft_protocol::{Generation, Lsn, Role};
use nix::sys::signal::Signal;

use serde_json::Value;

use crate::world::{HostId, SUSPICIOUS, World, append};

#[test]
fn entries_arrive_equal_and_in_order_and_are_committed() {
    let world = World::new();
    let (mut a, mut b) = world.pair();
    let last = a.append(3000);
    a.wait_committed(last);
    let replayed = b.replay_through(Lsn(1), last);
    assert_eq!(a.region().committed().lsn(), last);
    // The log counts what went through it, on both sides alike.
    for host in [&mut a, &mut b] {
        loop {
            let event = host.daemon.wait_event("log");
            if event["entries"] == last.0 {
                assert_eq!(event["bytes"], replayed.len());
                break;
            }
        }
    }
}

#[test]
fn the_backup_goes_live_after_the_primary_was_killed_and_everything_is_consumed() {
    let world = World::new();
    let (mut a, mut b) = world.pair_with(SUSPICIOUS);
    let last = a.append(100);
    a.wait_committed(last);
    a.daemon.signal(Signal::SIGKILL);
    b.daemon.wait_event("suspect");
    let verdict = b.daemon.wait_event("arbiter");
    assert_eq!(
        (&verdict["verdict"], &verdict["generation"]),
        (&"won".into(), &2.into())
    );
    b.wait_role(Role::GoingLive);
    assert_eq!(b.region().replay_end(), last);
    assert_eq!(b.region().committed().lsn(), Lsn::ZERO);
    b.replay_through(Lsn(1), last);
    assert_eq!(b.daemon.wait_event("go_live")["generation"], 2);
    b.wait_role(Role::Live);
    assert_eq!(b.region().generation(), Generation(2));
    assert_eq!(b.region().committed().lsn(), Lsn::MAX);
    // It executes alone: its log goes on behind what it replayed, and ends with the guest.
    assert_eq!(b.append(500), Lsn(last.0 + 500));
    b.power_off();
    assert_eq!(b.daemon.wait_code(), 0);
    assert_eq!(b.region().role(), Role::Off);
}

#[test]
fn a_primary_that_was_stopped_for_too_long_loses_and_halts() {
    let world = World::new();
    let (mut a, mut b) = world.pair_with(SUSPICIOUS);
    let last = a.append(10);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    a.daemon.signal(Signal::SIGSTOP);
    b.wait_role(Role::Live);
    a.append(5);
    a.daemon.signal(Signal::SIGCONT);
    assert_eq!(a.daemon.wait_code(), 4);
    assert!(
        a.daemon
            .logged
            .contains("halted: lost the arbitration for generation 2")
    );
    assert_eq!(a.region().role(), Role::Halted);
    assert_eq!(a.region().committed().lsn(), last, "a halted side committed");
    assert!(a.daemon.rest_of_events().contains(&"halted".to_owned()));
}

#[test]
fn a_backup_that_was_stopped_for_too_long_loses_and_halts() {
    let world = World::new();
    let (mut a, mut b) = world.pair_with(SUSPICIOUS);
    let last = a.append(10);
    a.wait_committed(last);
    b.daemon.signal(Signal::SIGSTOP);
    a.append(5);
    a.wait_role(Role::Live);
    b.daemon.signal(Signal::SIGCONT);
    assert_eq!(b.daemon.wait_code(), 4);
    assert!(
        b.daemon
            .logged
            .contains("halted: lost the arbitration for generation 2")
    );
    assert_eq!(b.region().role(), Role::Halted);
    assert_eq!(b.region().committed().lsn(), Lsn::ZERO, "a halted side committed");
    let events = b.daemon.rest_of_events();
    assert!(!events.iter().any(|event| event == "go_live"), "{events:?}");
    assert_eq!(a.region().role(), Role::Live);
}

#[test]
fn the_primary_goes_live_alone_after_the_backup_was_killed() {
    let world = World::new();
    let (mut a, b) = world.pair_with(SUSPICIOUS);
    b.daemon.signal(Signal::SIGKILL);
    let last = a.append(50);
    a.wait_committed(last);
    assert_eq!(a.daemon.wait_event("backup_gone")["generation"], 2);
    a.daemon.wait_event("go_live");
    a.wait_role(Role::Live);
    assert_eq!(a.append(3000), Lsn(3050), "the log goes on");
    a.power_off();
    assert_eq!(a.daemon.wait_code(), 0);
}

#[test]
fn a_power_off_ends_both_sides_and_nobody_goes_live() {
    let world = World::new();
    let (mut a, mut b) = world.pair();
    a.append(9);
    let last = a.power_off();
    assert_eq!(a.daemon.wait_code(), 0);
    b.replay_through(Lsn(1), last);
    assert_eq!(b.daemon.wait_code(), 0);
    for host in [&mut a, &mut b] {
        assert_eq!(host.region().role(), Role::Off);
        let events = host.daemon.rest_of_events();
        assert!(
            !events.iter().any(|event| event == "go_live" || event == "suspect"),
            "{events:?}"
        );
    }
}

#[test]
fn an_operator_who_ends_the_primary_hands_over_at_once() {
    let world = World::new();
    // With heartbeats this rare only the message can be the reason.
    let (mut a, mut b) = world.pair_with(&["--heartbeat-interval-ms", "5000"]);
    let last = a.append(20);
    a.wait_committed(last);
    a.daemon.signal(Signal::SIGTERM);
    assert_eq!(a.daemon.wait_code(), 0);
    assert_eq!(a.region().role(), Role::Halted);
    assert_eq!(b.daemon.wait_event("suspect")["reason"], "the peer's replica ended");
    b.replay_through(Lsn(1), last);
    b.wait_role(Role::Live);
}

#[test]
fn an_operator_may_end_a_daemon_that_has_no_peer_yet() {
    let world = World::new();
    let mut a = world.start(HostId::A);
    a.signal(Signal::SIGTERM);
    assert_eq!(a.wait_code(), 0);
    assert!(!world.socket(HostId::A).exists(), "the socket file is left behind");
}

#[test]
fn a_local_process_that_ends_or_fails_ends_its_replica() {
    let world = World::new();
    let (mut a, mut b) = world.pair();
    let last = a.append(3);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    let blk = a.devices.remove(0);
    drop(blk);
    assert_eq!(a.daemon.wait_code(), 6);
    assert!(a.daemon.logged.contains("halted: blk0 ended"));
    b.wait_role(Role::Live);
    ft_client::handshake::report_failure(&mut b.shim.stream, "diverged at exit 17");
    assert_eq!(b.daemon.wait_code(), 5);
    assert!(b.daemon.logged.contains("diverged at exit 17"));
}

#[test]
fn a_side_that_runs_alone_is_live_from_the_start() {
    let world = World::new();
    let mut a = world.host_with(HostId::A, &["--alone"]);
    assert_eq!(a.daemon.wait_event("go_live")["generation"], 1);
    a.wait_role(Role::Live);
    assert_eq!(a.region().committed().lsn(), Lsn::MAX);
    a.append(100);
    a.power_off();
    assert_eq!(a.daemon.wait_code(), 0);
    assert!(world.path("arbiter").join("ledger.g1").exists());
}

#[test]
fn a_stopped_backup_stops_the_producers_and_no_entry_is_lost() {
    let world = World::new();
    let (mut a, mut b) = world.pair();
    b.daemon.signal(Signal::SIGSTOP);
    // More than the rings, the backlog and the sockets hold together: the producers stand still until the backup goes on.
    let count = 60_000;
    std::thread::scope(|scope| {
        let (shim, devices) = (&mut a.locals.shim, &mut a.locals.devices);
        let appended = scope.spawn(move || append(shim, devices, count));
        let mut entries = Value::Null;
        loop {
            let now = a.daemon.wait_event("log")["entries"].clone();
            if now == entries && now != 0 {
                break;
            }
            entries = now;
        }
        assert!(entries.as_u64().unwrap() < count && !appended.is_finished());
        b.daemon.signal(Signal::SIGCONT);
        b.replay_through(Lsn(1), Lsn(count));
        assert_eq!(appended.join().unwrap(), Lsn(count));
    });
    a.wait_committed(Lsn(count));
}

#[test]
fn a_backup_whose_replay_hangs_ends_and_the_primary_goes_on_alone() {
    let world = World::new();
    let (mut a, mut b) = world.pair_with(&["--replay-timeout-ms", "300"]);
    // Everything of the backup is well but its shim, which applies nothing.
    let last = a.append(10);
    let halted = b.daemon.wait_event("halted")["reason"].clone();
    assert!(
        halted.as_str().unwrap().contains("applied nothing for 300 ms"),
        "{halted}"
    );
    assert_eq!(b.daemon.wait_code(), 6);
    let suspected = a.daemon.wait_event("suspect")["reason"].clone();
    assert_eq!(suspected, "the peer's replica ended");
    a.wait_role(Role::Live);
    a.wait_committed(last);
    assert_eq!(a.region().generation(), Generation(2));
}
