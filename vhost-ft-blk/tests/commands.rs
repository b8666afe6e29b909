//! Commands beyond reading and writing, and disks beyond the plain one.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

use std::{fs::File, os::unix::fs::FileExt, path::PathBuf, process::Command};

use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use nix::unistd::{Whence, lseek};
use support::{
    daemon::{Daemon, fails, text},
    driver::{BlkDriver, memory},
    frontend::{Session, complete, complete_on},
};
use tempfile::TempDir;

const BYTES: u64 = 4 << 20;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

struct World {
    directory: TempDir,
    _daemon: Daemon,
    memory: GuestMemoryMmap,
}

impl World {
    /// A daemon with these options on an image full of ones.
    fn new(options: &[&str]) -> Self {
        let directory = TempDir::new().unwrap();
        std::fs::write(directory.path().join("image"), vec![1; BYTES as usize]).unwrap();
        let daemon = Daemon::listening(&mut command(&directory, options));
        Self {
            directory,
            _daemon: daemon,
            memory: memory(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn image(&self) -> File {
        File::open(self.path("image")).unwrap()
    }

    fn drivers<const N: usize>(&self) -> ([BlkDriver; N], Session) {
        let drivers = std::array::from_fn(|queue| BlkDriver::of_queue(&self.memory, true, queue as u64));
        let rings: Vec<_> = drivers.iter().map(|driver: &BlkDriver| &driver.ring).collect();
        let session = Session::start(&self.path("socket"), &self.memory, u64::MAX, &rings);
        (drivers, session)
    }

    fn sectors(&self, sector: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; count * 512];
        self.image().read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }
}

fn command(directory: &TempDir, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
    command.args(["--socket-path", text(&directory.path().join("socket"))]);
    command.args(["--blk-file", text(&directory.path().join("image"))]);
    command.args(options);
    command
}

#[test]
fn discards_and_zeroes_do_what_they_say_and_holes_are_holes() {
    let world = World::new(&[]);
    let ([mut driver], session) = world.drivers();
    let discard = driver.extent(DISCARD, 2048, 2048, 0);
    let zeroes = driver.extent(WRITE_ZEROES, 8, 16, 0);
    let hole = driver.extent(WRITE_ZEROES, 5120, 2048, UNMAP);
    // Overlaps: in order.
    let write = driver.write(10, &[9; 512]);
    let read = driver.read(5120, 4096);
    let flush = driver.flush();
    complete(&session, &mut driver, &[discard, zeroes, hole, write, read, flush]);
    for request in [discard, zeroes, hole, write, read, flush] {
        assert_eq!(driver.status(request), OK);
    }
    assert!(driver.data(read) == [0; 4096]);
    assert!(world.sectors(5120, 2048) == [0; 2048 * 512]);
    let mut expected = [0; 16 * 512];
    expected[2 * 512..3 * 512].fill(9);
    assert!(world.sectors(8, 16) == expected);
    assert!(world.sectors(0, 8) == [1; 8 * 512] && world.sectors(24, 8) == [1; 8 * 512]);
    assert_eq!(world.image().metadata().unwrap().len(), BYTES);
    let seek = |from: u64, whence| lseek(world.image(), (from * 512) as i64, whence).unwrap() / 512;
    for hole in [2048, 5120] {
        assert_eq!(seek(hole, Whence::SeekHole), hole as i64);
        assert_eq!(seek(hole, Whence::SeekData), hole as i64 + 2048);
    }
}

#[test]
fn extents_that_cannot_be_are_refused_and_change_nothing() {
    let world = World::new(&[]);
    let ([mut driver], session) = world.drivers();
    let last = BYTES / 512;
    let cases = [
        (DISCARD, 0, 0, 0, IO_ERROR),
        (DISCARD, last - 1, 2, 0, IO_ERROR),
        (DISCARD, u64::MAX, 1, 0, IO_ERROR),
        (WRITE_ZEROES, 0, u32::MAX, 0, IO_ERROR),
        (DISCARD, 0, 8, UNMAP, UNSUPPORTED),
        (WRITE_ZEROES, 0, 8, 2, UNSUPPORTED),
    ];
    for (kind, sector, sectors, flags, expected) in cases {
        let request = driver.extent(kind, sector, sectors, flags);
        complete(&session, &mut driver, &[request]);
        assert_eq!(driver.status(request), expected, "{kind} {sector} {sectors} {flags}");
    }
    // Two extents where one was offered.
    let request = driver.other(DISCARD, 0);
    complete(&session, &mut driver, &[request]);
    assert_ne!(driver.status(request), OK);
    assert!(world.sectors(0, (BYTES / 512) as usize).iter().all(|byte| *byte == 1));
}

#[test]
fn a_read_only_disk_offers_no_discard() {
    let world = World::new(&["--read-only"]);
    let ([mut driver], session) = world.drivers();
    assert_eq!(session.features & (1 << 13 | 1 << 14), 0);
    let discard = driver.extent(DISCARD, 0, 8, 0);
    complete(&session, &mut driver, &[discard]);
    assert_eq!(driver.status(discard), UNSUPPORTED);
}

#[test]
fn every_queue_serves_and_interrupts_on_its_own_line() {
    let world = World::new(&["--num-queues", "3"]);
    let (mut drivers, mut session) = world.drivers::<3>();
    assert_ne!(session.features & 1 << 12, 0);
    assert_eq!(session.config(60)[34..36], 3u16.to_le_bytes());
    for round in 0..20u8 {
        let requests: Vec<_> = drivers
            .iter_mut()
            .enumerate()
            .map(|(queue, driver)| {
                let sector = 64 * queue as u64;
                [
                    driver.write(sector, &[round ^ queue as u8; 4096]),
                    driver.read(sector, 4096),
                ]
            })
            .collect();
        for (queue, (driver, requests)) in drivers.iter_mut().zip(&requests).enumerate() {
            complete_on(&session, queue, driver, requests);
            assert!(
                driver.data(requests[1]) == [round ^ queue as u8; 4096],
                "round {round} queue {queue}"
            );
        }
    }
}

#[test]
fn the_driver_chooses_the_cache_mode_and_nothing_else() {
    let world = World::new(&[]);
    let ([mut driver], mut session) = world.drivers();
    assert_ne!(session.features & 1 << 11, 0);
    assert_eq!(session.config(60)[32], 1);
    session.set_config(32, &[0]).unwrap();
    assert_eq!(session.config(60)[32], 0);
    let write = driver.write(0, &[5; 512]);
    complete(&session, &mut driver, &[write]);
    assert_eq!(driver.status(write), OK);
    assert!(
        session.set_config(0, &[0; 8]).is_err(),
        "the capacity is not the driver's to choose"
    );
}

#[test]
fn serial_and_block_size_reach_the_guest() {
    let world = World::new(&["--serial", "rack-7/disk-3", "--block-size", "4096"]);
    let ([mut driver], mut session) = world.drivers();
    assert_eq!(session.config(60)[20..24], 4096u32.to_le_bytes());
    let id = driver.other(8, 20);
    complete(&session, &mut driver, &[id]);
    assert_eq!(driver.data(id)[..14], *b"rack-7/disk-3\0");
    let other = TempDir::new().unwrap();
    std::fs::write(other.path().join("image"), [0; 512]).unwrap();
    let (code, said) = fails(&mut command(&other, &["--block-size", "4096"]));
    assert_eq!(code, Some(3), "{said}");
    for (options, code) in [
        (["--num-queues", "0"], 2),
        (["--block-size", "1000"], 2),
        (["--num-queues", "17"], 2),
    ] {
        assert_eq!(fails(&mut command(&other, &options)).0, Some(code), "{options:?}");
    }
}
