//! What a network device is: its address, its queues, and what it offers to the driver.

use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
        VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
        VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

/// Pairs of queues a device may have.
pub const PAIRS_MAX: u16 = 16;
/// MTUs a device may announce, as the specification has it.
pub const MTUS: std::ops::RangeInclusive<u16> = 68..=65535;
const CONFIG_BYTES: usize = 12;

/// What is on the host's side of the device, towards the driver and from it, as virtio feature bits.
const OFFLOADS: [u32; 13] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
];

fn bits(features: &[u32]) -> u64 {
    features.iter().fold(0, |bits, bit| bits | 1 << bit)
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Address of the guest.
    pub mac: [u8; 6],
    /// MTU that the driver is told, if it is told one.
    pub mtu: Option<u16>,
    /// Pairs of queues.
    pub pairs: u16,
    /// Offloads that the host has, as feature bits; others are left out.
    pub offloads: u64,
    /// Nobody replays what this device does: frames come with their headers, and go into as many buffers as they need.
    pub free: bool,
}

impl Shape {
    /// One pair of queues and no offload: the device of a protected VM, whose every step a replay repeats.
    #[must_use]
    pub fn plain(mac: [u8; 6]) -> Self {
        Self {
            mac,
            mtu: None,
            pairs: 1,
            offloads: 0,
            free: false,
        }
    }

    /// Queues: of each pair the one that receives, then the one that transmits.
    #[must_use]
    pub fn queues(&self) -> u16 {
        2 * self.pairs
    }

    /// Feature bits that are offered.
    #[must_use]
    pub fn features(&self) -> u64 {
        let always = bits(&[
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_MAC,
        ]);
        if !self.free {
            return always;
        }
        let mut features = always | bits(&[VIRTIO_NET_F_MRG_RXBUF]) | self.offloads & bits(&OFFLOADS);
        if self.mtu.is_some() {
            features |= bits(&[VIRTIO_NET_F_MTU]);
        }
        if self.pairs > 1 {
            features |= bits(&[VIRTIO_NET_F_MQ]);
        }
        features
    }

    /// The configuration space: address, status, pairs of queues, MTU.
    #[must_use]
    pub fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        config[..6].copy_from_slice(&self.mac);
        config[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_device_offers_what_the_host_has_and_a_plain_one_nothing_of_it() {
        let free = Shape {
            mac: [2; 6],
            mtu: Some(9000),
            pairs: 4,
            offloads: bits(&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, 60]),
            free: true,
        };
        let plain = Shape::plain([2; 6]).features();
        let more = bits(&[
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MQ,
        ]);
        assert_eq!(free.features(), plain | more);
        assert_eq!(free.config()[8..], [4, 0, 0x28, 0x23]);
        assert_eq!(Shape { free: false, ..free }.features(), plain);
        let little = Shape {
            mtu: None,
            pairs: 1,
            offloads: 0,
            ..free
        };
        assert_eq!(little.features(), plain | bits(&[VIRTIO_NET_F_MRG_RXBUF]));
    }
}
