//! One line a stop, for people or as JSON.
//!
//! ```text
//!     exit  entry  access                                       at                what happened
//!     1044    57   mmio-write d0001050 4 01000000          rip 0000000000101f3a   kick 1.1, time 12044210 ns, interrupt 2b
//!     1045     -   halt                                    rip 0000000000100311
//! ```

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use ft_client::handshake::hex;
use serde_json::{Value, json};

use super::registers;
use crate::{
    error::Error,
    lockstep::history::{Access, AccessKind, Event, StopRecord},
};

fn access_text(access: &Access) -> String {
    let name = access.kind.name();
    match access.kind {
        AccessKind::Halt | AccessKind::Window | AccessKind::Forced | AccessKind::Named | AccessKind::Other => {
            name.into()
        }
        _ => {
            let more = if access.bytes as usize > access.data().len() {
                "..."
            } else {
                ""
            };
            format!(
                "{name} {:x} {} {}{more}",
                access.address,
                access.bytes,
                hex(access.data())
            )
        }
    }
}

fn event_text(event: &Event) -> String {
    match event {
        Event::Time(now_ns) => format!("time {now_ns} ns"),
        Event::Kick { device, queue } => format!("kick {device}.{queue}"),
        Event::Deliver { device, through } => format!("deliver {device} through {through}"),
        Event::Console { bytes } => format!("console {bytes} bytes"),
        Event::Interrupt { vector } => format!("interrupt {vector:02x}"),
        Event::PowerOff { reset: false } => "power-off".into(),
        Event::PowerOff { reset: true } => "reset".into(),
        Event::Live { generation } => format!("live in generation {generation}"),
    }
}

fn event_json(event: &Event) -> Value {
    match event {
        Event::Time(now_ns) => json!({"time_ns": now_ns}),
        Event::Kick { device, queue } => json!({"kick": {"device": device, "queue": queue}}),
        Event::Deliver { device, through } => json!({"deliver": {"device": device, "through": through}}),
        Event::Console { bytes } => json!({"console": {"bytes": bytes}}),
        Event::Interrupt { vector } => json!({"interrupt": vector}),
        Event::PowerOff { reset } => json!({"power_off": {"reset": reset}}),
        Event::Live { generation } => json!({"live": {"generation": generation.0}}),
    }
}

/// A stop as one line, without its end.
#[must_use]
pub fn line(record: &StopRecord) -> String {
    let offset = match record.position.offset {
        0 => String::new(),
        offset => format!("+{offset}"),
    };
    let entry = if record.logged {
        record.entry.to_string()
    } else {
        "-".into()
    };
    let mut events: Vec<String> = record.events().map(|event| event_text(&event)).collect();
    let left_out = (record.event_count as usize).saturating_sub(events.len());
    if left_out > 0 {
        events.push(format!("and {left_out} more"));
    }
    let text = format!(
        "{:>9}{offset} {entry:>8}  {:<42} rip {:016x}  {}",
        record.position.exits,
        access_text(&record.access),
        record.position.rip,
        events.join(", ")
    );
    text.trim_end().to_owned()
}

/// A stop as a JSON object. `lsn` is null where no entry belongs to the stop.
#[must_use]
pub fn json(record: &StopRecord) -> Value {
    let events: Vec<Value> = record.events().map(|event| event_json(&event)).collect();
    json!({
        "exits": record.position.exits,
        "offset": record.position.offset,
        "lsn": record.logged.then_some(record.entry.0),
        "access": record.access.kind.name(),
        "address": format!("{:#x}", record.access.address),
        "bytes": record.access.bytes,
        "data": hex(record.access.data()),
        "events": events,
        "events_left_out": (record.event_count as usize).saturating_sub(events.len()),
        "digest": format!("{:016x}", record.digest),
        "registers": registers::general_json(&record.registers),
    })
}

/// A file that is created or replaced; `-` is standard output.
pub(super) fn out(path: &Path) -> io::Result<Box<dyn Write>> {
    Ok(if path == Path::new("-") {
        Box::new(BufWriter::new(io::stdout()))
    } else {
        Box::new(BufWriter::new(File::create(path)?))
    })
}

/// Where a trace goes.
pub struct Trace {
    out: Box<dyn Write>,
    as_json: bool,
    name: String,
}

impl Trace {
    /// A trace to `path`, which is created or replaced; `-` is standard output.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn open(path: &Path, as_json: bool) -> Result<Self, Error> {
        let name = path.display().to_string();
        let out =
            out(path).map_err(|source| Error::environment(format!("cannot write {name}: {source}. Check --trace")))?;
        Ok(Self { out, as_json, name })
    }

    /// Writes one stop.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn stop(&mut self, record: &StopRecord) -> Result<(), Error> {
        let written = if self.as_json {
            writeln!(self.out, "{}", json(record))
        } else {
            writeln!(self.out, "{}", line(record))
        };
        self.check(written)
    }

    /// Nothing more follows.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn finish(mut self) -> Result<(), Error> {
        let written = self.out.flush();
        self.check(written)
    }

    fn check(&self, written: io::Result<()>) -> Result<(), Error> {
        written.map_err(|source| {
            Error::environment(format!(
                "cannot write the trace to {}: {source}. Check --trace",
                self.name
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use ft_protocol::{Lsn, Position};
    use kvm_bindings::kvm_regs;

    use super::*;
    use crate::{lockstep::history::History, machine::vcpu::Exit};

    fn record() -> StopRecord {
        let mut history = History::default();
        let position = Position {
            exits: 12,
            offset: 0,
            rip: 0x10_0000,
            rcx: 0,
        };
        let access = Access::of(&Exit::MmioWrite { address: 0xd000_1050 }, &[1, 0, 0, 0]);
        history.begin(position, access, kvm_regs::default(), 5, Lsn(4));
        history.event(Event::Kick { device: 1, queue: 1 });
        history.event(Event::Interrupt { vector: 0x2b });
        history.settled(6, Lsn(5));
        history.last().unwrap().clone()
    }

    #[test]
    fn a_line_says_what_happened_at_a_stop() {
        let text = line(&record());
        for part in [
            "12",
            " 5 ",
            "mmio-write d0001050 4 01000000",
            "rip 0000000000100000",
            "kick 1.1, interrupt 2b",
        ] {
            assert!(text.contains(part), "'{part}' is missing: {text}");
        }
        assert_eq!(json(&record())["lsn"], 5);
        assert_eq!(json(&record())["events"][0]["kick"]["queue"], 1);
    }
}
