use super::*;
use crate::fake_disk::FakeDisk;
use crate::limits::GROUP_RECORDS_MAX;

fn request(operation: Operation, n: u64, payload: &[u8]) -> Request<'_> {
    Request {
        operation,
        n,
        payload,
        bytes: 16 + payload.len(),
    }
}

/// Feeds completions until nothing is in flight; returns the settled groups.
fn run(ledger: &mut Ledger<'_>, disk: &mut FakeDisk) -> Vec<Settled> {
    let mut settled = Vec::new();
    while let Some(completion) = disk.done.pop() {
        settled.extend(ledger.complete(completion, disk));
    }
    settled
}

#[test]
fn a_group_is_one_flush_and_its_answers_come_after_it() {
    let mut disk = FakeDisk::new(1000);
    let mut buffers = Buffers::new();
    let mut ledger = Ledger::new(&mut buffers, Head::EMPTY, 1000);
    for n in 1..=20 {
        let begun = ledger.begin(&request(Operation::Append, n, &[n as u8]), n > 1, 5, &mut disk);
        assert_eq!(begun, Begun::Appending(n));
    }
    ledger.submit(&mut disk);
    assert_eq!(disk.done.len(), 3, "20 records are three pages");
    assert_eq!(
        ledger.begin(&request(Operation::Append, 21, b"x"), true, 5, &mut disk),
        Begun::Wait
    );
    assert_eq!(
        ledger.begin(&request(Operation::Append, 7, b"x"), false, 5, &mut disk),
        Begun::Wait
    );
    assert_eq!(
        ledger.begin(&request(Operation::Head, 0, b""), true, 5, &mut disk),
        Begun::Wait
    );
    assert_eq!(
        ledger.begin(&request(Operation::PowerOff, 0, b""), false, 5, &mut disk),
        Begun::Wait
    );
    assert_eq!(ledger.committed().n, 0, "nothing is promised before the flush");
    let settled = run(&mut ledger, &mut disk);
    assert_eq!((settled.len(), disk.flushes), (1, 1));
    assert_eq!(ledger.committed().n, 20);
    let mut head = Head::EMPTY;
    for n in 1..=20 {
        head = head.next(&[n as u8]);
        let answer = ledger.append_answer(n, 1, settled[0]);
        assert_eq!((answer.status, answer.n, answer.hash), (Status::Ok, n, head.hash));
        assert_eq!(Record::read(&disk.durable[n as usize]).unwrap().hash, head.hash);
    }
}

#[test]
fn a_repeat_is_compared_with_the_disk() {
    let mut disk = FakeDisk::new(1000);
    let mut buffers = Buffers::new();
    let mut ledger = Ledger::new(&mut buffers, Head::EMPTY, 1000);
    ledger.begin(&request(Operation::Append, 1, b"one"), false, 5, &mut disk);
    ledger.submit(&mut disk);
    run(&mut ledger, &mut disk);
    for (operation, payload, status, answered) in [
        (Operation::Append, &b"one"[..], Status::Ok, &b""[..]),
        (Operation::Append, b"two", Status::Conflict, b""),
        (Operation::Read, b"", Status::Ok, b"one"),
    ] {
        let Begun::Reading(slot) = ledger.begin(&request(operation, 1, payload), false, 6, &mut disk) else {
            panic!("not reading");
        };
        assert_eq!(ledger.read_answer(slot), None);
        run(&mut ledger, &mut disk);
        let (answer, payload) = ledger.read_answer(slot).unwrap();
        assert_eq!((answer.status, answer.n, payload), (status, 1, answered));
        assert_eq!(answer.hash, Head::EMPTY.next(b"one").hash);
        ledger.release(slot);
    }
}

#[test]
fn wrong_numbers_are_refused() {
    let mut disk = FakeDisk::new(3);
    let mut buffers = Buffers::new();
    let mut ledger = Ledger::new(&mut buffers, Head::EMPTY, 3);
    let mut answer = |operation, n| match ledger.begin(&request(operation, n, b""), false, 5, &mut disk) {
        Begun::Answered(answer) => (answer.status, answer.n),
        other => panic!("{other:?}"),
    };
    assert_eq!(answer(Operation::Append, 0), (Status::Sequence, 0));
    assert_eq!(answer(Operation::Append, 2), (Status::Sequence, 0));
    assert_eq!(answer(Operation::Read, 0), (Status::NotFound, 0));
    assert_eq!(answer(Operation::Read, 1), (Status::NotFound, 1));
    assert_eq!(answer(Operation::Head, 9), (Status::Ok, 0));
    assert_eq!(answer(Operation::PowerOff, 9), (Status::Ok, 0));
    for n in 1..=2 {
        assert_eq!(
            ledger.begin(&request(Operation::Append, n, b""), false, 5, &mut disk),
            Begun::Appending(n)
        );
    }
    let full = ledger.begin(&request(Operation::Append, 3, b""), true, 5, &mut disk);
    assert_eq!(full, Begun::Answered(Answer::refusal(Status::Full, 3)));
}

#[test]
fn a_failed_group_takes_nothing_with_it() {
    let mut disk = FakeDisk::new(1000);
    let mut buffers = Buffers::new();
    let mut ledger = Ledger::new(&mut buffers, Head::EMPTY, 1000);
    disk.fail = true;
    for n in 1..=9 {
        ledger.begin(&request(Operation::Append, n, b"lost"), false, 5, &mut disk);
    }
    ledger.submit(&mut disk);
    let settled = run(&mut ledger, &mut disk);
    assert_eq!(settled, [Settled { head: None }]);
    assert_eq!(ledger.append_answer(4, 1, settled[0]), Answer::refusal(Status::Io, 4));
    assert_eq!((ledger.committed(), ledger.is_settled()), (Head::EMPTY, true));
    disk.fail = false;
    assert_eq!(
        ledger.begin(&request(Operation::Append, 1, b"new"), false, 5, &mut disk),
        Begun::Appending(1)
    );
    ledger.submit(&mut disk);
    run(&mut ledger, &mut disk);
    assert_eq!(ledger.committed(), Head::EMPTY.next(b"new"));
}

#[test]
fn a_full_group_and_taken_read_slots_make_requests_wait() {
    let mut disk = FakeDisk::new(1000);
    let mut buffers = Buffers::new();
    let mut ledger = Ledger::new(&mut buffers, Head::EMPTY, 1000);
    for n in 1..=GROUP_RECORDS_MAX as u64 {
        assert_eq!(
            ledger.begin(&request(Operation::Append, n, b""), false, 5, &mut disk),
            Begun::Appending(n)
        );
    }
    let next = GROUP_RECORDS_MAX as u64 + 1;
    assert_eq!(
        ledger.begin(&request(Operation::Append, next, b""), false, 5, &mut disk),
        Begun::Wait
    );
    ledger.submit(&mut disk);
    run(&mut ledger, &mut disk);

    let read = request(Operation::Read, 1, b"");
    let mut slots = Vec::new();
    while let Begun::Reading(slot) = ledger.begin(&read, false, 5, &mut disk) {
        slots.push(slot);
    }
    assert_eq!(slots.len(), READS_MAX);
    // A client went away: its slot is free only once the disk is done with it.
    ledger.release(slots[0]);
    assert_eq!(ledger.begin(&read, false, 5, &mut disk), Begun::Wait);
    run(&mut ledger, &mut disk);
    assert_eq!(ledger.begin(&read, false, 5, &mut disk), Begun::Reading(slots[0]));
}
