//! Every limit of the guest that is not the service's. All memory is static; nothing grows.

use ledger_core::limits::{GROUP_WRITES_MAX, READS_MAX};

/// Sessions kept free for new clients, if closed connections in TIME-WAIT are all that stands in the way.
pub const LISTENERS_MIN: usize = 8;
/// An acknowledgment waits this long for an answer to ride on.
pub const ACK_DELAY_MS: u64 = 5;

/// Entries of the disk's virtqueue. A request takes three.
pub const DISK_QUEUE_SIZE: usize = 128;
/// Entries of each of the network's virtqueues. A frame takes one.
pub const NETWORK_QUEUE_SIZE: usize = 64;
/// Bytes of a frame buffer: virtio header, Ethernet header, 1500 bytes.
pub const FRAME_BUFFER_BYTES: usize = 1536;

const _: () = assert!((GROUP_WRITES_MAX + 1 + READS_MAX) * 3 <= DISK_QUEUE_SIZE);
const _: () = assert!(FRAME_BUFFER_BYTES >= 12 + 14 + 1500);
