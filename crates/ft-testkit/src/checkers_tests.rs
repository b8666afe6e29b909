//! The judge on its own: each invariant broken by hand, and next to it the story that does not break it.

use super::*;

const A: Incarnation = Incarnation {
    host: HostId::A,
    number: 1,
};
const B: Incarnation = Incarnation {
    host: HostId::B,
    number: 1,
};

fn judge(calm: bool) -> Judge {
    let setting = crate::Plan::script(Vec::new(), false).setting;
    Judge::new(calm, false, &setting, setting.heartbeat_interval_ns)
}

fn output(index: u32, history: u64) -> Output {
    let answer = answer(1, index + 1, 7);
    Output { index, history, answer }
}

fn answer(id: u32, order: u32, chain: u64) -> Answer {
    Answer {
        client: 0,
        id,
        order,
        chain,
    }
}

fn append(id: u32) -> Request {
    Request {
        client: 0,
        id,
        operation: Operation::Append { value: 1 },
    }
}

fn end(me: Incarnation, role: Role, ledger: &[u64]) -> EndState<'_> {
    EndState {
        me,
        alive: true,
        role,
        joins: false,
        ledger,
        off: false,
    }
}

fn broken(judge: &Judge) -> Option<Invariant> {
    judge.failure().map(|failure| failure.invariant)
}

/// A recording pair that has stored one entry.
fn pair() -> Judge {
    let mut judge = judge(false);
    judge.claimed(Generation(1), A, true);
    judge.published(B, Role::Replaying, Generation(1));
    judge.published(A, Role::Recording, Generation(1));
    judge.wrote(HostId::A, Lsn(1), 11, false);
    judge.stored(HostId::B, 11, 0);
    judge
}

#[test]
fn an_output_needs_its_very_marker_on_the_backup_or_the_vm() {
    let mut judge = pair();
    judge.released(A, Lsn(1), &output(0, 1));
    assert_eq!(broken(&judge), None);
    judge.wrote(HostId::A, Lsn(2), 22, false);
    judge.released(A, Lsn(2), &output(1, 2));
    assert_eq!(broken(&judge), Some(Invariant::ReleasedIsStored));

    let mut judge = pair();
    judge.wrote(HostId::A, Lsn(2), 22, false);
    judge.stored(HostId::B, 99, 0);
    judge.released(A, Lsn(2), &output(0, 1));
    assert_eq!(broken(&judge), Some(Invariant::ReleasedIsStored));

    let mut judge = pair();
    judge.wrote(HostId::A, Lsn(2), 22, false);
    judge.claimed(Generation(2), A, true);
    judge.released(A, Lsn(2), &output(0, 1));
    assert_eq!(broken(&judge), None);
}

#[test]
fn only_the_owner_goes_live() {
    let mut judge = pair();
    judge.claimed(Generation(2), B, true);
    judge.published(B, Role::GoingLive, Generation(2));
    judge.published(B, Role::Live, Generation(2));
    assert_eq!(broken(&judge), None);
    judge.claimed(Generation(2), A, false);
    judge.published(A, Role::Live, Generation(2));
    assert_eq!(broken(&judge), Some(Invariant::OneLiveSide));
}

#[test]
fn a_side_ends_for_a_reason_and_is_mute_then() {
    let mut judge = pair();
    judge.published(A, Role::Halted, Generation(1));
    assert_eq!(broken(&judge), Some(Invariant::NoNeedlessHalt));

    let mut judge = pair();
    judge.claimed(Generation(2), A, false);
    judge.published(A, Role::Halted, Generation(1));
    assert_eq!(broken(&judge), None);
    judge.released(A, Lsn(1), &output(0, 1));
    assert_eq!(broken(&judge), Some(Invariant::Mute));
}

#[test]
fn the_live_history_has_every_released_output() {
    for (own, expected) in [(1, None), (2, Some(Invariant::HistoryExtends))] {
        let mut judge = pair();
        judge.released(A, Lsn(1), &output(0, 1));
        judge.produced(HostId::B, &output(0, own));
        judge.claimed(Generation(2), B, true);
        judge.published(B, Role::Live, Generation(2));
        assert_eq!(broken(&judge), expected);
    }
}

#[test]
fn what_was_acknowledged_is_in_the_survivors_ledger() {
    for (ledger, expected) in [(&[7][..], None), (&[][..], Some(Invariant::NothingLost))] {
        let mut judge = pair();
        judge.invoked(&append(1));
        judge.answered(&answer(1, 1, 7), Some(&append(1)));
        judge.finish(&[end(A, Role::Recording, ledger), end(B, Role::Replaying, &[])], true);
        assert_eq!(broken(&judge), expected);
    }
}

#[test]
fn answers_keep_the_order_that_clients_saw_and_do_not_change() {
    let mut judge = pair();
    judge.invoked(&append(1));
    judge.answered(&answer(1, 2, 7), Some(&append(1)));
    judge.invoked(&append(2));
    judge.answered(&answer(2, 1, 8), Some(&append(2)));
    assert_eq!(broken(&judge), Some(Invariant::NothingLost));

    let mut judge = pair();
    judge.answered(&answer(1, 1, 7), None);
    judge.answered(&answer(1, 1, 8), None);
    assert_eq!(broken(&judge), Some(Invariant::NothingLost));
}

#[test]
fn progress_is_demanded_of_a_side_that_may_go_on_and_of_no_other() {
    let mut judge = pair();
    judge.finish(&[end(A, Role::Recording, &[]), end(B, Role::Replaying, &[])], false);
    assert_eq!(broken(&judge), Some(Invariant::Progress));

    let mut judge = pair();
    judge.claimed(Generation(2), A, true);
    let gone = EndState {
        alive: false,
        ..end(A, Role::Arbitrating, &[])
    };
    judge.finish(&[gone, end(B, Role::Halted, &[])], false);
    assert_eq!(broken(&judge), None);
}

#[test]
fn a_backup_that_has_the_power_off_does_not_go_live() {
    let mut judge = pair();
    judge.stored(HostId::B, 22, KIND_POWER_OFF);
    judge.claimed(Generation(2), B, true);
    judge.published(B, Role::Live, Generation(2));
    assert_eq!(broken(&judge), Some(Invariant::OrderlyEnd));
}

const NEW_A: Incarnation = Incarnation {
    host: HostId::A,
    number: 2,
};

/// B is live in generation 2 with entries 1 and 2 behind it, and A has started anew and is to become its backup.
fn survivor_and_new_backup() -> Judge {
    let mut judge = pair();
    judge.crashed(HostId::A);
    judge.claimed(Generation(2), B, true);
    judge.published(B, Role::GoingLive, Generation(2));
    judge.published(B, Role::Live, Generation(2));
    judge.wrote(HostId::B, Lsn(2), 22, false);
    for index in 0..3 {
        judge.produced(HostId::B, &output(index, u64::from(index) + 1));
    }
    judge.restarted(HostId::A);
    judge.published(NEW_A, Role::Replaying, Generation(2));
    judge.joined(NEW_A, Lsn(2));
    judge
}

#[test]
fn a_survivor_shares_its_outputs_from_when_it_holds_with_a_backup_that_may_take_over() {
    for (is_synced, is_stored, expected) in [
        (true, true, None),
        (false, true, Some(Invariant::ReleasedIsStored)),
        (true, false, Some(Invariant::ReleasedIsStored)),
    ] {
        let mut judge = survivor_and_new_backup();
        judge.released(B, Lsn(2), &output(0, 1));
        judge.published(B, Role::Recording, Generation(2));
        // What was written before it held needs nobody's word.
        judge.released(B, Lsn(2), &output(1, 2));
        assert_eq!(broken(&judge), None);
        judge.wrote(HostId::B, Lsn(3), 33, false);
        judge.wrote(HostId::B, Lsn(4), 44, false);
        judge.stored(HostId::A, 33, if is_synced { KIND_SYNCED } else { 0 });
        if is_stored {
            judge.stored(HostId::A, 44, 0);
        }
        judge.released(B, Lsn(4), &output(2, 3));
        assert_eq!(broken(&judge), expected);
    }
}

#[test]
fn a_new_backup_takes_over_what_it_adopted_and_what_it_replayed() {
    for (adopted, expected) in [(vec![1], None), (vec![], Some(Invariant::HistoryExtends))] {
        let mut judge = survivor_and_new_backup();
        judge.released(B, Lsn(2), &output(0, 1));
        judge.adopted(HostId::A, adopted);
        judge.crashed(HostId::B);
        judge.claimed(Generation(3), NEW_A, true);
        judge.published(NEW_A, Role::Live, Generation(3));
        assert_eq!(broken(&judge), expected);
    }
}

#[test]
fn a_host_that_asks_to_be_the_backup_becomes_it() {
    for (is_synced, role, expected) in [
        (true, Role::Recording, None),
        (false, Role::Live, Some(Invariant::Repaired)),
        (false, Role::Recording, Some(Invariant::Repaired)),
    ] {
        let mut judge = survivor_and_new_backup();
        judge.published(B, role, Generation(2));
        judge.stored(HostId::A, 33, if is_synced { KIND_SYNCED } else { 0 });
        let new = EndState {
            joins: true,
            ..end(NEW_A, Role::Replaying, &[])
        };
        judge.finish(&[new, end(B, role, &[])], true);
        assert_eq!(broken(&judge), expected);
    }
}
