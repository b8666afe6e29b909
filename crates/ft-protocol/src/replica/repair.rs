//! Pairing again: a live side takes a host without a history as its backup, without stopping (DESIGN part 5).
//!
//! ```text
//!   survivor                                              new backup
//!   Live          ◄──────── hello: has nothing ──────────  Pairing
//!   Live, syncing ──────────── hello: start ─────────────► Replaying, syncing
//!         │       ───────── entries after start ─────────►     │
//!         │       ═════ state as of start (the shells) ══►     │
//!         │       ◄─────────────── adopted ──────────────      │ it replays
//!   Recording: holds outputs                                   │
//!         │       ──────────────── Synced ───────────────► may take over
//!         │       ◄──────────── acknowledgement ─────────      │
//!   Recording: outputs leave by acknowledgement            Replaying
//! ```
//! It all happens in the survivor's generation, and nobody claims one for it. Of that generation there is one owner, and at most one
//! backup that may ever ask for the next: the one that `Synced` names.
//!
//! - Before `Synced` the new backup has no say: it never asks the arbiter, and its acknowledgements commit nothing. Whoever loses
//!   sight of the other gives the attempt up: the survivor goes on alone, the backup forgets everything and asks anew.
//! - The survivor holds outputs from before it appends `Synced`. What left before that is in entries before `Synced`, which the
//!   backup has when it has `Synced`. So there is no moment at which the backup may take over and an output leaves that it has not.
//! - From the moment at which it holds, the survivor cannot know whether the backup may take over: the loss of the backup is settled by the
//!   arbiter, as between any pair. Whoever wins is in the next generation, where everything said in this one is refused.
//! - A side that lost an earlier arbitration never says that it has nothing, and its generation is not the survivor's: it is taken for nobody.
//!   A new backup says that it has nothing, and resumes only as the instance that the survivor took: it is never taken for the old one.

use super::{Action, Replica, Role, channel::Channel};
use crate::{
    ids::{Generation, Lsn},
    lag::Lag,
    message::{Hello, Message, Standing, Watermarks},
    versions::Versions,
};

/// How far the synchronisation of a new backup is, on either side of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Sync {
    /// There is nothing to synchronise: the pair began with the VM, or the backup may take over. The survivor knows it by the
    /// acknowledgement of `Synced`.
    #[default]
    Done,
    /// The state is on its way.
    Transfer,
    /// The backup has the state.
    Adopted,
    /// Survivor: outputs are held, and `Synced` is not in the log.
    Holding,
    /// Survivor: `Synced` is in the log.
    Appended(Lsn),
}

impl Replica {
    /// Whether this side executes the VM for the pair and writes its log; a backup does so once it is live.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.leads
    }

    /// Whether this side connects the channel and speaks first on it: the primary that starts a VM, and a new backup.
    #[must_use]
    pub fn connects(&self) -> bool {
        self.greets
    }

    /// Whether the entries that this side writes are kept for a backup.
    #[must_use]
    pub fn keeps_entries(&self) -> bool {
        self.leads && self.is_pair()
    }

    /// The number by which the peer knows this side: another one for each start, and for each attempt to be synchronised.
    #[must_use]
    pub fn instance(&self) -> u64 {
        self.config.instance
    }

    /// New backup: whether the state has yet to come. Entries are stored until then, and not replayed.
    #[must_use]
    pub fn awaits_state(&self) -> bool {
        !self.leads && self.is_pair() && self.sync == Sync::Transfer
    }

    /// Whether this side and its peer protect the VM together: either may take over. While a new backup is being synchronised, no.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        self.is_pair() && self.sync == Sync::Done
    }

    /// Survivor: whether outputs are held, and [`Event::Holding`](super::Event::Holding) is waited for.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        self.leads && self.sync == Sync::Holding
    }

    pub(super) fn standing(&self) -> Standing {
        match (self.leads, self.role, self.sync) {
            (false, Role::Pairing, _) if self.config.joins => Standing::Nothing,
            (false, _, Sync::Transfer | Sync::Adopted) => Standing::Part,
            _ => Standing::Whole,
        }
    }

    // ---- survivor ----------------------------------------------------------------------------------------------------

    /// Why a host that has nothing is not taken; `None` if it is.
    pub(super) fn refuses_joiner(&self, generation: Generation, other: &Hello) -> Option<String> {
        let Some(own) = self.hello() else {
            return Some("this side is not ready: ask again".into());
        };
        if !self.config.takes_joiners || self.shape.is_none() {
            return Some("this side takes no new backup: it cannot synchronise one".into());
        }
        if self.role != Role::Live {
            return Some(format!(
                "this side is {:?}, and only a live one takes a new backup: ask again",
                self.role
            ));
        }
        if let Some(reason) = own.mismatch(other) {
            return Some(reason);
        }
        if generation != Generation(0) {
            return Some(format!(
                "who has nothing is of no generation, and the hello is of {generation}"
            ));
        }
        if own.versions.common(other.versions) < Some(Versions::FIRST_WITH_REPAIR) {
            return Some(format!(
                "a new backup needs protocol version {} on both hosts",
                Versions::FIRST_WITH_REPAIR
            ));
        }
        (!self.generation.can_pair()).then(|| format!("there is no generation after {}", self.generation))
    }

    /// A host that has nothing becomes the backup that is being synchronised; one that was so before is given up.
    pub(super) fn take_joiner(&mut self, now_ns: u64, other: &Hello, actions: &mut Vec<Action>) {
        if self.paired {
            self.drop_joiner("another host asks to be the backup, or the same one anew", actions);
        }
        let start = self.last;
        self.paired = true;
        self.peer_instance = other.instance;
        self.version = self.config.versions.common(other.versions);
        self.sync = Sync::Transfer;
        self.begin_at(start);
        self.lag = Lag::after(start);
        self.heard_ns = now_ns;
        self.beat.begin();
        self.channel = Channel::default();
        self.channel.open(now_ns);
        self.say_hello(actions);
        actions.push(Action::Synchronise { start });
    }

    /// Both sides begin with the state as of `start`: there is nothing before it to acknowledge.
    fn begin_at(&mut self, start: Lsn) {
        self.last = start;
        self.progress = Watermarks {
            received: start,
            durable: start,
            replayed: start,
        };
        self.told = self.progress;
        self.acknowledged = start;
    }

    /// The backup that is being synchronised is out of sight, and could not have gone live: this side goes on alone.
    pub(super) fn give_up_joiner(&mut self, now_ns: u64, reason: &'static str, actions: &mut Vec<Action>) {
        self.drop_joiner(reason, actions);
        actions.push(Action::CloseChannel);
        self.channel_down(now_ns);
    }

    fn drop_joiner(&mut self, reason: &'static str, actions: &mut Vec<Action>) {
        assert!(
            self.role == Role::Live && matches!(self.sync, Sync::Transfer | Sync::Adopted),
            "a backup that may take over is given up without the arbiter's word"
        );
        self.leave_pair();
        actions.push(Action::GiveUp { reason });
    }

    /// There is no pair any more.
    pub(super) fn leave_pair(&mut self) {
        self.paired = false;
        self.sync = Sync::Done;
        self.synced_entry = None;
        self.changing = None;
        self.replay_still_since_ns = None;
        self.lag = Lag::default();
    }

    /// The new backup says that it has the state.
    pub(super) fn peer_adopted(&mut self, now_ns: u64) {
        if self.leads && self.role == Role::Live && self.sync == Sync::Transfer {
            self.heard_ns = now_ns;
            self.sync = Sync::Adopted;
        }
    }

    /// The new backup has the state and is near enough: outputs are held from here on.
    pub(super) fn maybe_hold(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        let is_near = self.lag.ns(now_ns) <= self.config.timing.lag_target_ns;
        if self.role == Role::Live && self.sync == Sync::Adopted && is_near && self.power_off.is_none() {
            self.sync = Sync::Holding;
            actions.push(Action::Hold { after: self.last });
            self.change_role(Role::Recording, actions);
        }
    }

    /// Every device holds: the new backup may be told that it can take over.
    pub(super) fn holding(&mut self, generation: Generation, actions: &mut Vec<Action>) {
        if self.role == Role::Recording && self.sync == Sync::Holding && generation == self.generation {
            actions.push(Action::AppendSynced {
                instance: self.peer_instance,
            });
        }
    }

    // ---- new backup --------------------------------------------------------------------------------------------------

    /// The survivor's answer to a host that has nothing.
    pub(super) fn join(&mut self, now_ns: u64, generation: Generation, other: &Hello, actions: &mut Vec<Action>) {
        let was_asked = self.channel.greeted_ns.is_some();
        let Some(own) = self.hello().filter(|_| was_asked && other.standing == Standing::Whole) else {
            self.close_channel(now_ns, actions);
            return;
        };
        if let Some(reason) = own.mismatch(other).or_else(|| self.cannot_follow(other)) {
            actions.push(Action::Send(Message::Refuse { reason: reason.clone() }));
            self.halt(format!("refused to be synchronised: {reason}"), actions);
            return;
        }
        let version = own.versions.common(other.versions);
        if version < Some(Versions::FIRST_WITH_REPAIR) || !generation.can_pair() {
            let reason = format!(
                "the peer speaks protocol version {} in generation {generation}: it cannot synchronise a backup",
                other.versions
            );
            actions.push(Action::NotTaken { reason });
            self.close_channel(now_ns, actions);
            return;
        }
        self.paired = true;
        self.peer_instance = other.instance;
        self.version = version;
        self.generation = generation;
        self.ack = other.ack;
        self.adopt_timing(other);
        self.sync = Sync::Transfer;
        self.begin_at(other.last);
        self.heard_ns = now_ns;
        self.beat.begin();
        self.channel = Channel::default();
        self.channel.open(now_ns);
        self.change_role(Role::Replaying, actions);
        actions.push(Action::Synchronise { start: other.last });
    }

    /// No survivor takes this side. Another channel, and it asks again.
    pub(super) fn not_taken(&mut self, now_ns: u64, reason: String, actions: &mut Vec<Action>) {
        actions.push(Action::NotTaken { reason });
        self.close_channel(now_ns, actions);
    }

    /// The state is here.
    pub(super) fn adopted(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        if !self.awaits_state() {
            return;
        }
        self.sync = Sync::Adopted;
        // From here on there is something to replay.
        self.replay_still_since_ns = (self.progress.replayed < self.last).then_some(now_ns);
        self.say_adopted(actions);
    }

    /// Said on every channel: what was said on the one before may be lost.
    pub(super) fn say_adopted(&mut self, actions: &mut Vec<Action>) {
        if self.channel.open && !self.leads && self.sync == Sync::Adopted {
            actions.push(Action::Send(Message::Adopted));
        }
    }

    /// Everything of the attempt is forgotten. A new backup that has forgotten is another one, as after a new start: nothing that is under
    /// way between its former self and the survivor is its own.
    pub(super) fn forget_attempt(&mut self) {
        if self.config.joins {
            self.config.instance = self.config.instance.wrapping_add(1);
        }
        self.leave_pair();
        self.begin_at(Lsn::ZERO);
        self.power_off = None;
        self.generation = Generation(0);
    }

    // ---- both --------------------------------------------------------------------------------------------------------

    /// The entry `Synced` is in the log (survivor), or about to be received (new backup).
    pub(super) fn synced_entry(&mut self, now_ns: u64, lsn: Lsn, instance: u64, actions: &mut Vec<Action>) {
        if self.leads {
            // Asked for while it recorded; what was appended before it may have come in between.
            let is_wanted = matches!(self.role, Role::Recording | Role::Arbitrating) && self.sync == Sync::Holding;
            assert!(
                is_wanted && instance == self.peer_instance && lsn > self.last,
                "Synced was appended, and nobody asked for it"
            );
            self.sync = Sync::Appended(lsn);
        } else if self.follows() && self.sync != Sync::Done {
            if self.sync == Sync::Adopted && instance == self.config.instance {
                self.synced_entry = Some(lsn);
            } else {
                self.suspect(now_ns, "it takes this side for synchronised, which it is not", actions);
            }
        }
    }

    /// New backup: entries through `last` are stored. With `Synced` among them it may take over.
    pub(super) fn note_synced(&mut self) {
        if self.synced_entry.is_some_and(|lsn| lsn <= self.last) {
            self.synced_entry = None;
            self.sync = Sync::Done;
        }
    }

    /// Survivor: whether what the backup acknowledged now commits.
    pub(super) fn acknowledgement_counts(&mut self) -> bool {
        if let Sync::Appended(lsn) = self.sync
            && self.progress.of(self.ack) >= lsn
        {
            self.sync = Sync::Done;
        }
        self.sync == Sync::Done
    }
}
