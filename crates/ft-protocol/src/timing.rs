//! The times that decide when a side is suspected and how far a backup may trail: both sides of a pair keep the same ones.

use crate::frame::{BodyReader, BodyWriter};

const MS: u64 = 1_000_000;

/// Heartbeats that tell why a channel stands still, within the time it may.
pub const HEARTBEATS_PER_CHANNEL_TIMEOUT: u64 = 4;

/// Times of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timing {
    /// Between two heartbeats, ns.
    pub heartbeat_interval_ns: u64,
    /// Intervals of silence after which the peer is suspected.
    pub heartbeat_misses: u32,
    /// How long the channel may be away, or stand still, while heartbeats go on, ns. At half of it a channel that stands still is
    /// broken and connected anew.
    pub channel_timeout_ns: u64,
    /// Backup: how long its replay may apply nothing although there is something to apply, ns. A replay that hangs is a replica that failed.
    pub replay_timeout_ns: u64,
    /// Primary: lag up to which it is not slowed, ns.
    pub lag_target_ns: u64,
    /// Primary: lag at which it stands still, ns.
    pub lag_limit_ns: u64,
}

impl Timing {
    /// Bytes of its encoding.
    pub(crate) const BYTES: usize = 44;

    /// Silence after which the peer is suspected, ns.
    #[must_use]
    pub fn silence_ns(&self) -> u64 {
        self.heartbeat_interval_ns * u64::from(self.heartbeat_misses)
    }

    /// Whether a pair can live with these times.
    ///
    /// # Errors
    /// What is wrong, with the options of `ft-log` that it is about.
    pub fn check(&self) -> Result<(), String> {
        let ranges = [
            ("heartbeat-interval-ms", self.heartbeat_interval_ns, 1, 60_000),
            ("channel-timeout-ms", self.channel_timeout_ns, 1, 600_000),
            ("replay-timeout-ms", self.replay_timeout_ns, 100, 3_600_000),
            ("lag-target-ms", self.lag_target_ns, 1, 600_000),
            ("lag-limit-ms", self.lag_limit_ns, 1, 600_000),
        ];
        for (name, ns, least, most) in ranges {
            if !(least * MS..=most * MS).contains(&ns) {
                return Err(format!("--{name} must be in {least}..={most}"));
            }
        }
        if !(2..=10_000).contains(&self.heartbeat_misses) {
            return Err("--heartbeat-misses must be in 2..=10000".into());
        }
        if self.channel_timeout_ns < HEARTBEATS_PER_CHANNEL_TIMEOUT * self.heartbeat_interval_ns {
            return Err(format!(
                "--channel-timeout-ms must be at least {HEARTBEATS_PER_CHANNEL_TIMEOUT} times --heartbeat-interval-ms: heartbeats tell why a channel stands still"
            ));
        }
        if self.lag_target_ns > self.lag_limit_ns {
            return Err("--lag-target-ms must not be above --lag-limit-ms".into());
        }
        Ok(())
    }

    pub(crate) fn put(&self, out: &mut BodyWriter<'_>) {
        out.u64(self.heartbeat_interval_ns);
        out.u32(self.heartbeat_misses);
        out.u64(self.channel_timeout_ns);
        out.u64(self.replay_timeout_ns);
        out.u64(self.lag_target_ns);
        out.u64(self.lag_limit_ns);
    }

    /// `None` for times that no pair can live with.
    pub(crate) fn take(body: &mut BodyReader<'_>) -> Option<Self> {
        let timing = Self {
            heartbeat_interval_ns: body.u64()?,
            heartbeat_misses: body.u32()?,
            channel_timeout_ns: body.u64()?,
            replay_timeout_ns: body.u64()?,
            lag_target_ns: body.u64()?,
            lag_limit_ns: body.u64()?,
        };
        timing.check().is_ok().then_some(timing)
    }
}

/// What tests of other modules encode.
#[cfg(test)]
pub(crate) const EXAMPLE: Timing = Timing {
    heartbeat_interval_ns: 20 * MS,
    heartbeat_misses: 10,
    channel_timeout_ns: 1000 * MS,
    replay_timeout_ns: 10_000 * MS,
    lag_target_ns: 100 * MS,
    lag_limit_ns: 1000 * MS,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_no_pair_can_live_with_are_refused_by_name() {
        let good = EXAMPLE;
        assert_eq!((good.check(), good.silence_ns()), (Ok(()), 200 * MS));
        let bad = |change: fn(&mut Timing)| {
            let mut timing = good;
            change(&mut timing);
            timing.check().unwrap_err()
        };
        for (change, option) in [
            (
                (|t| t.heartbeat_interval_ns = 0) as fn(&mut Timing),
                "--heartbeat-interval-ms",
            ),
            (|t| t.heartbeat_misses = 1, "--heartbeat-misses"),
            (|t| t.channel_timeout_ns = 79 * MS, "--channel-timeout-ms"),
            (|t| t.channel_timeout_ns = u64::MAX, "--channel-timeout-ms"),
            (|t| t.replay_timeout_ns = MS, "--replay-timeout-ms"),
            (|t| t.lag_target_ns = 1001 * MS, "--lag-target-ms"),
            (|t| t.lag_limit_ns = 601_000 * MS, "--lag-limit-ms"),
        ] {
            let reason = bad(change);
            assert!(reason.starts_with(option), "{reason}");
        }
    }
}
