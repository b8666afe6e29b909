//! `ft-vcpu-shim replay`: a finished journal, executed again, offline.

use std::{path::PathBuf, sync::Arc};

use clap::Args;
use ft_client::journal::JournalReader;
use ft_protocol::{Body, Generation, entry::Entry};
use serde_json::json;

use super::machine::MachineArgs;
use crate::{
    device::{Port, describe, offline::OfflinePort},
    error::Error,
    lockstep::{
        execution::End,
        replay::{Replayer, Successor},
        source::Source,
        timeline::Timeline,
    },
};

/// Flags of `replay`.
#[derive(Args, Debug)]
pub struct ReplayArgs {
    /// Directory of the journal.
    journal: PathBuf,
    #[command(flatten)]
    machine: MachineArgs,
    /// Also writes the final digests to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    digests: Option<PathBuf>,
}

struct Journal {
    reader: JournalReader,
}

impl Source for Journal {
    fn next(&mut self, frame: &mut Vec<u8>) -> Result<Option<Generation>, Error> {
        frame.clear();
        match self.reader.next_entry() {
            Ok(Some((_, bytes))) => {
                frame.extend_from_slice(bytes);
                return Ok(None);
            }
            Ok(None) => {}
            Err(error) => return Err(Error::Journal(error.to_string())),
        }
        if let Some(tail) = self.reader.torn_tail() {
            tracing::warn!("{tail}");
        }
        // The end of the file is the end of the log; the generation does not matter, nobody goes on.
        Ok(Some(Generation(0)))
    }

    fn finish(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

impl Successor for Journal {
    fn succeed(self, _console: Option<std::fs::File>, _delivered: Vec<u64>, _now_ns: u64) -> Option<Box<dyn Timeline>> {
        None
    }
}

fn open(args: &ReplayArgs) -> Result<JournalReader, Error> {
    JournalReader::open(&args.journal)
        .map_err(|error| Error::Journal(format!("cannot open the journal: {error}. Check the directory")))
}

/// The devices of the recorded machine.
fn recorded_devices(args: &ReplayArgs) -> Result<Vec<describe::Description>, Error> {
    let mut frame = Vec::new();
    let mut source = Journal { reader: open(args)? };
    if source.next(&mut frame)?.is_some() {
        return Err(Error::Journal(format!(
            "the journal in {} has no entry",
            args.journal.display()
        )));
    }
    let entry = Entry::decode(&frame).map_err(|source| Error::Log {
        after: ft_protocol::Lsn::ZERO,
        source,
    })?;
    match entry.body {
        Body::Boot { devices, .. } => describe::decode(devices).ok_or_else(|| {
            Error::Journal("the journal's power-on entry describes no devices this release knows".into())
        }),
        _ => Err(Error::Journal("the journal does not begin with a power-on".into())),
    }
}

/// Replays a journal and prints the digests at its end.
///
/// # Errors
/// Divergence, damage, or a machine that is not the recorded one.
pub fn replay(args: &ReplayArgs) -> Result<(), Error> {
    let machine = args.machine.load()?;
    let mut ports: Vec<Box<dyn Port>> = Vec::new();
    for description in recorded_devices(args)? {
        ports.push(Box::new(OfflinePort::new(description, Arc::clone(&machine.ram))?));
    }
    let timeline = Box::new(Replayer::new(Journal { reader: open(args)? }, None));
    let mut execution = machine.power_on(ports, timeline, Box::new(|_, _| {}))?;
    let end = execution.run().map_err(|error| match error {
        Error::Journal(damage) => {
            let at = execution.position();
            Error::Journal(format!(
                "{damage}; the replay had come to exit {} at RIP {:#x}",
                at.exits, at.rip
            ))
        }
        other => other,
    })?;
    let (position, digests) = (execution.position(), execution.digests());
    let ended = match end {
        End::PowerOff => "power-off",
        End::Reset => "reset",
        End::LogEnd => "end of log",
    };
    let report = json!({
        "ended": ended,
        "exits": position.exits,
        "rip": format!("{:#x}", position.rip),
        "exit_digest": format!("{:016x}", digests.exits),
        "register_digest": format!("{:016x}", digests.registers),
        "output_digest": format!("{:016x}", digests.outputs),
    });
    println!("{report}");
    if let Some(path) = &args.digests {
        std::fs::write(path, format!("{report}\n")).map_err(|source| {
            Error::environment(format!("cannot write {}: {source}. Check --digests", path.display()))
        })?;
    }
    Ok(())
}
