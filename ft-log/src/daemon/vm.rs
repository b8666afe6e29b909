//! Everything that belongs to one VM. The daemon round it has the ring, the clock and the operator.

use ft_protocol::{Backlog, Lsn, Replica, Role, limits::BACKLOG_BYTES_MAX};

use ft_client::events::monotonic_ns;

use super::{link::Link, polling::Polling};
use crate::{arbiter::Arbiter, config::Config, exit::Exit, journal_writer::JournalWriter, local::Local};

/// Log traffic since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counters {
    pub(super) entries: u64,
    pub(super) bytes: u64,
}

/// One VM on this host.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) alone: bool,
    pub(super) replica: Replica,
    pub(super) local: Local,
    pub(super) link: Link,
    /// Primary: the entries that the backup may not have.
    pub(super) backlog: Backlog,
    pub(super) journal: JournalWriter,
    pub(super) arbiter: Arbiter,
    /// The trouble with the arbiter that the operator was told of.
    pub(super) arbiter_trouble: Option<String>,
    /// Whether the operator was told that the arbiter is silent.
    pub(super) arbiter_warned: bool,
    /// Received entries wait for room in the replay ring.
    pub(super) is_full: bool,
    /// Entries came that the shim was not woken for.
    pub(super) has_news: bool,
    /// When it was woken last.
    pub(super) told_shim_ns: u64,
    /// Whether looking for entries pays.
    pub(super) polling: Polling,
    /// What the core was told of that.
    pub(super) told_full: bool,
    pub(super) counters: Counters,
    /// The guest's power-off, once it is in the log.
    pub(super) power_off: Option<Lsn>,
    /// This side has, or may have, a backup that follows it.
    pub(super) records: bool,
    /// New backup: the entry with which it has the whole, once that is here.
    pub(super) transferred: Option<Lsn>,
    /// Exit status of the local failure that is being told to the core.
    pub(super) failure: Exit,
}

impl Vm {
    pub(super) fn new(config: &Config, instance: u64, local: Local, link: Link, arbiter: Arbiter) -> Self {
        Self {
            alone: config.alone,
            replica: Replica::new(config.replica(instance), monotonic_ns()),
            local,
            link,
            backlog: Backlog::new(BACKLOG_BYTES_MAX),
            journal: JournalWriter::new(config.journal_settings(), &config.vm),
            arbiter,
            arbiter_trouble: None,
            arbiter_warned: false,
            is_full: false,
            has_news: false,
            told_shim_ns: 0,
            polling: Polling::default(),
            told_full: false,
            counters: Counters::default(),
            power_off: None,
            records: false,
            transferred: None,
            failure: Exit::LocalFailure,
        }
    }

    /// Whether this side makes the log of its VM: it was started as primary, or is live.
    pub(super) fn leads(&self) -> bool {
        self.replica.leads()
    }

    /// Whether a logging channel is of use to this side.
    pub(super) fn wants_channel(&self) -> bool {
        match self.replica.role() {
            Role::Pairing | Role::Arbitrating => !self.alone,
            Role::Recording | Role::Replaying => true,
            // A new backup may come.
            Role::Live => !self.alone,
            _ => false,
        }
    }

    /// Whether entries are taken from the rings now. With a full backlog they are not: the rings fill up and the producers
    /// stop, which is the log's flow control.
    pub(super) fn takes_entries(&self) -> bool {
        match self.replica.role() {
            Role::Recording | Role::Arbitrating if self.leads() => !self.backlog.is_full(),
            Role::Live => !self.replica.keeps_entries() || !self.backlog.is_full(),
            _ => false,
        }
    }
}
