//! `ft-vcpu-shim replay`: a finished journal, executed again, offline, to its end or to a position.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::machine::MachineArgs;
use crate::{
    debug::{
        disassembly, dump,
        frames::Frames,
        gdb,
        registers::{self, memory_of},
        session::{Halt, Session},
        support,
        target::{Reached, Target},
        trace::Trace,
    },
    error::Error,
    lockstep::{
        execution::{End, Execution, Step},
        journal::{Recording, with_position},
    },
    machine::vcpu::open_kvm,
};

/// Flags of `replay`.
#[derive(Args, Debug)]
pub struct ReplayArgs {
    /// Directory of the journal.
    journal: PathBuf,
    #[command(flatten)]
    machine: MachineArgs,
    /// Stops exactly there: an exit count, EXITS+OFFSET, or lsn:LSN for the stop at which that entry has been applied.
    #[arg(long, value_name = "POSITION")]
    to: Option<Target>,
    /// Also writes the digests at the end to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    digests: Option<PathBuf>,
    /// Writes the guest's memory there: raw, sparse, byte n is guest-physical address n.
    #[arg(long, value_name = "FILE")]
    dump_memory: Option<PathBuf>,
    /// Prints the registers and the instructions around.
    #[arg(long)]
    registers: bool,
    /// Writes one line a stop there; `-` is standard output.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Writes each frame that the guest sends there, with the entry that marks it: JSON, one object a line; `-` is standard output.
    #[arg(long, value_name = "FILE")]
    frames: Option<PathBuf>,
    /// At the position, or at power-on without --to, waits for gdb there: unix:PATH or tcp:127.0.0.1:PORT.
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["trace", "digests", "frames"])]
    gdb: Option<gdb::Address>,
    /// The trace is JSON, one object a line, with all registers.
    #[arg(long, requires = "trace")]
    trace_json: bool,
}

/// Replays a journal, to its end or to `--to`, and prints what was asked for and the digests there.
///
/// # Errors
/// Divergence, damage, a machine that is not the recorded one, or a position that the execution does not have.
pub fn replay(args: &ReplayArgs) -> Result<(), Error> {
    let recording = Recording {
        journal: args.journal.clone(),
        machine: args.machine.clone(),
    };
    if let Some(address) = &args.gdb {
        let session = gdb::serve(session_at(recording, args.to)?, address)?;
        return report(args, session.execution(), session.end().unwrap_or("position"));
    }
    let mut trace = match &args.trace {
        Some(path) => Some(Trace::open(path, args.trace_json)?),
        None => None,
    };
    let frames = args.frames.as_deref().map(Frames::open).transpose()?;
    let mut execution = recording.power_on_telling(frames.as_ref().map(Frames::on_frame).as_ref())?;
    let ended = run(&mut execution, args.to, trace.as_mut());
    // What was traced explains an error, so it comes first.
    if let Some(trace) = trace {
        trace.finish()?;
    }
    if let Some(frames) = frames {
        frames.finish()?;
    }
    report(args, &execution, ended?)
}

/// The recording at `to`, or at power-on, ready for a debugger.
fn session_at(recording: Recording, to: Option<Target>) -> Result<Session, Error> {
    let mut session = Session::new(recording, support::probe(&open_kvm()?)?)?;
    if let Some(target) = to {
        let halt = session.goto(target)?;
        let here = session
            .execution()
            .history()
            .last()
            .map(|record| target.reached(record));
        if halt != Halt::There || here != Some(Reached::Here) {
            return Err(no_such_stop(target, session.execution()));
        }
    }
    Ok(session)
}

/// Runs to the end, or to `to`; gives how the replay ended.
fn run(execution: &mut Execution, to: Option<Target>, mut trace: Option<&mut Trace>) -> Result<&'static str, Error> {
    loop {
        let step = execution.step().map_err(|error| with_position(error, execution));
        if let Some((trace, record)) = trace.as_mut().zip(execution.history().last()) {
            trace.stop(record)?;
        }
        let step = step?;
        let reached = to.zip(execution.history().last());
        match reached.map(|(target, record)| (target, target.reached(record))) {
            Some((_, Reached::Here)) => return Ok("position"),
            Some((target, Reached::Passed)) => return Err(no_such_stop(target, execution)),
            _ => {}
        }
        match (step, to) {
            (Step::Stop | Step::Trap, _) => {}
            (Step::End(_), Some(target)) => return Err(no_such_stop(target, execution)),
            (Step::End(End::PowerOff), None) => return Ok("power-off"),
            (Step::End(End::Reset), None) => return Ok("reset"),
            (Step::End(End::LogEnd), None) => return Ok("end of log"),
        }
    }
}

/// The execution has no stop `target`: it ended before, or has none of that offset.
fn no_such_stop(target: Target, execution: &Execution) -> Error {
    let last = execution.history().last();
    let entry = last.map_or(0, |record| record.entry.0);
    let at = execution.position();
    Error::LogEnds(format!(
        "the recorded execution has no stop at {target}: the replay came to exit {}+{} with entry {entry}. `replay --trace -` lists the stops",
        at.exits, at.offset
    ))
}

fn report(args: &ReplayArgs, execution: &Execution, ended: &str) -> Result<(), Error> {
    let (position, digests) = (execution.position(), execution.digests());
    let mut report = json!({
        "ended": ended,
        "exits": position.exits,
        "rip": format!("{:#x}", position.rip),
        "exit_digest": format!("{:016x}", digests.exits),
        "register_digest": format!("{:016x}", digests.registers),
        "output_digest": format!("{:016x}", digests.outputs),
    });
    if let Some(record) = execution.history().last() {
        report["entry"] = json!(record.entry.0);
    }
    if args.registers {
        let state = execution.vcpu().state()?;
        print!("{}", registers::state_table(&state));
        print!(
            "{}",
            disassembly::around(&memory_of(execution.vcpu(), &state), state.regs.rip)
        );
        report["registers"] = registers::general_json(&state.regs);
    }
    if let Some(path) = &args.dump_memory {
        dump::write(execution.vcpu().ram(), path)?;
    }
    println!("{report}");
    if let Some(path) = &args.digests {
        std::fs::write(path, format!("{report}\n")).map_err(|source| {
            Error::environment(format!("cannot write {}: {source}. Check --digests", path.display()))
        })?;
    }
    Ok(())
}
