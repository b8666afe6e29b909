//! The log: what was appended, received, flushed, replayed and acknowledged, and how far the replay trails.

use super::{Action, Replica, Role, Sync};
use crate::{
    held::Committed,
    ids::{Generation, Lsn},
    lag,
    limits::THROTTLE_MAX,
    message::{Message, Strength, Watermarks},
};

/// A backup whose replay moves says so this often, where nothing else carries it.
const TELL_NS: u64 = 10_000_000;
/// Changes of the throttle that are not worth telling, in thousandths.
const THROTTLE_STEP: u32 = 10;

/// What to do with an entry that came over the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It is the next one.
    Next,
    /// It is here already: it was sent again after a break.
    Known,
    /// It has no place in this log.
    Foreign,
}

impl Replica {
    // ---- primary -----------------------------------------------------------------------------------------------------

    pub(super) fn appended(&mut self, now_ns: u64, through: Lsn, actions: &mut Vec<Action>) {
        assert!(
            through >= self.last,
            "the log went backwards: {through} after {}",
            self.last
        );
        self.last = through;
        if self.is_pair() {
            self.lag.appended(through, now_ns);
            self.note_movement(now_ns, false);
            if self.channel.open {
                actions.push(Action::SendEntries { through });
            }
        }
    }

    pub(super) fn ack(&mut self, now_ns: u64, said: Watermarks, actions: &mut Vec<Action>) {
        if !self.leads || !self.is_pair() {
            return;
        }
        let most = said.received.max(said.durable).max(said.replayed);
        if most > self.last && self.role == Role::Live {
            // Nothing depends on a backup that is being synchronised.
            self.give_up_joiner(now_ns, "it acknowledged an entry that is not there", actions);
            return;
        }
        if most > self.last {
            self.halt(
                format!("the peer acknowledged entry {most}, the last one is {}", self.last),
                actions,
            );
            return;
        }
        self.heard_ns = now_ns;
        self.hear_progress(now_ns, said, actions);
    }

    /// The backup says how far it is. What it said earlier stays true.
    pub(super) fn hear_progress(&mut self, now_ns: u64, said: Watermarks, actions: &mut Vec<Action>) {
        let moved = said.received > self.progress.received;
        self.progress = Watermarks {
            received: said.received.max(self.progress.received),
            durable: said.durable.max(self.progress.durable),
            replayed: said.replayed.max(self.progress.replayed),
        };
        self.settle_configuration();
        self.lag.replayed(self.progress.replayed);
        self.note_movement(now_ns, moved);
        if moved {
            actions.push(Action::Forget {
                through: self.progress.received,
            });
        }
        let acknowledged = self.progress.of(self.ack);
        if self.acknowledgement_counts() && acknowledged > self.acknowledged {
            self.acknowledged = acknowledged;
            actions.push(Action::Commit(Committed::through(acknowledged)));
        }
    }

    /// How much the vCPU must pause. While the arbiter decides it stays as it was: nothing is heard of the replay then.
    pub(super) fn set_throttle(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        let timing = &self.config.timing;
        let permille = match self.role {
            Role::Recording => lag::throttle(self.lag.ns(now_ns), timing.lag_target_ns, timing.lag_limit_ns),
            // What the new backup cannot replay while its state is on its way does not slow the VM down.
            Role::Live if self.sync != Sync::Adopted => 0,
            Role::Live => lag::throttle(self.lag.ns(now_ns), timing.lag_target_ns, timing.lag_limit_ns),
            _ => return,
        };
        let is_edge = |permille: u32| permille == 0 || permille == THROTTLE_MAX;
        let differs = permille != self.throttle
            && (is_edge(permille) || is_edge(self.throttle) || permille.abs_diff(self.throttle) >= THROTTLE_STEP);
        if differs {
            self.throttle = permille;
            actions.push(Action::Throttle { permille });
        }
    }

    // ---- backup ------------------------------------------------------------------------------------------------------

    /// What to do with entry `lsn` of `generation` when everything through `stored` is stored.
    #[must_use]
    pub fn place(&self, generation: Generation, lsn: Lsn, stored: Lsn) -> Place {
        if !self.follows() || !self.channel.open || generation != self.generation || lsn == Lsn::ZERO {
            Place::Foreign
        } else if lsn <= stored {
            Place::Known
        } else if lsn == stored.next() {
            Place::Next
        } else {
            Place::Foreign
        }
    }

    pub(super) fn received(
        &mut self,
        now_ns: u64,
        generation: Generation,
        from: Lsn,
        through: Lsn,
        actions: &mut Vec<Action>,
    ) {
        if !self.follows() || generation != self.generation {
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
        self.progress.received = through;
        if !self.awaits_state() {
            self.replay_still_since_ns.get_or_insert(now_ns);
        }
        self.channel.still_since_ns = None;
        self.channel.broken = false;
        self.note_synced();
        self.tell(now_ns, actions);
    }

    pub(super) fn durable(&mut self, now_ns: u64, through: Lsn, actions: &mut Vec<Action>) {
        let through = through.min(self.last);
        if self.follows() && through > self.progress.durable {
            self.progress.durable = through;
            if self.ack == Strength::Durable {
                self.tell(now_ns, actions);
            }
        }
    }

    pub(super) fn consumed(&mut self, now_ns: u64, through: Lsn, actions: &mut Vec<Action>) {
        if self.leads {
            return;
        }
        let through = through.min(self.last);
        if through > self.progress.replayed {
            self.progress.replayed = through;
            self.replay_still_since_ns = (through < self.last).then_some(now_ns);
        }
        let waits = self.ack == Strength::Replayed && self.progress.replayed > self.told.replayed;
        if waits || self.tell_at_ns().is_some_and(|at| now_ns >= at) {
            self.tell(now_ns, actions);
        }
    }

    /// When a replay that goes on applying nothing has failed. The primary cannot know: heartbeats and acknowledgements come from this
    /// process, and it would stand still, throttled by the lag, for as long as the replay does.
    pub(super) fn replay_hangs_at_ns(&self) -> Option<u64> {
        if self.role != Role::Replaying {
            return None;
        }
        let since = self.replay_still_since_ns?;
        Some(since.saturating_add(self.config.timing.replay_timeout_ns))
    }

    /// When the replay's progress must be told.
    pub(super) fn tell_at_ns(&self) -> Option<u64> {
        let is_news = self.follows() && self.channel.open && self.progress.replayed > self.told.replayed;
        is_news.then(|| self.told_ns.saturating_add(TELL_NS))
    }

    /// Acknowledges: says how far this side is.
    pub(super) fn tell(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.acknowledged = self.last;
        if self.channel.open && self.follows() {
            self.told = self.progress;
            self.told_ns = now_ns;
            actions.push(Action::Send(Message::Ack(self.progress)));
        }
    }
}
