//! Strengths of acknowledgement, versions of the hello, lag.

use super::*;
use crate::limits::THROTTLE_MAX;

fn with_ack(ack: Strength) -> Replica {
    let mut primary = Replica::new(Config { ack, ..config(true) }, 0);
    ready(&mut primary);
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
        ready(&mut backup);
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
    ready(&mut backup);
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
        ready(&mut replica);
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
