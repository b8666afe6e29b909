//! What the core decides, done.

use std::io;

use ft_client::{crash, events::monotonic_ns};
use ft_protocol::{Action, Committed, Event, Generation, Lsn, Role, Strength, Verdict};
use serde_json::json;
use tracing::{error, info, warn};

use super::Daemon;
use crate::{arbiter::Answer, exit::Exit};

impl Daemon {
    /// Takes an event to the core and does what it says; events that follow from that come after it.
    pub(super) fn handle(&mut self, event: Event) -> io::Result<()> {
        self.queue.push_back(event);
        self.handle_queued()
    }

    pub(super) fn handle_queued(&mut self) -> io::Result<()> {
        while let Some(event) = self.queue.pop_front() {
            let exit = self.exit_after(&event);
            let mut actions = std::mem::take(&mut self.actions);
            self.vm.replica.step(monotonic_ns(), event, &mut actions);
            if self.vm.replica.is_channel_open() {
                self.vm.link.is_in_use()?;
                if let Some(heartbeats) = &mut self.heartbeats {
                    heartbeats.settle_keys();
                }
            }
            for action in actions.drain(..) {
                self.perform(action, exit)?;
            }
            self.actions = actions;
        }
        Ok(())
    }

    /// Exit status if this event ends the replica.
    fn exit_after(&self, event: &Event) -> Exit {
        match event {
            Event::LocalFailure { .. } => self.vm.failure,
            // All that time ends is a backup whose replay hangs.
            Event::Tick => Exit::LocalFailure,
            Event::Arbiter { .. } => Exit::LostArbitration,
            _ => Exit::Environment,
        }
    }

    fn perform(&mut self, action: Action, exit: Exit) -> io::Result<()> {
        let generation = self.vm.replica.generation();
        match action {
            Action::Send(message) => {
                if matches!(message, ft_protocol::message::Message::Ack(_)) {
                    crash::point("log.ack.before");
                }
                if let Some(channel) = self.vm.link.channel() {
                    channel.message(&message, generation);
                }
            }
            Action::SendHeartbeat(message) => {
                if let Some(heartbeats) = &mut self.heartbeats {
                    heartbeats.send(&mut self.ring, &message, generation)?;
                }
            }
            Action::SendEntries { .. } => {
                if let Some(channel) = self.vm.link.channel() {
                    channel.allow();
                }
            }
            Action::Rewind { after } => self.vm.backlog.rewind(after),
            Action::Forget { through } => self.vm.backlog.acknowledge(through),
            Action::Throttle { permille } => self.throttle(permille),
            Action::Commit(committed) => self.commit(committed),
            Action::AskArbiter { generation } => {
                self.vm.arbiter_warned = false;
                self.vm.arbiter.ask(&mut self.ring, generation, monotonic_ns())?;
            }
            Action::Publish {
                role,
                generation,
                replay_end,
            } => self.publish(role, generation, replay_end)?,
            Action::Suspect { reason } => {
                warn!("the peer is suspected: {reason}");
                self.events.emit("suspect", json!({ "reason": reason }));
            }
            Action::Synchronise { start } => self.synchronise(start),
            Action::GiveUp { reason } => self.give_up(reason),
            Action::NotTaken { reason } => self.not_taken(&reason),
            Action::Hold { after } => self.vm.local.region.hold(after),
            Action::AppendSynced { instance } => self.append_synced(instance),
            Action::CloseChannel => self.close_channel()?,
            Action::BreakChannel => {
                info!("the logging channel is of no use and is connected anew");
                self.break_channel()?;
            }
            Action::Halt { reason } => {
                error!("halted: {reason}");
                self.events.emit("halted", json!({ "reason": reason }));
                self.reason = reason;
                self.end(exit)?;
            }
            Action::Finish => {
                info!("the guest powered off");
                self.events.emit("power_off", json!({}));
                self.reason = "the guest powered off".into();
                self.end(Exit::Ordinary)?;
            }
        }
        Ok(())
    }

    fn commit(&mut self, committed: Committed) {
        crash::point("log.commit.before");
        for device in self.vm.local.region.commit(committed) {
            self.vm.local.ring_commit(device);
        }
        crash::point("log.commit.after");
    }

    fn throttle(&mut self, permille: u32) {
        let was = self.vm.local.region.throttle();
        self.vm.local.region.set_throttle(permille);
        if (permille == 0) != (was == 0) {
            let lag_ms = self.vm.replica.lag_ns(monotonic_ns()) / 1_000_000;
            self.events
                .emit("throttle", json!({ "permille": permille, "lag_ms": lag_ms }));
        }
    }

    fn publish(&mut self, role: Role, generation: Generation, replay_end: Lsn) -> io::Result<()> {
        match role {
            // Of a state that is being transferred the journal would have a part; it begins when that is here.
            Role::Recording | Role::Replaying if !self.vm.replica.awaits_state() => self.start_journal(),
            Role::GoingLive | Role::Live => self.vm.journal.finish(),
            _ => {}
        }
        if role == Role::Live {
            self.vm.backlog.clear();
            self.vm.local.region.end_synchronisation();
        }
        if role == Role::Live && self.vm.local.merger.next() <= replay_end {
            // A backup's log goes on behind what it replayed; before anybody may write it.
            self.vm.local.region.restart_log(replay_end.next());
            self.vm.local.merger.restart(replay_end.next());
        }
        self.vm.local.region.publish(role, generation, replay_end);
        self.vm.local.ring_all();
        let had_backup = self.vm.records;
        self.vm.records = role == Role::Recording || had_backup && role == Role::Arbitrating;
        info!("{role:?}, generation {generation}");
        match role {
            Role::Recording | Role::Replaying => {
                self.note_timing_of_pair()?;
                let version = self.vm.replica.version();
                self.events
                    .emit("paired", json!({ "generation": generation.0, "version": version }));
            }
            Role::GoingLive => self.queue.push_back(Event::Consumed {
                through: self.vm.local.region.consumed().min(replay_end),
            }),
            Role::Pairing if self.config.resync => self.attempt_failed(),
            Role::Live => {
                if had_backup && !self.vm.alone {
                    self.events.emit("backup_gone", json!({ "generation": generation.0 }));
                }
                self.events.emit("go_live", json!({ "generation": generation.0 }));
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn start_journal(&mut self) {
        let replica = &self.vm.replica;
        let flushes = replica.ack_strength() == Strength::Durable;
        let first = replica.last().next();
        self.vm.journal.start(replica.generation(), first, flushes);
    }

    /// The arbiter's word, for the core and the operator. A trouble that stays is told once.
    pub(super) fn arbiter_answered(&mut self, answer: Answer) -> io::Result<()> {
        let Answer {
            generation,
            verdict,
            detail,
        } = answer;
        let name = match verdict {
            Verdict::Won => "won",
            Verdict::Lost => "lost",
            Verdict::Unreachable => "unreachable",
        };
        let is_new = verdict != Verdict::Unreachable || self.vm.arbiter_trouble.as_ref() != Some(&detail);
        if is_new {
            self.events.emit(
                "arbiter",
                json!({ "verdict": name, "generation": generation.0, "detail": detail }),
            );
        }
        match verdict {
            Verdict::Unreachable => {
                if is_new {
                    warn!("the arbiter is unreachable: {detail}");
                }
                self.vm.arbiter_trouble = Some(detail);
            }
            _ => {
                self.vm.arbiter_trouble = None;
                info!("arbiter, generation {generation}: {name} {detail}");
            }
        }
        self.handle(Event::Arbiter { generation, verdict })
    }
}
