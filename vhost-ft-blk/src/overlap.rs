//! Which request may start: requests that touch the same sectors, one of them writing, run in the order of their arrival.
//!
//! Their order decides what is on the disk afterwards, so the two hosts must not choose it differently (paper §3.2). A flush
//! waits for the writes before it.

use std::{collections::VecDeque, ops::Range};

/// How a request touches the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads these sectors.
    Read(Range<u64>),
    /// Writes these sectors.
    Write(Range<u64>),
    /// Makes what was written last.
    Flush,
}

impl Access {
    /// Whether a request of this kind must wait for `earlier`.
    fn waits_for(&self, earlier: &Self) -> bool {
        let overlap = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        match (earlier, self) {
            (Self::Write(_), Self::Flush) => true,
            (Self::Write(earlier), Self::Read(later) | Self::Write(later))
            | (Self::Read(earlier), Self::Write(later)) => overlap(earlier, later),
            _ => false,
        }
    }
}

#[derive(Debug)]
struct Entry {
    id: u64,
    access: Access,
    /// Earlier unfinished requests it waits for.
    waits_for: usize,
}

/// The unfinished requests, in the order of their arrival.
#[derive(Debug, Default)]
pub struct Schedule {
    entries: VecDeque<Entry>,
}

impl Schedule {
    /// A request arrives; `true` if it may start now.
    pub fn arrive(&mut self, id: u64, access: Access) -> bool {
        let waits_for = self
            .entries
            .iter()
            .filter(|earlier| access.waits_for(&earlier.access))
            .count();
        self.entries.push_back(Entry { id, access, waits_for });
        waits_for == 0
    }

    /// A request that had started is finished; appends those that may start now to `startable`, in the order of their arrival.
    ///
    /// # Panics
    /// If `id` had not arrived or not started.
    pub fn finish(&mut self, id: u64, startable: &mut Vec<u64>) {
        let place = self.entries.iter().position(|entry| entry.id == id);
        let place = place.expect("a request finishes once, after it arrived");
        let finished = self.entries.remove(place).expect("the place was just found");
        assert_eq!(finished.waits_for, 0, "request {id} finished before it could start");
        for later in self.entries.range_mut(place..) {
            if later.access.waits_for(&finished.access) {
                later.waits_for -= 1;
                if later.waits_for == 0 {
                    startable.push(later.id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_access() -> impl Strategy<Value = Access> {
        let range = (0u64..24, 1u64..6).prop_map(|(start, length)| start..start + length);
        prop_oneof![
            range.clone().prop_map(Access::Read),
            range.prop_map(Access::Write),
            Just(Access::Flush)
        ]
    }

    /// The oracle: a disk on which requests run one after the other, in the order of their arrival. What a read returns and a
    /// flush covers is the version (id) of each sector.
    fn in_order(accesses: &[Access]) -> Vec<Vec<usize>> {
        let mut disk = vec![usize::MAX; 32];
        let perform = |(id, access): (usize, &Access)| perform(&mut disk, id, access);
        accesses.iter().enumerate().map(perform).collect()
    }

    fn perform(disk: &mut [usize], id: usize, access: &Access) -> Vec<usize> {
        match access {
            Access::Read(range) => disk[range.start as usize..range.end as usize].to_vec(),
            Access::Write(range) => {
                disk[range.start as usize..range.end as usize].fill(id);
                Vec::new()
            }
            Access::Flush => Vec::new(),
        }
    }

    proptest! {
        /// Requests arrive and finish in any order the schedule allows; each takes effect when it finishes. Reads see, and the
        /// disk ends with, what the oracle says; a flush finishes after every earlier write.
        #[test]
        fn any_allowed_order_equals_the_order_of_arrival(accesses in proptest::collection::vec(any_access(), 1..40), picks in proptest::collection::vec(any::<prop::sample::Index>(), 80)) {
            let expected = in_order(&accesses);
            let mut schedule = Schedule::default();
            let mut disk = vec![usize::MAX; 32];
            let (mut arrived, mut running, mut finished) = (0, Vec::new(), Vec::new());
            let mut picks = picks.into_iter();
            while finished.len() < accesses.len() {
                let choices = running.len() + usize::from(arrived < accesses.len());
                prop_assert!(choices != 0, "nothing can go on");
                let pick = picks.next().map_or(choices - 1, |pick| pick.index(choices));
                if pick == running.len() {
                    if schedule.arrive(arrived as u64, accesses[arrived].clone()) {
                        running.push(arrived as u64);
                    }
                    arrived += 1;
                    continue;
                }
                let id = running.swap_remove(pick);
                let seen = perform(&mut disk, id as usize, &accesses[id as usize]);
                prop_assert_eq!(&seen, &expected[id as usize]);
                if accesses[id as usize] == Access::Flush {
                    let earlier_writes = (0..id).filter(|earlier| matches!(accesses[*earlier as usize], Access::Write(_)));
                    for earlier in earlier_writes {
                        prop_assert!(finished.contains(&earlier));
                    }
                }
                finished.push(id);
                schedule.finish(id, &mut running);
            }
            let mut whole = vec![usize::MAX; 32];
            for (id, access) in accesses.iter().enumerate() {
                perform(&mut whole, id, access);
            }
            prop_assert_eq!(disk, whole);
        }
    }

    #[test]
    fn requests_that_do_not_touch_run_together() {
        let mut schedule = Schedule::default();
        assert!(schedule.arrive(0, Access::Write(0..8)));
        assert!(schedule.arrive(1, Access::Write(8..16)));
        assert!(schedule.arrive(2, Access::Read(16..24)));
        assert!(schedule.arrive(3, Access::Read(16..17)));
        assert!(!schedule.arrive(4, Access::Read(7..9)));
        let mut startable = Vec::new();
        schedule.finish(1, &mut startable);
        assert!(startable.is_empty());
        schedule.finish(0, &mut startable);
        assert_eq!(startable, [4]);
    }
}
