//! The ledger service, without its machine: what a request means, how it gets to the disk, when it is answered. Pure.
//!
//! ```text
//!  Stream ──session──► ledger ──group──► BlockDevice
//!  (a client's bytes)   SHA-256 chain    (writes, one flush)
//! ```
//!
//! Two services are made of it, so that a client finds the same one in both: the freestanding guest (`guest/ledger`), whose disk
//! and TCP are its own, and the Linux program (`guest/ledger-linux`), which has a block device file and sockets.

#![cfg_attr(not(test), no_std)]

pub mod chain;
pub mod command_line;
pub mod group;
pub mod ledger;
pub mod limits;
pub mod opening;
pub mod protocol;
pub mod session;

#[cfg(test)]
mod fake_disk;
