//! One side of a protected VM: its role, what is committed, when to ask the arbiter, who goes live.
//!
//! ```text
//!             Pairing ───────────────┐
//!            ╱       ╲               │ refused, local failure
//!   Recording         Replaying ─────┤
//!       │  peer suspected │          ▼
//!       └─► Arbitrating ◄─┘        Halted   (mute for good)
//!            │ won  │ lost ────────► ▲
//!   primary: │      │ backup: won    │
//!          Live ◄─ GoingLive ────────┘      any of them ──orderly power-off──► Off
//! ```
//!
//! Promises, checked after every step in release builds too:
//! - an output is committed only when the backup of this generation acknowledged its marker, or this side won the arbitration;
//! - a primary records only when the claim of the first generation is its own;
//! - a side goes live only with a generation the arbiter gave to it;
//! - a halted side never commits, sends or asks again;
//! - a backup goes live only after every entry it ever acknowledged was consumed;
//! - a backup that never received an entry does not go live: it returns to Pairing.
//!
//! The channel may break and come back within a generation ([`channel`]); what the backup says of the log is in [`log`], who is
//! suspected and who goes live in [`failure`].

mod channel;
mod failure;
mod log;

pub use log::Place;

use crate::{
    held::Committed,
    ids::{Generation, Lsn},
    lag::Lag,
    message::{Message, Strength, Watermarks},
    versions::Versions,
};

/// What this side is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Waiting for the local daemons, the peer, and (primary) the claim of the first generation.
    Pairing,
    /// Primary with a backup: executes, logs, holds outputs.
    Recording,
    /// Backup: receives and replays.
    Replaying,
    /// The peer is suspected; the arbiter was asked. Execution goes on, outputs stay held.
    Arbitrating,
    /// Backup that won: consumes what it received.
    GoingLive,
    /// Executes for the outside world without a backup.
    Live,
    /// Lost, refused or broken. Mute for good.
    Halted,
    /// The guest powered off.
    Off,
}

/// The arbiter's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The generation is this side's.
    Won,
    /// Somebody else has it.
    Lost,
    /// No answer. Ask again; until then nothing is released.
    Unreachable,
}

/// What happens to a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Shim and devices have joined; the digest of what they would run.
    LocalReady {
        /// See [`Hello::fingerprint`].
        fingerprint: [u8; 32],
    },
    /// A logging channel is connected; whatever was before it is over.
    ChannelUp,
    /// The logging channel broke or was closed.
    ChannelDown,
    /// A control message from the channel, or a heartbeat datagram.
    Message {
        /// The sender's generation.
        generation: Generation,
        /// The message.
        message: Message,
    },
    /// Primary: local entries up to here are in order and ready to send.
    Appended {
        /// Last LSN.
        through: Lsn,
    },
    /// Backup: entries up to here are stored where the local replay will find them.
    Received {
        /// The sender's generation.
        generation: Generation,
        /// First LSN of the batch.
        from: Lsn,
        /// Last LSN of the batch.
        through: Lsn,
    },
    /// Backup: the local shim has applied entries up to here.
    Consumed {
        /// Last LSN.
        through: Lsn,
    },
    /// Backup: entries up to here are in the journal, flushed to stable storage.
    Durable {
        /// Last LSN.
        through: Lsn,
    },
    /// Backup: the replay has no room for what comes next, or has room again.
    ReplayFull {
        /// Whether it is full.
        full: bool,
    },
    /// The entry at this LSN is the guest's power-off.
    PowerOffEntry {
        /// Its LSN.
        lsn: Lsn,
    },
    /// The arbiter answered for a generation.
    Arbiter {
        /// Which one was asked for.
        generation: Generation,
        /// The answer.
        verdict: Verdict,
    },
    /// A local sibling died or reported divergence: this replica is over.
    LocalFailure {
        /// For the operator.
        reason: String,
    },
    /// Time passes.
    Tick,
}

/// What the shell must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a control message on the channel.
    Send(Message),
    /// Send a heartbeat datagram.
    SendHeartbeat(Message),
    /// Send the log entries up to here on the channel.
    SendEntries {
        /// Last LSN.
        through: Lsn,
    },
    /// A channel is back: entries after this one are sent (again), the ones before are there.
    Rewind {
        /// The peer's last entry.
        after: Lsn,
    },
    /// The peer has every entry up to here: they need not be kept.
    Forget {
        /// Last LSN.
        through: Lsn,
    },
    /// Let outputs go whose marker is at or below the watermark.
    Commit(Committed),
    /// The share of its time, in thousandths, that the vCPU must pause: the backup lags.
    Throttle {
        /// 0 to [`crate::limits::THROTTLE_MAX`].
        permille: u32,
    },
    /// Ask the arbiter for a generation (again).
    AskArbiter {
        /// Which one.
        generation: Generation,
    },
    /// Tell the local clients their role. For [`Role::GoingLive`] the replay ends after `replay_end`.
    Publish {
        /// The role.
        role: Role,
        /// The generation.
        generation: Generation,
        /// Last entry to replay; meaningful for `GoingLive` and `Off`.
        replay_end: Lsn,
    },
    /// The peer is suspected (for the operator).
    Suspect {
        /// Why.
        reason: &'static str,
    },
    /// Close the channel: the pair is over.
    CloseChannel,
    /// Break the channel at once: a new one is to be connected.
    BreakChannel,
    /// This side is over. The role is published already.
    Halt {
        /// For the operator.
        reason: String,
    },
    /// The guest powered off and the log is complete: end with success.
    Finish,
}

/// Times and names of a replica.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The VM.
    pub vm: String,
    /// What this side speaks: [`Versions::SPOKEN`].
    pub versions: Versions,
    /// Whether this side was started as primary.
    pub primary: bool,
    /// Primary without a backup from the start.
    pub alone: bool,
    /// Between two heartbeats, ns.
    pub heartbeat_interval_ns: u64,
    /// Intervals of silence after which the peer is suspected.
    pub heartbeat_misses: u32,
    /// How long the channel may be away, or stand still, while heartbeats go on, ns. At half of it a channel that stands still is
    /// broken and connected anew.
    pub channel_timeout_ns: u64,
    /// Backup: how long its replay may apply nothing although there is something to apply, ns. A replay that hangs is a replica that failed.
    pub replay_timeout_ns: u64,
    /// Primary: what an acknowledgement must mean.
    pub ack: Strength,
    /// Backup: whether its journal is flushed, so that it can acknowledge durably.
    pub keeps_journal: bool,
    /// Primary: lag up to which it is not slowed, ns.
    pub lag_target_ns: u64,
    /// Primary: lag at which it stands still, ns.
    pub lag_limit_ns: u64,
    /// Drawn at random at every start of the daemon.
    pub instance: u64,
}

/// The state of one side. One owner calls [`Replica::step`]; nothing else changes it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    config: Config,
    role: Role,
    generation: Generation,
    fingerprint: Option<[u8; 32]>,
    claimed: bool,
    paired: bool,
    /// The version that the pair uses, once paired.
    version: Option<u32>,
    /// The peer's [`Config::instance`], once paired.
    peer_instance: u64,
    channel: channel::Channel,
    /// Last entry appended (primary) or received (backup) in this generation.
    last: Lsn,
    /// How far the backup is: what it said (primary), or what this side has done (backup).
    progress: Watermarks,
    acknowledged: Lsn,
    /// Last entry of the former primary, once the backup won; what it writes itself comes behind.
    replay_end: Lsn,
    power_off: Option<Lsn>,
    /// What the paired primary waits for.
    ack: Strength,
    /// Backup: what it acknowledged last, and when.
    told: Watermarks,
    told_ns: u64,
    replay_full: bool,
    /// Backup: since when there are entries to apply and none was applied.
    replay_still_since_ns: Option<u64>,
    lag: Lag,
    throttle: u32,
    heard_ns: u64,
    heartbeat_due_ns: u64,
    heartbeat_sequence: u64,
    ask_again_ns: Option<u64>,
    won: bool,
}

impl Replica {
    /// A side that has just started, at `now_ns` of a monotonic clock.
    #[must_use]
    pub fn new(config: Config, now_ns: u64) -> Self {
        Self {
            ack: config.ack,
            config,
            role: Role::Pairing,
            generation: Generation(0),
            fingerprint: None,
            claimed: false,
            paired: false,
            version: None,
            peer_instance: 0,
            channel: channel::Channel::default(),
            last: Lsn::ZERO,
            progress: Watermarks::default(),
            acknowledged: Lsn::ZERO,
            replay_end: Lsn::ZERO,
            power_off: None,
            told: Watermarks::default(),
            told_ns: now_ns,
            replay_full: false,
            replay_still_since_ns: None,
            lag: Lag::default(),
            throttle: 0,
            heard_ns: now_ns,
            heartbeat_due_ns: now_ns,
            heartbeat_sequence: 0,
            ask_again_ns: None,
            won: false,
        }
    }

    /// The current role.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// The current generation; 0 before pairing.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The version that the pair uses, once there is one.
    #[must_use]
    pub fn version(&self) -> Option<u32> {
        self.version
    }

    /// Last entry appended or received.
    #[must_use]
    pub fn last(&self) -> Lsn {
        self.last
    }

    /// Last entry the backup acknowledged, as strongly as it must (primary), or that this side acknowledged (backup).
    #[must_use]
    pub fn acknowledged(&self) -> Lsn {
        self.acknowledged
    }

    /// How far the backup is with the log: as it said (primary), or as it is (backup).
    #[must_use]
    pub fn progress(&self) -> Watermarks {
        self.progress
    }

    /// Primary: age of the oldest entry that the backup is not known to have replayed, ns.
    #[must_use]
    pub fn lag_ns(&self, now_ns: u64) -> u64 {
        self.lag.ns(now_ns)
    }

    /// Backup: whether outputs on the primary wait for the replay.
    #[must_use]
    pub fn awaits_replay(&self) -> bool {
        self.ack == Strength::Replayed
    }

    /// What outputs wait for in this pair.
    #[must_use]
    pub fn ack_strength(&self) -> Strength {
        self.ack
    }

    /// Whether entries go over the channel now: both sides said hello on it.
    #[must_use]
    pub fn is_channel_open(&self) -> bool {
        self.channel.open
    }

    /// Whether this side and its peer are a pair, whatever the channel does.
    fn is_pair(&self) -> bool {
        self.paired && matches!(self.role, Role::Recording | Role::Replaying | Role::Arbitrating)
    }

    /// Backup: whether entries that come are stored.
    fn follows(&self) -> bool {
        !self.config.primary && matches!(self.role, Role::Replaying | Role::Arbitrating)
    }

    /// When the next [`Event::Tick`] has something to do.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        if matches!(self.role, Role::Halted | Role::Off | Role::Live | Role::GoingLive) {
            return None;
        }
        let pair = self.paired.then_some(self.heartbeat_due_ns);
        let suspicion = self.suspicion().map(|(at, _)| at);
        [
            pair,
            suspicion,
            self.ask_again_ns,
            self.break_at_ns(),
            self.tell_at_ns(),
            self.replay_hangs_at_ns(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Takes one event at `now_ns` and appends what is to be done to `actions`.
    ///
    /// # Panics
    /// If an invariant of this module does not hold: that is a bug, and a replica with a bug must stop.
    pub fn step(&mut self, now_ns: u64, event: Event, actions: &mut Vec<Action>) {
        let first = actions.len();
        let before = self.role;
        if !matches!(self.role, Role::Halted | Role::Off) {
            self.apply(now_ns, event, actions);
            self.after(now_ns, actions);
        }
        self.check_invariants(before, &actions[first..]);
    }

    fn apply(&mut self, now_ns: u64, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::LocalReady { fingerprint } => self.local_ready(now_ns, fingerprint, actions),
            Event::ChannelUp => self.channel_up(now_ns, actions),
            Event::ChannelDown => self.channel_down(now_ns),
            Event::Message { generation, message } => self.message(now_ns, generation, message, actions),
            Event::Appended { through } => self.appended(now_ns, through, actions),
            Event::Received {
                generation,
                from,
                through,
            } => self.received(now_ns, generation, from, through, actions),
            Event::Consumed { through } => self.consumed(now_ns, through, actions),
            Event::Durable { through } => self.durable(now_ns, through, actions),
            Event::ReplayFull { full } => self.replay_full = full,
            Event::PowerOffEntry { lsn } => {
                // A power-off that did not come this far is none: a backup that wins without it goes live.
                if self.config.primary || self.role == Role::Live || lsn <= self.last {
                    self.power_off = Some(lsn);
                }
            }
            Event::Arbiter { generation, verdict } => self.arbiter(now_ns, generation, verdict, actions),
            Event::LocalFailure { reason } => self.fail(reason, actions),
            Event::Tick => self.tick(now_ns, actions),
        }
    }

    fn message(&mut self, now_ns: u64, generation: Generation, message: Message, actions: &mut Vec<Action>) {
        match message {
            Message::Hello(hello) => self.on_hello(now_ns, generation, &hello, actions),
            Message::Refuse { reason } => self.refused(now_ns, reason, actions),
            _ if generation != self.generation || !self.paired => {}
            Message::Ack(watermarks) => self.ack(now_ns, watermarks, actions),
            Message::Gone { .. } => self.suspect(now_ns, "the peer's replica ended", actions),
            Message::Heartbeat { replayed, full, .. } => self.heartbeat(now_ns, replayed, full, actions),
        }
    }

    /// Transitions that depend on several facts at once.
    fn after(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.set_throttle(now_ns, actions);
        if self.role == Role::GoingLive && self.progress.replayed >= self.replay_end {
            let ended = self.power_off.is_some();
            if !ended {
                actions.push(Action::Commit(Committed::through(Lsn::MAX)));
                self.change_role(Role::Live, actions);
            }
        }
        let Some(lsn) = self.power_off else { return };
        let complete = match self.role {
            Role::Recording => self.acknowledged >= lsn,
            Role::Live => true,
            // The primary ends with this side's word that it may, as strong as it asked for.
            Role::Replaying => self.progress.replayed >= lsn && self.progress.of(self.ack) >= lsn,
            Role::GoingLive => self.progress.replayed >= lsn,
            _ => false,
        };
        if complete {
            if self.follows() && self.told != self.progress {
                self.tell(now_ns, actions);
            }
            self.change_role(Role::Off, actions);
            actions.push(Action::Finish);
        }
    }

    /// The one place where a role changes; anything but these transitions is a bug.
    fn change_role(&mut self, to: Role, actions: &mut Vec<Action>) {
        use Role::{Arbitrating, GoingLive, Halted, Live, Off, Pairing, Recording, Replaying};
        let legal = matches!(
            (self.role, to),
            (Pairing, Recording | Replaying | Live)
                | (Replaying, Pairing)
                | (Recording | Replaying, Arbitrating)
                | (Arbitrating, Live | GoingLive)
                | (GoingLive, Live)
                | (Recording | Replaying | GoingLive | Live, Off)
                | (Pairing | Recording | Replaying | Arbitrating | GoingLive | Live, Halted)
        );
        assert!(legal, "illegal change of role: {:?} to {to:?}", self.role);
        self.role = to;
        actions.push(Action::Publish {
            role: to,
            generation: self.generation,
            replay_end: self.last,
        });
    }

    fn check_invariants(&self, before: Role, actions: &[Action]) {
        assert!(
            self.acknowledged <= self.last,
            "acknowledged an entry that is not there"
        );
        assert!(
            !self.config.primary || self.acknowledged <= self.progress.of(self.ack),
            "acknowledged more than the backup said"
        );
        assert!(
            !matches!(self.role, Role::Live | Role::GoingLive) || self.won,
            "live without the arbiter's word"
        );
        assert!(
            self.role != Role::Recording || self.claimed,
            "recording without the claim of the first generation"
        );
        assert!(
            self.role != Role::Live || self.config.primary || self.progress.replayed >= self.replay_end,
            "live with entries unconsumed"
        );
        for action in actions {
            if let Action::Commit(committed) = action {
                assert!(!matches!(before, Role::Halted | Role::Off), "a mute side committed");
                assert!(
                    committed.lsn() <= self.acknowledged || self.role == Role::Live || self.role == Role::Off,
                    "committed beyond the acknowledged entries"
                );
            }
        }
    }
}

#[cfg(all(test, not(feature = "control-no-arbiter")))]
mod tests;
