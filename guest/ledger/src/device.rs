//! Bringing up a virtio-mmio device: the handshake is that of the `virtio-drivers` crate, the queues are ours.

use crate::machine::console::fatal;
use bitflags::bitflags;
use core::ptr::NonNull;
use ledger::split_queue::{QueueMemory, SplitQueue};
use virtio_drivers::transport::mmio::{MmioTransport, MmioVersion, VirtIOHeader};
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};

const REGISTERS_BYTES: usize = 0x1000;

bitflags! {
    /// What we know of. The low bits mean something else for every type of device.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Features: u64 {
        const NETWORK_MAC = 1 << 5;
        const DISK_READ_ONLY = 1 << 5;
        const DISK_FLUSH = 1 << 9;
        const EVENT_IDX = 1 << 29;
        const VERSION_1 = 1 << 32;
    }
}

/// A device during and after its bring-up. Never dropped: that would reset it.
pub(crate) struct Device {
    name: &'static str,
    transport: MmioTransport<'static>,
    features: Features,
}

impl Device {
    /// Finds the device and agrees on the features, of which `required` are indispensable.
    pub(crate) fn new(
        name: &'static str,
        address: usize,
        kind: DeviceType,
        supported: Features,
        required: Features,
    ) -> Self {
        let Some(header) = NonNull::new(core::ptr::with_exposed_provenance_mut::<VirtIOHeader>(address)) else {
            fatal(format_args!("no address for the {name}"));
        };
        // SAFETY: boot.S maps the registers, and each device is brought up once.
        let transport = unsafe { MmioTransport::new(header, REGISTERS_BYTES) };
        let mut transport = transport.unwrap_or_else(|error| fatal(format_args!("no {name} at {address:#x}: {error}")));
        if transport.device_type() != kind || transport.version() != MmioVersion::Modern {
            fatal(format_args!(
                "the device at {address:#x} is not a {name} of virtio-mmio version 2"
            ));
        }
        let features = transport.begin_init(supported);
        if !transport.get_status().contains(DeviceStatus::FEATURES_OK) || !features.contains(required) {
            fatal(format_args!("the {name} offers {features:?}, {required:?} is needed"));
        }
        Device {
            name,
            transport,
            features,
        }
    }

    /// The features agreed on.
    pub(crate) fn features(&self) -> Features {
        self.features
    }

    /// Sets up a queue.
    pub(crate) fn queue<const N: usize>(
        &mut self,
        index: u16,
        memory: &'static QueueMemory<N>,
    ) -> SplitQueue<'static, N> {
        let size_max = self.transport.max_queue_size(index);
        if (size_max as usize) < N {
            fatal(format_args!(
                "queue {index} of the {} has {size_max} entries, {N} are needed",
                self.name
            ));
        }
        let at = memory.addresses();
        self.transport
            .queue_set(index, N as u32, at.descriptors, at.available, at.used);
        SplitQueue::new(memory, self.features.contains(Features::EVENT_IDX))
    }

    /// Reads the configuration space, 32 bits at a time.
    pub(crate) fn config<const WORDS: usize>(&self) -> [u32; WORDS] {
        let words = self.transport.read_consistent(|| {
            let mut words = [0; WORDS];
            for (index, word) in words.iter_mut().enumerate() {
                *word = self.transport.read_config_space(index * 4)?;
            }
            Ok(words)
        });
        words.unwrap_or_else(|error| fatal(format_args!("configuration of the {}: {error}", self.name)))
    }

    /// The driver is ready.
    pub(crate) fn start(&mut self) {
        self.transport.finish_init();
    }
}
