//! The daemon is killed under load and started again: the frontend keeps the in-flight region, the guest notices nothing.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::{
    daemon::{Daemon, text},
    driver::{BlkDriver, BlkRequest, memory},
    frontend::Session,
};
use tempfile::TempDir;

const BLOCK_SECTORS: u64 = 64;
const BLOCK_BYTES: usize = BLOCK_SECTORS as usize * 512;
const BLOCKS: u64 = 8;
const QUEUE_SIZE: u16 = 64;
const IN_FLIGHT_MAX: usize = 20;
const ROUNDS: usize = 50;
/// One round in so many ends with nothing in flight, and the image is judged.
const JUDGED: usize = 5;

struct World {
    directory: TempDir,
}

impl World {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let image = File::create(directory.path().join("image")).unwrap();
        image.set_len(BLOCKS * BLOCK_BYTES as u64).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn daemon(&self) -> Daemon {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
        command.args([
            "--socket-path",
            text(&self.path("socket")),
            "--blk-file",
            text(&self.path("image")),
        ]);
        Daemon::listening(&mut command)
    }
}

/// A block whose every byte depends on its version.
fn content(version: u64) -> Vec<u8> {
    (0..BLOCK_BYTES)
        .map(|at| (version.wrapping_mul(0x9e37_79b9) >> (at % 24)) as u8)
        .collect()
}

/// Chains that the region says the device holds.
fn held(region: &File) -> usize {
    let marked = |head: u64| {
        let mut inflight = [0];
        region.read_exact_at(&mut inflight, 16 + 16 * head).unwrap();
        inflight == [1]
    };
    (0..QUEUE_SIZE.into()).filter(|head| marked(*head)).count()
}

/// Each block must be of its latest version.
fn judge(image: &Path, latest: &[u64]) {
    let image = File::open(image).unwrap();
    for (block, version) in latest.iter().enumerate().filter(|(_, version)| **version != 0) {
        let mut found = vec![0; BLOCK_BYTES];
        image.read_exact_at(&mut found, (block * BLOCK_BYTES) as u64).unwrap();
        let is_of = (1..=*version).rev().find(|version| found == content(*version));
        assert!(
            is_of == Some(*version),
            "block {block} is not of version {version} but of {is_of:?}"
        );
    }
}

/// 50 kills, at instants the seed chooses, with writes that overlap each other in flight. Some come while the daemon takes up what the one
/// before it held. Nothing may be lost, nothing done twice, and of overlapping writes the later one must win.
#[test]
fn fifty_kills_lose_nothing_and_reorder_nothing() {
    let seed = std::env::var("FT_SEED").map_or_else(|_| rand::rng().random(), |seed| seed.parse().unwrap());
    println!("FT_SEED={seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let world = World::new();
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let mut region = None;
    let mut flying: HashMap<u16, BlkRequest> = HashMap::new();
    let mut latest = [0u64; BLOCKS as usize];
    let mut version = 0;
    let mut taken_again = 0;
    for round in 0..ROUNDS {
        if let Some((_, file)) = &region {
            taken_again += usize::from(held(file) > 0);
        }
        let daemon = world.daemon();
        let mut session = Session::negotiate(&world.path("socket"), u64::MAX, 1);
        session.share(&memory);
        region = Some(session.track(region.take(), QUEUE_SIZE));
        session.start_queue(0, &driver.ring);
        let judged = round % JUDGED == JUDGED - 1;
        let mut until_the_kill = if random.random_bool(0.3) {
            0
        } else {
            random.random_range(0..60)
        };
        while until_the_kill > 0 || (judged && !flying.is_empty()) {
            while until_the_kill > 0 && flying.len() < IN_FLIGHT_MAX {
                version += 1;
                let block = random.random_range(0..BLOCKS);
                let write = driver.write(block * BLOCK_SECTORS, &content(version));
                latest[block as usize] = version;
                flying.insert(write.head, write);
                until_the_kill -= 1;
            }
            if driver.ring.wants_kick() {
                session.kick(0);
            }
            let mut progress = false;
            while let Some((head, _)) = driver.ring.take_used() {
                let request = flying.remove(&head).expect("each request is completed once");
                assert_eq!(driver.status(request), 0);
                progress = true;
            }
            if !progress {
                session.wait_call(0);
            }
        }
        daemon.kill();
        if judged {
            assert!(flying.is_empty());
            judge(&world.path("image"), &latest);
        }
    }
    println!("{version} writes, {taken_again} rounds with requests to take again");
    assert!(
        taken_again > 0,
        "no kill hit a request in flight: the test shows nothing"
    );
}

#[test]
fn a_region_of_other_queues_is_refused() {
    use std::os::fd::AsRawFd;
    use vhost::vhost_user::{VhostUserFrontend, message::VhostUserInflight};
    let world = World::new();
    let _daemon = world.daemon();
    let mut session = Session::negotiate(&world.path("socket"), u64::MAX, 1);
    let file = tempfile::tempfile().unwrap();
    file.set_len(64).unwrap();
    let beyond = VhostUserInflight::new(1 << 20, 0, 1, QUEUE_SIZE);
    assert!(session.frontend.set_inflight_fd(&beyond, file.as_raw_fd()).is_err());
}
