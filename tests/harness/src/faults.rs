//! What is done to the pair, and when.
//!
//! A killed host is one whose power cord and cables are pulled: first both of its cables leave the switch, so that no
//! kernel can tidy up its connections, then everything on it gets SIGKILL at once. A partition cuts the logging wire
//! only: both hosts live, the LAN works, and each thinks the other dead.

use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::clock::now_ns;
use crate::error::HarnessError;
use crate::process::HostProcesses;
use crate::topology::{HostId, Topology};

/// The faults of the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// Nothing: the run ends with an orderly power-off.
    None,
    /// The primary's host loses its power.
    KillPrimary,
    /// The backup's host loses its power.
    KillBackup,
    /// The logging wire is cut.
    Partition,
}

impl Fault {
    /// Its name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::KillPrimary => "kill-primary",
            Self::KillBackup => "kill-backup",
            Self::Partition => "partition",
        }
    }
}

/// When a fault strikes: so long after so many answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Answered records before it.
    pub answers: u64,
    /// And this much later, so that it strikes anywhere between two requests.
    pub offset: Duration,
}

impl Moment {
    /// A moment in the middle third of a run, chosen by the seed.
    #[must_use]
    pub fn seeded(seed: u64, records: u64, rate: u32) -> Self {
        let mut chance = ChaCha8Rng::seed_from_u64(seed);
        let first = (records / 3).max(1);
        let last = (records * 2 / 3).max(first);
        let interval_us = 1_000_000 / u64::from(rate.max(1));
        Self {
            answers: chance.random_range(first..=last),
            offset: Duration::from_micros(chance.random_range(0..=interval_us)),
        }
    }
}

/// What is done in a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultPlan {
    /// One of the demo's faults.
    At(Fault, Moment),
    /// The processes of `host` are built to kill their host when they reach a point for the n-th time.
    CrashPoint {
        /// The host that dies.
        host: HostId,
        /// `POINT:NTH`, handed on in `FT_CRASH_AT`.
        at: String,
    },
    /// The wire is cut; the primary dies only when the client has sent so many requests more. Whatever was answered in
    /// between was answered without the backup.
    CutThenKill {
        /// When the wire is cut.
        moment: Moment,
        /// Requests between the cut and the death.
        requests: u64,
    },
}

/// Who must be left at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Both, ending in an orderly way; the backup never live.
    Both,
    /// This host alone; the other one is dead.
    Only(HostId),
    /// Exactly one of them; the other one halted.
    One,
}

impl FaultPlan {
    /// Its name in reports.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::At(fault, _) => fault.name().to_owned(),
            Self::CrashPoint { host, at } => format!("crash {host} at {at}"),
            Self::CutThenKill { .. } => "cut-then-kill".to_owned(),
        }
    }

    /// Who must be left at the end.
    #[must_use]
    pub fn expected(&self) -> Expected {
        match self {
            Self::At(Fault::None, _) => Expected::Both,
            Self::At(Fault::KillPrimary, _) | Self::CutThenKill { .. } => Expected::Only(HostId::B),
            Self::At(Fault::KillBackup, _) => Expected::Only(HostId::A),
            Self::At(Fault::Partition, _) => Expected::One,
            Self::CrashPoint { host, .. } => Expected::Only(host.peer()),
        }
    }

    /// The host that dies by this plan, if one does.
    #[must_use]
    pub fn victim(&self) -> Option<HostId> {
        match self.expected() {
            Expected::Only(survivor) => Some(survivor.peer()),
            Expected::Both | Expected::One => None,
        }
    }
}

/// Pulls the power cord of a host; says when.
///
/// # Errors
/// When the switch refuses.
pub fn kill_host(topology: &Topology, host: HostId, processes: &HostProcesses) -> Result<u64, HarnessError> {
    let t_ns = now_ns();
    topology.unplug(host)?;
    processes.kill();
    Ok(t_ns)
}

/// Cuts the logging wire; says when.
///
/// # Errors
/// When the switch refuses.
pub fn partition(topology: &Topology) -> Result<u64, HarnessError> {
    let t_ns = now_ns();
    topology.cut_wire()?;
    Ok(t_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_seed_and_in_the_middle() {
        for seed in 0..200 {
            let moment = Moment::seeded(seed, 900, 100);
            assert_eq!(moment, Moment::seeded(seed, 900, 100));
            assert!((300..=600).contains(&moment.answers), "seed {seed}: {moment:?}");
            assert!(moment.offset <= Duration::from_millis(10), "seed {seed}: {moment:?}");
        }
        assert_ne!(Moment::seeded(1, 900, 100), Moment::seeded(2, 900, 100));
        assert_eq!(Moment::seeded(1, 1, 1).answers, 1);
    }
}
