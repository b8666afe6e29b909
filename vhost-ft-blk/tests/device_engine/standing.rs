//! An image that may be outdated is refused wherever nobody compares it with the other one.

use std::{
    fs,
    os::{fd::AsRawFd, unix::net::UnixStream},
    process::Command,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{
    guest::Guest,
    host::{self, Host, Pair, SECTORS, SUSPICIOUS},
    support::daemon::{Daemon, fails, text},
};

/// The daemon without ft-log on a host's image.
fn alone(host: &tempfile::TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
    let (socket, image) = (host.path().join("alone"), host.path().join("image"));
    command.args(["--socket-path", text(&socket), "--blk-file", text(&image)]);
    command
}

/// Runs a daemon whose one frontend is gone already: it ends at once, refused or not. Exit code and what it said.
fn served_nobody(host: &tempfile::TempDir, more: &[&str]) -> (Option<i32>, String) {
    let (_, theirs) = UnixStream::pair().unwrap();
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
    command.args(["--fd", &theirs.as_raw_fd().to_string()]);
    command.args(["--blk-file", text(&host.path().join("image"))]);
    fails(command.args(more))
}

fn kill(host: Host) -> tempfile::TempDir {
    let Host { directory, log, blk } = host;
    blk.kill();
    log.kill();
    directory
}

pub(crate) fn is_refused(host: &tempfile::TempDir) {
    let (code, said) = served_nobody(host, &[]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("one of two images of VM 'stock'"), "{said}");
}

#[test]
fn the_image_of_a_killed_primary_is_refused_and_that_of_the_one_that_took_over_is_not() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let Pair {
        primary,
        mut backup,
        arbiter: _arbiter,
        ..
    } = Pair::start(&SUSPICIOUS);
    let mut guest = Guest::attach(&primary);
    guest.work(&mut random, 50);
    let old = kill(primary);
    is_refused(&old);
    backup.blk.wait_line("listening");
    let new = kill(backup);
    drop(Daemon::listening(&mut alone(&new)));
    // The operator knows better.
    let mut accept = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
    accept.args(["accept", "--blk-file", text(&old.path().join("image"))]);
    assert_eq!(fails(&mut accept).0, Some(0));
    drop(Daemon::listening(&mut alone(&old)));
}

#[test]
fn the_image_of_a_killed_backup_is_refused_and_that_of_the_primary_is_not() {
    let mut random = ChaCha8Rng::seed_from_u64(6);
    let Pair {
        mut primary,
        backup,
        arbiter: _arbiter,
        ..
    } = Pair::start(&SUSPICIOUS);
    let mut guest = Guest::attach(&primary);
    guest.work(&mut random, 50);
    // Its ft-log may still say that it is over, or may be killed before that.
    let old = kill(backup);
    is_refused(&old);
    primary.blk.wait_line("the backup is gone");
    // What it completes after that says that it has seen it.
    guest.finish();
    guest.work(&mut random, 10);
    drop(Daemon::listening(&mut alone(&kill(primary))));
}

#[test]
fn a_marked_image_starts_no_vm_without_a_backup() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("image"), vec![0; SECTORS as usize * 512]).unwrap();
    host::mark(directory.path());
    let (arbiter, socket) = (path("arbiter"), path("log"));
    fs::create_dir(&arbiter).unwrap();
    let mut command = Command::new(host::ft_log());
    command.args(["--vm", "stock", "--role", "primary", "--alone", "--devices", "blk0"]);
    command.args(["--socket-path", text(&socket), "--arbiter", text(&arbiter)]);
    let mut log = Daemon::spawn(&mut command);
    log.wait_line("waiting for");
    let place = ["--ft-log", text(&socket), "--vm", "stock", "--device", "blk0"];
    let (code, said) = served_nobody(&directory, &[&["--engine", "device"], &place[..]].concat());
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("one of two images of VM 'stock'"), "{said}");
    is_refused(&directory);
}

#[test]
fn marked_images_that_are_equal_are_a_pair_again() {
    let mut pair = Pair::spawn(&[], [None; 2], [0; 2], true);
    pair.primary.blk.wait_line("listening");
    let mut guest = Guest::attach(&pair.primary);
    guest.write(8, 8);
    guest.finish();
}

#[test]
fn an_image_in_use_is_not_accepted() {
    let pair = Pair::start(&[]);
    for host in [&pair.primary, &pair.backup] {
        let mut accept = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
        accept.args(["accept", "--blk-file", text(&host.image())]);
        let (code, said) = fails(&mut accept);
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains("is locked"), "{said}");
        is_marked(host);
    }
}

fn is_marked(host: &Host) {
    assert!(host.directory.path().join("image.ft-state").exists());
}
