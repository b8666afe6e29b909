//! The model of ft-log round the real core: it performs the core's actions and tells it what happens. Its channel stands in
//! [`crate::channel`], the guest and the devices in [`crate::engine`].

use ft_protocol::{Action, Committed, Event, Generation, Lsn, Role, Verdict, message};
use rand::Rng;

use crate::{
    crash_points::{Deed, Point},
    host::{HostId, Incarnation, VM},
    mutants::Mutant,
    queue::{Happening, Task},
    world::World,
};

/// What both sides would run.
pub(crate) const FINGERPRINT: [u8; 32] = [7; 32];

impl World {
    /// One event for the core of a host, and everything it wants done.
    pub(crate) fn drive(&mut self, id: HostId, event: Event) {
        let now_ns = self.now_ns;
        let host = self.host(id);
        if !host.is_running() {
            return;
        }
        let local_ns = host.clock.local_ns(now_ns);
        let mut actions = std::mem::take(&mut self.actions);
        self.host(id).replica.step(local_ns, event, &mut actions);
        for action in actions.drain(..) {
            if !self.host(id).alive {
                break;
            }
            self.perform(id, action);
        }
        self.actions = actions;
        self.plan_tick(id);
    }

    fn plan_tick(&mut self, id: HostId) {
        let now_ns = self.now_ns;
        let host = self.host(id);
        if !host.is_running() {
            return;
        }
        let Some(deadline_ns) = host.replica.deadline_ns() else {
            return;
        };
        let at_ns = host.clock.world_ns(deadline_ns).max(now_ns);
        if host.tick_at_ns.is_none_or(|planned| at_ns < planned) {
            host.tick_at_ns = Some(at_ns);
            self.later(id, at_ns - now_ns, Task::Tick);
        }
    }

    fn perform(&mut self, id: HostId, action: Action) {
        match action {
            Action::Send(message) => self.send_message(id, &message),
            Action::SendHeartbeat(message) => {
                if self.is_mutant(Mutant::NoHeartbeats) {
                    return;
                }
                self.judge.spoke(id, "a heartbeat");
                let mut bytes = Vec::new();
                message.encode(self.host(id).replica.generation(), &mut bytes);
                self.with_way(|network, way| network.datagram(id, &bytes, way));
            }
            Action::SendEntries { through } => self.send_entries(id, through),
            Action::Rewind { after } => self.rewind(id, after),
            Action::Forget { through } => self.host(id).backlog.acknowledge(through),
            Action::Throttle { permille } => self.set_throttle(id, permille),
            Action::Commit(committed) => self.commit(id, committed),
            Action::Synchronise { start } => self.synchronise(id, start),
            Action::GiveUp { reason } => self.give_up(id, reason),
            Action::NotTaken { reason } => self.note(Some(id), || format!("is not taken: {reason}")),
            Action::Hold { after } => self.hold_after(id, after),
            Action::AppendSynced { instance } => self.append_synced(id, instance),
            Action::AskArbiter { generation } => self.ask(id, generation),
            Action::Publish {
                role,
                generation,
                replay_end,
            } => self.publish(id, role, generation, replay_end),
            Action::Suspect { reason } => {
                self.note(Some(id), || format!("suspects its peer: {reason}"));
                self.judge.suspected(id, reason);
            }
            Action::CloseChannel => self.close_channel(id),
            Action::BreakChannel => {
                if !self.is_mutant(Mutant::NeverBreak) {
                    self.break_channel(id);
                }
            }
            Action::Halt { reason } => {
                self.note(Some(id), || format!("halts: {reason}"));
                if self.is_mutant(Mutant::SpeakAfterHalt) {
                    self.commit(id, Committed::through(Lsn::MAX));
                } else {
                    self.end(id);
                }
            }
            Action::Finish => {
                // What is committed leaves before the devices end.
                self.release(id);
                self.close_channel(id);
                self.end(id);
            }
        }
    }

    fn end(&mut self, id: HostId) {
        let host = self.host(id);
        host.ended = true;
        host.held.clear();
    }

    pub(crate) fn commit(&mut self, id: HostId, committed: Committed) {
        let holds_late = self.is_mutant(Mutant::HoldLate);
        let host = self.host(id);
        if holds_late && host.committed.lsn() == Lsn::MAX && host.role == Role::Recording {
            host.committed = committed;
        }
        host.committed = host.committed.max(committed);
        self.note(Some(id), || format!("commit through {}", committed.lsn()));
        self.wake_devices(id);
    }

    fn set_throttle(&mut self, id: HostId, permille: u32) {
        if self.is_mutant(Mutant::IgnoreThrottle) {
            return;
        }
        let was = std::mem::replace(&mut self.host(id).throttle, permille);
        self.note(Some(id), || format!("throttle {permille}"));
        if permille < was {
            self.wake_guest(id, 0);
        }
    }

    fn publish(&mut self, id: HostId, role: Role, generation: Generation, replay_end: Lsn) {
        self.note(Some(id), || format!("is {role:?}, generation {generation}"));
        let me = self.host(id).me;
        self.judge.published(me, role, generation);
        self.count_role(id, role);
        let host = self.host(id);
        let before = std::mem::replace(&mut host.role, role);
        if role == Role::Live {
            host.backlog.clear();
        }
        match role {
            Role::GoingLive => {
                host.replay_end = replay_end;
                if self.is_mutant(Mutant::DropTailAtGoLive) {
                    self.host(id).replay.clear();
                    self.later(id, 0, Task::TailDropped);
                }
            }
            Role::Live if before == Role::GoingLive => {
                // The log of the new generation goes on behind what was replayed.
                host.next_lsn = replay_end.next();
                host.replay.clear();
            }
            Role::Pairing => host.forget_vm(),
            _ => {}
        }
        self.wake_guest(id, 0);
    }

    // ---- what happens ------------------------------------------------------------------------------------------------

    pub(crate) fn task(&mut self, id: HostId, task: Task) {
        let now_ns = self.now_ns;
        let host = self.host(id);
        match task {
            Task::Start => self.drive(
                id,
                Event::LocalReady {
                    fingerprint: FINGERPRINT,
                    shape: Some(FINGERPRINT),
                },
            ),
            Task::Tick => {
                if host.tick_at_ns.is_some_and(|at| at <= now_ns) {
                    host.tick_at_ns = None;
                    self.drive(id, Event::Tick);
                }
            }
            Task::Stop => {
                if host.stop_at_ns.is_some_and(|at| at <= now_ns) {
                    host.stop_at_ns = None;
                    self.guest_stop(id);
                }
            }
            Task::Release => {
                if host.release_at_ns.is_some_and(|at| at <= now_ns) {
                    host.release_at_ns = None;
                    self.release(id);
                }
            }
            Task::Connect => self.connect(id),
            Task::Closed { connection } => self.closed(id, connection),
            Task::Flush => self.flush(id),
            Task::Flushed { entries } => self.flushed(id, entries),
            Task::AskTimeout { ask } => {
                if host.asks == ask && host.ask_open {
                    host.ask_open = false;
                    let generation = host.asked;
                    self.verdict(id, generation, Verdict::Unreachable);
                }
            }
            Task::Verdict {
                ask,
                generation,
                verdict,
            } => {
                if host.asks == ask {
                    host.ask_open = false;
                }
                self.verdict(id, generation, verdict);
            }
            Task::StateHere { attempt, start } => self.state_here(id, attempt, start),
            Task::Holding { generation } => self.holding(id, generation),
            Task::TailDropped => {
                let through = host.replay_end;
                self.drive(id, Event::Consumed { through });
            }
            Task::StoreLate { connection, frame } => {
                if host.connection == Some(connection) {
                    self.store(id, frame);
                }
            }
        }
    }

    pub(crate) fn datagram(&mut self, id: HostId, bytes: &[u8]) {
        if !self.host(id).is_running() {
            return;
        }
        let (generation, message) = message::Message::decode(bytes).expect("the network does not change bytes");
        if let message::Message::Heartbeat { vm, .. } = message
            && vm == message::vm_hash(VM)
        {
            let generation = self.heard(id, generation);
            self.drive(id, Event::Message { generation, message });
        }
    }

    /// The generation of something heard, as the shell tells it to the core.
    pub(crate) fn heard(&mut self, id: HostId, generation: Generation) -> Generation {
        if self.is_mutant(Mutant::IgnoreGeneration) {
            let own = self.host(id).replica.generation();
            return own.max(Generation::FIRST);
        }
        generation
    }

    pub(crate) fn local_failure(&mut self, id: HostId) {
        if self.host(id).is_running() {
            self.judge.failed_locally(id);
            let reason = "vhost-ft-blk ended".into();
            self.drive(id, Event::LocalFailure { reason });
        }
    }

    // ---- the arbiter -------------------------------------------------------------------------------------------------

    fn ask(&mut self, id: HostId, generation: Generation) {
        if self.passes(
            id,
            Point {
                deed: Deed::Ask,
                after: false,
            },
        ) {
            return;
        }
        self.judge.spoke(id, "a claim");
        self.note(Some(id), || format!("asks the arbiter for generation {generation}"));
        let host = self.host(id);
        host.asks += 1;
        host.ask_open = true;
        host.asked = generation;
        let (ask, by) = (host.asks, host.me);
        let at = self.now_ns + self.arbiter_path_ns();
        self.queue.push(at, Happening::Claim { ask, generation, by });
        self.later(id, 2 * self.setting().heartbeat_interval_ns, Task::AskTimeout { ask });
        self.passes(
            id,
            Point {
                deed: Deed::Ask,
                after: true,
            },
        );
    }

    fn arbiter_path_ns(&mut self) -> u64 {
        let delay_ns_max = self.arbiter.delay_ns_max();
        let usual_ns = self.setting().latency_ns;
        usual_ns + self.rng.random_range(0..=usual_ns.max(delay_ns_max))
    }

    /// A claim reaches the arbiter, whether or not the host that sent it still lives.
    pub(crate) fn claim(&mut self, ask: u32, generation: Generation, by: Incarnation) {
        if !self.arbiter.is_reachable(by.host) {
            return;
        }
        let truth = self.arbiter.claim(generation, by);
        self.judge.claimed(generation, by, truth == Verdict::Won);
        let verdict = if self.is_mutant(Mutant::ArbiterSaysYesTwice) {
            Verdict::Won
        } else {
            truth
        };
        self.note(None, || {
            format!(
                "the arbiter decides on generation {generation} for {:?}: {verdict:?}",
                by.host
            )
        });
        if self.arbiter.loses_answers() {
            return;
        }
        let at = self.now_ns + self.arbiter_path_ns();
        let task = Task::Verdict {
            ask,
            generation,
            verdict,
        };
        self.queue.push(at, Happening::Host { of: by, task });
    }

    fn verdict(&mut self, id: HostId, generation: Generation, verdict: Verdict) {
        if verdict == Verdict::Unreachable && self.is_mutant(Mutant::NeverAskAgain) {
            return;
        }
        let mut generation = generation;
        if self.is_mutant(Mutant::IgnoreGeneration) {
            let host = self.host(id);
            generation = host.asked;
        }
        self.drive(id, Event::Arbiter { generation, verdict });
    }
}
