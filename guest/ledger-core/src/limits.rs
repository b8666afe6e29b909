//! Every limit of the service. Nothing grows.

/// Longest payload of a record, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = 256;
/// Clients connected at the same time.
pub const SESSIONS_MAX: usize = 32;
/// Started and not yet answered requests of one client.
pub const SESSION_PENDING_MAX: usize = 64;
/// TCP buffers of one client, in bytes.
pub const SOCKET_RECEIVE_BYTES: usize = 32 * 1024;
/// TCP buffers of one client, in bytes.
pub const SOCKET_TRANSMIT_BYTES: usize = 32 * 1024;

/// Records that share one flush.
pub const GROUP_RECORDS_MAX: usize = 64;
/// Records in one write request: a page.
pub const WRITE_RECORDS_MAX: usize = 8;
/// Write requests of one group.
pub const GROUP_WRITES_MAX: usize = GROUP_RECORDS_MAX / WRITE_RECORDS_MAX;
/// Records being read at the same time.
pub const READS_MAX: usize = 32;

/// A session idle for longer makes room when a client finds all sessions taken.
pub const SESSION_IDLE_NS: u64 = 10_000_000_000;
/// How long an answered POWEROFF waits for the client's acknowledgment.
pub const POWER_OFF_GRACE_NS: u64 = 2_000_000_000;

const _: () = assert!(GROUP_RECORDS_MAX.is_multiple_of(WRITE_RECORDS_MAX));
