//! One side of a protected VM: its role, what is committed, when to ask the arbiter, who goes live.
//!
//! ```text
//!             Pairing ───────────────┐
//!            ╱       ╲               │ refused, local failure
//!   Recording         Replaying ─────┤
//!    ▲  │  peer suspected │          ▼
//!    │  └─► Arbitrating ◄─┘        Halted   (mute for good)
//!    │       │ won  │ lost ────────► ▲
//!    │ prim.:│      │ backup: won    │
//!    └──── Live ◄─ GoingLive ────────┘      any of them ──orderly power-off──► Off
//! new backup
//! ```
//!
//! Promises, checked after every step in release builds too:
//! - an output is committed only when the backup of this generation acknowledged its marker, or this side won the arbitration;
//! - a primary records only when the claim of the first generation is its own;
//! - a side goes live only with a generation the arbiter gave to it;
//! - a halted side never commits, sends or asks again;
//! - a backup goes live only after every entry it ever acknowledged was consumed;
//! - a backup that never received an entry, or is not synchronised, does not go live: it returns to Pairing;
//! - what a backup acknowledges commits nothing before it is synchronised.
//!
//! A live side may take a new backup, and is the primary of a pair again ([`repair`]). The channel may break and come back within a generation ([`channel`]); what the backup says of the log is in [`log`], who is
//! suspected and who goes live in [`failure`], the heartbeats in [`heartbeat`], times that change meanwhile in [`configuration`].

mod channel;
mod configuration;
mod failure;
mod heartbeat;
mod interface;
mod log;
mod repair;

use configuration::Changing;
use heartbeat::{Beat, Heard};
pub use interface::{Action, Config, Event, Role, Verdict};
pub use log::Place;
use repair::Sync;

use crate::{
    held::Committed,
    ids::{Generation, Lsn},
    lag::Lag,
    message::{Message, Strength, Watermarks},
};

/// The state of one side. One owner calls [`Replica::step`]; nothing else changes it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    config: Config,
    role: Role,
    generation: Generation,
    fingerprint: Option<[u8; 32]>,
    /// What it is once this side is live: the state it began with is not the VM's any more.
    shape: Option<[u8; 32]>,
    claimed: bool,
    /// This side writes the log of the VM: it was started as primary, or is live.
    leads: bool,
    /// This side speaks first on a new channel.
    greets: bool,
    paired: bool,
    /// How far the pair is from being one, where it was made anew.
    sync: Sync,
    /// New backup: `Synced` is at this entry, which is about to be received.
    synced_entry: Option<Lsn>,
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
    beat: Beat,
    /// New times that the backup may not have.
    changing: Option<Changing>,
    ask_again_ns: Option<u64>,
    won: bool,
}

impl Replica {
    /// A side that has just started, at `now_ns` of a monotonic clock.
    #[must_use]
    pub fn new(config: Config, now_ns: u64) -> Self {
        Self {
            ack: config.ack,
            leads: config.primary,
            greets: config.primary || config.joins,
            config,
            role: Role::Pairing,
            generation: Generation(0),
            fingerprint: None,
            shape: None,
            claimed: false,
            paired: false,
            sync: Sync::Done,
            synced_entry: None,
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
            beat: Beat::default(),
            changing: None,
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

    /// Whether this side and its peer are a pair, whatever the channel does. A live side with a new backup is one.
    fn is_pair(&self) -> bool {
        use Role::{Arbitrating, Live, Recording, Replaying};
        self.paired && matches!(self.role, Recording | Replaying | Arbitrating | Live)
    }

    /// Backup: whether entries that come are stored.
    fn follows(&self) -> bool {
        !self.leads && matches!(self.role, Role::Replaying | Role::Arbitrating)
    }

    /// When the next [`Event::Tick`] has something to do.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        if matches!(self.role, Role::Halted | Role::Off | Role::GoingLive) {
            return None;
        }
        let pair = self.paired.then(|| self.heartbeat_due_ns());
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
            Event::LocalReady { fingerprint, shape } => self.local_ready(now_ns, fingerprint, shape, actions),
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
                if self.leads || lsn <= self.last {
                    self.power_off = Some(lsn);
                }
            }
            Event::Adopted => self.adopted(now_ns, actions),
            Event::Holding { generation } => self.holding(generation, actions),
            Event::SyncedEntry { lsn, instance } => self.synced_entry(now_ns, lsn, instance, actions),
            Event::ConfigurationEntry { lsn, timing } => self.configuration_entry(lsn, timing),
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
            Message::Adopted => self.peer_adopted(now_ns),
            // Part of the transfer, which is the shells' affair.
            Message::Digests { .. } => {}
            Message::Ack(watermarks) => self.ack(now_ns, watermarks, actions),
            Message::Gone { .. } => self.suspect(now_ns, "the peer's replica ended", actions),
            Message::Heartbeat {
                lsn: last,
                replayed,
                full,
                asks,
                ..
            } => {
                let heard = Heard {
                    last,
                    replayed,
                    full,
                    asks,
                };
                self.heartbeat(now_ns, heard, actions);
            }
        }
    }

    /// Transitions that depend on several facts at once.
    fn after(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.maybe_hold(now_ns, actions);
        self.set_throttle(now_ns, actions);
        if self.role == Role::GoingLive && self.progress.replayed >= self.replay_end {
            let ended = self.power_off.is_some();
            if !ended {
                (self.leads, self.greets) = (true, false);
                actions.push(Action::Commit(Committed::through(Lsn::MAX)));
                self.change_role(Role::Live, actions);
            }
        }
        let Some(lsn) = self.power_off else { return };
        let complete = match self.role {
            Role::Recording => self.acknowledged >= lsn,
            Role::Live => true,
            // The primary ends with this side's word that it may, as strong as it asked for.
            Role::Replaying if self.sync != Sync::Done => false,
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
                | (Live, Recording)
                | (Recording | Replaying | GoingLive | Live, Off)
                | (Pairing | Recording | Replaying | Arbitrating | GoingLive | Live, Halted)
        );
        assert!(legal, "illegal change of role: {:?} to {to:?}", self.role);
        self.role = to;
        if to == Live {
            self.fingerprint = self.shape.or(self.fingerprint);
        }
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
            !self.leads || !self.is_pair() || self.acknowledged <= self.progress.of(self.ack),
            "acknowledged more than the backup said"
        );
        assert!(
            !matches!(self.role, Role::Live | Role::GoingLive) || self.won,
            "live without the arbiter's word"
        );
        assert!(
            self.role != Role::Recording || self.won,
            "recording without the arbiter's word"
        );
        assert!(
            self.role != Role::Live || self.progress.replayed >= self.replay_end,
            "live with entries unconsumed"
        );
        assert!(
            self.leads || self.sync == Sync::Done || matches!(self.role, Role::Replaying | Role::Halted),
            "a backup that is not synchronised is on its way to going live"
        );
        assert!(
            self.role != Role::Live || !matches!(self.sync, Sync::Holding | Sync::Appended(_)),
            "outputs leave that the backup may not have"
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
