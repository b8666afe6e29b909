//! Simulation of a protected pair: the real protocol core on two hosts, a model of everything round it, faults from one seed,
//! and a judge that knows nothing of the core.
//!
//! ```text
//!  seed ──► [faults] plan ──► [world] ──► [shell] [channel] [engine] ──► ft_protocol::Replica × 2
//!                               │            [network] [arbiter] [guest] [client]
//!                               └──► [checkers] ──failure──► [shrink] ──► the shortest history
//! ```
//!
//! The same seed is the same run, to the last byte. See docs/testing.md.

#![forbid(unsafe_code)]

pub mod arbiter;
mod channel;
pub mod checkers;
pub mod client;
pub mod crash_points;
mod engine;
pub mod explore;
pub mod faults;
pub mod guest;
pub mod host;
pub mod linearizability;
pub mod mutants;
pub mod network;
pub mod queue;
mod repair;
mod shell;
pub mod shrink;
mod stories;
pub mod world;

pub use checkers::{Failure, Invariant};
pub use faults::Plan;
pub use mutants::Mutant;
pub use world::{Options, Outcome, run};
