//! The channel breaks and comes back, or stands still.

use super::*;

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
    ready(&mut backup);
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
        ready(&mut primary);
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
                asks: false,
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
