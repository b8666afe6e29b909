//! The logging channel: hello, the pair, and coming back within a generation.
//!
//! ```text
//!   down ──ChannelUp──► up ──hello of both──► open
//!    ▲                  │ no answer: break    │ ChannelDown, or it stands still: break
//!    └──────────────────┴─────────────────────┘
//! ```
//! A break is no failure: the side that connects (the primary, or a new backup) does so again, each says hello with its last entry, and the
//! primary sends what the backup has not got. Only the two daemons that made the pair resume it, in its generation: whoever was started anew has not what
//! its former self acknowledged. A channel that stays away is a failure ([`super::failure`]).

use super::{Action, Replica, Role, Sync};
use crate::{
    ids::{Generation, Lsn},
    message::{Hello, Message, Standing, Strength, Watermarks},
};

/// What is known of the channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Channel {
    pub(super) up: bool,
    /// Both sides said hello on it.
    pub(super) open: bool,
    /// When this side, which speaks first, said hello, while there is no answer.
    pub(super) greeted_ns: Option<u64>,
    /// Since when it is not open, however many attempts to connect there were.
    pub(super) away_since_ns: u64,
    /// When both sides had said hello on it, while it is open.
    opened_ns: u64,
    /// Primary: since when the backup has taken nothing although there is something, on however many channels. New backup: since when
    /// nothing came although heartbeats say that there is something.
    pub(super) still_since_ns: Option<u64>,
    /// It was broken for standing still, and nothing has moved since.
    pub(super) broken: bool,
}

impl Channel {
    fn close(&mut self, now_ns: u64) {
        if self.open {
            self.away_since_ns = now_ns;
        }
        (self.up, self.open, self.greeted_ns) = (false, false, None);
    }

    pub(super) fn open(&mut self, now_ns: u64) {
        (self.up, self.open, self.greeted_ns) = (true, true, None);
        self.opened_ns = now_ns;
    }
}

impl Replica {
    // ---- connecting --------------------------------------------------------------------------------------------------

    pub(super) fn local_ready(
        &mut self,
        now_ns: u64,
        fingerprint: [u8; 32],
        shape: Option<[u8; 32]>,
        actions: &mut Vec<Action>,
    ) {
        if self.fingerprint.is_some() {
            return;
        }
        self.shape = shape;
        self.fingerprint = if self.config.joins { shape } else { Some(fingerprint) };
        if self.fingerprint.is_none() {
            self.halt(
                "the state of this VM cannot be transferred, so this host cannot become its new backup: engine 'device' with disks only".into(),
                actions,
            );
            return;
        }
        if self.config.primary {
            // The claim of the first generation keeps a host that comes back from starting the VM a second time.
            actions.push(Action::AskArbiter {
                generation: Generation::FIRST,
            });
        }
        self.greet(now_ns, actions);
    }

    pub(super) fn channel_up(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.channel.close(now_ns);
        self.channel.up = true;
        if !self.paired {
            self.heard_ns = now_ns;
        }
        self.greet(now_ns, actions);
    }

    pub(super) fn channel_down(&mut self, now_ns: u64) {
        self.channel.close(now_ns);
    }

    /// The primary speaks first, and only when it holds the generation. A new backup asks, and has nothing to hold.
    pub(super) fn greet(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        let greets = self.greets && (self.role == Role::Pairing || self.is_pair());
        if greets
            && (self.claimed || !self.leads)
            && self.channel.up
            && self.channel.greeted_ns.is_none()
            && let Some(hello) = self.hello()
        {
            self.channel.greeted_ns = Some(now_ns);
            actions.push(Action::Send(Message::Hello(hello)));
        }
    }

    pub(super) fn hello(&self) -> Option<Hello> {
        self.fingerprint.map(|fingerprint| Hello {
            versions: self.config.versions,
            vm: self.config.vm.clone(),
            primary: self.leads,
            fingerprint,
            instance: self.config.instance,
            ack: self.ack,
            last: self.last,
            standing: self.standing(),
            timing: Some(self.config.timing),
        })
    }

    /// When a channel that is up and of no use is broken, so that another one may be connected.
    pub(super) fn break_at_ns(&self) -> Option<u64> {
        if !self.leads && !self.greets {
            return None;
        }
        let still = self
            .channel
            .still_since_ns
            .filter(|_| self.channel.open && !self.channel.broken && self.is_pair())
            // Nothing can have moved on it before it was open. The suspicion counts on: channels that come and go and carry
            // nothing must not put it off for ever.
            .map(|since| since.max(self.channel.opened_ns));
        let since = if self.channel.open {
            still
        } else {
            self.channel.greeted_ns
        };
        since.map(|since| since.saturating_add(self.channel_timeout_ns() / 2))
    }

    pub(super) fn break_channel(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.channel.broken |= self.channel.open;
        self.channel.close(now_ns);
        actions.push(Action::BreakChannel);
    }

    pub(super) fn close_channel(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        actions.push(Action::CloseChannel);
        self.channel.close(now_ns);
    }

    // ---- hello -------------------------------------------------------------------------------------------------------

    /// Why a connection that begins with this hello may not take the place of the channel; `None` if it may. A side that is
    /// pairing answers for itself, to the operator too.
    #[must_use]
    pub fn refusal(&self, generation: Generation, other: &Hello) -> Option<String> {
        if self.config.joins && self.role == Role::Pairing {
            return Some("this side has nothing, and asks a live side to synchronise it: it answers nobody".into());
        }
        if other.standing == Standing::Nothing {
            return self.refuses_joiner(generation, other);
        }
        if self.role == Role::Pairing {
            return None;
        }
        let Some(own) = self.hello().filter(|_| self.is_pair()) else {
            return Some(format!("this side is {:?} and takes no peer", self.role));
        };
        if let Some(reason) = own.mismatch(other) {
            return Some(reason);
        }
        if own.versions.common(other.versions) != self.version {
            return Some(format!("the peer speaks protocol version {} now", other.versions));
        }
        if generation != self.generation {
            return Some(format!(
                "the hello is of generation {generation}, this is generation {}",
                self.generation
            ));
        }
        if other.instance != self.peer_instance {
            return Some("the peer was started anew and has nothing of this generation's log".into());
        }
        if self.leads && other.standing == Standing::Part && self.sync == Sync::Done {
            return Some("the peer is not synchronised, and this side holds outputs for it".into());
        }
        let (primary, backup) = match self.leads {
            true => (self.last, other.last),
            false => (other.last, self.last),
        };
        if backup > primary || backup < self.progress.received {
            return Some(format!(
                "the logs do not fit: the backup's ends at {backup}, the primary's at {primary}, and {} was acknowledged",
                self.progress.received
            ));
        }
        None
    }

    pub(super) fn on_hello(&mut self, now_ns: u64, generation: Generation, other: &Hello, actions: &mut Vec<Action>) {
        match self.role {
            // One hello begins a channel. A peer that goes on saying it is damaged, and every answer would take memory.
            _ if self.is_pair() && self.channel.open => {
                self.channel.close(now_ns);
                actions.push(Action::BreakChannel);
            }
            _ if other.standing == Standing::Nothing => match self.refusal(generation, other) {
                None => self.take_joiner(now_ns, other, actions),
                Some(reason) => self.refuse(now_ns, reason, actions),
            },
            Role::Pairing if self.config.joins => self.join(now_ns, generation, other, actions),
            Role::Pairing => self.pair(now_ns, generation, other, actions),
            _ if !self.is_pair() => actions.push(Action::CloseChannel),
            _ => match self.refusal(generation, other) {
                None => self.resume(now_ns, other, actions),
                // Only a peer that answers is known to be the peer: a stranger must not end the pair.
                Some(_) if self.greets && other.instance != self.peer_instance => {
                    self.suspect(now_ns, "the peer was started anew", actions);
                }
                Some(reason) => self.refuse(now_ns, reason, actions),
            },
        }
    }

    fn refuse(&mut self, now_ns: u64, reason: String, actions: &mut Vec<Action>) {
        actions.push(Action::Send(Message::Refuse { reason }));
        self.close_channel(now_ns, actions);
    }

    fn pair(&mut self, now_ns: u64, generation: Generation, other: &Hello, actions: &mut Vec<Action>) {
        let Some(own) = self.hello() else {
            // Not ready: the peer tries again when its channel closes.
            actions.push(Action::CloseChannel);
            return;
        };
        // The primary speaks first, and only with its claim: a peer that is ahead of it answers nothing that was asked.
        let was_asked = self.claimed && self.channel.greeted_ns.is_some();
        if self.config.primary && (!was_asked || generation != self.generation) {
            actions.push(Action::CloseChannel);
            return;
        }
        if let Some(reason) = own.mismatch(other).or_else(|| self.cannot_follow(other)) {
            actions.push(Action::Send(Message::Refuse { reason: reason.clone() }));
            self.halt(format!("refused to pair: {reason}"), actions);
            return;
        }
        if !self.config.primary && !generation.can_pair() {
            let reason = format!(
                "generation {generation} is none that a primary can hold: it cannot be claimed or has none after it"
            );
            actions.push(Action::Send(Message::Refuse { reason }));
            actions.push(Action::CloseChannel);
            return;
        }
        if !self.config.primary && other.last > Lsn::ZERO && other.instance != self.peer_instance {
            let reason = format!(
                "this side was started anew and has nothing of the log, which is at entry {}",
                other.last
            );
            actions.push(Action::Send(Message::Refuse { reason }));
            actions.push(Action::CloseChannel);
            return;
        }
        self.paired = true;
        self.peer_instance = other.instance;
        self.version = own.versions.common(other.versions);
        self.heard_ns = now_ns;
        self.beat.begin();
        self.channel.open(now_ns);
        if self.config.primary {
            self.change_role(Role::Recording, actions);
        } else {
            self.generation = generation;
            self.ack = other.ack;
            self.adopt_timing(other);
            self.say_hello(actions);
            self.change_role(Role::Replaying, actions);
        }
    }

    /// What the primary asks for and this backup cannot give.
    pub(super) fn cannot_follow(&self, other: &Hello) -> Option<String> {
        let durable = !self.leads && other.ack == Strength::Durable && !self.config.keeps_journal;
        durable.then(|| {
            "the primary waits for durable acknowledgements (--ack durable), and this side keeps no journal: give it --journal"
                .into()
        })
    }

    pub(super) fn say_hello(&mut self, actions: &mut Vec<Action>) {
        if let Some(own) = self.hello() {
            actions.push(Action::Send(Message::Hello(own)));
        }
    }

    /// The channel is back: what the backup has not got is sent again.
    fn resume(&mut self, now_ns: u64, other: &Hello, actions: &mut Vec<Action>) {
        self.heard_ns = now_ns;
        self.channel.open(now_ns);
        if !self.greets {
            self.say_hello(actions);
        }
        if !self.leads {
            self.tell(now_ns, actions);
            self.say_adopted(actions);
            return;
        }
        actions.push(Action::Rewind { after: other.last });
        self.hear_progress(
            now_ns,
            Watermarks {
                received: other.last,
                ..self.progress
            },
            actions,
        );
        if self.last > other.last {
            actions.push(Action::SendEntries { through: self.last });
        }
    }

    pub(super) fn refused(&mut self, now_ns: u64, reason: String, actions: &mut Vec<Action>) {
        match self.role {
            Role::Pairing if self.config.joins => self.not_taken(now_ns, reason, actions),
            Role::Pairing => self.halt(format!("the peer refused to pair: {reason}"), actions),
            Role::Recording | Role::Replaying if self.greets && !self.channel.open => {
                self.suspect(now_ns, "the peer does not resume the pair", actions);
            }
            _ => {}
        }
    }

    /// Something moved, or nothing is to move.
    pub(super) fn note_movement(&mut self, now_ns: u64, moved: bool) {
        if self.progress.received >= self.last {
            self.channel.still_since_ns = None;
            self.channel.broken = false;
        } else if moved {
            self.channel.still_since_ns = Some(now_ns);
            self.channel.broken = false;
        } else if self.channel.still_since_ns.is_none() {
            self.channel.still_since_ns = Some(now_ns);
        }
    }
}
