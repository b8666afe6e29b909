//! What protection costs a stock Linux: compile-like work not recorded, recorded, and recorded with a live backup; its log; its failover under load.
//!
//! Times are the lab's own where it runs there: an emulated machine with one processor for both hosts. Only ratios mean anything.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::bench::lockstep::{Logged, Sample};
use crate::bench::machine::{Machine, Protection};
use crate::bench::row::Row;
use crate::bench::stats::percentile;
use crate::bench::traffic::{self, Traffic};
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
/// How often ft-log reports while the work is measured.
const REPORT_MS: u32 = 50;
/// The end of the load before the kill, of which the lag is told.
const LAG_SECONDS: u64 = 10;
/// ft-log's default of --lag-target-ms.
const LAG_TARGET_MS: f64 = 100.0;
const PAGE_BYTES: f64 = 4096.0;

/// One machine's work.
struct Run {
    /// From the line that says it begins to the one that says it is done.
    seconds: f64,
    /// Processor time that host A's processes took for it.
    processor_seconds: f64,
    idle: Logged,
    busy: Logged,
}

/// What only a pair has.
struct Followed {
    /// From its journal, which a machine alone does not keep.
    boot: Traffic,
    idle: Traffic,
    busy: Traffic,
    /// The backup's lag, as ft-log reported it under the work.
    lags_ms: Vec<f64>,
}

fn mbit_s(logged: Logged) -> f64 {
    logged.bytes * 8.0 / 1e6 / logged.seconds
}

#[allow(clippy::cast_precision_loss, reason = "a run has far less than 2^53 of anything")]
fn count(number: u64) -> f64 {
    number as f64
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
    let run = |protection| run(&working, protection, parent);
    let (unrecorded, _) = run(Protection::Unrecorded)?;
    let (alone, _) = run(Protection::Alone)?;
    let (pair, followed) = run(Protection::Pair)?;
    let mut rows = cost_rows(&pair, &alone, &unrecorded);
    if let Some(followed) = followed {
        rows.extend(followed_rows(&pair, &followed));
    }
    Ok(rows)
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
    let rows = failover_rows(&outcome);
    let mut problems = outcome.report.problems;
    if rows.is_empty() {
        problems.push(format!(
            "the run has no figures of its failover: {:?}, {} of {RECORDS} records answered",
            outcome.timeline, outcome.report.replies
        ));
    }
    Ok((rows, problems))
}

fn run(setup: &PairSetup, protection: Protection, parent: &Path) -> Result<(Run, Option<Followed>), HarnessError> {
    let mut setup = setup.clone();
    setup
        .ft_log_arguments
        .extend(["--report-interval-ms".to_owned(), REPORT_MS.to_string()]);
    let machine = Machine::boot(&setup, protection, parent)?;
    let patience = setup.guest.patience().boot;
    let booted = Sample::first(&machine, now_ns())?;
    // This is what is measured, not a wait for something: a machine left alone for so long.
    thread::sleep(IDLE);
    let idled = Sample::first(&machine, now_ns())?;
    wait_for_line(&machine, "load: compile: begins", Instant::now() + patience)?;
    let begun = (now_ns(), processor_seconds(&machine)?);
    let before = Sample::first(&machine, begun.0)?;
    wait_for_line(&machine, "load: compile: done", Instant::now() + patience)?;
    let ended = (now_ns(), processor_seconds(&machine)?);
    let after = Sample::first(&machine, ended.0)?;
    let run = Run {
        seconds: ms(ended.0 - begun.0) / 1e3,
        processor_seconds: ended.1 - begun.1,
        idle: idled.since(booted),
        busy: after.since(before),
    };
    if protection != Protection::Pair {
        return Ok((run, None));
    }
    let journal = machine.pair.journal(HostId::A);
    let times = [(Sample::POWER_ON, booted), (booted, idled), (before, after)];
    let [boot, in_idle, in_busy] = traffic::between(&journal, times)?;
    let followed = Followed {
        boot,
        idle: in_idle,
        busy: in_busy,
        lags_ms: lags_ms(&machine.pair.events().all(), begun.0, ended.0),
    };
    Ok((run, Some(followed)))
}

/// The backup's lag in that time, as the primary's ft-log reported it.
fn lags_ms(events: &[Event], from_ns: u64, to_ns: u64) -> Vec<f64> {
    let reports = events
        .iter()
        .filter(|event| event.is(HostId::A, FT_LOG, "log") && (from_ns..=to_ns).contains(&event.t_ns));
    reports
        .filter_map(|event| Some(count(event.number("lag_us")?) / 1e3))
        .collect()
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

fn cost_rows(pair: &Run, alone: &Run, unrecorded: &Run) -> Vec<Row> {
    let peer = "peer: the same machine, not recorded: its kernel as it is, no entries, no state deltas";
    let work = format!("{ROUNDS} rounds of 40 files written, tar, gzip, SHA-256, removed");
    let rate = |run: &Run| f64::from(ROUNDS) / run.seconds;
    vec![
        Row::new(
            "compile-like work, recorded",
            rate(alone),
            rate(unrecorded),
            "rounds/s",
            format!("{work}; one host, no backup; {peer}; aim: 0.9"),
        ),
        Row::new(
            "the same, with a live backup",
            rate(pair),
            rate(unrecorded),
            "rounds/s",
            format!("{peer}, and no backup takes a share of the processor"),
        ),
        Row::new(
            "the same, processor time of the primary",
            pair.processor_seconds,
            unrecorded.processor_seconds,
            "s",
            format!(
                "the four processes of host A; {peer}; recorded without a backup: {:.1} s",
                alone.processor_seconds
            ),
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
            format!(
                "{:.0} entries/s; peer: recorded without a backup",
                pair.busy.entries / pair.busy.seconds
            ),
        ),
    ]
}

fn followed_rows(pair: &Run, followed: &Followed) -> Vec<Row> {
    let mut rows = vec![Row::new(
        "exits, under the work",
        count(followed.busy.exits) / pair.busy.seconds,
        count(followed.idle.exits) / pair.idle.seconds,
        "1/s",
        "a pair; peer: idle".to_owned(),
    )];
    for (when, traffic) in [
        ("boot", followed.boot),
        ("idle", followed.idle),
        ("under the work", followed.busy),
    ] {
        rows.extend(delta_row(when, traffic));
    }
    rows.extend(lag_rows("under the work", &followed.lags_ms));
    rows
}

/// Nothing of a time without deltas.
fn delta_row(when: &str, traffic: Traffic) -> Option<Row> {
    let deltas = count(traffic.deltas);
    (traffic.deltas > 0).then(|| {
        Row::new(
            format!("log of a state delta, {when}"),
            count(traffic.delta_bytes) / deltas,
            count(traffic.delta_pages) * PAGE_BYTES / deltas,
            "bytes",
            format!("{deltas:.0} deltas; peer: the pages in them, before compression"),
        )
    })
}

fn lag_rows(when: &str, lags_ms: &[f64]) -> Vec<Row> {
    if lags_ms.is_empty() {
        return Vec::new();
    }
    let row = |percent| {
        Row::new(
            format!("lag of the backup, {when}, p{percent}"),
            percentile(lags_ms, percent),
            LAG_TARGET_MS,
            "ms",
            format!(
                "age of the oldest entry not replayed, {} reports of ft-log; peer: the lag from which on the primary is slowed",
                lags_ms.len()
            ),
        )
    };
    vec![row(50), row(99)]
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
    if let Some(fault_ns) = timeline.fault_ns {
        let before = fault_ns.saturating_sub(LAG_SECONDS * 1_000_000_000);
        rows.extend(lag_rows("under load", &lags_ms(&outcome.events, before, fault_ns)));
    }
    if let (Some(live), Some(begun)) = (outcome.events.iter().find(exits), outcome.events.iter().find(begun))
        && let (Some(exits), Some(fault_ns)) = (live.number("exits"), timeline.fault_ns)
    {
        let seconds = ms(fault_ns.saturating_sub(begun.t_ns)) / 1e3;
        let exits = count(exits);
        let entries = outcome.events.iter().filter(|event| event.is(HostId::A, FT_LOG, "log"));
        let logged = count(entries.filter_map(|event| event.number("entries")).max().unwrap_or(0));
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
    use serde_json::json;

    #[test]
    fn ticks_are_those_of_user_and_kernel_mode() {
        let stat = "17 (a ) b) S 1 17 17 0 -1 4194560 100 0 0 0 250 50 7 8 20 0 4 0 100 1 1";
        assert_eq!(used_ticks(stat), 300);
        assert_eq!(used_ticks(""), 0);
    }

    #[test]
    fn lags_are_those_that_the_primary_reported_in_the_time() {
        let log = |host, t_ns: u64, lag_us: u64| {
            let line = json!({"t_ns": t_ns, "event": "log", "lag_us": lag_us});
            Event::parse(host, FT_LOG, &line.to_string()).expect("an event")
        };
        let events = [
            log(HostId::A, 1, 9000),
            log(HostId::A, 10, 1500),
            log(HostId::B, 11, 7000),
            log(HostId::A, 20, 0),
            log(HostId::A, 21, 9000),
        ];
        assert_eq!(lags_ms(&events, 2, 20), [1.5, 0.0]);
        let rows = lag_rows("now", &[4.0, 50.0, 25.0]);
        assert_eq!((rows[0].ours, rows[1].ours, rows[1].ratio), (25.0, 50.0, 0.5));
        assert!(lag_rows("now", &[]).is_empty());
    }
}
