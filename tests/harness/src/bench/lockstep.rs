//! What the lockstep engine costs while nothing goes wrong: throughput, latency, log.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::bench::client::{PAYLOAD, REQUEST, Round};
use crate::bench::echo::Echo;
use crate::bench::machine::{Machine, Medium, Protection};
use crate::bench::row::Row;
use crate::bench::stats::{median, percentile, range};
use crate::clock::{ms, now_ns};
use crate::error::HarnessError;
use crate::events::Event;
use crate::pair::PairSetup;
use crate::report::{bucket_percentile, last_holds};
use crate::roles::FT_LOG;
use crate::scenario::RECORDS_MAX;
use crate::topology::HostId;

/// Records in flight.
const DEPTHS: [u64; 3] = [1, 8, 64];
/// How long a round lasts.
const ROUND: Duration = Duration::from_millis(1000);
/// Echoes before each pair of rounds.
const ECHOES: usize = 1000;
/// How long the idle machine is watched.
const IDLE: Duration = Duration::from_secs(10);
/// How long the busy one is.
const BUSY: Duration = Duration::from_secs(5);
/// How long ft-log may take to report: it does so twice a second.
const REPORT: Duration = Duration::from_secs(5);
/// What an idle machine needs to calm down after its boot.
const SETTLE: Duration = Duration::from_secs(1);

/// The rounds at one depth. Round i of one list ran next to round i of the other.
#[derive(Debug, Default)]
struct Comparison {
    protected: Vec<Round>,
    alone: Vec<Round>,
    echo_us: Vec<f64>,
    held_us: Option<u64>,
}

/// Throughput at every depth and, if the files are in memory, the latency that holding adds. `parent` is on `medium`.
///
/// # Errors
/// When a machine does not boot or a client is not answered well.
pub fn costs(setup: &PairSetup, medium: Medium, parent: &Path, rounds: u8) -> Result<Vec<Row>, HarnessError> {
    let mut rows = Vec::new();
    for depth in DEPTHS {
        let seen = compare(setup, parent, depth, rounds)?;
        rows.push(throughput(&seen, medium, depth));
        if medium == Medium::Memory && depth == 1 {
            rows.push(added_latency(&seen));
        }
    }
    Ok(rows)
}

/// Two machines, protected and alone, in turns.
fn compare(setup: &PairSetup, parent: &Path, depth: u64, rounds: u8) -> Result<Comparison, HarnessError> {
    let mut protected = Machine::boot(setup, Protection::Pair, parent)?;
    let mut alone = Machine::boot(setup, Protection::Alone, parent)?;
    let mut echo = Echo::start(protected.pair.topology())?;
    // All rounds must fit on the machine's disk.
    let records = RECORDS_MAX / u64::from(rounds);
    let mut seen = Comparison::default();
    for number in 0..rounds {
        seen.echo_us
            .push(percentile(&echo.round_trips_us(ECHOES, REQUEST)?, 50));
        let run = |machine: &mut Machine| machine.client.round(depth, ROUND, records);
        // Whoever comes first now comes second next time.
        if number % 2 == 0 {
            seen.protected.push(run(&mut protected)?);
            seen.alone.push(run(&mut alone)?);
        } else {
            seen.alone.push(run(&mut alone)?);
            seen.protected.push(run(&mut protected)?);
        }
    }
    let holds = last_holds(&protected.pair.events().all(), u64::MAX);
    seen.held_us = bucket_percentile(&holds, 50);
    Ok(seen)
}

fn throughput(seen: &Comparison, medium: Medium, depth: u64) -> Row {
    let of = |rounds: &[Round]| rounds.iter().map(Round::throughput).collect::<Vec<_>>();
    let (protected, alone) = (of(&seen.protected), of(&seen.alone));
    let place = match medium {
        Medium::Memory => "images and journals in memory",
        Medium::Disk => "images and journals on disk, every record flushed",
    };
    Row::new(
        format!(
            "ledger throughput, {depth} in flight{}",
            if medium == Medium::Disk { ", on disk" } else { "" }
        ),
        median(&protected),
        median(&alone),
        "records/s",
        format!(
            "peer: the same guest alone, outputs not held; medians of {} rounds in turns ({}; peer {}); {place}",
            protected.len(),
            range(&protected),
            range(&alone),
        ),
    )
}

fn added_latency(seen: &Comparison) -> Row {
    let of = |rounds: &[Round]| {
        rounds
            .iter()
            .map(|round| percentile(&round.latencies_us, 50))
            .collect::<Vec<_>>()
    };
    let (protected, alone) = (of(&seen.protected), of(&seen.alone));
    let added: Vec<f64> = protected
        .iter()
        .zip(&alone)
        .map(|(with, without)| with - without)
        .collect();
    let held = seen.held_us.map_or("unknown".to_owned(), |us| format!("{us} µs"));
    Row::new(
        "answer latency added by holding",
        median(&added),
        median(&seen.echo_us),
        "µs",
        format!(
            "1 in flight, images and journals in memory: a disk's flush would hide it; p50 {:.0} µs protected, {:.0} µs alone; \
             median of {} rounds ({}); median frame held {held}; peer: round trip of {REQUEST} bytes, TCP echo over the \
             logging wire in the same run ({}); aim: one round trip + 200 µs",
            median(&protected),
            median(&alone),
            added.len(),
            range(&added),
            range(&seen.echo_us),
        ),
    )
}

/// What the log of a pair comes to, idle and busy.
///
/// # Errors
/// When the machine does not boot, its client is not answered well, or its log is not reported.
pub fn log_bytes(setup: &PairSetup, parent: &Path) -> Result<Vec<Row>, HarnessError> {
    let depth = DEPTHS[DEPTHS.len() - 1];
    let mut machine = Machine::boot(setup, Protection::Pair, parent)?;
    // These are what is measured, not waits for something: a machine left alone for so long.
    thread::sleep(SETTLE);
    let from_ns = now_ns();
    thread::sleep(IDLE);
    let before = Sample::first(&machine, from_ns)?;
    let idle = Sample::first(&machine, now_ns())?.since(before);
    let before = Sample::first(&machine, now_ns())?;
    let round = machine.client.round(depth, BUSY, RECORDS_MAX)?;
    let busy = Logged {
        seconds: round.elapsed.as_secs_f64(),
        ..Sample::first(&machine, now_ns())?.since(before)
    };
    #[allow(clippy::cast_precision_loss, reason = "a round has far less than 2^53 records")]
    let answered = round.latencies_us.len() as f64;
    let sent = answered * PAYLOAD as f64;
    let log = "entries with their frames, as sent to the backup and journalled";
    Ok(vec![
        Row::new(
            "log bytes, idle",
            idle.bytes / idle.seconds,
            busy.bytes / busy.seconds,
            "bytes/s",
            format!(
                "{log}; booted, no clients, {:.1} s, {:.1} entries/s; peer: the same machine busy",
                idle.seconds,
                idle.entries / idle.seconds
            ),
        ),
        Row::new(
            "log bytes, busy",
            busy.bytes / busy.seconds,
            sent / busy.seconds,
            "bytes/s",
            format!(
                "{log}; {depth} in flight, {:.0} records/s; peer: payload the client sent",
                answered / busy.seconds
            ),
        ),
        Row::new(
            "log bytes per answered record",
            busy.bytes / answered,
            PAYLOAD as f64,
            "bytes",
            format!(
                "{depth} in flight, {:.1} entries a record; peer: payload of a record",
                busy.entries / answered
            ),
        ),
    ])
}

/// What the primary's ft-log had logged since its start, as it reports twice a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sample {
    t_ns: u64,
    bytes: u64,
    entries: u64,
}

impl Sample {
    /// The first report after this moment, waiting for it if need be.
    pub(crate) fn first(machine: &Machine, after_ns: u64) -> Result<Self, HarnessError> {
        machine.pair.wait_for(
            "ft-log's next event `log`",
            HostId::A,
            FT_LOG,
            Instant::now() + REPORT,
            |events| {
                let later = |event: &&Event| event.t_ns >= after_ns && event.is(HostId::A, FT_LOG, "log");
                events.iter().find(later).and_then(Self::read)
            },
        )
    }

    /// Before the first entry.
    pub(crate) const POWER_ON: Self = Self {
        t_ns: 0,
        bytes: 0,
        entries: 0,
    };

    /// Entries so far.
    pub(crate) fn entries(self) -> u64 {
        self.entries
    }

    fn read(event: &Event) -> Option<Self> {
        Some(Self {
            t_ns: event.t_ns,
            bytes: event.number("bytes")?,
            entries: event.number("entries")?,
        })
    }

    #[allow(clippy::cast_precision_loss, reason = "a run logs far less than 2^53 bytes")]
    pub(crate) fn since(self, earlier: Self) -> Logged {
        Logged {
            seconds: ms(self.t_ns - earlier.t_ns) / 1e3,
            bytes: (self.bytes - earlier.bytes) as f64,
            entries: (self.entries - earlier.entries) as f64,
        }
    }
}

/// What was logged in a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Logged {
    pub(crate) seconds: f64,
    pub(crate) bytes: f64,
    pub(crate) entries: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn log(t_ms: u64, bytes: u64) -> Sample {
        let line = json!({"t_ns": t_ms * 1_000_000, "event": "log", "bytes": bytes, "entries": bytes / 100});
        let event = Event::parse(HostId::A, FT_LOG, &line.to_string()).expect("an event");
        Sample::read(&event).expect("a report")
    }

    #[test]
    fn logged_is_the_difference_of_two_reports() {
        let logged = log(3000, 4500).since(log(1000, 1500));
        assert_eq!((logged.seconds, logged.bytes, logged.entries), (2.0, 3000.0, 30.0));
    }
}
