//! Runs seeds, the crash-point enumeration, or one seed with its history.

use std::{
    cell::Cell,
    ops::Range,
    process::{Command, ExitCode},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use clap::Parser;
use ft_testkit::{
    Invariant, Mutant, Options, Plan, crash_points, run,
    shrink::{Shrunk, shrink, table, table_head},
};

/// Failing seeds that are shrunk and printed; the others are only counted.
const PRINTED_MAX: usize = 3;

/// Simulates protected pairs under faults and judges every promise of the protocol.
#[derive(Clone, Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Seeds to run, `A..B`, B excluded.
    #[arg(long, value_parser = parse_range, default_value = "0..1000")]
    seeds: Range<u64>,
    /// Break one promise of the shell or of the arbiter.
    #[arg(long)]
    mutant: Option<Mutant>,
    /// Succeed only if an invariant failed.
    #[arg(long)]
    expect_failure: bool,
    /// Cut the scripted runs at every crash point instead of running seeds.
    #[arg(long, conflicts_with_all = ["trace", "keep"])]
    enumerate: bool,
    /// With --enumerate: all of it so many times, each with another jitter of the network and other choices of the guest.
    #[arg(long, value_name = "COUNT", default_value_t = 1, requires = "enumerate")]
    rounds: u64,
    /// Print the whole history of one seed.
    #[arg(long, value_name = "SEED")]
    trace: Option<u64>,
    /// With --trace: only these faults of the seed's plan, by number, as a failing seed prints them.
    #[arg(long, value_name = "NUMBERS", value_parser = parse_numbers, requires = "trace")]
    keep: Option<Numbers>,
    /// Threads.
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    jobs: usize,
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let parsed = text.split_once("..").and_then(|(from, to)| {
        let range = from.parse().ok()?..to.parse().ok()?;
        (range.start < range.end).then_some(range)
    });
    parsed.ok_or_else(|| format!("'{text}' is not a range of seeds such as 0..1000"))
}

/// Numbers of faults; none of them is a list too.
#[derive(Clone, Debug)]
struct Numbers(Vec<usize>);

fn parse_numbers(text: &str) -> Result<Numbers, String> {
    let numbers = text.split(',').filter(|number| !number.is_empty()).map(str::parse);
    let parsed: Result<_, _> = numbers.collect();
    parsed
        .map(Numbers)
        .map_err(|_| format!("'{text}' is not a list of numbers such as 0,3,4"))
}

thread_local! {
    static SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

#[derive(Debug, Default)]
struct Total {
    happenings: AtomicU64,
    failovers: AtomicU64,
    repairs: AtomicU64,
    successors: AtomicU64,
    outputs: AtomicU64,
    answers: AtomicU64,
    virtual_ns: AtomicU64,
    failed: Mutex<Vec<(u64, Invariant)>>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    report_panics(&arguments);
    let failed = if let Some(seed) = arguments.trace {
        trace(&arguments, seed)
    } else if arguments.enumerate {
        enumerate(&arguments)
    } else {
        seeds(&arguments)
    };
    if failed == arguments.expect_failure {
        ExitCode::SUCCESS
    } else {
        if arguments.expect_failure {
            eprintln!("ft-sim: nothing failed, and a failure was expected");
        }
        ExitCode::FAILURE
    }
}

fn options(arguments: &Arguments) -> Options {
    Options {
        mutant: arguments.mutant,
        ..Options::default()
    }
}

// ---- seeds -----------------------------------------------------------------------------------------------------------

fn seeds(arguments: &Arguments) -> bool {
    let begun = Instant::now();
    let total = Total::default();
    let next = AtomicU64::new(arguments.seeds.start);
    std::thread::scope(|scope| {
        for _ in 0..arguments.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= arguments.seeds.end {
                        break;
                    }
                    one_seed(seed, options(arguments), &total);
                }
            });
        }
    });
    let mut failed = total.failed.into_inner().expect("no thread panicked");
    failed.sort_unstable();
    for (seed, invariant) in failed.iter().take(PRINTED_MAX) {
        SEED.set(Some(*seed));
        let shrunk = shrink(&Plan::from_seed(*seed), options(arguments), *invariant);
        print_failure(*seed, arguments.mutant, &shrunk);
    }
    let seeds = arguments.seeds.end - arguments.seeds.start;
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{seeds} seeds, {} events, {} failovers, {} new backups, {} of them live, {} outputs, {} answers, {:.0} s virtual, {seconds:.2} s, {:.0} seeds/s",
        total.happenings.into_inner(),
        total.failovers.into_inner(),
        total.repairs.into_inner(),
        total.successors.into_inner(),
        total.outputs.into_inner(),
        total.answers.into_inner(),
        total.virtual_ns.into_inner() as f64 / 1e9,
        seeds as f64 / seconds,
    );
    print_verdict(seeds, failed.len() as u64);
    !failed.is_empty()
}

fn one_seed(seed: u64, options: Options, total: &Total) {
    SEED.set(Some(seed));
    let outcome = run(&Plan::from_seed(seed), options);
    total.happenings.fetch_add(outcome.happenings, Ordering::Relaxed);
    total
        .failovers
        .fetch_add(u64::from(outcome.failovers), Ordering::Relaxed);
    total.repairs.fetch_add(outcome.repairs, Ordering::Relaxed);
    total.successors.fetch_add(outcome.successors, Ordering::Relaxed);
    total.outputs.fetch_add(outcome.outputs, Ordering::Relaxed);
    total.answers.fetch_add(outcome.answers, Ordering::Relaxed);
    total.virtual_ns.fetch_add(outcome.virtual_ns, Ordering::Relaxed);
    if let Some(failure) = outcome.failure {
        let mut failed = total.failed.lock().expect("no thread panicked");
        failed.push((seed, failure.invariant));
    }
}

fn print_failure(seed: u64, mutant: Option<Mutant>, shrunk: &Shrunk) {
    let failure = shrunk
        .outcome
        .failure
        .as_ref()
        .expect("it fails, that is why it was shrunk");
    println!("seed {seed} failed: {}", failure.invariant);
    println!("  at {} µs: {}", failure.at_ns / 1000, failure.detail);
    let kept: Vec<_> = shrunk.kept.iter().map(usize::to_string).collect();
    let of = Plan::from_seed(seed).faults.len();
    println!("  {} of {of} faults are needed for it", kept.len());
    for (number, event) in shrunk.kept.iter().zip(&shrunk.plan.faults) {
        println!("  fault {number} at {} µs: {}", event.at_ns / 1000, event.fault);
    }
    print!("{}", table(&shrunk.outcome.history));
    let mutant = mutant.map_or(String::new(), |mutant| format!(" --mutant {mutant}"));
    println!("again: ft-sim --trace {seed} --keep '{}'{mutant}\n", kept.join(","));
}

fn print_verdict(runs: u64, failed: u64) {
    println!("{} passed, {failed} failed", runs - failed);
}

// ---- one seed --------------------------------------------------------------------------------------------------------

fn trace(arguments: &Arguments, seed: u64) -> bool {
    SEED.set(Some(seed));
    let mut plan = Plan::from_seed(seed);
    if let Some(Numbers(keep)) = &arguments.keep {
        let mut number = 0..;
        plan.faults
            .retain(|_| number.next().is_some_and(|number| keep.contains(&number)));
    }
    println!("{:?}", plan.setting);
    print!("{}", table_head());
    let outcome = run(
        &plan,
        Options {
            print: true,
            ..options(arguments)
        },
    );
    if let Some(failure) = &outcome.failure {
        println!("seed {seed} failed: {}", failure.invariant);
        println!("  at {} µs: {}", failure.at_ns / 1000, failure.detail);
    }
    print_verdict(1, u64::from(outcome.failure.is_some()));
    outcome.failure.is_some()
}

// ---- crash points ----------------------------------------------------------------------------------------------------

fn enumerate(arguments: &Arguments) -> bool {
    let begun = Instant::now();
    let mut all = crash_points::Enumeration::default();
    for round in 0..arguments.rounds {
        let of_round = crash_points::enumerate_round(arguments.mutant, round);
        if !of_round.broken.is_empty() {
            println!("round {round}:");
        }
        all.add(of_round);
    }
    for broken in all.broken.iter().take(PRINTED_MAX) {
        let failure = broken.outcome.failure.as_ref().expect("it is broken");
        println!(
            "script '{}', cut {:?}: {}",
            broken.script, broken.cut, failure.invariant
        );
        println!("  at {} µs: {}", failure.at_ns / 1000, failure.detail);
        print!("{}", table(&broken.outcome.history));
    }
    println!(
        "{} crash points, {} runs, {} failovers, {:.2} s",
        all.points,
        all.runs,
        all.failovers,
        begun.elapsed().as_secs_f64()
    );
    print_verdict(all.runs, all.broken.len() as u64);
    !all.broken.is_empty()
}

// ---- assertions of the core ------------------------------------------------------------------------------------------

/// A panic aborts a shipped build, and this one too. Says which seed it was, and looks for the shortest history by running
/// itself with fewer faults.
fn report_panics(arguments: &Arguments) {
    let usual = std::panic::take_hook();
    let arguments = arguments.clone();
    let first = Mutex::new(());
    std::panic::set_hook(Box::new(move |panic| {
        // The other threads may find the same bug; one report is enough.
        let Ok(_only) = first.lock() else { return };
        usual(panic);
        let tracing = arguments.trace.is_some();
        let Some(seed) = SEED.get().filter(|_| !tracing) else {
            return;
        };
        println!("seed {seed} failed: {}", Invariant::CoreAssertion);
        let mut kept: Vec<usize> = (0..Plan::from_seed(seed).faults.len()).collect();
        for number in kept.clone() {
            let fewer: Vec<usize> = kept.iter().copied().filter(|other| *other != number).collect();
            if dies(&arguments, seed, &fewer) {
                kept = fewer;
            }
        }
        println!("again: ft-sim --trace {seed} --keep '{}'", join(&kept));
        print_verdict(1, 1);
        std::process::exit(i32::from(!arguments.expect_failure));
    }));
}

fn join(numbers: &[usize]) -> String {
    let numbers: Vec<_> = numbers.iter().map(usize::to_string).collect();
    numbers.join(",")
}

fn dies(arguments: &Arguments, seed: u64, keep: &[usize]) -> bool {
    let Ok(program) = std::env::current_exe() else {
        return false;
    };
    let mut command = Command::new(program);
    command.args(["--trace", &seed.to_string(), "--keep", &join(keep)]);
    if let Some(mutant) = arguments.mutant {
        command.args(["--mutant", mutant.name()]);
    }
    // An abort has no exit code; a failed invariant has one.
    command.output().is_ok_and(|output| output.status.code().is_none())
}
