//! Negative controls: with a promise switched off the witness must not be content. Each scenario also runs on the shipped
//! build, which must pass it: it is the promise that makes the difference.

mod lab;

use std::time::Duration;

use ft_harness::faults::{Fault, FaultPlan, Moment};
use ft_harness::roles::FT_LOG;
use ft_harness::scenario::{Outcome, Setup};
use ft_harness::topology::HostId;
use lab::{Build, run, setup};

/// The wire is cut, the client goes on for fifty requests, the primary dies: what was answered in between, if anything,
/// the backup never heard of. It takes two seconds to suspect, so that neither side asks the arbiter before.
fn cut_then_kill(build: Build) -> Setup {
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

fn partition(build: Build) -> Setup {
    let moment = Moment {
        answers: 50,
        offset: Duration::ZERO,
    };
    setup(build, 12, FaultPlan::At(Fault::Partition, moment))
}

fn live_sides(outcome: &Outcome) -> usize {
    let since = outcome.timeline.fault_ns.expect("the fault struck");
    let live = |host: &HostId| {
        outcome
            .events
            .iter()
            .any(|event| event.t_ns >= since && event.is(*host, FT_LOG, "go_live"))
    };
    HostId::BOTH.iter().filter(|host| live(host)).count()
}

#[test]
fn held_outputs_survive_a_cut_before_the_kill() {
    let outcome = run(&cut_then_kill(Build::Release), |outcome| outcome.report.good());
    assert_eq!(outcome.report.lost_acknowledged, 0);
}

#[test]
fn without_holding_acknowledged_records_are_lost() {
    let outcome = run(&cut_then_kill(Build::Variant("control-no-hold")), |outcome| {
        outcome.report.lost_acknowledged > 0
    });
    assert!(!outcome.report.good() && !outcome.report.chain_ok);
}

#[test]
fn partition_leaves_one_live_side() {
    let outcome = run(&partition(Build::Release), |outcome| outcome.report.good());
    assert_eq!(live_sides(&outcome), 1);
}

#[test]
fn without_the_arbiter_both_sides_go_live() {
    let outcome = run(&partition(Build::Variant("control-no-arbiter")), |outcome| {
        live_sides(outcome) == 2
    });
    assert!(!outcome.report.good());
}

#[test]
fn without_bounce_buffers_the_replicas_part() {
    let diverged = |outcome: &Outcome| outcome.events.iter().any(|event| event.name == "diverged");
    let moment = Moment {
        answers: 100,
        offset: Duration::ZERO,
    };
    let plan = FaultPlan::At(Fault::KillPrimary, moment);
    let outcome = run(&setup(Build::Variant("control-direct-delivery"), 13, plan), |outcome| {
        diverged(outcome) || outcome.report.forked > 0 || outcome.report.lost_acknowledged > 0
    });
    assert!(!outcome.report.good());
}
