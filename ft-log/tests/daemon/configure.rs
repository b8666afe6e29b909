//! The operator changes the times of a running pair.

use std::process::Command;

use ft_protocol::{Lsn, Role};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    control::{ask, ask_json, pair, wait_status},
    world::{HostId, World},
};

/// The times in force, by one name each.
fn timing(world: &World, host: HostId) -> Value {
    ask_json(world, host, &["status"])["timing"].clone()
}

#[test]
fn a_change_is_an_entry_of_the_log_and_holds_on_both_sides_and_after_the_failover() {
    let world = World::new();
    let (mut a, mut b) = pair(&world);
    let before = a.append(10);
    let change = ["configure", "--heartbeat-misses", "100", "--lag-target-ms", "250"];
    let answer = ask_json(&world, HostId::A, &change);
    let lsn = before.next();
    assert_eq!(answer["lsn"], lsn.0);
    assert_eq!(
        (
            &answer["timing"]["heartbeat_misses"],
            &answer["timing"]["lag_target_ms"]
        ),
        (&json!(100), &json!(250))
    );
    let last = a.append(10);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    for host in [&mut a, &mut b] {
        let event = host.daemon.wait_event("configured");
        assert_eq!(
            (&event["lsn"], &event["heartbeat_misses"]),
            (&json!(lsn.0), &json!(100))
        );
    }
    let in_force = timing(&world, HostId::A);
    assert_eq!(in_force, answer["timing"]);
    assert_eq!(timing(&world, HostId::B), in_force);
    // Whoever replays the log offline, or reads it, finds the entry where it was.
    wait_status(&world, HostId::B, |status| status["journal"]["waiting_bytes"] == 0);
    let dumped = Command::new(env!("CARGO_BIN_EXE_ft-log"))
        .args(["dump", "--kind", "configuration", "--format", "json"])
        .arg(world.journal(HostId::B))
        .output()
        .unwrap();
    let dumped: Value = serde_json::from_slice(&dumped.stdout).unwrap();
    assert_eq!((&dumped["lsn"], &dumped["lag_target_ms"]), (&json!(lsn.0), &json!(250)));

    // 100 missed heartbeats are two seconds, where the pair was started with far more.
    a.daemon.signal(Signal::SIGKILL);
    b.wait_role(Role::Live);
    assert_eq!(timing(&world, HostId::B), in_force);
    let (code, said, error) = ask(&world, HostId::B, &["configure", "--lag-limit-ms", "2000"]);
    assert_eq!(code, 0, "{said}{error}");
    assert_eq!(timing(&world, HostId::B)["lag_limit_ms"], 2000);
    assert!(b.append(5) > Lsn(5), "the log goes on around it");
}

#[test]
fn a_change_that_no_pair_can_live_with_or_that_is_asked_of_the_backup_is_refused_with_the_reason() {
    let world = World::new();
    let (mut a, mut b) = pair(&world);
    let before = timing(&world, HostId::A);
    for (host, change, reason) in [
        (
            HostId::A,
            &["--heartbeat-misses", "1"][..],
            "--heartbeat-misses must be in 2..=10000",
        ),
        (
            HostId::A,
            &["--lag-target-ms", "5000"],
            "--lag-target-ms must not be above --lag-limit-ms",
        ),
        (
            HostId::A,
            &["--heartbeat-interval-ms", "60000"],
            "--channel-timeout-ms must be at least 4 times",
        ),
        (
            HostId::B,
            &["--heartbeat-misses", "50"],
            "the side that executes the VM",
        ),
    ] {
        let words: Vec<_> = ["configure"].iter().chain(change).copied().collect();
        let (code, said, error) = ask(&world, host, &words);
        assert!(code == 3 && error.contains(reason), "{code} {said}{error}");
    }
    let (code, _, error) = ask(&world, HostId::A, &["configure"]);
    assert!(code == 2 && error.contains("--heartbeat-misses"), "{code} {error}");
    assert_eq!(
        (timing(&world, HostId::A), timing(&world, HostId::B)),
        (before.clone(), before)
    );
    let last = a.append(20);
    assert_eq!(last, Lsn(20), "nothing of that is in the log");
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
}

#[test]
fn a_backup_takes_the_times_of_its_primary() {
    let world = World::new();
    let control = world.path("B.control").display().to_string();
    let _a = world.host_with(HostId::A, &["--lag-target-ms", "70"]);
    let mut b = world.host_with(HostId::B, &["--lag-target-ms", "90", "--control", &control]);
    b.wait_role(Role::Replaying);
    b.daemon.wait_log("the times are those of the primary");
    let status = wait_status(&world, HostId::B, |status| status["role"] == "replaying");
    assert_eq!(status["timing"]["lag_target_ms"], 70);
}
