//! Table-like tests of single steps. Schedules with faults are the simulator's (crates/ft-testkit).

use super::*;
use crate::{
    message::{Hello, Standing},
    timing::Timing,
    versions::Versions,
};

mod acknowledgement;
mod channel;
mod configuration;
mod hanging_replay;
mod heartbeat;
mod hostile;
mod repair;
mod roles;

const INTERVAL: u64 = 20_000_000;

/// Longer than the silence until suspicion, as it is by default.
const CHANNEL: u64 = 50 * INTERVAL;
/// So long may a replay stand still.
const REPLAY: u64 = 500 * INTERVAL;

const TIMING: Timing = Timing {
    heartbeat_interval_ns: INTERVAL,
    heartbeat_misses: 10,
    channel_timeout_ns: CHANNEL,
    replay_timeout_ns: REPLAY,
    lag_target_ns: 5 * INTERVAL,
    lag_limit_ns: 50 * INTERVAL,
};

fn config(primary: bool) -> Config {
    Config {
        vm: "ledger".into(),
        primary,
        alone: false,
        joins: false,
        takes_joiners: true,
        timing: TIMING,
        ack: Strength::Received,
        versions: Versions::SPOKEN,
        keeps_journal: true,
        instance: if primary { 1 } else { 2 },
    }
}

fn replica(primary: bool) -> Replica {
    Replica::new(config(primary), 0)
}

fn step(replica: &mut Replica, now_ns: u64, event: Event) -> Vec<Action> {
    let mut actions = Vec::new();
    replica.step(now_ns, event, &mut actions);
    actions
}

/// Shim and devices have joined.
fn ready(replica: &mut Replica) -> Vec<Action> {
    let event = Event::LocalReady {
        fingerprint: [1; 32],
        shape: Some([1; 32]),
    };
    step(replica, 0, event)
}

fn from_peer(replica: &mut Replica, message: Message) -> Vec<Action> {
    let generation = replica.generation().max(Generation::FIRST);
    step(replica, 1, Event::Message { generation, message })
}

fn hello(primary: bool, last: u64) -> Hello {
    Hello {
        versions: Versions::SPOKEN,
        vm: "ledger".into(),
        primary,
        fingerprint: [1; 32],
        instance: if primary { 1 } else { 2 },
        ack: Strength::Received,
        last: Lsn(last),
        standing: Standing::Whole,
        timing: Some(TIMING),
    }
}

fn peer_hello(primary: bool) -> Message {
    Message::Hello(hello(primary, 0))
}

fn through(received: u64) -> Watermarks {
    Watermarks {
        received: Lsn(received),
        ..Watermarks::default()
    }
}

fn ack(received: u64) -> Message {
    Message::Ack(through(received))
}

/// Silence until the peer is suspected.
fn silence(replica: &mut Replica) -> Vec<Action> {
    step(replica, INTERVAL * 20, Event::Tick)
}

fn won(replica: &mut Replica, generation: u32) -> Vec<Action> {
    step(
        replica,
        1,
        Event::Arbiter {
            generation: Generation(generation),
            verdict: Verdict::Won,
        },
    )
}

fn recording() -> Replica {
    let mut primary = replica(true);
    ready(&mut primary);
    won(&mut primary, 1);
    let greeting = step(&mut primary, 0, Event::ChannelUp);
    assert!(matches!(greeting[..], [Action::Send(Message::Hello(_))]));
    from_peer(&mut primary, peer_hello(false));
    assert_eq!(primary.role(), Role::Recording);
    primary
}

fn replaying() -> Replica {
    let mut backup = replica(false);
    ready(&mut backup);
    step(&mut backup, 0, Event::ChannelUp);
    from_peer(&mut backup, peer_hello(true));
    assert_eq!((backup.role(), backup.generation()), (Role::Replaying, Generation(1)));
    backup
}

fn received(backup: &mut Replica, from: u64, through: u64) -> Vec<Action> {
    let event = Event::Received {
        generation: backup.generation(),
        from: Lsn(from),
        through: Lsn(through),
    };
    step(backup, 1, event)
}

/// Lets time pass in heartbeats, up to `until_ns`; what was done meanwhile.
fn with_heartbeats(replica: &mut Replica, from_ns: u64, until_ns: u64, full: bool) -> Vec<(u64, Action)> {
    let mut done = Vec::new();
    let mut now_ns = from_ns;
    while now_ns <= until_ns {
        let message = Message::Heartbeat {
            vm: 0,
            lsn: Lsn(0),
            sequence: 0,
            replayed: Lsn(0),
            full,
            asks: false,
        };
        let generation = Generation(1);
        let mut actions = step(replica, now_ns, Event::Message { generation, message });
        actions.extend(step(replica, now_ns, Event::Tick));
        done.extend(actions.into_iter().map(|action| (now_ns, action)));
        now_ns += INTERVAL;
    }
    done
}
