//! What the two vhost-user daemons share.
//!
//! ```text
//!  frontend ──socket──► [session]  control thread ──commands──┐
//!  shim ──gate──────────────────────────────────────────────► device thread: one owner of guest memory and queues
//!  guest ──kick eventfd (alone)─────────────────────────────► │
//!                                                             └► [guest_side]  the half that touches guest memory, pure
//! ```

pub mod conventions;
pub mod daemon;
pub mod device;
mod engine;
pub mod exit;
pub mod guest_side;
pub mod sandbox;
pub mod service;
pub mod session;
mod shared_file;
