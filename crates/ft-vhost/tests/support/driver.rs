//! A guest's memory, and the driver's side of a split ring in it.

use std::{fs::File, sync::atomic::Ordering};

use ft_vhost::guest_side::{QueueSetup, dirty::GuestMemoryMmap};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Bytes of guest memory.
pub const MEMORY_BYTES: u64 = 32 << 20;

/// Guest memory from 0 on, shareable.
pub fn memory() -> GuestMemoryMmap {
    let file = File::from(memfd_create("test-guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(MEMORY_BYTES).unwrap();
    GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY_BYTES as usize, Some(FileOffset::new(file, 0)))])
        .unwrap()
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub address: u64,
    pub length: u32,
    pub writable: bool,
}

/// A buffer the device reads.
pub fn readable(address: u64, length: u32) -> Buffer {
    Buffer {
        address,
        length,
        writable: false,
    }
}

/// A buffer the device writes.
pub fn writable(address: u64, length: u32) -> Buffer {
    Buffer {
        address,
        length,
        writable: true,
    }
}

/// The driver of one queue. Its rings take 64 KiB from `base` on.
#[derive(Debug)]
pub struct Driver {
    memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    available: u16,
    used: u16,
    kicked_at: u16,
    held: bool,
}

impl Driver {
    pub fn new(memory: &GuestMemoryMmap, base: u64, size: u16, event_idx: bool) -> Self {
        Self {
            memory: memory.clone(),
            base,
            size,
            event_idx,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            available: 0,
            used: 0,
            kicked_at: 0,
            held: false,
        }
    }

    pub fn setup(&self) -> QueueSetup {
        QueueSetup {
            size: self.size,
            descriptor_table: self.base,
            available_ring: self.base + 0x8000,
            used_ring: self.base + 0xa000,
            next_available: self.used.wrapping_add(self.unseen()),
            event_idx: self.event_idx,
        }
    }

    /// The memory all this is in.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, address: u64) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn describe(&self, table: u64, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        let write = if buffer.writable { WRITE } else { 0 };
        self.put(buffer.address, at);
        self.put(buffer.length, at + 8);
        self.put(flags | write, at + 12);
        self.put(next, at + 14);
    }

    /// The head that the next chain will get.
    pub fn next_head(&self) -> u16 {
        *self.free.last().expect("a free descriptor")
    }

    /// Makes a chain available and gives its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let indices: Vec<u16> = buffers
            .iter()
            .map(|_| self.free.pop().expect("a free descriptor"))
            .collect();
        for (place, buffer) in buffers.iter().enumerate() {
            let next = indices.get(place + 1).copied();
            let flags = if next.is_some() { NEXT } else { 0 };
            self.describe(self.base, indices[place], *buffer, flags, next.unwrap_or(0));
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.publish(head);
        head
    }

    /// Whether the device has the chain of this head.
    pub fn holds(&self, head: u16) -> bool {
        !self.chains[usize::from(head)].is_empty()
    }

    /// Makes a head available that this driver does not own.
    pub fn publish_head(&mut self, head: u16) {
        self.publish(head);
    }

    /// Makes a chain available through an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (place, buffer) in buffers.iter().enumerate() {
            let more = place + 1 < buffers.len();
            self.describe(
                table,
                place as u16,
                *buffer,
                if more { NEXT } else { 0 },
                place as u16 + 1,
            );
        }
        let head = self.free.pop().expect("a free descriptor");
        self.describe(self.base, head, readable(table, 16 * buffers.len() as u32), INDIRECT, 0);
        self.chains[usize::from(head)] = vec![head];
        self.publish(head);
        head
    }

    fn publish(&mut self, head: u16) {
        let ring = self.base + 0x8000;
        self.put(head, ring + 4 + 2 * u64::from(self.available % self.size));
        self.available = self.available.wrapping_add(1);
        if !self.held {
            self.announce();
        }
    }

    /// From here on the device sees no new chain until [`Driver::announce`], however busily it polls.
    pub fn hold(&mut self) {
        self.held = true;
    }

    /// Shows the device every chain added so far.
    pub fn announce(&mut self) {
        self.held = false;
        let index = GuestAddress(self.base + 0x8002);
        self.memory.store(self.available, index, Ordering::SeqCst).unwrap();
    }

    /// Whether the device asked to be told about what was added since this was last asked.
    pub fn wants_kick(&mut self) -> bool {
        let (old, new) = (self.kicked_at, self.available);
        self.kicked_at = new;
        let used = self.base + 0xa000;
        if !self.event_idx {
            let flags: u16 = self.memory.load(GuestAddress(used), Ordering::SeqCst).unwrap();
            return flags & 1 == 0 && old != new;
        }
        let event: u16 = self
            .memory
            .load(GuestAddress(used + 4 + 8 * u64::from(self.size)), Ordering::SeqCst)
            .unwrap();
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Used chains that were not taken yet.
    pub fn unseen(&self) -> u16 {
        let used = GuestAddress(self.base + 0xa002);
        let index: u16 = self.memory.load(used, Ordering::SeqCst).unwrap();
        index.wrapping_sub(self.used)
    }

    /// The next used chain: head and bytes written. Asks for an interrupt at the one after.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let ring = self.base + 0xa000;
        let index: u16 = self.memory.load(GuestAddress(ring + 2), Ordering::SeqCst).unwrap();
        if index == self.used {
            return None;
        }
        let element = ring + 4 + 8 * u64::from(self.used % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(element)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        let used_event = self.base + 0x8000 + 4 + 2 * u64::from(self.size);
        self.memory
            .store(self.used, GuestAddress(used_event), Ordering::SeqCst)
            .unwrap();
        let head = head as u16;
        let freed = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!freed.is_empty(), "chain {head} was used twice");
        self.free.extend(freed);
        Some((head, length))
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// Header of a block request.
pub fn blk_header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A driver of a block device's queue: requests of at most 64 KiB, each in its own 128 KiB of the queue's 8 MiB.
#[derive(Debug)]
pub struct BlkDriver {
    pub ring: Driver,
    slots: u64,
    /// Which chain each slot was last used for.
    owners: [Option<u16>; SLOTS],
    next_slot: usize,
}

/// Buffers of one queue.
const SLOTS: usize = 64;

/// A request that was made available.
#[derive(Clone, Copy, Debug)]
pub struct BlkRequest {
    pub head: u16,
    at: u64,
    length: u32,
}

impl BlkDriver {
    pub fn new(memory: &GuestMemoryMmap, event_idx: bool) -> Self {
        Self::of_queue(memory, event_idx, 0)
    }

    /// The driver of the first queue with rings of `size` entries that nobody used before.
    pub fn fresh(memory: &GuestMemoryMmap, event_idx: bool, size: u16) -> Self {
        let driver = Self::fresh_layout(memory, event_idx, size);
        driver.ring.write(0x1_0000, &[0; 0x1_0000]);
        driver
    }

    /// The same, whatever is in the rings.
    pub fn fresh_layout(memory: &GuestMemoryMmap, event_idx: bool, size: u16) -> Self {
        let ring = Driver::new(memory, 0x1_0000, size, event_idx);
        Self::on(ring, 1 << 20)
    }

    /// The driver of one of the first three queues.
    pub fn of_queue(memory: &GuestMemoryMmap, event_idx: bool, queue: u64) -> Self {
        let ring = Driver::new(memory, 0x1_0000 * (queue + 1), 64, event_idx);
        Self::on(ring, (1 << 20) + queue * (8 << 20))
    }

    fn on(ring: Driver, slots: u64) -> Self {
        Self {
            ring,
            slots,
            owners: [None; SLOTS],
            next_slot: 0,
        }
    }

    /// The slot of the next chain: each in turn, but none that a slow request still has.
    fn slot(&mut self) -> u64 {
        let head = self.ring.next_head();
        for owner in &mut self.owners {
            owner.take_if(|other| *other == head || !self.ring.holds(*other));
        }
        let mut turn = (0..SLOTS).map(|offset| (self.next_slot + offset) % SLOTS);
        let slot = turn
            .find(|slot| self.owners[*slot].is_none())
            .expect("a slot that no request has");
        self.owners[slot] = Some(head);
        self.next_slot = slot + 1;
        self.slots + slot as u64 * (128 << 10)
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) -> BlkRequest {
        let at = self.slot();
        self.ring.write(at, &blk_header(1, sector));
        self.ring.write(at + 0x1000, data);
        self.ring.write(at + 16, &[0xff]);
        let length = data.len() as u32;
        let head = self
            .ring
            .add(&[readable(at, 16), readable(at + 0x1000, length), writable(at + 16, 1)]);
        BlkRequest { head, at, length: 0 }
    }

    pub fn read(&mut self, sector: u64, length: u32) -> BlkRequest {
        let at = self.slot();
        self.ring.write(at, &blk_header(0, sector));
        self.ring.write(at + 0x1000, &vec![0xee; length as usize]);
        self.ring.write(at + 16, &[0xff]);
        // In three parts, through a table of its own.
        let part = length / 2;
        let buffers = [
            readable(at, 16),
            writable(at + 0x1000, part),
            writable(at + 0x1000 + u64::from(part), length - part),
            writable(at + 16, 1),
        ];
        let head = self.ring.add_indirect(at + 0x100, &buffers);
        BlkRequest { head, at, length }
    }

    pub fn other(&mut self, kind: u32, length: u32) -> BlkRequest {
        let at = self.slot();
        self.ring.write(at, &blk_header(kind, 0));
        self.ring.write(at + 16, &[0xff]);
        let mut buffers = vec![readable(at, 16)];
        if length != 0 {
            buffers.push(writable(at + 0x1000, length));
        }
        buffers.push(writable(at + 16, 1));
        let head = self.ring.add(&buffers);
        BlkRequest { head, at, length }
    }

    /// A discard (11) or write-zeroes (13) of one extent.
    pub fn extent(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> BlkRequest {
        let at = self.slot();
        self.ring.write(at, &blk_header(kind, 0));
        self.ring.write(at + 16, &[0xff]);
        self.ring.write(at + 0x1000, &sector.to_le_bytes());
        self.ring.write(at + 0x1008, &sectors.to_le_bytes());
        self.ring.write(at + 0x100c, &flags.to_le_bytes());
        let buffers = [readable(at, 16), readable(at + 0x1000, 16), writable(at + 16, 1)];
        let head = self.ring.add(&buffers);
        BlkRequest { head, at, length: 0 }
    }

    pub fn flush(&mut self) -> BlkRequest {
        self.other(4, 0)
    }

    /// Status of a request; 0xff before it is complete.
    pub fn status(&self, request: BlkRequest) -> u8 {
        self.ring.read(request.at + 16, 1)[0]
    }

    /// What a read brought; 0xee before it is delivered.
    pub fn data(&self, request: BlkRequest) -> Vec<u8> {
        self.ring.read(request.at + 0x1000, request.length as usize)
    }
}
