//! Entries of the local clients: into the journal and the backlog of the channel, or, live without a backup, nowhere.

use std::io;

use ft_client::events::monotonic_ns;
use ft_protocol::{Event, Role};

use super::Daemon;
use crate::merge::{Batch, Violation};

impl Daemon {
    /// Takes what the clients appended; whether there was something.
    pub(super) fn record(&mut self) -> io::Result<bool> {
        match self.vm.replica.role() {
            Role::Halted | Role::Off => return Ok(false),
            Role::Live if !self.vm.replica.keeps_entries() => return self.discard(),
            Role::Live | Role::Recording | Role::Arbitrating if self.vm.leads() => {
                if !self.vm.takes_entries() {
                    return Ok(false);
                }
            }
            Role::Replaying if self.vm.replica.awaits_state() => return self.send_digests(),
            // This side does not execute: a claimed LSN would be lost.
            _ => {
                return match self.vm.local.merger.check_empty() {
                    Ok(()) => Ok(false),
                    Err(violation) => self.breached(violation).map(|()| true),
                };
            }
        }
        let generation = self.vm.replica.generation();
        let vm = &mut self.vm;
        let taken = vm.local.merger.take(generation, false, vm.backlog.tail());
        let Some(batch) = self.sort_out(taken)? else {
            self.vm.backlog.retract();
            return Ok(false);
        };
        let frames = self.vm.backlog.collected();
        let bytes = frames.len();
        let journalled = self
            .vm
            .journal
            .append(frames, batch.from, batch.through, monotonic_ns());
        let through = batch.through;
        self.vm.backlog.seal(through);
        self.vm.polling.took(monotonic_ns());
        self.count(batch, bytes);
        self.note_synced(batch)?;
        self.handle(Event::Appended { through })?;
        if let Err(failure) = journalled {
            self.journal_failed(failure)?;
        }
        self.note(batch)?;
        Ok(true)
    }

    /// Live: nobody replays this log.
    fn discard(&mut self) -> io::Result<bool> {
        self.scratch.clear();
        let generation = self.vm.replica.generation();
        let taken = self.vm.local.merger.take(generation, true, &mut self.scratch);
        let Some(batch) = self.sort_out(taken)? else {
            return Ok(false);
        };
        self.count(batch, self.scratch.len());
        // A new backup begins behind them.
        let through = batch.through;
        self.handle(Event::Appended { through })?;
        self.note(batch)?;
        Ok(true)
    }

    fn sort_out(&mut self, taken: Result<Option<Batch>, Violation>) -> io::Result<Option<Batch>> {
        match taken {
            Ok(batch) => Ok(batch),
            Err(violation) => {
                self.breached(violation)?;
                Ok(None)
            }
        }
    }

    pub(super) fn count(&mut self, batch: Batch, bytes: usize) {
        self.vm.counters.entries += batch.through.0 - batch.from.0 + 1;
        self.vm.counters.bytes += bytes as u64;
    }

    /// Told before what has it is counted as appended or received.
    pub(super) fn note_synced(&mut self, batch: Batch) -> io::Result<()> {
        match batch.synced {
            Some((lsn, instance)) => self.handle(Event::SyncedEntry { lsn, instance }),
            None => Ok(()),
        }
    }

    /// What ft-log itself has to know of the entries of a batch.
    pub(super) fn note(&mut self, batch: Batch) -> io::Result<()> {
        if let Some((lsn, timing)) = batch.configuration {
            self.note_configuration(lsn, timing)?;
        }
        let Some(lsn) = batch.power_off else { return Ok(()) };
        self.vm.power_off = Some(lsn);
        self.handle(Event::PowerOffEntry { lsn })
    }
}
