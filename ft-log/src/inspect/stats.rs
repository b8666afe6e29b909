//! `ft-log stats`: what a journal consists of.

use std::{collections::BTreeMap, io::Write};

use clap::Args;
use ft_client::journal::JournalReader;
use serde_json::{Map, Value, json};

use super::{Condition, Ending, Format, InspectError, Source, describe};

/// Which journals.
#[derive(Clone, Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    entries: u64,
    bytes: u64,
}

impl Sum {
    fn add(&mut self, bytes: usize) {
        self.entries += 1;
        self.bytes += bytes as u64;
    }

    fn json(self) -> Value {
        json!({ "entries": self.entries, "bytes": self.bytes })
    }
}

#[derive(Debug, Default)]
struct Stats {
    kinds: BTreeMap<&'static str, Sum>,
    devices: BTreeMap<String, Sum>,
    all: Sum,
    lsns: Option<(u64, u64)>,
    largest: usize,
    exits: Option<(u64, u64)>,
}

impl Stats {
    fn count(&mut self, reader: &mut JournalReader) -> Result<(), ft_client::journal::JournalError> {
        while let Some((entry, bytes)) = reader.next_entry()? {
            let bytes = bytes.len();
            self.kinds.entry(entry.body.name()).or_default().add(bytes);
            self.devices
                .entry(describe::device(entry.device))
                .or_default()
                .add(bytes);
            self.all.add(bytes);
            self.largest = self.largest.max(bytes);
            let lsn = entry.lsn.0;
            self.lsns = Some((self.lsns.map_or(lsn, |(first, _)| first), lsn));
            if let Some(stop) = entry.body.stop() {
                let exits = stop.position.exits;
                self.exits = Some((self.exits.map_or(exits, |(first, _)| first), exits));
            }
        }
        Ok(())
    }
}

pub(super) fn run(arguments: &Arguments, out: &mut dyn Write) -> Result<Condition, InspectError> {
    let mut worst = Condition::Whole;
    for reader in arguments.source.open()? {
        let mut reader = match reader {
            Ok(reader) => reader,
            Err(error) => {
                eprintln!("ft-log: {error}");
                worst = Condition::Damaged;
                continue;
            }
        };
        let mut stats = Stats::default();
        let error = stats.count(&mut reader).err();
        let ending = Ending::of(&reader, error.as_ref());
        worst = worst.max(ending.condition);
        match arguments.source.format {
            Format::Table => table(&reader, &stats, &ending, out)?,
            Format::Json => writeln!(out, "{}", as_json(&reader, &stats, &ending))?,
        }
    }
    Ok(worst)
}

fn as_json(reader: &JournalReader, stats: &Stats, ending: &Ending) -> Value {
    let by = |sums: &mut dyn Iterator<Item = (String, Sum)>| -> Map<String, Value> {
        sums.map(|(name, sum)| (name, sum.json())).collect()
    };
    let range = |range: Option<(u64, u64)>| range.map(|(first, last)| json!([first, last]));
    json!({
        "vm": reader.name().vm,
        "generation": reader.name().generation.0,
        "segments": reader.segment_paths().len(),
        "first_segment": reader.first_index(),
        "lsns": range(stats.lsns),
        "exits": range(stats.exits),
        "entries": stats.all.entries,
        "bytes": stats.all.bytes,
        "largest_entry_bytes": stats.largest,
        "kinds": by(&mut stats.kinds.iter().map(|(name, sum)| ((*name).to_owned(), *sum))),
        "devices": by(&mut stats.devices.iter().map(|(name, sum)| (name.clone(), *sum))),
        "condition": ending.condition.name(),
        "reason": ending.text,
    })
}

fn table(reader: &JournalReader, stats: &Stats, ending: &Ending, out: &mut dyn Write) -> Result<(), InspectError> {
    let range = |range: Option<(u64, u64)>| range.map_or("none".into(), |(first, last)| format!("{first}..{last}"));
    writeln!(out, "{}", reader.name())?;
    writeln!(
        out,
        "  segments {} from {:06}, LSN {}, exits {}, largest entry {} bytes",
        reader.segment_paths().len(),
        reader.first_index(),
        range(stats.lsns),
        range(stats.exits),
        stats.largest,
    )?;
    let mut row = |name: &str, sum: &Sum| {
        let mean = sum.bytes.checked_div(sum.entries).unwrap_or(0);
        writeln!(
            out,
            "  {name:<12} {:>12} entries {:>15} bytes {mean:>8} bytes/entry",
            sum.entries, sum.bytes
        )
    };
    for (kind, sum) in &stats.kinds {
        row(kind, sum)?;
    }
    for (device, sum) in &stats.devices {
        row(&format!("device {device}"), sum)?;
    }
    row("all", &stats.all)?;
    if let Some(text) = &ending.text {
        writeln!(out, "  {text}")?;
    }
    Ok(())
}
