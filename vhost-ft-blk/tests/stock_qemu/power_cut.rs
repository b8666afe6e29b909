//! Engine `device`: host A dies under a VM, and B's image is what a disk is after a power cut.

use std::{
    fs::File,
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use nix::sys::signal::Signal;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    host::{Host, Pair, SUSPICIOUS},
    machine::machine_on,
    support::daemon::text,
};

const IMAGE_BYTES: u64 = 64 << 20;

/// Kills, unless `FT_KILLS` says otherwise.
const KILLS: u64 = 2;

/// The totals in the superblock: ext4 writes them when it is unmounted, not with its journal. Those of a group read `wrong for group #`.
const TOTALS: [&str; 2] = ["Free blocks count wrong (", "Free inodes count wrong ("];

/// The highest number of a record that the console told.
fn last_told(console: &str) -> Option<usize> {
    let number = |line: &str| line.trim_end().strip_prefix("ft: record ")?.parse().ok();
    console.lines().filter_map(number).max()
}

fn run(program: &str, arguments: &[&str]) -> (Output, String) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let mut command = Command::new(program);
    let output = command.args(arguments).env("PATH", path).env("LC_ALL", "C").output();
    let output = output.unwrap_or_else(|error| panic!("{program} (package e2fsprogs): {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output, said)
}

/// A file system that a power cut left: its journal is replayed, nothing has to be repaired but the totals, and then it is clean.
fn check_file_system(image: &Path) {
    let (output, said) = run("e2fsck", &["-f", "-y", "-E", "no_optimize_extents", text(image)]);
    eprint!("{said}");
    // 1: something was written, which the journal's replay is.
    assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    assert!(said.contains("recovering journal"), "it was mounted: {said}");
    let lines: Vec<&str> = said.lines().collect();
    let repairs = lines.iter().enumerate().filter(|(_, line)| line.ends_with("? yes"));
    for (index, repair) in repairs {
        let problem = lines[index.saturating_sub(1)];
        let is_total = TOTALS.iter().any(|total| problem.starts_with(total));
        assert!(is_total, "e2fsck had to repair '{problem}' ({repair}): {said}");
    }
    let (output, said) = run("e2fsck", &["-f", "-n", "-E", "no_optimize_extents", text(image)]);
    assert_eq!(output.status.code(), Some(0), "{said}");
}

/// The records in the file system, the first of which are 1, 2, 3...; gives how many.
fn records(image: &Path) -> usize {
    let (output, said) = run("debugfs", &["-R", "cat /records", text(image)]);
    assert!(output.status.success(), "{output:?}");
    let in_order = said
        .lines()
        .zip(1..)
        .take_while(|(line, number)| *line == format!("record {number}"));
    in_order.count()
}

#[test]
fn a_host_is_killed_and_the_file_system_on_the_other_one_has_every_record_that_was_flushed() {
    let kills = std::env::var("FT_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let first: u64 = std::env::var("FT_SEED").map_or_else(|_| rand::rng().random(), |seed| seed.parse().unwrap());
    for seed in (0..kills).map(|kill| first.wrapping_add(kill)) {
        println!("FT_SEED={seed} FT_KILLS=1");
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let ack = if random.random() { "received" } else { "durable" };
        let mut pair = Pair::spawn_on(
            &[&SUSPICIOUS[..], &["--ack", ack]].concat(),
            [None; 2],
            |_, directory| {
                let image = File::create(directory.join("image")).unwrap();
                image.set_len(IMAGE_BYTES).unwrap();
            },
        );
        pair.primary.blk.wait_line("listening");
        let mut machine = machine_on(&pair.primary.socket(), 1, "6.12", "records", "-", &["-no-reboot"]);
        let until = format!("ft: record {}", random.random_range(1..40));
        let mut console = machine.wait_line(&until);
        // Not a wait for anything: the instant of the fault.
        std::thread::sleep(Duration::from_millis(random.random_range(0..400)));
        let Host {
            log,
            blk,
            directory: _old,
        } = pair.primary;
        blk.signal(Signal::SIGKILL);
        log.signal(Signal::SIGKILL);
        console.push_str(&machine.kill());
        let told = last_told(&console).unwrap();

        let Host {
            log,
            mut blk,
            directory,
        } = pair.backup;
        blk.wait_line("listening");
        blk.terminate();
        for daemon in [blk, log] {
            assert_eq!(daemon.wait().0, Some(0));
        }
        let image = directory.path().join("image");
        check_file_system(&image);
        let found = records(&image);
        println!("seed {seed}, --ack {ack}: {told} records told, {found} found");
        assert!(found >= told, "seed {seed}: record {} is lost", found + 1);
    }
}
