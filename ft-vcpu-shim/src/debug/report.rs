//! What is known about a divergence, for the operator and for programs.
//!
//! The log carries of every recorded stop what tells *that* something differs (position, RIP, RCX, digest), not all registers:
//! they would make an entry three times as long. The replaying side has all of its own. The recording side keeps its last stops with
//! their registers in memory ([`crate::lockstep::history`]) and writes them to a file as soon as it stands alone, which it
//! does when its backup reports a divergence: `bisect --report --stops` sets the two side by side.

use std::{
    fmt::Write as _,
    fs::File,
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
};

use ft_protocol::Stop;
use serde_json::{Value, json};

use super::{
    disassembly,
    registers::{self, memory_of},
    trace,
};
use crate::lockstep::{
    divergence::Divergence,
    execution::Execution,
    history::{History, StopRecord},
};

/// Stops that a report shows.
const STOPS_SHOWN: usize = 32;

/// A divergence and the state of the replica that saw it.
#[derive(Debug)]
pub struct Report {
    divergence: Divergence,
    /// Last stop before it at which the log and the replay agreed.
    agreed: Option<StopRecord>,
    registers: kvm_bindings::kvm_regs,
    table: String,
    instructions: String,
    stops: Vec<StopRecord>,
}

impl Report {
    /// The report of an execution that has just diverged.
    #[must_use]
    pub fn new(divergence: &Divergence, execution: &Execution) -> Self {
        let stops: Vec<StopRecord> = execution.history().tail(STOPS_SHOWN).cloned().collect();
        let before = |record: &&StopRecord| record.logged && record.position != divergence.replayed.position;
        let (registers, table, instructions) = match execution.vcpu().state() {
            Ok(state) => (
                state.regs,
                registers::state_table(&state),
                disassembly::around(&memory_of(execution.vcpu(), &state), state.regs.rip),
            ),
            // The general registers of the exit are there whatever KVM says now.
            Err(error) => (execution.vcpu().registers(), format!("  {error}\n"), String::new()),
        };
        Self {
            divergence: divergence.clone(),
            agreed: execution.history().all().filter(before).last().cloned(),
            registers,
            table,
            instructions,
            stops,
        }
    }

    /// For people, several lines.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("{}\n\n", self.divergence);
        let agreed = self.agreed.as_ref().map_or_else(
            || "no stop before it that the log says anything about is kept".to_owned(),
            |record| {
                format!(
                    "log and replay agreed at entry {} (exit {}); the cause lies in the {} exits since",
                    record.entry,
                    record.position.exits,
                    self.divergence.replayed.position.exits - record.position.exits
                )
            },
        );
        let _ = write!(
            text,
            "{agreed}\n\nregisters of the replay\n{}\ninstructions around\n{}\nthe last {} stops of the replay: exit, entry, access, where, what happened\n",
            self.table,
            self.instructions,
            self.stops.len()
        );
        for record in &self.stops {
            let _ = writeln!(text, "{}", trace::line(record));
        }
        text.push_str(
            "\nThe recording side's registers are in the .stops.jsonl file that its host writes, if started with --reports, when this replica\n\
             ends: `ft-vcpu-shim bisect --report <VM>.diverged.json --stops <VM>.stops.jsonl` sets them side by side (docs/debugging.md).\n",
        );
        text
    }

    /// For programs: [`Report::json`], and the stops with all their registers as `records`. What `bisect --report` reads.
    #[must_use]
    pub fn file_json(&self) -> Value {
        let mut report = self.json();
        report["records"] = self.stops.iter().map(trace::json).collect();
        report
    }

    /// For programs, without what would make an event too long.
    #[must_use]
    pub fn json(&self) -> Value {
        let divergence = &self.divergence;
        json!({
            "entry": divergence.entry.0,
            "kind": divergence.kind,
            "exits": divergence.recorded.position.exits,
            "what": divergence.what,
            "recorded": stop_json(&divergence.recorded),
            "replayed": stop_json(&divergence.replayed),
            "agreed": self.agreed.as_ref().map(|record| json!({"entry": record.entry.0, "exits": record.position.exits})),
            "registers": registers::general_json(&self.registers),
            "instructions": self.instructions.lines().collect::<Vec<_>>(),
            "stops": self.stops.iter().map(trace::line).collect::<Vec<_>>(),
        })
    }
}

/// A stop as the log has it.
#[must_use]
pub fn stop_json(stop: &Stop) -> Value {
    json!({
        "exits": stop.position.exits,
        "offset": stop.position.offset,
        "rip": format!("{:#x}", stop.position.rip),
        "rcx": format!("{:#x}", stop.position.rcx),
        "digest": format!("{:016x}", stop.digest),
    })
}

/// The file in `directory` for `kind` of report about a VM's generation.
#[must_use]
pub fn file(directory: &Path, vm: &str, generation: u32, kind: &str) -> PathBuf {
    directory.join(format!("{vm}.g{generation}.{kind}"))
}

/// Writes all stops that `history` has, oldest first, as JSON lines: what `bisect --stops` reads.
///
/// # Errors
/// What the file system refuses.
pub fn write_stops(history: &History, path: &Path) -> std::io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    for record in history.all() {
        writeln!(out, "{}", trace::json(record))?;
    }
    out.flush()
}
