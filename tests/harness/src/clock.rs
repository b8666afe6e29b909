//! The one clock of a run. Every process is on the same machine, so CLOCK_MONOTONIC compares across all of them.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of CLOCK_MONOTONIC, the clock of every `t_ns` in an event file.
#[must_use]
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists on every Linux");
    u64::try_from(now.tv_sec()).expect("monotonic time is not negative") * 1_000_000_000
        + u64::try_from(now.tv_nsec()).expect("nanoseconds are not negative")
}

/// Nanoseconds as milliseconds.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "a run lasts far less than 2^53 ns")]
pub fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}
