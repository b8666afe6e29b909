//! The ledger service as a Linux program: what a protected stock guest runs for the witness.
//!
//! ```text
//!  sockets ──► Client (buffers) ──► ledger-core: session, ledger, group ──► Disk: pwrite, one fdatasync a group
//!     ▲                                                                        │
//!     └────────────────────────── answers, in order ◄──────────────────────────┘
//! ```
//!
//! Protocol, disk format and console lines are those of the bundled guest (docs/interfaces.md §2). One thread, no randomness,
//! and time is read once a round.

pub mod client;
pub mod disk;
pub mod service;
