//! What protection costs: figures of this project next to a peer's, measured in the same run.
//!
//! ```text
//!  [lockstep]  protected pair ┐ a closed-loop [client] each, in turns, short rounds   ─► throughput, added latency
//!              single host    ┘ [machine]            [echo] over the logging wire in between
//!              pair alone, idle, then busy                                            ─► log bytes
//!  [blk]       the block daemon alone, and qemu-storage-daemon, under one frontend       ─► IOPS, CPU per I/O
//!  [net]       the network daemon alone, and DPDK's testpmd, under a testpmd as the guest; protected, and alone ─► frames/s, latency
//!  [failover]  many short runs that lose their primary                                ─► the gap clients see
//!  [log]       bare ft-logs, this program their only client, next to raw TCP and TLS ─► commit latency, throughput
//! ```
//!
//! Nothing here passes or fails by a time: [`row::Row`]s go to a person and to a file.

pub mod blk;
pub mod client;
pub mod echo;
mod engine_pair;
pub mod failover;
pub mod linux;
pub mod lockstep;
pub mod log;
pub mod machine;
pub mod net;
pub mod row;
pub mod stats;
mod traffic;
