//! Entries of the local clients: into the journal and onto the channel, or, live without a backup, nowhere.

use std::io;

use ft_client::events::monotonic_ns;
use ft_protocol::{Event, Role};

use super::Daemon;
use crate::{
    channel,
    config::Side,
    merge::{Batch, Violation},
};

impl Daemon {
    /// Whether entries are taken from the rings now. With a full backlog they are not: the rings fill up and the producers
    /// stop, which is the log's flow control.
    pub(super) fn takes_entries(&self) -> bool {
        match self.replica.role() {
            Role::Recording | Role::Arbitrating if self.config.role == Side::Primary => {
                self.link.backlog() < channel::BACKLOG_BYTES_MAX
            }
            Role::Live => true,
            _ => false,
        }
    }

    /// Takes what the clients appended; whether there was something.
    pub(super) fn record(&mut self) -> io::Result<bool> {
        match self.replica.role() {
            Role::Halted | Role::Off => return Ok(false),
            Role::Live => return self.discard(),
            _ if self.takes_entries() => {}
            Role::Recording => return Ok(false),
            Role::Arbitrating if self.config.role == Side::Primary => return Ok(false),
            // This side does not execute: a claimed LSN would be lost.
            _ => {
                return match self.local.merger.check_empty() {
                    Ok(()) => Ok(false),
                    Err(violation) => self.breached(violation).map(|()| true),
                };
            }
        }
        let generation = self.replica.generation();
        let out = match self.link.channel.as_mut() {
            Some(channel) => channel.outgoing(),
            None => {
                self.scratch.clear();
                &mut self.scratch
            }
        };
        let start = out.len();
        let taken = self.local.merger.take(generation, false, out);
        let Some(batch) = self.sort_out(taken)? else {
            return Ok(false);
        };
        let frames = match &mut self.link.channel {
            Some(channel) => &channel.outgoing()[start..],
            None => &self.scratch[start..],
        };
        let bytes = frames.len();
        let journalled = self.journal.append(frames, batch.from, monotonic_ns());
        self.count(batch, bytes);
        let through = batch.through;
        self.handle(Event::Appended { through })?;
        if let Some(channel) = self.link.channel() {
            channel.retract();
        }
        if let Err(failure) = journalled {
            self.journal_failed(failure)?;
        }
        self.note_power_off(batch)?;
        Ok(true)
    }

    /// Live: nobody replays this log.
    fn discard(&mut self) -> io::Result<bool> {
        self.scratch.clear();
        let generation = self.replica.generation();
        let previous_too = self.config.role == Side::Primary;
        let taken = self.local.merger.take(generation, previous_too, &mut self.scratch);
        let Some(batch) = self.sort_out(taken)? else {
            return Ok(false);
        };
        self.count(batch, self.scratch.len());
        self.note_power_off(batch)?;
        Ok(true)
    }

    fn sort_out(&mut self, taken: Result<Option<Batch>, Violation>) -> io::Result<Option<Batch>> {
        match taken {
            Ok(batch) => Ok(batch),
            Err(violation) => {
                if let Some(channel) = self.link.channel() {
                    channel.retract();
                }
                self.breached(violation)?;
                Ok(None)
            }
        }
    }

    pub(super) fn count(&mut self, batch: Batch, bytes: usize) {
        self.counters.entries += batch.through.0 - batch.from.0 + 1;
        self.counters.bytes += bytes as u64;
    }

    pub(super) fn note_power_off(&mut self, batch: Batch) -> io::Result<()> {
        let Some(lsn) = batch.power_off else { return Ok(()) };
        self.power_off = Some(lsn);
        self.handle(Event::PowerOffEntry { lsn })
    }
}
