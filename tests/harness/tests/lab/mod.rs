//! What the real-process tests share: where the binaries are, and a run whose files stay when it goes wrong.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::path::PathBuf;
use std::time::Duration;

use ft_harness::faults::{FaultPlan, Moment};
use ft_harness::scenario::{self, Outcome, Setup};

/// Which build of the daemons to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Build {
    /// The one that is shipped.
    Release,
    /// A test-only one, by the name of its feature.
    Variant(&'static str),
}

impl Build {
    /// The directory of its binaries.
    pub(crate) fn directory(self) -> PathBuf {
        match self {
            Self::Release => variable("FT_BIN_DIR"),
            Self::Variant(feature) => variable("FT_VARIANTS_DIR").join(feature),
        }
    }
}

/// A path handed in by scripts/test.
pub(crate) fn variable(name: &str) -> PathBuf {
    let value = std::env::var_os(name).unwrap_or_else(|| {
        panic!("{name} is not set: scripts/test sets FT_BIN_DIR, FT_VARIANTS_DIR and FT_GUEST for these tests")
    });
    PathBuf::from(value)
}

/// A short run.
pub(crate) fn setup(build: Build, seed: u64, plan: FaultPlan) -> Setup {
    Setup {
        bin_dir: build.directory(),
        guest: variable("FT_GUEST").into(),
        seed,
        records: 120,
        rate: 150,
        plan,
        ft_log_arguments: Vec::new(),
        shim_arguments: Vec::new(),
        replay: false,
        capture: false,
        verbose: false,
    }
}

/// The wire is cut, the client goes on for fifty requests, the primary dies: what was answered in between, if anything,
/// the backup never heard of. It takes two seconds to suspect, so that neither side asks the arbiter before.
pub(crate) fn cut_then_kill(build: Build) -> Setup {
    let moment = Moment {
        answers: 50,
        offset: Duration::ZERO,
    };
    let mut setup = setup(build, 11, FaultPlan::CutThenKill { moment, requests: 50 });
    setup.ft_log_arguments = ["--heartbeat-interval-ms", "20", "--heartbeat-misses", "100"]
        .map(str::to_owned)
        .to_vec();
    setup
}

/// Carries a run out. When `satisfied` does not hold its files are kept and named.
pub(crate) fn run(setup: &Setup, satisfied: impl FnOnce(&Outcome) -> bool) -> Outcome {
    let mut directory = tempfile::Builder::new()
        .prefix("ft-lab-")
        .tempdir()
        .expect("a directory");
    let name = setup.plan.name();
    let outcome = scenario::run(setup, directory.path()).unwrap_or_else(|error| {
        directory.disable_cleanup(true);
        panic!(
            "{name}, seed {}: {error}\nfiles: {}",
            setup.seed,
            directory.path().display()
        )
    });
    println!("{}", outcome.report.text(&setup.plan));
    if !satisfied(&outcome) {
        directory.disable_cleanup(true);
        panic!(
            "{name}, seed {}:\n{}files: {}",
            setup.seed,
            outcome.report.text(&setup.plan),
            directory.path().display()
        );
    }
    outcome
}
