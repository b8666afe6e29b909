//! The pure part of the guest that is not the service's (`ledger-core`): the split virtqueue, limits. A library so that
//! `cargo test` runs it on the host.

#![cfg_attr(not(test), no_std)]

pub mod limits;
pub mod split_queue;
