//! What a VM that migrates, resizes its disk or plugs memory asks of the daemon, from a frontend without a VM.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::Instant,
};

use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use nix::sys::memfd::{MFdFlags, memfd_create};
use support::{
    daemon::{Daemon, fails, text},
    driver::{BlkDriver, MEMORY_BYTES, memory},
    frontend::{PATIENCE, Session, complete, readable_within},
};
use tempfile::TempDir;
use vhost::{
    VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo,
    vhost_user::{
        FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
        message::VhostUserProtocolFeatures,
    },
};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BYTES: u64 = 4 << 20;
const LOG_ALL: u64 = 1 << 26;
const RING_RESET: u64 = 1 << 40;
const PAGE: u64 = 4096;

struct World {
    directory: TempDir,
    _daemon: Daemon,
}

impl World {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        File::create(directory.path().join("image"))
            .unwrap()
            .set_len(BYTES)
            .unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
        command.args([
            "--socket-path",
            &path("socket"),
            "--blk-file",
            &path("image"),
            "--control",
            &path("control"),
        ]);
        let daemon = Daemon::listening(&mut command);
        Self {
            directory,
            _daemon: daemon,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn negotiate(&self, features: u64) -> Session {
        let more = VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::BACKEND_REQ;
        Session::negotiate_with(&self.path("socket"), features, 1, more)
    }
}

/// A dirty log as a frontend keeps it.
struct DirtyLog(File);

impl DirtyLog {
    fn new(bytes: u64) -> Self {
        let file = File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        Self(file)
    }

    fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion {
            mmap_size: self.0.metadata().unwrap().len(),
            mmap_offset: 0,
            mmap_handle: self.0.as_raw_fd(),
        }
    }

    /// The pages marked since this was last asked.
    fn take(&self) -> BTreeSet<u64> {
        let mut bits = vec![0; self.0.metadata().unwrap().len() as usize];
        self.0.read_exact_at(&mut bits, 0).unwrap();
        self.0.write_all_at(&vec![0; bits.len()], 0).unwrap();
        let is_set = |page: &u64| bits[(page / 8) as usize] & 1 << (page % 8) != 0;
        (0..bits.len() as u64 * 8).filter(is_set).collect()
    }
}

/// Every page, as the frontend sees it.
fn pages(memory: &GuestMemoryMmap) -> Vec<Vec<u8>> {
    use vm_memory::Bytes;
    let read = |page: u64| {
        let mut bytes = vec![0; PAGE as usize];
        memory.read_slice(&mut bytes, GuestAddress(page * PAGE)).unwrap();
        bytes
    };
    (0..MEMORY_BYTES / PAGE).map(read).collect()
}

#[test]
fn every_page_the_device_changes_is_logged_and_hardly_any_other() {
    let world = World::new();
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let mut session = world.negotiate(!LOG_ALL);
    session.share(&memory);
    session.start_queue(0, &driver.ring);
    let features = session.features;
    let log = DirtyLog::new(MEMORY_BYTES / PAGE / 8);
    let write = driver.write(8, &[7; 8192]);
    complete(&session, &mut driver, &[write]);
    assert!(log.take().is_empty());

    // As QEMU begins a migration: the log, the feature, the rings once more.
    session.frontend.set_log_base(0, Some(log.region())).unwrap();
    session.frontend.set_features(features | LOG_ALL).unwrap();
    session.set_addresses(0, &driver.ring, true);
    for round in 0..20u64 {
        // A device that still polls would serve them before memory was looked at.
        driver.ring.hold();
        let requests = [
            driver.read(8, 16384),
            driver.read(8 + round, 512),
            driver.write(100 + round, &[3; 4096]),
            driver.other(8, 20),
            driver.flush(),
        ];
        // All but the index is there: what changes from here on, the device changed.
        let before = pages(&memory);
        driver.ring.announce();
        complete(&session, &mut driver, &requests);
        let after = pages(&memory);
        let changed: BTreeSet<u64> = (0..)
            .zip(before.iter().zip(&after))
            .filter(|(_, (a, b))| a != b)
            .map(|(page, _)| page)
            .collect();
        assert!(changed.len() >= 6, "{changed:?}");
        // The index and the used_event of the driver are in the available ring, which only the driver writes.
        let ring_of_driver = (0x1_0000 + 0x8000) / PAGE;
        // A page is marked after it was written: the last one perhaps after its request was seen complete here.
        let deadline = Instant::now() + PATIENCE;
        let mut logged = log.take();
        let missed = loop {
            let missed: Vec<_> = changed
                .difference(&logged)
                .filter(|page| **page != ring_of_driver)
                .copied()
                .collect();
            if missed.is_empty() || Instant::now() > deadline {
                break missed;
            }
            std::thread::yield_now();
            logged.extend(log.take());
        };
        assert!(missed.is_empty(), "changed and not logged: {missed:?}");
        // Read data that equals what was there before is a write all the same.
        let spare = logged.difference(&changed).count();
        assert!(spare <= 6, "{logged:?} {changed:?}");
    }

    session.frontend.set_features(features).unwrap();
    session.set_addresses(0, &driver.ring, false);
    // What the device wrote since the last look, when it began to wait for kicks.
    log.take();
    let read = driver.read(8, 16384);
    complete(&session, &mut driver, &[read]);
    assert!(log.take().is_empty());
}

#[test]
fn a_log_that_does_not_cover_the_memory_is_refused() {
    let world = World::new();
    let memory = memory();
    let mut session = world.negotiate(u64::MAX);
    session.share(&memory);
    let log = DirtyLog::new(MEMORY_BYTES / PAGE / 8 - 1);
    assert!(session.frontend.set_log_base(0, Some(log.region())).is_err());
}

#[test]
fn memory_comes_and_goes_region_by_region() {
    let world = World::new();
    let mut session = world.negotiate(u64::MAX);
    assert!(session.frontend.get_max_mem_slots().unwrap() >= 32);
    let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(2 * MEMORY_BYTES).unwrap();
    let part = |guest: u64, length: u64, offset: u64| {
        let file = FileOffset::new(file.try_clone().unwrap(), offset);
        (GuestAddress(guest), length as usize, Some(file))
    };
    // The rings and slots of a driver in two regions, the second plugged before and unplugged after its use.
    let low: u64 = 2 << 20;
    let memory =
        GuestMemoryMmap::from_ranges_with_files([part(0, low, 0), part(low, MEMORY_BYTES - low, MEMORY_BYTES)])
            .unwrap();
    let regions: Vec<VhostUserMemoryRegionInfo> = memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
        .collect();
    session.frontend.add_mem_region(&regions[0]).unwrap();
    let mut driver = BlkDriver::new(&memory, true);
    session.start_queue(0, &driver.ring);
    let write = driver.write(0, &[5; 4096]);
    complete(&session, &mut driver, &[write]);
    session.frontend.add_mem_region(&regions[1]).unwrap();
    // Request after request moves through the slots, and by that into the second region and back.
    for round in 0..64u64 {
        let requests = [
            driver.write(round * 8, &[round as u8; 4096]),
            driver.read(round * 8, 4096),
        ];
        complete(&session, &mut driver, &requests);
        assert!(driver.data(requests[1]) == [round as u8; 4096]);
    }
    session.frontend.remove_mem_region(&regions[1]).unwrap();
    let read = driver.read(63 * 8, 4096);
    complete(&session, &mut driver, &[read]);
    assert!(driver.data(read) == [63; 4096]);
}

#[test]
fn a_queue_is_reset_and_starts_afresh_with_another_size() {
    let world = World::new();
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let mut session = world.negotiate(!LOG_ALL);
    assert_ne!(session.features & RING_RESET, 0);
    session.share(&memory);
    session.start_queue(0, &driver.ring);
    for size in [16, 64, 32] {
        let write = driver.write(0, &[size as u8; 4096]);
        complete(&session, &mut driver, &[write]);
        session.frontend.get_vring_base(0).unwrap();
        driver = BlkDriver::fresh(&memory, true, size);
        session.start_queue(0, &driver.ring);
        let read = driver.read(0, 4096);
        complete(&session, &mut driver, &[read]);
        assert!(driver.data(read) == [size as u8; 4096]);
    }
}

/// Tells the test that the configuration space changed.
struct Ear(EventFd);

impl VhostUserFrontendReqHandler for Ear {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.write(1)?;
        Ok(0)
    }
}

#[test]
fn a_disk_grows_under_its_driver() {
    let world = World::new();
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let mut session = world.negotiate(!LOG_ALL);
    let heard = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut ear = FrontendReqHandler::new(Arc::new(Ear(heard.try_clone().unwrap()))).unwrap();
    session.frontend.set_backend_request_fd(&ear.get_tx_raw_fd()).unwrap();
    std::thread::spawn(move || -> io::Result<()> {
        loop {
            ear.handle_request().map_err(io::Error::other)?;
        }
    });
    session.share(&memory);
    session.start_queue(0, &driver.ring);
    // The driver's cache mode stays what it chose.
    session.set_config(32, &[0]).unwrap();
    let beyond = driver.write(BYTES / 512, &[9; 512]);
    complete(&session, &mut driver, &[beyond]);
    assert_eq!(driver.status(beyond), 1);

    let order = |bytes: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
        command.args(["resize", "--control", text(&world.path("control"))]);
        command.args(bytes.split_whitespace());
        fails(&mut command)
    };
    let sectors = |session: &mut Session| u64::from_le_bytes(*session.config(60).first_chunk().unwrap());
    let (code, said) = order("8388608");
    assert_eq!(code, Some(0), "{said}");
    assert!(readable_within(&heard, PATIENCE), "the frontend was not told");
    heard.read().unwrap();
    assert_eq!(sectors(&mut session), 2 * BYTES / 512);
    assert_eq!(session.config(60)[32], 0);
    let within = driver.write(BYTES / 512, &[9; 512]);
    complete(&session, &mut driver, &[within]);
    assert_eq!(driver.status(within), 0);

    // The image grows by itself (a volume), and the daemon is told to look.
    File::options()
        .write(true)
        .open(world.path("image"))
        .unwrap()
        .set_len(3 * BYTES)
        .unwrap();
    let (code, said) = order("");
    assert_eq!(code, Some(0), "{said}");
    assert!(readable_within(&heard, PATIENCE), "the frontend was not told");
    assert_eq!(sectors(&mut session), 3 * BYTES / 512);
    for (bytes, says) in [("512", "not made smaller"), ("99999999", "not a multiple")] {
        let (code, said) = order(bytes);
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains(says), "{said}");
    }
    assert_eq!(sectors(&mut session), 3 * BYTES / 512);
}

#[test]
fn memory_that_is_taken_away_ends_the_daemon_with_a_clear_line() {
    let world = World::new();
    // A memfd that cannot be sealed, which a careful frontend does not use.
    let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(MEMORY_BYTES).unwrap();
    let memory = GuestMemoryMmap::from_ranges_with_files([(
        GuestAddress(0),
        MEMORY_BYTES as usize,
        Some(FileOffset::new(file.try_clone().unwrap(), 0)),
    )])
    .unwrap();
    let driver = BlkDriver::new(&memory, true);
    let session = Session::start(&world.path("socket"), &memory, !LOG_ALL, &[&driver.ring]);
    file.set_len(PAGE).unwrap();
    session.kick(0);
    let World { _daemon: daemon, .. } = world;
    let (code, said) = daemon.wait();
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("memory shared by the frontend is gone"), "{said}");
}
