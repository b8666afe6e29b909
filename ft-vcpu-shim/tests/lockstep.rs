//! A tiny guest on real KVM, recorded and replayed in this process: time, alarms and interrupts must come out equal.

mod tiny;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use ft_client::events::monotonic_ns;
use ft_protocol::{Body, Generation, Lsn, Role, entry::Entry};
use ft_vcpu_shim::{
    command::machine::{MachineArgs, Positions},
    error::Error,
    lockstep::{
        branches::{self, BranchClock},
        digest::Digests,
        execution::{End, Execution, Step},
        history::{AccessKind, Event, StopRecord},
        replay::{Replayer, Successor},
        source::Source,
        timeline::Timeline,
        virtual_clock::STANDSTILL_NS_MAX,
    },
    machine::vcpu::open_kvm,
};
use tiny::{
    branch_counter::FakeCounter, busy_guest, fault_guest, half_guest, halted_guest, machine, machine_of, msr_guest,
    record, record_with, run_recorded, run_recorded_by, run_unrecorded, step_clock::StepClock,
};

struct Frames(std::vec::IntoIter<Vec<u8>>);

impl Source for Frames {
    fn next(&mut self, frame: &mut Vec<u8>) -> Result<Option<Generation>, Error> {
        match self.0.next() {
            Some(next) => {
                *frame = next;
                Ok(None)
            }
            None => Ok(Some(Generation(2))),
        }
    }

    fn finish(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

impl Successor for Frames {
    fn succeed(self, _: Option<std::fs::File>, _: Vec<u64>, _: u64) -> Option<Box<dyn Timeline>> {
        None
    }
}

/// The machine, about to execute what was recorded.
fn replaying(args: &MachineArgs, frames: Vec<Vec<u8>>) -> Result<Execution, Error> {
    let replayer = Replayer::new(Frames(frames.into_iter()), None);
    args.load()?
        .power_on(Vec::new(), Box::new(replayer), Box::new(|_, _| {}))
}

fn replay(args: &MachineArgs, frames: Vec<Vec<u8>>) -> Result<(End, Digests), Error> {
    replay_with(args, frames, |_| {})
}

fn replay_with(
    args: &MachineArgs,
    frames: Vec<Vec<u8>>,
    prepare: impl FnOnce(&mut Execution),
) -> Result<(End, Digests), Error> {
    let mut execution = replaying(args, frames)?;
    prepare(&mut execution);
    let end = execution.run()?;
    Ok((end, execution.digests()))
}

fn index_of_nth_time(frames: &[Vec<u8>], nth: usize) -> usize {
    let times = frames
        .iter()
        .enumerate()
        .filter(|(_, frame)| matches!(Entry::decode(frame).unwrap().body, Body::Time { .. }));
    times
        .map(|(index, _)| index)
        .nth(nth)
        .expect("the guest reads the clock")
}

#[test]
fn a_recorded_run_replays_to_the_same_digests_every_time() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine(&directory);
    let console = directory.path().join("console");
    let (digests, frames) = record(&args, &console);
    assert_eq!(std::fs::read(console).unwrap(), b"ok\n");
    assert!(
        frames.len() >= 400,
        "only {} entries: the clock was not read or no alarm came",
        frames.len()
    );
    for _ in 0..5 {
        assert_eq!(replay(&args, frames.clone()).unwrap(), (End::PowerOff, digests));
    }
    // A second recording meets other times: equal digests would mean that they measure nothing.
    let (other, _) = record(&args, &directory.path().join("console2"));
    assert_ne!(other, digests);
}

#[test]
fn another_time_than_the_recorded_one_is_a_divergence() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine(&directory);
    let (_, mut frames) = record(&args, &directory.path().join("console"));
    let changed = index_of_nth_time(&frames, 100);
    let mut frame = frames[changed].clone();
    let mut entry = Entry::decode(&frames[changed]).unwrap();
    if let Body::Time { now_ns, .. } = &mut entry.body {
        *now_ns += 1;
    }
    entry.encode(&mut frame);
    let lsn = entry.lsn;
    frames[changed] = frame;
    match replay(&args, frames) {
        Err(Error::Diverged(divergence)) => assert!(
            divergence.entry > lsn && divergence.entry <= Lsn(lsn.0 + 2),
            "{divergence}"
        ),
        other => panic!("not seen: {other:?}"),
    }
}

#[test]
fn a_flipped_byte_a_missing_entry_and_a_short_log_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine(&directory);
    let (_, frames) = record(&args, &directory.path().join("console"));
    let middle = frames.len() / 2;

    let mut flipped = frames.clone();
    flipped[middle][30] ^= 1;
    let error = replay(&args, flipped).unwrap_err();
    assert!(
        matches!(&error, Error::Log { after, .. } if *after == Lsn(middle as u64)),
        "{error}"
    );

    let mut missing = frames.clone();
    missing.remove(middle);
    assert!(matches!(replay(&args, missing), Err(Error::LogEnds(_))));

    let short = frames[..middle].to_vec();
    assert_eq!(replay(&args, short).unwrap().0, End::LogEnd);
}

#[test]
fn a_log_of_another_machine_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine(&directory);
    let (_, frames) = record(&args, &directory.path().join("console"));
    let other = MachineArgs {
        cmdline: "other".into(),
        ..args
    };
    let error = replay(&other, frames).unwrap_err();
    assert!(error.to_string().contains("different machine"), "{error}");
}

#[test]
fn a_guest_that_only_computes_gets_its_interrupts_and_replays() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &busy_guest());
    let (digests, frames) = record(&args, &directory.path().join("console"));
    let bodies = || frames.iter().map(|frame| Entry::decode(frame).unwrap().body);
    let states = bodies().filter(|body| matches!(body, Body::State { .. })).count();
    assert!(states >= 12, "{states} state deltas for 12 alarms");
    for _ in 0..5 {
        assert_eq!(replay(&args, frames.clone()).unwrap(), (End::PowerOff, digests));
    }
}

#[test]
fn a_log_that_ends_inside_a_state_delta_ends_before_it() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &busy_guest());
    let (_, frames) = record(&args, &directory.path().join("console"));
    let state = frames
        .iter()
        .rposition(|frame| matches!(Entry::decode(frame).unwrap().body, Body::State { .. }))
        .expect("the guest computes");
    assert!(matches!(
        Entry::decode(&frames[state - 1]).unwrap().body,
        Body::Pages { .. }
    ));
    assert_eq!(replay(&args, frames[..state].to_vec()).unwrap().0, End::LogEnd);
}

#[test]
fn pages_that_are_not_those_of_the_recording_are_a_divergence() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &busy_guest());
    let (_, frames) = record(&args, &directory.path().join("console"));
    let pages: Vec<usize> = (0..frames.len())
        .filter(|index| matches!(Entry::decode(&frames[*index]).unwrap().body, Body::Pages { .. }))
        .collect();
    // The last delta gets the pages of the one before it.
    let at = pages.len() - 1;
    let mut entry = Entry::decode(&frames[pages[at]]).unwrap();
    entry.body = Entry::decode(&frames[pages[at - 1]]).unwrap().body;
    let mut frame = vec![0; entry.body.frame_bytes()];
    entry.encode(&mut frame);
    let mut changed = frames.clone();
    changed[pages[at]] = frame;
    assert!(matches!(replay(&args, changed), Err(Error::Diverged(_))));
}

#[test]
fn the_hosts_msrs_are_answered_from_the_log_or_fault() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &msr_guest());
    let (digests, frames) = record(&args, &directory.path().join("console"));
    // One entry a reading of the counter; its value is in a register at the next exit, so a host's counter would be a divergence.
    index_of_nth_time(&frames, 49);
    assert_eq!(replay(&args, frames.clone()).unwrap(), (End::PowerOff, digests));
    let mut execution = replaying(&args, frames).unwrap();
    execution.run().unwrap();
    let faults = execution.vcpu().registers().r9;
    assert_eq!(
        faults, 350,
        "MPERF was read, KVM's clock set up, DEBUGCTL or DE_CFG read or written, or the last branch read"
    );
}

#[test]
fn a_position_clock_names_the_places_of_a_guest_that_only_computes() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &busy_guest());
    let clock = |seed| move |execution: &mut Execution| execution.set_clock(Box::new(StepClock::new(seed)));
    let (digests, frames) = record_with(&args, &directory.path().join("console"), clock(1));
    let bodies = || frames.iter().map(|frame| Entry::decode(frame).unwrap().body);
    assert!(
        !bodies().any(|body| matches!(body, Body::State { .. })),
        "a state delta"
    );
    let offsets: Vec<u32> = bodies()
        .filter_map(|body| match body {
            Body::Sync(stop) => Some(stop.position.offset),
            _ => None,
        })
        .collect();
    assert!(offsets.len() >= 12, "{offsets:?} for 12 alarms");
    // However late the overflows come, the replay finds the same places.
    for seed in 2..4 {
        let replayed = replay_with(&args, frames.clone(), clock(seed)).unwrap();
        assert_eq!(replayed, (End::PowerOff, digests), "seed {seed}");
    }
    let error = replay(&args, frames.clone()).unwrap_err();
    assert!(error.to_string().contains("no counter"), "{error}");

    // One instruction off is another place.
    let index = frames
        .iter()
        .position(|frame| matches!(Entry::decode(frame).unwrap().body, Body::Sync(stop) if stop.position.offset > 0))
        .unwrap();
    for change in [1u32, u32::MAX] {
        let mut entry = Entry::decode(&frames[index]).unwrap();
        if let Body::Sync(stop) = &mut entry.body {
            stop.position.offset = stop.position.offset.wrapping_add(change);
        }
        let mut frame = vec![0; entry.body.frame_bytes()];
        entry.encode(&mut frame);
        let mut changed = frames.clone();
        changed[index] = frame;
        let outcome = replay_with(&args, changed, clock(9));
        assert!(matches!(outcome, Err(Error::Diverged(_))), "{outcome:?}");
    }
}

#[test]
fn a_counter_of_branches_names_the_same_places_however_late_its_overflows_are() {
    const MARGIN: u32 = 2;
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &busy_guest());
    let clock = |seed, skid| {
        move |execution: &mut Execution| {
            execution.set_clock(Box::new(BranchClock::new(FakeCounter::new(seed, skid, 0), MARGIN)));
        }
    };
    let (digests, frames) = record_with(&args, &directory.path().join("console"), clock(1, 1));
    let bodies = || frames.iter().map(|frame| Entry::decode(frame).unwrap().body);
    let offsets: Vec<u32> = bodies()
        .filter_map(|body| match body {
            Body::Sync(stop) => Some(stop.position.offset),
            _ => None,
        })
        .collect();
    assert!(offsets.len() >= 12, "{offsets:?} for 12 alarms");
    assert!(
        offsets.iter().any(|offset| *offset > MARGIN),
        "{offsets:?}: no overflow has room"
    );
    for (seed, skid) in [(2, 1), (3, MARGIN)] {
        let replayed = replay_with(&args, frames.clone(), clock(seed, skid)).unwrap();
        assert_eq!(replayed, (End::PowerOff, digests), "late by less than {skid}");
    }
    // Later than the margin, the place is passed: that is seen.
    let outcome = replay_with(&args, frames, clock(5, 40 * MARGIN));
    assert!(matches!(outcome, Err(Error::Diverged(_))), "{outcome:?}");
}

/// A host that is busy with something else lets the patience end right behind an exit, where no branch has been made yet.
#[test]
fn a_place_without_a_count_of_its_own_is_not_stopped_at() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &busy_guest());
    let counter = |seed| FakeCounter::new(seed, 1, 0);
    let (digests, frames) = record_with(&args, &directory.path().join("console"), |execution| {
        let starving = counter(0).starving(Duration::from_millis(4));
        execution.set_clock(Box::new(BranchClock::new(starving, 2)));
        execution.set_patience(Duration::from_micros(200));
    });
    let replayed = replay_with(&args, frames, |execution| {
        execution.set_clock(Box::new(BranchClock::new(counter(2), 2)));
    });
    assert_eq!(replayed.unwrap(), (End::PowerOff, digests));
}

#[test]
fn a_counter_that_does_not_repeat_or_is_too_late_is_refused() {
    const MARGIN: u32 = 16;
    let kvm = open_kvm().unwrap();
    let tested = |skid, miscounts| {
        let mut clock = BranchClock::new(FakeCounter::new(7, skid, miscounts), MARGIN);
        branches::self_test(&kvm, &mut clock).unwrap()
    };
    assert_eq!(tested(1, 0), Ok(()));
    assert_eq!(tested(MARGIN, 0), Ok(()));
    let reason = tested(1, 1000).unwrap_err();
    assert!(reason.contains("were counted"), "{reason}");
    let reason = tested(10 * MARGIN, 0).unwrap_err();
    assert!(reason.contains("would be too much"), "{reason}");
}

#[test]
fn a_host_without_the_counter_refuses_the_mode_and_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine(&directory);
    let deltas = args.load().unwrap().fingerprint;
    let branches = MachineArgs {
        positions: Positions::Branches,
        ..args
    };
    match branches.load() {
        Ok(loaded) => assert_ne!(loaded.fingerprint, deltas, "a pair of one and the other"),
        Err(error) => {
            let text = error.to_string();
            assert!(
                text.starts_with("--positions branches: ") && text.contains("use state deltas"),
                "{text}"
            );
        }
    }
}

#[test]
fn an_unrecorded_guest_computes_the_same_and_leaves_no_log_to_replay() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &busy_guest());
    let console = directory.path().join("console");
    let (end, _, frames) = run_unrecorded(&args, &console);
    assert_eq!(end.unwrap(), End::PowerOff);
    assert_eq!(std::fs::read(console).unwrap(), b"ok\n");
    let names: Vec<_> = frames
        .iter()
        .map(|frame| Entry::decode(frame).unwrap().body.name())
        .collect();
    assert_eq!(names, ["boot", "power-off"]);
    let error = replay(&args, frames).unwrap_err();
    assert!(error.to_string().contains("different machine"), "{error}");
}

/// The time that the last entry of its kind shows to the guest.
fn last_time_ns(frames: &[Vec<u8>]) -> u64 {
    let mut times = frames
        .iter()
        .filter_map(|frame| match Entry::decode(frame).unwrap().body {
            Body::Time { now_ns, .. } => Some(now_ns),
            _ => None,
        });
    times.next_back().expect("the guest reads the time")
}

/// What a full log, a state delta or a stopped process does to the machine, wherever the guest is.
#[test]
fn while_the_machine_stands_still_the_guest_does_not_age() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine(&directory);
    let begun_ns = monotonic_ns();
    let mut stood_ns = 0;
    let (end, digests, frames) = run_recorded_by(&args, &directory.path().join("console"), |execution| {
        execution.start()?;
        for stop in 0.. {
            if stop == 100 {
                let stopped_ns = monotonic_ns();
                std::thread::sleep(Duration::from_secs(2));
                stood_ns = monotonic_ns() - stopped_ns;
            }
            if let Step::End(end) = execution.step()? {
                return Ok(end);
            }
        }
        unreachable!("the guest ends");
    });
    let host_ns = monotonic_ns() - begun_ns;
    assert_eq!(end.unwrap(), End::PowerOff);
    let aged_ns = last_time_ns(&frames);
    assert!(
        aged_ns <= host_ns - stood_ns + STANDSTILL_NS_MAX,
        "{aged_ns} ns of {host_ns}, {stood_ns} of them at one stop"
    );
    assert_eq!(replay(&args, frames).unwrap(), (End::PowerOff, digests));
}

#[test]
fn a_guest_that_nothing_wakes_is_told_of() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &halted_guest());
    let told = Arc::new(Mutex::new(Vec::new()));
    let (end, ..) = run_recorded(&args, &directory.path().join("console"), |execution, region| {
        let (told, region) = (Arc::clone(&told), Arc::clone(region));
        execution.set_on_asleep(Box::new(move |what| {
            told.lock().unwrap().push(what.to_owned());
            region.publish(Role::Halted, Generation(1), Lsn(0));
        }));
    });
    assert!(matches!(end, Err(Error::Ended(_))), "{end:?}");
    let told = told.lock().unwrap();
    let [what] = told.as_slice() else {
        panic!("{told:?}");
    };
    assert!(
        what.contains("at exit 1, RIP 0x100002: its interrupts are off"),
        "{what}"
    );
}

#[test]
fn an_interrupt_that_meets_a_fault_enters_behind_it() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &fault_guest());
    let (digests, frames) = record(&args, &directory.path().join("console"));
    let mut execution = replaying(&args, frames).unwrap();
    assert_eq!(execution.run().unwrap(), End::PowerOff);
    assert_eq!(execution.digests(), digests);
    let registers = execution.vcpu().registers();
    assert_eq!((registers.r8, registers.r9), (20, 20), "interrupts and faults");
    // Not every KVM forgets it: none is to get the chance.
    let faults: Vec<_> = execution
        .history()
        .all()
        .filter(|stop| stop.access.kind == AccessKind::MsrRead)
        .collect();
    assert_eq!(faults.len(), 20);
    for stop in faults {
        assert!(
            !stop.events().any(|event| matches!(event, Event::Interrupt { .. })),
            "{stop:?}"
        );
    }
}

#[test]
fn an_interrupt_enters_when_the_access_that_it_waits_at_is_over() {
    let directory = tempfile::tempdir().unwrap();
    let args = machine_of(&directory, &half_guest());
    let (digests, frames) = record(&args, &directory.path().join("console"));
    let mut execution = replaying(&args, frames).unwrap();
    assert_eq!(execution.run().unwrap(), End::PowerOff);
    assert_eq!(execution.digests(), digests);
    let registers = execution.vcpu().registers();
    assert_eq!((registers.r8, registers.r9), (60, 40), "interrupts and faults");
    let stops: Vec<_> = execution.history().all().collect();
    let interrupted = |stop: &StopRecord| stop.events().any(|event| matches!(event, Event::Interrupt { .. }));
    let inputs = stops
        .iter()
        .filter(|stop| stop.access.kind == AccessKind::PortRead && stop.access.bytes == 2);
    assert_eq!(inputs.clone().count(), 20);
    let loads = stops.iter().filter(|stop| stop.access.kind == AccessKind::MmioRead);
    for stop in inputs.chain(loads) {
        assert!(!interrupted(stop), "{stop:?}");
    }
    // Where the access ends well, the interrupt enters at its end, if no window let it in before.
    let behind = stops.iter().filter(|stop| interrupted(stop)).count();
    assert_eq!(behind, 60);
}
