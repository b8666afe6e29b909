//! Heartbeats of a pair at rest, and of one that is not.

use super::*;

/// Runs a replica by its own deadlines up to `until_ns`; when heartbeats left, and whether they asked.
fn beats(replica: &mut Replica, until_ns: u64) -> Vec<(u64, bool)> {
    let mut sent = Vec::new();
    while let Some(now_ns) = replica.deadline_ns().filter(|at| *at < until_ns) {
        for action in step(replica, now_ns, Event::Tick) {
            if let Action::SendHeartbeat(Message::Heartbeat { asks, .. }) = action {
                sent.push((now_ns, asks));
            }
        }
        assert!(replica.deadline_ns() > Some(now_ns), "time does not move");
    }
    sent
}

fn heard(replica: &mut Replica, now_ns: u64, lsn: u64, asks: bool) {
    let message = Message::Heartbeat {
        vm: 0,
        lsn: Lsn(lsn),
        sequence: 0,
        replayed: Lsn(lsn),
        full: false,
        asks,
    };
    let generation = Generation(1);
    step(replica, now_ns, Event::Message { generation, message });
}

#[test]
fn a_pair_at_rest_says_so_every_fourth_interval_and_a_side_that_is_late_is_asked() {
    let mut backup = replaying();
    assert_eq!(beats(&mut backup, 1), [(0, false)]);
    // The peer speaks as a side at rest does.
    for beat in 1..=5 {
        let at = beat * 4 * INTERVAL;
        assert_eq!(beats(&mut backup, at + 1), [(at, false)]);
        heard(&mut backup, at + 1, 0, false);
    }
    // Its next heartbeat is lost: an interval after it was due it is asked for, again and again, until it is suspected.
    let last = 20 * INTERVAL;
    let sent = beats(&mut backup, last + 9 * INTERVAL);
    assert_eq!(sent[0], (last + 4 * INTERVAL, false));
    let asked: Vec<_> = (5..9).map(|beat| (last + beat * INTERVAL + 1, true)).collect();
    assert_eq!(sent[1..], asked);
    assert_eq!(backup.role(), Role::Replaying);
    // An answer is enough, and it rests again.
    heard(&mut backup, last + 9 * INTERVAL, 0, false);
    let since = last + 8 * INTERVAL + 1;
    assert_eq!(
        beats(&mut backup, since + 4 * INTERVAL + 1),
        [(since + 4 * INTERVAL, false)]
    );
}

#[test]
fn a_side_that_is_asked_answers_at_once_and_not_more_often_than_twice_an_interval() {
    let mut backup = replaying();
    beats(&mut backup, 1);
    heard(&mut backup, INTERVAL, 0, true);
    assert_eq!(backup.deadline_ns(), Some(INTERVAL / 2), "due by now");
    assert_eq!(step(&mut backup, INTERVAL, Event::Tick).len(), 1);
    for extra in 1..10 {
        heard(&mut backup, INTERVAL + extra, 0, true);
    }
    assert_eq!(backup.deadline_ns(), Some(INTERVAL + INTERVAL / 2));
}

#[test]
fn who_has_something_to_replay_or_waits_for_it_does_not_rest() {
    let every = |replica: &mut Replica, from: u64| {
        let sent = beats(replica, from + 3 * INTERVAL + 1);
        assert!(sent.len() >= 3 && sent.iter().all(|(_, asks)| !asks), "{sent:?}");
    };
    let mut backup = replaying();
    received(&mut backup, 1, 3);
    every(&mut backup, 0);
    step(&mut backup, 3 * INTERVAL, Event::Consumed { through: Lsn(3) });
    heard(&mut backup, 3 * INTERVAL, 3, false);
    assert!(beats(&mut backup, 6 * INTERVAL).is_empty(), "it rests");

    let mut primary = recording();
    step(&mut primary, 0, Event::Appended { through: Lsn(1) });
    every(&mut primary, 0);
    let stored = Watermarks {
        replayed: Lsn(1),
        ..through(1)
    };
    let (generation, message) = (Generation(1), Message::Ack(stored));
    step(&mut primary, 3 * INTERVAL, Event::Message { generation, message });
    assert!(beats(&mut primary, 6 * INTERVAL).is_empty(), "it rests");
}

#[test]
fn a_pair_with_an_older_release_and_one_that_misses_few_heartbeats_do_not_rest() {
    let mut of_version = replica(false);
    ready(&mut of_version);
    step(&mut of_version, 0, Event::ChannelUp);
    let versions = Versions { oldest: 3, newest: 4 };
    from_peer(
        &mut of_version,
        Message::Hello(Hello {
            versions,
            ..hello(true, 0)
        }),
    );
    assert_eq!(of_version.version(), Some(4));
    assert_eq!(beats(&mut of_version, 3 * INTERVAL + 1).len(), 4);

    let mut impatient = replaying();
    impatient.config.timing.heartbeat_misses = 4;
    assert_eq!(beats(&mut impatient, 2 * INTERVAL + 1).len(), 3);
}
