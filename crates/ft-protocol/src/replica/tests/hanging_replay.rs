//! A backup whose replay stands still while everything else goes on.

use super::*;

/// What a tick at `now_ns` does to a backup that hears its primary.
fn tick(backup: &mut Replica, now_ns: u64) -> Vec<Action> {
    let beat = Message::Heartbeat {
        vm: crate::message::vm_hash("ledger"),
        lsn: Lsn::ZERO,
        sequence: now_ns,
        replayed: Lsn::ZERO,
        full: false,
        asks: false,
    };
    let generation = backup.generation();
    step(
        backup,
        now_ns,
        Event::Message {
            generation,
            message: beat,
        },
    );
    step(backup, now_ns, Event::Tick)
}

fn consumed(backup: &mut Replica, now_ns: u64, through: u64) {
    step(backup, now_ns, Event::Consumed { through: Lsn(through) });
}

#[test]
fn it_is_told_to_the_primary_and_ends_the_backup() {
    let mut backup = replaying();
    received(&mut backup, 1, 3);
    consumed(&mut backup, INTERVAL, 2);
    assert_eq!(backup.replay_hangs_at_ns(), Some(INTERVAL + REPLAY));
    assert!(backup.deadline_ns().unwrap() <= INTERVAL + REPLAY);
    tick(&mut backup, INTERVAL + REPLAY - 1);
    assert_eq!(backup.role(), Role::Replaying);
    let actions = tick(&mut backup, INTERVAL + REPLAY);
    assert_eq!(backup.role(), Role::Halted);
    assert!(
        matches!(&actions[0], Action::Send(Message::Gone { reason }) if reason.contains("stands at entry 2 and entry 3")),
        "{actions:?}"
    );
    assert!(matches!(actions.last(), Some(Action::Halt { .. })), "{actions:?}");
}

#[test]
fn a_slow_one_and_one_that_has_nothing_to_do_are_none() {
    let mut backup = replaying();
    assert_eq!(backup.replay_hangs_at_ns(), None, "nothing came yet");
    received(&mut backup, 1, 100);
    let mut now_ns = 0;
    for entry in 1..=100 {
        // What comes meanwhile is no progress, and takes none away.
        received(&mut backup, 100 + entry, 100 + entry);
        now_ns += REPLAY - 1;
        tick(&mut backup, now_ns);
        consumed(&mut backup, now_ns, 2 * entry);
        assert_eq!(backup.role(), Role::Replaying, "at entry {entry}");
    }
    assert_eq!(backup.replay_hangs_at_ns(), None, "all is applied");
    tick(&mut backup, now_ns + 10 * REPLAY);
    assert_eq!(backup.role(), Role::Replaying);
}

#[test]
fn a_winner_is_not_ended_for_it() {
    let mut backup = replaying();
    received(&mut backup, 1, 3);
    // Silence, then the arbiter's word.
    step(&mut backup, 11 * INTERVAL, Event::Tick);
    assert_eq!(backup.role(), Role::Arbitrating);
    won(&mut backup, 2);
    step(&mut backup, 10 * REPLAY, Event::Tick);
    assert_eq!(backup.role(), Role::GoingLive);
}
