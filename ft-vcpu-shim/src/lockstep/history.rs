//! The last stops of an execution, as it saw them: what a trace prints, and what a divergence is explained by.
//!
//! ```text
//!   exit ──► begin(access, registers) ─► event, event, ... ─► settled(digest) ──► the next exit
//!            └────────────────────────── one StopRecord ──────────────────────┘
//! ```
//! Always on, since nobody knows beforehand which stop will be asked for. A record has a fixed size and its place is used again:
//! a stop costs a copy of less than 400 bytes and no allocation.

use ft_protocol::{Generation, Lsn, Position};
use kvm_bindings::kvm_regs;

use crate::machine::vcpu::Exit;

/// Stops that are kept. A backup is one second behind at most before its primary is slowed down; this is more than a
/// second of a busy guest.
pub const STOPS_KEPT: usize = 16 * 1024;
/// Events of one stop that are kept; what is beyond is counted.
pub const EVENTS_KEPT: usize = 6;
/// Bytes of the data of one access that are kept.
pub const DATA_KEPT: usize = 8;

/// What the guest did that made it stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessKind {
    /// `out`.
    PortWrite,
    /// `in`.
    PortRead,
    /// Store to a device register.
    MmioWrite,
    /// Load from one.
    MmioRead,
    /// RDMSR of one that is the host's.
    MsrRead,
    /// WRMSR of one.
    MsrWrite,
    /// HLT.
    #[default]
    Halt,
    /// None: an interrupt could enter for which a window was wanted.
    Window,
    /// None: the guest had no stop of its own when something waited for it (a state delta).
    Forced,
    /// None: as before, at a place that a position clock named.
    Named,
    /// Anything else; the execution ends there.
    Other,
}

impl AccessKind {
    /// Name, as a trace shows it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PortWrite => "port-write",
            Self::PortRead => "port-read",
            Self::MmioWrite => "mmio-write",
            Self::MmioRead => "mmio-read",
            Self::MsrRead => "msr-read",
            Self::MsrWrite => "msr-write",
            Self::Halt => "halt",
            Self::Window => "window",
            Self::Forced => "state-delta",
            Self::Named => "position",
            Self::Other => "other",
        }
    }
}

/// The access of a stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// What it is.
    pub kind: AccessKind,
    /// Port, guest-physical address or MSR; 0 where there is none.
    pub address: u64,
    /// Bytes of the access, all units of a string access together.
    pub bytes: u32,
    data: [u8; DATA_KEPT],
}

impl Access {
    /// The access of `exit`, which wrote `data`.
    #[must_use]
    pub fn of(exit: &Exit, data: &[u8]) -> Self {
        let (kind, address) = match *exit {
            Exit::PortWrite { port, .. } => (AccessKind::PortWrite, u64::from(port)),
            Exit::PortRead { port, .. } => (AccessKind::PortRead, u64::from(port)),
            Exit::MmioWrite { address } => (AccessKind::MmioWrite, address),
            Exit::MmioRead { address } => (AccessKind::MmioRead, address),
            Exit::MsrRead { index } => (AccessKind::MsrRead, u64::from(index)),
            Exit::MsrWrite { index } => (AccessKind::MsrWrite, u64::from(index)),
            Exit::Halt => (AccessKind::Halt, 0),
            Exit::Window => (AccessKind::Window, 0),
            _ => (AccessKind::Other, 0),
        };
        let mut access = Self {
            kind,
            address,
            ..Self::default()
        };
        access.set_data(data);
        access
    }

    /// The stop of a guest that has none of its own.
    #[must_use]
    pub fn none(kind: AccessKind) -> Self {
        Self {
            kind,
            ..Self::default()
        }
    }

    /// What was written, or read as the answer; its first bytes if it is long.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data[..DATA_KEPT.min(self.bytes as usize)]
    }

    fn set_data(&mut self, data: &[u8]) {
        self.bytes = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let kept = data.len().min(DATA_KEPT);
        self.data[..kept].copy_from_slice(&data[..kept]);
    }
}

/// Something that happened at a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Virtual time moved, in ns since power-on.
    Time(u64),
    /// The guest notified a queue.
    Kick {
        /// Device.
        device: u8,
        /// Queue.
        queue: u16,
    },
    /// Inputs of a device reached guest memory.
    Deliver {
        /// Device.
        device: u8,
        /// Up to this sequence number.
        through: u64,
    },
    /// Console bytes were complete.
    Console {
        /// How many.
        bytes: u32,
    },
    /// An interrupt entered the guest.
    Interrupt {
        /// Its vector.
        vector: u8,
    },
    /// The guest powered off, or reset itself.
    PowerOff {
        /// A reset.
        reset: bool,
    },
    /// The log was over and this side went on.
    Live {
        /// In this generation.
        generation: Generation,
    },
}

/// One stop.
#[derive(Clone, Debug)]
pub struct StopRecord {
    /// Where.
    pub position: Position,
    /// What the guest did.
    pub access: Access,
    /// General registers at the exit. What a load reads is not in them yet.
    pub registers: kvm_regs,
    /// Rolling digest after everything at this stop; before, as long as it is not settled.
    pub digest: u64,
    /// Last log entry that had been applied or written.
    pub entry: Lsn,
    /// Whether an entry belongs to this very stop.
    pub logged: bool,
    events: [Option<Event>; EVENTS_KEPT],
    /// How many events there were.
    pub event_count: u32,
}

// What the promise at the top of this module rests on.
const _: () = assert!(size_of::<StopRecord>() <= 384);

impl StopRecord {
    /// What happened here, in order; the first [`EVENTS_KEPT`].
    pub fn events(&self) -> impl Iterator<Item = Event> + '_ {
        self.events.iter().flatten().copied()
    }
}

/// The last stops.
#[derive(Clone, Debug, Default)]
pub struct History {
    records: Vec<StopRecord>,
    /// Stops ever begun.
    begun: usize,
    before: Lsn,
}

impl History {
    /// A stop begins. `entry` is the last entry before it, `digest` the state of the guest here.
    pub fn begin(&mut self, position: Position, access: Access, registers: kvm_regs, digest: u64, entry: Lsn) {
        let record = StopRecord {
            position,
            access,
            registers,
            digest,
            entry,
            logged: false,
            events: [None; EVENTS_KEPT],
            event_count: 0,
        };
        if self.records.len() < STOPS_KEPT {
            self.records.push(record);
        } else {
            self.records[self.begun % STOPS_KEPT] = record;
        }
        self.begun += 1;
        self.before = entry;
    }

    fn current(&mut self) -> Option<&mut StopRecord> {
        let index = self.begun.checked_sub(1)? % STOPS_KEPT;
        self.records.get_mut(index)
    }

    /// The guest's load was answered with `data`.
    pub fn answered(&mut self, data: &[u8]) {
        if let Some(record) = self.current() {
            record.access.set_data(data);
        }
    }

    /// Something happened at the current stop.
    pub fn event(&mut self, event: Event) {
        if let Some(record) = self.current() {
            if let Some(place) = record.events.get_mut(record.event_count as usize) {
                *place = Some(event);
            }
            record.event_count += 1;
        }
    }

    /// Everything at the current stop has happened.
    pub fn settled(&mut self, digest: u64, entry: Lsn) {
        let before = self.before;
        if let Some(record) = self.current() {
            record.digest = digest;
            record.entry = entry;
            record.logged = entry > before;
        }
    }

    /// The stop at which the execution is.
    #[must_use]
    pub fn last(&self) -> Option<&StopRecord> {
        self.tail(1).next()
    }

    /// The last `count` stops, oldest first; fewer if there were fewer or they are not kept any more.
    pub fn tail(&self, count: usize) -> impl Iterator<Item = &StopRecord> {
        let count = count.min(self.records.len());
        (self.begun - count..self.begun).map(|stop| &self.records[stop % STOPS_KEPT])
    }

    /// All stops that are kept, oldest first.
    pub fn all(&self) -> impl Iterator<Item = &StopRecord> {
        self.tail(STOPS_KEPT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stop(history: &mut History, exits: u64) {
        let position = Position {
            exits,
            ..Position::default()
        };
        let access = Access::of(&Exit::PortWrite { port: 0x3f8, size: 1 }, b"x");
        history.begin(position, access, kvm_regs::default(), exits, Lsn(exits / 2));
    }

    #[test]
    fn the_last_stops_are_kept_in_order_and_no_more() {
        let mut history = History::default();
        assert!(history.last().is_none());
        let stops = STOPS_KEPT as u64 + 10;
        (1..=stops).for_each(|exits| stop(&mut history, exits));
        let exits: Vec<u64> = history.all().map(|record| record.position.exits).collect();
        assert_eq!(exits, (11..=stops).collect::<Vec<_>>());
        assert_eq!(history.last().map(|record| record.position.exits), Some(stops));
        assert_eq!(history.tail(2).count(), 2);
    }

    #[test]
    fn events_beyond_the_limit_are_counted_and_a_logged_stop_is_marked() {
        let mut history = History::default();
        stop(&mut history, 1);
        for vector in 0..=EVENTS_KEPT as u8 {
            history.event(Event::Interrupt { vector });
        }
        history.settled(7, Lsn(3));
        let record = history.last().unwrap();
        assert_eq!(
            (record.event_count as usize, record.events().count()),
            (EVENTS_KEPT + 1, EVENTS_KEPT)
        );
        assert_eq!((record.digest, record.entry, record.logged), (7, Lsn(3), true));
        stop(&mut history, 2);
        history.settled(8, Lsn(1));
        assert!(!history.last().unwrap().logged, "no entry since the stop began");
    }

    #[test]
    fn long_data_is_cut_and_an_answer_replaces_it() {
        let mut access = Access::of(&Exit::PortWrite { port: 1, size: 1 }, &[9; 20]);
        assert_eq!((access.bytes, access.data()), (20, &[9; DATA_KEPT][..]));
        access.set_data(&[1, 2]);
        assert_eq!(access.data(), [1, 2]);
    }
}
