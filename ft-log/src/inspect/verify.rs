//! `ft-log verify`: every flipped bit, every missing segment, and a torn tail.
//!
//! Behind damage it goes on at the next whole entry, so that one look finds what there is to find.

use std::io::Write;

use clap::Args;
use ft_client::journal::{JournalError, JournalLock, JournalReader, TornTail};
use serde_json::{Value, json};

use super::{Condition, Format, InspectError, Source, last_good_json, torn_json};

/// Places of damage that are listed; a journal with more is not worth a longer list.
const LISTED_MAX: usize = 100;

/// Which journals.
#[derive(Clone, Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// Cut a torn tail off, so that the journal is whole again. Damage is never touched, nor a journal that a running ft-log writes.
    #[arg(long)]
    cut_torn_tail: bool,
}

/// What a look at one journal found.
struct Findings {
    journal: String,
    vm: String,
    generation: u32,
    segments: usize,
    first: Option<u64>,
    entries: u64,
    bytes: u64,
    damage: Vec<String>,
    more_damage: u64,
    torn: Option<TornTail>,
    last_good: Value,
}

impl Findings {
    fn condition(&self) -> Condition {
        match (self.damage.is_empty(), &self.torn) {
            (false, _) => Condition::Damaged,
            (true, Some(_)) => Condition::Torn,
            (true, None) => Condition::Whole,
        }
    }
}

fn examine(mut reader: JournalReader) -> Findings {
    let mut found = Findings {
        journal: reader.name().to_string(),
        vm: reader.name().vm.clone(),
        generation: reader.name().generation.0,
        segments: reader.segment_paths().len(),
        first: None,
        entries: 0,
        bytes: 0,
        damage: Vec::new(),
        more_damage: 0,
        torn: None,
        last_good: Value::Null,
    };
    loop {
        match reader.next_entry() {
            Ok(Some((entry, bytes))) => {
                found.first.get_or_insert(entry.lsn.0);
                found.entries += 1;
                found.bytes += bytes.len() as u64;
            }
            Ok(None) => break,
            Err(error) => {
                match found.damage.len() {
                    0..LISTED_MAX => found.damage.push(error.to_string()),
                    _ => found.more_damage += 1,
                }
                if !reader.skip_damage() {
                    break;
                }
            }
        }
    }
    found.torn = reader.torn_tail().cloned();
    found.last_good = last_good_json(reader.last_good());
    found
}

pub(super) fn run(arguments: &Arguments, out: &mut dyn Write) -> Result<Condition, InspectError> {
    // Before the look: what is cut off is what nobody is writing.
    let locks = if arguments.cut_torn_tail {
        lock(&arguments.source)?
    } else {
        Vec::new()
    };
    let mut worst = Condition::Whole;
    for reader in arguments.source.open()? {
        let findings = match reader {
            Ok(reader) => examine(reader),
            Err(error) => {
                worst = Condition::Damaged;
                say_unreadable(&error, arguments.source.format, out)?;
                continue;
            }
        };
        worst = worst.max(findings.condition());
        match arguments.source.format {
            Format::Table => table(&findings, out)?,
            Format::Json => writeln!(out, "{}", as_json(&findings))?,
        }
        if let (Condition::Torn, Some(torn)) = (findings.condition(), &findings.torn)
            && let Some(lock) = locks.iter().find(|lock| lock.covers(&torn.path))
        {
            torn.cut(lock).map_err(|source| InspectError::Cut {
                path: torn.path.clone(),
                source,
            })?;
            if arguments.source.format == Format::Table {
                writeln!(out, "  the torn tail was cut off: the journal is whole")?;
            }
        }
    }
    Ok(worst)
}

/// Locks every journal that is looked at.
fn lock(source: &Source) -> Result<Vec<JournalLock>, InspectError> {
    let mut locks: Vec<JournalLock> = Vec::new();
    for reader in source.open()?.into_iter().flatten() {
        let Some(segment) = reader.segment_paths().first() else {
            continue;
        };
        if !locks.iter().any(|lock| lock.covers(segment)) {
            locks.push(JournalLock::of_segment(segment)?);
        }
    }
    Ok(locks)
}

fn say_unreadable(error: &JournalError, format: Format, out: &mut dyn Write) -> Result<(), InspectError> {
    match format {
        Format::Table => writeln!(out, "{error}")?,
        Format::Json => writeln!(
            out,
            "{}",
            json!({ "condition": "damaged", "damage": [error.to_string()] })
        )?,
    }
    Ok(())
}

fn as_json(findings: &Findings) -> Value {
    json!({
        "vm": findings.vm,
        "generation": findings.generation,
        "condition": findings.condition().name(),
        "segments": findings.segments,
        "first_lsn": findings.first,
        "entries": findings.entries,
        "bytes": findings.bytes,
        "damage": findings.damage,
        "damage_not_listed": findings.more_damage,
        "torn": findings.torn.as_ref().map(torn_json),
        "last_good": findings.last_good,
    })
}

fn table(findings: &Findings, out: &mut dyn Write) -> Result<(), InspectError> {
    writeln!(
        out,
        "{}: {}, {} entries of {} bytes in {} segments",
        findings.journal,
        findings.condition().name(),
        findings.entries,
        findings.bytes,
        findings.segments,
    )?;
    if let Some(first) = findings.first.filter(|first| *first > 1) {
        writeln!(
            out,
            "  begins at entry {first}: what was before is not here (--journal-keep-segments, or a new backup was taken there)"
        )?;
    }
    for damage in &findings.damage {
        writeln!(out, "  {damage}")?;
    }
    if findings.more_damage > 0 {
        writeln!(out, "  and {} more places", findings.more_damage)?;
    }
    if let Some(torn) = &findings.torn {
        writeln!(out, "  {torn}")?;
    }
    Ok(())
}
