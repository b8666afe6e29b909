//! Lockstep: one execution, recorded or replayed (DESIGN part 4).
//!
//! ```text
//!  execution ── asks ──► timeline ◄── record: the world decides, the log is told
//!                                 ◄── replay: the log decides, differences end it
//! ```

pub mod branches;
pub mod delta;
pub mod digest;
pub mod divergence;
pub mod execution;
pub mod history;
pub mod journal;
pub mod pace;
pub mod position;
pub mod record;
pub mod replay;
pub mod source;
pub mod timeline;
pub mod virtual_clock;
