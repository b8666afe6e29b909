//! A finished journal as the source of a replay: what is executed offline.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use ft_client::journal::JournalReader;
use ft_protocol::{Body, Generation, Lsn, entry::Entry};

use super::{
    execution::Execution,
    replay::{Replayer, Successor},
    source::Source,
    timeline::Timeline,
};
use crate::{
    command::machine::MachineArgs,
    device::{
        Port, describe,
        offline::{OfflinePort, OnFrame},
    },
    error::Error,
};

/// Opens the only journal in `directory`.
///
/// # Errors
/// [`Error::Journal`], with what to do.
pub fn open(directory: &Path) -> Result<JournalReader, Error> {
    JournalReader::open(directory)
        .map_err(|error| Error::Journal(format!("cannot open the journal: {error}. Check the directory")))
}

/// Entries of a finished journal.
#[derive(Debug)]
pub struct JournalSource {
    reader: JournalReader,
}

/// The entries of the only journal in `directory`.
///
/// # Errors
/// See [`open`].
pub fn source(directory: &Path) -> Result<JournalSource, Error> {
    Ok(JournalSource {
        reader: open(directory)?,
    })
}

impl Source for JournalSource {
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

impl Successor for JournalSource {
    fn succeed(self, _console: Option<File>, _delivered: Vec<u64>, _now_ns: u64) -> Option<Box<dyn Timeline>> {
        None
    }
}

/// A journal and the machine it was recorded on: what can be executed again, as often as one likes.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Directory of the journal.
    pub journal: PathBuf,
    /// The machine.
    pub machine: MachineArgs,
}

impl Recording {
    /// The recorded machine at power-on, about to execute the journal's first entries.
    ///
    /// # Errors
    /// No KVM, a journal that cannot be read, or a machine that is not the recorded one.
    pub fn power_on(&self) -> Result<Execution, Error> {
        self.power_on_telling(None)
    }

    /// The same; `on_frame` is told each frame that the guest sends.
    ///
    /// # Errors
    /// See [`Recording::power_on`].
    pub fn power_on_telling(&self, on_frame: Option<&OnFrame>) -> Result<Execution, Error> {
        let machine = self.machine.load()?;
        let mut ports: Vec<Box<dyn Port>> = Vec::new();
        for description in self.devices()? {
            ports.push(Box::new(OfflinePort::new(
                description,
                Arc::clone(&machine.ram),
                on_frame.cloned(),
            )?));
        }
        let source = source(&self.journal)?;
        let mut execution = machine.power_on(ports, Box::new(Replayer::new(source, None)), Box::new(|_, _| {}))?;
        execution.start()?;
        Ok(execution)
    }

    /// The devices of the recorded machine.
    fn devices(&self) -> Result<Vec<describe::Description>, Error> {
        let mut frame = Vec::new();
        let mut source = source(&self.journal)?;
        if source.next(&mut frame)?.is_some() {
            return Err(Error::Journal(format!(
                "the journal in {} has no entry",
                self.journal.display()
            )));
        }
        let entry = Entry::decode(&frame).map_err(|source| Error::Log {
            after: Lsn::ZERO,
            source,
        })?;
        match entry.body {
            Body::Boot { devices, .. } => describe::decode(devices).ok_or_else(|| {
                Error::Journal("the journal's power-on entry describes no devices this release knows".into())
            }),
            _ => Err(Error::Journal("the journal does not begin with a power-on".into())),
        }
    }
}

/// Adds to a journal's damage how far the execution of it came.
#[must_use]
pub fn with_position(error: Error, execution: &Execution) -> Error {
    match error {
        Error::Journal(damage) => {
            let at = execution.position();
            Error::Journal(format!(
                "{damage}; the replay had come to exit {} at RIP {:#x}",
                at.exits, at.rip
            ))
        }
        other => other,
    }
}
