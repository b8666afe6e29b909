//! The block device: many requests in flight, none waited for, one doorbell a round, one interrupt when all are back.

use crate::device::{Device, Features};
use crate::machine::console::fatal;
use crate::machine::static_cell::StaticCell;
use crate::machine::traps::{Alarm, Doorbells, wait};
use ledger::limits::DISK_QUEUE_SIZE;
use ledger::split_queue::{QueueMemory, Segment, SplitQueue};
use ledger_core::group::FLUSH_TAG;
use ledger_core::ledger::{BlockDevice, Completion};
use ledger_core::limits::READS_MAX;
use ledger_core::opening::WaitableDevice;
use virtio_drivers::transport::DeviceType;

const REGISTERS: usize = 0xD000_0000;
const TAGS: usize = FLUSH_TAG as usize + 1 + READS_MAX;

const TYPE_READ: u32 = 0;
const TYPE_WRITE: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const STATUS_OK: u8 = 0;
const STATUS_NONE: u8 = 0xFF;

static QUEUE_MEMORY: QueueMemory<DISK_QUEUE_SIZE> = QueueMemory::new();
static REQUESTS: StaticCell<[Request; TAGS]> = StaticCell::new(
    [const {
        Request {
            kind: 0,
            reserved: 0,
            sector: 0,
            status: STATUS_NONE,
        }
    }; TAGS],
);

/// The first and the last part of a request (VIRTIO 1.2 §5.2.6); the device reads the one and writes the other.
#[repr(C)]
struct Request {
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
}

const HEADER_BYTES: u32 = core::mem::offset_of!(Request, status) as u32;
const _: () = assert!(HEADER_BYTES == 16);

/// The disk.
pub(crate) struct Disk {
    _device: Device,
    queue: SplitQueue<'static, DISK_QUEUE_SIZE>,
    requests: &'static mut [Request; TAGS],
    tag_of_head: [u8; DISK_QUEUE_SIZE],
    in_flight: u16,
    capacity: u64,
}

impl Disk {
    /// Brings the disk up.
    pub(crate) fn new() -> Self {
        let required = Features::VERSION_1 | Features::DISK_FLUSH;
        let supported = required | Features::EVENT_IDX | Features::DISK_READ_ONLY;
        let mut device = Device::new("disk", REGISTERS, DeviceType::Block, supported, required);
        if device.features().contains(Features::DISK_READ_ONLY) {
            fatal(format_args!("the disk is read-only"));
        }
        let [low, high] = device.config();
        let queue = device.queue(0, &QUEUE_MEMORY);
        device.start();
        Disk {
            _device: device,
            queue,
            requests: REQUESTS.take(),
            tag_of_head: [0; DISK_QUEUE_SIZE],
            in_flight: 0,
            capacity: u64::from(high) << 32 | u64::from(low),
        }
    }

    /// Size in sectors.
    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The doorbell to ring for what was submitted.
    pub(crate) fn doorbells(&mut self) -> Doorbells {
        if self.queue.wants_doorbell() {
            Doorbells::DISK
        } else {
            Doorbells::empty()
        }
    }

    /// Asks for an interrupt when everything in flight is back. False if there is nothing to wait for any more.
    pub(crate) fn may_sleep(&mut self) -> bool {
        if self.in_flight == 0 {
            self.queue.interrupt_never();
            return true;
        }
        !self.queue.interrupt_after(self.in_flight)
    }

    /// The next finished request.
    pub(crate) fn poll(&mut self) -> Option<Completion> {
        let used = self.queue.pop()?;
        self.in_flight -= 1;
        let tag = self.tag_of_head[usize::from(used.head)];
        // SAFETY: the device wrote the status before it returned the chain; volatile, as the compiler saw nobody write.
        let status = unsafe { (&raw const self.requests[usize::from(tag)].status).read_volatile() };
        Some(Completion {
            tag,
            ok: status == STATUS_OK,
        })
    }

    fn submit(&mut self, tag: u8, kind: u32, sector: u64, data: Option<Segment>) {
        let request = &mut self.requests[usize::from(tag)];
        *request = Request {
            kind,
            reserved: 0,
            sector,
            status: STATUS_NONE,
        };
        let address = (&raw mut *request).expose_provenance() as u64;
        let header = Segment {
            address,
            length: HEADER_BYTES,
            device_writes: false,
        };
        let status = Segment {
            address: address + u64::from(HEADER_BYTES),
            length: 1,
            device_writes: true,
        };
        let head = match data {
            Some(data) => self.queue.add(&[header, data, status]),
            None => self.queue.add(&[header, status]),
        };
        // limits.rs: all tags at once fit.
        let head = head.expect("the disk queue has room for every tag");
        self.tag_of_head[usize::from(head)] = tag;
        self.in_flight += 1;
    }
}

impl BlockDevice for Disk {
    unsafe fn read(&mut self, tag: u8, sector: u64, buffer: *mut u8, bytes: usize) {
        let address = buffer.expose_provenance() as u64;
        self.submit(
            tag,
            TYPE_READ,
            sector,
            Some(Segment {
                address,
                length: bytes as u32,
                device_writes: true,
            }),
        );
    }

    unsafe fn write(&mut self, tag: u8, sector: u64, buffer: *const u8, bytes: usize) {
        let address = buffer.expose_provenance() as u64;
        self.submit(
            tag,
            TYPE_WRITE,
            sector,
            Some(Segment {
                address,
                length: bytes as u32,
                device_writes: false,
            }),
        );
    }

    fn flush(&mut self, tag: u8) {
        self.submit(tag, TYPE_FLUSH, 0, None);
    }
}

impl WaitableDevice for Disk {
    fn wait(&mut self) -> Completion {
        loop {
            if let Some(completion) = self.poll() {
                return completion;
            }
            let doorbells = self.doorbells();
            let may_sleep = self.may_sleep();
            wait(doorbells, Alarm::Keep, may_sleep);
        }
    }
}
