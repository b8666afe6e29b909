//! The virtio-mmio transport, version 2 (VIRTIO 1.2 §4.2): registers, negotiation, queue addresses.
//!
//! Pure: it knows no device and no memory. What the guest's access means for the world is an [`Effect`].

use virtio_bindings::{
    virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1},
    virtio_mmio as reg,
};

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"FTVM");
const CONFIG: u64 = 0x100;
/// Bytes of the register window.
pub const WINDOW_BYTES: u64 = 0x1000;
/// Largest queue a guest may configure.
pub const QUEUE_SIZE_MAX: u16 = 256;
const INTERRUPT_USED_RING: u32 = 1;

/// A queue as the driver configured it; addresses are guest-physical.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// Entries.
    pub size: u16,
    /// The driver made it ready.
    pub ready: bool,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// What a write means outside the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The guest notified a queue.
    Kick(u16),
    /// The driver is ready: start the device with what was negotiated.
    Activate,
    /// The driver reset the device.
    Reset,
}

/// One device's registers.
#[derive(Clone, Debug)]
pub struct Transport {
    device_type: u32,
    device_features: u64,
    config: Vec<u8>,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueSetup>,
    status: u32,
    interrupt_status: u32,
    activated: bool,
}

impl Transport {
    /// A device of `device_type` with `queues` queues that offers `features` and shows `config`.
    #[must_use]
    pub fn new(device_type: u32, features: u64, config: Vec<u8>, queues: usize) -> Self {
        Self {
            device_type,
            device_features: features | 1 << VIRTIO_F_VERSION_1,
            config,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: vec![QueueSetup::default(); queues],
            status: 0,
            interrupt_status: 0,
            activated: false,
        }
    }

    /// What the driver accepted.
    #[must_use]
    pub fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// The queues as configured.
    #[must_use]
    pub fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// Whether the device is started.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.activated
    }

    /// The device put something into a used ring and the driver wants to know.
    pub fn raise(&mut self) {
        self.interrupt_status |= INTERRUPT_USED_RING;
    }

    /// Level of the interrupt line.
    #[must_use]
    pub fn line(&self) -> bool {
        self.interrupt_status != 0
    }

    /// Reads `out.len()` bytes at `offset` of the window. Registers are 32 bits wide; anything else reads as zero.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        if offset >= CONFIG {
            let from = (offset - CONFIG) as usize;
            let available = self.config.get(from..).unwrap_or(&[]);
            let count = available.len().min(out.len());
            out[..count].copy_from_slice(&available[..count]);
        } else if out.len() == 4 {
            out.copy_from_slice(&self.register(offset as u32).to_le_bytes());
        }
    }

    fn register(&self, offset: u32) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device_type,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.device_features, self.device_features_select),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |_| u32::from(QUEUE_SIZE_MAX)),
            reg::VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status,
            reg::VIRTIO_MMIO_STATUS => self.status,
            _ => 0,
        }
    }

    /// The driver writes `data` at `offset` of the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            return Effect::None;
        };
        match offset as u32 {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => return self.notify(value),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt_status &= !value,
            reg::VIRTIO_MMIO_STATUS => return self.write_status(value),
            register => self.write_queue(register, value),
        }
        Effect::None
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 || self.driver_features_select > 1 {
            return;
        }
        let shift = 32 * self.driver_features_select;
        let mask = 0xffff_ffff_u64 << shift;
        self.driver_features = (self.driver_features & !mask) | (u64::from(value) << shift);
    }

    fn notify(&self, value: u32) -> Effect {
        match u16::try_from(value) {
            Ok(queue) if self.activated && usize::from(queue) < self.queues.len() => Effect::Kick(queue),
            _ => Effect::None,
        }
    }

    fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            let was_active = self.activated;
            *self = Self::new(
                self.device_type,
                self.device_features,
                std::mem::take(&mut self.config),
                self.queues.len(),
            );
            return if was_active { Effect::Reset } else { Effect::None };
        }
        let mut value = value;
        // A driver that accepts what was not offered is refused: FEATURES_OK stays clear (VIRTIO 1.2 §3.1.1).
        let unknown = self.driver_features & !self.device_features != 0;
        let modern = self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0;
        if unknown || !modern {
            value &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        self.status = value;
        let started = VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FEATURES_OK;
        if value & started == started && !self.activated {
            self.activated = true;
            return Effect::Activate;
        }
        Effect::None
    }

    fn write_queue(&mut self, register: u32, value: u32) {
        if self.activated {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        match register {
            reg::VIRTIO_MMIO_QUEUE_NUM => {
                queue.size = u16::try_from(value)
                    .ok()
                    .filter(|size| size.is_power_of_two() && *size <= QUEUE_SIZE_MAX)
                    .unwrap_or(0);
            }
            reg::VIRTIO_MMIO_QUEUE_READY => queue.ready = value & 1 != 0 && queue.size != 0,
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !0xffff_ffff) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn write(transport: &mut Transport, register: u32, value: u32) -> Effect {
        transport.write(u64::from(register), &value.to_le_bytes())
    }

    fn negotiated(features: u64) -> (Transport, Effect) {
        let mut transport = Transport::new(2, 1 << 9, vec![1, 2, 3, 4, 5], 1);
        write(&mut transport, reg::VIRTIO_MMIO_DRIVER_FEATURES, features as u32);
        write(&mut transport, reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        write(
            &mut transport,
            reg::VIRTIO_MMIO_DRIVER_FEATURES,
            (features >> 32) as u32,
        );
        write(&mut transport, reg::VIRTIO_MMIO_STATUS, 0xb);
        let status = transport.status | 4;
        let effect = write(&mut transport, reg::VIRTIO_MMIO_STATUS, status);
        (transport, effect)
    }

    #[test]
    fn a_driver_that_takes_what_is_offered_starts_the_device() {
        let (mut transport, effect) = negotiated(1 << 9 | 1 << 32);
        assert_eq!(effect, Effect::Activate);
        assert_eq!(write(&mut transport, reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0), Effect::Kick(0));
        assert_eq!(write(&mut transport, reg::VIRTIO_MMIO_QUEUE_NOTIFY, 1), Effect::None);
        assert_eq!(write(&mut transport, reg::VIRTIO_MMIO_STATUS, 0), Effect::Reset);
        assert!(!transport.is_active());
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let (transport, effect) = negotiated(1 << 10 | 1 << 32);
        assert_eq!((effect, transport.is_active()), (Effect::None, false));
        let (_, effect) = negotiated(1 << 9);
        assert_eq!(effect, Effect::None, "a legacy driver was accepted");
    }

    #[test]
    fn interrupts_are_a_level_until_acknowledged_and_config_reads_in_any_width() {
        let (mut transport, _) = negotiated(1 << 32);
        transport.raise();
        assert!(transport.line());
        write(&mut transport, reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert!(!transport.line());
        let mut bytes = [9; 8];
        transport.read(CONFIG + 1, &mut bytes);
        assert_eq!(bytes, [2, 3, 4, 5, 0, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn any_sequence_of_accesses_is_harmless(accesses in proptest::collection::vec((0u64..0x1000, any::<u32>(), 1usize..9), 0..200)) {
            let mut transport = Transport::new(1, 0, vec![0; 6], 2);
            for (offset, value, width) in accesses {
                let mut bytes = [0; 8];
                transport.read(offset, &mut bytes[..width]);
                bytes[..4].copy_from_slice(&value.to_le_bytes());
                transport.write(offset, &bytes[..width]);
                prop_assert!(transport.queues().iter().all(|queue| queue.size <= QUEUE_SIZE_MAX));
            }
        }
    }
}
