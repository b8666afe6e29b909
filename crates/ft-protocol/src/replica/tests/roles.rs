//! Who is what, and when that ends: pairing, suspicion, the arbiter, going live, powering off.

use super::*;

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
    ready(&mut primary);
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
    ready(&mut primary);
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
    ready(&mut primary);
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
        ready(&mut backup);
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
