//! What a VM's thread and the management plane share: figures one way, orders the other. Atomics, and one slot whose lock is held for a move
//! only, so that neither waits.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{
            AtomicBool, AtomicU8, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
};

use ft_client::{Counters, events::monotonic_ns};
use ft_protocol::{Role, Timing};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::{
    arbiter::ArbiterAddress,
    config::{Config, Side},
    exit::Exit,
};

use super::configure::{self, Change, Order};

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
    /// The protocol version of the pair; 0 before pairing.
    pub version: u32,
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
    /// Whether the logging channel is connected and both sides said hello on it.
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
    /// The times in force.
    pub timing: Timing,
}

impl Figures {
    /// Whether this side replays what another one recorded: it consumes, where the other one commits.
    pub(crate) fn is_follower(&self, side: Side) -> bool {
        matches!(self.role, Role::Replaying | Role::GoingLive) || self.role == Role::Arbitrating && side == Side::Backup
    }

    /// Entries that are not committed (primary), or not replayed (backup).
    pub(crate) fn lag(&self, side: Side) -> u64 {
        let done = if self.is_follower(side) {
            self.consumed
        } else {
            self.committed
        };
        self.last.saturating_sub(done)
    }
}

/// Who ended a VM's side in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoppedBy {
    /// SIGTERM or SIGINT to the process.
    Signal,
    /// An order over the control socket.
    Control,
}

/// What the operator ordered since the last look.
#[derive(Debug, Default)]
pub struct Orders {
    /// To begin a new segment of the journal.
    pub rotate: bool,
    /// To change the times of the pair.
    pub(crate) configure: Option<Order>,
    /// To end this side.
    pub stop: Option<StoppedBy>,
}

/// How a VM's side ended while its process goes on for others.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    pub(crate) reason: String,
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

/// The shared part of one VM.
#[derive(Debug)]
pub struct Shared {
    pub(crate) identity: Identity,
    numbers: [AtomicU64; NUMBERS],
    is_up: AtomicBool,
    ended: OnceLock<Ended>,
    /// Of each device, with its name.
    counters: OnceLock<Vec<(String, Counters)>>,
    rotate: AtomicBool,
    configure: Mutex<Option<Order>>,
    /// 0, or 1 + [`StoppedBy`].
    stop: AtomicU8,
    /// Rung for an order. Nobody but this process has it: a local client cannot take an order away.
    bell: EventFd,
}

/// Places of the figures.
const NUMBERS: usize = 21;

impl Shared {
    /// Of a VM that is about to start.
    ///
    /// # Errors
    /// When the kernel has no descriptor for it.
    pub fn new(config: &Config) -> io::Result<Self> {
        Ok(Self {
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
            is_up: AtomicBool::new(false),
            ended: OnceLock::new(),
            counters: OnceLock::new(),
            rotate: AtomicBool::new(false),
            configure: Mutex::new(None),
            stop: AtomicU8::new(0),
            bell: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?,
        })
    }

    /// The VM is up: its local processes can join.
    pub(crate) fn set_up(&self) {
        self.is_up.store(true, Relaxed);
    }

    pub(crate) fn is_up(&self) -> bool {
        self.is_up.load(Relaxed)
    }

    /// Where its devices count. They are shown as long as the process runs, also of a VM that is over.
    pub(crate) fn set_counters(&self, counters: Vec<(String, Counters)>) {
        let _ = self.counters.set(counters);
    }

    pub(crate) fn counters(&self) -> &[(String, Counters)] {
        self.counters.get().map_or(&[], Vec::as_slice)
    }

    pub(crate) fn set_ended(&self, exit: Exit, reason: String) {
        let _ = self.ended.set(Ended { exit, reason });
    }

    pub(crate) fn ended(&self) -> Option<&Ended> {
        self.ended.get()
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
            figures.version.into(),
            figures.timing.heartbeat_interval_ns,
            figures.timing.heartbeat_misses.into(),
            figures.timing.channel_timeout_ns,
            figures.timing.replay_timeout_ns,
            figures.timing.lag_target_ns,
            figures.timing.lag_limit_ns,
        ];
        let places: &[AtomicU64; NUMBERS] = &self.numbers;
        places
            .iter()
            .zip(numbers)
            .for_each(|(place, number)| place.store(number, Release));
    }

    /// What a read gives that ends when there is an order.
    ///
    /// # Errors
    /// As dup(2).
    pub fn bell(&self) -> io::Result<OwnedFd> {
        self.bell.as_fd().try_clone_to_owned()
    }

    /// Orders since the last look.
    pub fn take_orders(&self) -> Orders {
        Orders {
            rotate: self.rotate.swap(false, AcqRel),
            configure: self.configuring().take(),
            stop: match self.stop.swap(0, AcqRel) {
                0 => None,
                1 => Some(StoppedBy::Signal),
                _ => Some(StoppedBy::Control),
            },
        }
    }

    // ---- the management plane's side ---------------------------------------------------------------------------------

    pub(crate) fn figures(&self) -> Figures {
        // Backwards: whatever was shown before a figure is at least as new as that. Nothing is committed that is behind the last entry.
        let mut numbers = [0; NUMBERS];
        for place in (0..NUMBERS).rev() {
            numbers[place] = self.numbers[place].load(Acquire);
        }
        let number = |place: usize| numbers[place];
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
            version: number(14) as u32,
            timing: Timing {
                heartbeat_interval_ns: number(15),
                heartbeat_misses: number(16) as u32,
                channel_timeout_ns: number(17),
                replay_timeout_ns: number(18),
                lag_target_ns: number(19),
                lag_limit_ns: number(20),
            },
        }
    }

    /// Lets the journal go on with a new segment; says why it cannot.
    pub(crate) fn order_rotate(&self) -> Result<(), &'static str> {
        match self.figures().journal {
            JournalState::Open => {}
            JournalState::Idle => return Err("the journal has not begun: it does when the pair is complete"),
            JournalState::Ended => return Err("the journal has ended with its generation"),
            JournalState::Failed => return Err("the journal has failed, as the log says: nothing is written any more"),
        }
        self.rotate.store(true, Release);
        self.ring();
        Ok(())
    }

    /// Has the times of the pair changed. What comes back is the entry that does it, or why there is none.
    ///
    /// # Errors
    /// An earlier change that the VM's thread has not looked at.
    pub(crate) fn order_configure(&self, change: Change) -> Result<oneshot::Receiver<configure::Answer>, String> {
        if let Some(ended) = self.ended() {
            return Err(format!("VM '{}' is over already: {}", self.identity.vm, ended.reason));
        }
        let mut slot = self.configuring();
        if slot.is_some() {
            return Err("another change is under way: try again".into());
        }
        let (answer, answered) = oneshot::channel();
        *slot = Some(Order { change, answer });
        drop(slot);
        self.ring();
        Ok(answered)
    }

    fn configuring(&self) -> std::sync::MutexGuard<'_, Option<Order>> {
        self.configure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn order_stop(&self, by: StoppedBy) {
        self.stop.store(1 + by as u8, Release);
        self.ring();
    }

    fn ring(&self) {
        // An eventfd that cannot take more is rung already.
        let _ = self.bell.write(1);
    }

    /// Everything, for people and scripts.
    pub(crate) fn status(&self) -> Value {
        let (identity, now) = (&self.identity, self.figures());
        let is_follower = now.is_follower(identity.side);
        let state = match (self.ended(), self.is_up()) {
            (Some(_), _) => "ended",
            (None, true) => "running",
            (None, false) => "starting",
        };
        let committed = match now.committed {
            u64::MAX => json!("all"),
            lsn => json!(lsn),
        };
        json!({
            "vm": identity.vm,
            "state": state,
            "ended": self.ended().map(|ended| json!({ "status": ended.exit as u8, "reason": ended.reason })),
            "host": identity.host,
            "side": match identity.side { Side::Primary => "primary", Side::Backup => "backup" },
            "role": role_name(now.role),
            "generation": now.generation,
            "protocol_version": (now.version > 0).then_some(now.version),
            "last_lsn": now.last,
            "committed_lsn": committed,
            "replayed_lsn": is_follower.then_some(now.consumed),
            "lag_entries": now.lag(identity.side),
            "entries": now.entries,
            "bytes": now.bytes,
            "peer": identity.peer.map(|peer| peer.to_string()),
            "channel": if now.channel_up { "up" } else { "down" },
            "datagrams_ignored": now.datagrams_ignored,
            "timing": configure::show(&now.timing),
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn whoever_looks_while_figures_change_sees_nothing_committed_that_is_not_there() {
        let usual = ["ft-log", "--vm", "v", "--role", "primary", "--socket-path", "s"];
        let config = Config::try_parse_from(usual.iter().chain(&["--arbiter", "a", "--alone"])).unwrap();
        let shared = Shared::new(&config).unwrap();
        let count = 1_000_000;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut figures = shared.figures();
                while figures.last < count {
                    figures.last += 1;
                    figures.committed = figures.last;
                    shared.publish(&figures);
                }
            });
            loop {
                let now = shared.figures();
                assert!(
                    now.committed <= now.last,
                    "{} of {} is committed",
                    now.committed,
                    now.last
                );
                if now.last == count {
                    break;
                }
                std::hint::spin_loop();
            }
        });
    }
}
