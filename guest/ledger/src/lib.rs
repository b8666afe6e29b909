//! The pure parts of the ledger guest: formats, the split virtqueue, the group commit. No device, no clock, no ring 0.
//!
//! They are a library so that `cargo test` runs them on the host; the binary adds the machine around them.

#![cfg_attr(not(test), no_std)]

pub mod chain;
pub mod command_line;
pub mod group;
pub mod ledger;
pub mod limits;
pub mod opening;
pub mod protocol;
pub mod split_queue;

#[cfg(test)]
mod fake_disk;
