//! A new backup: what the core decides about it, done. The core's picture is in `ft_protocol::replica`.
//!
//! ```text
//!   survivor                                                       new backup
//!   region: synchronisation ──► devices append what they change
//!   device: compare ───────────── entry ───────────────────────►  device: what it holds
//!   device ◄── [replay ring] ◄──── digests ─────────────────────  [its ring] ◄──┘
//!   device: write (what differs), transferred ── entries ──────►  applied: the core adopts
//!   region: hold ──► devices obey ──► synced ──────────────────►
//! ```
//! The state travels as entries of the log: they have one order with what the guest writes meanwhile, so that nothing that is copied can
//! take the place of something newer. What a new backup says of its disks comes back as messages, which the core lets pass.

use std::io;

use ft_protocol::{Body, Event, Generation, Lsn, Role, message::Message};
use serde_json::json;
use tracing::{info, warn};

use super::Daemon;
use crate::exit::Exit;

impl Daemon {
    // ---- survivor ----------------------------------------------------------------------------------------------------

    /// Either side: a synchronisation begins behind entry `start`.
    pub(super) fn synchronise(&mut self, start: Lsn) {
        let generation = self.vm.replica.generation().0;
        if self.vm.leads() {
            self.vm.backlog.clear();
            info!("a new backup is being synchronised, from entry {start} on");
        } else {
            info!("this side is being synchronised, from entry {start} on");
        }
        self.vm.local.region.begin_synchronisation(start);
        self.vm.local.ring_all();
        self.events
            .emit("synchronising", json!({ "generation": generation, "start": start.0 }));
    }

    /// The survivor goes on without the backup that it was synchronising.
    pub(super) fn give_up(&mut self, reason: &str) {
        warn!("the new backup is given up, and the VM goes on alone: {reason}");
        self.events.emit("gave_up", json!({ "reason": reason }));
        self.vm.local.region.end_synchronisation();
        self.vm.local.ring_all();
        self.vm.backlog.clear();
    }

    /// What the new backup has applied: its device's pace is the pace of the transfer.
    pub(super) fn show_applied(&mut self) {
        let replica = &self.vm.replica;
        if replica.role() == Role::Live && replica.keeps_entries() {
            self.vm.local.region.set_peer_applied(replica.progress().replayed);
        }
    }

    /// What the new backup's disk holds, for the device that asked.
    pub(super) fn digests_came(&mut self, generation: Generation, message: &Message) {
        let replica = &self.vm.replica;
        let is_awaited = replica.role() == Role::Live && replica.keeps_entries() && generation == replica.generation();
        self.scratch.clear();
        message.encode(generation, &mut self.scratch);
        // Nobody asks for more than the ring has room for; who says more is not listened to.
        if !is_awaited || !self.vm.local.replay.fits(self.scratch.len()) {
            return;
        }
        let frame = &self.scratch;
        self.vm.local.replay.push(frame.len(), |out| out.copy_from_slice(frame));
        self.vm.local.ring_all();
    }

    /// Whether every device holds what it must.
    pub(super) fn look_at_holding(&mut self) -> io::Result<()> {
        let replica = &self.vm.replica;
        let is_awaited = replica.role() == Role::Recording && replica.is_holding();
        if is_awaited && self.vm.local.region.is_obeyed(self.vm.local.shim()) {
            let generation = replica.generation();
            self.handle(Event::Holding { generation })?;
        }
        Ok(())
    }

    /// The entry from which on the new backup may take over.
    pub(super) fn append_synced(&mut self, instance: u64) {
        let body = Body::Synced { instance };
        let lsn = self.append_own(&body);
        info!("outputs are held; with entry {lsn} the new backup may take over");
        self.events.emit("synced", json!({ "lsn": lsn.0 }));
    }

    // ---- new backup --------------------------------------------------------------------------------------------------

    /// What the local device says of its disk, for the survivor.
    pub(super) fn send_digests(&mut self) -> io::Result<bool> {
        self.scratch.clear();
        match self.vm.local.merger.take_digests(&mut self.scratch) {
            Ok(false) => return Ok(false),
            Ok(true) => {}
            Err(violation) => return self.breached(violation).map(|()| true),
        }
        let generation = self.vm.replica.generation();
        if let (Ok((_, message)), Some(channel)) = (Message::decode(&self.scratch), self.vm.link.channel()) {
            channel.message(&message, generation);
        }
        Ok(true)
    }

    /// Whether what was applied is the whole.
    pub(super) fn look_at_transfer(&mut self, applied: Lsn) -> io::Result<()> {
        let is_whole = self.vm.transferred.is_some_and(|lsn| lsn <= applied);
        if is_whole && self.vm.replica.awaits_state() {
            info!("the state is here, with entry {applied}");
            self.events.emit("adopted", json!({ "lsn": applied.0 }));
            self.handle(Event::Adopted)?;
            self.start_journal();
        }
        Ok(())
    }

    /// Nobody takes this side now. It asks again; a reason that stays is told once.
    pub(super) fn not_taken(&mut self, reason: &str) {
        if self.vm.link.is_new_refusal(reason) {
            warn!("this side is not taken as a new backup, and asks again: {reason}");
            self.events.emit("not_taken", json!({ "reason": reason }));
        }
    }

    /// What came is a part of a state, and the device has it in its image: another attempt is another start.
    pub(super) fn attempt_failed(&mut self) {
        self.vm.failure = Exit::Environment;
        self.queue.push_back(Event::LocalFailure {
            reason: "this side was not synchronised to the end, and is no backup: start it and its devices again when the VM is live on the peer".into(),
        });
    }
}
