//! `ft-vcpu-shim bisect`: where two journals, or a journal and its replay, part.
//!
//! Exit status 0: the same; 1: different; others as ever.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use clap::{ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Value, json};

use super::machine::MachineArgs;
use crate::{
    debug::{
        bisect::{self, Brief, Compared, StopDifference, Stops, Which, Witnessed},
        registers,
        report::{Report, stop_json},
        trace,
    },
    error::Error,
    lockstep::{
        execution::Execution,
        history::StopRecord,
        journal::{self, Recording, with_position},
    },
};

/// Stops shown before a difference.
const STOPS_SHOWN: usize = 12;

/// Flags of `bisect`.
#[derive(Args, Debug)]
pub struct BisectArgs {
    /// Directory of a journal.
    #[arg(required_unless_present = "report")]
    a: Option<PathBuf>,
    /// Directory of another one. Without it the journal is compared with replays of it, which needs --kernel.
    b: Option<PathBuf>,
    #[command(flatten)]
    machine: Machine,
    /// The last stops of the side that recorded the journal, as `run --reports` wrote them: its registers, at every stop.
    #[arg(long, value_name = "FILE", conflicts_with = "b")]
    stops: Option<PathBuf>,
    /// The report of a replica that diverged, instead of a journal: finds its first stop that is not as in --stops.
    #[arg(long, value_name = "FILE", requires = "stops", conflicts_with_all = ["a", "kernel"])]
    report: Option<PathBuf>,
}

/// The machine's flags, all of which may be left out together: two journals can be compared without executing them.
#[derive(Clone, Debug)]
struct Machine(Option<MachineArgs>);

const KERNEL: &str = "kernel";

impl Args for Machine {
    fn augment_args(command: Command) -> Command {
        MachineArgs::augment_args(command).mut_arg(KERNEL, |argument| argument.required(false))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Machine {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = matches.contains_id(KERNEL);
        Ok(Self(given.then(|| MachineArgs::from_arg_matches(matches)).transpose()?))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No difference.
    Same,
    /// A difference, which has been printed.
    Different,
}

impl Verdict {
    /// The exit status.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Same => 0,
            Self::Different => 1,
        }
    }
}

/// Finds the first difference and prints it: text for people, then one line of JSON.
///
/// # Errors
/// A journal that cannot be read or executed.
pub fn bisect(args: &BisectArgs) -> Result<Verdict, Error> {
    let recording = |journal: &Path| {
        args.machine.0.clone().map(|machine| Recording {
            journal: journal.to_owned(),
            machine,
        })
    };
    let stops = args.stops.as_deref().map(read_stops).transpose()?.unwrap_or_default();
    let finding = match (&args.report, &args.a, &args.b) {
        (Some(report), ..) => reported(report, &stops)?,
        (None, Some(a), Some(b)) => journals(a, b, recording(a).zip(recording(b)))?,
        (None, Some(a), None) => {
            let recording = recording(a).ok_or_else(|| {
                Error::environment(
                    "to compare a journal with its replay, give the machine: --kernel and its other flags",
                )
            })?;
            with_replays(&recording, &stops)?
        }
        (None, None, _) => unreachable!("the command line demands one of them"),
    };
    print!("{}", finding.text);
    println!("{}", finding.json);
    Ok(finding.verdict)
}

/// Stops of the recording side, by exit count and offset.
type Witnesses = BTreeMap<(u64, u32), Witnessed>;

/// What is printed.
struct Finding {
    verdict: Verdict,
    text: String,
    json: Value,
}

impl Finding {
    fn same(text: String, json: Value) -> Self {
        Self {
            verdict: Verdict::Same,
            text,
            json,
        }
    }

    fn different(text: String, json: Value) -> Self {
        Self {
            verdict: Verdict::Different,
            text,
            json,
        }
    }
}

fn brief_line(brief: &Brief) -> String {
    let at = brief.stop.map_or_else(String::new, |stop| {
        format!(
            "exit {} RIP {:#x} RCX {:#x} digest {:016x}",
            stop.position.exits, stop.position.rip, stop.position.rcx, stop.digest
        )
    });
    format!("{:>8} {:<10} {at} {}", brief.lsn, brief.kind, brief.content)
}

fn brief_json(brief: &Brief) -> Value {
    json!({"lsn": brief.lsn.0, "kind": brief.kind, "content": brief.content, "stop": brief.stop.as_ref().map(stop_json)})
}

fn journals(a: &Path, b: &Path, recordings: Option<(Recording, Recording)>) -> Result<Finding, Error> {
    let found = bisect::journals(&mut journal::source(a)?, &mut journal::source(b)?)?;
    let found = match found {
        Compared::Same { left, right } => {
            let text = format!("the journals are the same as far as both go: A has {left} entries, B {right}\n");
            let json = json!({"different": false, "entries": [left, right]});
            return Ok(Finding::same(text, json));
        }
        Compared::Different(found) => found,
    };
    let mut text = format!(
        "the journals differ at entry {}: {}\n  A {}\n  B {}\n",
        found.left.lsn,
        found.what,
        brief_line(&found.left),
        brief_line(&found.right)
    );
    let mut json = json!({
        "different": true,
        "entry": found.left.lsn.0,
        "what": found.what,
        "a": brief_json(&found.left),
        "b": brief_json(&found.right),
    });
    text.push_str("the last entries before it, the same in both\n");
    for brief in &found.before {
        let _ = writeln!(text, "    {}", brief_line(brief));
    }
    match recordings {
        None => text.push_str(
            "with --kernel and the machine's other flags, the first differing stop and the registers are found too\n",
        ),
        Some((left, right)) => {
            let (mut left, mut right) = (left.power_on()?, right.power_on()?);
            executions(
                ("A", &mut left),
                ("B", &mut right),
                &BTreeMap::new(),
                &mut text,
                &mut json,
            )?;
        }
    }
    Ok(Finding::different(text, json))
}

/// The first stop in the report of a diverged replica that is not as the recording side had it.
fn reported(path: &Path, recorded: &Witnesses) -> Result<Finding, Error> {
    let name = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::environment(format!("cannot read {name}: {source}. Check --report")))?;
    let wrong = || {
        Error::environment(format!(
            "{name} is no report: give the .diverged.json file that `run --reports` wrote"
        ))
    };
    let report: Value = serde_json::from_str(&text).map_err(|_| wrong())?;
    let records = report.get("records").and_then(Value::as_array).ok_or_else(wrong)?;
    let mut last = None;
    for (index, record) in records.iter().enumerate() {
        let (position, replayed) = read_stop(record).ok_or_else(wrong)?;
        let Some(stop) = recorded.get(&position) else {
            continue;
        };
        last = Some(position.0);
        let names = bisect::differing(&stop.registers, &replayed.registers);
        // The replica ended in the middle of its last stop: if nothing differs before it, then this is where.
        let is_last = index + 1 == records.len();
        if names.is_empty() && stop.digest == replayed.digest && !is_last {
            continue;
        }
        let what = match &names[..] {
            [] => "not the registers, but what the guest put out or what happened".to_owned(),
            names => names.join(", "),
        };
        let text = format!(
            "the first stop at which the two sides differ is exit {}: {what}\n{}",
            position.0,
            registers::comparison(("recorded", &stop.registers), ("replayed", &replayed.registers))
        );
        let json = json!({"different": true, "exits": position.0, "registers": names, "replayed": record});
        return Ok(Finding::different(text, json));
    }
    match last {
        None => Err(Error::environment(format!(
            "{name} and --stops have no stop in common: they must be of the same VM and generation"
        ))),
        Some(exits) => {
            let text = format!(
                "the stops that are in both files, up to exit {exits}, are the same: the difference lies behind it\n"
            );
            Ok(Finding::same(text, json!({"different": false, "exits": exits})))
        }
    }
}

fn with_replays(recording: &Recording, witnessed: &Witnesses) -> Result<Finding, Error> {
    let (mut one, mut other) = (recording.power_on()?, recording.power_on()?);
    let mut text = String::new();
    let mut json = json!({"different": true});
    let different = executions(
        ("replay 1", &mut one),
        ("replay 2", &mut other),
        witnessed,
        &mut text,
        &mut json,
    )?;
    if different {
        return Ok(Finding::different(text, json));
    }
    let at = one.position();
    let entry = one.history().last().map_or(0, |record| record.entry.0);
    let digests = one.digests();
    let text = format!(
        "two replays agree with the journal and with each other at every stop: {} exits, {entry} entries\n",
        at.exits
    );
    let digest = format!("{:016x}", digests.combined());
    Ok(Finding::same(
        text,
        json!({"different": false, "exits": at.exits, "entry": entry, "digest": digest}),
    ))
}

/// Runs two executions side by side and appends what is found; whether anything was.
fn executions(
    left: (&str, &mut Execution),
    right: (&str, &mut Execution),
    witnessed: &Witnesses,
    text: &mut String,
    json: &mut Value,
) -> Result<bool, Error> {
    let against_witness = |record: &StopRecord| {
        let recorded = witnessed.get(&(record.position.exits, record.position.offset))?;
        let names = bisect::differing(&recorded.registers, &record.registers);
        if names.is_empty() && recorded.digest == record.digest {
            return None;
        }
        let which = if names.is_empty() {
            "the digest".into()
        } else {
            names.join(", ")
        };
        Some(format!("the recording side had others there: {which}"))
    };
    let (mut one, mut other) = (Stops::of(left.1), Stops::of(right.1));
    match bisect::side_by_side(&mut one, &mut other, against_witness) {
        Ok(None) => Ok(false),
        Ok(Some(found)) => {
            show_stops((left.0, left.1), right.0, &found, witnessed, text, json);
            Ok(true)
        }
        Err((which, error)) => {
            let (name, execution) = match which {
                Which::Left => (left.0, &*left.1),
                Which::Right => (right.0, &*right.1),
            };
            let Error::Diverged(divergence) = &error else {
                return Err(with_position(error, execution));
            };
            let report = Report::new(divergence, execution);
            let _ = write!(text, "{name} is not the execution of its journal: {}", report.text());
            json["diverged"] = report.json();
            let at = (divergence.replayed.position.exits, divergence.replayed.position.offset);
            if let Some(recorded) = witnessed.get(&at) {
                let replayed = execution.vcpu().registers();
                text.push_str(&registers::comparison(
                    ("recorded", &recorded.registers),
                    ("replayed", &replayed),
                ));
            }
            Ok(true)
        }
    }
}

fn show_stops(
    left: (&str, &Execution),
    right: &str,
    found: &StopDifference,
    witnessed: &Witnesses,
    text: &mut String,
    json: &mut Value,
) {
    let _ = writeln!(
        text,
        "the executions part after {} stops that are the same: {}",
        found.same, found.what
    );
    let line = |record: &Option<StopRecord>| record.as_ref().map_or_else(|| "ended".into(), trace::line);
    let _ = writeln!(text, "  {:<8} {}", left.0, line(&found.left));
    let _ = writeln!(text, "  {right:<8} {}", line(&found.right));
    json["stop"] = json!({
        "same": found.same,
        "what": found.what,
        "left": found.left.as_ref().map(trace::json),
        "right": found.right.as_ref().map(trace::json),
    });
    if let Some((one, other)) = found.left.as_ref().zip(found.right.as_ref()) {
        let recorded = witnessed.get(&(one.position.exits, one.position.offset));
        text.push_str(&match recorded {
            Some(recorded) => registers::comparison(("recorded", &recorded.registers), ("replayed", &one.registers)),
            None => registers::comparison((left.0, &one.registers), (right, &other.registers)),
        });
    }
    let _ = writeln!(
        text,
        "the stops of {} up to there: exit, entry, access, where, what happened",
        left.0
    );
    for record in left.1.history().tail(STOPS_SHOWN) {
        let _ = writeln!(text, "{}", trace::line(record));
    }
}

/// The stops in a file that [`crate::debug::report::write_stops`] wrote, by exit count and offset.
fn read_stops(path: &Path) -> Result<Witnesses, Error> {
    let name = path.display();
    let failed = |source| Error::environment(format!("cannot read {name}: {source}. Check --stops"));
    let file = BufReader::new(std::fs::File::open(path).map_err(failed)?);
    let mut stops = BTreeMap::new();
    for (number, line) in (1..).zip(file.lines()) {
        let line = line.map_err(failed)?;
        let (position, stop) = serde_json::from_str(&line)
            .ok()
            .as_ref()
            .and_then(read_stop)
            .ok_or_else(|| {
                Error::environment(format!(
                    "{name}: line {number} is no stop: give the .stops.jsonl file that `run --reports` wrote"
                ))
            })?;
        stops.insert(position, stop);
    }
    Ok(stops)
}

fn read_stop(stop: &Value) -> Option<((u64, u32), Witnessed)> {
    let exits = stop.get("exits")?.as_u64()?;
    let offset = stop.get("offset")?.as_u64()?.try_into().ok()?;
    let witnessed = Witnessed {
        digest: u64::from_str_radix(stop.get("digest")?.as_str()?, 16).ok()?,
        registers: registers::general_from_json(stop.get("registers")?)?,
    };
    Some(((exits, offset), witnessed))
}
