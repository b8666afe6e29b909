//! `--pcap`: what the device received, held, released and discarded, in a file that Wireshark and tcpdump read.
//!
//! ```text
//!  device threads ── [Capture::note]: a copy into a ring of 8 MiB each, or one more `capture_lost` ──► a thread ──► [file]
//! ```
//! The device waits for nothing here: a copy that finds no room is not made, and the frame goes its way. The capture ends by itself at its
//! limit or with an error of the disk, which an event and a line of the log tell; the device goes on.

mod file;

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    time::Duration,
};

use ft_client::{
    counters::{Counters, OfDevice},
    events::{Events, wall_ns},
    ring::{self, Consumer, Producer},
};
use serde_json::json;
use tracing::{info, warn};
use vmm_sys_util::eventfd::EventFd;

pub use self::file::FileError;
use self::file::{CaptureFile, Over};

/// Records taken of one ring before the next one is looked at.
const TURN: usize = 64;
/// How long the end of the daemon waits for a disk that takes the last frames.
const LAST_PATIENCE: Duration = Duration::from_secs(5);
/// Before a frame in a ring: its length with this, as the ring wants it, the kind, when it was.
const RECORD_BYTES: usize = 24;
const KIND_AT: usize = 4;
const TIME_AT: std::ops::Range<usize> = 8..16;

/// What happened to a frame: an interface of the file each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Taken from the interface for the guest.
    Received,
    /// The guest sent it, and it waits for its commit.
    Held,
    /// Its commit came, and the interface took it.
    Released,
    /// It was held when this side ended, and is not sent.
    Discarded,
    /// The interface took it without any hold: of a device alone, at a go-live, of the device itself.
    Sent,
}

impl Kind {
    /// All, in the order of the file's interfaces, with their names.
    pub const ALL: [(Self, &'static str); 5] = [
        (Self::Received, "received"),
        (Self::Held, "held"),
        (Self::Released, "released"),
        (Self::Discarded, "discarded"),
        (Self::Sent, "sent"),
    ];
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    /// Rung for a record that nobody looks for, a new ring, and the end.
    bell: EventFd,
    /// Nothing is written any more.
    over: AtomicBool,
    /// The daemon ends.
    stop: AtomicBool,
}

impl Shared {
    fn ring(&self) {
        // A bell that cannot be rung is rung.
        let _ = self.bell.write(1);
    }
}

/// The way of one thread of the device into the file.
#[derive(Debug)]
pub struct Capture {
    ring: Producer,
    shared: Arc<Shared>,
}

impl Capture {
    /// Notes a frame, if there is room.
    pub fn note(&mut self, kind: Kind, frame: &[u8], counters: &Counters) {
        if self.shared.over.load(Ordering::Relaxed) {
            return;
        }
        let length = RECORD_BYTES + frame.len();
        if !self.ring.fits(length) {
            counters.count(OfDevice::CaptureLost, 1);
            return;
        }
        self.ring.push(length, |out| {
            let (head, body) = out.split_at_mut(RECORD_BYTES);
            head.fill(0);
            head[..4].copy_from_slice(&(length as u32).to_le_bytes());
            head[KIND_AT] = kind as u8;
            head[TIME_AT].copy_from_slice(&wall_ns().to_le_bytes());
            body.copy_from_slice(frame);
        });
        counters.count(OfDevice::Captured, 1);
        if self.ring.must_ring() {
            self.shared.ring();
        }
    }
}

/// Where the threads of the device get their way into the file.
#[derive(Clone, Debug)]
pub struct Recorder {
    rings: Sender<Consumer>,
    shared: Arc<Shared>,
}

/// The thread that writes.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    ended: Receiver<()>,
}

/// Begins a capture of at most `bytes_max` in a new file; one that is there is kept as `FILE.old`. `interface` names what is captured.
///
/// # Errors
/// [`FileError`].
pub fn start(path: PathBuf, bytes_max: u64, interface: &str, events: Events) -> Result<(Recorder, Writer), FileError> {
    let failed = |source| FileError {
        path: path.clone(),
        source,
    };
    let file = CaptureFile::create(&path, bytes_max, interface).map_err(failed)?;
    let shared = Arc::new(Shared {
        bell: EventFd::new(0).map_err(failed)?,
        over: AtomicBool::new(false),
        stop: AtomicBool::new(false),
    });
    let (rings, new_rings) = channel();
    let (end, ended) = channel();
    let thread_shared = Arc::clone(&shared);
    std::thread::Builder::new()
        .name("capture".into())
        .spawn(move || {
            record(file, &new_rings, &thread_shared, events);
            // Nobody may wait.
            let _ = end.send(());
        })
        .map_err(failed)?;
    let recorder = Recorder {
        rings,
        shared: Arc::clone(&shared),
    };
    Ok((recorder, Writer { shared, ended }))
}

impl Recorder {
    /// A way into the file, for one thread.
    ///
    /// # Errors
    /// Without memory or descriptors for it.
    pub fn capture(&self) -> io::Result<Capture> {
        let memory = ring::create("ft-capture")?;
        let consumer = Consumer::new(memory.fd().try_clone_to_owned()?)?;
        // A capture that is over takes no more.
        let _ = self.rings.send(consumer);
        self.shared.ring();
        Ok(Capture {
            ring: Producer::on(memory),
            shared: Arc::clone(&self.shared),
        })
    }
}

impl Writer {
    /// The device has ended: what it noted is written, unless the disk takes too long.
    pub fn finish(self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.ring();
        if self.ended.recv_timeout(LAST_PATIENCE).is_err() {
            warn!("the disk does not take the last frames of the capture in time");
        }
    }
}

fn record(mut file: CaptureFile, new_rings: &Receiver<Consumer>, shared: &Shared, mut events: Events) {
    let over = record_until_over(&mut file, new_rings, shared);
    shared.over.store(true, Ordering::Relaxed);
    let (frames, bytes) = file.close();
    match &over {
        Over::Asked => info!(frames, bytes, "{over}"),
        _ => warn!(frames, bytes, "{over}; the device goes on"),
    }
    events.emit(
        "capture_ended",
        json!({ "reason": over.to_string(), "frames": frames, "bytes": bytes }),
    );
}

fn record_until_over(file: &mut CaptureFile, new_rings: &Receiver<Consumer>, shared: &Shared) -> Over {
    let mut rings: Vec<Consumer> = Vec::new();
    let mut scratch = Vec::new();
    loop {
        // Before the look: what was noted before it was asked to stop is seen.
        let stops = shared.stop.load(Ordering::Acquire);
        rings.extend(new_rings.try_iter());
        match take_turn(file, &mut rings, &mut scratch) {
            Ok(true) => continue,
            Ok(false) => {}
            Err(over) => return over,
        }
        if let Err(error) = file.flush() {
            return Over::Disk(error);
        }
        if stops {
            return Over::Asked;
        }
        rings.iter().for_each(|ring| ring.set_sleeping(true));
        // Who noted before that rang nobody.
        if rings.iter_mut().all(|ring| ring.is_empty() == Ok(true)) {
            let _ = shared.bell.read();
        }
        rings.iter().for_each(|ring| ring.set_sleeping(false));
    }
}

/// Writes some of what is there; whether there was anything.
fn take_turn(file: &mut CaptureFile, rings: &mut [Consumer], scratch: &mut Vec<u8>) -> Result<bool, Over> {
    let mut some = false;
    for ring in rings {
        for _ in 0..TURN {
            scratch.clear();
            if ring.take(scratch).map_err(|_| Over::Broken)?.is_none() {
                break;
            }
            some = true;
            let (head, frame) = scratch.split_at_checked(RECORD_BYTES).ok_or(Over::Broken)?;
            let time = head[TIME_AT].try_into().map_err(|_| Over::Broken)?;
            file.put(head[KIND_AT], u64::from_le_bytes(time), frame)?;
        }
        ring.release();
    }
    Ok(some)
}

#[cfg(test)]
mod tests;
