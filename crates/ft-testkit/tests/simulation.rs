//! The simulator over a few hundred seeds, every crash point, and everything that must be caught.
//!
//! `ft-sim` does the same over as many seeds as one likes.

#![cfg(not(any(feature = "control-no-hold", feature = "control-no-arbiter")))]

use ft_testkit::{
    Invariant, Mutant, Options, Plan, crash_points, run,
    shrink::{judge, shrink},
};

/// Seeds that must pass.
const SEEDS: u64 = 600;
/// Seeds within which a broken promise must be seen.
const MUTANT_SEEDS: u64 = 4000;

fn with(mutant: Mutant) -> Options {
    Options {
        mutant: Some(mutant),
        ..Options::default()
    }
}

fn failures(options: Options) -> impl Iterator<Item = (u64, Invariant)> {
    (0..MUTANT_SEEDS).filter_map(move |seed| {
        let failure = judge(&Plan::from_seed(seed), options).failure?;
        Some((seed, failure.invariant))
    })
}

#[test]
fn every_seed_passes_and_they_are_worth_something() {
    let (mut failovers, mut answers, mut repairs, mut successors) = (0, 0, 0, 0);
    for seed in 0..SEEDS {
        let outcome = judge(&Plan::from_seed(seed), Options::default());
        assert_eq!(outcome.failure, None, "seed {seed}; look with: ft-sim --trace {seed}");
        failovers += outcome.failovers;
        answers += outcome.answers;
        repairs += outcome.repairs;
        successors += outcome.successors;
    }
    assert!(failovers > SEEDS as u32 / 4, "only {failovers} failovers");
    assert!(answers > 10 * SEEDS, "only {answers} answers");
    assert!(repairs > SEEDS / 8, "only {repairs} new backups");
    assert!(successors > SEEDS / 50, "only {successors} new backups took over");
}

#[test]
fn a_seed_is_one_run() {
    let options = Options {
        trace: true,
        ..Options::default()
    };
    let text = |seed| {
        let history = run(&Plan::from_seed(seed), options).history;
        history.iter().map(ToString::to_string).collect::<String>()
    };
    for seed in 0..20 {
        assert_eq!(text(seed), text(seed));
    }
    assert_ne!(text(1), text(2));
}

#[test]
fn the_scripts_survive_every_cut_at_every_crash_point() {
    let all = crash_points::enumerate(None);
    let broken: Vec<_> = all
        .broken
        .iter()
        .map(|broken| (broken.script, broken.cut, &broken.outcome.failure))
        .collect();
    assert!(broken.is_empty(), "{broken:?}");
    assert!(all.points > 1000 && all.runs > 5 * all.points && all.failovers > all.points);
}

#[test]
fn every_mutant_is_caught_by_the_checker_that_is_there_for_it() {
    for (mutant, expected) in [
        (Mutant::AckEarly, Invariant::ReleasedIsStored),
        (Mutant::ReleaseEarly, Invariant::ReleasedIsStored),
        (Mutant::IgnoreGeneration, Invariant::OneLiveSide),
        (Mutant::ArbiterSaysYesTwice, Invariant::OneLiveSide),
        (Mutant::DropTailAtGoLive, Invariant::HistoryExtends),
        (Mutant::ResendWithoutDedup, Invariant::ReplayEqual),
        (Mutant::SpeakAfterHalt, Invariant::Mute),
        (Mutant::NeverAskAgain, Invariant::Progress),
        (Mutant::HidePowerOff, Invariant::OrderlyEnd),
        (Mutant::SkipTime, Invariant::ReplayEqual),
        (Mutant::NoHeartbeats, Invariant::Calm),
        (Mutant::NoResend, Invariant::NoNeedlessHalt),
        (Mutant::NeverBreak, Invariant::Calm),
        (Mutant::AckBeforeFlush, Invariant::ReleasedIsStored),
        (Mutant::AckBeforeReplay, Invariant::ReleasedIsStored),
        (Mutant::IgnoreThrottle, Invariant::Lag),
        (Mutant::IgnoreConfiguration, Invariant::Calm),
        (Mutant::WinUnsynced, Invariant::OneLiveSide),
        (Mutant::CountUnsynced, Invariant::ReleasedIsStored),
        (Mutant::HoldLate, Invariant::ReleasedIsStored),
    ] {
        let caught = failures(with(mutant)).find(|(_, invariant)| *invariant == expected);
        assert!(
            caught.is_some(),
            "no seed in 0..{MUTANT_SEEDS} shows that {mutant} breaks '{expected}'"
        );
    }
}

#[test]
fn the_script_of_new_backups_has_two_of_them_and_one_takes_over() {
    let (_, plan) = crash_points::scripts().swap_remove(0);
    let outcome = run(&plan, Options::default());
    let seen = (outcome.failure, outcome.failovers, outcome.repairs, outcome.successors);
    assert_eq!(seen, (None, 2, 2, 1));
}

#[test]
fn crash_points_catch_what_a_crash_reveals() {
    for mutant in [
        Mutant::AckEarly,
        Mutant::ReleaseEarly,
        Mutant::DropTailAtGoLive,
        Mutant::ArbiterSaysYesTwice,
    ] {
        assert!(!crash_points::enumerate(Some(mutant)).broken.is_empty(), "{mutant}");
    }
}

#[test]
fn a_failing_seed_shrinks_to_what_it_needs() {
    let options = with(Mutant::ArbiterSaysYesTwice);
    let (seed, invariant) = failures(options)
        .find(|(seed, _)| Plan::from_seed(*seed).faults.len() > 3)
        .expect("some failing seed has many faults");
    let shrunk = shrink(&Plan::from_seed(seed), options, invariant);
    assert_eq!(shrunk.outcome.failure.map(|failure| failure.invariant), Some(invariant));
    assert!(!shrunk.outcome.history.is_empty());
    for number in 0..shrunk.plan.faults.len() {
        let mut smaller = shrunk.plan.clone();
        smaller.faults.remove(number);
        let failure = judge(&smaller, options).failure;
        assert_ne!(failure.map(|failure| failure.invariant), Some(invariant));
    }
    let all = Plan::from_seed(seed).faults;
    let kept: Vec<_> = shrunk.kept.iter().map(|number| all[*number].clone()).collect();
    assert_eq!(kept, shrunk.plan.faults);
}
