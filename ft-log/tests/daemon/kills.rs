//! kill -9 of either daemon at seeded instants under load: its journal verifies, and no acknowledged entry is missing.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use ft_client::{
    handshake::{DeviceSession, ShimSession},
    journal::JournalReader,
    log::Urgency,
    region::Region,
};
use ft_protocol::{
    DeviceId, Lsn, Role,
    entry::{Body, Stop},
};
use nix::sys::signal::Signal;

use crate::world::{Host, HostId, Locals, SUSPICIOUS, World};

/// Kills of each side; `FT_LOG_KILLS` asks for more.
const KILLS: u64 = 6;

/// splitmix64.
fn random(seed: u64) -> u64 {
    let mut z = seed
        .wrapping_add(0x9e37_79b9_7f4a_7c15)
        .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn kills() -> u64 {
    std::env::var("FT_LOG_KILLS").map_or(KILLS, |count| count.parse().expect("FT_LOG_KILLS is a number"))
}

/// The last entry of a journal that verifies; a torn tail is what a kill may leave.
fn verified(directory: &Path) -> (Lsn, Vec<u8>) {
    let mut all = Vec::new();
    // Killed before it wrote anything.
    if fs::read_dir(directory).map_or(true, |mut files| files.next().is_none()) {
        return (Lsn::ZERO, all);
    }
    let mut reader = match JournalReader::open(directory) {
        Ok(reader) => reader,
        // The kill may have been between the file and its header.
        Err(_) if only_torn_header(directory) => return (Lsn::ZERO, all),
        Err(error) => panic!("{error}"),
    };
    while let Some((_, bytes)) = reader.next_entry().unwrap() {
        all.extend_from_slice(bytes);
    }
    (reader.last_good().lsn, all)
}

fn only_torn_header(directory: &Path) -> bool {
    let mut files = fs::read_dir(directory).unwrap();
    files.all(|file| file.unwrap().metadata().unwrap().len() < ft_client::journal::SEGMENT_HEADER_BYTES as u64)
}

/// Appends entries until the daemon is gone. Whatever happens to the daemon, the memory stays.
fn load(seed: u64, mut shim: ShimSession, mut devices: Vec<DeviceSession>, gone: &AtomicBool) {
    for index in (0..).take_while(|_| !gone.load(Ordering::Relaxed)) {
        let payload = vec![index as u8; (random(seed ^ index) % 3000) as usize];
        let body = Body::Input {
            sequence: index,
            payload: &payload,
        };
        let sync = Body::Sync(Stop::default());
        let appended = match index % 3 {
            0 => shim.log.append(DeviceId::SHIM, 0, &sync, Urgency::Now),
            1 => devices[0].log.append(DeviceId(0), 0, &body, Urgency::Later),
            _ => devices[1].log.append(DeviceId(1), 0, &body, Urgency::Now),
        };
        if appended.is_err() {
            break;
        }
        // A guest waits for answers: no more than this is under way, so that the instant of the kill is anywhere.
        while index % 64 == 63 && !gone.load(Ordering::Relaxed) && shim.region.committed().lsn().0 + 128 < index {
            std::thread::yield_now();
        }
    }
}

/// Kills `victim` once so many entries were replayed; the backup replays as it goes. Gives the last acknowledged entry.
fn kill_one(seed: u64, victim: HostId) -> Lsn {
    println!("seed {seed}, {victim:?} is killed");
    let world = World::new();
    // The backup takes over; a primary that lost its backup waits, so that it can be asked what was acknowledged.
    let patience = if victim == HostId::A { SUSPICIOUS } else { &[] };
    let (a, mut b) = world.pair_with(&[&["--ack", "durable"], patience].concat());
    let Host {
        daemon: mut primary,
        locals: Locals { shim, devices },
    } = a;
    let region: Arc<Region> = Arc::clone(&shim.region);
    let gone = AtomicBool::new(false);
    let (durable, acknowledged, mut replayed) = std::thread::scope(|scope| {
        scope.spawn(|| load(seed, shim, devices, &gone));
        let kill_after = Lsn(1 + random(seed) % 3000);
        let mut replayed = b.replay_through(Lsn(1), kill_after);
        let killed = if victim == HostId::A {
            &mut primary
        } else {
            &mut b.daemon
        };
        killed.signal(Signal::SIGKILL);
        killed.wait();
        gone.store(true, Ordering::Relaxed);
        let survivor = if victim == HostId::A {
            // With everything replayed it is live at once.
            b.wait_role_in(&[Role::GoingLive, Role::Live]);
            let end = b.region().replay_end();
            replayed.extend(b.replay_through(kill_after.next(), end));
            b.wait_role(Role::Live);
            assert!(end >= region.committed().lsn());
            &mut b.daemon
        } else {
            &mut primary
        };
        survivor.signal(Signal::SIGTERM);
        survivor.wait();
        let (durable, journal) = verified(&world.journal(HostId::B));
        let both = journal.len().min(replayed.len());
        assert!(
            journal[..both] == replayed[..both],
            "the journal is another log than the replay"
        );
        (durable, region.committed().lsn(), journal)
    });
    assert!(acknowledged < Lsn::MAX, "a side that was not to go live did");
    assert!(
        durable >= acknowledged,
        "the backup's journal ends at {durable}, {acknowledged} was acknowledged"
    );
    let (_, of_primary) = verified(&world.journal(HostId::A));
    let both = replayed.len().min(of_primary.len());
    replayed.truncate(both);
    assert!(replayed == of_primary[..both], "the two journals differ");
    acknowledged
}

/// Kills from `seed` on. Most of them must come when something has been acknowledged.
fn kill_many(seed: u64, victim: HostId) {
    let count = kills();
    let late = (seed..seed + count).filter(|seed| kill_one(*seed, victim) > Lsn::ZERO);
    assert!(late.count() as u64 > count / 2);
}

#[test]
fn no_acknowledged_entry_is_missing_after_the_primary_was_killed() {
    kill_many(0, HostId::A);
}

#[test]
fn no_acknowledged_entry_is_missing_after_the_backup_was_killed() {
    kill_many(1_000_000, HostId::B);
}
