//! `cargo test -p ft-testkit --features control-...`: a core with a promise switched off does not pass.

#![cfg(any(feature = "control-no-hold", feature = "control-no-arbiter"))]

use ft_testkit::{
    Invariant, Options, Plan, crash_points,
    shrink::{judge, shrink},
};

const EXPECTED: Invariant = if cfg!(feature = "control-no-hold") {
    Invariant::ReleasedIsStored
} else {
    Invariant::OneLiveSide
};

#[test]
fn some_seed_shows_it_and_its_history_can_be_read() {
    let options = Options::default();
    let fails = |seed: &u64| {
        let failure = judge(&Plan::from_seed(*seed), options).failure;
        failure.is_some_and(|failure| failure.invariant == EXPECTED)
    };
    let seed = (0..300).find(fails).expect("300 seeds show it");
    let shrunk = shrink(&Plan::from_seed(seed), options, EXPECTED);
    assert!(!shrunk.outcome.history.is_empty());
}

#[test]
fn some_crash_point_shows_it() {
    let all = crash_points::enumerate(None);
    let shown = |failure: &ft_testkit::Failure| failure.invariant == EXPECTED;
    assert!(
        all.broken
            .iter()
            .any(|broken| broken.outcome.failure.as_ref().is_some_and(shown))
    );
}
