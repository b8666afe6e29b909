//! The protocol of a fault-tolerant virtual machine, as a pure core.
//!
//! No I/O, no clock, no threads, no `unsafe`: time and everything the world says come in as [`Event`]s, and what is to be
//! done goes out as [`Action`]s. The daemons, the simulator and the fuzzers link this very code.
//!
//! ```text
//!  producers ──entry frames──► [frame, entry]   one format for rings, wire and journal
//!  world ─────────Event──────► [replica]        roles, acknowledgements, arbitration ──Action──► shell
//!  device ────────Held<T>────► [held]           the only way to an output is a committed LSN
//!  entries ──────────────────► [backlog]        kept until the backup has them, sent again after a break
//!  replayed LSN ─────────────► [lag]            how much the primary is slowed
//! ```

#![forbid(unsafe_code)]

pub mod backlog;
pub mod controls;
pub mod entry;
pub mod frame;
pub mod held;
pub mod ids;
pub mod lag;
pub mod limits;
pub mod message;
pub mod replica;
pub mod timing;
pub mod versions;

pub use backlog::Backlog;
pub use entry::{Body, Position, Stop};
pub use frame::{FrameError, Header};
pub use held::{Committed, Held};
pub use ids::{DeviceId, Generation, Lsn};
pub use message::{Strength, Watermarks};
pub use replica::{Action, Event, Place, Replica, Role, Verdict};
pub use timing::Timing;
