//! One host: the real replica and the state of a small model of the daemons round it.
//!
//! What the daemons do stands in [`crate::shell`] (ft-log) and [`crate::engine`] (vCPU shim and devices).

use std::collections::VecDeque;

use ft_protocol::{Backlog, Committed, Generation, Held, Lsn, Replica, Role, replica::Config, versions::Versions};

use crate::{
    faults::Setting,
    guest::{Guest, Output},
    network::ConnectionId,
    queue::Happening,
    repair::Snapshot,
};

/// The VM's name on both hosts.
pub const VM: &str = "ledger";

/// One of the two hosts. A is started as primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostId {
    /// The one that starts as primary.
    A,
    /// The one that starts as backup.
    B,
}

impl HostId {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// Place in an array of two.
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }

    /// The peer.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// One start of a host: a host that crashed and came back is not the same any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Incarnation {
    /// The host.
    pub host: HostId,
    /// The start, from 1.
    pub number: u32,
}

/// A host's monotonic clock: its own zero, its own speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// What it shows at virtual time 0, ns.
    pub offset_ns: u64,
    /// Speed, in 1/1024.
    pub rate: u64,
}

impl Clock {
    /// What it shows at `world_ns`.
    #[must_use]
    pub fn local_ns(&self, world_ns: u64) -> u64 {
        self.offset_ns + (u128::from(world_ns) * u128::from(self.rate) / 1024) as u64
    }

    /// The first moment at which it shows `local_ns` or more.
    #[must_use]
    pub fn world_ns(&self, local_ns: u64) -> u64 {
        let since = u128::from(local_ns.saturating_sub(self.offset_ns));
        (since * 1024).div_ceil(u128::from(self.rate)) as u64
    }
}

/// The state of one host.
#[derive(Debug)]
pub struct Host {
    /// Which start of which host this is.
    pub me: Incarnation,
    /// It was started as a new backup.
    pub joins: bool,
    /// Not crashed.
    pub alive: bool,
    /// The processes have ended by themselves.
    pub ended: bool,
    /// Overlapping pauses.
    pub paused: u32,
    /// What happened to it while it was paused.
    pub deferred: Vec<Happening>,
    /// Its clock.
    pub clock: Clock,
    /// The protocol core.
    pub replica: Replica,
    /// The role the core published last.
    pub role: Role,

    /// The open end of the logging channel.
    pub connection: Option<ConnectionId>,
    /// A connection that was accepted and has not said hello, and what came on it.
    pub candidate: Option<(ConnectionId, Vec<u8>)>,
    /// Entries may leave on the channel.
    pub sends_entries: bool,
    /// A connection attempt is planned.
    pub connecting: bool,
    /// Bytes that wait for room on the channel.
    pub tx: Vec<u8>,
    /// Bytes that arrived and are not read.
    pub rx: Vec<u8>,
    /// The peer closed; to be noticed when everything before it is read.
    pub close_pending: bool,
    /// Requests to the arbiter so far, and whether the last one is unanswered.
    pub asks: u32,
    /// See `asks`.
    pub ask_open: bool,
    /// The generation asked for last.
    pub asked: Generation,

    /// Own entries that the peer may not have.
    pub backlog: Backlog,
    /// Next LSN to write.
    pub next_lsn: Lsn,
    /// Last entry given to the core.
    pub sent: Lsn,
    /// The share of its time that the vCPU pauses, in thousandths.
    pub throttle: u32,

    /// Received entries that the replay has not consumed.
    pub replay: VecDeque<Vec<u8>>,
    /// The core was told that there is no room for more.
    pub replay_full: bool,
    /// Entries stored so far, and those that the flush under way makes durable.
    pub stored: u64,
    /// See `stored`.
    pub flushing: Option<u64>,
    /// Survivor: the state that a new backup is to adopt.
    pub snapshot: Option<Snapshot>,
    /// New backup: how often it was taken.
    pub attempt: u32,
    /// Last entry to replay, once going live.
    pub replay_end: Lsn,
    /// Overlapping stalls of the shim.
    pub shim_stalled: u32,
    /// The guest.
    pub guest: Guest,
    /// Frames in the network card while the log is full.
    pub nic: VecDeque<[u8; 10]>,
    /// Outputs that wait for their commit.
    pub held: VecDeque<Held<Output>>,
    /// The commit watermark the devices see.
    pub committed: Committed,

    /// When the pending [`crate::queue::Task::Tick`] is due.
    pub tick_at_ns: Option<u64>,
    /// When the pending [`crate::queue::Task::Stop`] is due.
    pub stop_at_ns: Option<u64>,
    /// When the pending [`crate::queue::Task::Release`] is due.
    pub release_at_ns: Option<u64>,
}

impl Host {
    /// A host that starts at `now_ns`; as a new backup of whoever is live if it `joins`.
    #[must_use]
    pub fn new(me: Incarnation, setting: &Setting, now_ns: u64, joins: bool) -> Self {
        let clock = setting.clocks[me.host.index()];
        let config = Config {
            vm: VM.into(),
            primary: me.host == HostId::A && !joins,
            alone: false,
            joins,
            takes_joiners: true,
            timing: setting.timing(),
            ack: setting.ack,
            versions: Versions::SPOKEN,
            keeps_journal: true,
            // Each attempt to be synchronised counts one up.
            instance: u64::from(me.number) << 32 | (me.host as u64) << 31,
        };
        Self {
            me,
            joins,
            alive: true,
            ended: false,
            paused: 0,
            deferred: Vec::new(),
            clock,
            replica: Replica::new(config, clock.local_ns(now_ns)),
            role: Role::Pairing,
            connection: None,
            candidate: None,
            sends_entries: false,
            connecting: false,
            tx: Vec::new(),
            rx: Vec::new(),
            close_pending: false,
            asks: 0,
            ask_open: false,
            asked: Generation::FIRST,
            backlog: Backlog::new(setting.log_bytes_max),
            next_lsn: Lsn(1),
            sent: Lsn::ZERO,
            throttle: 0,
            replay: VecDeque::new(),
            replay_full: false,
            stored: 0,
            flushing: None,
            snapshot: None,
            attempt: 0,
            replay_end: Lsn::ZERO,
            shim_stalled: 0,
            guest: Guest::default(),
            nic: VecDeque::new(),
            held: VecDeque::new(),
            committed: Committed::through(Lsn::ZERO),
            tick_at_ns: None,
            stop_at_ns: None,
            release_at_ns: None,
        }
    }

    /// Whether its processes are there (they may be paused).
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.alive && !self.ended
    }

    /// Whether its guest executes for the outside world (its outputs may be held).
    #[must_use]
    pub fn is_executing(&self) -> bool {
        match self.role {
            Role::Recording | Role::Live => true,
            Role::Arbitrating => self.replica.leads(),
            _ => false,
        }
    }

    /// Whether a logging channel is of use to it.
    #[must_use]
    pub fn wants_channel(&self) -> bool {
        self.is_running()
            && matches!(
                self.role,
                Role::Pairing | Role::Recording | Role::Replaying | Role::Arbitrating | Role::Live
            )
    }

    /// Whether its guest replays. A new backup does not before it has the state.
    #[must_use]
    pub fn is_replaying(&self) -> bool {
        match self.role {
            Role::Replaying => !self.replica.awaits_state(),
            Role::GoingLive => true,
            Role::Arbitrating => !self.replica.leads(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_of_a_skewed_clock_is_reached_and_not_before() {
        for rate in [512, 1000, 1024, 1100, 2048] {
            let clock = Clock { offset_ns: 777, rate };
            for local_ns in [777, 778, 1_000_000, 123_456_789] {
                let world_ns = clock.world_ns(local_ns);
                assert!(clock.local_ns(world_ns) >= local_ns);
                assert!(world_ns == 0 || clock.local_ns(world_ns - 1) < local_ns);
            }
        }
    }
}
