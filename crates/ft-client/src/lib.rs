//! The local API of `ft-log`: how the processes of one VM on one host work together without system calls on the hot path.
//!
//! ```text
//!  shim, devices ──ring──► ft-log        [log]     append an entry: claim an LSN, encode in place
//!  ft-log ────────ring──► shim           [ring]    entries to replay
//!  everybody ────region── everybody      [region]  role, generation, next LSN, commit watermark, the shim's wake word
//!  shim ──────────gate─── device         [gate]    kick and delivery, at a stop point, with the vCPU stopped
//!  a finished log ────► shim             [journal] entries to replay from files
//!  a network device ──page── ft-log      [counters] what it counts, for whoever looks at ft-log's metrics
//!  joining: one unix socket, one JSON line each way, descriptors along with it   [handshake]
//! ```
//!
//! The processes of a VM on a host are one failure unit: each keeps its socket to `ft-log` open, and its end is the end of
//! that replica.

pub mod counters;
pub mod crash;
pub mod events;
pub mod futex;
pub mod gate;
pub mod handshake;
pub mod journal;
pub mod log;
pub mod region;
pub mod ring;
pub mod shm;

pub use counters::Counters;
pub use gate::{DeviceGate, ShimGate};
pub use log::LogWriter;
pub use region::Region;
