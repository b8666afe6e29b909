//! Negative controls: the promises a test-only build can switch off, each in one place.
//!
//! A shipped build has all of them on. `scripts/test` builds one variant per feature and requires that a checker fails.

/// The Output Rule is in force: a held output waits for its commit.
pub const HOLD_OUTPUT: bool = !cfg!(feature = "control-no-hold");

/// The arbiter decides who goes live. Off: whoever suspects the peer takes itself for the winner.
pub const ASK_ARBITER: bool = !cfg!(feature = "control-no-arbiter");
