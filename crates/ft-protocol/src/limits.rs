//! Every bound of the protocol, and how they relate.

/// Bytes of a frame header; see [`crate::frame`].
pub const HEADER_BYTES: usize = 24;
/// Largest payload of one `Input` entry: one disk read, or one batch of received frames.
pub const PAYLOAD_BYTES_MAX: usize = 512 * 1024;
/// Largest frame: header, the fixed part of an `Input`, payload.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + 8 + PAYLOAD_BYTES_MAX;
/// Largest control message body.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Bytes of a digest of a block of a disk.
pub const DIGEST_BYTES: usize = 16;
/// Digests of one message: blocks that a new backup is asked about at once.
pub const DIGESTS_MAX: usize = 64;
/// Bytes of a block of a disk by which two images are compared; the last one of a disk may be shorter.
pub const BLOCK_BYTES: usize = 64 * 1024;
/// Data bytes of a shared-memory ring between a local client and `ft-log`.
pub const RING_BYTES: usize = 8 * 1024 * 1024;
/// Devices of one VM.
pub const DEVICES_MAX: usize = 8;
/// Bytes of a VM's name.
pub const VM_NAME_BYTES_MAX: usize = 64;
/// Bytes of entries that the primary keeps because the backup has not acknowledged them; at this many the guest stops.
pub const BACKLOG_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Bytes at which one piece of the backlog takes no more entries; the largest entry may go beyond.
pub const BACKLOG_CHUNK_BYTES: usize = 256 * 1024;
/// Buffers of forgotten pieces that are kept to be used again.
pub const BACKLOG_SPARES_MAX: usize = 8;
/// Accepted connections that have not said hello yet.
pub const CANDIDATES_MAX: usize = 4;
/// Bytes of control messages that wait for a peer which does not read; at this many the channel is cut.
pub const OUTGOING_BYTES_MAX: usize = 1024 * 1024;
/// Moments that the measure of the lag remembers.
pub const LAG_SAMPLES_MAX: usize = 2048;
/// The throttle that stops the primary's vCPU; 0 lets it run.
pub const THROTTLE_MAX: u32 = 1000;

const _: () = assert!(FRAME_BYTES_MAX < u32::MAX as usize);
const _: () = assert!(
    RING_BYTES >= 4 * FRAME_BYTES_MAX && RING_BYTES.is_power_of_two(),
    "a ring that cannot hold a few of the largest frames would stop the guest for each of them"
);
const _: () = assert!(MESSAGE_BYTES_MAX + HEADER_BYTES <= FRAME_BYTES_MAX);
const _: () = assert!(8 + DIGESTS_MAX * DIGEST_BYTES <= MESSAGE_BYTES_MAX);
const _: () = assert!(BLOCK_BYTES <= PAYLOAD_BYTES_MAX, "a block is one entry");
const _: () = assert!(OUTGOING_BYTES_MAX >= 16 * (HEADER_BYTES + MESSAGE_BYTES_MAX));
const _: () = assert!(
    BACKLOG_BYTES_MAX >= 4 * FRAME_BYTES_MAX && BACKLOG_BYTES_MAX >= 4 * BACKLOG_CHUNK_BYTES,
    "a backlog that the largest frames fill would stop the guest for each of them"
);
