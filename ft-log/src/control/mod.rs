//! The management plane of all VMs of the process: JSON over a unix socket, metrics for Prometheus. It has a thread and an io_uring of its
//! own (tokio-uring), so that nothing here can hold up the log.
//!
//! ```text
//!  a VM's thread  ──relaxed stores──► [shared] ◄──loads── [server] ◄── JSON lines ── [client]: ft-log status, rotate, ...
//!         ▲  bell, if there is an order ─────┘               │  └── [archive]: entries of old segments
//!         └── orders ◄───────────────────────────────────────┘  [metrics] ◄── HTTP ── Prometheus
//!  a network daemon ──relaxed stores──► its page ◄──loads── [devices] ──┘
//! ```

mod archive;
pub mod client;
pub mod configure;
mod devices;
pub mod metrics;
pub mod protocol;
pub mod server;
pub mod shared;

pub use self::{metrics::MetricsAddress, server::Control, shared::Shared};
