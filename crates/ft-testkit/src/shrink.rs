//! From a failing plan to the shortest history that still shows the failure.
//!
//! Greedy: leaves one fault after the other out, then requests, for as long as the same invariant fails.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{
    checkers::{Failure, Invariant},
    faults::Plan,
    world::{Line, Options, Outcome, run},
};

/// A failing plan that cannot lose anything more.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// What is left of the plan.
    pub plan: Plan,
    /// The numbers, in the seed's plan, of the faults that are left.
    pub kept: Vec<usize>,
    /// How it ends, with its history.
    pub outcome: Outcome,
}

/// Runs a plan; a panic of the core is a failure like any other, where panics unwind.
#[must_use]
pub fn judge(plan: &Plan, options: Options) -> Outcome {
    catch_unwind(AssertUnwindSafe(|| run(plan, options))).unwrap_or_else(|panic| {
        let detail = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default();
        Outcome {
            failure: Some(Failure {
                invariant: Invariant::CoreAssertion,
                at_ns: 0,
                detail,
            }),
            ..Outcome::default()
        }
    })
}

/// Shrinks a plan that fails with `invariant`.
#[must_use]
pub fn shrink(plan: &Plan, options: Options, invariant: Invariant) -> Shrunk {
    let fails = |plan: &Plan| {
        let failure = judge(plan, options).failure;
        failure.is_some_and(|failure| failure.invariant == invariant)
    };
    let mut plan = plan.clone();
    let mut kept: Vec<usize> = (0..plan.faults.len()).collect();
    loop {
        let before = (plan.faults.len(), plan.setting.requests, plan.setting.clients);
        let mut number = 0;
        while number < plan.faults.len() {
            let mut smaller = plan.clone();
            smaller.faults.remove(number);
            if fails(&smaller) {
                plan = smaller;
                kept.remove(number);
            } else {
                number += 1;
            }
        }
        for change in [
            (|plan: &mut Plan| plan.setting.clients = 1) as fn(&mut Plan),
            |plan| plan.setting.requests = (plan.setting.requests / 2).max(1),
            |plan| plan.setting.requests = (plan.setting.requests - 1).max(1),
        ] {
            let mut smaller = plan.clone();
            change(&mut smaller);
            if fails(&smaller) {
                plan = smaller;
            }
        }
        if before == (plan.faults.len(), plan.setting.requests, plan.setting.clients) {
            break;
        }
    }
    let outcome = judge(&plan, Options { trace: true, ..options });
    Shrunk { plan, kept, outcome }
}

/// The first line of a history's table.
#[must_use]
pub fn table_head() -> String {
    format!("{:>12}  {:<36}{:<36}{}\n", "µs", "A", "B", "world")
}

/// The history as a table.
#[must_use]
pub fn table(history: &[Line]) -> String {
    let lines = history.iter().map(Line::to_string);
    table_head() + &lines.collect::<String>()
}
