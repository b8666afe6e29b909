//! The block device of a fault-tolerant VM: a vhost-user backend on a raw image.
//!
//! ```text
//!  [disk]     what requests do: bounce buffers, completions, the backup's half
//!   ├ [cache], [space]  cache mode; writes that find no space
//!   ├ [replication]  which completions wait for the other host (engine `device`)
//!   ├ [resync]   which blocks a new backup needs (engine `device`)
//!   ├ [overlap]  which request may start: overlapping ones keep their order
//!   ├ [transfer] where the data is meanwhile
//!   ├ [image]    the file: lock, size, fingerprint
//!   └ [standing] whether it may be outdated (engine `device`)
//! ```
//! Alone it serves any vhost-user frontend. With ft-log each host has its image, and the backup's daemon repeats every write
//! (paper §4.1, the non-shared disk); with `--engine device` the frontend may be a stock VMM.

mod cache;
pub mod cli;
pub mod disk;
mod follow;
pub mod image;
pub mod overlap;
mod replication;
mod resync;
mod space;
pub mod standing;
mod transfer;
