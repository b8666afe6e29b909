//! The first place at which two journals, or two executions, are not the same.
//!
//! ```text
//!   journals     entry by entry: stop, digest, content          ──► the first entry that differs
//!   executions   stop by stop, both at once: position, digest,
//!                access, registers, what happened               ──► the first stop that differs, logged or not
//! ```
//! Digests roll: a difference at one stop is in all that follow, so nothing is missed between two logged stops. Both executions run
//! side by side once, rather than again and again to a halved distance: a replay cannot go backwards, and one pass over
//! both costs as much as the first halving.

use std::collections::VecDeque;

use ft_protocol::{Body, FrameError, Lsn, Stop, entry::Entry};
use kvm_bindings::kvm_regs;

use super::registers;
use crate::{
    error::Error,
    lockstep::{
        divergence::difference,
        execution::{End, Execution, Step},
        history::StopRecord,
        source::Source,
    },
};

/// Entries before a difference that are kept for a report.
const ENTRIES_KEPT: usize = 8;

/// An entry in brief.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Brief {
    /// Its LSN.
    pub lsn: Lsn,
    /// Its kind.
    pub kind: &'static str,
    /// Where it applies, if it says so.
    pub stop: Option<Stop>,
    /// What it says.
    pub content: String,
}

impl Brief {
    fn of(entry: &Entry<'_>) -> Self {
        let device = entry.device.0;
        let content = match entry.body {
            Body::Boot { wall_ns, devices, .. } => {
                format!("wall clock {wall_ns} ns, {} bytes of devices", devices.len())
            }
            Body::Kick(_) => format!("device {device} queue {}", entry.queue),
            Body::Input { sequence, payload } => format!(
                "device {device} queue {} input {sequence}, {} bytes, digest {:016x}",
                entry.queue,
                payload.len(),
                xxhash_rust::xxh3::xxh3_64(payload)
            ),
            Body::Deliver { through, .. } => format!("device {device} through {through}"),
            Body::Time { now_ns, .. } => format!("{now_ns} ns"),
            Body::Console { bytes, .. } => format!("{bytes} bytes"),
            Body::PowerOff { reset: true, .. } => "reset".into(),
            Body::Pages { payload } | Body::State { payload, .. } => format!(
                "{} bytes, digest {:016x}",
                payload.len(),
                xxhash_rust::xxh3::xxh3_64(payload)
            ),
            _ => String::new(),
        };
        Self {
            lsn: entry.lsn,
            kind: entry.body.name(),
            stop: entry.body.stop(),
            content,
        }
    }
}

/// The first entry that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryDifference {
    /// What differs.
    pub what: &'static str,
    /// The entry of the first journal.
    pub left: Brief,
    /// That of the second.
    pub right: Brief,
    /// The last entries that both have.
    pub before: Vec<Brief>,
}

/// How two journals compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compared {
    /// They are the same as far as both go.
    Same {
        /// Entries of the first.
        left: u64,
        /// Entries of the second.
        right: u64,
    },
    /// They differ.
    Different(Box<EntryDifference>),
}

/// What differs between two entries; `None` if nothing does.
fn entry_difference(left: &Entry<'_>, right: &Entry<'_>) -> Option<&'static str> {
    if let (Some(one), Some(other)) = (left.body.stop(), right.body.stop())
        && let Some(what) = difference(&one, &other)
    {
        return Some(what);
    }
    if (left.lsn, left.device, left.queue, &left.body) == (right.lsn, right.device, right.queue, &right.body) {
        return None;
    }
    Some(match (&left.body, &right.body) {
        (Body::Boot { fingerprint: one, .. }, Body::Boot { fingerprint: other, .. }) if one != other => {
            "they are of different machines"
        }
        (Body::Boot { wall_ns: one, .. }, Body::Boot { wall_ns: other, .. }) if one != other => {
            "the machines were powered on at different times"
        }
        (Body::Boot { .. }, Body::Boot { .. }) => "the machines have different devices",
        (Body::Time { .. }, Body::Time { .. }) => "the time differs",
        (Body::Input { .. }, Body::Input { .. }) => "the input differs",
        (Body::Deliver { .. }, Body::Deliver { .. }) => "other inputs are delivered",
        (Body::Console { .. }, Body::Console { .. }) => "the console's output differs",
        (one, other) if one.name() != other.name() => "they are of different kinds",
        _ => "the device or queue differs",
    })
}

/// Reads one entry into `frame`; `false` at the end.
fn next_frame(source: &mut dyn Source, frame: &mut Vec<u8>) -> Result<bool, Error> {
    Ok(source.next(frame)?.is_none())
}

fn decode(frame: &[u8], after: u64) -> Result<Entry<'_>, Error> {
    let failed = |source: FrameError| Error::Log {
        after: Lsn(after),
        source,
    };
    Entry::decode(frame).map_err(failed)
}

/// Compares two journals to the end of the shorter one.
///
/// # Errors
/// A journal that cannot be read.
pub fn journals(left: &mut dyn Source, right: &mut dyn Source) -> Result<Compared, Error> {
    let (mut left_frame, mut right_frame) = (Vec::new(), Vec::new());
    let mut before = VecDeque::new();
    let mut count = 0;
    loop {
        let has_left = next_frame(left, &mut left_frame)?;
        let has_right = next_frame(right, &mut right_frame)?;
        if !(has_left && has_right) {
            return Ok(Compared::Same {
                left: count + remaining(left, has_left)?,
                right: count + remaining(right, has_right)?,
            });
        }
        let one = decode(&left_frame, count)?;
        let other = decode(&right_frame, count)?;
        if let Some(what) = entry_difference(&one, &other) {
            return Ok(Compared::Different(Box::new(EntryDifference {
                what,
                left: Brief::of(&one),
                right: Brief::of(&other),
                before: before.into(),
            })));
        }
        if before.len() == ENTRIES_KEPT {
            before.pop_front();
        }
        before.push_back(Brief::of(&one));
        count += 1;
    }
}

fn remaining(source: &mut dyn Source, has_one: bool) -> Result<u64, Error> {
    let mut frame = Vec::new();
    let mut count = u64::from(has_one);
    while has_one && next_frame(source, &mut frame)? {
        count += 1;
    }
    Ok(count)
}

/// A stop as a side that recorded it says it was.
#[derive(Clone, Debug)]
pub struct Witnessed {
    /// Rolling digest after it.
    pub digest: u64,
    /// General registers at it.
    pub registers: kvm_regs,
}

/// One of two executions that are compared.
pub trait Side {
    /// The next stop; `None` at the end of the execution.
    ///
    /// # Errors
    /// Divergence of this execution from its own log among others.
    fn step(&mut self) -> Result<Option<&StopRecord>, Error>;
}

/// The stops of an execution, to its end.
pub struct Stops<'a> {
    execution: &'a mut Execution,
    ended: bool,
}

impl<'a> Stops<'a> {
    /// The stops that follow where `execution` is.
    #[must_use]
    pub fn of(execution: &'a mut Execution) -> Self {
        Self {
            execution,
            ended: false,
        }
    }
}

impl Side for Stops<'_> {
    fn step(&mut self) -> Result<Option<&StopRecord>, Error> {
        if self.ended {
            return Ok(None);
        }
        match self.execution.step()? {
            Step::Stop | Step::Trap => {}
            Step::End(End::PowerOff | End::Reset) => self.ended = true,
            // The log ended on the way to this stop, or in it: nothing is known about it.
            Step::End(End::LogEnd) => {
                self.ended = true;
                return Ok(None);
            }
        }
        Ok(self.execution.history().last())
    }
}

/// The first stop that differs.
#[derive(Clone, Debug)]
pub struct StopDifference {
    /// What differs.
    pub what: String,
    /// The stop of the first execution; `None` if it had ended.
    pub left: Option<StopRecord>,
    /// That of the second.
    pub right: Option<StopRecord>,
    /// Stops that were the same before.
    pub same: u64,
}

/// What differs between two stops; `None` if nothing does.
#[must_use]
pub fn stop_difference(left: &StopRecord, right: &StopRecord) -> Option<String> {
    let (one, other) = (&left.position, &right.position);
    if (one.exits, one.offset) != (other.exits, other.offset) {
        return Some("one has a stop that the other has not".into());
    }
    if left.access != right.access {
        return Some("the access differs".into());
    }
    let names = differing(&left.registers, &right.registers);
    if !names.is_empty() {
        return Some(format!("registers differ: {}", names.join(", ")));
    }
    if left.event_count != right.event_count || !left.events().eq(right.events()) {
        return Some("what happened there differs".into());
    }
    (left.digest != right.digest).then(|| "the digest of what the guest put out differs".into())
}

/// Names of the general registers that differ.
#[must_use]
pub fn differing(left: &kvm_regs, right: &kvm_regs) -> Vec<&'static str> {
    let pairs = registers::general(left).into_iter().zip(registers::general(right));
    pairs
        .filter(|((_, one), (_, other))| one != other)
        .map(|((name, _), _)| name)
        .collect()
}

/// Runs two executions side by side, from power-on, to their first difference, `None` if they end together. `each` sees every
/// stop that both have.
///
/// # Errors
/// See [`Side::step`]; the error is of the execution that is named with it.
pub fn side_by_side(
    left: &mut dyn Side,
    right: &mut dyn Side,
    mut each: impl FnMut(&StopRecord) -> Option<String>,
) -> Result<Option<StopDifference>, (Which, Error)> {
    let mut same = 0;
    loop {
        let one = left.step().map_err(|error| (Which::Left, error))?;
        let other = right.step().map_err(|error| (Which::Right, error))?;
        let what = match (one, other) {
            (None, None) => return Ok(None),
            (Some(one), Some(other)) => stop_difference(one, other).or_else(|| each(one)),
            // Which of two equal executions has the longer log says nothing about them.
            (None, Some(_)) | (Some(_), None) => return Ok(None),
        };
        if let Some(what) = what {
            return Ok(Some(StopDifference {
                what,
                left: one.cloned(),
                right: other.cloned(),
                same,
            }));
        }
        same += 1;
    }
}

/// One of the two sides of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The first.
    Left,
    /// The second.
    Right,
}

#[cfg(test)]
#[path = "bisect_tests.rs"]
mod tests;
