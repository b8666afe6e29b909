//! The pace of a primary whose backup lags: at stop points the vCPU pauses for the share of its time that `ft-log` asks for.
//!
//! ```text
//!   ran 3 ms ──► throttle 250 ‰ ──► pauses 1 ms ──► runs ...        1000 ‰: pauses until that changes
//! ```

use ft_protocol::limits::THROTTLE_MAX;

/// Shorter pauses are saved up: a sleep is not more exact than that.
const PAUSE_NS_MIN: u64 = 1_000_000;
/// Time between two stop points that counts as execution; what is longer was mostly idleness.
const RAN_NS_MAX: u64 = 10_000_000;
/// How long a vCPU that must stand still sleeps before it is asked again.
const STANDSTILL_NS: u64 = 100_000_000;

/// When the vCPU ran, and how long it must pause for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    resumed_ns: u64,
    /// The pause under way: since when, and for how much execution.
    pause: Option<(u64, u64)>,
}

impl Pace {
    /// How long the vCPU must still pause at `now_ns`; 0 lets it run. Ask again after that time, or when something changed.
    pub fn pause_ns(&mut self, now_ns: u64, permille: u32) -> u64 {
        let (since_ns, ran_ns) = self
            .pause
            .unwrap_or((now_ns, now_ns.saturating_sub(self.resumed_ns).min(RAN_NS_MAX)));
        let runs = u64::from(THROTTLE_MAX.saturating_sub(permille));
        let due_ns = match runs {
            0 => now_ns.saturating_sub(since_ns) + STANDSTILL_NS,
            _ => ran_ns * u64::from(permille) / runs,
        };
        let left_ns = (since_ns + due_ns).saturating_sub(now_ns);
        if self.pause.is_some() && left_ns == 0 {
            self.pause = None;
            self.resumed_ns = now_ns;
        } else if self.pause.is_none() && due_ns >= PAUSE_NS_MIN {
            self.pause = Some((since_ns, ran_ns));
        } else if self.pause.is_none() {
            return 0;
        }
        left_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// A vCPU with a stop point every 100 µs, for one second: how much of it it ran.
    fn ran_ms(permille: u32) -> u64 {
        let (mut pace, mut now_ns, mut ran_ns) = (Pace::default(), 0, 0);
        while now_ns < 1000 * MS {
            now_ns += MS / 10;
            ran_ns += MS / 10;
            loop {
                let pause_ns = pace.pause_ns(now_ns, permille);
                if pause_ns == 0 {
                    break;
                }
                // Woken a little early, or a little late.
                now_ns += if now_ns % 3 == 0 { pause_ns } else { pause_ns / 2 + 1 };
                if now_ns >= 1000 * MS {
                    break;
                }
            }
        }
        ran_ns / MS
    }

    #[test]
    fn the_vcpu_runs_for_the_share_of_its_time_that_it_may() {
        assert_eq!(ran_ms(0), 1000);
        for permille in [100, 250, 500, 900] {
            let expected = u64::from(1000 - permille);
            let ran = ran_ms(permille);
            assert!(ran.abs_diff(expected) <= 20, "{ran} ms at {permille} ‰");
        }
    }

    #[test]
    fn at_the_limit_it_stands_still_until_that_changes() {
        let mut pace = Pace::default();
        for now_ns in [5 * MS, 500 * MS, 5000 * MS] {
            assert!(pace.pause_ns(now_ns, THROTTLE_MAX) > 0);
        }
        assert_eq!(pace.pause_ns(5001 * MS, 0), 0);
        assert_eq!(pace.pause_ns(5001 * MS, 500), 0, "it has not run since");
    }

    #[test]
    fn idleness_is_not_paid_for() {
        let mut pace = Pace::default();
        assert!(pace.pause_ns(60_000 * MS, 500) <= RAN_NS_MAX);
    }
}
