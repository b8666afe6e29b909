//! Suspicion, arbitration, the end.
//!
//! Three things make a side suspect its peer: silence on channel and heartbeats; a channel that stays away, or (seen by the primary)
//! stands still with entries under way, while heartbeats go on; and the peer's own word. It gives that word when something local fails, and
//! a replay that hangs counts as that.

use super::{Action, Replica, Role, Sync, Verdict};
use crate::{
    controls,
    held::Committed,
    ids::{Generation, Lsn},
    message::Message,
};

impl Replica {
    // ---- suspicion ---------------------------------------------------------------------------------------------------

    /// A backup that has the power-off in hand ends with it: the VM is not to go on anywhere. One that is not synchronised has nothing to
    /// end, and a live side loses sight of the one that it synchronises.
    fn may_suspect(&self) -> bool {
        match self.role {
            Role::Recording => true,
            Role::Replaying => self.power_off.is_none() || self.sync != Sync::Done,
            Role::Live => self.paired,
            _ => false,
        }
    }

    /// When the peer is suspected if nothing is heard, and why.
    pub(super) fn suspicion(&self) -> Option<(u64, &'static str)> {
        if !self.may_suspect() {
            return None;
        }
        let mut soonest = (
            self.heard_ns.saturating_add(self.silence_ns()),
            "no heartbeat and no log traffic",
        );
        let mut consider = |since: u64, why| {
            let at = since.saturating_add(self.channel_timeout_ns());
            if at < soonest.0 {
                soonest = (at, why);
            }
        };
        if !self.channel.open {
            consider(
                self.channel.away_since_ns,
                "the logging channel is away, though heartbeats come",
            );
        }
        if let Some(since) = self.channel.still_since_ns.filter(|_| self.leads) {
            consider(since, "the logging channel stands still, though heartbeats come");
        }
        Some(soonest)
    }

    pub(super) fn suspect(&mut self, now_ns: u64, reason: &'static str, actions: &mut Vec<Action>) {
        if !self.may_suspect() {
            return;
        }
        if self.role == Role::Live {
            self.give_up_joiner(now_ns, reason, actions);
            return;
        }
        actions.push(Action::Suspect { reason });
        if !self.leads && (self.last == Lsn::ZERO || self.sync != Sync::Done) {
            self.unpair(now_ns, actions);
            return;
        }
        self.change_role(Role::Arbitrating, actions);
        self.ask(now_ns, self.generation.next(), actions);
    }

    /// Nothing of the VM ever came here, so nothing of it was released: there is nothing to take over. The primary may not
    /// even know that it was paired; if this side went live, a later hello of that primary would start the VM a second time.
    /// What a new backup has before it is synchronised is no more than nothing: the survivor goes on without it.
    fn unpair(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        self.forget_attempt();
        self.close_channel(now_ns, actions);
        self.change_role(Role::Pairing, actions);
    }

    // ---- arbitration -------------------------------------------------------------------------------------------------

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

    pub(super) fn arbiter(&mut self, now_ns: u64, generation: Generation, verdict: Verdict, actions: &mut Vec<Action>) {
        if self.wanted() != Some(generation) {
            return;
        }
        // A late answer to an earlier request settles it as well: there is nothing to ask again.
        self.ask_again_ns = None;
        match verdict {
            Verdict::Unreachable => {
                self.ask_again_ns = Some(now_ns + self.config.timing.heartbeat_interval_ns);
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
                    self.greets = false;
                    actions.push(Action::Commit(Committed::through(Lsn::MAX)));
                    self.change_role(Role::Live, actions);
                } else {
                    self.greet(now_ns, actions);
                }
            }
            Verdict::Won => {
                self.won = true;
                self.generation = generation;
                self.close_channel(now_ns, actions);
                self.leave_pair();
                self.greets = false;
                if self.leads {
                    actions.push(Action::Commit(Committed::through(Lsn::MAX)));
                    self.change_role(Role::Live, actions);
                } else {
                    self.replay_end = self.last;
                    self.change_role(Role::GoingLive, actions);
                }
            }
        }
    }

    /// Something of this replica is broken: the peer is told at once, and this side is over.
    pub(super) fn fail(&mut self, reason: String, actions: &mut Vec<Action>) {
        if self.paired {
            actions.push(Action::Send(Message::Gone { reason: reason.clone() }));
        }
        self.halt(reason, actions);
    }

    pub(super) fn halt(&mut self, reason: String, actions: &mut Vec<Action>) {
        self.change_role(Role::Halted, actions);
        actions.push(Action::CloseChannel);
        actions.push(Action::Halt { reason });
    }

    // ---- time --------------------------------------------------------------------------------------------------------

    pub(super) fn tick(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        if self.ask_again_ns.is_some_and(|at| now_ns >= at)
            && let Some(generation) = self.wanted()
        {
            self.ask(now_ns, generation, actions);
        }
        if self.break_at_ns().is_some_and(|at| now_ns >= at) {
            self.break_channel(now_ns, actions);
        }
        if !self.paired || matches!(self.role, Role::GoingLive | Role::Halted) {
            return;
        }
        if self.replay_hangs_at_ns().is_some_and(|at| now_ns >= at) {
            let timeout_ms = self.config.timing.replay_timeout_ns / 1_000_000;
            let (replayed, last) = (self.progress.replayed, self.last);
            self.fail(
                format!(
                    "the replay has applied nothing for {timeout_ms} ms: it stands at entry {replayed} and entry {last} is here. The shim or a device daemon of this backup hangs;                      end them and start a new backup (--replay-timeout-ms says how long is too long)"
                ),
                actions,
            );
            return;
        }
        if self.tell_at_ns().is_some_and(|at| now_ns >= at) {
            self.tell(now_ns, actions);
        }
        if now_ns >= self.heartbeat_due_ns() {
            self.send_heartbeat(now_ns, actions);
        }
        if let Some((at, why)) = self.suspicion()
            && now_ns >= at
        {
            self.suspect(now_ns, why, actions);
        }
    }
}
