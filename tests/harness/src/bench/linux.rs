//! What protection costs a stock Linux: compile-like work recorded with a live backup and alone, its log, its failover under load.
//!
//! Times are the lab's own where it runs there: an emulated machine with one processor for both hosts. Only ratios mean anything.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::bench::lockstep::{Logged, Sample};
use crate::bench::machine::{Machine, Protection};
use crate::bench::row::Row;
use crate::clock::{ms, now_ns};
use crate::error::{HarnessError, IoContext};
use crate::events::{CONSOLE, Event};
use crate::faults::{Fault, FaultPlan, Moment};
use crate::guest::{Guest, Linux, Work};
use crate::pair::PairSetup;
use crate::roles::{FT_LOG, PROCESSES, SHIM};
use crate::scenario::{self, Outcome, Setup};
use crate::topology::HostId;

/// Rounds of the compile-like work.
const ROUNDS: u32 = 6;
/// What the guest does first: nothing, for less than the init's pause before the work.
const IDLE: Duration = Duration::from_secs(10);
/// The failover: records, records a second, and a load that outlives them.
const RECORDS: u64 = 60;
const RATE: u32 = 3;
const LOAD_SECONDS: u32 = 60;

/// One machine's work.
struct Run {
    /// From the line that says it begins to the one that says it is done.
    seconds: f64,
    /// Processor time that host A's processes took for it.
    processor_seconds: f64,
    idle: Logged,
    busy: Logged,
}

fn guest(linux: &Linux, work: Work) -> Guest {
    Guest::Linux(Linux {
        work: Some(work),
        ..linux.clone()
    })
}

/// What recording with a live backup costs the compile-like work, and its log.
///
/// # Errors
/// When a machine does not boot or its work does not end.
pub fn costs(setup: &PairSetup, linux: &Linux, parent: &Path) -> Result<Vec<Row>, HarnessError> {
    let working = PairSetup {
        guest: guest(linux, Work::Compile { rounds: ROUNDS }),
        ..setup.clone()
    };
    let alone = run(&working, Protection::Alone, parent)?;
    let pair = run(&working, Protection::Pair, parent)?;
    Ok(cost_rows(&pair, &alone))
}

/// The primary killed under load, and what was wrong with that.
///
/// # Errors
/// When the machine does not boot.
pub fn failover(setup: &Setup, linux: &Linux, parent: &Path) -> Result<(Vec<Row>, Vec<String>), HarnessError> {
    let failover = Setup {
        guest: guest(linux, Work::Everything { seconds: LOAD_SECONDS }),
        records: RECORDS,
        rate: RATE,
        plan: FaultPlan::At(Fault::KillPrimary, Moment::seeded(setup.seed, RECORDS, RATE)),
        ..setup.clone()
    };
    let directory = tempfile::TempDir::new_in(parent).context(|| "create a directory for the run".to_owned())?;
    let outcome = scenario::run(&failover, directory.path())?;
    Ok((failover_rows(&outcome), outcome.report.problems))
}

fn run(setup: &PairSetup, protection: Protection, parent: &Path) -> Result<Run, HarnessError> {
    let machine = Machine::boot(setup, protection, parent)?;
    let deadline = Instant::now() + setup.guest.patience().boot;
    let before = Sample::first(&machine, now_ns())?;
    // This is what is measured, not a wait for something: a machine left alone for so long.
    thread::sleep(IDLE);
    let idle = Sample::first(&machine, now_ns())?.since(before);
    wait_for_line(&machine, "load: compile: begins", deadline)?;
    let begun = (now_ns(), processor_seconds(&machine)?);
    let before = Sample::first(&machine, begun.0)?;
    wait_for_line(&machine, "load: compile: done", deadline)?;
    let ended = (now_ns(), processor_seconds(&machine)?);
    let busy = Sample::first(&machine, ended.0)?.since(before);
    Ok(Run {
        seconds: ms(ended.0 - begun.0) / 1e3,
        processor_seconds: ended.1 - begun.1,
        idle,
        busy,
    })
}

fn wait_for_line(machine: &Machine, text: &str, deadline: Instant) -> Result<(), HarnessError> {
    let said = |event: &Event| {
        let line = event.text("text");
        event.host == HostId::A && event.source == CONSOLE && line.is_some_and(|line| line.contains(text))
    };
    let awaited = format!("the console line `{text}`");
    machine.pair.wait_for(&awaited, HostId::A, SHIM, deadline, |events| {
        events.iter().any(said).then_some(())
    })
}

/// What host A's processes have used so far, in user and kernel mode.
fn processor_seconds(machine: &Machine) -> Result<f64, HarnessError> {
    let ticks_a_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)
        .ok()
        .flatten()
        .and_then(|ticks| u32::try_from(ticks).ok())
        .unwrap_or(100);
    let mut ticks = 0;
    for index in 0..PROCESSES.len() {
        let process = machine.pair.host(HostId::A).process_id(index).expect("all are started");
        let path = format!("/proc/{process}/stat");
        let stat = fs::read_to_string(&path).context(|| format!("read {path}"))?;
        ticks += used_ticks(&stat);
    }
    Ok(f64::from(ticks) / f64::from(ticks_a_second))
}

/// utime and stime of a /proc/PID/stat line; the name in it may contain anything.
fn used_ticks(stat: &str) -> u32 {
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields = after_name.split_whitespace().skip(11).take(2);
    fields.filter_map(|field| field.parse::<u32>().ok()).sum()
}

fn cost_rows(pair: &Run, alone: &Run) -> Vec<Row> {
    let peer = "peer: the same machine alone, nothing sent or held";
    let work = format!("{ROUNDS} rounds of 40 files written, tar, gzip, SHA-256, removed");
    let rate = |run: &Run| f64::from(ROUNDS) / run.seconds;
    let mbit_s = |logged: Logged| logged.bytes * 8.0 / 1e6 / logged.seconds;
    vec![
        Row::new(
            "compile-like work, rounds a second",
            rate(pair),
            rate(alone),
            "1/s",
            format!("{work}; {peer}, whose backup takes no share of the processor"),
        ),
        Row::new(
            "the same work, processor time of the primary",
            pair.processor_seconds,
            alone.processor_seconds,
            "s",
            format!("the four processes of host A; {peer}"),
        ),
        Row::new(
            "log, idle",
            mbit_s(pair.idle),
            mbit_s(pair.busy),
            "Mbit/s",
            format!(
                "booted, no requests, {:.0} s, {:.0} entries/s; peer: under the work",
                pair.idle.seconds,
                pair.idle.entries / pair.idle.seconds
            ),
        ),
        Row::new(
            "log, under the work",
            mbit_s(pair.busy),
            mbit_s(alone.busy),
            "Mbit/s",
            format!("{:.0} entries/s; {peer}", pair.busy.entries / pair.busy.seconds),
        ),
    ]
}

fn failover_rows(outcome: &Outcome) -> Vec<Row> {
    let timeline = &outcome.timeline;
    let since_fault = |t_ns: Option<u64>| Some(ms(t_ns?.saturating_sub(timeline.fault_ns?)));
    let answers = outcome
        .transcript
        .appends()
        .filter_map(|exchange| Some(exchange.answer.as_ref()?.1));
    let first = answers
        .filter(|t_ns| Some(*t_ns) > timeline.fault_ns && Some(*t_ns) > timeline.go_live_ns)
        .min();
    let (Some(detected), Some(live), Some(answered)) = (
        since_fault(timeline.detect_ns),
        since_fault(timeline.go_live_ns),
        since_fault(first),
    ) else {
        return Vec::new();
    };
    let load = "hog, compile, forks, disk and a download at once";
    let mut rows = vec![
        Row::new(
            "kill to first answer, under load",
            answered,
            detected,
            "ms",
            format!("{load}; peer: kill to suspicion"),
        ),
        Row::new(
            "replay left at the suspicion, under load",
            live - detected,
            detected,
            "ms",
            "until the backup is live: what it trailed the primary; peer: kill to suspicion".to_owned(),
        ),
    ];
    let exits = |event: &&Event| event.is(HostId::B, SHIM, "live") && event.number("exits") > Some(0);
    let begun = |event: &&Event| event.is(HostId::A, SHIM, "live");
    if let (Some(live), Some(begun)) = (outcome.events.iter().find(exits), outcome.events.iter().find(begun))
        && let (Some(exits), Some(fault_ns)) = (live.number("exits"), timeline.fault_ns)
    {
        let seconds = ms(fault_ns.saturating_sub(begun.t_ns)) / 1e3;
        #[allow(clippy::cast_precision_loss, reason = "a run has far less than 2^53 exits")]
        let exits = exits as f64;
        let entries = outcome.events.iter().filter(|event| event.is(HostId::A, FT_LOG, "log"));
        let logged = entries.filter_map(|event| event.number("entries")).max().unwrap_or(0);
        #[allow(clippy::cast_precision_loss, reason = "a run logs far less than 2^53 entries")]
        let logged = logged as f64;
        rows.push(Row::new(
            "exits, boot and load",
            exits / seconds,
            logged / seconds,
            "1/s",
            format!("{exits:.0} exits from power-on to the kill; peer: log entries"),
        ));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_those_of_user_and_kernel_mode() {
        let stat = "17 (a ) b) S 1 17 17 0 -1 4194560 100 0 0 0 250 50 7 8 20 0 4 0 100 1 1";
        assert_eq!(used_ticks(stat), 300);
        assert_eq!(used_ticks(""), 0);
    }
}
