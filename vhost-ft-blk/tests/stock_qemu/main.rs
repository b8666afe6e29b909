//! Stock QEMU and Debian's own kernels on the daemon. Needs `FT_STOCK_GUESTS`, the directory of scripts/guest-image's guests; run by
//! scripts/test.

#[path = "../../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

#[path = "../device_engine/host.rs"]
#[allow(dead_code, reason = "the tests without a VM need more of it")]
mod host;
mod machine;
mod power_cut;

use std::time::Duration;

use machine::World;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use support::daemon::{fails, text};

const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// Both kernels, or the one that is enough for a test in which the kernel matters little (FT_KERNELS=all: all).
fn kernels(enough: &'static str) -> Vec<&'static str> {
    match std::env::var("FT_KERNELS").as_deref() {
        Ok("all") => KERNELS.into(),
        _ => vec![enough],
    }
}

#[test]
fn fio_verifies_at_every_depth_and_number_of_queues() {
    for kernel in KERNELS {
        for (queues, depth) in [(1, 1), (1, 32), (4, 1), (4, 32)] {
            eprintln!("--- {kernel}, {queues} queues, depth {depth}");
            let world = World::new(queues);
            let _daemon = world.daemon();
            let seen = world.machine(kernel, "fio-verify", &format!("{depth},1")).ends_well();
            // A queue of the device for each of the guest's two processors, if it has as many.
            assert!(seen.contains(&format!("queues: {}", queues.min(2))), "{seen}");
        }
    }
}

#[test]
fn a_file_system_survives_discards_flushes_and_a_second_mount() {
    for kernel in KERNELS {
        let world = World::new(2);
        let _daemon = world.daemon();
        let seen = world.machine(kernel, "filesystem", "-").ends_well();
        assert!(seen.contains("files: 37"), "{seen}");
    }
}

#[test]
fn the_daemon_is_killed_under_fio_and_the_guest_goes_on() {
    let seed = std::env::var("FT_SEED").map_or_else(|_| rand::rng().random(), |seed| seed.parse().unwrap());
    let kills: u32 = std::env::var("FT_KILLS").map_or(10, |kills| kills.parse().unwrap());
    println!("FT_SEED={seed} FT_KILLS={kills}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let world = World::new(2);
    let mut daemon = world.daemon();
    // More passes than the kills can last; the last daemon is left alone for two of them.
    let mut machine = world.machine("6.1", "fio-verify", "32,1000");
    machine.wait_line("ft: ready");
    for _ in 0..kills {
        // Not a wait for anything: the instant of the fault.
        std::thread::sleep(Duration::from_millis(random.random_range(0..400)));
        daemon.kill();
        daemon = world.daemon();
        daemon.wait_line("a queue started");
    }
    for _ in 0..2 {
        machine.wait_line("ft: pass");
    }
}

/// Gives a daemon its disk's new size.
fn resize(world: &World, control: &str, bytes: u64) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
    command.args(["resize", "--control", text(&world.path(control)), &bytes.to_string()]);
    let (code, said) = fails(&mut command);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn a_disk_is_resized_unplugged_and_plugged_again_under_load() {
    for kernel in kernels("6.12") {
        let world = World::new(2);
        let _daemon = world.daemon_at("socket", &["--control", text(&world.path("control"))]);
        let [option, monitor] = world.monitor("qmp");
        let mut machine = world.machine_at("socket", kernel, "hotplug", "-", &["-no-reboot", &option, &monitor]);
        let mut qmp = world.qmp("qmp");
        machine.wait_line("ft: ready");
        resize(&world, "control", 320 << 20);
        // The guest writes in the new part, and fio is on the disk while it goes.
        machine.wait_line("ft: sectors 655360");
        machine.wait_line("ft: loaded");
        qmp.execute("device_del", &json!({ "id": "disk" }));
        qmp.wait_event("DEVICE_DELETED", |data| data["device"] == "disk");
        machine.wait_line("ft: gone");
        let device =
            json!({ "driver": "vhost-user-blk-pci", "id": "disk", "bus": "plug", "chardev": "blk", "num-queues": 2 });
        qmp.execute("device_add", &device);
        machine.ends_well();
    }
}

#[test]
fn a_vm_is_reset_and_reboots_under_load() {
    for kernel in kernels("6.1") {
        let world = World::new(2);
        let _daemon = world.daemon();
        let [option, monitor] = world.monitor("qmp");
        let mut machine = world.machine_at("socket", kernel, "reboot", "-", &[&option, &monitor]);
        let mut qmp = world.qmp("qmp");
        // The first start is reset from outside, the second reboots itself, the third looks at what is there.
        machine.wait_line("ft: loaded");
        qmp.execute("system_reset", &json!({}));
        let seen = machine.ends_well();
        assert!(seen.contains("ft: start 2") && seen.contains("ft: start 3"), "{seen}");
    }
}

#[test]
fn a_vm_migrates_under_fio_from_daemon_to_daemon_and_back() {
    let world = World::new(2);
    let mut daemons = vec![world.daemon_at("socket-0", &["--migratable"])];
    let [option, monitor] = world.monitor("qmp-0");
    let mut machine = world.machine_at(
        "socket-0",
        "6.12",
        "fio-verify",
        "32,1000",
        &["-no-reboot", &option, &monitor],
    );
    let mut qmp = world.qmp("qmp-0");
    machine.wait_line("ft: pass");
    for hop in 1..=2 {
        let name = |what: &str| format!("{what}-{hop}");
        daemons.push(world.daemon_at(&name("socket"), &["--migratable"]));
        let [option, monitor] = world.monitor(&name("qmp"));
        let incoming = format!("unix:{}", text(&world.path(&name("migrate"))));
        let options = ["-no-reboot", &option, &monitor, "-incoming", &incoming];
        let target = world.machine_at(&name("socket"), "6.12", "fio-verify", "32,1000", &options);
        let mut target_qmp = world.qmp(&name("qmp"));
        let capabilities = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        target_qmp.execute("migrate-set-capabilities", &capabilities);
        qmp.execute("migrate-set-capabilities", &capabilities);
        // The guest dirties its memory for as long as this lasts; the last part of it moves while it stands still.
        let parameters = json!({ "max-bandwidth": 1u64 << 32, "downtime-limit": 1000 });
        qmp.execute("migrate-set-parameters", &parameters);
        qmp.execute("migrate", &json!({ "uri": incoming }));
        let ended = |data: &serde_json::Value| data["status"] == "completed" || data["status"] == "failed";
        let end = qmp.wait_event("MIGRATION", ended);
        assert_eq!(end["status"], "completed");
        let end = target_qmp.wait_event("MIGRATION", ended);
        assert_eq!(end["status"], "completed");
        (machine, qmp) = (target, target_qmp);
        // Two whole passes: one of them began, wrote and verified here.
        machine.wait_line("ft: pass");
        machine.wait_line("ft: pass");
    }
}
