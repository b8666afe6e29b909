//! What the daemon's thread and the management plane share: figures one way, orders the other. Atomics only, so that neither waits.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        OnceLock,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

use ft_client::events::monotonic_ns;
use ft_protocol::Role;
use serde_json::{Value, json};

use crate::{
    arbiter::ArbiterAddress,
    config::{Config, Side},
};

/// Every role, in the order of the numbers that stand for them here.
pub(crate) const ROLES: [(Role, &str); 8] = [
    (Role::Pairing, "pairing"),
    (Role::Recording, "recording"),
    (Role::Replaying, "replaying"),
    (Role::Arbitrating, "arbitrating"),
    (Role::GoingLive, "going-live"),
    (Role::Live, "live"),
    (Role::Halted, "halted"),
    (Role::Off, "off"),
];

/// What the journal is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum JournalState {
    /// There is none (no `--journal`), or its generation has not begun.
    #[default]
    Idle,
    /// It takes entries.
    Open,
    /// Its generation is over.
    Ended,
    /// It broke before its generation was over.
    Failed,
}

impl JournalState {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Idle, "idle"),
        (Self::Open, "open"),
        (Self::Ended, "ended"),
        (Self::Failed, "failed"),
    ];
}

/// One look at the daemon.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// The role.
    pub role: Role,
    /// The generation; 0 before pairing.
    pub generation: u32,
    /// Last entry appended or received.
    pub last: u64,
    /// Last entry whose outputs may leave; `u64::MAX` for all.
    pub committed: u64,
    /// Last entry that the local shim has replayed.
    pub consumed: u64,
    /// Entries since the start.
    pub entries: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Whether the logging channel is connected.
    pub channel_up: bool,
    /// Datagrams that were no heartbeats of the peer.
    pub datagrams_ignored: u64,
    /// The arbiter did not answer when it was last asked.
    pub arbiter_unreachable: bool,
    /// The journal.
    pub journal: JournalState,
    /// Its current segment.
    pub segment: u64,
    /// Bytes of that segment, those that wait for the disk included.
    pub segment_bytes: u64,
    /// Bytes that wait for the disk.
    pub journal_waiting_bytes: u64,
}

/// What does not change while the daemon runs.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) vm: String,
    pub(crate) host: String,
    pub(crate) side: Side,
    pub(crate) peer: Option<std::net::SocketAddr>,
    pub(crate) arbiter: ArbiterAddress,
    pub(crate) journal: Option<PathBuf>,
    started_ns: u64,
}

/// The shared part.
#[derive(Debug)]
pub struct Shared {
    pub(crate) identity: Identity,
    numbers: [AtomicU64; NUMBERS],
    rotate: AtomicBool,
    stop: AtomicBool,
    has_orders: AtomicBool,
    doorbell: OnceLock<OwnedFd>,
}

/// Places of the figures.
const NUMBERS: usize = 14;

impl Shared {
    /// Of a daemon that is about to start.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            identity: Identity {
                vm: config.vm.clone(),
                host: config.host(),
                side: config.role,
                peer: config.peer.filter(|_| !config.alone),
                arbiter: config.arbiter.clone(),
                journal: config.journal.clone(),
                started_ns: monotonic_ns(),
            },
            numbers: Default::default(),
            rotate: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            has_orders: AtomicBool::new(false),
            doorbell: OnceLock::new(),
        }
    }

    /// Where the daemon is woken: the doorbell that its local clients ring too.
    pub fn set_doorbell(&self, doorbell: OwnedFd) {
        let _ = self.doorbell.set(doorbell);
    }

    // ---- the daemon's side -------------------------------------------------------------------------------------------

    /// Shows what is. A few stores, whoever looks.
    pub fn publish(&self, figures: &Figures) {
        let role = ROLES.iter().position(|(role, _)| *role == figures.role);
        let numbers = [
            role.unwrap_or_default() as u64,
            figures.generation.into(),
            figures.last,
            figures.committed,
            figures.consumed,
            figures.entries,
            figures.bytes,
            figures.channel_up.into(),
            figures.datagrams_ignored,
            figures.arbiter_unreachable.into(),
            figures.journal as u64,
            figures.segment,
            figures.segment_bytes,
            figures.journal_waiting_bytes,
        ];
        let places: &[AtomicU64; NUMBERS] = &self.numbers;
        places
            .iter()
            .zip(numbers)
            .for_each(|(place, number)| place.store(number, Relaxed));
    }

    /// Orders since the last look: whether to begin a new segment, whether to stop.
    pub fn take_orders(&self) -> (bool, bool) {
        if !self.has_orders.swap(false, Acquire) {
            return (false, false);
        }
        (self.rotate.swap(false, Relaxed), self.stop.swap(false, Relaxed))
    }

    // ---- the management plane's side ---------------------------------------------------------------------------------

    pub(crate) fn figures(&self) -> Figures {
        let number = |place: usize| self.numbers[place].load(Relaxed);
        Figures {
            role: ROLES[number(0) as usize % ROLES.len()].0,
            generation: number(1) as u32,
            last: number(2),
            committed: number(3),
            consumed: number(4),
            entries: number(5),
            bytes: number(6),
            channel_up: number(7) != 0,
            datagrams_ignored: number(8),
            arbiter_unreachable: number(9) != 0,
            journal: JournalState::ALL[number(10) as usize % JournalState::ALL.len()].0,
            segment: number(11),
            segment_bytes: number(12),
            journal_waiting_bytes: number(13),
        }
    }

    pub(crate) fn order_rotate(&self) {
        self.rotate.store(true, Relaxed);
        self.order();
    }

    pub(crate) fn order_stop(&self) {
        self.stop.store(true, Relaxed);
        self.order();
    }

    fn order(&self) {
        self.has_orders.store(true, Release);
        if let Some(doorbell) = self.doorbell.get() {
            // An eventfd that is full is rung already.
            let _ = nix::unistd::write(doorbell.as_fd(), &1u64.to_ne_bytes());
        }
    }

    /// Everything, for people and scripts.
    pub(crate) fn status(&self) -> Value {
        let (identity, now) = (&self.identity, self.figures());
        let is_follower = matches!(now.role, Role::Replaying | Role::GoingLive)
            || now.role == Role::Arbitrating && identity.side == Side::Backup;
        let committed = match now.committed {
            u64::MAX => json!("all"),
            lsn => json!(lsn),
        };
        json!({
            "vm": identity.vm,
            "host": identity.host,
            "side": match identity.side { Side::Primary => "primary", Side::Backup => "backup" },
            "role": role_name(now.role),
            "generation": now.generation,
            "last_lsn": now.last,
            "committed_lsn": committed,
            "replayed_lsn": is_follower.then_some(now.consumed),
            "lag_entries": lag(&now, is_follower),
            "entries": now.entries,
            "bytes": now.bytes,
            "peer": identity.peer.map(|peer| peer.to_string()),
            "channel": if now.channel_up { "up" } else { "down" },
            "datagrams_ignored": now.datagrams_ignored,
            "arbiter": {
                "address": identity.arbiter.to_string(),
                "state": if now.arbiter_unreachable { "unreachable" } else { "ok" },
            },
            "journal": identity.journal.as_ref().map(|directory| json!({
                "directory": directory.display().to_string(),
                "state": journal_name(now.journal),
                "segment": now.segment,
                "segment_bytes": now.segment_bytes,
                "waiting_bytes": now.journal_waiting_bytes,
            })),
            "uptime_ms": (monotonic_ns() - identity.started_ns) / 1_000_000,
        })
    }
}

/// Entries that are not committed (primary), or not replayed (backup).
pub(crate) fn lag(now: &Figures, is_follower: bool) -> u64 {
    now.last
        .saturating_sub(if is_follower { now.consumed } else { now.committed })
}

pub(crate) fn role_name(role: Role) -> &'static str {
    ROLES
        .iter()
        .find(|(of, _)| *of == role)
        .map_or("unknown", |(_, name)| name)
}

fn journal_name(state: JournalState) -> &'static str {
    JournalState::ALL
        .iter()
        .find(|(of, _)| *of == state)
        .map_or("unknown", |(_, name)| name)
}
