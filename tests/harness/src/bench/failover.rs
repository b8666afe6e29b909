//! How long clients hear nothing when the primary dies.

use std::path::Path;

use crate::bench::row::Row;
use crate::bench::stats::{median, range};
use crate::error::{HarnessError, IoContext};
use crate::faults::{Fault, FaultPlan, Moment};
use crate::scenario::{self, Setup};

/// Records of a run, and how many are sent a second: the primary dies in the middle third.
const RECORDS: u64 = 240;
const RATE: u32 = 250;

/// When the peer is suspected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Milliseconds between two heartbeats.
    pub interval_ms: u32,
    /// Missed heartbeats.
    pub misses: u32,
}

impl Heartbeat {
    /// What ft-log does when it is not told.
    pub const DEFAULT: Self = Self {
        interval_ms: 20,
        misses: 10,
    };
    /// For hosts and networks that are never late.
    pub const FAST: Self = Self {
        interval_ms: 5,
        misses: 10,
    };

    /// Silence until suspicion.
    #[must_use]
    pub fn detection_ms(self) -> f64 {
        f64::from(self.interval_ms) * f64::from(self.misses)
    }

    fn arguments(self) -> Vec<String> {
        vec![
            "--heartbeat-interval-ms".to_owned(),
            self.interval_ms.to_string(),
            "--heartbeat-misses".to_owned(),
            self.misses.to_string(),
        ]
    }
}

/// What the runs of one setting showed.
#[derive(Debug, Default)]
pub struct Failovers {
    gaps_ms: Vec<f64>,
    detect_ms: Vec<f64>,
    live_ms: Vec<f64>,
    /// Runs the witness or the roles were not content with.
    pub bad: Vec<String>,
}

/// Loses the primary once for each seed.
///
/// # Errors
/// When a run cannot be carried out. A run that goes wrong is no error: see [`Failovers::bad`].
pub fn runs(setup: &Setup, heartbeat: Heartbeat, seeds: u64, parent: &Path) -> Result<Failovers, HarnessError> {
    let mut seen = Failovers::default();
    for seed in 1..=seeds {
        let directory =
            tempfile::TempDir::new_in(parent).context(|| format!("create a directory in {}", parent.display()))?;
        let setup = Setup {
            seed,
            records: RECORDS,
            rate: RATE,
            plan: FaultPlan::At(Fault::KillPrimary, Moment::seeded(seed, RECORDS, RATE)),
            ft_log_arguments: heartbeat.arguments(),
            ..setup.clone()
        };
        let report = scenario::run(&setup, directory.path())?.report;
        if !report.good() {
            seen.bad.push(format!("seed {seed}: {}", report.problems.join("; ")));
            continue;
        }
        seen.gaps_ms.extend(report.gap_ms_max);
        seen.detect_ms.extend(report.detect_ms);
        seen.live_ms.extend(report.go_live_ms);
    }
    Ok(seen)
}

impl Failovers {
    /// Median and worst.
    #[must_use]
    pub fn rows(&self, heartbeat: Heartbeat, seeds: u64) -> Vec<Row> {
        let Heartbeat { interval_ms, misses } = heartbeat;
        let setting = if heartbeat == Heartbeat::DEFAULT {
            String::new()
        } else {
            format!(", {interval_ms} ms x {misses}")
        };
        let bad = match self.bad.len() {
            0 => String::new(),
            bad => format!("; {bad} runs went wrong and are not counted"),
        };
        let conditions = format!(
            "kill-primary, seeds 1 to {seeds}, {RATE} records/s; longest time between two answers ({} ms); suspected after \
             {:.0} ms, live after {:.0} ms (medians){bad}; peer: the silence until suspicion that is configured, \
             {interval_ms} ms x {misses}; aim: 300 ms",
            range(&self.gaps_ms),
            median(&self.detect_ms),
            median(&self.live_ms),
        );
        let worst = self.gaps_ms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        [("median", median(&self.gaps_ms)), ("worst", worst)]
            .into_iter()
            .map(|(which, gap)| {
                let name = format!("failover gap{setting}, {which} of {seeds}");
                Row::new(name, gap, heartbeat.detection_ms(), "ms", conditions.clone())
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_median_and_worst() {
        let seen = Failovers {
            gaps_ms: vec![210.0, 250.0, 220.0],
            ..Failovers::default()
        };
        let rows = seen.rows(Heartbeat::DEFAULT, 3);
        assert_eq!(rows[0].name, "failover gap, median of 3");
        assert_eq!((rows[0].ours, rows[0].peer, rows[0].ratio), (220.0, 200.0, 1.1));
        assert_eq!(rows[1].ours, 250.0);
        assert_eq!(
            seen.rows(Heartbeat::FAST, 3)[0].name,
            "failover gap, 5 ms x 10, median of 3"
        );
    }
}
