//! The model of a synchronisation as the shells do it: the survivor's state is copied while it runs, travels beside the logging channel, and
//! is adopted. What the core decides about it is in `ft_protocol::replica`.

use ft_protocol::{Body, Committed, DeviceId, Event, Generation, Lsn, Role};
use rand::Rng;

use crate::{
    guest::Guest,
    host::{Host, HostId},
    mutants::Mutant,
    queue::Task,
    world::World,
};

/// The state of a VM as of one entry.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The last entry whose effect is in it.
    pub start: Lsn,
    /// The guest, its devices' bounce buffers included.
    pub guest: Guest,
    /// What the judge knows of the outputs that this guest came to.
    pub history: Vec<u64>,
}

impl Host {
    /// A backup that is no pair any more has nothing.
    pub(crate) fn forget_vm(&mut self) {
        self.guest = Guest::default();
        self.replay.clear();
        self.held.clear();
        self.committed = Committed::through(Lsn::ZERO);
        (self.stored, self.flushing) = (0, None);
        self.replay_end = Lsn::ZERO;
    }
}

impl World {
    /// Either side: a new backup begins with the state as of `start`.
    pub(crate) fn synchronise(&mut self, id: HostId, start: Lsn) {
        self.note(Some(id), || format!("synchronises from entry {start}"));
        if self.host(id).replica.leads() {
            let history = self.judge.history(id);
            let host = self.host(id);
            host.backlog.clear();
            host.sends_entries = false;
            let guest = host.guest.clone();
            host.snapshot = Some(Snapshot { start, guest, history });
            return;
        }
        let me = self.host(id).me;
        self.judge.joined(me, start);
        let host = self.host(id);
        host.forget_vm();
        host.stored = start.0;
        host.attempt += 1;
        let attempt = host.attempt;
        let transfer_ns = self.setting().transfer_ns;
        let delay_ns = self.rng.random_range(transfer_ns / 2..=transfer_ns);
        self.later(id, delay_ns, Task::StateHere { attempt, start });
    }

    /// The survivor goes on without the backup that it was synchronising.
    pub(crate) fn give_up(&mut self, id: HostId, reason: &str) {
        self.note(Some(id), || format!("gives the new backup up: {reason}"));
        let host = self.host(id);
        host.snapshot = None;
        host.backlog.clear();
        self.wake_guest(id, 0);
    }

    /// The state has arrived, if nothing came between it and its way.
    pub(crate) fn state_here(&mut self, id: HostId, attempt: u32, start: Lsn) {
        let host = self.host(id);
        if host.attempt != attempt || !host.replica.awaits_state() {
            return;
        }
        let is_open = HostId::BOTH.into_iter().all(|from| self.network.is_open(from));
        let survivor = self.host(id.other());
        if !survivor.is_running() {
            return;
        }
        if survivor.paused > 0 || !is_open {
            let delay_ns = self.setting().heartbeat_interval_ns;
            self.later(id, delay_ns, Task::StateHere { attempt, start });
            return;
        }
        let Some(snapshot) = survivor.snapshot.clone().filter(|snapshot| snapshot.start == start) else {
            return;
        };
        self.note(Some(id), || format!("has the state as of entry {start}"));
        self.judge.adopted(id, snapshot.history);
        self.host(id).guest = snapshot.guest;
        self.drive(id, Event::Adopted);
        if self.is_mutant(Mutant::WinUnsynced) {
            let host = self.host(id);
            let (lsn, instance) = (host.replica.last(), host.replica.instance());
            self.drive(id, Event::SyncedEntry { lsn, instance });
        }
        self.wake_guest(id, 0);
    }

    /// Outputs behind `after` are held from now on. The devices say so a little later, and the guest goes on meanwhile.
    pub(crate) fn hold_after(&mut self, id: HostId, after: Lsn) {
        self.note(Some(id), || format!("holds what is behind entry {after}"));
        if !self.is_mutant(Mutant::HoldLate) {
            self.host(id).committed = Committed::through(after);
        }
        let generation = self.host(id).replica.generation();
        let delay_ns = self.rng.random_range(0..=self.setting().idle_ns);
        self.later(id, delay_ns, Task::Holding { generation });
    }

    /// The entry that makes the new backup one that may take over.
    pub(crate) fn append_synced(&mut self, id: HostId, instance: u64) {
        self.submit(id, DeviceId::SHIM, &Body::Synced { instance });
    }

    pub(crate) fn holding(&mut self, id: HostId, generation: Generation) {
        self.drive(id, Event::Holding { generation });
    }

    /// The mutant that lets what a backup acknowledges commit before the backup may take over.
    pub(crate) fn count_unsynced(&mut self, id: HostId, received: Lsn) {
        let host = self.host(id);
        if host.role == Role::Recording && !host.replica.is_protected() {
            self.commit(id, Committed::through(received));
        }
    }
}
