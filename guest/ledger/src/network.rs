//! The network device, as smoltcp wants it. A frame is one descriptor; nothing is copied but by smoltcp.
//!
//! Receiving interrupts at the first frame after all have been taken. Sending never interrupts, unless every buffer is
//! taken and there is more to send.

use crate::device::{Device, Features};
use crate::machine::static_cell::StaticCell;
use crate::machine::traps::Doorbells;
use core::net::Ipv4Addr;
use ledger::limits::{FRAME_BUFFER_BYTES, NETWORK_QUEUE_SIZE};
use ledger::split_queue::{QueueMemory, Segment, SplitQueue};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::EthernetAddress;
use virtio_drivers::transport::DeviceType;

const REGISTERS: usize = 0xD000_1000;
const QUEUE_RECEIVE: u16 = 0;
const QUEUE_TRANSMIT: u16 = 1;
/// virtio_net_hdr of VIRTIO 1: all zero, there are no offloads.
const HEADER_BYTES: usize = 12;
const FRAME_BYTES_MAX: usize = 1514;

type Queue = SplitQueue<'static, NETWORK_QUEUE_SIZE>;
type Buffers = [[u8; FRAME_BUFFER_BYTES]; NETWORK_QUEUE_SIZE];

static RECEIVE_QUEUE: QueueMemory<NETWORK_QUEUE_SIZE> = QueueMemory::new();
static TRANSMIT_QUEUE: QueueMemory<NETWORK_QUEUE_SIZE> = QueueMemory::new();
static RECEIVE_BUFFERS: StaticCell<Buffers> = StaticCell::new([[0; FRAME_BUFFER_BYTES]; NETWORK_QUEUE_SIZE]);
static TRANSMIT_BUFFERS: StaticCell<Buffers> = StaticCell::new([[0; FRAME_BUFFER_BYTES]; NETWORK_QUEUE_SIZE]);

/// The network.
pub(crate) struct Network {
    _device: Device,
    mac: EthernetAddress,
    receiver: Receiver,
    transmitter: Transmitter,
}

impl Network {
    /// Brings the network up. A device without a MAC address gets one made of the IP address.
    pub(crate) fn new(ip: Ipv4Addr) -> Self {
        let required = Features::VERSION_1;
        let supported = required | Features::EVENT_IDX | Features::NETWORK_MAC;
        let mut device = Device::new("network card", REGISTERS, DeviceType::Network, supported, required);
        let mac = if device.features().contains(Features::NETWORK_MAC) {
            let [low, high] = device.config();
            let (low, high) = (low.to_le_bytes(), high.to_le_bytes());
            [low[0], low[1], low[2], low[3], high[0], high[1]]
        } else {
            let ip = ip.octets();
            [0x02, 0x46, ip[0], ip[1], ip[2], ip[3]]
        };
        let mut receiver = Receiver {
            queue: device.queue(QUEUE_RECEIVE, &RECEIVE_QUEUE),
            buffers: RECEIVE_BUFFERS.take(),
            buffer_of_head: [0; NETWORK_QUEUE_SIZE],
        };
        let transmitter = Transmitter {
            queue: device.queue(QUEUE_TRANSMIT, &TRANSMIT_QUEUE),
            buffers: TRANSMIT_BUFFERS.take(),
            buffer_of_head: [0; NETWORK_QUEUE_SIZE],
            free: core::array::from_fn(|index| index as u8),
            free_count: NETWORK_QUEUE_SIZE,
            starved: false,
        };
        device.start();
        for buffer in 0..NETWORK_QUEUE_SIZE {
            receiver.post(buffer);
        }
        Network {
            _device: device,
            mac: EthernetAddress(mac),
            receiver,
            transmitter,
        }
    }

    /// Our address.
    pub(crate) fn mac(&self) -> EthernetAddress {
        self.mac
    }

    /// The doorbells to ring for what was sent and for fresh receive buffers.
    pub(crate) fn doorbells(&mut self) -> Doorbells {
        let mut doorbells = Doorbells::empty();
        doorbells.set(Doorbells::RECEIVE, self.receiver.queue.wants_doorbell());
        doorbells.set(Doorbells::TRANSMIT, self.transmitter.queue.wants_doorbell());
        doorbells
    }

    /// Asks for the interrupts that are needed. False if there is nothing to wait for any more.
    pub(crate) fn may_sleep(&mut self) -> bool {
        if self.transmitter.starved {
            // Nothing can be received either: smoltcp wants to be able to answer.
            self.receiver.queue.interrupt_never();
            return !self.transmitter.queue.interrupt_after(1);
        }
        self.transmitter.queue.interrupt_never();
        !self.receiver.queue.interrupt_after(1)
    }

    /// Whether smoltcp had something to send and found no buffer since the last round.
    pub(crate) fn is_starved(&self) -> bool {
        self.transmitter.starved
    }

    /// Takes back the buffers that were sent.
    pub(crate) fn reclaim(&mut self) {
        self.transmitter.reclaim();
    }
}

struct Receiver {
    queue: Queue,
    buffers: &'static mut Buffers,
    buffer_of_head: [u8; NETWORK_QUEUE_SIZE],
}

impl Receiver {
    fn post(&mut self, buffer: usize) {
        let address = self.buffers[buffer].as_mut_ptr().expose_provenance() as u64;
        let segment = Segment {
            address,
            length: FRAME_BUFFER_BYTES as u32,
            device_writes: true,
        };
        // There are as many descriptors as buffers.
        let head = self
            .queue
            .add(&[segment])
            .expect("the receive queue has room for every buffer");
        self.buffer_of_head[usize::from(head)] = buffer as u8;
    }
}

struct Transmitter {
    queue: Queue,
    buffers: &'static mut Buffers,
    buffer_of_head: [u8; NETWORK_QUEUE_SIZE],
    free: [u8; NETWORK_QUEUE_SIZE],
    free_count: usize,
    starved: bool,
}

impl Transmitter {
    fn reclaim(&mut self) {
        self.starved = false;
        while let Some(used) = self.queue.pop() {
            self.free[self.free_count] = self.buffer_of_head[usize::from(used.head)];
            self.free_count += 1;
        }
    }
}

/// A frame that came. Its buffer goes back to the device when the token goes.
pub(crate) struct ReceiveToken<'a> {
    receiver: &'a mut Receiver,
    buffer: usize,
    /// Of header and frame.
    length: usize,
}

impl phy::RxToken for ReceiveToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        let filled = &self.receiver.buffers[self.buffer][..self.length];
        read(filled.get(HEADER_BYTES..).unwrap_or_default())
    }
}

impl Drop for ReceiveToken<'_> {
    fn drop(&mut self) {
        self.receiver.post(self.buffer);
    }
}

/// Leave to send a frame.
pub(crate) struct TransmitToken<'a> {
    transmitter: &'a mut Transmitter,
}

impl phy::TxToken for TransmitToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let transmitter = self.transmitter;
        // Network::receive and transmit hand out a token only if a buffer is free.
        transmitter.free_count -= 1;
        let index = transmitter.free[transmitter.free_count];
        let buffer = &mut transmitter.buffers[usize::from(index)][..HEADER_BYTES + length];
        buffer[..HEADER_BYTES].fill(0);
        let result = fill(&mut buffer[HEADER_BYTES..]);
        let address = buffer.as_mut_ptr().expose_provenance() as u64;
        let segment = Segment {
            address,
            length: buffer.len() as u32,
            device_writes: false,
        };
        let head = transmitter
            .queue
            .add(&[segment])
            .expect("the transmit queue has room for every buffer");
        transmitter.buffer_of_head[usize::from(head)] = index;
        result
    }
}

impl phy::Device for Network {
    type RxToken<'a> = ReceiveToken<'a>;
    type TxToken<'a> = TransmitToken<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(ReceiveToken<'_>, TransmitToken<'_>)> {
        if self.transmitter.free_count == 0 {
            self.transmitter.starved = true;
            return None;
        }
        let used = self.receiver.queue.pop()?;
        let token = ReceiveToken {
            buffer: usize::from(self.receiver.buffer_of_head[usize::from(used.head)]),
            receiver: &mut self.receiver,
            length: (used.length as usize).min(FRAME_BUFFER_BYTES),
        };
        Some((
            token,
            TransmitToken {
                transmitter: &mut self.transmitter,
            },
        ))
    }

    fn transmit(&mut self, _now: Instant) -> Option<TransmitToken<'_>> {
        if self.transmitter.free_count == 0 {
            self.transmitter.starved = true;
            return None;
        }
        Some(TransmitToken {
            transmitter: &mut self.transmitter,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES_MAX;
        capabilities
    }
}
