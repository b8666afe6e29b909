//! Every bound of the protocol, and how they relate.

/// Bytes of a frame header; see [`crate::frame`].
pub const HEADER_BYTES: usize = 24;
/// Largest payload of one `Input` entry: one disk read, or one batch of received frames.
pub const PAYLOAD_BYTES_MAX: usize = 512 * 1024;
/// Largest frame: header, the fixed part of an `Input`, payload.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + 8 + PAYLOAD_BYTES_MAX;
/// Largest control message body.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Data bytes of a shared-memory ring between a local client and `ft-log`.
pub const RING_BYTES: usize = 8 * 1024 * 1024;
/// Devices of one VM.
pub const DEVICES_MAX: usize = 8;
/// Bytes of a VM's name.
pub const VM_NAME_BYTES_MAX: usize = 64;

const _: () = assert!(FRAME_BYTES_MAX < u32::MAX as usize);
const _: () = assert!(
    RING_BYTES >= 4 * FRAME_BYTES_MAX && RING_BYTES.is_power_of_two(),
    "a ring that cannot hold a few of the largest frames would stop the guest for each of them"
);
const _: () = assert!(MESSAGE_BYTES_MAX + HEADER_BYTES <= FRAME_BYTES_MAX);
