//! The smallest VMM that can run a guest on KVM with every nondeterministic input recorded or replayed.
//!
//! ```text
//!  command ─► machine   RAM, CPU, boot
//!             platform  interrupt controllers, clock, console, virtio transports: pure, deterministic
//!             device    the device daemons behind their gates, or their guest sides alone
//!             rewrite   kernel text: RDTSC becomes an exit
//!             lockstep  from stop point to stop point; the world or the log decides
//!             debug     a recorded execution, looked at: trace, memory, registers, gdb, the first difference
//! ```

pub mod command;
pub mod debug;
pub mod device;
pub mod error;
pub mod lockstep;
pub mod machine;
pub mod platform;
pub mod rewrite;
