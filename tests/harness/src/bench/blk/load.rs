//! The frontend: libblkio's, in Rust, which drives a vhost-user-blk device without a virtual machine.

use std::{
    fmt,
    mem::MaybeUninit,
    time::{Duration, Instant},
};

use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::backend::Backend;
use crate::error::{HarnessError, IoContext};

const WARM_UP: Duration = Duration::from_millis(150);
const MEASURED: Duration = Duration::from_millis(600);
/// How long a backend may take to accept a frontend.
const CONNECT: Duration = Duration::from_secs(5);
const SMALL: u64 = 4096;
const LARGE: u64 = 1 << 20;

/// Where requests go, and what they do there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    RandomRead,
    RandomWrite,
    SequentialRead,
    SequentialWrite,
}

impl Pattern {
    fn bytes(self) -> u64 {
        match self {
            Self::RandomRead | Self::RandomWrite => SMALL,
            Self::SequentialRead | Self::SequentialWrite => LARGE,
        }
    }

    fn writes(self) -> bool {
        matches!(self, Self::RandomWrite | Self::SequentialWrite)
    }
}

/// One kind of load.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) pattern: Pattern,
    /// Requests in flight on each queue.
    pub(super) depth: usize,
    pub(super) queues: usize,
    /// The frontend looks at its rings all the time, and wants no interrupt.
    pub(super) polled: bool,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pattern = match self.pattern {
            Pattern::RandomRead => "4k randread",
            Pattern::RandomWrite => "4k randwrite",
            Pattern::SequentialRead => "1M read",
            Pattern::SequentialWrite => "1M write",
        };
        let how = if self.polled { "polled" } else { "interrupts" };
        let plural = if self.queues == 1 { "queue" } else { "queues" };
        write!(f, "{pattern} QD {}, {} {plural}, {how}", self.depth, self.queues)
    }
}

/// What came out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    requests: u64,
    time: Duration,
    cpu: Duration,
}

impl Measured {
    /// Requests a second.
    pub(super) fn iops(&self) -> f64 {
        self.requests as f64 / self.time.as_secs_f64()
    }

    /// CPU time of the backend for each, in microseconds.
    pub(super) fn cpu_us(&self) -> f64 {
        // A disk that others keep busy may do nothing for a whole round.
        self.cpu.as_secs_f64() * 1e6 / self.requests.max(1) as f64
    }
}

fn failed(error: &blkio::Error) -> std::io::Error {
    std::io::Error::other(error.message().to_owned())
}

/// One queue with its requests: each comes back at another place as soon as it is complete.
struct Lane {
    queue: Blkioq,
    load: Load,
    memory: usize,
    random: ChaCha8Rng,
    blocks: u64,
    next: u64,
    completions: Vec<MaybeUninit<Completion>>,
}

impl Lane {
    fn submit(&mut self, slot: usize) {
        let bytes = self.load.pattern.bytes();
        let block = match bytes {
            SMALL => self.random.random_range(0..self.blocks),
            _ => {
                self.next = (self.next + 1) % self.blocks;
                self.next
            }
        };
        let (start, length) = (block * bytes, bytes as usize);
        let buffer = (self.memory + slot * length) as *mut u8;
        if self.load.pattern.writes() {
            self.queue.write(start, buffer, length, slot, ReqFlags::empty());
        } else {
            self.queue.read(start, buffer, length, slot, ReqFlags::empty());
        }
    }

    /// Takes what is complete, at least `least`, and submits as much anew.
    fn turn(&mut self, least: usize, again: bool) -> std::io::Result<u64> {
        let done = self
            .queue
            .do_io(&mut self.completions, least, None, None)
            .map_err(|error| failed(&error))?;
        for place in 0..done {
            // SAFETY: the first `done` completions were written by the call above.
            let Completion { user_data, ret, .. } = unsafe { self.completions[place].assume_init_ref() };
            if *ret != 0 {
                return Err(std::io::Error::from_raw_os_error(-ret));
            }
            let slot = *user_data;
            if again {
                self.submit(slot);
            }
        }
        Ok(done as u64)
    }

    /// Waits until nothing is in flight.
    fn drain(&mut self) -> std::io::Result<()> {
        let mut left = self.load.depth as u64;
        while left != 0 {
            left -= self.turn(1, false)?;
        }
        Ok(())
    }

    /// Keeps its depth until `end`; gives the requests completed from `begin` on.
    fn run(&mut self, begin: Instant, end: Instant) -> std::io::Result<u64> {
        let mut counted = 0;
        loop {
            let done = self.turn(1, true)?;
            let now = Instant::now();
            if now >= end {
                return self.drain().map(|()| counted);
            }
            counted += if now >= begin { done } else { 0 };
        }
    }
}

/// Polls all lanes from one thread, as a polling frontend does.
fn poll_all(lanes: &mut [Lane], begin: Instant, end: Instant) -> std::io::Result<u64> {
    let mut counted = 0;
    loop {
        let mut done = 0;
        for lane in &mut *lanes {
            done += lane.turn(0, true)?;
        }
        let now = Instant::now();
        if now >= end {
            for lane in lanes {
                lane.drain()?;
            }
            return Ok(counted);
        }
        counted += if now >= begin { done } else { 0 };
    }
}

/// Puts one load on a backend.
pub(super) fn run(backend: &Backend, load: Load, image_bytes: u64) -> Result<Measured, HarnessError> {
    let context = || format!("drive the backend at {}", backend.socket().display());
    let (device, mut lanes) = lanes(backend, load, image_bytes)
        .map_err(|error| failed(&error))
        .context(context)?;
    for lane in &mut lanes {
        (0..load.depth).for_each(|slot| lane.submit(slot));
    }
    let begin = Instant::now() + WARM_UP;
    let end = begin + MEASURED;
    let counted: std::io::Result<(u64, Duration)> = std::thread::scope(|scope| {
        let workers: Vec<_> = if load.polled {
            vec![scope.spawn(move || poll_all(&mut lanes, begin, end))]
        } else {
            let run = |mut lane: Lane| scope.spawn(move || lane.run(begin, end));
            lanes.into_iter().map(run).collect()
        };
        std::thread::sleep(WARM_UP);
        let before = backend.cpu().map_err(std::io::Error::other)?;
        std::thread::sleep(end.saturating_duration_since(Instant::now()));
        let cpu = backend.cpu().map_err(std::io::Error::other)? - before;
        let mut counted = 0;
        for worker in workers {
            counted += worker.join().expect("a panic aborts the process")?;
        }
        Ok((counted, cpu))
    });
    drop(device);
    let (requests, cpu) = counted.context(context)?;
    Ok(Measured {
        requests,
        time: MEASURED,
        cpu,
    })
}

/// Connects. The socket of a backend is there a moment before anybody listens on it.
fn connect(backend: &Backend) -> Result<Blkio, blkio::Error> {
    let deadline = Instant::now() + CONNECT;
    loop {
        let mut device = Blkio::new("virtio-blk-vhost-user")?;
        device.set_str("path", &backend.socket().display().to_string())?;
        match device.connect() {
            Ok(()) => return Ok(device),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn lanes(backend: &Backend, load: Load, image_bytes: u64) -> Result<(Blkio, Vec<Lane>), blkio::Error> {
    let mut device = connect(backend)?;
    let property = if load.polled { "num-poll-queues" } else { "num-queues" };
    device.set_i32("num-queues", 0)?;
    device.set_i32(property, load.queues as i32)?;
    device.set_i32("queue-size", 128)?;
    let started = device.start()?;
    let queues = if load.polled {
        started.poll_queues
    } else {
        started.queues
    };
    let each = load.depth * load.pattern.bytes() as usize;
    let region = device.alloc_mem_region(each * load.queues)?;
    device.map_mem_region(&region)?;
    let blocks = image_bytes / load.pattern.bytes();
    let lane = |(number, queue): (usize, Blkioq)| Lane {
        queue,
        load,
        memory: region.addr + number * each,
        random: ChaCha8Rng::seed_from_u64(number as u64),
        blocks,
        next: number as u64 * blocks / load.queues as u64,
        completions: (0..load.depth).map(|_| MaybeUninit::uninit()).collect(),
    };
    let lanes = queues.into_iter().enumerate().map(lane).collect();
    Ok((device, lanes))
}
