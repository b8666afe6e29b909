//! What an acknowledgement must mean before outputs leave, and a backup that trails.

use std::sync::atomic::{AtomicBool, Ordering};

use ft_protocol::{Lsn, Role, limits::THROTTLE_MAX};

use crate::world::{DEADLINE, FINGERPRINT, Host, HostId, VM, World, append};

#[test]
fn outputs_wait_for_the_replay_where_that_was_asked_for() {
    let world = World::new();
    let (mut a, mut b) = world.pair_with(&["--ack", "replayed"]);
    let last = a.append(20);
    // Everything is there, and was acknowledged as received.
    while b.daemon.wait_event("log")["entries"] != last.0 {}
    assert_eq!(a.region().committed().lsn(), Lsn::ZERO);
    b.replay_through(Lsn(1), Lsn(12));
    a.wait_committed(Lsn(12));
    assert_eq!(a.region().committed().lsn(), Lsn(12));
    b.replay_through(Lsn(13), last);
    a.wait_committed(last);
}

/// Every batch is flushed, which takes longer than to send it.
#[test]
fn a_disk_that_is_slower_than_the_log_slows_the_primary_where_outputs_wait_for_it() {
    let world = World::new();
    let (mut a, mut b) = world.pair_with(&["--ack", "durable", "--journal-backlog-mib", "4"]);
    let count = 20_000;
    let mut replayed = Lsn::ZERO;
    std::thread::scope(|scope| {
        let locals = &mut a.locals;
        let appended = scope.spawn(move || append(&mut locals.shim, &mut locals.devices, count));
        while replayed < Lsn(count) {
            assert_eq!(b.region().role(), Role::Replaying);
            if let Some(lsn) = b.try_replay() {
                replayed = lsn;
                b.consumed(lsn);
            }
        }
        assert_eq!(appended.join().unwrap(), Lsn(count));
    });
    a.wait_committed(Lsn(count));
    assert_eq!(
        (a.region().role(), b.region().role()),
        (Role::Recording, Role::Replaying)
    );
}

#[test]
fn a_backup_that_cannot_flush_what_outputs_wait_for_ends_and_the_primary_goes_on() {
    let world = World::new();
    let daemon = world.start_limited(HostId::B, &["--vm", VM, "--ack", "durable"]);
    let mut b = Host::join(daemon, &world.socket(HostId::B), &FINGERPRINT);
    let mut a = world.host_with(HostId::A, &["--ack", "durable"]);
    a.wait_role(Role::Recording);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (shim, devices, over) = (&mut a.locals.shim, &mut a.locals.devices, &over);
        let region = std::sync::Arc::clone(&shim.region);
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                append(shim, devices, 100);
            }
        });
        while b.region().role() == Role::Replaying {
            if let Some(lsn) = b.try_replay() {
                b.consumed(lsn);
            }
        }
        assert_eq!(b.daemon.wait_code(), 3);
        assert!(b.daemon.logged.contains("the journal failed"), "{}", b.daemon.logged);
        while region.role() != Role::Live {
            let ticket = region.shim_ticket();
            region.sleep_shim(ticket, Some(DEADLINE / 600));
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(a.daemon.wait_event("go_live")["generation"], 2);
}

#[test]
fn a_backup_that_trails_slows_the_primary_down_to_a_standstill_and_lets_it_go_again() {
    let world = World::new();
    let (mut a, mut b) = world.pair();
    let last = a.append(50);
    a.wait_committed(last);
    assert!(a.daemon.wait_event("throttle")["permille"].as_u64() > Some(0));
    let mut levels = vec![0];
    while levels.last() != Some(&THROTTLE_MAX) {
        let ticket = a.region().shim_ticket();
        let level = a.region().throttle();
        if levels.last() != Some(&level) {
            levels.push(level);
        } else {
            a.region().sleep_shim(ticket, Some(DEADLINE));
        }
    }
    assert!(levels.is_sorted(), "{levels:?}");
    b.replay_through(Lsn(1), last);
    let event = a.daemon.wait_event("throttle");
    assert_eq!((&event["permille"], a.region().throttle()), (&0.into(), 0));
    assert_eq!(a.region().role(), Role::Recording);
}
