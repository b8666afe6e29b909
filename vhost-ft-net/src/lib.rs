//! The network device of a fault-tolerant VM: a vhost-user backend on a TAP, or another interface, that lets nothing out too early.
//!
//! ```text
//!  [nic]       what frames do: out through the hold, in as inputs, the backup's half, going live
//!   ├ [hold]      frames that wait for their commit, and how long they did ─► [histogram]
//!   ├ [marking]   engine `device`: the entry that a batch of frames waits for
//!   ├ [overheard] what a backup's TAP heard before it went live
//!   ├ [announce]  whose addresses the network must learn to find here
//!   ├ [capture]   what was received, held, released and discarded, in a file
//!   ├ [telling]   what it counted, as an event
//!   └ [port]      one queue of the [host_end]: [tap] or [packet] socket
//! ```

pub mod announce;
pub mod capture;
pub mod cli;
pub mod histogram;
pub mod hold;
pub mod host_end;
pub mod marking;
pub mod nic;
pub mod overheard;
pub mod packet;
pub mod port;
pub mod tap;
pub mod telling;
