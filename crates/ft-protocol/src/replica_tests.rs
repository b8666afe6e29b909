//! Table-like tests of single steps. Schedules with faults are the simulator's (crates/ft-testkit).

use super::*;

const INTERVAL: u64 = 20_000_000;

fn replica(primary: bool) -> Replica {
    Replica::new(
        Config {
            vm: "ledger".into(),
            primary,
            alone: false,
            heartbeat_interval_ns: INTERVAL,
            heartbeat_misses: 10,
        },
        0,
    )
}

fn step(replica: &mut Replica, now_ns: u64, event: Event) -> Vec<Action> {
    let mut actions = Vec::new();
    replica.step(now_ns, event, &mut actions);
    actions
}

fn from_peer(replica: &mut Replica, message: Message) -> Vec<Action> {
    let generation = replica.generation().max(Generation::FIRST);
    step(replica, 1, Event::Message { generation, message })
}

fn peer_hello(primary: bool) -> Message {
    Message::Hello(Hello {
        version: crate::frame::VERSION,
        vm: "ledger".into(),
        primary,
        fingerprint: [1; 32],
    })
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
    step(&mut primary, 0, Event::LocalReady { fingerprint: [1; 32] });
    won(&mut primary, 1);
    let greeting = step(&mut primary, 0, Event::ChannelUp);
    assert!(matches!(greeting[..], [Action::Send(Message::Hello(_))]));
    from_peer(&mut primary, peer_hello(false));
    assert_eq!(primary.role(), Role::Recording);
    primary
}

fn replaying() -> Replica {
    let mut backup = replica(false);
    step(&mut backup, 0, Event::LocalReady { fingerprint: [1; 32] });
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

#[test]
fn the_primary_commits_what_was_acknowledged_and_not_more() {
    let mut primary = recording();
    assert_eq!(
        step(&mut primary, 1, Event::Appended { through: Lsn(3) }),
        [Action::SendEntries { through: Lsn(3) }]
    );
    assert_eq!(
        from_peer(&mut primary, Message::Ack(Lsn(2))),
        [Action::Commit(Committed::through(Lsn(2)))]
    );
    assert_eq!(from_peer(&mut primary, Message::Ack(Lsn(1))), []);
    from_peer(&mut primary, Message::Ack(Lsn(9)));
    assert_eq!(primary.role(), Role::Halted);
}

#[test]
fn an_older_generation_is_not_heard() {
    let mut primary = recording();
    step(&mut primary, 1, Event::Appended { through: Lsn(3) });
    let stale = Event::Message {
        generation: Generation(0),
        message: Message::Ack(Lsn(3)),
    };
    assert_eq!(step(&mut primary, 1, stale), []);
}

#[test]
fn silence_is_suspected_exactly_after_the_configured_misses() {
    let mut primary = recording();
    let quiet = step(&mut primary, INTERVAL * 10, Event::Tick);
    assert!(matches!(quiet[..], [Action::SendHeartbeat(_)]));
    let suspected = step(&mut primary, INTERVAL * 10 + 1, Event::Tick);
    assert!(suspected.contains(&Action::AskArbiter {
        generation: Generation(2)
    }));
    assert_eq!(primary.role(), Role::Arbitrating);
}

#[test]
fn a_winner_goes_live_and_a_loser_halts_for_good() {
    let mut primary = recording();
    step(&mut primary, 1, Event::ChannelDown);
    let live = won(&mut primary, 2);
    assert!(live.contains(&Action::Commit(Committed::through(Lsn::MAX))));
    assert_eq!((primary.role(), primary.generation()), (Role::Live, Generation(2)));

    let mut primary = recording();
    step(&mut primary, 1, Event::Appended { through: Lsn(3) });
    step(&mut primary, 1, Event::ChannelDown);
    step(
        &mut primary,
        1,
        Event::Arbiter {
            generation: Generation(2),
            verdict: Verdict::Lost,
        },
    );
    assert_eq!(primary.role(), Role::Halted);
    assert_eq!(from_peer(&mut primary, Message::Ack(Lsn(3))), []);
    assert_eq!(won(&mut primary, 2), []);
}

#[test]
fn an_unreachable_arbiter_is_asked_again_and_nothing_is_released() {
    let mut backup = replaying();
    received(&mut backup, 1, 1);
    step(&mut backup, 1, Event::ChannelDown);
    step(
        &mut backup,
        5,
        Event::Arbiter {
            generation: Generation(2),
            verdict: Verdict::Unreachable,
        },
    );
    assert_eq!(backup.role(), Role::Arbitrating);
    let again = step(&mut backup, 5 + INTERVAL, Event::Tick);
    assert!(again.contains(&Action::AskArbiter {
        generation: Generation(2)
    }));
    assert!(!again.iter().any(|action| matches!(action, Action::Commit(_))));
}

#[test]
fn a_backup_that_received_nothing_pairs_again_and_does_not_go_live() {
    let mut backup = replaying();
    let down = step(&mut backup, 1, Event::ChannelDown);
    assert!(!down.iter().any(|action| matches!(action, Action::AskArbiter { .. })));
    assert_eq!((backup.role(), backup.generation()), (Role::Pairing, Generation(0)));
    // Its hello may have been lost: the primary, still pairing, offers the same generation again.
    step(&mut backup, 2, Event::ChannelUp);
    from_peer(&mut backup, peer_hello(true));
    assert_eq!((backup.role(), backup.generation()), (Role::Replaying, Generation(1)));
    received(&mut backup, 1, 1);
    assert!(step(&mut backup, 3, Event::ChannelDown).contains(&Action::AskArbiter {
        generation: Generation(2)
    }));
}

#[test]
fn a_late_verdict_ends_the_asking() {
    let verdict = |verdict| Event::Arbiter {
        generation: Generation(1),
        verdict,
    };
    let mut primary = replica(true);
    step(&mut primary, 0, Event::LocalReady { fingerprint: [1; 32] });
    step(&mut primary, 0, verdict(Verdict::Unreachable));
    assert_eq!(primary.deadline_ns(), Some(INTERVAL));
    // The first request was slow, not lost: its answer comes after it was given up.
    step(&mut primary, 1, verdict(Verdict::Won));
    assert_eq!(primary.deadline_ns(), None);
    assert_eq!(step(&mut primary, INTERVAL, Event::Tick), []);
}

#[test]
fn a_backup_consumes_everything_it_acknowledged_before_it_is_live() {
    let mut backup = replaying();
    assert_eq!(received(&mut backup, 1, 4), [Action::Send(Message::Ack(Lsn(4)))]);
    step(&mut backup, 2, Event::ChannelDown);
    won(&mut backup, 2);
    assert_eq!(backup.role(), Role::GoingLive);
    assert_eq!(received(&mut backup, 5, 5), []);
    step(&mut backup, 3, Event::Consumed { through: Lsn(3) });
    assert_eq!(backup.role(), Role::GoingLive);
    step(&mut backup, 3, Event::Consumed { through: Lsn(4) });
    assert_eq!(backup.role(), Role::Live);
}

#[test]
fn a_promoted_backup_writes_entries_of_its_own() {
    let mut backup = replaying();
    received(&mut backup, 1, 2);
    step(&mut backup, 2, Event::Consumed { through: Lsn(2) });
    step(&mut backup, 2, Event::ChannelDown);
    won(&mut backup, 2);
    assert_eq!(backup.role(), Role::Live);
    assert_eq!(step(&mut backup, 3, Event::Appended { through: Lsn(3) }), []);
    assert_eq!((backup.role(), backup.last()), (Role::Live, Lsn(3)));
}

#[test]
fn a_gap_in_the_log_halts_the_backup() {
    let mut backup = replaying();
    received(&mut backup, 1, 1);
    received(&mut backup, 3, 3);
    assert_eq!(backup.role(), Role::Halted);
}

#[test]
fn an_orderly_power_off_ends_both_sides_and_nobody_goes_live() {
    let mut primary = recording();
    step(&mut primary, 1, Event::Appended { through: Lsn(2) });
    assert_eq!(step(&mut primary, 1, Event::PowerOffEntry { lsn: Lsn(2) }), []);
    assert!(from_peer(&mut primary, Message::Ack(Lsn(2))).contains(&Action::Finish));

    let mut backup = replaying();
    received(&mut backup, 1, 2);
    step(&mut backup, 1, Event::PowerOffEntry { lsn: Lsn(2) });
    assert_eq!(step(&mut backup, 1, Event::ChannelDown), []);
    assert!(step(&mut backup, 1, Event::Consumed { through: Lsn(2) }).contains(&Action::Finish));
    assert_eq!(backup.role(), Role::Off);
}

#[test]
fn a_first_generation_that_is_taken_refuses_the_start() {
    let mut primary = replica(true);
    step(&mut primary, 0, Event::LocalReady { fingerprint: [1; 32] });
    let refused = step(
        &mut primary,
        0,
        Event::Arbiter {
            generation: Generation(1),
            verdict: Verdict::Lost,
        },
    );
    assert!(
        refused
            .iter()
            .any(|action| matches!(action, Action::Halt { reason } if reason.contains("already claimed")))
    );
}

#[test]
fn a_dead_sibling_ends_the_replica_and_the_peer_is_told() {
    let mut primary = recording();
    let actions = step(
        &mut primary,
        1,
        Event::LocalFailure {
            reason: "vhost-ft-blk ended".into(),
        },
    );
    assert!(matches!(actions[0], Action::Send(Message::Gone { .. })));
    assert_eq!(primary.role(), Role::Halted);
}

#[test]
fn a_deadline_that_has_passed_is_gone_after_a_tick() {
    let check = |replica: &mut Replica, now_ns| {
        step(replica, now_ns, Event::Tick);
        assert!(replica.deadline_ns().is_none_or(|at| at > now_ns), "{replica:?}");
    };
    let mut backup = replaying();
    received(&mut backup, 1, 4);
    step(&mut backup, 2, Event::ChannelDown);
    won(&mut backup, 2);
    assert_eq!(backup.role(), Role::GoingLive);
    check(&mut backup, INTERVAL * 30);

    let mut backup = replaying();
    received(&mut backup, 1, 4);
    step(&mut backup, 2, Event::PowerOffEntry { lsn: Lsn(4) });
    assert_eq!(backup.role(), Role::Replaying);
    check(&mut backup, INTERVAL * 30);
}
