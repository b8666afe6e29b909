//! Times that change while a pair runs.

use super::*;

const SLOW: Timing = Timing {
    heartbeat_interval_ns: 5 * INTERVAL,
    heartbeat_misses: 20,
    ..TIMING
};

fn configured(replica: &mut Replica, lsn: u64, timing: Timing) -> Vec<Action> {
    step(replica, 2, Event::ConfigurationEntry { lsn: Lsn(lsn), timing })
}

#[test]
fn until_the_backup_has_the_entry_the_primary_is_as_patient_and_as_talkative_as_either_demands() {
    let mut primary = recording();
    let usual = TIMING.silence_ns();
    // Slower: the silence grows at once, the interval when the backup has it.
    step(&mut primary, 2, Event::Appended { through: Lsn(1) });
    configured(&mut primary, 1, SLOW);
    assert_eq!(primary.timing(), &SLOW);
    assert_eq!(
        (primary.silence_ns(), primary.heartbeat_interval_ns()),
        (SLOW.silence_ns(), INTERVAL)
    );
    from_peer(&mut primary, ack(1));
    assert_eq!(primary.heartbeat_interval_ns(), SLOW.heartbeat_interval_ns);
    // And back: the interval shrinks at once, the silence when the backup has it.
    step(&mut primary, 2, Event::Appended { through: Lsn(3) });
    configured(&mut primary, 2, TIMING);
    assert_eq!(
        (primary.silence_ns(), primary.heartbeat_interval_ns()),
        (SLOW.silence_ns(), INTERVAL)
    );
    // One that follows before the backup had the first does not forget it.
    configured(
        &mut primary,
        3,
        Timing {
            heartbeat_misses: 12,
            ..TIMING
        },
    );
    from_peer(&mut primary, ack(2));
    assert_eq!(primary.silence_ns(), SLOW.silence_ns());
    from_peer(&mut primary, ack(3));
    assert_eq!(primary.silence_ns(), usual / 10 * 12);
}

#[test]
fn a_backup_has_the_new_times_with_the_entry_and_keeps_them_when_it_goes_live() {
    let mut backup = replaying();
    configured(&mut backup, 1, SLOW);
    assert_eq!(backup.timing(), &TIMING, "the entry did not come this far");
    received(&mut backup, 1, 1);
    configured(&mut backup, 1, SLOW);
    assert_eq!((backup.timing(), backup.heartbeat_interval_ns()), (&SLOW, 5 * INTERVAL));
    assert!(backup.takes_configuration().unwrap_err().contains("Replaying"));
    step(&mut backup, SLOW.silence_ns() + 1, Event::Tick);
    won(&mut backup, 2);
    step(&mut backup, SLOW.silence_ns() + 1, Event::Consumed { through: Lsn(1) });
    assert_eq!((backup.role(), backup.timing()), (Role::Live, &SLOW));
    assert_eq!(backup.takes_configuration(), Ok(()));
}

#[test]
fn the_lag_that_slows_the_primary_changes_at_once() {
    let mut primary = recording();
    step(&mut primary, 2, Event::Appended { through: Lsn(1) });
    let tight = Timing {
        lag_target_ns: INTERVAL,
        lag_limit_ns: 2 * INTERVAL,
        ..TIMING
    };
    configured(&mut primary, 1, tight);
    let actions = step(&mut primary, 2 + 2 * INTERVAL, Event::Tick);
    assert!(actions.contains(&Action::Throttle { permille: 1000 }), "{actions:?}");
}

#[test]
fn a_peer_of_an_older_release_is_told_apart_before_anything_is_appended() {
    let mut primary = replica(true);
    ready(&mut primary);
    won(&mut primary, 1);
    step(&mut primary, 0, Event::ChannelUp);
    let versions = Versions { oldest: 3, newest: 4 };
    from_peer(
        &mut primary,
        Message::Hello(Hello {
            versions,
            ..hello(false, 0)
        }),
    );
    assert_eq!(primary.role(), Role::Recording);
    let reason = primary.takes_configuration().unwrap_err();
    assert!(reason.contains("version 4") && reason.contains("needs 5"), "{reason}");
}

#[test]
fn a_backup_takes_the_times_of_its_primary_and_the_primary_keeps_its_own() {
    let slow = Message::Hello(Hello {
        timing: Some(SLOW),
        ..hello(true, 0)
    });
    let mut backup = replica(false);
    ready(&mut backup);
    step(&mut backup, 0, Event::ChannelUp);
    from_peer(&mut backup, slow);
    assert_eq!((backup.role(), backup.timing()), (Role::Replaying, &SLOW));

    let mut primary = replica(true);
    ready(&mut primary);
    won(&mut primary, 1);
    step(&mut primary, 0, Event::ChannelUp);
    from_peer(
        &mut primary,
        Message::Hello(Hello {
            timing: Some(SLOW),
            ..hello(false, 0)
        }),
    );
    assert_eq!((primary.role(), primary.timing()), (Role::Recording, &TIMING));
}
