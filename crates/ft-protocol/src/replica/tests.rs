//! Table-like tests of single steps. Schedules with faults are the simulator's (crates/ft-testkit).

use super::*;
use crate::{limits::THROTTLE_MAX, message::Hello};

mod hanging_replay;

const INTERVAL: u64 = 20_000_000;

/// Longer than the silence until suspicion, as it is by default.
const CHANNEL: u64 = 50 * INTERVAL;
/// So long may a replay stand still.
const REPLAY: u64 = 500 * INTERVAL;

fn config(primary: bool) -> Config {
    Config {
        vm: "ledger".into(),
        primary,
        alone: false,
        heartbeat_interval_ns: INTERVAL,
        heartbeat_misses: 10,
        channel_timeout_ns: CHANNEL,
        replay_timeout_ns: REPLAY,
        ack: Strength::Received,
        versions: Versions::SPOKEN,
        keeps_journal: true,
        lag_target_ns: 5 * INTERVAL,
        lag_limit_ns: 50 * INTERVAL,
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
        from_peer(&mut primary, ack(2)),
        [
            Action::Forget { through: Lsn(2) },
            Action::Commit(Committed::through(Lsn(2)))
        ]
    );
    assert_eq!(from_peer(&mut primary, ack(1)), []);
    from_peer(&mut primary, ack(9));
    assert_eq!(primary.role(), Role::Halted);
}

#[test]
fn an_older_generation_is_not_heard() {
    let mut primary = recording();
    step(&mut primary, 1, Event::Appended { through: Lsn(3) });
    let stale = Event::Message {
        generation: Generation(0),
        message: ack(3),
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
    silence(&mut primary);
    let live = won(&mut primary, 2);
    assert!(live.contains(&Action::Commit(Committed::through(Lsn::MAX))));
    assert_eq!((primary.role(), primary.generation()), (Role::Live, Generation(2)));

    let mut primary = recording();
    step(&mut primary, 1, Event::Appended { through: Lsn(3) });
    silence(&mut primary);
    step(
        &mut primary,
        1,
        Event::Arbiter {
            generation: Generation(2),
            verdict: Verdict::Lost,
        },
    );
    assert_eq!(primary.role(), Role::Halted);
    assert_eq!(from_peer(&mut primary, ack(3)), []);
    assert_eq!(won(&mut primary, 2), []);
}

#[test]
fn an_unreachable_arbiter_is_asked_again_and_nothing_is_released() {
    let mut backup = replaying();
    received(&mut backup, 1, 1);
    silence(&mut backup);
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
    let down = silence(&mut backup);
    assert!(!down.iter().any(|action| matches!(action, Action::AskArbiter { .. })));
    assert_eq!((backup.role(), backup.generation()), (Role::Pairing, Generation(0)));
    // Its hello may have been lost: the primary, still pairing, offers the same generation again.
    step(&mut backup, 2, Event::ChannelUp);
    from_peer(&mut backup, peer_hello(true));
    assert_eq!((backup.role(), backup.generation()), (Role::Replaying, Generation(1)));
    received(&mut backup, 1, 1);
    assert!(silence(&mut backup).contains(&Action::AskArbiter {
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
    assert_eq!(received(&mut backup, 1, 4), [Action::Send(ack(4))]);
    silence(&mut backup);
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
    silence(&mut backup);
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
    assert!(from_peer(&mut primary, ack(2)).contains(&Action::Finish));

    let mut backup = replaying();
    received(&mut backup, 1, 2);
    step(&mut backup, 1, Event::PowerOffEntry { lsn: Lsn(2) });
    let quiet = silence(&mut backup);
    assert!(
        !quiet.iter().any(|action| matches!(action, Action::Suspect { .. })),
        "{quiet:?}"
    );
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
fn a_hello_that_comes_before_the_claim_pairs_nobody() {
    let mut primary = replica(true);
    step(&mut primary, 0, Event::LocalReady { fingerprint: [1; 32] });
    step(&mut primary, 0, Event::ChannelUp);
    for generation in [0, 1, u32::MAX] {
        let generation = Generation(generation);
        for hello in [hello(false, 0), hello(true, 0)] {
            let message = Message::Hello(hello);
            let actions = step(&mut primary, 1, Event::Message { generation, message });
            assert_eq!(actions, [Action::CloseChannel], "{generation}");
        }
    }
    assert_eq!(primary.role(), Role::Pairing);
    // The claim is still waited for, and its loss still ends this side.
    let (generation, verdict) = (Generation::FIRST, Verdict::Lost);
    step(&mut primary, 2, Event::Arbiter { generation, verdict });
    assert_eq!(primary.role(), Role::Halted);
}

#[test]
fn a_backup_refuses_a_generation_that_no_pair_can_have() {
    for (generation, takes) in [(0, false), (1, true), (u32::MAX - 1, true), (u32::MAX, false)] {
        let mut backup = replica(false);
        step(&mut backup, 0, Event::LocalReady { fingerprint: [1; 32] });
        step(&mut backup, 0, Event::ChannelUp);
        let generation = Generation(generation);
        let message = peer_hello(true);
        let actions = step(&mut backup, 1, Event::Message { generation, message });
        if takes {
            assert_eq!(backup.role(), Role::Replaying);
            received(&mut backup, 1, 1);
            let next = Action::AskArbiter {
                generation: generation.next(),
            };
            assert!(silence(&mut backup).contains(&next));
            continue;
        }
        let [Action::Send(Message::Refuse { reason }), Action::CloseChannel] = &actions[..] else {
            panic!("{actions:?}");
        };
        assert!(reason.contains(&format!("generation {generation}")), "{reason}");
        assert_eq!((backup.role(), backup.generation()), (Role::Pairing, Generation(0)));
    }
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
    silence(&mut backup);
    won(&mut backup, 2);
    assert_eq!(backup.role(), Role::GoingLive);
    check(&mut backup, INTERVAL * 30);

    let mut backup = replaying();
    received(&mut backup, 1, 4);
    step(&mut backup, 2, Event::PowerOffEntry { lsn: Lsn(4) });
    assert_eq!(backup.role(), Role::Replaying);
    check(&mut backup, INTERVAL * 30);
}

// ---- the channel breaks and comes back ----------------------------------------------------------------------------------

/// A primary that wrote 9 entries, of which 4 are acknowledged, and lost the channel.
fn interrupted() -> Replica {
    let mut primary = recording();
    step(&mut primary, 1, Event::Appended { through: Lsn(9) });
    from_peer(&mut primary, ack(4));
    assert_eq!(step(&mut primary, 2, Event::ChannelDown), []);
    assert_eq!(primary.role(), Role::Recording);
    primary
}

#[test]
fn a_broken_channel_is_resumed_with_what_the_backup_has_not_got() {
    let mut primary = interrupted();
    // Nothing goes out meanwhile.
    assert_eq!(step(&mut primary, 3, Event::Appended { through: Lsn(10) }), []);
    assert_eq!(
        step(&mut primary, 4, Event::ChannelUp),
        [Action::Send(Message::Hello(hello(true, 10)))]
    );
    // The backup had received more than it could say.
    assert_eq!(
        from_peer(&mut primary, Message::Hello(hello(false, 7))),
        [
            Action::Rewind { after: Lsn(7) },
            Action::Forget { through: Lsn(7) },
            Action::Commit(Committed::through(Lsn(7))),
            Action::SendEntries { through: Lsn(10) },
        ]
    );

    let mut backup = replaying();
    received(&mut backup, 1, 7);
    step(&mut backup, 2, Event::ChannelDown);
    assert_eq!(
        backup.place(Generation(1), Lsn(8), Lsn(7)),
        Place::Foreign,
        "no hello yet"
    );
    step(&mut backup, 2, Event::ChannelUp);
    assert_eq!(
        from_peer(&mut backup, Message::Hello(hello(true, 10))),
        [Action::Send(Message::Hello(hello(false, 7))), Action::Send(ack(7))]
    );
    assert_eq!((backup.role(), backup.generation()), (Role::Replaying, Generation(1)));
    let place = |generation, lsn| backup.place(Generation(generation), Lsn(lsn), Lsn(7));
    assert_eq!(
        [place(1, 7), place(1, 8), place(1, 9)],
        [Place::Known, Place::Next, Place::Foreign]
    );
    assert_eq!([place(0, 8), place(2, 8)], [Place::Foreign; 2]);
}

#[test]
fn only_the_two_that_made_the_pair_resume_it_and_only_in_its_generation() {
    let mut backup = replaying();
    received(&mut backup, 1, 7);
    let refused = |generation, hello: Hello| backup.refusal(Generation(generation), &hello);
    assert_eq!(refused(1, hello(true, 7)), None);
    assert!(refused(0, hello(true, 7)).unwrap().contains("generation 0"));
    assert!(refused(2, hello(true, 7)).unwrap().contains("generation 2"));
    assert!(refused(1, hello(true, 6)).unwrap().contains("do not fit"));
    let anew = Hello {
        instance: 9,
        ..hello(true, 7)
    };
    assert!(refused(1, anew.clone()).unwrap().contains("started anew"));
    assert!(
        refused(
            1,
            Hello {
                vm: "x".into(),
                ..hello(true, 7)
            }
        )
        .unwrap()
        .contains("'x'")
    );
    // Such a hello costs its sender the connection, and the pair nothing.
    step(&mut backup, 2, Event::ChannelUp);
    let answer = from_peer(&mut backup, Message::Hello(anew));
    assert!(matches!(
        answer[..],
        [Action::Send(Message::Refuse { .. }), Action::CloseChannel]
    ));
    assert_eq!((backup.role(), backup.is_channel_open()), (Role::Replaying, false));
    from_peer(&mut backup, Message::Hello(hello(true, 7)));
    assert!(backup.is_channel_open());

    let primary = interrupted();
    let refused = |hello: Hello| primary.refusal(Generation(1), &hello);
    assert_eq!([refused(hello(false, 4)), refused(hello(false, 9))], [None, None]);
    assert!(refused(hello(false, 3)).is_some() && refused(hello(false, 10)).is_some());
}

#[test]
fn a_backup_that_was_started_anew_is_suspected_at_once_and_does_not_replay() {
    let mut primary = interrupted();
    step(&mut primary, 4, Event::ChannelUp);
    let anew = Hello {
        instance: 9,
        ..hello(false, 0)
    };
    let suspected = from_peer(&mut primary, Message::Hello(anew));
    assert!(suspected.contains(&Action::AskArbiter {
        generation: Generation(2)
    }));

    // It says so itself where it can see it.
    let mut backup = replica(false);
    step(&mut backup, 0, Event::LocalReady { fingerprint: [1; 32] });
    step(&mut backup, 0, Event::ChannelUp);
    let answer = from_peer(&mut backup, Message::Hello(hello(true, 9)));
    assert!(matches!(
        answer[..],
        [Action::Send(Message::Refuse { .. }), Action::CloseChannel]
    ));
    assert_eq!(backup.role(), Role::Pairing);
    let mut primary = interrupted();
    step(&mut primary, 4, Event::ChannelUp);
    from_peer(&mut primary, Message::Refuse { reason: "anew".into() });
    assert_eq!(primary.role(), Role::Arbitrating);
}

#[test]
fn a_hello_without_an_answer_breaks_the_channel_and_the_next_one_is_tried() {
    for mut primary in [interrupted(), {
        let mut primary = replica(true);
        step(&mut primary, 0, Event::LocalReady { fingerprint: [1; 32] });
        won(&mut primary, 1);
        primary
    }] {
        let up = step(&mut primary, 10, Event::ChannelUp);
        assert!(matches!(up[..], [Action::Send(Message::Hello(_))]));
        let due = 10 + CHANNEL / 2;
        let heard = |primary: &mut Replica, now_ns| {
            let message = Message::Heartbeat {
                vm: 0,
                lsn: Lsn(0),
                sequence: 0,
                replayed: Lsn(0),
                full: false,
            };
            let generation = Generation(1);
            step(primary, now_ns, Event::Message { generation, message });
        };
        heard(&mut primary, due - 1);
        assert!(!step(&mut primary, due - 1, Event::Tick).contains(&Action::BreakChannel));
        assert!(step(&mut primary, due, Event::Tick).contains(&Action::BreakChannel));
        let again = step(&mut primary, due + 1, Event::ChannelUp);
        assert!(matches!(again[..], [Action::Send(Message::Hello(_))]));
    }
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
        };
        let generation = Generation(1);
        let mut actions = step(replica, now_ns, Event::Message { generation, message });
        actions.extend(step(replica, now_ns, Event::Tick));
        done.extend(actions.into_iter().map(|action| (now_ns, action)));
        now_ns += INTERVAL;
    }
    done
}

#[test]
fn a_channel_that_stays_away_is_suspected_though_heartbeats_come() {
    let all_acknowledged = || {
        let mut primary = interrupted();
        from_peer(&mut primary, ack(9));
        primary
    };
    for mut replica in [all_acknowledged(), {
        let mut backup = replaying();
        received(&mut backup, 1, 7);
        step(&mut backup, 2, Event::ChannelDown);
        backup
    }] {
        // Attempts that lead to nothing do not count.
        step(&mut replica, 3, Event::ChannelUp);
        step(&mut replica, 4, Event::ChannelDown);
        let done = with_heartbeats(&mut replica, INTERVAL, 2 * CHANNEL, false);
        let (at_ns, _) = done
            .iter()
            .find(|(_, action)| matches!(action, Action::Suspect { reason } if reason.contains("is away")))
            .expect("suspected");
        assert!((CHANNEL..CHANNEL + 2 * INTERVAL).contains(at_ns), "{at_ns}");
    }
}

#[test]
fn a_channel_that_stands_still_is_broken_once_and_then_suspected() {
    let mut primary = recording();
    step(&mut primary, 0, Event::Appended { through: Lsn(9) });
    // It was open at 1 ns.
    let done = with_heartbeats(&mut primary, 0, CHANNEL / 2 + INTERVAL, false);
    assert_eq!(
        done.iter()
            .filter(|(_, action)| *action == Action::BreakChannel)
            .count(),
        1
    );
    step(&mut primary, CHANNEL / 2 + INTERVAL, Event::ChannelUp);
    from_peer(&mut primary, Message::Hello(hello(false, 0)));
    let done = with_heartbeats(&mut primary, CHANNEL / 2 + INTERVAL, 2 * CHANNEL, false);
    assert!(!done.iter().any(|(_, action)| *action == Action::BreakChannel));
    let suspected =
        |(_, action): &(u64, Action)| matches!(action, Action::Suspect { reason } if reason.contains("stands still"));
    assert!(done.iter().any(suspected));

    // A backup without room says so; one that takes something has time again.
    let mut primary = recording();
    step(&mut primary, 0, Event::Appended { through: Lsn(9) });
    assert!(
        !with_heartbeats(&mut primary, 0, 3 * CHANNEL, true)
            .iter()
            .any(suspected)
    );
    assert_eq!(primary.role(), Role::Recording);
    let mut primary = recording();
    step(&mut primary, 0, Event::Appended { through: Lsn(9) });
    for lsn in 1..9 {
        let at_ns = lsn * CHANNEL / 3;
        with_heartbeats(&mut primary, at_ns - CHANNEL / 3, at_ns, false);
        let generation = Generation(1);
        step(
            &mut primary,
            at_ns,
            Event::Message {
                generation,
                message: ack(lsn),
            },
        );
    }
    assert_eq!(primary.role(), Role::Recording);
}

#[test]
fn a_second_hello_on_an_open_channel_breaks_it_and_is_not_answered() {
    for mut replica in [recording(), replaying()] {
        let of_primary = replica.role() == Role::Replaying;
        assert!(replica.is_channel_open());
        assert_eq!(from_peer(&mut replica, peer_hello(of_primary)), [Action::BreakChannel]);
        assert!(!replica.is_channel_open());
        // The pair is as it was.
        step(&mut replica, 2, Event::ChannelDown);
        step(&mut replica, 2, Event::ChannelUp);
        from_peer(&mut replica, peer_hello(of_primary));
        assert!(replica.is_channel_open());
    }
}

#[test]
fn a_channel_that_comes_back_late_has_its_time_to_carry_something() {
    let resumed_at = |last_of_backup| {
        let mut primary = interrupted();
        let now_ns = CHANNEL / 2 + 1;
        with_heartbeats(&mut primary, INTERVAL, now_ns, false);
        step(&mut primary, now_ns, Event::ChannelUp);
        let (generation, message) = (Generation(1), Message::Hello(hello(false, last_of_backup)));
        step(&mut primary, now_ns, Event::Message { generation, message });
        assert!(primary.is_channel_open());
        (primary, now_ns)
    };
    let breaks = |done: &[(u64, Action)]| done.iter().any(|(_, action)| *action == Action::BreakChannel);
    // Entries are to be sent again: what was, was on another channel.
    let (mut primary, now_ns) = resumed_at(4);
    assert!(primary.deadline_ns().is_none_or(|at| at > now_ns));
    let done = with_heartbeats(&mut primary, now_ns, CHANNEL - INTERVAL, false);
    assert!(!breaks(&done), "{done:?}");
    // That nothing moved at all is counted over all of them.
    let done = with_heartbeats(&mut primary, CHANNEL, CHANNEL + 2 * INTERVAL, false);
    let suspected = |(_, action): &(u64, Action)| matches!(action, Action::Suspect { .. });
    assert!(done.iter().any(suspected), "{done:?}");
    // Everything had arrived: there is nothing to wait for.
    let (mut primary, now_ns) = resumed_at(9);
    let done = with_heartbeats(&mut primary, now_ns, 3 * CHANNEL, false);
    assert!(!breaks(&done) && primary.role() == Role::Recording, "{done:?}");
}

// ---- strengths of acknowledgement, lag ----------------------------------------------------------------------------------

fn with_ack(ack: Strength) -> Replica {
    let mut primary = Replica::new(Config { ack, ..config(true) }, 0);
    step(&mut primary, 0, Event::LocalReady { fingerprint: [1; 32] });
    won(&mut primary, 1);
    step(&mut primary, 0, Event::ChannelUp);
    from_peer(&mut primary, peer_hello(false));
    step(&mut primary, 1, Event::Appended { through: Lsn(9) });
    primary
}

#[test]
fn outputs_wait_for_the_strength_that_was_asked_for() {
    let said = Watermarks {
        received: Lsn(8),
        durable: Lsn(5),
        replayed: Lsn(3),
    };
    for (strength, commit) in [(Strength::Received, 8), (Strength::Durable, 5), (Strength::Replayed, 3)] {
        let mut primary = with_ack(strength);
        let done = from_peer(&mut primary, Message::Ack(said));
        assert!(
            done.contains(&Action::Forget { through: Lsn(8) }),
            "what arrived need not be kept"
        );
        assert!(
            done.contains(&Action::Commit(Committed::through(Lsn(commit)))),
            "{done:?}"
        );
        // A resumed channel says what was received, and no more than that.
        step(&mut primary, 2, Event::ChannelUp);
        let done = from_peer(&mut primary, Message::Hello(hello(false, 9)));
        let commits = done.iter().any(|action| matches!(action, Action::Commit(_)));
        assert_eq!(commits, strength == Strength::Received);
    }
}

#[test]
fn the_backup_acknowledges_what_the_primary_waits_for() {
    for strength in [Strength::Received, Strength::Durable, Strength::Replayed] {
        let mut backup = replica(false);
        step(&mut backup, 0, Event::LocalReady { fingerprint: [1; 32] });
        step(&mut backup, 0, Event::ChannelUp);
        from_peer(
            &mut backup,
            Message::Hello(Hello {
                ack: strength,
                ..hello(true, 0)
            }),
        );
        received(&mut backup, 1, 4);
        let mut says = |event, said: Watermarks, waits: Strength| {
            let expected = if strength == waits {
                vec![Action::Send(Message::Ack(said))]
            } else {
                vec![]
            };
            assert_eq!(step(&mut backup, 2, event), expected, "{strength:?}");
        };
        let (durable, replayed) = (Lsn(3), Lsn(2));
        says(
            Event::Durable { through: Lsn(3) },
            Watermarks { durable, ..through(4) },
            Strength::Durable,
        );
        says(
            Event::Consumed { through: Lsn(2) },
            Watermarks {
                durable,
                replayed,
                ..through(4)
            },
            Strength::Replayed,
        );
        // Once in a while the replay's progress is told anyway: the primary measures the lag by it.
        let told = step(&mut backup, INTERVAL, Event::Tick).contains(&Action::Send(Message::Ack(Watermarks {
            durable,
            replayed,
            ..through(4)
        })));
        assert_eq!(told, strength != Strength::Replayed);
    }
}

#[test]
fn a_backup_without_a_journal_refuses_durable_acknowledgements() {
    let mut backup = Replica::new(
        Config {
            keeps_journal: false,
            ..config(false)
        },
        0,
    );
    step(&mut backup, 0, Event::LocalReady { fingerprint: [1; 32] });
    step(&mut backup, 0, Event::ChannelUp);
    let hello = Hello {
        ack: Strength::Durable,
        ..hello(true, 0)
    };
    let answer = from_peer(&mut backup, Message::Hello(hello));
    assert!(matches!(&answer[0], Action::Send(Message::Refuse { reason }) if reason.contains("--journal")));
    assert_eq!(backup.role(), Role::Halted);
}

#[test]
fn a_pair_uses_the_highest_version_that_both_speak_and_a_channel_that_comes_back_does_too() {
    let range = |oldest, newest| Versions { oldest, newest };
    let pairing = |primary| {
        let config = Config {
            versions: range(3, 5),
            ..config(primary)
        };
        let mut replica = Replica::new(config, 0);
        step(&mut replica, 0, Event::LocalReady { fingerprint: [1; 32] });
        let (generation, verdict) = (Generation::FIRST, Verdict::Won);
        step(&mut replica, 0, Event::Arbiter { generation, verdict });
        step(&mut replica, 0, Event::ChannelUp);
        replica
    };
    let said = |primary, versions| {
        Message::Hello(Hello {
            versions,
            ..hello(primary, 0)
        })
    };
    for primary in [true, false] {
        for (theirs, common) in [(range(4, 9), 5), (range(1, 4), 4), (range(3, 3), 3), (range(5, 6), 5)] {
            let mut replica = pairing(primary);
            assert_eq!(replica.version(), None);
            from_peer(&mut replica, said(!primary, theirs));
            assert_eq!((replica.version(), replica.is_pair()), (Some(common), true), "{theirs}");
            let again = Hello {
                versions: range(common, common),
                ..hello(!primary, 0)
            };
            assert_eq!(replica.refusal(Generation::FIRST, &again), None);
            let other = Hello {
                versions: range(common + 1, common + 1),
                ..again
            };
            assert!(replica.refusal(Generation::FIRST, &other).unwrap().contains("version"));
        }
        let mut replica = pairing(primary);
        let answer = from_peer(&mut replica, said(!primary, range(6, 9)));
        let both = "version 6 to 9 there, 3 to 5 here";
        assert!(
            answer
                .iter()
                .any(|action| matches!(action, Action::Send(Message::Refuse { reason }) if reason.contains(both))),
            "{answer:?}"
        );
        assert_eq!(replica.role(), Role::Halted);
    }
}

#[test]
fn lag_slows_the_primary_and_catching_up_lets_it_run() {
    let mut primary = recording();
    let throttle = |actions: &[Action]| {
        actions.iter().rev().find_map(|action| match action {
            Action::Throttle { permille } => Some(*permille),
            _ => None,
        })
    };
    step(&mut primary, 0, Event::Appended { through: Lsn(9) });
    from_peer(&mut primary, ack(9));
    let done: Vec<_> = with_heartbeats(&mut primary, 0, 60 * INTERVAL, false);
    let levels: Vec<u32> = done
        .iter()
        .filter_map(|(_, action)| throttle(std::slice::from_ref(action)))
        .collect();
    assert!(levels.len() > 20 && levels.is_sorted(), "{levels:?}");
    assert_eq!(levels.last(), Some(&THROTTLE_MAX));
    let said = Watermarks {
        replayed: Lsn(9),
        ..through(9)
    };
    assert_eq!(throttle(&from_peer(&mut primary, Message::Ack(said))), Some(0));
    assert_eq!(primary.lag_ns(61 * INTERVAL), 0);
}
