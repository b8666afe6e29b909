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
//! - a side goes live only with a generation the arbiter gave to it;
//! - a halted side never commits, sends or asks again;
//! - a backup goes live only after every entry it ever acknowledged was consumed;
//! - a backup that never received an entry does not go live: it returns to Pairing.

use crate::{
    controls,
    held::Committed,
    ids::{Generation, Lsn},
    message::{Hello, Message},
};

/// What this side is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// The logging channel is connected.
    ChannelUp,
    /// The logging channel broke or was closed by the peer.
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
    /// Let outputs go whose marker is at or below the watermark.
    Commit(Committed),
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
    /// This side is over. The role is published already.
    Halt {
        /// For the operator.
        reason: String,
    },
    /// The guest powered off and the log is complete: end with success.
    Finish,
}

/// Times and names of a replica.
#[derive(Clone, Debug)]
pub struct Config {
    /// The VM.
    pub vm: String,
    /// Whether this side was started as primary.
    pub primary: bool,
    /// Primary without a backup from the start.
    pub alone: bool,
    /// Between two heartbeats, ns.
    pub heartbeat_interval_ns: u64,
    /// Intervals of silence after which the peer is suspected.
    pub heartbeat_misses: u32,
}

/// The state of one side. One owner calls [`Replica::step`]; nothing else changes it.
#[derive(Debug)]
pub struct Replica {
    config: Config,
    role: Role,
    generation: Generation,
    fingerprint: Option<[u8; 32]>,
    claimed: bool,
    channel_up: bool,
    paired: bool,
    /// Last entry appended (primary) or received (backup) in this generation.
    last: Lsn,
    acknowledged: Lsn,
    consumed: Lsn,
    /// Last entry of the former primary, once the backup won; what it writes itself comes behind.
    replay_end: Lsn,
    power_off: Option<Lsn>,
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
            config,
            role: Role::Pairing,
            generation: Generation(0),
            fingerprint: None,
            claimed: false,
            channel_up: false,
            paired: false,
            last: Lsn::ZERO,
            acknowledged: Lsn::ZERO,
            consumed: Lsn::ZERO,
            replay_end: Lsn::ZERO,
            power_off: None,
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

    /// Last entry appended or received.
    #[must_use]
    pub fn last(&self) -> Lsn {
        self.last
    }

    /// Last entry the backup acknowledged (primary) or this side acknowledged (backup).
    #[must_use]
    pub fn acknowledged(&self) -> Lsn {
        self.acknowledged
    }

    /// When the next [`Event::Tick`] has something to do.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        match self.role {
            Role::Halted | Role::Off | Role::Live | Role::GoingLive => None,
            Role::Pairing if !self.paired => self.ask_again_ns,
            _ => {
                let mut due = self.heartbeat_due_ns;
                if self.may_suspect() {
                    due = due.min(self.suspect_at_ns());
                }
                Some(self.ask_again_ns.map_or(due, |ask| due.min(ask)))
            }
        }
    }

    /// A backup that has the power-off in hand ends with it: the VM is not to go on anywhere.
    fn may_suspect(&self) -> bool {
        match self.role {
            Role::Recording => true,
            Role::Replaying => self.power_off.is_none(),
            _ => false,
        }
    }

    fn suspect_at_ns(&self) -> u64 {
        self.heard_ns + self.config.heartbeat_interval_ns * u64::from(self.config.heartbeat_misses)
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
            Event::LocalReady { fingerprint } => self.local_ready(fingerprint, actions),
            Event::ChannelUp => self.channel_up(now_ns, actions),
            Event::ChannelDown => self.channel_down(now_ns, actions),
            Event::Message { generation, message } => self.message(now_ns, generation, message, actions),
            Event::Appended { through } => self.appended(through, actions),
            Event::Received {
                generation,
                from,
                through,
            } => self.received(now_ns, generation, from, through, actions),
            Event::Consumed { through } => self.consumed = self.consumed.max(through),
            Event::PowerOffEntry { lsn } => self.power_off = Some(lsn),
            Event::Arbiter { generation, verdict } => self.arbiter(now_ns, generation, verdict, actions),
            Event::LocalFailure { reason } => {
                if self.paired {
                    actions.push(Action::Send(Message::Gone { reason: reason.clone() }));
                }
                self.halt(reason, actions);
            }
            Event::Tick => self.tick(now_ns, actions),
        }
    }

    // ---- pairing -----------------------------------------------------------------------------------------------------

    fn local_ready(&mut self, fingerprint: [u8; 32], actions: &mut Vec<Action>) {
        if self.fingerprint.is_some() {
            return;
        }
        self.fingerprint = Some(fingerprint);
        if self.config.primary {
            // The claim of the first generation keeps a host that comes back from starting the VM a second time.
            actions.push(Action::AskArbiter {
                generation: Generation::FIRST,
            });
        }
        self.greet(actions);
    }

    fn channel_up(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.channel_up = true;
        self.heard_ns = now_ns;
        self.greet(actions);
    }

    /// The primary speaks first, and only when it holds the generation.
    fn greet(&mut self, actions: &mut Vec<Action>) {
        if self.config.primary
            && self.claimed
            && self.channel_up
            && !self.paired
            && let Some(hello) = self.hello()
        {
            actions.push(Action::Send(Message::Hello(hello)));
        }
    }

    fn hello(&self) -> Option<Hello> {
        self.fingerprint.map(|fingerprint| Hello {
            version: crate::frame::VERSION,
            vm: self.config.vm.clone(),
            primary: self.config.primary,
            fingerprint,
        })
    }

    fn on_hello(&mut self, now_ns: u64, generation: Generation, other: &Hello, actions: &mut Vec<Action>) {
        let Some(own) = self.hello().filter(|_| self.role == Role::Pairing) else {
            // Not ready, or already in a pair: the peer tries again when its channel closes.
            actions.push(Action::CloseChannel);
            return;
        };
        if let Some(reason) = own.mismatch(other) {
            actions.push(Action::Send(Message::Refuse { reason: reason.clone() }));
            self.halt(format!("refused to pair: {reason}"), actions);
            return;
        }
        self.paired = true;
        self.heard_ns = now_ns;
        self.heartbeat_due_ns = now_ns;
        if self.config.primary {
            self.change_role(Role::Recording, actions);
        } else {
            self.generation = generation;
            actions.push(Action::Send(Message::Hello(own)));
            self.change_role(Role::Replaying, actions);
        }
    }

    // ---- the log -----------------------------------------------------------------------------------------------------

    fn appended(&mut self, through: Lsn, actions: &mut Vec<Action>) {
        assert!(
            through >= self.last,
            "the log went backwards: {through} after {}",
            self.last
        );
        self.last = through;
        if matches!(self.role, Role::Recording | Role::Arbitrating) && self.channel_up {
            actions.push(Action::SendEntries { through });
        }
    }

    fn received(&mut self, now_ns: u64, generation: Generation, from: Lsn, through: Lsn, actions: &mut Vec<Action>) {
        let follows = matches!(self.role, Role::Replaying | Role::Arbitrating) && !self.config.primary;
        if !follows || generation != self.generation {
            return;
        }
        if from != self.last.next() || through < from {
            self.halt(
                format!("the log has a gap: entry {from} came after {}", self.last),
                actions,
            );
            return;
        }
        self.last = through;
        self.heard_ns = now_ns;
        self.acknowledged = through;
        actions.push(Action::Send(Message::Ack(through)));
    }

    fn message(&mut self, now_ns: u64, generation: Generation, message: Message, actions: &mut Vec<Action>) {
        match message {
            Message::Hello(hello) => self.on_hello(now_ns, generation, &hello, actions),
            Message::Refuse { reason } => {
                if self.role == Role::Pairing {
                    self.halt(format!("the peer refused to pair: {reason}"), actions);
                }
            }
            _ if generation != self.generation || !self.paired => {}
            Message::Ack(lsn) => self.ack(now_ns, lsn, actions),
            Message::Gone { .. } => self.suspect(now_ns, "the peer's replica ended", actions),
            Message::Heartbeat { .. } => self.heard_ns = now_ns,
        }
    }

    fn ack(&mut self, now_ns: u64, lsn: Lsn, actions: &mut Vec<Action>) {
        if !self.config.primary || !matches!(self.role, Role::Recording | Role::Arbitrating) {
            return;
        }
        if lsn > self.last {
            self.halt(
                format!("the peer acknowledged entry {lsn}, the last one is {}", self.last),
                actions,
            );
            return;
        }
        self.heard_ns = now_ns;
        if lsn > self.acknowledged {
            self.acknowledged = lsn;
            actions.push(Action::Commit(Committed::through(lsn)));
        }
    }

    // ---- failure -----------------------------------------------------------------------------------------------------

    fn channel_down(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.channel_up = false;
        if self.paired {
            self.suspect(now_ns, "the logging channel closed", actions);
        }
    }

    fn suspect(&mut self, now_ns: u64, reason: &'static str, actions: &mut Vec<Action>) {
        if !self.may_suspect() {
            return;
        }
        actions.push(Action::Suspect { reason });
        if !self.config.primary && self.last == Lsn::ZERO {
            self.unpair(actions);
            return;
        }
        self.change_role(Role::Arbitrating, actions);
        self.ask(now_ns, self.generation.next(), actions);
    }

    /// Nothing of the VM ever came here, so nothing of it was released: there is nothing to take over. The primary may not
    /// even know that it was paired; if this side went live, a later hello of that primary would start the VM a second time.
    fn unpair(&mut self, actions: &mut Vec<Action>) {
        self.paired = false;
        self.generation = Generation(0);
        actions.push(Action::CloseChannel);
        self.channel_up = false;
        self.change_role(Role::Pairing, actions);
    }

    fn ask(&mut self, now_ns: u64, generation: Generation, actions: &mut Vec<Action>) {
        self.ask_again_ns = None;
        if controls::ASK_ARBITER {
            actions.push(Action::AskArbiter { generation });
        } else {
            self.arbiter(now_ns, generation, Verdict::Won, actions);
        }
    }

    fn wanted(&self) -> Option<Generation> {
        match self.role {
            Role::Pairing if self.config.primary && !self.claimed => Some(Generation::FIRST),
            Role::Arbitrating => Some(self.generation.next()),
            _ => None,
        }
    }

    fn arbiter(&mut self, now_ns: u64, generation: Generation, verdict: Verdict, actions: &mut Vec<Action>) {
        if self.wanted() != Some(generation) {
            return;
        }
        // A late answer to an earlier request settles it as well: there is nothing to ask again.
        self.ask_again_ns = None;
        match verdict {
            Verdict::Unreachable => {
                self.ask_again_ns = Some(now_ns + self.config.heartbeat_interval_ns);
            }
            Verdict::Lost if self.role == Role::Pairing => self.halt(
                format!(
                    "generation {generation} of VM '{}' is already claimed: it was started before. If no host runs it any more, remove its claims from the arbiter",
                    self.config.vm
                ),
                actions,
            ),
            Verdict::Lost => self.halt(
                format!("lost the arbitration for generation {generation}: the other side is live"),
                actions,
            ),
            Verdict::Won if self.role == Role::Pairing => {
                self.claimed = true;
                self.won = true;
                self.generation = generation;
                if self.config.alone {
                    actions.push(Action::Commit(Committed::through(Lsn::MAX)));
                    self.change_role(Role::Live, actions);
                } else {
                    self.greet(actions);
                }
            }
            Verdict::Won => {
                self.won = true;
                self.generation = generation;
                actions.push(Action::CloseChannel);
                self.channel_up = false;
                if self.config.primary {
                    actions.push(Action::Commit(Committed::through(Lsn::MAX)));
                    self.change_role(Role::Live, actions);
                } else {
                    self.replay_end = self.last;
                    self.change_role(Role::GoingLive, actions);
                }
            }
        }
    }

    fn halt(&mut self, reason: String, actions: &mut Vec<Action>) {
        self.change_role(Role::Halted, actions);
        actions.push(Action::CloseChannel);
        actions.push(Action::Halt { reason });
    }

    // ---- time and ends -----------------------------------------------------------------------------------------------

    fn tick(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        if self.ask_again_ns.is_some_and(|at| now_ns >= at)
            && let Some(generation) = self.wanted()
        {
            self.ask(now_ns, generation, actions);
        }
        if !self.paired || matches!(self.role, Role::Live | Role::GoingLive | Role::Halted) {
            return;
        }
        if now_ns >= self.heartbeat_due_ns {
            self.heartbeat_due_ns = now_ns + self.config.heartbeat_interval_ns;
            self.heartbeat_sequence += 1;
            actions.push(Action::SendHeartbeat(Message::Heartbeat {
                vm: crate::message::vm_hash(&self.config.vm),
                lsn: self.last,
                sequence: self.heartbeat_sequence,
            }));
        }
        if now_ns >= self.suspect_at_ns() {
            self.suspect(now_ns, "no heartbeat and no log traffic", actions);
        }
    }

    /// Transitions that depend on several facts at once.
    fn after(&mut self, _now_ns: u64, actions: &mut Vec<Action>) {
        if self.role == Role::GoingLive && self.consumed >= self.replay_end {
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
            Role::Replaying | Role::GoingLive => self.consumed >= lsn,
            _ => false,
        };
        if complete {
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
            !matches!(self.role, Role::Live | Role::GoingLive) || self.won,
            "live without the arbiter's word"
        );
        assert!(
            self.role != Role::Live || self.config.primary || self.consumed >= self.replay_end,
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
#[path = "replica_tests.rs"]
mod tests;
