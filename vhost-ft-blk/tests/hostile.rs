//! Whole hostile rings against the real daemon: whatever one queue's driver does, the other queue goes on, and so does the daemon.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

use std::{
    fs::File,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::{
    daemon::{Daemon, text},
    driver::{BlkDriver, MEMORY_BYTES, blk_header, memory},
    frontend::{PATIENCE, Session, complete_on, readable_within},
};
use tempfile::TempDir;
use vhost::VhostBackend;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const RINGS: u64 = 0x1_0000;
const AVAILABLE: u64 = RINGS + 0x8000;
const USED: u64 = RINGS + 0xa000;
const SIZE: u16 = 64;
/// From here on memory is the hostile driver's.
const OWN: u64 = 18 << 20;
const INDIRECT_TABLES: u64 = 24 << 20;
const HEADERS: u64 = 26 << 20;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A driver that keeps no rule.
struct Hostile<'a> {
    memory: &'a GuestMemoryMmap,
    random: ChaCha8Rng,
    /// Its rings change while the device works on them. What the device sees of a descriptor may then be half of each of two: an
    /// address below [`OWN`] would come with any length.
    scribbles: bool,
}

impl Hostile<'_> {
    fn put(&self, bytes: &[u8], address: u64) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// In the rings, at the end of memory, outside of it, or in the part of it that the other queue's driver has not.
    fn address(&mut self) -> u64 {
        match self.random.random_range(0..10) {
            0 => self.random.random(),
            1 => MEMORY_BYTES - self.random.random_range(0..8192),
            2 => INDIRECT_TABLES + self.random.random_range(0..64) * 16,
            3 if !self.scribbles => RINGS + self.random.random_range(0..0x8000),
            4..7 => HEADERS + self.random.random_range(0..64) * 32,
            _ => self.random.random_range(OWN..MEMORY_BYTES),
        }
    }

    fn descriptor(&mut self, table: u64, index: u64, entries: u16) {
        let mut flags = 0;
        for (flag, chance) in [(NEXT, 0.6), (WRITE, 0.4), (INDIRECT, 0.1)] {
            flags |= if self.random.random_bool(chance) { flag } else { 0 };
        }
        let length: u32 = match self.random.random_range(0..6) {
            0 => self.random.random(),
            1 => 16 * self.random.random_range(0..0x1_0001u32),
            2 | 3 => 16,
            4 => 1,
            _ => self.random.random_range(0..20_000),
        };
        let next = self.random.random_range(0..entries + 2);
        let address = self.address();
        // Not over the other queue's rings and data: a guest that does that to itself has no claim to anything.
        let length = if address < OWN { length.min(16384) } else { length };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(&bytes, table + 16 * index);
    }

    /// Any part of the rings, or what they point at.
    fn scribble(&mut self) {
        let entry = u64::from(self.random.random_range(0..SIZE));
        match self.random.random_range(0..6) {
            0 => {
                let available: u16 = self.random.random();
                self.put(&available.to_le_bytes(), AVAILABLE + 2);
            }
            1 => {
                let head = self.random.random_range(0..SIZE + 2);
                self.put(&head.to_le_bytes(), AVAILABLE + 4 + 2 * entry);
            }
            2 => {
                let event = self.random.random::<u16>().to_le_bytes();
                self.put(&event, AVAILABLE + 4 + 2 * u64::from(SIZE));
            }
            3 => self.descriptor(INDIRECT_TABLES, entry, SIZE),
            4 => {
                let kind = self.random.random_range(0..16);
                let sector = self.random.random_range(0..40_000);
                self.put(&blk_header(kind, sector), HEADERS + 32 * entry);
            }
            _ => self.descriptor(RINGS, entry, SIZE),
        }
    }

    /// Rings in which everything is wrong, or nearly right.
    fn fill(&mut self) {
        self.put(&[0; 0x1_0000], RINGS);
        for entry in 0..u64::from(SIZE) {
            self.descriptor(RINGS, entry, SIZE);
            self.descriptor(INDIRECT_TABLES, entry, SIZE);
            let (kind, sector) = (self.random.random_range(0..16), self.random.random_range(0..40_000));
            self.put(&blk_header(kind, sector), HEADERS + 32 * entry);
            let heads = SIZE + u16::from(self.random.random_bool(0.1));
            let head = self.random.random_range(0..heads);
            self.put(&head.to_le_bytes(), AVAILABLE + 4 + 2 * entry);
        }
        let available: u16 = match self.random.random_range(0..4) {
            0 => self.random.random(),
            _ => self.random.random_range(1..=SIZE),
        };
        self.put(&available.to_le_bytes(), AVAILABLE + 2);
        // Nobody waits for it: the used index moves as far as chains are completed.
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, 0);
    }
}

#[test]
fn a_hostile_queue_harms_neither_the_other_queue_nor_the_daemon() {
    let seed = std::env::var("FT_SEED").map_or_else(|_| rand::rng().random(), |seed| seed.parse().unwrap());
    let rounds: u32 = std::env::var("FT_ROUNDS").map_or(150, |rounds| rounds.parse().unwrap());
    println!("FT_SEED={seed} FT_ROUNDS={rounds}");
    let directory = TempDir::new().unwrap();
    let (socket, image) = (directory.path().join("socket"), directory.path().join("image"));
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
    command.args([
        "--socket-path",
        text(&socket),
        "--blk-file",
        text(&image),
        "--num-queues",
        "2",
    ]);
    // A broken queue is worth a line; nobody here reads hundreds of them, and a pipe that nobody reads fills up.
    let daemon = Daemon::listening(command.env("RUST_LOG", "off,ft_vhost::daemon=info"));
    let memory = memory();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut good = BlkDriver::of_queue(&memory, true, 1);
    let mut broken = 0;
    let first = BlkDriver::fresh(&memory, true, SIZE);
    let mut session = Session::negotiate(&socket, u64::MAX, 2);
    session.share(&memory);
    let error = EventFd::new(EFD_NONBLOCK).unwrap();
    session.frontend.set_vring_err(0, &error).unwrap();
    session.start_queue(0, &first.ring);
    session.start_queue(1, &good.ring);
    session.frontend.get_vring_base(0).unwrap();
    for round in 0..rounds {
        let mut hostile = Hostile {
            memory: &memory,
            random: ChaCha8Rng::seed_from_u64(random.random()),
            scribbles: round % 2 == 1,
        };
        hostile.fill();
        session.start_queue(0, &BlkDriver::fresh_layout(&memory, true, SIZE).ring);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let scribbler = hostile.scribbles.then(|| {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        hostile.scribble();
                    }
                })
            });
            for _ in 0..4 {
                session.kick(0);
                let requests = [good.write(64, &[7; 4096]), good.read(64, 4096), good.flush()];
                complete_on(&session, 1, &mut good, &requests);
                assert!(
                    requests.iter().all(|request| good.status(*request) == 0),
                    "round {round}"
                );
            }
            over.store(true, Ordering::Relaxed);
            scribbler.map(|scribbler| scribbler.join().unwrap())
        });
        // A queue that has stopped finds no further fault: this round's stays this round's.
        session.frontend.get_vring_base(0).unwrap();
        broken += u32::from(error.read().is_ok());
    }
    assert!(broken > rounds / 10, "{broken} of {rounds} rings were broken");
    // A driver that behaves gets the queue back.
    let mut fresh = BlkDriver::fresh(&memory, true, SIZE);
    session.start_queue(0, &fresh.ring);
    let requests = [fresh.write(8, &[9; 4096]), fresh.read(8, 4096)];
    complete_on(&session, 0, &mut fresh, &requests);
    assert!(fresh.data(requests[1]) == [9; 4096]);
    assert!(!readable_within(&error, PATIENCE / 1000));
    daemon.terminate();
    assert_eq!(daemon.wait().0, Some(0));
}
