//! `ft-log dump`: one line an entry.

use std::{io::Write, ops::RangeInclusive};

use clap::Args;
use ft_protocol::{
    DeviceId,
    entry::{Entry, NAMES},
};
use serde_json::json;

use super::{Condition, Ending, Format, InspectError, Source, describe};

/// Which entries of which journals.
#[derive(Clone, Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// Only entries of these kinds, comma separated.
    #[arg(long, value_name = "KINDS", value_delimiter = ',', value_parser = NAMES)]
    kind: Vec<String>,
    /// Only entries of these LSNs: N, FROM.., ..TO or FROM..TO, both ends included.
    #[arg(long, value_name = "RANGE", value_parser = lsn_range, default_value = "..")]
    lsn: RangeInclusive<u64>,
    /// Only entries about these devices, comma separated: numbers, or shim.
    #[arg(long, value_name = "DEVICES", value_delimiter = ',', value_parser = device)]
    device: Vec<u8>,
    /// Payloads in full.
    #[arg(long)]
    payload: bool,
    /// No more than so many entries.
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
}

fn lsn_range(text: &str) -> Result<RangeInclusive<u64>, String> {
    let number = |text: &str, otherwise| match text {
        "" => Ok(otherwise),
        _ => text
            .parse::<u64>()
            .map_err(|_| format!("'{text}' is no LSN: N, FROM.., ..TO or FROM..TO")),
    };
    match text.split_once("..") {
        None => number(text, 0).map(|lsn| lsn..=lsn),
        Some((from, to)) => Ok(number(from, 0)?..=number(to, u64::MAX)?),
    }
}

fn device(text: &str) -> Result<u8, String> {
    match text {
        "shim" => Ok(DeviceId::SHIM.0),
        _ => text
            .parse()
            .map_err(|_| format!("'{text}' is no device: a number from 0, or shim")),
    }
}

impl Arguments {
    fn wants(&self, entry: &Entry<'_>) -> bool {
        self.lsn.contains(&entry.lsn.0)
            && (self.kind.is_empty() || self.kind.iter().any(|kind| kind == entry.body.name()))
            && (self.device.is_empty() || self.device.contains(&entry.device.0))
    }
}

pub(super) fn run(arguments: &Arguments, out: &mut dyn Write) -> Result<Condition, InspectError> {
    let is_table = arguments.source.format == Format::Table;
    let mut worst = Condition::Whole;
    let mut shown = 0;
    if is_table {
        let columns = ("LSN", "GEN", "KIND", "DEVICE", "QUEUE", "BYTES", "AT");
        let (lsn, generation, kind, device, queue, bytes, at) = columns;
        writeln!(
            out,
            "{lsn:>10} {generation:>4} {kind:<9} {device:<6} {queue:>5} {bytes:>7} {at:>12}  CONTENT"
        )?;
    }
    for reader in arguments.source.open()? {
        let mut reader = match reader {
            Ok(reader) => reader,
            Err(error) => {
                eprintln!("ft-log: {error}");
                worst = Condition::Damaged;
                continue;
            }
        };
        let vm = reader.name().vm.clone();
        let error = loop {
            if arguments.limit.is_some_and(|limit| shown >= limit) {
                return Ok(worst);
            }
            let (entry, bytes) = match reader.next_entry() {
                Ok(Some(next)) => next,
                Ok(None) => break None,
                Err(error) => break Some(error),
            };
            if entry.lsn.0 > *arguments.lsn.end() {
                break None;
            }
            if !arguments.wants(&entry) {
                continue;
            }
            shown += 1;
            if is_table {
                let at = entry
                    .body
                    .stop()
                    .map_or_else(String::new, |stop| describe::position(&stop));
                writeln!(
                    out,
                    "{:>10} {:>4} {:<9} {:<6} {:>5} {:>7} {at:>12}  {}",
                    entry.lsn.0,
                    entry.generation.0,
                    entry.body.name(),
                    describe::device(entry.device),
                    entry.queue,
                    bytes.len(),
                    describe::line(&entry.body, arguments.payload),
                )?;
            } else {
                let entry = describe::json(&vm, &entry, bytes.len(), arguments.payload);
                writeln!(out, "{entry}")?;
            }
        };
        let ending = Ending::of(&reader, error.as_ref());
        worst = worst.max(ending.condition);
        if let Some(text) = ending.text {
            match arguments.source.format {
                Format::Table => writeln!(out, "{text}")?,
                Format::Json => writeln!(
                    out,
                    "{}",
                    json!({ "vm": vm, "end": ending.condition.name(), "reason": text })
                )?,
            }
        }
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_both_ends_or_none() {
        for (text, expected) in [
            ("..", 0..=u64::MAX),
            ("7", 7..=7),
            ("3..", 3..=u64::MAX),
            ("..9", 0..=9),
            ("3..9", 3..=9),
        ] {
            assert_eq!(lsn_range(text), Ok(expected), "{text}");
        }
        assert!(lsn_range("a..3").unwrap_err().contains("'a'"));
        assert_eq!((device("shim"), device("3")), (Ok(255), Ok(3)));
        assert!(device("blk0").unwrap_err().contains("'blk0'"));
    }
}
