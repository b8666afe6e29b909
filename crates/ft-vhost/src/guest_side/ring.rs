//! One split ring: taking chains, giving them back, and nothing a driver writes can do worse than an error.
//!
//! The indices and event suppression are `virtio_queue::Queue`'s. The walk of a chain is done here: the library's iterator
//! ends silently where a chain is malformed, and a request cut short is not what the guest asked for.

use std::{collections::VecDeque, sync::atomic::Ordering};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT, desc::split::Descriptor};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::{QUEUE_SIZE_MAX, QueueSetup, RingError, dirty::GuestMemoryMmap, inflight::InflightQueue};

const DESCRIPTOR_BYTES: u64 = 16;
/// Where the parts of the rings are.
const AVAILABLE_ELEMENTS: u64 = 4;
const USED_INDEX: u64 = 2;
const USED_ELEMENTS: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

/// One buffer of a chain: a range that was guest memory when the chain was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes, not 0.
    pub length: u32,
    /// The device writes it; else it reads it.
    pub writable: bool,
}

/// What a ring did, for whoever counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Updates of the used ring's index.
    pub batches: u64,
    /// Chains that went back to the driver.
    pub buffers: u64,
    /// Times that the driver wanted an interrupt for what was used.
    pub interrupts: u64,
    /// Times that it wanted none.
    pub suppressed: u64,
}

/// A queue of the device.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
    /// Which heads the device has, so that a driver cannot make it hold more than the ring.
    busy: Vec<bool>,
    /// Entries were added to the used ring since the guest was last told.
    added: bool,
    /// Where the used ring ended then.
    told: u16,
    /// The guest was seen to have added more: the next [`Ring::pop`] must find it, or whoever drains would never end.
    promised: bool,
    /// The driver was told that it need not kick.
    silent: bool,
    tally: Tally,
    inflight: Option<InflightQueue>,
    /// Chains that an earlier device held when it was killed.
    again: VecDeque<u16>,
}

fn outside(what: &'static str, address: u64, length: u64) -> RingError {
    RingError::OutsideMemory { what, address, length }
}

fn check_range(
    memory: &GuestMemoryMmap,
    what: &'static str,
    address: u64,
    length: u64,
    access: Permissions,
) -> Result<(), RingError> {
    let inside = GuestMemory::check_range(memory, GuestAddress(address), length as usize, access);
    inside.then_some(()).ok_or_else(|| outside(what, address, length))
}

impl Ring {
    /// A ring that is not configured yet.
    ///
    /// # Panics
    /// Never: [`QUEUE_SIZE_MAX`] is a legal size.
    #[must_use]
    pub fn new(index: u16) -> Self {
        Self {
            index,
            queue: Queue::new(QUEUE_SIZE_MAX).expect("a power of two"),
            busy: Vec::new(),
            added: false,
            told: 0,
            promised: false,
            silent: false,
            tally: Tally::default(),
            inflight: None,
            again: VecDeque::new(),
        }
    }

    /// Tracks the chains held from the next start of the queue on, and takes up those that are held already.
    pub fn track(&mut self, inflight: Option<InflightQueue>) {
        self.inflight = inflight;
    }

    /// Whether the driver has configured the ring.
    #[must_use]
    pub fn is_configured(&self) -> bool {
        self.queue.ready()
    }

    /// Takes over the ring as its driver laid it out. The used index goes on where the memory says.
    ///
    /// # Errors
    /// A layout the specification forbids or that is not guest memory.
    pub fn configure(&mut self, memory: &GuestMemoryMmap, setup: &QueueSetup) -> Result<(), RingError> {
        self.stop();
        let queue = self.index;
        let impossible = |what, value: u64| move |_| RingError::Setup { queue, what, value };
        let size = setup.size;
        self.queue.try_set_size(size).map_err(impossible("size", size.into()))?;
        for (what, address, bytes, access) in [
            (
                "the descriptor table",
                setup.descriptor_table,
                DESCRIPTOR_BYTES * u64::from(size),
                Permissions::Read,
            ),
            (
                "the available ring",
                setup.available_ring,
                6 + 2 * u64::from(size),
                Permissions::Read,
            ),
            (
                "the used ring",
                setup.used_ring,
                6 + 8 * u64::from(size),
                Permissions::Write,
            ),
        ] {
            check_range(memory, what, address, bytes, access)?;
        }
        self.queue
            .try_set_desc_table_address(GuestAddress(setup.descriptor_table))
            .map_err(impossible("descriptor table", setup.descriptor_table))?;
        self.queue
            .try_set_avail_ring_address(GuestAddress(setup.available_ring))
            .map_err(impossible("available ring", setup.available_ring))?;
        self.queue
            .try_set_used_ring_address(GuestAddress(setup.used_ring))
            .map_err(impossible("used ring", setup.used_ring))?;
        self.queue.set_event_idx(setup.event_idx);
        self.queue.set_next_avail(setup.next_available);
        let used = self
            .queue
            .used_idx(memory, Ordering::Acquire)
            .map_err(|_| outside("the used ring", setup.used_ring, 4))?;
        self.queue.set_next_used(used.0);
        self.told = used.0;
        if let Some(inflight) = &mut self.inflight {
            let held = inflight.recover(size, used.0).map_err(|error| {
                tracing::error!(%error, "this queue is not started");
                RingError::Inflight(queue)
            })?;
            if !held.is_empty() {
                // What was taken is what was used and what is held; a frontend that lost its backend knows the former only.
                self.queue.set_next_avail(used.0.wrapping_add(held.len() as u16));
                tracing::info!(queue, count = held.len(), "requests of a killed daemon are taken again");
            }
            self.again = held.into();
        }
        self.busy.resize(size.into(), false);
        self.queue.set_ready(true);
        Ok(())
    }

    /// Forgets the layout and gives the index of the next available entry.
    pub fn stop(&mut self) -> u16 {
        let next = self.queue.next_avail();
        self.queue.reset();
        self.busy.clear();
        self.added = false;
        self.promised = false;
        self.silent = false;
        self.again.clear();
        next
    }

    fn ready(&self) -> Result<(), RingError> {
        self.is_configured()
            .then_some(())
            .ok_or(RingError::NotConfigured(self.index))
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain: its buffers into `segments`, readable before writable. `None` if there is none.
    ///
    /// # Errors
    /// [`RingError`] for a ring or chain that breaks the rules.
    pub fn pop(&mut self, memory: &GuestMemoryMmap, segments: &mut Vec<Segment>) -> Result<Option<u16>, RingError> {
        self.ready()?;
        let again = self.again.pop_front();
        let head = match again {
            Some(head) => head,
            None => match self.next_available(memory)? {
                Some(head) => head,
                None => return Ok(None),
            },
        };
        let size = self.size();
        let busy = self.busy.get_mut(usize::from(head)).ok_or(RingError::Descriptor {
            index: head,
            size: size.into(),
        })?;
        if std::mem::replace(busy, true) {
            return Err(RingError::Busy { head });
        }
        // What is taken again keeps its place: a daemon that is killed before it has taken all of it again must not leave it behind the
        // rest.
        if let (Some(inflight), None) = (&mut self.inflight, again) {
            inflight.taken(head);
        }
        segments.clear();
        walk(memory, self.queue.desc_table(), size, head, segments)?;
        Ok(Some(head))
    }

    fn next_available(&mut self, memory: &GuestMemoryMmap) -> Result<Option<u16>, RingError> {
        let next = self.queue.next_avail();
        let head = self
            .queue
            .iter(memory)
            .map_err(|_| RingError::AvailableIndex(next))?
            .next()
            .map(|chain| chain.head_index());
        if head.is_none() && self.promised {
            // The index moved back, or the entry is no longer in memory.
            return Err(RingError::AvailableIndex(next));
        }
        self.promised = false;
        Ok(head)
    }

    /// Undoes the last [`Ring::pop`]: the chain is taken again next time.
    pub fn push_back(&mut self, head: u16) {
        self.queue.go_to_previous_position();
        self.busy[usize::from(head)] = false;
    }

    /// Gives a chain back to the driver with `written` bytes in it.
    ///
    /// # Errors
    /// [`RingError`] where the used ring cannot be written.
    pub fn complete(&mut self, memory: &GuestMemoryMmap, head: u16, written: u32) -> Result<(), RingError> {
        self.complete_together(memory, &[(head, written)])
    }

    /// Gives chains back, each with the bytes written to it; the driver sees all of them or none.
    ///
    /// # Errors
    /// [`RingError`] where the used ring cannot be written.
    pub fn complete_together(&mut self, memory: &GuestMemoryMmap, chains: &[(u16, u32)]) -> Result<(), RingError> {
        self.ready()?;
        let (used_ring, size) = (self.queue.used_ring(), self.size());
        let mut next = self.queue.next_used();
        for (head, written) in chains {
            self.busy[usize::from(*head)] = false;
            if let Some(inflight) = &mut self.inflight {
                inflight.completing(*head);
            }
            let at = used_ring + USED_ELEMENTS + USED_ELEMENT_BYTES * u64::from(next % size);
            let element = u64::from(*head) | u64::from(*written) << 32;
            memory
                .write_obj(element.to_le(), GuestAddress(at))
                .map_err(|_| outside("the used ring", at, USED_ELEMENT_BYTES))?;
            next = next.wrapping_add(1);
        }
        let index = GuestAddress(used_ring + USED_INDEX);
        memory
            .store(next.to_le(), index, Ordering::Release)
            .map_err(|_| outside("the used ring", index.0, 2))?;
        self.queue.set_next_used(next);
        self.tally.batches += 1;
        self.tally.buffers += chains.len() as u64;
        self.added |= !chains.is_empty();
        if let Some(inflight) = &mut self.inflight {
            for (head, _) in chains {
                inflight.completed(*head, next);
            }
        }
        Ok(())
    }

    /// Tells the driver that it need not kick, until [`Ring::want_kick`]. With event suppression it need not anyway: what was asked for
    /// was the one entry after those that were there then.
    ///
    /// # Errors
    /// [`RingError`] where the rings cannot be accessed.
    pub fn want_no_kick(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        if self.silent || self.queue.event_idx_enabled() {
            return Ok(());
        }
        self.silent = true;
        self.queue
            .disable_notification(memory)
            .map_err(|_| outside("the used ring", self.queue.used_ring(), 2))
    }

    /// Asks the driver to kick when it adds more, and says whether it has done so already.
    ///
    /// # Errors
    /// [`RingError`] where the rings cannot be accessed.
    pub fn want_kick(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        self.ready()?;
        self.silent = false;
        self.promised = self
            .queue
            .enable_notification(memory)
            .map_err(|_| outside("the rings", self.queue.used_ring(), 0))?;
        Ok(self.promised)
    }

    /// What the ring did since this was last asked.
    pub fn take_tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    /// Whether the driver wants an interrupt for what was completed since this was last asked.
    ///
    /// # Errors
    /// [`RingError`] where the rings cannot be accessed.
    pub fn take_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        if !std::mem::take(&mut self.added) {
            return Ok(false);
        }
        let available_ring = self.queue.avail_ring();
        let word = |at: u64| {
            let word: u16 = memory
                .load(GuestAddress(at), Ordering::Acquire)
                .map_err(|_| outside("the available ring", at, 2))?;
            Ok(u16::from_le(word))
        };
        let (before, now) = (self.told, self.queue.next_used());
        self.told = now;
        // The completions must be visible before the driver's wish is read.
        std::sync::atomic::fence(Ordering::SeqCst);
        let wants = if self.queue.event_idx_enabled() {
            // The driver names the completion that it wants to hear of.
            let wanted = word(available_ring + AVAILABLE_ELEMENTS + 2 * u64::from(self.size()))?;
            now.wrapping_sub(wanted).wrapping_sub(1) < now.wrapping_sub(before)
        } else {
            u32::from(word(available_ring)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        self.tally.interrupts += u64::from(wants);
        self.tally.suppressed += u64::from(!wants);
        Ok(wants)
    }
}

/// Collects the buffers of the chain at `head`.
fn walk(
    memory: &GuestMemoryMmap,
    table: u64,
    size: u16,
    head: u16,
    segments: &mut Vec<Segment>,
) -> Result<(), RingError> {
    let (mut table, mut size, mut next) = (table, u32::from(size), head);
    let mut indirect = false;
    // A chain visits each descriptor at most once, and never more than the largest ring has.
    let mut left = u32::from(QUEUE_SIZE_MAX);
    let mut visited = 0;
    loop {
        if u32::from(next) >= size {
            return Err(RingError::Descriptor { index: next, size });
        }
        if visited == size || left == 0 {
            return Err(RingError::Loop { head });
        }
        visited += 1;
        left -= 1;
        let at = table.wrapping_add(DESCRIPTOR_BYTES * u64::from(next));
        let descriptor: Descriptor = memory
            .read_obj(GuestAddress(at))
            .map_err(|_| outside("a descriptor", at, DESCRIPTOR_BYTES))?;
        if descriptor.refers_to_indirect_table() {
            let bytes = u64::from(descriptor.len());
            let malformed = indirect
                || descriptor.has_next()
                || bytes == 0
                || !bytes.is_multiple_of(DESCRIPTOR_BYTES)
                || bytes / DESCRIPTOR_BYTES > u64::from(u16::MAX);
            if malformed {
                return Err(RingError::Indirect { head });
            }
            (table, size, next) = (descriptor.addr().0, (bytes / DESCRIPTOR_BYTES) as u32, 0);
            check_range(memory, "an indirect table", table, bytes, Permissions::Read)?;
            (indirect, visited) = (true, 0);
            continue;
        }
        let writable = descriptor.is_write_only();
        if !writable && segments.last().is_some_and(|last| last.writable) {
            return Err(RingError::Order { head });
        }
        if descriptor.len() != 0 {
            let (address, length) = (descriptor.addr().0, descriptor.len());
            let access = if writable {
                Permissions::Write
            } else {
                Permissions::Read
            };
            check_range(memory, "a buffer", address, length.into(), access)?;
            segments.push(Segment {
                address,
                length,
                writable,
            });
        }
        if !descriptor.has_next() {
            return Ok(());
        }
        next = descriptor.next();
    }
}

/// Appends the first `length` bytes of `segments` to `out`; the caller has bounded `length`.
///
/// # Errors
/// A range that is no longer guest memory.
pub fn copy_from_guest(
    memory: &GuestMemoryMmap,
    segments: &[Segment],
    length: usize,
    out: &mut Vec<u8>,
) -> Result<(), RingError> {
    let mut left = length;
    for segment in segments {
        let part = left.min(segment.length as usize);
        let start = out.len();
        out.resize(start + part, 0);
        memory
            .read_slice(&mut out[start..], GuestAddress(segment.address))
            .map_err(|_| outside("a buffer", segment.address, part as u64))?;
        left -= part;
        if left == 0 {
            break;
        }
    }
    Ok(())
}

/// Writes as much of `bytes` as fits to the start of `segments`, and gives how much that was.
///
/// # Errors
/// A range that is no longer guest memory.
pub fn copy_to_guest(memory: &GuestMemoryMmap, segments: &[Segment], mut bytes: &[u8]) -> Result<usize, RingError> {
    let total = bytes.len();
    for segment in segments {
        let (part, rest) = bytes.split_at(bytes.len().min(segment.length as usize));
        memory
            .write_slice(part, GuestAddress(segment.address))
            .map_err(|_| outside("a buffer", segment.address, part.len() as u64))?;
        bytes = rest;
        if bytes.is_empty() {
            break;
        }
    }
    Ok(total - bytes.len())
}

/// The segments behind the first `skip` bytes of `segments`, in place.
pub fn skip_bytes(segments: &mut Vec<Segment>, mut skip: u64) {
    segments.retain_mut(|segment| {
        let part = skip.min(segment.length.into());
        skip -= part;
        segment.address += part;
        segment.length -= part as u32;
        segment.length != 0
    });
}

/// Bytes of `segments`.
#[must_use]
pub fn total_bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.length)).sum()
}
