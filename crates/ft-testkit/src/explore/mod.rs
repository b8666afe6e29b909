//! Exhaustive exploration of small configurations: every order of every event, over the real [`Replica`] on both hosts.
//!
//! ```text
//!   Append ─► primary ══ channel: FIFO, may break, one end may not know ══► backup ─► Consume
//!               │  Timeout, Crash, Restart                                    │
//!               └───────► arbiter: Decide, then Answer or lose it ◄───────────┘
//! ```
//! What the seeds sample this enumerates: acknowledgement, go-live, the test-and-set, second failures, pairing anew, resuming, and a new
//! backup for a side that went live, whose state is copied beside the channel. How a pair came to its first failure is told once, in
//! [`prelude`]: what is explored for a new backup begins there.
//! There is no clock in it: everything happens at time 0, and a timeout is a tick from far in the future. Budgets bound the runs.

mod prelude;
mod shell;

use ft_protocol::{Event, Generation, Lsn, Replica, Role, Strength, Verdict, message::Message};
use shell::close;
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
    /// A new backup that has the state takes itself for synchronised.
    WinUnsynced,
    /// The survivor lets outputs go that a new backup acknowledged before it may take over.
    CountUnsynced,
    /// The survivor begins to hold outputs when `Synced` is acknowledged.
    HoldLate,
}

/// Who is lost before the exploration begins; it has started anew since, as a new backup of the other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The side that was started as primary.
    Primary,
    /// The side that was started as backup.
    Backup,
}

/// How much may happen.
#[derive(Clone, Copy, Debug)]
pub struct Small {
    /// Entries the first primary writes, or the survivor where a new backup is taken.
    pub entries: u64,
    /// Breaks of the channel.
    pub breaks: u8,
    /// Timeouts of each host.
    pub timeouts: u8,
    /// Crashes of both hosts together.
    pub crashes: u8,
    /// Crashed hosts that start anew.
    pub restarts: u8,
    /// The failure before the beginning, where a new backup is what is explored.
    pub lost: Option<Lost>,
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

/// What an entry is: who wrote it (host and start), and its number there; and the backup it is about, if it is `Synced`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Entry {
    by: (u8, u8),
    number: u64,
    synced: Option<u64>,
}

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
    /// Survivor: the entry as of which its state was copied for a new backup.
    copied: Option<Lsn>,
    /// Survivor: the devices were told to hold, and have not said that they do.
    holding: Option<Generation>,
    /// Survivor: outputs up to here left, or might, before it held.
    free: u64,
    /// Backup: from the first entry on, or has stored `Synced`.
    eligible: bool,
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
    gave_up: bool,
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
    /// The primary, or a new backup, connects.
    Connect,
    /// The first packet on its way to a host arrives.
    Deliver(u8),
    /// The channel breaks; what was under way is lost. With the flag, only the side that connected knows.
    Break(bool),
    /// A host learns that the other end of its channel is gone.
    Notice(u8),
    /// A guest writes an entry.
    Append(u8),
    /// A backup's guest applies an entry.
    Consume(u8),
    /// A backup's disk has what is in its journal, where outputs wait for that.
    Flush(u8),
    /// The state of the VM is with a new backup.
    Adopt(u8),
    /// Every device of a survivor holds.
    Hold(u8),
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

impl State {
    /// The side that connects and speaks first.
    fn connector(&self) -> u8 {
        u8::from(self.sides[1].replica.connects())
    }
}

impl Small {
    /// How many entries a side writes while it leads.
    fn writes(&self, host: u8) -> u64 {
        let first = match self.lost {
            Some(Lost::Primary) => 1,
            Some(Lost::Backup) | None => 0,
        };
        if host == first { self.entries } else { 1 }
    }

    /// How often the channel is connected, the prelude's time included. A new backup that was given up asks again.
    fn connections(&self) -> u8 {
        1 + self.breaks + if self.lost.is_some() { 2 + self.restarts } else { 0 }
    }
}

impl Model for Small {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let state = State {
            sides: [self.side(0, 1, false), self.side(1, 1, false)],
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
            gave_up: false,
        };
        vec![match self.lost {
            Some(lost) => self.prelude(state, lost),
            None => state,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        if state.wrong.is_some() {
            return;
        }
        let runs = |side: &Side| side.alive && !side.over;
        let wants = |side: &Side| {
            use Role::{Arbitrating, Pairing, Recording, Replaying};
            runs(side) && matches!(side.replica.role(), Pairing | Recording | Replaying | Arbitrating)
        };
        let takes = |side: &Side| runs(side) && self.lost.is_some() && side.replica.role() == Role::Live;
        for (host, side) in (0..).zip(&state.sides) {
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
            let leads = side.replica.leads();
            let writes = role == Role::Live || leads && matches!(role, Role::Recording | Role::Arbitrating);
            if writes && side.own < self.writes(host) {
                actions.push(Step::Append(host));
            }
            let replays = !leads && matches!(role, Role::Replaying | Role::GoingLive | Role::Arbitrating);
            let awaits_state = side.replica.awaits_state();
            if replays && !awaits_state && side.applied < side.log.len() as u64 {
                actions.push(Step::Consume(host));
            }
            if self.flushes() && replays && side.flushed < side.log.len() as u64 {
                actions.push(Step::Flush(host));
            }
            let other = &state.sides[usize::from(1 - host)];
            if awaits_state && runs(other) && other.copied == Some(side.start()) {
                actions.push(Step::Adopt(host));
            }
            if side.holding.is_some() {
                actions.push(Step::Hold(host));
            }
            // A broken channel is connected again at once; how often is bounded.
            let is_free = side.connection == 0 && side.replica.connects() && wants(side);
            if is_free && other.ready && (wants(other) || takes(other)) && state.connections < self.connections() {
                actions.push(Step::Connect);
            }
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
                self.drive(
                    &mut state,
                    host,
                    0,
                    Event::LocalReady {
                        fingerprint: [7; 32],
                        shape: Some([7; 32]),
                    },
                );
            }
            Step::Connect => {
                state.connections += 1;
                state.connection = state.connections;
                let host = state.connector();
                state.sides[usize::from(host)].connection = state.connection;
                state.sides.iter_mut().for_each(|side| side.incoming.clear());
                self.drive(&mut state, host, 0, Event::ChannelUp);
            }
            Step::Deliver(host) => self.deliver(&mut state, host),
            Step::Break(half) => {
                state.breaks -= 1;
                state.connection = 0;
                state.sides.iter_mut().for_each(|side| side.incoming.clear());
                let connector = state.connector();
                for host in [0, 1].into_iter().filter(|host| !half || *host == connector) {
                    state.sides[usize::from(host)].connection = 0;
                    self.drive(&mut state, host, 0, Event::ChannelDown);
                }
            }
            Step::Notice(host) => close(&mut state, host),
            Step::Append(host) => self.append(&mut state, host, None),
            Step::Consume(host) => {
                let side = &mut state.sides[usize::from(host)];
                side.applied += 1;
                let through = Lsn(side.applied);
                self.drive(&mut state, host, 0, Event::Consumed { through });
            }
            Step::Flush(host) => {
                let side = &mut state.sides[usize::from(host)];
                side.flushed = side.log.len() as u64;
                let through = Lsn(side.flushed);
                self.drive(&mut state, host, 0, Event::Durable { through });
            }
            Step::Adopt(host) => self.adopt(&mut state, host),
            Step::Hold(host) => {
                if let Some(generation) = state.sides[usize::from(host)].holding.take() {
                    self.drive(&mut state, host, 0, Event::Holding { generation });
                }
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
                let former = &state.sides[usize::from(host)];
                // What its former self said it has, it had: that counts for outputs that left by its word, and for nothing else.
                state.sides[usize::from(host)] = Side {
                    log: former.log.clone(),
                    flushed: former.flushed,
                    eligible: former.eligible,
                    ..self.side(host, former.incarnation + 1, self.lost.is_some())
                };
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
            Property::sometimes("a new backup is given up", |_, state: &State| state.gave_up),
            Property::sometimes("a new backup may take over", |_, state: &State| {
                let lasts = |side: &Side| side.alive && side.replica.is_protected();
                state.owners.len() > 1 && state.sides.iter().all(lasts)
            }),
            Property::sometimes("a new backup goes live", |_, state: &State| {
                state.owners.len() > 2 && state.sides.iter().any(|side| side.alive && side.is_live_joiner())
            }),
            Property::sometimes("there is a third pair", |_, state: &State| {
                let lasts = |side: &Side| side.alive && side.replica.is_protected();
                state.owners.len() > 2 && state.sides.iter().all(lasts)
            }),
            Property::sometimes("the winner is lost too", |_, state: &State| {
                state.owners.len() > 1 && state.sides.iter().all(|side| !side.alive || side.over)
            }),
        ]
    }
}
