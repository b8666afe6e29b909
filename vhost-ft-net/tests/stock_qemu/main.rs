//! Stock QEMU and a Debian kernel on the daemon, with a TAP in a network namespace of the test's own. Needs root, /dev/net/tun and
//! `FT_STOCK_GUESTS`, the directory of scripts/guest-image's guests; run by scripts/test.

#[path = "../../../crates/ft-vhost/tests/support/mod.rs"]
mod support;
#[path = "../wire/mod.rs"]
mod wire;

mod world;

use serde_json::json;
use support::stock::Qmp;
use wire::ip;
use world::{TAP, World};

/// Bytes of a transfer, each way (`FT_MEGABYTES`).
fn bytes() -> usize {
    std::env::var("FT_MEGABYTES").map_or(16, |number| number.parse::<usize>().unwrap()) << 20
}

#[test]
fn bulk_arrives_whole_both_ways_in_frames_that_the_host_cuts() {
    for kernel in ["6.1", "6.12"] {
        let world = World::new(1, &[]);
        let _daemon = world.daemon(&[]);
        let mut machine = world.machine(kernel, &[]);
        let longest = world.exchange(&mut machine, bytes(), 1);
        // No wire takes such frames: both sides leave the cutting to the other.
        assert!(longest.sent > 4 * 1514 && longest.received > 4 * 1514, "{longest:?}");
        world.ask(
            &mut machine,
            "ping -A -q -c 1000 10.77.0.1 | grep '1000 packets received'",
        );
        world.ends(machine);
    }
}

#[test]
fn short_connections_come_and_go() {
    let count: u32 = std::env::var("FT_CONNECTIONS").map_or(100, |number| number.parse().unwrap());
    let world = World::new(1, &[]);
    let _daemon = world.daemon(&[]);
    let mut machine = world.machine("6.1", &[]);
    world.connections(&mut machine, count);
    world.ends(machine);
}

#[test]
fn long_frames_pass_where_the_guest_is_told_of_them() {
    let world = World::new(1, &[]);
    ip(&["link", "set", TAP, "mtu", "9000"]);
    let _daemon = world.daemon(&[]);
    let mut machine = world.machine("6.1", &["host_mtu=9000"]);
    world.ask(
        &mut machine,
        "grep -x 9000 /sys/class/net/eth0/mtu\nping -q -s 8900 -c 20 10.77.0.1 | grep '20 packets received'",
    );
    world.exchange(&mut machine, bytes(), 1);
    world.ends(machine);
}

#[test]
fn four_pairs_of_queues_work_beside_each_other() {
    let world = World::new(4, &["multi_queue"]);
    let mut daemon = world.daemon(&["--queue-pairs", "4", "--io-threads", "2"]);
    let mut machine = world.machine("6.1", &[]);
    for _ in 0..4 {
        daemon.wait_line("attached");
    }
    world.ask(
        &mut machine,
        "ls -d /sys/class/net/eth0/queues/tx-* | grep -c . | grep -x 4",
    );
    world.exchange(&mut machine, bytes() / 4, 8);
    world.ends(machine);
}

#[test]
fn the_daemon_is_killed_in_the_middle_and_the_connection_goes_on() {
    let world = World::new(1, &[]);
    let (mut daemon, mut kills) = (Some(world.daemon(&[])), 0);
    let mut machine = world.machine("6.1", &[]);
    world.exchange_with(&mut machine, bytes(), 1, |passed| {
        if kills < 3 && passed > bytes() / 4 * (kills + 1) {
            daemon.take().unwrap().kill();
            daemon = Some(world.daemon(&[]));
            kills += 1;
        }
    });
    assert_eq!(kills, 3);
    world.ends(machine);
}

#[test]
fn a_guest_reboots_and_its_link_flaps() {
    let world = World::new(1, &[]);
    let mut daemon = world.daemon(&[]);
    let (mut machine, mut qmp): (_, Qmp) = world.machine_with_monitor("6.1");
    daemon.wait_line("attached");
    world.exchange(&mut machine, bytes() / 4, 1);
    qmp.execute("system_reset", &json!({}));
    daemon.wait_line("detached");
    world.exchange(&mut machine, bytes() / 4, 1);
    for _ in 0..3 {
        qmp.execute("set_link", &json!({ "name": "net0", "up": false }));
        qmp.execute("set_link", &json!({ "name": "net0", "up": true }));
        ip(&["link", "set", TAP, "down"]);
        ip(&["link", "set", TAP, "up"]);
    }
    world.exchange(&mut machine, bytes() / 4, 1);
    world.ends(machine);
}
