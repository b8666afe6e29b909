//! The half of a device that touches guest memory: pure of any I/O, clock or thread.
//!
//! ```text
//!  guest ──kick──►  GuestSide::kick     drains the available ring; what the daemon must perform is copied to bounce buffers
//!  log ──payload──► GuestSide::deliver  bounce buffer to guest memory, used ring, interrupt?
//! ```
//! Guest memory changes in these two calls and nowhere else, so with the same calls at the same positions two guests stay
//! equal. The daemons drive it through the gate; an offline replay links it and calls it directly:
//!
//! ```
//! use ft_vhost::guest_side::{GuestSide, blk::{BlkGuestSide, Geometry}, net::NetGuestSide};
//!
//! let mut blk = BlkGuestSide::new(Geometry::plain(2048 /* sectors */, false /* read-only */));
//! let mut net = NetGuestSide::new([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
//! for device in [&mut blk as &mut dyn GuestSide, &mut net] {
//!     let (_offered, _config_space) = (device.features(), device.config());
//!     // device.set_memory(memory); then, once the driver has set up queue 0:
//!     // device.configure_queue(0, &setup)?; device.kick(0)?; device.deliver(1, 0, payload)?; device.stop_queue(0);
//! }
//! ```
//! An offline replay that performs nothing drops what the guest asked for with [`GuestSide::discard_outputs`] after each kick.

use self::{dirty::GuestMemoryMmap, inflight::InflightRegion};
use thiserror::Error;

pub mod blk;
pub mod dirty;
pub mod inflight;
pub mod net;
pub mod ring;

/// Data reaches guest memory only when it is delivered; before that it waits in a bounce buffer (paper §3.2).
pub const BOUNCE: bool = !cfg!(feature = "control-direct-delivery");

/// Largest queue a driver may configure.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// A split ring as its driver configured it. Addresses are guest-physical.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// Entries: a power of two, at most [`QUEUE_SIZE_MAX`].
    pub size: u16,
    /// Descriptor table.
    pub descriptor_table: u64,
    /// Available ring.
    pub available_ring: u64,
    /// Used ring.
    pub used_ring: u64,
    /// Index of the next available entry to take: 0 for a fresh queue.
    pub next_available: u16,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
}

/// What a kick or a delivery did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The guest is to be interrupted for the used ring.
    pub interrupt: bool,
    /// Digest of what was drained or delivered.
    pub digest: u64,
    /// The guest went on adding during the drain: kick again. Never so while its vCPUs are stopped.
    pub more: bool,
    /// Something was taken from the ring. Not part of the digest: it is how busy the device is, not what the guest sees.
    pub found: bool,
}

impl Outcome {
    /// Both, in this order, as one. The first of a row folds into the default.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        Self {
            interrupt: self.interrupt | next.interrupt,
            digest: fold(self.digest, next.digest),
            more: self.more | next.more,
            found: self.found | next.found,
        }
    }
}

/// Folds `next` into a rolling digest.
#[must_use]
pub fn fold(digest: u64, next: u64) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&digest.to_le_bytes());
    bytes[8..].copy_from_slice(&next.to_le_bytes());
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

/// The guest's driver, or a payload, broke the rules. The queue cannot go on.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RingError {
    /// The device has no such queue.
    #[error("queue {0} does not exist")]
    NoQueue(u16),
    /// The queue was kicked, or a completion came, before the driver configured it.
    #[error("queue {0} is not configured")]
    NotConfigured(u16),
    /// A queue was configured before there was memory.
    #[error("no guest memory is known yet")]
    NoMemory,
    /// Size or alignment the specification forbids.
    #[error("queue {queue}: {what} {value:#x} is impossible")]
    Setup {
        /// Queue.
        queue: u16,
        /// What is wrong.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// An address range that is not guest memory.
    #[error("{what} at {address:#x}+{length:#x} is outside guest memory")]
    OutsideMemory {
        /// What was there.
        what: &'static str,
        /// First byte.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// The available index is further ahead than the queue is long.
    #[error("the available index runs ahead of the queue: {0} is the next entry")]
    AvailableIndex(u16),
    /// A descriptor index beyond its table.
    #[error("descriptor {index} is beyond its table of {size}")]
    Descriptor {
        /// Index.
        index: u16,
        /// Entries of the table.
        size: u32,
    },
    /// The chain returns to itself.
    #[error("the descriptor chain at {head} is a loop")]
    Loop {
        /// Head of the chain.
        head: u16,
    },
    /// An indirect table that is malformed, nested, or combined with NEXT.
    #[error("the indirect table of chain {head} is malformed")]
    Indirect {
        /// Head of the chain.
        head: u16,
    },
    /// A writable descriptor before a readable one.
    #[error("chain {head} has a readable descriptor behind a writable one")]
    Order {
        /// Head of the chain.
        head: u16,
    },
    /// A chain that is too short for the device to say even that it is wrong.
    #[error("chain {head} has no room for {what}")]
    TooShort {
        /// Head of the chain.
        head: u16,
        /// What does not fit.
        what: &'static str,
    },
    /// The driver made a chain available that the device still has.
    #[error("chain {head} is still in use")]
    Busy {
        /// Head of the chain.
        head: u16,
    },
    /// The in-flight region of the queue cannot be this queue's; the log says why.
    #[error("the in-flight region does not fit queue {0}")]
    Inflight(u16),
    /// A completion for a request that was never made, or was completed before.
    #[error("no request {0} is outstanding")]
    UnknownRequest(u64),
    /// A payload that is not of this device, or damaged.
    #[error("the payload is malformed at byte {0}")]
    Payload(usize),
}

/// The guest-facing half of one device.
pub trait GuestSide: Send {
    /// Queues of the device.
    fn queue_count(&self) -> u16;

    /// Virtio feature bits that are offered to the driver (without vhost-user's own bit 30).
    fn features(&self) -> u64;

    /// The configuration space.
    fn config(&self) -> Vec<u8>;

    /// Guest memory, for all queues from here on.
    fn set_memory(&mut self, memory: GuestMemoryMmap);

    /// Tracks the chains the device holds in memory that outlives the daemon, from the next start of a queue on; or no more.
    fn set_inflight(&mut self, _region: Option<InflightRegion>) {}

    /// Whether [`GuestSide::set_inflight`] does anything.
    fn tracks_inflight(&self) -> bool {
        false
    }

    /// Starts a queue.
    ///
    /// # Errors
    /// An impossible setup, or no memory yet.
    fn configure_queue(&mut self, index: u16, setup: &QueueSetup) -> Result<(), RingError>;

    /// Stops a queue and gives the index of its next available entry. Outstanding requests of the queue are forgotten; a
    /// completion that comes for one of them is ignored.
    fn stop_queue(&mut self, index: u16) -> u16;

    /// Stops all queues.
    fn reset(&mut self) {
        for index in 0..self.queue_count() {
            self.stop_queue(index);
        }
    }

    /// Whether the queue was configured and not stopped since.
    fn is_configured(&self, index: u16) -> bool;

    /// The guest notified `queue`: drains its available ring. A queue that is not configured yet has nothing to drain.
    ///
    /// # Errors
    /// [`RingError`]; then the queue must not be kicked again before it is configured anew.
    fn kick(&mut self, queue: u16) -> Result<Outcome, RingError>;

    /// Takes what is available in `queue`, without asking to be told of more; `true` if there was something. For a device that looks
    /// again soon, and otherwise calls [`GuestSide::kick`].
    ///
    /// # Errors
    /// [`RingError`], as for `kick`.
    fn poll(&mut self, _queue: u16) -> Result<bool, RingError> {
        Ok(false)
    }

    /// An input reaches guest memory. `sequence` is its number among the inputs of the device.
    ///
    /// # Errors
    /// [`RingError`], as for `kick`.
    fn deliver(&mut self, sequence: u64, queue: u16, payload: &[u8]) -> Result<Outcome, RingError>;

    /// Drops what the guest asked for and nobody will perform.
    fn discard_outputs(&mut self);
}
