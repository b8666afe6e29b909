//! Journals for people and scripts: `ft-log dump`, `verify`, `stats`. They read files only, beside a running daemon too.
//!
//! ```text
//!  JOURNAL: a directory ──► its journals (VM, generation) ┐
//!           one segment ──────────────────────────────────┴─► JournalReader ──► dump | verify | stats ──► table or JSON
//! ```
//! What was read is printed even if the journal ends in damage; the exit status tells which it was.

pub(crate) mod describe;
mod dump;
mod stats;
mod verify;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand, ValueEnum};
use ft_client::journal::{self, JournalError, JournalReader, LastGood, LockError, TornTail};
use ft_protocol::{Generation, Lsn};
use serde_json::{Value, json};
use thiserror::Error;

use crate::exit::Exit;

/// What to do with a journal.
#[derive(Clone, Debug, Subcommand)]
pub enum Inspect {
    /// Show the entries of a journal.
    Dump(dump::Arguments),
    /// Look for flipped bits, missing segments and a torn tail.
    Verify(verify::Arguments),
    /// Count entries and bytes by kind.
    Stats(stats::Arguments),
}

/// Which journals, and how to show them.
#[derive(Clone, Debug, Args)]
struct Source {
    /// Directory of journals, or one segment file.
    #[arg(value_name = "JOURNAL")]
    journal: PathBuf,
    /// Only the journals of this VM.
    #[arg(long)]
    vm: Option<String>,
    /// Only this generation.
    #[arg(long, value_name = "NUMBER")]
    generation: Option<u32>,
    /// Table for people, JSON for scripts (one object a line).
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum InspectError {
    /// The journal cannot be opened.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Nothing is left of what is there.
    #[error("{path}: no journal here is of the VM and generation that were asked for; there is: {found}")]
    NoneMatches {
        /// Where.
        path: PathBuf,
        /// What there is.
        found: String,
    },
    /// A torn tail that was to be cut off stays.
    #[error("{path}: cannot cut the torn tail off: {source}")]
    Cut {
        /// The segment.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A journal that is to be changed is being written.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// The result cannot be written.
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

/// How a journal ends. The worst of several counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Condition {
    /// Every byte is as it was written.
    #[default]
    Whole,
    /// Its last entry was not finished: its writer was killed.
    Torn,
    /// Something was changed, or is missing in the middle.
    Damaged,
}

impl Condition {
    fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Torn => "torn",
            Self::Damaged => "damaged",
        }
    }

    fn exit(self) -> Exit {
        match self {
            Self::Whole => Exit::Ordinary,
            Self::Torn => Exit::TornJournal,
            Self::Damaged => Exit::DamagedJournal,
        }
    }
}

/// Carries a subcommand out; what it finds goes to `out`.
///
/// # Errors
/// [`InspectError`]: there is no answer. A reader of `out` that is gone, as `head` is after some lines, is an ordinary end.
pub fn run(command: &Inspect, out: &mut dyn Write) -> Result<Exit, InspectError> {
    let done = match command {
        Inspect::Dump(arguments) => dump::run(arguments, out),
        Inspect::Verify(arguments) => verify::run(arguments, out),
        Inspect::Stats(arguments) => stats::run(arguments, out),
    };
    let flushed = done.and_then(|condition| Ok(out.flush().map(|()| condition)?));
    match flushed {
        Ok(condition) => Ok(condition.exit()),
        Err(InspectError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Ordinary),
        Err(error) => Err(error),
    }
}

impl Source {
    /// The journals that are meant, in order.
    fn open(&self) -> Result<Vec<Result<JournalReader, JournalError>>, InspectError> {
        let path = &self.journal;
        if path.is_file() {
            return Ok(vec![Ok(JournalReader::open_segment_file(path)?)]);
        }
        let names = journal::journals(path)?;
        if names.is_empty() {
            let directory = path.clone();
            return Err(JournalError::Nothing { directory }.into());
        }
        let found = names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let is_meant = |name: &journal::JournalName| {
            self.vm.as_ref().is_none_or(|vm| *vm == name.vm)
                && self
                    .generation
                    .is_none_or(|number| Generation(number) == name.generation)
        };
        let meant: Vec<_> = names.into_iter().filter(is_meant).collect();
        if meant.is_empty() {
            let path = path.clone();
            return Err(InspectError::NoneMatches { path, found });
        }
        let open = |name| JournalReader::open_retained(path, name);
        Ok(meant.into_iter().map(open).collect())
    }
}

/// What else there is to say of a place in a journal.
fn note(path: &Path, what: Value) -> Value {
    let mut note = json!({ "path": path.display().to_string() });
    if let (Some(note), Value::Object(what)) = (note.as_object_mut(), what) {
        note.extend(what);
    }
    note
}

fn torn_json(torn: &TornTail) -> Value {
    note(&torn.path, json!({ "offset": torn.offset, "bytes": torn.bytes }))
}

fn last_good_json(last_good: &LastGood) -> Value {
    match last_good.lsn {
        Lsn::ZERO => Value::Null,
        lsn => note(&last_good.path, json!({ "lsn": lsn.0, "end": last_good.end })),
    }
}

/// The end of a journal as `dump` and `stats` see it: they stop at damage, and say so.
struct Ending {
    condition: Condition,
    /// For people.
    text: Option<String>,
}

impl Ending {
    fn of(reader: &JournalReader, error: Option<&JournalError>) -> Self {
        match (error, reader.torn_tail()) {
            (Some(error), _) => Self {
                condition: Condition::Damaged,
                text: Some(error.to_string()),
            },
            (None, Some(torn)) => Self {
                condition: Condition::Torn,
                text: Some(torn.to_string()),
            },
            (None, None) => Self {
                condition: Condition::Whole,
                text: None,
            },
        }
    }
}

#[cfg(test)]
mod tests;
