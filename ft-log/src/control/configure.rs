//! A change of the times of a running pair: what may be asked for, and how it is shown.

use clap::Args;
use ft_protocol::{Lsn, Timing};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::timers::ns;

/// What is to change; the rest stays. The options have the names, ranges and meanings that they have at the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Args)]
#[serde(deny_unknown_fields)]
#[group(required = true, multiple = true)]
pub struct Change {
    /// Time between two heartbeats.
    #[arg(long, value_name = "MS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_interval_ms: Option<u32>,
    /// Missed heartbeats after which the peer is suspected.
    #[arg(long, value_name = "COUNT")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_misses: Option<u32>,
    /// How long the logging channel may be away, or stand still, while heartbeats go on.
    #[arg(long, value_name = "MS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel_timeout_ms: Option<u32>,
    /// How long the backup's replay may apply nothing although entries are there.
    #[arg(long, value_name = "MS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_timeout_ms: Option<u32>,
    /// Lag of the backup's replay from which on the primary is slowed.
    #[arg(long, value_name = "MS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_target_ms: Option<u32>,
    /// Lag of the backup's replay at which the primary stands still.
    #[arg(long, value_name = "MS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_limit_ms: Option<u32>,
}

impl Change {
    /// The times after this change of `now`.
    ///
    /// # Errors
    /// Why no pair can live with them, with the options that it is about.
    pub fn of(&self, now: &Timing) -> Result<Timing, String> {
        let time = |new: Option<u32>, now: u64| new.map_or(now, |ms| ns(ms.into()));
        let timing = Timing {
            heartbeat_interval_ns: time(self.heartbeat_interval_ms, now.heartbeat_interval_ns),
            heartbeat_misses: self.heartbeat_misses.unwrap_or(now.heartbeat_misses),
            channel_timeout_ns: time(self.channel_timeout_ms, now.channel_timeout_ns),
            replay_timeout_ns: time(self.replay_timeout_ms, now.replay_timeout_ns),
            lag_target_ns: time(self.lag_target_ms, now.lag_target_ns),
            lag_limit_ns: time(self.lag_limit_ms, now.lag_limit_ns),
        };
        timing.check().map(|()| timing)
    }
}

/// Times as everybody sees them, by the names of the options.
pub(crate) fn show(timing: &Timing) -> Value {
    let ms = |ns: u64| ns / 1_000_000;
    json!({
        "heartbeat_interval_ms": ms(timing.heartbeat_interval_ns),
        "heartbeat_misses": timing.heartbeat_misses,
        "channel_timeout_ms": ms(timing.channel_timeout_ns),
        "replay_timeout_ms": ms(timing.replay_timeout_ns),
        "lag_target_ms": ms(timing.lag_target_ns),
        "lag_limit_ms": ms(timing.lag_limit_ns),
    })
}

/// Where the entry is in the log, and the times from there on; or why there is none.
pub(crate) type Answer = Result<(Lsn, Timing), String>;

/// An order to change the times, for the thread of the VM.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) change: Change,
    /// Taken when the entry is in the log.
    pub(crate) answer: oneshot::Sender<Answer>,
}
