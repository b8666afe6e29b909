//! One order out of many rings: entries are taken by LSN, each from the ring that has the next one.
//!
//! Nothing that a client wrote is trusted: every frame is copied out, its checksum, generation and LSN are checked, and a
//! client that broke the rules is named.

use std::collections::VecDeque;

use ft_client::ring::{Consumer, RingError};
use ft_protocol::{
    Timing,
    entry::{self, Body, Entry, KIND_CONFIGURATION, KIND_POWER_OFF, KIND_SYNCED},
    frame::FrameError,
    ids::{Generation, Lsn},
    message::Message,
};
use thiserror::Error;

/// Bytes that one batch collects before it is handed on.
const BATCH_BYTES: usize = 256 * 1024;
/// An LSN that was claimed and not published for so long stops its VM for good.
const GAP_NS_MAX: u64 = 5_000_000_000;

/// What a client did.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Breach {
    /// Its ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A frame in it.
    #[error("entry {lsn} is damaged: {source}")]
    Frame {
        /// The LSN that was expected.
        lsn: Lsn,
        /// What is wrong.
        source: FrameError,
    },
    /// An LSN that was there already.
    #[error("entry {found} was appended where {expected} is the next one")]
    Order {
        /// Its LSN.
        found: Lsn,
        /// The next one.
        expected: Lsn,
    },
    /// An entry of another generation.
    #[error("entry {lsn} is of generation {found}, this is generation {current}")]
    Generation {
        /// Which entry.
        lsn: Lsn,
        /// Its generation.
        found: Generation,
        /// This one.
        current: Generation,
    },
    /// An entry that is not a client's to write.
    #[error("entry {lsn} is a {name}, which only ft-log itself writes")]
    Reserved {
        /// Which entry.
        lsn: Lsn,
        /// Its kind.
        name: &'static str,
    },
    /// An entry where this side writes none.
    #[error("it appended an entry while this side does not execute")]
    Uninvited,
    /// An entry far ahead of what anybody else appended.
    #[error("it appended entry {found}, but {expected} has not come for seconds")]
    Gap {
        /// Its LSN.
        found: Lsn,
        /// The missing one.
        expected: Lsn,
    },
}

/// A client, by its place among the rings, and what it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Whose ring.
    pub seat: usize,
    /// What.
    pub breach: Breach,
}

/// Entries that were taken in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// First LSN.
    pub from: Lsn,
    /// Last LSN.
    pub through: Lsn,
    /// The guest's power-off, if it is among them.
    pub power_off: Option<Lsn>,
    /// The last of the configurations among them.
    pub configuration: Option<(Lsn, Timing)>,
    /// The word that a new backup may take over, if it is among them, and which backup is meant.
    pub synced: Option<(Lsn, u64)>,
}

/// The rings of a VM's local clients.
#[derive(Debug)]
pub struct Merger {
    rings: Vec<Consumer>,
    /// What `ft-log` itself writes.
    own: VecDeque<(Lsn, Vec<u8>)>,
    next: Lsn,
    recent: usize,
    gap: Option<(Lsn, u64)>,
}

impl Merger {
    /// Merges `rings`, from LSN 1.
    #[must_use]
    pub fn new(rings: Vec<Consumer>) -> Self {
        Self {
            rings,
            own: VecDeque::new(),
            next: Lsn(1),
            recent: 0,
            gap: None,
        }
    }

    /// The LSN that is expected next.
    #[must_use]
    pub fn next(&self) -> Lsn {
        self.next
    }

    /// A new generation's log starts at `next`.
    pub fn restart(&mut self, next: Lsn) {
        self.next = next;
        self.gap = None;
        self.own.clear();
    }

    /// Puts an entry of `ft-log` itself, for which it claimed `lsn`, among those of the clients.
    pub fn insert(&mut self, lsn: Lsn, frame: Vec<u8>) {
        self.own.push_back((lsn, frame));
    }

    fn is_own_next(&self) -> bool {
        self.own.front().is_some_and(|(lsn, _)| *lsn == self.next)
    }

    /// Tells the producers whether this side is about to sleep.
    pub fn set_sleeping(&self, sleeping: bool) {
        self.rings.iter().for_each(|ring| ring.set_sleeping(sleeping));
    }

    /// Whether [`Merger::take`] would give something (a violation included).
    pub fn is_ready(&mut self) -> bool {
        self.is_own_next() || !matches!(self.find(), Ok(None))
    }

    /// Whether somebody waits behind an entry that is claimed and not there yet.
    pub fn has_gap(&mut self) -> bool {
        let waits = |ring: &mut Consumer| matches!(ring.is_empty(), Ok(false));
        self.rings.iter_mut().any(waits) && !self.is_ready()
    }

    /// Whether nobody appended anything.
    ///
    /// # Errors
    /// Who did, or broke a ring.
    pub fn check_empty(&mut self) -> Result<(), Violation> {
        for (seat, ring) in self.rings.iter_mut().enumerate() {
            let breach = match ring.is_empty() {
                Ok(true) => continue,
                Ok(false) => Breach::Uninvited,
                Err(error) => error.into(),
            };
            return Err(Violation { seat, breach });
        }
        Ok(())
    }

    /// The ring that has the next entry.
    fn find(&mut self) -> Result<Option<usize>, Violation> {
        for seat in (self.recent..self.rings.len()).chain(0..self.recent) {
            let violation = |breach| Violation { seat, breach };
            match self.rings[seat].peek_lsn() {
                Err(error) => return Err(violation(error.into())),
                Ok(Some(lsn)) if lsn == self.next.0 => return Ok(Some(seat)),
                Ok(Some(lsn)) if lsn < self.next.0 => {
                    return Err(violation(Breach::Order {
                        found: Lsn(lsn),
                        expected: self.next,
                    }));
                }
                Ok(_) => {}
            }
        }
        Ok(None)
    }

    /// Appends the frame of the next entry to `out` and gives the ring it was in. Mostly that is the ring of the one before: it is not
    /// looked for.
    #[inline]
    fn take_next(&mut self, out: &mut Vec<u8>) -> Result<Option<usize>, Violation> {
        let next = self.next.0;
        let mut take = |rings: &mut [Consumer], seat: usize| {
            let taken = rings.get_mut(seat).map_or(Ok(None), |ring| ring.take_lsn(next, out));
            let breach = |error: RingError| Violation {
                seat,
                breach: error.into(),
            };
            Ok(taken.map_err(breach)?.map(|_| seat))
        };
        if let Some(seat) = take(&mut self.rings, self.recent)? {
            return Ok(Some(seat));
        }
        match self.find()? {
            Some(seat) => take(&mut self.rings, seat),
            None => Ok(None),
        }
    }

    /// Appends the frames of the next entries to `out`. Entries of the generation before `current` are taken too if
    /// `previous_too`: they were written while the generation changed.
    ///
    /// # Errors
    /// Who broke the rules, and how; what was taken before is in `out`.
    pub fn take(
        &mut self,
        current: Generation,
        previous_too: bool,
        out: &mut Vec<u8>,
    ) -> Result<Option<Batch>, Violation> {
        let taken = self.collect(current, previous_too, out);
        self.rings.iter_mut().for_each(Consumer::release);
        taken
    }

    fn collect(
        &mut self,
        current: Generation,
        previous_too: bool,
        out: &mut Vec<u8>,
    ) -> Result<Option<Batch>, Violation> {
        let start = out.len();
        let from = self.next;
        let (mut power_off, mut configuration, mut synced) = (None, None, None);
        while out.len() - start < BATCH_BYTES {
            if self.is_own_next()
                && let Some((lsn, frame)) = self.own.pop_front()
            {
                match Entry::decode(&frame).map(|entry| entry.body) {
                    Ok(Body::Configuration(timing)) => configuration = Some((lsn, timing)),
                    Ok(Body::Synced { instance }) => synced = Some((lsn, instance)),
                    _ => {}
                }
                out.extend_from_slice(&frame);
                self.next = lsn.next();
                continue;
            }
            let (lsn, at) = (self.next, out.len());
            let Some(seat) = self.take_next(out)? else { break };
            let violation = |breach| Violation { seat, breach };
            let header = entry::check(&out[at..]).map_err(|source| violation(Breach::Frame { lsn, source }))?;
            if header.lsn != lsn {
                return Err(violation(Breach::Order {
                    found: header.lsn,
                    expected: lsn,
                }));
            }
            let found = header.generation;
            if found != current && !(previous_too && found.0.checked_add(1) == Some(current.0)) {
                return Err(violation(Breach::Generation { lsn, found, current }));
            }
            match header.kind {
                KIND_POWER_OFF => power_off = Some(lsn),
                KIND_SYNCED | KIND_CONFIGURATION => {
                    let name = Entry::decode(&out[at..]).map_or("unknown", |entry| entry.body.name());
                    return Err(violation(Breach::Reserved { lsn, name }));
                }
                _ => {}
            }
            self.recent = seat;
            self.next = lsn.next();
        }
        if self.next == from {
            return Ok(None);
        }
        self.gap = None;
        let through = Lsn(self.next.0 - 1);
        Ok(Some(Batch {
            from,
            through,
            power_off,
            configuration,
            synced,
        }))
    }

    /// New backup: the next message that a client has for the survivor, appended to `out`; gives whether there is one.
    ///
    /// # Errors
    /// Who broke the rules, and how.
    pub fn take_digests(&mut self, out: &mut Vec<u8>) -> Result<bool, Violation> {
        for (seat, ring) in self.rings.iter_mut().enumerate() {
            let start = out.len();
            let popped = ring.pop(out).map_err(|error| Violation {
                seat,
                breach: error.into(),
            })?;
            if popped.is_none() {
                continue;
            }
            return match Message::decode(&out[start..]) {
                Ok((_, Message::Digests { .. })) => Ok(true),
                _ => Err(Violation {
                    seat,
                    breach: Breach::Uninvited,
                }),
            };
        }
        Ok(false)
    }

    /// Looks whether somebody waits behind an entry that never comes.
    ///
    /// # Errors
    /// The client that is ahead.
    pub fn check_gap(&mut self, now_ns: u64) -> Result<(), Violation> {
        let waits = |ring: &mut Consumer| !matches!(ring.is_empty(), Ok(true));
        let waiting = self.rings.iter_mut().position(waits);
        let Some(seat) = waiting else {
            self.gap = None;
            return Ok(());
        };
        match self.gap {
            Some((expected, since)) if expected == self.next => {
                if now_ns >= since + GAP_NS_MAX
                    && let Ok(Some(found)) = self.rings[seat].peek_lsn()
                    && found > expected.0
                {
                    let found = Lsn(found);
                    return Err(Violation {
                        seat,
                        breach: Breach::Gap { found, expected },
                    });
                }
            }
            _ => self.gap = Some((self.next, now_ns)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ft_client::ring::{self, Producer};
    use ft_protocol::{DeviceId, Stop};

    use super::*;

    fn rings(count: usize) -> (Vec<Producer>, Merger) {
        let ring = |_| {
            let memory = ring::create("test").unwrap();
            let other = memory.fd().try_clone_to_owned().unwrap();
            (Producer::on(memory), Consumer::new(other).unwrap())
        };
        let (producers, consumers) = (0..count).map(ring).unzip();
        (producers, Merger::new(consumers))
    }

    fn push(producer: &mut Producer, lsn: u64, generation: u32, body: Body<'_>) {
        let entry = Entry {
            lsn: Lsn(lsn),
            generation: Generation(generation),
            device: DeviceId(0),
            queue: 0,
            body,
        };
        producer.push(body.frame_bytes(), |out| {
            entry.encode(out);
        });
    }

    const SYNC: Body<'_> = Body::Sync(Stop {
        position: ft_protocol::Position {
            exits: 0,
            offset: 0,
            rip: 0,
            rcx: 0,
        },
        digest: 0,
    });

    fn breach(merger: &mut Merger, current: u32) -> Violation {
        merger.take(Generation(current), false, &mut Vec::new()).unwrap_err()
    }

    #[test]
    fn entries_come_out_dense_whatever_ring_they_are_in() {
        let (mut producers, mut merger) = rings(3);
        let mut out = Vec::new();
        let mut take = |merger: &mut Merger| merger.take(Generation(1), false, &mut out).unwrap();
        push(&mut producers[2], 2, 1, SYNC);
        assert!(!merger.is_ready() && merger.has_gap(), "entry 1 is not there yet");
        assert_eq!(take(&mut merger), None);
        push(&mut producers[0], 1, 1, SYNC);
        push(&mut producers[2], 3, 1, SYNC);
        push(
            &mut producers[1],
            4,
            1,
            Body::PowerOff {
                stop: Stop::default(),
                reset: false,
            },
        );
        assert!(merger.is_ready() && !merger.has_gap());
        let batch = take(&mut merger).unwrap();
        assert_eq!(
            (batch.from, batch.through, batch.power_off),
            (Lsn(1), Lsn(4), Some(Lsn(4)))
        );
        assert_eq!(take(&mut merger), None);
        assert_eq!(merger.next(), Lsn(5));
        assert_eq!(merger.check_empty(), Ok(()));
    }

    #[test]
    fn what_ft_log_writes_itself_has_its_place_and_clients_may_not_write_it() {
        let timing = Timing {
            heartbeat_interval_ns: 20_000_000,
            heartbeat_misses: 10,
            channel_timeout_ns: 80_000_000,
            replay_timeout_ns: 100_000_000,
            lag_target_ns: 1_000_000,
            lag_limit_ns: 2_000_000,
        };
        let (mut producers, mut merger) = rings(1);
        let body = Body::Configuration(timing);
        let mut frame = vec![0; body.frame_bytes()];
        let own = Entry {
            lsn: Lsn(2),
            generation: Generation(1),
            device: DeviceId::SHIM,
            queue: 0,
            body,
        };
        own.encode(&mut frame);
        merger.insert(Lsn(2), frame);
        assert!(!merger.is_ready(), "entry 1 is not there yet");
        push(&mut producers[0], 1, 1, SYNC);
        push(&mut producers[0], 3, 1, SYNC);
        let mut out = Vec::new();
        let batch = merger.take(Generation(1), false, &mut out).unwrap().unwrap();
        assert_eq!((batch.from, batch.through), (Lsn(1), Lsn(3)));
        assert_eq!(batch.configuration, Some((Lsn(2), timing)));
        assert_eq!(Entry::decode(&out[SYNC.frame_bytes()..][..body.frame_bytes()]), Ok(own));

        for (lsn, body) in [(4, body), (4, Body::Synced { instance: 1 })] {
            let (mut producers, mut merger) = rings(1);
            merger.restart(Lsn(lsn));
            push(&mut producers[0], lsn, 1, body);
            assert!(matches!(
                breach(&mut merger, 1).breach,
                Breach::Reserved { lsn: Lsn(4), .. }
            ));
        }
    }

    #[test]
    fn only_while_the_generation_changes_the_one_before_is_taken() {
        let (mut producers, mut merger) = rings(1);
        push(&mut producers[0], 1, 1, SYNC);
        push(&mut producers[0], 2, 2, SYNC);
        let batch = merger.take(Generation(2), true, &mut Vec::new()).unwrap().unwrap();
        assert_eq!(batch.through, Lsn(2));
        push(&mut producers[0], 3, 1, SYNC);
        let Violation { seat, breach } = breach(&mut merger, 2);
        assert_eq!(seat, 0);
        assert!(matches!(
            breach,
            Breach::Generation {
                found: Generation(1),
                ..
            }
        ));
    }

    #[test]
    fn a_new_backups_client_says_digests_and_nothing_else() {
        let (mut producers, mut merger) = rings(2);
        let mut out = Vec::new();
        assert_eq!(merger.take_digests(&mut out), Ok(false));
        let mut frame = Vec::new();
        let digests = vec![[3; 16]; 2];
        Message::Digests { sector: 8, digests }.encode(Generation(2), &mut frame);
        producers[1].push(frame.len(), |out| out.copy_from_slice(&frame));
        assert_eq!(merger.take_digests(&mut out), Ok(true));
        assert_eq!(out, frame);
        push(&mut producers[1], 1, 2, SYNC);
        assert_eq!(merger.take_digests(&mut out).unwrap_err().breach, Breach::Uninvited);
    }

    #[test]
    fn a_gap_is_somebodys_fault_only_after_a_while() {
        let (mut producers, mut merger) = rings(2);
        push(&mut producers[1], 2, 1, SYNC);
        assert_eq!(merger.check_gap(0), Ok(()));
        assert_eq!(merger.check_gap(GAP_NS_MAX - 1), Ok(()));
        assert_eq!(merger.check_gap(GAP_NS_MAX).unwrap_err().seat, 1);
        // The missing one came: the clock starts anew.
        push(&mut producers[0], 1, 1, SYNC);
        merger.take(Generation(1), false, &mut Vec::new()).unwrap();
        assert_eq!(merger.check_gap(GAP_NS_MAX), Ok(()));
        // A new generation begins with another LSN.
        merger.restart(Lsn(1));
        push(&mut producers[0], 1, 2, SYNC);
        assert!(merger.is_ready());
    }

    #[test]
    fn an_entry_where_none_is_expected_names_its_writer() {
        let (mut producers, mut merger) = rings(2);
        push(&mut producers[1], 1, 1, SYNC);
        let violation = merger.check_empty().unwrap_err();
        assert_eq!((violation.seat, violation.breach), (1, Breach::Uninvited));
    }
}
