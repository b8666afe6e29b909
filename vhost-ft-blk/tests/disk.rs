//! The device without a daemon: what it does from one completion to the next.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

use std::{fs::File, time::Duration};

use ft_vhost::{
    device::{Buffer, Completion, Device, Life, Uring},
    guest_side::{
        blk::{Geometry, STATUS_IO_ERROR, completions},
        dirty::GuestMemoryMmap,
    },
};
use support::{
    driver::{BlkDriver, BlkRequest, memory},
    frontend::PATIENCE,
};
use tempfile::TempDir;
use vhost_ft_blk::{
    disk::{Disk, Policy},
    image::{Access, Image, Locking},
};

const BYTES: u64 = 1 << 20;

/// A disk, and the drivers of its queues.
struct Machine {
    disk: Disk,
    io: Uring,
    drivers: Vec<BlkDriver>,
    _directory: TempDir,
}

impl Machine {
    fn new(access: Access, policy: Policy, queues: u16) -> Self {
        // On a disk: the directory for temporary files may be in memory, which knows no direct I/O.
        let directory = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = directory.path().join("image");
        File::create(&path).unwrap().set_len(BYTES).unwrap();
        let image = Image::open(&path, access, 512, Locking::Life, Duration::ZERO).unwrap();
        let geometry = Geometry {
            capacity_sectors: image.sectors(),
            read_only: image.is_read_only(),
            queues,
            block_bytes: 512,
            protected: false,
        };
        let mut machine = Self {
            disk: Disk::new(image, geometry, policy),
            io: Uring::new().unwrap(),
            drivers: Vec::new(),
            _directory: directory,
        };
        let memory = memory();
        machine.disk.start(Life::Alone, &mut machine.io).unwrap();
        machine.disk.guest().set_memory(memory.clone());
        for queue in 0..queues {
            let driver = BlkDriver::of_queue(&memory, false, queue.into());
            let setup = driver.ring.setup();
            machine.disk.guest().configure_queue(queue, &setup).unwrap();
            machine.drivers.push(driver);
        }
        machine
    }

    fn kick(&mut self, queue: u16) {
        self.disk.guest().kick(queue).unwrap();
        self.disk.perform(None, &mut self.io).unwrap();
    }

    /// The next completion of the kernel.
    fn completion(&mut self) -> Completion {
        self.io.wait(Some(PATIENCE));
        self.io.next_completion().expect("something completes")
    }

    /// Delivers what there is.
    fn deliver(&mut self) {
        while let Some(input) = self.disk.take_input(&mut self.io).unwrap() {
            self.disk.guest().deliver(1, input.queue, &input.payload).unwrap();
            self.disk.recycle(input.payload);
        }
    }

    fn status(&mut self, queue: u16, request: BlkRequest) -> u8 {
        self.deliver();
        self.drivers[usize::from(queue)].status(request)
    }
}

const WRITES: Access = Access {
    read_only: false,
    direct: false,
};

const DIRECT_READS: Access = Access {
    read_only: true,
    direct: true,
};

const DIRECT_WRITES: Access = Access {
    read_only: false,
    direct: true,
};

#[test]
fn zeroes_and_discards_are_durable_before_they_are_done_in_write_through_mode() {
    const UNMAP: u32 = 1;
    for (write_through, steps) in [(false, 1), (true, 2)] {
        let policy = Policy {
            write_through,
            ..Policy::default()
        };
        let mut machine = Machine::new(WRITES, policy, 1);
        for (kind, flags) in [(13, UNMAP), (11, 0)] {
            let request = machine.drivers[0].extent(kind, 8, 16, flags);
            machine.kick(0);
            for _ in 0..steps {
                assert_eq!(machine.status(0, request), 0xff, "it is not done yet");
                let completion = machine.completion();
                assert_eq!(completion.result, 0);
                machine.disk.complete(completion, &mut machine.io).unwrap();
            }
            assert_eq!(machine.status(0, request), 0);
        }
    }
}

#[test]
fn a_read_whose_memory_is_gone_is_an_error() {
    let mut machine = Machine::new(DIRECT_READS, Policy::default(), 1);
    // In parts of 256 bytes, which no direct I/O takes: it goes through a buffer.
    machine.drivers[0].read(0, 512);
    machine.kick(0);
    let completion = machine.completion();
    assert_eq!(completion.result, 512);
    machine.disk.guest().set_memory(GuestMemoryMmap::new());
    machine.disk.complete(completion, &mut machine.io).unwrap();
    let input = machine.disk.take_input(&mut machine.io).unwrap().expect("a completion");
    let statuses: Vec<u8> = completions(&input.payload)
        .map(|completion| completion.unwrap().status)
        .collect();
    assert_eq!(statuses, [STATUS_IO_ERROR]);
}

#[test]
fn direct_reads_of_a_shared_image_do_not_reach_guest_memory_by_themselves() {
    for (access, guests_own) in [(DIRECT_READS, false), (DIRECT_WRITES, true)] {
        let mut machine = Machine::new(access, Policy::default(), 1);
        let read = machine.drivers[0].read(0, 8192);
        machine.kick(0);
        let completion = machine.completion();
        assert_eq!(matches!(completion.buffer, Buffer::Guest(_)), guests_own);
        assert_eq!(machine.drivers[0].data(read) == [0; 8192], guests_own);
        machine.disk.complete(completion, &mut machine.io).unwrap();
        assert_eq!(machine.status(0, read), 0);
        assert!(machine.drivers[0].data(read) == [0; 8192]);
    }
}
