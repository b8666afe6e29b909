//! What a build that is whole keeps.

use std::{
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    guest::Guest,
    host::{Host, Pair, SUSPICIOUS},
    support::frontend::{PATIENCE, complete},
};

/// Kills, unless `FT_KILLS` says otherwise.
const KILLS: u64 = 3;

#[test]
fn both_images_come_to_the_same_bytes_and_the_pair_ends_in_order() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let Pair {
        mut primary,
        backup,
        arbiter: _arbiter,
        ..
    } = Pair::start(&[]);
    let mut guest = Guest::attach(&primary);
    guest.work(&mut random, 600);
    guest.finish();
    assert!(guest.read_all() == primary.content());
    let Guest { session, model, .. } = guest;
    drop(session);
    primary.blk.wait_line("the frontend left");
    primary.blk.terminate();
    for daemon in [primary.blk, backup.blk, primary.log, backup.log] {
        assert_eq!(daemon.wait().0, Some(0));
    }
    for host in [&primary.directory, &backup.directory] {
        assert!(!host.path().join("image.ft-state").exists(), "either image counts");
    }
    let images =
        [primary.directory, backup.directory].map(|directory| std::fs::read(directory.path().join("image")).unwrap());
    assert!(images[0] == images[1], "the images differ");
    assert_eq!(model.violations(&images[0]), [""; 0]);
}

/// The primary's host dies at an instant the seed chooses, with requests of all kinds in flight.
#[test]
fn a_killed_primary_loses_nothing_that_the_guest_was_told() {
    let kills = std::env::var("FT_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let first = std::env::var("FT_SEED").map_or(0, |seed| seed.parse().unwrap());
    for seed in first..first + kills {
        println!("FT_SEED={seed}");
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let ack = if random.random() { "received" } else { "durable" };
        let Pair {
            primary,
            mut backup,
            arbiter: _arbiter,
            ..
        } = Pair::start(&[&SUSPICIOUS[..], &["--ack", ack]].concat());
        assert!(!backup.socket().exists(), "nobody may start the VM on the backup");
        let mut guest = Guest::attach(&primary);
        let told = random.random_range(1..300);
        guest.work(&mut random, told);
        primary.kill(random.random());
        guest.hear();
        backup.blk.wait_line("listening");
        assert_eq!(guest.model.violations(&backup.content()), [""; 0], "seed {seed}");
        // The VM starts there.
        let content = backup.content();
        let mut again = Guest::attach(&backup);
        assert!(again.read_all() == content);
        again.work(&mut random, 20);
        again.finish();
    }
}

/// Waits until a place of an image differs from `before`.
fn wait_changed(host: &Host, sector: usize, before: &[u8]) {
    let start = Instant::now();
    let range = sector * 512..(sector + 1) * 512;
    while host.content()[range.clone()] == before[range.clone()] {
        assert!(start.elapsed() < PATIENCE, "sector {sector} is never written");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_write_is_done_when_the_backup_has_it_and_not_when_it_is_here() {
    let Pair {
        primary,
        backup: _backup,
        arbiter: _arbiter,
        ..
    } = Pair::start(&[]);
    let mut guest = Guest::attach(&primary);
    guest.write(8, 8);
    guest.finish();
    let before = primary.content();
    primary.log.stop();
    let write = guest.write(40, 8);
    let overlaps = guest.driver.read(44, 8 * 512);
    wait_changed(&primary, 47, &before);
    // Reads of other places are served meanwhile, after what was done before.
    let read = guest.driver.read(8, 4096);
    complete(&guest.session, &mut guest.driver, &[read]);
    assert!(guest.driver.data(read) == before[8 * 512..16 * 512]);
    assert_eq!(guest.driver.status(write), 0xff, "the guest was told too early");
    assert_eq!(
        guest.driver.status(overlaps),
        0xff,
        "the guest was shown what the backup has not"
    );
    primary.log.signal(Signal::SIGCONT);
    complete(&guest.session, &mut guest.driver, &[write, overlaps]);
    assert_eq!(guest.driver.status(write), 0);
    assert!(guest.driver.data(overlaps)[..4 * 512] == primary.content()[44 * 512..48 * 512]);
}

#[test]
fn the_loser_halts_and_tells_its_guest_nothing_more() {
    let Pair {
        primary,
        mut backup,
        arbiter: _arbiter,
        ..
    } = Pair::start(&SUSPICIOUS);
    let mut guest = Guest::attach(&primary);
    guest.write(8, 8);
    guest.finish();
    primary.log.stop();
    guest.write(40, 8);
    // The backup hears nothing any more, and takes over.
    backup.blk.wait_line("listening");
    primary.log.signal(Signal::SIGCONT);
    let (code, said) = primary.blk.wait();
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("halted: ft-log's log says why"), "{said}");
    assert_eq!(guest.hear(), 0);
    assert_eq!(guest.model.violations(&backup.content()), [""; 0]);
    assert_eq!(primary.log.wait().0, Some(4));
}

#[test]
fn without_its_backup_the_primary_goes_on_and_says_so() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let Pair {
        mut primary,
        backup,
        arbiter: _arbiter,
        ..
    } = Pair::start(&SUSPICIOUS);
    let mut guest = Guest::attach(&primary);
    guest.work(&mut random, 30);
    backup.kill(false);
    // What is in flight waits for the arbiter, and then for nobody.
    guest.finish();
    primary.blk.wait_line("the backup is gone");
    guest.work(&mut random, 100);
    guest.finish();
    assert_eq!(guest.model.violations(&primary.content()), [""; 0]);
    assert!(guest.read_all() == primary.content());
}

#[test]
fn a_daemon_that_is_asked_to_end_under_its_guest_hands_over() {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let Pair {
        primary,
        mut backup,
        arbiter: _arbiter,
        ..
    } = Pair::start(&[]);
    let mut guest = Guest::attach(&primary);
    guest.work(&mut random, 50);
    primary.blk.terminate();
    assert_eq!(primary.blk.wait().0, Some(0));
    guest.hear();
    backup.blk.wait_line("listening");
    assert_eq!(guest.model.violations(&backup.content()), [""; 0]);
}

#[test]
fn images_that_differ_make_no_pair_and_nobody_serves() {
    let pair = Pair::spawn(&[], [None; 2], [0, 1], false);
    let sockets = [pair.primary.socket(), pair.backup.socket()];
    for side in [pair.primary, pair.backup] {
        let (code, said) = side.blk.wait();
        assert_eq!(code, Some(4), "{said}");
        assert!(!said.contains("listening"), "{said}");
        let (_, said) = side.log.wait();
        assert!(said.contains("disk image must be identical"), "{said}");
    }
    assert!(!sockets[0].exists() && !sockets[1].exists());
}

/// Sectors up to which the daemon of one side can write.
const LIMIT: u64 = 1024;

#[test]
fn a_primary_that_cannot_write_ends_and_the_backup_takes_over() {
    let Pair {
        primary,
        mut backup,
        arbiter: _arbiter,
        ..
    } = Pair::start_limited(&[], [Some(LIMIT), None]);
    let mut guest = Guest::attach(&primary);
    guest.write(8, 8);
    guest.finish();
    guest.write(LIMIT + 8, 8);
    let (code, said) = primary.blk.wait();
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("the backup takes over"), "{said}");
    assert_eq!(guest.hear(), 0);
    backup.blk.wait_line("listening");
    assert_eq!(guest.model.violations(&backup.content()), [""; 0]);
}

#[test]
fn a_backup_that_cannot_write_ends_and_the_primary_goes_on() {
    let Pair {
        mut primary,
        backup,
        arbiter: _arbiter,
        ..
    } = Pair::start_limited(&[], [None, Some(LIMIT)]);
    let mut guest = Guest::attach(&primary);
    guest.write(LIMIT + 8, 8);
    guest.finish();
    let (code, said) = backup.blk.wait();
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("is no equal of it any more"), "{said}");
    primary.blk.wait_line("the backup is gone");
    guest.write(LIMIT + 16, 8);
    guest.finish();
    assert_eq!(guest.model.violations(&primary.content()), [""; 0]);
}
