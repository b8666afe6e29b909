//! How data moves when nobody protects the guest: directly, through aligned buffers, when the image is full, and by libblkio's driver.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

use std::{
    fs::File,
    mem::MaybeUninit,
    path::{Path, PathBuf},
    process::Command,
};

use blkio::{Blkio, Completion, ReqFlags};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::{
    daemon::{Daemon, fails, text},
    driver::{BlkDriver, memory, readable, writable},
    frontend::{Session, complete, complete_on},
};
use tempfile::TempDir;

const BYTES: u64 = 8 << 20;

fn daemon(socket: &Path, image: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
    command.args(["--socket-path", text(socket), "--blk-file", text(image)]);
    command.args(options);
    command
}

/// A directory on a disk: the one for temporary files may be in memory, which knows no direct I/O.
fn on_disk() -> (TempDir, PathBuf) {
    let directory = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = directory.path().join("image");
    File::create(&image).unwrap().set_len(BYTES).unwrap();
    (directory, image)
}

#[test]
fn direct_io_serves_any_alignment_of_the_guests_memory() {
    let seed = std::env::var("FT_SEED").map_or_else(|_| rand::rng().random(), |seed| seed.parse().unwrap());
    println!("FT_SEED={seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (directory, image) = on_disk();
    let socket = directory.path().join("socket");
    let _daemon = Daemon::listening(&mut daemon(&socket, &image, &["--direct"]));
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let session = Session::start(&socket, &memory, u64::MAX, &[&driver.ring]);
    let mut expected = vec![0; BYTES as usize];
    for _ in 0..200 {
        // Two pieces of data at odd places, the header and the status elsewhere.
        let sectors = random.random_range(1..=64usize);
        let sector = random.random_range(0..(BYTES / 512) as usize - sectors);
        let length = sectors * 512;
        let first = random.random_range(1..length as u32);
        let shift = random.random_range(0..2048u64) * random.random_range(0..2);
        let (one, other) = ((4 << 20) + shift, (6 << 20) + random.random_range(0..2048u64));
        let data: Vec<u8> = (0..length).map(|_| random.random()).collect();
        let writes = random.random();
        let (header, status) = (3 << 20, (3 << 20) + 64);
        driver
            .ring
            .write(header, &support::driver::blk_header(u32::from(writes), sector as u64));
        driver.ring.write(status, &[0xff]);
        let part = |address, length| {
            if writes {
                readable(address, length)
            } else {
                writable(address, length)
            }
        };
        let pieces = [
            readable(header, 16),
            part(one, first),
            part(other, length as u32 - first),
            writable(status, 1),
        ];
        if writes {
            driver.ring.write(one, &data[..first as usize]);
            driver.ring.write(other, &data[first as usize..]);
        }
        driver.ring.add(&pieces);
        if driver.ring.wants_kick() {
            session.kick(0);
        }
        let (_, written) = loop {
            if let Some(used) = driver.ring.take_used() {
                break used;
            }
            session.wait_call(0);
        };
        assert_eq!(driver.ring.read(status, 1), [0]);
        let place = &mut expected[sector * 512..][..length];
        if writes {
            assert_eq!(written, 1);
            place.copy_from_slice(&data);
        } else {
            assert_eq!(written, length as u32 + 1);
            let mut found = driver.ring.read(one, first as usize);
            found.extend(driver.ring.read(other, length - first as usize));
            assert!(
                found == place,
                "sector {sector}, {length} bytes in {first} and the rest"
            );
        }
    }
    assert!(std::fs::read(&image).unwrap() == expected);
}

#[test]
fn the_cache_mode_is_the_operators_until_the_driver_chooses() {
    let (directory, image) = on_disk();
    for (mode, writeback) in [("writeback", 1), ("writethrough", 0)] {
        let socket = directory.path().join(mode);
        let _daemon = Daemon::listening(&mut daemon(&socket, &image, &["--cache", mode]));
        let memory = memory();
        let driver = BlkDriver::new(&memory, true);
        let mut session = Session::start(&socket, &memory, u64::MAX, &[&driver.ring]);
        assert_eq!(session.config(60)[32], writeback);
        session.set_config(32, &[1 - writeback]).unwrap();
        drop(session);
        // The next frontend finds what the last one chose.
        let mut session = Session::start(&socket, &memory, u64::MAX, &[&driver.ring]);
        assert_eq!(session.config(60)[32], 1 - writeback);
    }
}

#[test]
fn a_guest_that_ran_before_is_written_through_until_its_driver_chooses() {
    use vhost::VhostBackend;
    const WRITEBACK: u32 = 32;
    let (directory, image) = on_disk();
    let socket = directory.path().join("socket");
    let mode = |session: &mut Session| session.config(60)[WRITEBACK as usize];
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let daemon_here = Daemon::listening(&mut daemon(&socket, &image, &[]));
    let mut session = Session::negotiate(&socket, u64::MAX, 1);
    session.share(&memory);
    let region = session.track(None, 64);
    session.start_queue(0, &driver.ring);
    assert_eq!(mode(&mut session), 1);
    // A queue that stops and goes on is known to this daemon.
    let write = driver.write(0, &[1; 512]);
    complete(&session, &mut driver, &[write]);
    session.frontend.get_vring_base(0).unwrap();
    session.start_queue(0, &driver.ring);
    assert_eq!(mode(&mut session), 1);
    drop(session);
    daemon_here.kill();

    // As after a migration: where the queue was, and nothing else.
    let daemon_here = Daemon::listening(&mut daemon(
        &socket,
        &image,
        &["--num-queues", "2", "--io-threads", "2"],
    ));
    let mut session = Session::start(&socket, &memory, u64::MAX, &[&driver.ring]);
    assert_eq!(mode(&mut session), 0);
    session.set_config(WRITEBACK, &[1]).unwrap();
    session.frontend.get_vring_base(0).unwrap();
    session.start_queue(0, &driver.ring);
    assert_eq!(mode(&mut session), 1);
    drop(session);
    daemon_here.kill();

    // As after a kill -9: the region of the chains in flight.
    let _daemon = Daemon::listening(&mut daemon(&socket, &image, &[]));
    let mut session = Session::negotiate(&socket, u64::MAX, 1);
    session.share(&memory);
    session.track(Some(region), 64);
    assert_eq!(mode(&mut session), 0);
}

#[test]
fn a_queue_beyond_the_operators_bound_is_refused() {
    use vhost::VhostBackend;
    let (directory, image) = on_disk();
    let socket = directory.path().join("socket");
    let _daemon = Daemon::listening(&mut daemon(&socket, &image, &["--queue-size", "64"]));
    let session = Session::negotiate(&socket, u64::MAX, 1);
    session.frontend.set_vring_num(0, 64).unwrap();
    assert!(session.frontend.set_vring_num(0, 128).is_err());
}

#[test]
fn a_protected_disk_does_no_direct_io() {
    let (directory, image) = on_disk();
    let socket = directory.path().join("socket");
    let membership = ["--direct", "--ft-log", "x", "--vm", "v", "--device", "d"];
    let (code, said) = fails(&mut daemon(&socket, &image, &membership));
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("--direct"), "{said}");
}

/// A daemon on an image of 8 MiB in a file system of 4, most of which something else has until the end of the pipe's other side.
fn on_a_full_disk(directory: &Path, socket: &Path, policy: &str) -> Command {
    let mut command = Command::new("unshare");
    if !nix::unistd::Uid::effective().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let script = r#"
        mount -t tmpfs -o size=4m none "$1" && truncate -s 8M "$1/image" && head -c 3M /dev/zero >"$1/ballast" || exit 1
        (cat "$3"; rm "$1/ballast") >/dev/null 2>&1 &
        exec "$2" --socket-path "$4" --blk-file "$1/image" --on-enospc "$5"
    "#;
    let pipe = directory.join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let full = directory.join("full");
    std::fs::create_dir(&full).unwrap();
    command.args([
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
        text(&full),
        env!("CARGO_BIN_EXE_vhost-ft-blk"),
    ]);
    command.args([text(&pipe), text(socket), policy]);
    command
}

#[test]
fn a_full_file_system_is_an_error_or_a_pause_as_the_operator_wants() {
    for policy in ["report", "stop"] {
        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("socket");
        let mut running = Daemon::listening(&mut on_a_full_disk(directory.path(), &socket, policy));
        let full = File::options().write(true).open(directory.path().join("pipe")).unwrap();
        let memory = memory();
        let mut driver = BlkDriver::new(&memory, true);
        let session = Session::start(&socket, &memory, u64::MAX, &[&driver.ring]);
        // 1.25 MiB, where there is room for less than 1.
        let writes: Vec<_> = (0..20).map(|slot| driver.write(slot * 128, &[7; 65536])).collect();
        if policy == "report" {
            complete(&session, &mut driver, &writes);
            let failed = writes.iter().filter(|write| driver.status(**write) == 1).count();
            assert!((1..20).contains(&failed), "{failed} of 20 writes failed");
        } else {
            session.kick(0);
            running.wait_line("a write waits");
            // Reads go on meanwhile, and nothing has failed.
            let read = driver.read(15 * 1024, 512);
            complete(&session, &mut driver, &[read]);
            assert_eq!(driver.status(read), 0);
            assert!(writes.iter().all(|write| driver.status(*write) != 1));
            let waiting = writes.iter().copied().filter(|write| driver.status(*write) == 0xff);
            let waiting: Vec<_> = waiting.collect();
            assert!(!waiting.is_empty());
            drop(full);
            complete_those(&session, &mut driver, &waiting);
            assert!(writes.iter().all(|write| driver.status(*write) == 0));
        }
        running.terminate();
        assert_eq!(running.wait().0, Some(0));
    }
}

/// Waits for requests some of which may have been seen in the used ring already.
fn complete_those(session: &Session, driver: &mut BlkDriver, requests: &[support::driver::BlkRequest]) {
    while requests.iter().any(|request| driver.status(*request) == 0xff) {
        session.wait_call(0);
        while driver.ring.take_used().is_some() {}
    }
}

#[test]
fn queues_on_threads_of_their_own_all_serve_and_stop() {
    let (directory, image) = on_disk();
    let socket = directory.path().join("socket");
    for threads in ["1", "2", "3"] {
        let running = Daemon::listening(&mut daemon(
            &socket,
            &image,
            &["--num-queues", "3", "--io-threads", threads],
        ));
        let memory = memory();
        let mut drivers: Vec<_> = (0..3).map(|queue| BlkDriver::of_queue(&memory, true, queue)).collect();
        let rings: Vec<_> = drivers.iter().map(|driver| &driver.ring).collect();
        let mut session = Session::start(&socket, &memory, u64::MAX, &rings);
        // The cache mode is every thread's.
        session.set_config(32, &[0]).unwrap();
        for round in 0..20u8 {
            for (queue, driver) in drivers.iter_mut().enumerate() {
                let sector = queue as u64 * 64;
                let write = driver.write(sector, &[round; 4096]);
                let read = driver.read(sector, 4096);
                complete_on(&session, queue, driver, &[write, read]);
                assert!(driver.data(read) == [round; 4096], "queue {queue}, round {round}");
            }
        }
        for queue in 0..3 {
            use vhost::VhostBackend;
            assert_eq!(session.frontend.get_vring_base(queue).unwrap(), 40);
        }
        running.terminate();
        assert_eq!(running.wait().0, Some(0));
    }
}

#[test]
fn libblkio_reads_what_it_wrote() {
    const BLOCK: usize = 64 << 10;
    let (directory, image) = on_disk();
    let socket = directory.path().join("socket");
    let _daemon = Daemon::listening(&mut daemon(&socket, &image, &["--num-queues", "2"]));
    let mut device = Blkio::new("virtio-blk-vhost-user").unwrap();
    device.set_str("path", text(&socket)).unwrap();
    device.connect().unwrap();
    assert_eq!(device.get_u64("capacity").unwrap(), BYTES);
    device.set_i32("num-queues", 2).unwrap();
    let mut queues = device.start().unwrap().queues;
    let region = device.alloc_mem_region(2 * BLOCK).unwrap();
    device.map_mem_region(&region).unwrap();
    let guest = vec![0x5a; BLOCK];
    std::fs::write(&image, &guest).unwrap();
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(BYTES)
        .unwrap();
    let mut one = |queue: usize, submit: &dyn Fn(&mut blkio::Blkioq)| {
        let mut completions = [MaybeUninit::<Completion>::uninit()];
        submit(&mut queues[queue]);
        assert_eq!(queues[queue].do_io(&mut completions, 1, None, None).unwrap(), 1);
        // SAFETY: the call above wrote one completion.
        assert_eq!(unsafe { completions[0].assume_init_ref() }.ret, 0);
    };
    // Read by one queue, written elsewhere by the other, and read back.
    let (first, second) = (region.addr as *mut u8, (region.addr + BLOCK) as *mut u8);
    one(0, &|queue| queue.read(0, first, BLOCK, 0, ReqFlags::empty()));
    one(1, &|queue| queue.write(1 << 20, first, BLOCK, 0, ReqFlags::FUA));
    one(0, &|queue| queue.discard(0, BLOCK as u64, 0, ReqFlags::empty()));
    one(1, &|queue| queue.read(1 << 20, second, BLOCK, 0, ReqFlags::empty()));
    let content = std::fs::read(&image).unwrap();
    assert!(content[1 << 20..][..BLOCK] == guest && content[..BLOCK].iter().all(|byte| *byte == 0));
}
