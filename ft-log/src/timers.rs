//! How long the daemon waits for what, and how much may wait: all that an operator may want to change, with what is usual.

use clap::{Args, value_parser};

/// Times and limits that no other option is about.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Timers and limits")]
pub struct Timers {
    /// Between two `log` events.
    #[arg(long, value_name = "MS", default_value_t = 500, value_parser = value_parser!(u64).range(10..=600_000))]
    pub report_interval_ms: u64,
    /// How long an arbiter may be silent before the operator hears of it.
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = value_parser!(u64).range(10..=600_000))]
    pub arbiter_warning_ms: u64,
    /// How long a local process may take to say who it is.
    #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = value_parser!(u64).range(100..=600_000))]
    pub join_timeout_ms: u64,
    /// How long one attempt to connect may take: the first SYN may be lost once.
    #[arg(long, value_name = "MS", default_value_t = 1500, value_parser = value_parser!(u64).range(10..=60_000))]
    pub connect_timeout_ms: u64,
    /// Between two attempts to connect before pairing.
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = value_parser!(u64).range(10..=60_000))]
    pub connect_retry_ms: u64,
    /// How long the last messages of a side that is over may take to leave.
    #[arg(long, value_name = "MS", default_value_t = 200, value_parser = value_parser!(u64).range(10..=60_000))]
    pub leave_timeout_ms: u64,
    /// How long the journal waits for more before it writes.
    #[arg(long, value_name = "MS", default_value_t = 5, value_parser = value_parser!(u64).range(0..=1000))]
    pub journal_write_delay_ms: u64,
    /// How long an end waits for the disk to take the rest of the journal.
    #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = value_parser!(u64).range(0..=600_000))]
    pub journal_end_timeout_ms: u64,
    /// Bytes of the journal that may wait for the disk, in MiB; more, and the journal has failed.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = value_parser!(u64).range(4..=4096))]
    pub journal_backlog_mib: u64,
}

/// Nanoseconds, which is what everything here counts in.
#[must_use]
pub fn ns(milliseconds: u64) -> u64 {
    milliseconds * 1_000_000
}
