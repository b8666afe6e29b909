//! How far the backup's replay trails, and how much that slows the primary (paper §4.3: usually under 100 ms).
//!
//! ```text
//!  share of its time that the primary's vCPU must pause
//!  1000 ‰ ┤                      ┌────────
//!         │                   ╱
//!         │                ╱
//!     0 ‰ ┼─────────────┘
//!         0          target   limit      lag of the oldest entry that is not replayed
//! ```
//! In between the primary runs as fast as the backup replays: pausing more lets the lag fall, which pauses less.

use std::collections::VecDeque;

use crate::{
    ids::Lsn,
    limits::{LAG_SAMPLES_MAX, THROTTLE_MAX},
};

/// Entries appended within this time share one sample.
const SAMPLE_NS: u64 = 1_000_000;

/// When entries were appended, and thereby how old the oldest one is that is not replayed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Lag {
    /// First entry and time of each sample; the entries up to the next one are taken for as old.
    samples: VecDeque<(Lsn, u64)>,
    last: Lsn,
}

impl Lag {
    /// The entries up to here are nobody's to replay.
    #[must_use]
    pub fn after(last: Lsn) -> Self {
        Self {
            last,
            ..Self::default()
        }
    }

    /// Entries through `through` were appended at `now_ns`.
    pub fn appended(&mut self, through: Lsn, now_ns: u64) {
        let is_new = self
            .samples
            .back()
            .is_none_or(|(_, at)| now_ns >= at.saturating_add(SAMPLE_NS));
        // Without room the entries count as old as the last sample: the primary is slowed a little too much, not too little.
        if is_new && self.samples.len() < LAG_SAMPLES_MAX {
            self.samples.push_back((self.last.next(), now_ns));
        }
        self.last = through;
    }

    /// The backup has replayed through `lsn`.
    pub fn replayed(&mut self, lsn: Lsn) {
        if lsn >= self.last {
            self.samples.clear();
        }
        while self.samples.get(1).is_some_and(|(first, _)| *first <= lsn.next()) {
            self.samples.pop_front();
        }
    }

    /// Age of the oldest entry that is not replayed, ns; 0 if there is none.
    #[must_use]
    pub fn ns(&self, now_ns: u64) -> u64 {
        self.samples.front().map_or(0, |(_, at)| now_ns.saturating_sub(*at))
    }
}

/// The share of its time, in thousandths, that the primary must pause at this lag: 0 up to the target, everything from the
/// limit on.
#[must_use]
pub fn throttle(lag_ns: u64, target_ns: u64, limit_ns: u64) -> u32 {
    let over = lag_ns.saturating_sub(target_ns);
    let span = limit_ns.saturating_sub(target_ns).max(1);
    let share = u128::from(over) * u128::from(THROTTLE_MAX) / u128::from(span);
    (share.min(u128::from(THROTTLE_MAX))) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn the_lag_is_the_age_of_the_oldest_entry_that_is_not_replayed() {
        let mut lag = Lag::default();
        lag.appended(Lsn(3), 10 * MS);
        lag.appended(Lsn(5), 20 * MS);
        lag.appended(Lsn(9), 50 * MS);
        assert_eq!(lag.ns(60 * MS), 50 * MS);
        lag.replayed(Lsn(2));
        assert_eq!(lag.ns(60 * MS), 50 * MS);
        lag.replayed(Lsn(3));
        assert_eq!(lag.ns(60 * MS), 40 * MS);
        lag.replayed(Lsn(8));
        assert_eq!(lag.ns(60 * MS), 10 * MS);
        lag.replayed(Lsn(9));
        assert_eq!(lag.ns(60 * MS), 0);
        lag.appended(Lsn(10), 80 * MS);
        assert_eq!(lag.ns(81 * MS), MS);
    }

    #[test]
    fn samples_are_bounded_and_never_make_the_lag_look_smaller() {
        let mut lag = Lag::default();
        for lsn in 1..=100_000 {
            lag.appended(Lsn(lsn), lsn * MS);
        }
        assert_eq!(lag.samples.len(), LAG_SAMPLES_MAX);
        lag.replayed(Lsn(90_000));
        assert!(lag.ns(100_000 * MS) >= 10_000 * MS);
    }

    #[test]
    fn the_throttle_rises_smoothly_from_the_target_to_the_limit() {
        let at = |ms: u64| throttle(ms * MS, 100 * MS, 1000 * MS);
        assert_eq!((at(0), at(100), at(1000), at(50_000)), (0, 0, 1000, 1000));
        let steps: Vec<_> = (100..=1000).map(at).collect();
        assert!(steps.windows(2).all(|pair| (pair[0]..=pair[0] + 2).contains(&pair[1])));
        assert_eq!(throttle(5, 5, 5), 0);
        assert_eq!(throttle(u64::MAX, 0, u64::MAX), 1000);
    }
}
