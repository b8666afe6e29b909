//! The block device of a fault-tolerant VM: a vhost-user backend on a raw image.
//!
//! ```text
//!  [disk]     what requests do: bounce buffers, completions, the backup's half
//!   ├ [overlap]  which request may start: overlapping ones keep their order
//!   ├ [transfer] where the data is meanwhile
//!   └ [image]    the file: lock, size, fingerprint
//! ```
//! Alone it serves any vhost-user frontend. With ft-log each host has its image, and the backup's daemon repeats every write
//! (paper §4.1, the non-shared disk).

pub mod cli;
pub mod disk;
pub mod image;
pub mod overlap;
mod transfer;
