//! What the daemons do in the exploration: the core's actions, deliveries, the arbiter, the state of a new backup.

use ft_protocol::{
    Action, Event, Generation, Lsn, Place, Replica, Role, Strength, Timing, Verdict,
    message::{Hello, Message},
    replica::Config,
    versions::Versions,
};

use super::{Claim, Entry, Flaw, LATE_NS, Packet, Side, Small, State};

impl Entry {
    /// Stands for what a new backup does not get as an entry.
    const IN_THE_STATE: Self = Self {
        by: (u8::MAX, u8::MAX),
        number: u64::MAX,
        synced: None,
    };
}

impl Side {
    /// New backup: the last entry whose effect is in the state that it is to adopt.
    pub(super) fn start(&self) -> Lsn {
        let is_state = |entry: &&Entry| **entry == Entry::IN_THE_STATE;
        Lsn(self.log.iter().take_while(is_state).count() as u64)
    }

    /// It joined a survivor, and is live itself.
    pub(super) fn is_live_joiner(&self) -> bool {
        self.incarnation > 1 && self.replica.role() == Role::Live
    }
}

impl Small {
    pub(super) fn side(&self, host: u8, incarnation: u8, joins: bool) -> Side {
        let config = Config {
            vm: "small".into(),
            primary: host == 0 && !joins,
            alone: false,
            joins,
            takes_joiners: true,
            timing: Timing {
                heartbeat_interval_ns: 1 << 20,
                heartbeat_misses: 2,
                channel_timeout_ns: 1 << 30,
                replay_timeout_ns: 1 << 40,
                lag_target_ns: LATE_NS * 4,
                lag_limit_ns: LATE_NS * 8,
            },
            ack: self.ack,
            versions: Versions::SPOKEN,
            keeps_journal: true,
            // Each attempt to be synchronised counts one up.
            instance: u64::from(host) << 16 | u64::from(incarnation) << 8,
        };
        Side {
            replica: Replica::new(config, 0),
            incarnation,
            alive: true,
            ready: false,
            timeouts: self.timeouts,
            connection: 0,
            incoming: Vec::new(),
            log: Vec::new(),
            flushed: 0,
            sent: 0,
            skew: 0,
            applied: 0,
            own: 0,
            committed: Lsn::ZERO,
            copied: None,
            holding: None,
            free: 0,
            eligible: false,
            over: false,
        }
    }

    pub(super) fn drive(&self, state: &mut State, host: u8, now_ns: u64, event: Event) {
        let mut actions = Vec::new();
        let was_over = state.sides[usize::from(host)].over;
        state.sides[usize::from(host)].replica.step(now_ns, event, &mut actions);
        for action in actions {
            let speaks = matches!(
                action,
                Action::Send(_) | Action::SendEntries { .. } | Action::Commit(_) | Action::AskArbiter { .. }
            );
            if was_over && speaks {
                state.wrong = Some("a side that was over spoke");
            }
            self.perform(state, host, action);
        }
    }

    fn perform(&self, state: &mut State, host: u8, action: Action) {
        let generation = state.sides[usize::from(host)].replica.generation();
        match action {
            Action::Send(Message::Adopted) if self.flaw == Some(Flaw::WinUnsynced) => {}
            Action::Send(message) => send(state, host, Packet::Message(generation, message)),
            Action::SendEntries { through } => {
                while state.sides[usize::from(host)].sent < through.0 {
                    let side = &mut state.sides[usize::from(host)];
                    side.sent += 1;
                    let entry = side.log[side.sent as usize - 1];
                    let lsn = Lsn(side.sent - side.skew);
                    send(state, host, Packet::Entry(generation, lsn, entry));
                }
            }
            Action::Rewind { after } => {
                state.resumed = true;
                let side = &mut state.sides[usize::from(host)];
                if self.flaw == Some(Flaw::Renumber) {
                    // What was lost on the way stays lost, and nobody can tell by the numbers.
                    side.skew = side.sent.saturating_sub(after.0);
                } else {
                    side.sent = after.0;
                }
            }
            Action::Commit(committed) => {
                let side = &mut state.sides[usize::from(host)];
                let is_late = self.flaw == Some(Flaw::HoldLate) && side.replica.role() == Role::Recording;
                if is_late && side.committed == Lsn::MAX {
                    side.committed = committed.lsn();
                }
                side.committed = side.committed.max(committed.lsn());
                release(state, host);
                self.check_flushed(state, host);
            }
            Action::AskArbiter { generation } => {
                let incarnation = state.sides[usize::from(host)].incarnation;
                let claim = Claim {
                    host,
                    incarnation,
                    generation,
                    verdict: None,
                };
                if !state.claims.contains(&claim) {
                    state.claims.push(claim);
                }
            }
            Action::Publish { role, generation, .. } => self.published(state, host, role, generation),
            Action::CloseChannel | Action::BreakChannel => close(state, host),
            Action::Halt { .. } | Action::Finish => state.sides[usize::from(host)].over = true,
            Action::Synchronise { start } => synchronise(state, host, start),
            Action::GiveUp { .. } => {
                state.sides[usize::from(host)].copied = None;
                state.gave_up = true;
            }
            Action::Hold { after } => {
                let side = &mut state.sides[usize::from(host)];
                side.holding = Some(generation);
                side.free = after.0;
                if self.flaw != Some(Flaw::HoldLate) {
                    side.committed = after;
                }
            }
            Action::AppendSynced { instance } => self.append(state, host, Some(instance)),
            Action::NotTaken { .. }
            | Action::SendHeartbeat(_)
            | Action::Forget { .. }
            | Action::Throttle { .. }
            | Action::Suspect { .. } => {}
        }
    }

    pub(super) fn flushes(&self) -> bool {
        self.ack == Strength::Durable
    }

    /// Where outputs wait for the disk of the backup, none is ahead of it. A side that goes on alone waits for nobody.
    fn check_flushed(&self, state: &mut State, host: u8) {
        let side = &state.sides[usize::from(host)];
        let waits = matches!(side.replica.role(), Role::Recording | Role::Arbitrating);
        let backup = &state.sides[usize::from(1 - host)];
        let is_ahead = side.committed.0.min(side.applied) > backup.flushed.max(side.free);
        if self.flushes() && waits && side.replica.leads() && is_ahead {
            state.wrong = Some("an output left that the backup's disk would not keep");
        }
    }

    fn published(&self, state: &mut State, host: u8, role: Role, generation: Generation) {
        match role {
            Role::Replaying => {
                let side = &mut state.sides[usize::from(host)];
                side.log.clear();
                (side.applied, side.flushed) = (0, 0);
                side.eligible = true;
            }
            Role::Pairing => {
                let side = &mut state.sides[usize::from(host)];
                side.log.clear();
                (side.applied, side.flushed, side.eligible) = (0, 0, false);
            }
            Role::Live | Role::GoingLive => {
                let side = &state.sides[usize::from(host)];
                let owner = (generation, host, side.incarnation);
                if !state.owners.contains(&owner) {
                    state.wrong = Some("a side goes live in a generation that is not its own");
                }
                let other = &state.sides[usize::from(1 - host)];
                if other.alive && !other.over && matches!(other.replica.role(), Role::Live | Role::GoingLive) {
                    state.wrong = Some("both sides are live");
                }
                if role == Role::Live {
                    let history = &side.log[..side.applied as usize];
                    if !history.starts_with(&state.released) {
                        state.wrong = Some("an output that left is not in the history of the live side");
                    }
                }
            }
            _ => {}
        }
    }

    /// Entries and messages, as ft-log takes them.
    pub(super) fn deliver(&self, state: &mut State, host: u8) {
        let packet = state.sides[usize::from(host)].incoming.remove(0);
        match packet {
            Packet::Message(generation, Message::Hello(hello)) => self.hello(state, host, generation, hello),
            Packet::Message(generation, message) => {
                let acknowledged = match &message {
                    Message::Ack(said) if self.flaw == Some(Flaw::CountUnsynced) => Some(said.received),
                    _ => None,
                };
                self.drive(state, host, 0, Event::Message { generation, message });
                let side = &mut state.sides[usize::from(host)];
                let is_early = side.replica.role() == Role::Recording && !side.replica.is_protected();
                if let Some(received) = acknowledged.filter(|_| is_early) {
                    side.committed = side.committed.max(received);
                    release(state, host);
                }
            }
            Packet::Entry(generation, lsn, entry) => {
                let side = &mut state.sides[usize::from(host)];
                let last = side.replica.last();
                if side.replica.place(generation, lsn, last) == Place::Next {
                    if self.flaw != Some(Flaw::AckUnstored) {
                        side.log.push(entry);
                        side.eligible |= entry.synced.is_some();
                    }
                    if let Some(instance) = entry.synced {
                        self.drive(state, host, 0, Event::SyncedEntry { lsn, instance });
                    }
                    let (from, through) = (lsn, lsn);
                    self.drive(
                        state,
                        host,
                        0,
                        Event::Received {
                            generation,
                            from,
                            through,
                        },
                    );
                    // A flush takes its time where it matters.
                    if !self.flushes() || self.flaw == Some(Flaw::AckUnflushed) {
                        self.drive(state, host, 0, Event::Durable { through });
                    }
                    if self.flaw == Some(Flaw::AckUnstored) {
                        // What is not there is not waited for either.
                        self.drive(state, host, 0, Event::Consumed { through });
                    }
                }
            }
        }
    }

    /// A backup's channel is replaced by a connection that begins with a hello it takes.
    fn hello(&self, state: &mut State, host: u8, generation: Generation, hello: Hello) {
        let current = state.connection;
        let side = &mut state.sides[usize::from(host)];
        if side.connection != current {
            if let Some(reason) = side.replica.refusal(generation, &hello) {
                side.connection = current;
                let generation = side.replica.generation();
                send(state, host, Packet::Message(generation, Message::Refuse { reason }));
                state.sides[usize::from(host)].connection = 0;
                return;
            }
            side.connection = current;
            self.drive(state, host, 0, Event::ChannelUp);
        }
        let message = Message::Hello(hello);
        self.drive(state, host, 0, Event::Message { generation, message });
    }

    pub(super) fn decide(&self, state: &mut State, at: usize) {
        let claim = state.claims[at];
        let found = state.owners.iter().find(|(of, ..)| *of == claim.generation);
        let own = (claim.generation, claim.host, claim.incarnation);
        let wins = found.is_none_or(|owner| *owner == own);
        if found.is_none() {
            state.owners.push(own);
        }
        let yes = wins || self.flaw == Some(Flaw::YesTwice);
        state.claims[at].verdict = Some(if yes { Verdict::Won } else { Verdict::Lost });
    }

    pub(super) fn answer(&self, state: &mut State, at: usize, lost: bool) {
        let claim = state.claims.remove(at);
        let side = &state.sides[usize::from(claim.host)];
        if !side.alive || side.over || side.incarnation != claim.incarnation {
            return;
        }
        let verdict = if lost {
            Verdict::Unreachable
        } else {
            claim.verdict.unwrap_or(Verdict::Unreachable)
        };
        let generation = claim.generation;
        self.drive(state, claim.host, 0, Event::Arbiter { generation, verdict });
    }

    /// The copy of the survivor's state is with the new backup.
    pub(super) fn adopt(&self, state: &mut State, host: u8) {
        let start = state.sides[usize::from(host)].start();
        let copy: Vec<Entry> = state.sides[usize::from(1 - host)].log[..start.0 as usize].to_vec();
        let side = &mut state.sides[usize::from(host)];
        side.log[..start.0 as usize].copy_from_slice(&copy);
        side.applied = start.0;
        self.drive(state, host, 0, Event::Adopted);
        if self.flaw == Some(Flaw::WinUnsynced) {
            let side = &state.sides[usize::from(host)];
            let (lsn, instance) = (side.replica.last(), side.replica.instance());
            self.drive(state, host, 0, Event::SyncedEntry { lsn, instance });
        }
    }

    pub(super) fn append(&self, state: &mut State, host: u8, synced: Option<u64>) {
        let side = &mut state.sides[usize::from(host)];
        let by = (host, side.incarnation);
        let number = side.log.len() as u64;
        side.log.push(Entry { by, number, synced });
        side.applied += 1;
        side.own += u64::from(synced.is_none());
        let through = side.replica.last().next();
        if let Some(instance) = synced {
            self.drive(state, host, 0, Event::SyncedEntry { lsn: through, instance });
        }
        self.drive(state, host, 0, Event::Appended { through });
        release(state, host);
    }
}

/// Puts a packet on its way, if its sender's connection still carries something.
fn send(state: &mut State, from: u8, packet: Packet) {
    let own = state.sides[usize::from(from)].connection;
    if own != 0 && own == state.connection {
        state.sides[usize::from(1 - from)].incoming.push(packet);
    }
}

/// A side closes its end: what it sent arrives, and then the other end knows, or not.
pub(super) fn close(state: &mut State, host: u8) {
    let side = &mut state.sides[usize::from(host)];
    let own = std::mem::take(&mut side.connection);
    side.incoming.clear();
    let mut actions = Vec::new();
    side.replica.step(0, Event::ChannelDown, &mut actions);
    assert!(
        actions.is_empty(),
        "a channel that is down is no reason to act: {actions:?}"
    );
    if own == state.connection {
        state.connection = 0;
    }
}

/// Both sides of a new pair begin: the survivor's state is copied, and what the new backup lacks of the log comes with it.
fn synchronise(state: &mut State, host: u8, start: Lsn) {
    let side = &mut state.sides[usize::from(host)];
    if side.replica.leads() {
        side.copied = Some(start);
        side.sent = start.0;
        return;
    }
    side.log = vec![Entry::IN_THE_STATE; start.0 as usize];
    (side.applied, side.flushed, side.eligible) = (0, start.0, false);
}

/// What leaves while the survivor shares the VM is with the backup that shares it, and this one may take over.
fn check_shared(state: &mut State, host: u8, outputs: &[Entry]) {
    let [side, other] = [host, 1 - host].map(|host| &state.sides[usize::from(host)]);
    let shares = matches!(side.replica.role(), Role::Recording | Role::Arbitrating);
    let is_shared = other.eligible && other.log.starts_with(outputs);
    if shares && outputs.len() as u64 > side.free && !is_shared {
        state.wrong = Some("an output left that no backup which may take over has");
    }
}

/// Every output that may leave does.
fn release(state: &mut State, host: u8) {
    let side = &state.sides[usize::from(host)];
    let through = side.committed.0.min(side.applied) as usize;
    let outputs: Vec<Entry> = side.log[..through].to_vec();
    let known = state.released.len().min(outputs.len());
    if outputs[..known] != state.released[..known] {
        state.wrong = Some("two histories were released");
    }
    if side.over {
        return;
    }
    if known < outputs.len() {
        check_shared(state, host, &outputs);
    }
    state.released.extend_from_slice(&outputs[known..]);
}
