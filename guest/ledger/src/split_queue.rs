//! The driver's side of a split virtqueue (VIRTIO 1.2 §2.7), over memory made of atomics: no `unsafe`, testable on the host.
//!
//! ```text
//! add ──► descriptors, available ring ──► (one doorbell a round) ──► device ──► used ring ──► pop
//! ```
//!
//! Written for few exits: any number of chains share one doorbell, and with EVENT_IDX the driver names the completion
//! that should interrupt it, so a batch of requests costs one interrupt.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, fence};

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

#[repr(C, align(16))]
struct Descriptor {
    address: AtomicU64,
    length: AtomicU32,
    flags: AtomicU16,
    next: AtomicU16,
}

#[repr(C)]
struct Available<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [AtomicU16; N],
    used_event: AtomicU16,
}

#[repr(C)]
struct UsedElement {
    head: AtomicU32,
    length: AtomicU32,
}

#[repr(C, align(4))]
struct UsedRing<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [UsedElement; N],
    available_event: AtomicU16,
}

/// The memory that driver and device share.
#[repr(C)]
pub struct QueueMemory<const N: usize> {
    descriptors: [Descriptor; N],
    available: Available<N>,
    used: UsedRing<N>,
}

/// Physical addresses of the three parts, as the device wants them.
#[derive(Clone, Copy, Debug)]
pub struct QueueAddresses {
    /// Descriptor area.
    pub descriptors: u64,
    /// Driver area.
    pub available: u64,
    /// Device area.
    pub used: u64,
}

impl<const N: usize> QueueMemory<N> {
    /// Zeroed memory.
    pub const fn new() -> Self {
        QueueMemory {
            descriptors: [const {
                Descriptor {
                    address: AtomicU64::new(0),
                    length: AtomicU32::new(0),
                    flags: AtomicU16::new(0),
                    next: AtomicU16::new(0),
                }
            }; N],
            available: Available {
                flags: AtomicU16::new(0),
                index: AtomicU16::new(0),
                ring: [const { AtomicU16::new(0) }; N],
                used_event: AtomicU16::new(0),
            },
            used: UsedRing {
                flags: AtomicU16::new(0),
                index: AtomicU16::new(0),
                ring: [const {
                    UsedElement {
                        head: AtomicU32::new(0),
                        length: AtomicU32::new(0),
                    }
                }; N],
                available_event: AtomicU16::new(0),
            },
        }
    }

    /// Where the parts lie; the guest maps memory one to one.
    pub fn addresses(&self) -> QueueAddresses {
        QueueAddresses {
            descriptors: (&raw const self.descriptors).expose_provenance() as u64,
            available: (&raw const self.available).expose_provenance() as u64,
            used: (&raw const self.used).expose_provenance() as u64,
        }
    }
}

impl<const N: usize> Default for QueueMemory<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// The device writes it; else it reads it.
    pub device_writes: bool,
}

/// A chain that the device has finished with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head that `add` returned.
    pub head: u16,
    /// Bytes the device wrote.
    pub length: u32,
}

/// The driver's state of one queue.
pub struct SplitQueue<'m, const N: usize> {
    memory: &'m QueueMemory<N>,
    event_index: bool,
    /// Our own links between descriptors; what lies in shared memory is never read back.
    next: [u16; N],
    chain_length: [u16; N],
    free_head: u16,
    free: usize,
    available_index: u16,
    /// `available_index` when the device last heard of it.
    announced_index: u16,
    used_index: u16,
}

impl<'m, const N: usize> SplitQueue<'m, N> {
    const SIZE_OK: () = assert!(N.is_power_of_two() && N <= 32768);

    /// A queue over fresh memory.
    pub fn new(memory: &'m QueueMemory<N>, event_index: bool) -> Self {
        let () = Self::SIZE_OK;
        SplitQueue {
            memory,
            event_index,
            next: core::array::from_fn(|index| ((index + 1) % N) as u16),
            chain_length: [0; N],
            free_head: 0,
            free: N,
            available_index: 0,
            announced_index: 0,
            used_index: 0,
        }
    }

    /// Descriptors that `add` can take.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Offers a chain to the device; returns its head, or nothing if there is no room. Tell the device with
    /// `wants_doorbell`, once for many.
    pub fn add(&mut self, chain: &[Segment]) -> Option<u16> {
        if chain.is_empty() || chain.len() > self.free {
            return None;
        }
        let head = self.free_head;
        let mut index = head;
        for (position, segment) in chain.iter().enumerate() {
            let last = position + 1 == chain.len();
            let next = self.next[usize::from(index)];
            let mut flags = 0;
            if segment.device_writes {
                flags |= FLAG_WRITE;
            }
            if !last {
                flags |= FLAG_NEXT;
            }
            let descriptor = &self.memory.descriptors[usize::from(index)];
            descriptor.address.store(segment.address, Relaxed);
            descriptor.length.store(segment.length, Relaxed);
            descriptor.flags.store(flags, Relaxed);
            descriptor.next.store(if last { 0 } else { next }, Relaxed);
            index = next;
        }
        self.free_head = index;
        self.free -= chain.len();
        self.chain_length[usize::from(head)] = chain.len() as u16;

        let slot = usize::from(self.available_index) % N;
        self.memory.available.ring[slot].store(head, Relaxed);
        self.available_index = self.available_index.wrapping_add(1);
        self.memory.available.index.store(self.available_index, Release);
        Some(head)
    }

    /// Whether the device wants to hear of what was added since the last call.
    pub fn wants_doorbell(&mut self) -> bool {
        let (old, new) = (self.announced_index, self.available_index);
        if old == new {
            return false;
        }
        self.announced_index = new;
        // The device must see the index before we see its wish.
        fence(SeqCst);
        if self.event_index {
            passes(self.memory.used.available_event.load(Acquire), new, old)
        } else {
            self.memory.used.flags.load(Acquire) & NO_NOTIFY == 0
        }
    }

    /// The next chain that the device has finished with.
    ///
    /// # Panics
    /// If the device names a chain that it does not have.
    pub fn pop(&mut self) -> Option<Used> {
        if self.completed() == 0 {
            return None;
        }
        let element = &self.memory.used.ring[usize::from(self.used_index) % N];
        let (head, length) = (element.head.load(Relaxed), element.length.load(Relaxed));
        let index = head as usize;
        assert!(
            index < N && self.chain_length[index] > 0,
            "the device returned chain {head}, which it does not have"
        );
        let head = head as u16;

        let count = core::mem::take(&mut self.chain_length[index]);
        let mut tail = head;
        for _ in 1..count {
            tail = self.next[usize::from(tail)];
        }
        self.next[usize::from(tail)] = self.free_head;
        self.free_head = head;
        self.free += usize::from(count);
        self.used_index = self.used_index.wrapping_add(1);
        Some(Used { head, length })
    }

    /// Asks for an interrupt once `count` more chains are finished. True if they already are: then do not wait.
    pub fn interrupt_after(&mut self, count: u16) -> bool {
        self.memory.available.flags.store(0, Relaxed);
        self.memory
            .available
            .used_event
            .store(self.used_index.wrapping_add(count).wrapping_sub(1), Release);
        // The device must see the wish before we look whether it came too late.
        fence(SeqCst);
        self.completed() >= count
    }

    /// Asks for no interrupts.
    pub fn interrupt_never(&mut self) {
        self.memory.available.flags.store(NO_INTERRUPT, Relaxed);
        self.memory
            .available
            .used_event
            .store(self.used_index.wrapping_sub(1), Release);
    }

    fn completed(&self) -> u16 {
        self.memory.used.index.load(Acquire).wrapping_sub(self.used_index)
    }
}

/// Whether an index that went from `old` to `new` has passed `event` (VIRTIO 1.2 §2.7.10). All three wrap.
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The other side: takes chains in order, finishes them when told.
    struct Device<'m, const N: usize> {
        memory: &'m QueueMemory<N>,
        available: u16,
        used: u16,
    }

    impl<'m, const N: usize> Device<'m, N> {
        fn take(&mut self) -> Option<u16> {
            if self.memory.available.index.load(Acquire) == self.available {
                return None;
            }
            let head = self.memory.available.ring[usize::from(self.available) % N].load(Relaxed);
            self.available = self.available.wrapping_add(1);
            self.memory.used.available_event.store(self.available, Release);
            Some(head)
        }

        fn finish(&mut self, head: u16, length: u32) -> bool {
            let element = &self.memory.used.ring[usize::from(self.used) % N];
            element.head.store(head.into(), Relaxed);
            element.length.store(length, Relaxed);
            let old = self.used;
            self.used = self.used.wrapping_add(1);
            self.memory.used.index.store(self.used, Release);
            passes(self.memory.available.used_event.load(Acquire), self.used, old)
        }
    }

    fn segments(count: usize) -> Vec<Segment> {
        (0..count)
            .map(|i| Segment {
                address: i as u64,
                length: 1,
                device_writes: i > 0,
            })
            .collect()
    }

    #[test]
    fn the_layout_is_that_of_the_specification() {
        let memory = QueueMemory::<64>::new();
        let at = memory.addresses();
        assert_eq!(at.descriptors % 16, 0);
        assert!(at.available - at.descriptors >= 16 * 64);
        assert!(at.used - at.available >= 6 + 2 * 64);
        assert_eq!(at.used % 4, 0);
        assert_eq!(size_of::<UsedElement>(), 8);
    }

    #[test]
    fn a_chain_is_linked_and_refused_when_there_is_no_room() {
        let memory = QueueMemory::<4>::new();
        let mut queue = SplitQueue::new(&memory, true);
        let head = usize::from(queue.add(&segments(3)).unwrap());
        assert_eq!(memory.descriptors[head].flags.load(Relaxed), FLAG_NEXT);
        let second = usize::from(memory.descriptors[head].next.load(Relaxed));
        assert_eq!(memory.descriptors[second].flags.load(Relaxed), FLAG_NEXT | FLAG_WRITE);
        assert_eq!(queue.add(&segments(2)), None);
        assert!(queue.add(&segments(1)).is_some());
        assert_eq!(queue.free(), 0);
    }

    #[test]
    fn doorbells_and_interrupts_survive_every_wrap() {
        let memory = QueueMemory::<8>::new();
        let mut queue = SplitQueue::new(&memory, true);
        let mut device = Device {
            memory: &memory,
            available: 0,
            used: 0,
        };
        // Batches of 1 to 4 chains, finished in reverse: 200,000 chains pass 65535 three times.
        for round in 0..80_000u32 {
            let batch = 1 + (round % 4) as u16;
            for _ in 0..batch {
                queue.add(&segments(2)).unwrap();
            }
            assert!(queue.wants_doorbell(), "round {round}");
            assert!(!queue.wants_doorbell());
            let mut taken = Vec::new();
            while let Some(head) = device.take() {
                taken.push(head);
            }
            assert_eq!(taken.len(), usize::from(batch));
            assert!(!queue.interrupt_after(batch));
            for (position, head) in taken.iter().rev().enumerate() {
                let interrupted = device.finish(*head, round);
                assert_eq!(interrupted, position + 1 == taken.len(), "round {round}");
            }
            assert!(queue.interrupt_after(batch));
            for head in taken.iter().rev() {
                assert_eq!(
                    queue.pop(),
                    Some(Used {
                        head: *head,
                        length: round
                    })
                );
            }
            assert_eq!(queue.pop(), None);
            assert_eq!(queue.free(), 8);
        }
    }

    #[test]
    fn never_means_never() {
        let memory = QueueMemory::<8>::new();
        let mut queue = SplitQueue::new(&memory, true);
        let mut device = Device {
            memory: &memory,
            available: 0,
            used: 0,
        };
        for _ in 0..70_000 {
            queue.interrupt_never();
            queue.add(&segments(1)).unwrap();
            queue.add(&segments(1)).unwrap();
            for _ in 0..2 {
                let head = device.take().unwrap();
                assert!(!device.finish(head, 0));
            }
            queue.pop().unwrap();
            queue.pop().unwrap();
        }
    }

    #[test]
    #[should_panic(expected = "which it does not have")]
    fn a_lying_device_is_caught() {
        let memory = QueueMemory::<8>::new();
        let mut queue = SplitQueue::new(&memory, false);
        let mut device = Device {
            memory: &memory,
            available: 0,
            used: 0,
        };
        queue.add(&segments(1)).unwrap();
        device.finish(5, 0);
        queue.pop();
    }
}
