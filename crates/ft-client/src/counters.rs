//! What a network device counts, in memory that it shares with `ft-log` where it has one.
//!
//! ```text
//!     0 u64 kind: 0 while nobody counts            8 u64 queues of the device
//!    64 u64 of the device, in the order of [`OfDevice`]
//!   512 u64 frames that were held for less than 2^n microseconds, and not for less than half of that; the last: for longer than all
//!  1024 + 256 * queue: u64 of the queue, in the order of [`OfQueue`], then lost frames in the order of [`Lost`]
//! ```
//! All of it only grows but for [`OfDevice::HeldBytes`], and starts at 0 with the device. Writing is relaxed loads and stores: nobody waits,
//! nothing is allocated, and each word has one writer, the thread that serves its queue. Whoever reads sees each word as it was at some
//! moment, and not all of them at the same one.
//!
//! `ft-log` makes the memory, one piece a device, and hands it to that device only. Its size, the names and the labels are fixed here, so a
//! hostile device can tell wrong numbers of itself and nothing else.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

use crate::shm::SharedMemory;

/// Queues that can be counted.
pub const QUEUES_MAX: u16 = 32;
/// Classes of hold times.
pub const HOLD_BUCKETS: usize = 32;

const KIND: u64 = u64::from_le_bytes(*b"FTNET001");
const WORD_BYTES: usize = 8;
const QUEUES: usize = 1;
const DEVICE: usize = 64 / WORD_BYTES;
const HOLD: usize = 512 / WORD_BYTES;
const QUEUE: usize = 1024 / WORD_BYTES;
const QUEUE_WORDS: usize = 256 / WORD_BYTES;
const WORDS: usize = QUEUE + QUEUE_WORDS * QUEUES_MAX as usize;
const BYTES: usize = WORDS * WORD_BYTES;

/// What is counted of each queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum OfQueue {
    /// Received: put into buffers of the guest. Transmitted: taken from it and found good.
    Frames,
    /// Of these frames, without the virtio header.
    Bytes,
    /// Notifications of the driver that were heard; several at once may be one.
    Kicks,
    /// Used buffers for which the driver wanted an interrupt: one for all that were used since the last one.
    InterruptsRaised,
    /// Used buffers for which it wanted none.
    InterruptsSuppressed,
    /// Updates of the used ring's index.
    UsedBatches,
    /// Buffers that went back to the driver.
    UsedBuffers,
}

impl OfQueue {
    /// All, with the names they are told by.
    pub const ALL: [(Self, &'static str, &'static str); 7] = [
        (
            Self::Frames,
            "frames",
            "Frames that the guest was given or that it sent",
        ),
        (Self::Bytes, "bytes", "Bytes of these frames"),
        (Self::Kicks, "kicks", "Notifications of the driver"),
        (
            Self::InterruptsRaised,
            "interrupts_raised",
            "Times that the driver wanted an interrupt for used buffers",
        ),
        (
            Self::InterruptsSuppressed,
            "interrupts_suppressed",
            "Times that the driver wanted no interrupt for used buffers",
        ),
        (Self::UsedBatches, "used_batches", "Updates of the used ring's index"),
        (
            Self::UsedBuffers,
            "used_buffers",
            "Buffers that went back to the driver",
        ),
    ];
}

/// Why a frame did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Lost {
    /// Received before the driver had set up the queue.
    NoDriver,
    /// Received while the guest had no buffers, and too many waited already.
    NoBuffers,
    /// Received, and longer than the guest's buffers.
    TooLarge,
    /// Received without a whole Ethernet header.
    Runt,
    /// Waited for buffers when the queue stopped.
    Stopped,
    /// Was in the interface's queue before the device's queue ran.
    Stale,
    /// Received, and still to be cut in a way that the driver does not take.
    Offload,
    /// Transmitted without a whole Ethernet header.
    TooShort,
    /// Transmitted, and longer than any frame.
    TooLong,
    /// Transmitted with a request for an offload that was not negotiated.
    NotNegotiated,
    /// Transmitted with a checksum outside the frame.
    Checksum,
    /// Transmitted, to be cut in a way that does not exist.
    Kind,
    /// Transmitted, to be cut into pieces of an impossible size.
    Size,
    /// Transmitted, to be cut as what it is not.
    Protocol,
    /// Good, and not taken by the host's interface.
    Interface,
}

impl Lost {
    /// On a queue that receives.
    pub const RECEIVED: [(Self, &'static str); 7] = [
        (Self::NoDriver, "no_driver"),
        (Self::NoBuffers, "no_buffers"),
        (Self::TooLarge, "too_large"),
        (Self::Runt, "runt"),
        (Self::Stopped, "stopped"),
        (Self::Stale, "stale"),
        (Self::Offload, "offload"),
    ];
    /// On a queue that transmits.
    pub const TRANSMITTED: [(Self, &'static str); 8] = [
        (Self::TooShort, "too_short"),
        (Self::TooLong, "too_long"),
        (Self::NotNegotiated, "not_negotiated"),
        (Self::Checksum, "checksum"),
        (Self::Kind, "gso_kind"),
        (Self::Size, "gso_size"),
        (Self::Protocol, "gso_protocol"),
        (Self::Interface, "interface"),
    ];

    /// The reasons of a queue.
    #[must_use]
    pub fn of(queue: u16) -> &'static [(Self, &'static str)] {
        match queue.is_multiple_of(2) {
            true => &Self::RECEIVED,
            false => &Self::TRANSMITTED,
        }
    }
}

/// What is counted of the device as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum OfDevice {
    /// Frames that waited for their commit, those that still do included.
    Held,
    /// Frames whose commit came.
    Released,
    /// Frames that were held when this side ended: nobody sends them.
    Discarded,
    /// Frames that the guest of a backup sent, and that are kept for a go-live.
    Kept,
    /// Kept frames that were sent at a go-live.
    SentAgain,
    /// Frames that a backup's interface heard.
    Overheard,
    /// Frames of the device itself: ARP and RARP.
    Announced,
    /// Copies of frames that were made for a capture.
    Captured,
    /// Copies that found no room.
    CaptureLost,
    /// Microseconds that released frames were held.
    HeldMicroseconds,
    /// Bytes that are held now.
    HeldBytes,
    /// Most bytes that were ever held.
    HeldBytesMax,
}

impl OfDevice {
    /// What only grows, one by one, with the names it is told by.
    pub const COUNTS: [(Self, &'static str, &'static str); 9] = [
        (Self::Held, "held", "Frames that waited for their commit"),
        (Self::Released, "released", "Held frames whose commit came"),
        (
            Self::Discarded,
            "discarded",
            "Frames that were held when this side ended, and are not sent",
        ),
        (Self::Kept, "kept", "Frames of a backup's guest, kept for a go-live"),
        (Self::SentAgain, "sent_again", "Kept frames that were sent at a go-live"),
        (Self::Overheard, "overheard", "Frames that a backup's interface heard"),
        (Self::Announced, "announced", "ARP and RARP frames of the device itself"),
        (Self::Captured, "captured", "Copies of frames for the capture"),
        (
            Self::CaptureLost,
            "capture_lost",
            "Frames that the capture had no room for, and lacks",
        ),
    ];
    /// Amounts, with the names they are told by.
    pub const AMOUNTS: [(Self, &'static str, &'static str); 2] = [
        (Self::HeldBytes, "held_bytes", "Bytes that wait for their commit"),
        (Self::HeldBytesMax, "held_bytes_max", "Most bytes that ever waited"),
    ];
}

const _: () = assert!(QUEUES < DEVICE && DEVICE + (OfDevice::HeldBytesMax as usize) < HOLD);
const _: () = assert!(HOLD + HOLD_BUCKETS <= QUEUE);
const _: () = assert!(OfQueue::ALL.len() + (Lost::Interface as usize) < QUEUE_WORDS);

/// The counters of one device; clones are the same counters.
#[derive(Clone, Debug)]
pub struct Counters(Arc<Words>);

#[derive(Debug)]
enum Words {
    Own(Box<[AtomicU64]>),
    Shared(SharedMemory),
}

impl Counters {
    /// Of a device that shares them with nobody else; queues beyond [`QUEUES_MAX`] are not counted.
    #[must_use]
    pub fn own(queues: u16) -> Self {
        let words = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        let counters = Self(Arc::new(Words::Own(words)));
        counters.begin(queues);
        counters
    }

    /// Shared ones that nobody counts in yet.
    ///
    /// # Errors
    /// As [`SharedMemory::create`].
    pub fn create() -> io::Result<Self> {
        let memory = SharedMemory::create("ft-counters", BYTES)?;
        Ok(Self(Arc::new(Words::Shared(memory))))
    }

    /// Those that `ft-log` handed over.
    ///
    /// # Errors
    /// A descriptor that is not of this release.
    pub fn open(fd: OwnedFd) -> io::Result<Self> {
        let memory = SharedMemory::open(fd, BYTES)?;
        Ok(Self(Arc::new(Words::Shared(memory))))
    }

    /// The descriptor, to hand to the device; none of [`Counters::own`].
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &*self.0 {
            Words::Own(_) => None,
            Words::Shared(memory) => Some(memory.fd()),
        }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        match &*self.0 {
            Words::Own(words) => &words[at],
            Words::Shared(memory) => memory.long(at * WORD_BYTES),
        }
    }

    fn queue_word(&self, queue: u16, at: usize) -> Option<&AtomicU64> {
        (queue < QUEUES_MAX).then(|| self.word(QUEUE + QUEUE_WORDS * usize::from(queue) + at))
    }

    // ---- the device's side -------------------------------------------------------------------------------------------

    /// From here on a device with so many queues counts.
    pub fn begin(&self, queues: u16) {
        self.word(QUEUES).store(queues.min(QUEUES_MAX).into(), Relaxed);
        self.word(0).store(KIND, Release);
    }

    /// Counts for a queue, in the thread that serves it.
    pub fn add(&self, queue: u16, what: OfQueue, count: u64) {
        if let Some(word) = self.queue_word(queue, what as usize) {
            grow(word, count);
        }
    }

    /// Counts lost frames, in any thread.
    pub fn lose(&self, queue: u16, why: Lost, frames: u64) {
        if let Some(word) = self.queue_word(queue, OfQueue::ALL.len() + why as usize) {
            word.fetch_add(frames, Relaxed);
        }
    }

    /// Counts for the device, in any thread.
    pub fn count(&self, what: OfDevice, count: u64) {
        self.word(DEVICE + what as usize).fetch_add(count, Relaxed);
    }

    /// So many bytes are held now. One thread says so.
    pub fn set_held_bytes(&self, bytes: u64) {
        self.word(DEVICE + OfDevice::HeldBytes as usize).store(bytes, Relaxed);
        let most = self.word(DEVICE + OfDevice::HeldBytesMax as usize);
        if bytes > most.load(Relaxed) {
            most.store(bytes, Relaxed);
        }
    }

    /// A frame was held for so long. One thread says so.
    pub fn released_after(&self, microseconds: u64) {
        grow(self.word(HOLD + hold_bucket(microseconds)), 1);
        let all = self.word(DEVICE + OfDevice::HeldMicroseconds as usize);
        grow(all, microseconds);
    }

    // ---- whoever reads -----------------------------------------------------------------------------------------------

    /// Queues of the device that counts here; `None` while nobody does.
    #[must_use]
    pub fn queues(&self) -> Option<u16> {
        let counts = self.word(0).load(Acquire) == KIND;
        let queues = self.word(QUEUES).load(Relaxed).min(QUEUES_MAX.into());
        counts.then_some(queues as u16)
    }

    /// A count of a queue.
    #[must_use]
    pub fn of_queue(&self, queue: u16, what: OfQueue) -> u64 {
        self.queue_word(queue, what as usize)
            .map_or(0, |word| word.load(Relaxed))
    }

    /// Frames of a queue that were lost.
    #[must_use]
    pub fn lost(&self, queue: u16, why: Lost) -> u64 {
        self.queue_word(queue, OfQueue::ALL.len() + why as usize)
            .map_or(0, |word| word.load(Relaxed))
    }

    /// A count of the device.
    #[must_use]
    pub fn of_device(&self, what: OfDevice) -> u64 {
        self.word(DEVICE + what as usize).load(Relaxed)
    }

    /// How long released frames were held: the first duration in microseconds beyond each class, and the frames in it. The last one ends
    /// with [`u64::MAX`].
    #[must_use]
    pub fn hold_times(&self) -> [(u64, u64); HOLD_BUCKETS] {
        std::array::from_fn(|bucket| {
            let upper = if bucket == HOLD_BUCKETS - 1 {
                u64::MAX
            } else {
                1 << bucket
            };
            (upper, self.word(HOLD + bucket).load(Relaxed))
        })
    }
}

/// For a word that one thread writes.
fn grow(word: &AtomicU64, count: u64) {
    word.store(word.load(Relaxed).wrapping_add(count), Relaxed);
}

fn hold_bucket(microseconds: u64) -> usize {
    let bits = u64::BITS - microseconds.leading_zeros();
    (bits as usize).min(HOLD_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_count_has_a_word_of_its_own_and_reads_back_through_the_descriptor() {
        let page = Counters::create().unwrap();
        assert_eq!(page.queues(), None);
        let device = Counters::open(page.fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        device.begin(2);
        let mut next = 1;
        let mut number = || {
            next += 1;
            next
        };
        let mut expected = Vec::new();
        for queue in [0, 1, QUEUES_MAX - 1] {
            for (what, ..) in OfQueue::ALL {
                expected.push(number());
                device.add(queue, what, *expected.last().unwrap());
            }
            for (why, _) in Lost::RECEIVED.iter().chain(&Lost::TRANSMITTED) {
                expected.push(number());
                device.lose(queue, *why, *expected.last().unwrap());
            }
        }
        for (what, ..) in OfDevice::COUNTS {
            expected.push(number());
            device.count(what, *expected.last().unwrap());
        }
        device.set_held_bytes(900);
        device.set_held_bytes(100);
        device.released_after(5);
        assert_eq!(page.queues(), Some(2));
        let mut found = Vec::new();
        for queue in [0, 1, QUEUES_MAX - 1] {
            found.extend(OfQueue::ALL.map(|(what, ..)| page.of_queue(queue, what)));
            let lost = Lost::RECEIVED.iter().chain(&Lost::TRANSMITTED);
            found.extend(lost.map(|(why, _)| page.lost(queue, *why)));
        }
        found.extend(OfDevice::COUNTS.map(|(what, ..)| page.of_device(what)));
        assert_eq!(found, expected);
        let amounts = OfDevice::AMOUNTS.map(|(what, ..)| page.of_device(what));
        assert_eq!(amounts, [100, 900]);
        assert_eq!(page.of_device(OfDevice::HeldMicroseconds), 5);
        // A queue there cannot be is nobody's.
        device.add(QUEUES_MAX, OfQueue::Frames, 1);
        assert_eq!(page.of_queue(QUEUES_MAX, OfQueue::Frames), 0);
    }

    #[test]
    fn a_hold_time_is_in_the_class_that_it_is_less_than() {
        let counters = Counters::own(2);
        let times = [0, 1, 2, 3, 4, 1023, 1024, u64::MAX >> 1];
        times.iter().for_each(|time| counters.released_after(*time));
        let found: Vec<_> = counters
            .hold_times()
            .into_iter()
            .filter(|(_, count)| *count != 0)
            .collect();
        assert_eq!(
            found,
            [(1, 1), (2, 1), (4, 2), (8, 1), (1024, 1), (2048, 1), (u64::MAX, 1)]
        );
    }

    #[test]
    fn what_a_hostile_device_says_of_its_queues_is_bounded() {
        let page = Counters::create().unwrap();
        page.begin(3);
        page.word(QUEUES).store(u64::MAX, Relaxed);
        assert_eq!(page.queues(), Some(QUEUES_MAX));
        page.word(0).store(7, Relaxed);
        assert_eq!(page.queues(), None);
    }
}
