//! The Output Rule on the wire: what the guest's frames at the switch say against the journal of the host that took over.

mod lab;

use std::time::Duration;

use ft_harness::faults::{Fault, FaultPlan, Moment};
use ft_harness::scenario::Setup;
use lab::{Build, cut_then_kill, run, setup};

/// Runs with a failover, unless FT_WIRE_SEEDS says how many.
const SEEDS: u64 = 2;

/// The primary is killed at a moment of the seed's; what passes the switch is captured from before the start.
fn captured(build: Build, seed: u64) -> Setup {
    let moment = Moment {
        answers: 0,
        offset: Duration::ZERO,
    };
    let mut setup = setup(build, seed, FaultPlan::At(Fault::KillPrimary, moment));
    let moment = Moment::seeded(seed, setup.records, setup.rate);
    setup.plan = FaultPlan::At(Fault::KillPrimary, moment);
    setup.capture = true;
    setup
}

#[test]
fn no_frame_leaves_before_its_commit() {
    let seeds = std::env::var("FT_WIRE_SEEDS").map_or(SEEDS, |text| text.parse().expect("FT_WIRE_SEEDS is a number"));
    for seed in 1..=seeds {
        let setup = captured(Build::Release, seed);
        let outcome = run(&setup, |outcome| outcome.report.good());
        let verdict = outcome.output_rule.expect("it was captured");
        // An answer to each record at least, for the third of them before the earliest moment.
        assert!(verdict.frames as u64 >= setup.records / 3, "seed {seed}: {verdict:?}");
        println!("seed {seed}: {} frames, none before its commit", verdict.frames);
    }
}

/// Nothing that is sent after the cut is ever acknowledged.
fn captured_after_a_cut(build: Build) -> Setup {
    Setup {
        capture: true,
        ..cut_then_kill(build)
    }
}

#[test]
fn no_frame_leaves_after_a_cut() {
    let outcome = run(&captured_after_a_cut(Build::Release), |outcome| outcome.report.good());
    assert!(outcome.output_rule.expect("it was captured").frames >= 50);
}

#[test]
fn without_holding_frames_leave_before_their_commit() {
    let setup = captured_after_a_cut(Build::Variant("control-no-hold"));
    let outcome = run(&setup, |outcome| {
        outcome
            .output_rule
            .as_ref()
            .is_some_and(|verdict| verdict.early + verdict.unknown > 0)
    });
    let verdict = outcome.output_rule.expect("it was captured");
    println!("{verdict:?}");
    assert!(!outcome.report.good());
}
