//! Exhaustive exploration of small configurations: every order of every event, over the real [`Replica`] on both hosts.
//!
//! ```text
//!   Append ─► primary ══ channel: FIFO, may break, one end may not know ══► backup ─► Consume
//!               │  Timeout, Crash, Restart                                    │
//!               └───────► arbiter: Decide, then Answer or lose it ◄───────────┘
//! ```
//! What the seeds sample this enumerates: acknowledgement, go-live, the test-and-set, second failures, pairing anew, resuming.
//! There is no clock in it: everything happens at time 0, and a timeout is a tick from far in the future. Budgets bound the runs.

use ft_protocol::{
    Action, Event, Generation, Lsn, Place, Replica, Role, Strength, Verdict,
    message::{Hello, Message},
    replica::Config,
    versions::Versions,
};
use stateright::{Model, Property};

/// A time that is late for every timer.
const LATE_NS: u64 = 1 << 50;

/// The name of the property that must hold always; the others must be seen somewhere.
pub const PROMISE: &str = "nothing is wrong";

/// A promise of the shell that is broken, to see that the exploration finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// The backup acknowledges entries that it did not store.
    AckUnstored,
    /// The backup says that entries are flushed which are only written.
    AckUnflushed,
    /// The arbiter says yes to everybody.
    YesTwice,
    /// After a break only new entries are sent, under the numbers of the lost ones.
    Renumber,
}

/// How much may happen.
#[derive(Clone, Copy, Debug)]
pub struct Small {
    /// Entries the first primary writes.
    pub entries: u64,
    /// Breaks of the channel.
    pub breaks: u8,
    /// Timeouts of each host.
    pub timeouts: u8,
    /// Crashes of both hosts together.
    pub crashes: u8,
    /// Crashed hosts that start anew.
    pub restarts: u8,
    /// What outputs wait for.
    pub ack: Strength,
    /// See [`Flaw`].
    pub flaw: Option<Flaw>,
}

/// Something on the channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Packet {
    Message(Generation, Message),
    Entry(Generation, Lsn, Entry),
}

/// What an entry is: who wrote it, and its number there.
type Entry = (u8, u8, u64);

/// One host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Side {
    replica: Replica,
    incarnation: u8,
    alive: bool,
    ready: bool,
    timeouts: u8,
    /// Its end of the channel, by the number of the connection; 0 is none.
    connection: u8,
    incoming: Vec<Packet>,
    /// What it wrote (primary) or stored (backup), by LSN.
    log: Vec<Entry>,
    /// Backup: entries that its disk would keep.
    flushed: u64,
    /// Last entry that was given to the channel.
    sent: u64,
    /// Entries that were lost and are not sent again ([`Flaw::Renumber`]).
    skew: u64,
    /// Entries that its guest has applied or written.
    applied: u64,
    /// Entries it wrote after it went live.
    own: u64,
    committed: Lsn,
    over: bool,
}

/// A claim that is under way, or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Claim {
    host: u8,
    incarnation: u8,
    generation: Generation,
    verdict: Option<Verdict>,
}

/// Everything there is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    sides: [Side; 2],
    /// The number of the connection that carries something.
    connection: u8,
    connections: u8,
    claims: Vec<Claim>,
    owners: Vec<(Generation, u8, u8)>,
    breaks: u8,
    crashes: u8,
    restarts: u8,
    /// The outputs that left, in order: every entry marks one.
    released: Vec<Entry>,
    wrong: Option<&'static str>,
    resumed: bool,
}

impl State {
    /// What is wrong, if something is.
    #[must_use]
    pub fn wrong(&self) -> Option<&'static str> {
        self.wrong
    }
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The daemons of a host have joined.
    Ready(u8),
    /// The primary connects.
    Connect,
    /// The first packet on its way to a host arrives.
    Deliver(u8),
    /// The channel breaks; what was under way is lost. The second flag: the backup does not know.
    Break(bool),
    /// A host learns that the other end of its channel is gone.
    Notice(u8),
    /// A guest writes an entry.
    Append(u8),
    /// The backup's guest applies an entry.
    Consume,
    /// The backup's disk has what is in its journal, where outputs wait for that.
    Flush,
    /// Nothing was heard for long.
    Timeout(u8),
    /// A claim reaches the arbiter.
    Decide(usize),
    /// The arbiter's answer arrives.
    Answer(usize),
    /// It does not.
    Lose(usize),
    /// A host is gone.
    Crash(u8),
    /// It starts anew.
    Restart(u8),
}

const A: u8 = 0;

impl Small {
    fn side(&self, host: u8, incarnation: u8) -> Side {
        let config = Config {
            vm: "small".into(),
            primary: host == A,
            alone: false,
            heartbeat_interval_ns: 1 << 20,
            heartbeat_misses: 2,
            channel_timeout_ns: 1 << 30,
            replay_timeout_ns: 1 << 40,
            ack: self.ack,
            versions: Versions::SPOKEN,
            keeps_journal: true,
            lag_target_ns: LATE_NS * 4,
            lag_limit_ns: LATE_NS * 8,
            instance: u64::from(host) << 8 | u64::from(incarnation),
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
            over: false,
        }
    }

    fn drive(&self, state: &mut State, host: u8, now_ns: u64, event: Event) {
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
            Action::SendHeartbeat(_) | Action::Forget { .. } | Action::Throttle { .. } | Action::Suspect { .. } => {}
        }
    }

    fn flushes(&self) -> bool {
        self.ack == Strength::Durable
    }

    /// Where outputs wait for the disk of the backup, none is ahead of it. A side that goes on alone waits for nobody.
    fn check_flushed(&self, state: &mut State, host: u8) {
        let side = &state.sides[usize::from(host)];
        let waits = host == A && matches!(side.replica.role(), Role::Recording | Role::Arbitrating);
        if self.flushes() && waits && side.committed.0.min(side.applied) > state.sides[1].flushed {
            state.wrong = Some("an output left that the backup's disk would not keep");
        }
    }

    fn published(&self, state: &mut State, host: u8, role: Role, generation: Generation) {
        match role {
            Role::Replaying => {
                let side = &mut state.sides[usize::from(host)];
                side.log.clear();
                (side.applied, side.flushed) = (0, 0);
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
    fn deliver(&self, state: &mut State, host: u8) {
        let packet = state.sides[usize::from(host)].incoming.remove(0);
        match packet {
            Packet::Message(generation, Message::Hello(hello)) => self.hello(state, host, generation, hello),
            Packet::Message(generation, message) => {
                self.drive(state, host, 0, Event::Message { generation, message });
            }
            Packet::Entry(generation, lsn, entry) => {
                let side = &mut state.sides[usize::from(host)];
                let last = side.replica.last();
                if side.replica.place(generation, lsn, last) == Place::Next {
                    if self.flaw != Some(Flaw::AckUnstored) {
                        side.log.push(entry);
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

    fn decide(&self, state: &mut State, at: usize) {
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

    fn answer(&self, state: &mut State, at: usize, lost: bool) {
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

    fn append(&self, state: &mut State, host: u8) {
        let side = &mut state.sides[usize::from(host)];
        let entry = (host, side.incarnation, side.log.len() as u64);
        side.log.push(entry);
        side.applied += 1;
        side.own += 1;
        let through = side.replica.last().next();
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
fn close(state: &mut State, host: u8) {
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
    state.released.extend_from_slice(&outputs[known..]);
}

impl Model for Small {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            sides: [self.side(0, 1), self.side(1, 1)],
            connection: 0,
            connections: 0,
            claims: Vec::new(),
            owners: Vec::new(),
            breaks: self.breaks,
            crashes: self.crashes,
            restarts: self.restarts,
            released: Vec::new(),
            wrong: None,
            resumed: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        if state.wrong.is_some() {
            return;
        }
        let [a, b] = &state.sides;
        let runs = |side: &Side| side.alive && !side.over;
        let wants = |side: &Side| {
            use Role::{Arbitrating, Pairing, Recording, Replaying};
            runs(side) && matches!(side.replica.role(), Pairing | Recording | Replaying | Arbitrating)
        };
        for (host, side) in [(0, a), (1, b)] {
            let role = side.replica.role();
            if side.alive && state.crashes > 0 {
                actions.push(Step::Crash(host));
            }
            if !side.alive && state.restarts > 0 {
                actions.push(Step::Restart(host));
            }
            if !runs(side) {
                continue;
            }
            if !side.ready {
                actions.push(Step::Ready(host));
                continue;
            }
            if !side.incoming.is_empty() {
                actions.push(Step::Deliver(host));
            }
            if side.connection != 0 && side.connection != state.connection && side.incoming.is_empty() {
                actions.push(Step::Notice(host));
            }
            if side.timeouts > 0 && side.replica.deadline_ns().is_some() {
                actions.push(Step::Timeout(host));
            }
            let writes = role == Role::Live || host == A && matches!(role, Role::Recording | Role::Arbitrating);
            let most = if host == A { self.entries } else { 1 };
            if writes && side.own < most {
                actions.push(Step::Append(host));
            }
        }
        let replays = matches!(b.replica.role(), Role::Replaying | Role::GoingLive | Role::Arbitrating);
        if runs(b) && replays && b.applied < b.log.len() as u64 {
            actions.push(Step::Consume);
        }
        if self.flushes() && runs(b) && replays && b.flushed < b.log.len() as u64 {
            actions.push(Step::Flush);
        }
        // A broken channel is connected again at once; how often is bounded by the breaks.
        if a.connection == 0 && a.ready && wants(a) && b.ready && wants(b) && state.connections <= self.breaks {
            actions.push(Step::Connect);
        }
        if state.connection != 0 && state.breaks > 0 {
            actions.extend([Step::Break(false), Step::Break(true)]);
        }
        for (at, claim) in state.claims.iter().enumerate() {
            match claim.verdict {
                None => actions.push(Step::Decide(at)),
                Some(_) => actions.extend([Step::Answer(at), Step::Lose(at)]),
            }
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        match step {
            Step::Ready(host) => {
                state.sides[usize::from(host)].ready = true;
                self.drive(&mut state, host, 0, Event::LocalReady { fingerprint: [7; 32] });
            }
            Step::Connect => {
                state.connections += 1;
                state.connection = state.connections;
                state.sides[0].connection = state.connection;
                state.sides.iter_mut().for_each(|side| side.incoming.clear());
                self.drive(&mut state, A, 0, Event::ChannelUp);
            }
            Step::Deliver(host) => self.deliver(&mut state, host),
            Step::Break(half) => {
                state.breaks -= 1;
                state.connection = 0;
                state.sides.iter_mut().for_each(|side| side.incoming.clear());
                for host in if half { vec![0] } else { vec![0, 1] } {
                    state.sides[usize::from(host)].connection = 0;
                    self.drive(&mut state, host, 0, Event::ChannelDown);
                }
            }
            Step::Notice(host) => close(&mut state, host),
            Step::Append(host) => self.append(&mut state, host),
            Step::Consume => {
                state.sides[1].applied += 1;
                let through = Lsn(state.sides[1].applied);
                self.drive(&mut state, 1, 0, Event::Consumed { through });
            }
            Step::Flush => {
                state.sides[1].flushed = state.sides[1].log.len() as u64;
                let through = Lsn(state.sides[1].flushed);
                self.drive(&mut state, 1, 0, Event::Durable { through });
            }
            Step::Timeout(host) => {
                state.sides[usize::from(host)].timeouts -= 1;
                self.drive(&mut state, host, LATE_NS, Event::Tick);
            }
            Step::Decide(at) => self.decide(&mut state, at),
            Step::Answer(at) => self.answer(&mut state, at, false),
            Step::Lose(at) => self.answer(&mut state, at, true),
            Step::Crash(host) => {
                state.crashes -= 1;
                let side = &mut state.sides[usize::from(host)];
                (side.alive, side.connection) = (false, 0);
                side.incoming.clear();
            }
            Step::Restart(host) => {
                state.restarts -= 1;
                let incarnation = state.sides[usize::from(host)].incarnation + 1;
                state.sides[usize::from(host)] = self.side(host, incarnation);
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn is_live(state: &State, host: usize) -> bool {
            state.sides[host].alive && state.sides[host].replica.role() == Role::Live
        }
        vec![
            Property::always(PROMISE, |_, state: &State| state.wrong.is_none()),
            Property::sometimes("the backup goes live", |_, state: &State| is_live(state, 1)),
            Property::sometimes("the primary goes on alone", |_, state: &State| is_live(state, 0)),
            Property::sometimes("everything is committed", |model: &Self, state: &State| {
                state.released.len() as u64 == model.entries && state.sides[0].replica.role() == Role::Recording
            }),
            Property::sometimes("a channel is resumed", |_, state: &State| state.resumed),
            Property::sometimes("a side loses the arbitration", |_, state: &State| {
                state.sides.iter().any(|side| side.replica.role() == Role::Halted)
            }),
            Property::sometimes("the winner is lost too", |_, state: &State| {
                state.owners.len() > 1 && state.sides.iter().all(|side| !side.alive || side.over)
            }),
        ]
    }
}
