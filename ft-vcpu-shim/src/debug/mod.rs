//! Looking at an execution: where it is, what it did, what its memory holds, and where two of them part.
//!
//! ```text
//!  journal ─► execution, stop by stop ─┬─► trace       one line a stop
//!                 ▲                    ├─► frames      what the guest sent
//!                 │                    ├─► registers, disassembly, memory dump
//!                 │ anew               ├─► gdb         remote protocol, backwards too: by replaying anew
//!                 └────────────────────┴─► bisect      the first stop at which two executions differ
//! ```
//! Nothing here changes what the guest computes.

pub mod bisect;
pub mod disassembly;
pub mod dump;
pub mod frames;
pub mod gdb;
pub mod paging;
pub mod registers;
pub mod report;
pub mod session;
pub mod successors;
pub mod support;
pub mod target;
pub mod trace;
