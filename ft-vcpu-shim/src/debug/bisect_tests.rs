use ft_protocol::{DeviceId, Generation, Position};
use proptest::prelude::*;

use super::*;

struct Frames(std::vec::IntoIter<Vec<u8>>);

impl Source for Frames {
    fn next(&mut self, frame: &mut Vec<u8>) -> Result<Option<Generation>, Error> {
        match self.0.next() {
            Some(next) => {
                *frame = next;
                Ok(None)
            }
            None => Ok(Some(Generation(0))),
        }
    }

    fn finish(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

/// What a journal is made of, without borrowed parts.
#[derive(Clone, Debug)]
enum Planned {
    Kick(u8, u16),
    Input(u8, Vec<u8>),
    Deliver(u8, u64),
    Time(u64),
    Console(u32),
    Sync,
}

fn planned() -> impl Strategy<Value = Planned> {
    prop_oneof![
        (0..2u8, 0..2u16).prop_map(|(device, queue)| Planned::Kick(device, queue)),
        (0..2u8, proptest::collection::vec(any::<u8>(), 1..20))
            .prop_map(|(device, payload)| Planned::Input(device, payload)),
        (0..2u8, any::<u64>()).prop_map(|(device, through)| Planned::Deliver(device, through)),
        any::<u64>().prop_map(Planned::Time),
        any::<u32>().prop_map(Planned::Console),
        Just(Planned::Sync),
    ]
}

/// One entry's frame. `twist` changes one thing in it, which thing depends on its value.
fn frame(index: usize, planned: &Planned, twist: Option<u8>) -> Vec<u8> {
    let stop_twist = twist.filter(|twist| *twist < 4);
    let content_twist = u64::from(twist.is_some_and(|twist| twist >= 4));
    let mut stop = Stop {
        position: Position {
            exits: index as u64 + 1,
            offset: 0,
            rip: 0x10_0000,
            rcx: 7,
        },
        digest: index as u64 * 31,
    };
    match stop_twist {
        Some(0) => stop.digest ^= 1,
        Some(1) => stop.position.rip += 2,
        Some(2) => stop.position.rcx -= 1,
        Some(_) => stop.position.exits += 1,
        None => {}
    }
    let payload: Vec<u8>;
    let (device, queue, body) = match planned {
        Planned::Kick(device, queue) => (*device, *queue ^ content_twist as u16, Body::Kick(stop)),
        Planned::Input(device, bytes) => {
            payload = bytes.iter().map(|byte| byte ^ u8::from(twist.is_some())).collect();
            let sequence = index as u64;
            (
                *device,
                0,
                Body::Input {
                    sequence,
                    payload: &payload,
                },
            )
        }
        Planned::Deliver(device, through) => {
            let through = through ^ content_twist;
            (*device, 0, Body::Deliver { stop, through })
        }
        Planned::Time(now_ns) => {
            let now_ns = now_ns ^ content_twist;
            (DeviceId::SHIM.0, 0, Body::Time { stop, now_ns })
        }
        Planned::Console(bytes) => {
            let bytes = bytes ^ content_twist as u32;
            (DeviceId::SHIM.0, 0, Body::Console { stop, bytes })
        }
        Planned::Sync if content_twist == 1 => (DeviceId::SHIM.0, 0, Body::PowerOff { stop, reset: false }),
        Planned::Sync => (DeviceId::SHIM.0, 0, Body::Sync(stop)),
    };
    let entry = Entry {
        lsn: Lsn(index as u64 + 1),
        generation: Generation(1),
        device: DeviceId(device),
        queue,
        body,
    };
    let mut bytes = vec![0; entry.body.frame_bytes()];
    entry.encode(&mut bytes);
    bytes
}

fn compare(left: Vec<Vec<u8>>, right: Vec<Vec<u8>>) -> Compared {
    journals(&mut Frames(left.into_iter()), &mut Frames(right.into_iter())).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the two journals are beyond it, and however long each is: the planted entry is the one that is found.
    #[test]
    fn a_difference_planted_at_any_entry_is_found(
        entries in proptest::collection::vec(planned(), 1..40),
        twist in 0..8u8,
        longer in proptest::collection::vec(planned(), 0..5),
    ) {
        let good: Vec<_> = entries.iter().enumerate().map(|(index, entry)| frame(index, entry, None)).collect();
        for place in 0..entries.len() {
            let mut bad = good.clone();
            bad[place] = frame(place, &entries[place], Some(twist));
            bad.extend(longer.iter().enumerate().map(|(index, entry)| frame(good.len() + index, entry, None)));
            let Compared::Different(found) = compare(good.clone(), bad) else {
                return Err(TestCaseError::fail(format!("not found at {place}: {:?}", entries[place])));
            };
            prop_assert_eq!(found.left.lsn, Lsn(place as u64 + 1));
            prop_assert_eq!(found.right.lsn, found.left.lsn);
            prop_assert_eq!(found.before.len(), place.min(ENTRIES_KEPT));
            prop_assert_eq!(found.before.last().map(|entry| entry.lsn.0), (place > 0).then_some(place as u64));
        }
    }

    #[test]
    fn journals_of_different_lengths_are_the_same_as_far_as_both_go(entries in proptest::collection::vec(planned(), 0..40), cut in 0usize..40) {
        let all: Vec<_> = entries.iter().enumerate().map(|(index, entry)| frame(index, entry, None)).collect();
        let cut = cut.min(all.len());
        let short = all[..cut].to_vec();
        let (left, right) = (cut as u64, all.len() as u64);
        prop_assert_eq!(compare(short.clone(), all.clone()), Compared::Same { left, right });
        prop_assert_eq!(compare(all, short), Compared::Same { left: right, right: left });
    }
}

struct Script(VecDeque<StopRecord>, Option<StopRecord>);

impl Script {
    fn of(stops: &[StopRecord]) -> Self {
        Self(stops.iter().cloned().collect(), None)
    }
}

impl Side for Script {
    fn step(&mut self) -> Result<Option<&StopRecord>, Error> {
        self.1 = self.0.pop_front();
        Ok(self.1.as_ref())
    }
}

fn stops(count: u64) -> Vec<StopRecord> {
    use crate::{
        lockstep::history::{Access, Event, History},
        machine::vcpu::Exit,
    };
    let mut history = History::default();
    for exits in 1..=count {
        let position = Position {
            exits,
            ..Position::default()
        };
        history.begin(
            position,
            Access::of(&Exit::Halt, &[]),
            kvm_regs::default(),
            exits,
            Lsn(0),
        );
        history.event(Event::Time(exits));
        history.settled(exits, Lsn(0));
    }
    history.all().cloned().collect()
}

#[test]
fn a_difference_at_any_stop_is_found_and_named() {
    let good = stops(20);
    for place in 0..good.len() {
        type Plant = fn(&mut StopRecord);
        let plants: [(Plant, &str); 4] = [
            (|stop| stop.position.exits += 1, "has not"),
            (|stop| stop.registers.r9 = 1, "registers differ: r9"),
            (|stop| stop.digest ^= 1, "put out"),
            (|stop| stop.event_count += 1, "happened"),
        ];
        for (plant, said) in plants {
            let mut bad = good.clone();
            plant(&mut bad[place]);
            let found = side_by_side(&mut Script::of(&good), &mut Script::of(&bad), |_| None);
            let found = found.unwrap().expect("not found");
            assert_eq!(found.same, place as u64);
            assert!(found.what.contains(said), "{}", found.what);
        }
    }
    let shorter = side_by_side(&mut Script::of(&good), &mut Script::of(&good[..7]), |_| None);
    assert!(shorter.unwrap().is_none());
}
