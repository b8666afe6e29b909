//! The Output Rule on the wire: frames wait here until their marker is committed, and leave in the order they came.

use std::collections::VecDeque;

use ft_client::Counters;
use ft_protocol::{Committed, Held, Lsn};
use ft_vhost::guest_side::net::Frame;

use crate::histogram::Histogram;

#[derive(Debug)]
struct Waiting {
    frame: Held<Frame>,
    bytes: usize,
    since_ns: u64,
}

/// The frames that may not leave yet.
#[derive(Debug, Default)]
pub struct Hold {
    waiting: VecDeque<Waiting>,
    bytes: usize,
    times: Histogram,
}

impl Hold {
    /// Takes a frame that the entry at `marker` marks.
    pub fn push(&mut self, marker: Lsn, frame: Frame, now_ns: u64) {
        let bytes = frame.with_header().len();
        self.bytes += bytes;
        self.waiting.push_back(Waiting {
            frame: Held::new(marker, frame),
            bytes,
            since_ns: now_ns,
        });
    }

    /// Moves the frames that are committed to `into`, in order. A frame never overtakes one before it. How long each waited is counted.
    pub fn release(&mut self, committed: Committed, now_ns: u64, counters: &Counters, into: &mut Vec<Frame>) {
        while let Some(Waiting { frame, bytes, since_ns }) = self.waiting.pop_front() {
            match frame.release(committed) {
                Ok(frame) => {
                    self.bytes -= bytes;
                    let microseconds = now_ns.saturating_sub(since_ns) / 1000;
                    self.times.record(microseconds);
                    counters.released_after(microseconds);
                    into.push(frame);
                }
                Err(frame) => {
                    self.waiting.push_front(Waiting { frame, bytes, since_ns });
                    break;
                }
            }
        }
    }

    /// The frames that wait, in order: to look at.
    pub fn waiting(&self) -> impl Iterator<Item = &Frame> {
        self.waiting.iter().map(|waiting| waiting.frame.peek())
    }

    /// Marker of the first frame that waits.
    #[must_use]
    pub fn first(&self) -> Option<Lsn> {
        self.waiting.front().map(|waiting| waiting.frame.marker())
    }

    /// Frames held.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes held, with the header of each.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How long the released frames had waited.
    #[must_use]
    pub fn times(&self) -> &Histogram {
        &self.times
    }
}

#[cfg(all(test, not(feature = "control-no-hold")))]
mod tests {
    use super::*;

    #[test]
    fn frames_leave_in_order_and_not_before_their_commit() {
        let mut hold = Hold::default();
        for (marker, byte) in [(5, 1), (5, 2), (9, 3)] {
            hold.push(Lsn(marker), Frame::new(&[byte; 60]), 1_000_000);
        }
        let counters = Counters::own(2);
        let mut released = Vec::new();
        hold.release(Committed::through(Lsn(4)), 2_000_000, &counters, &mut released);
        assert!(released.is_empty());
        assert_eq!(hold.first(), Some(Lsn(5)));
        hold.release(Committed::through(Lsn(8)), 3_000_000, &counters, &mut released);
        assert_eq!(released, [Frame::new(&[1; 60]), Frame::new(&[2; 60])]);
        assert_eq!((hold.first(), hold.bytes()), (Some(Lsn(9)), 72));
        hold.release(Committed::through(Lsn::MAX), 3_000_000, &counters, &mut released);
        assert_eq!((hold.first(), hold.bytes(), hold.times().total()), (None, 0, 3));
        assert!(hold.times().buckets().all(|(upper, _)| upper > 2000));
        assert_eq!(counters.hold_times()[11], (2048, 3));
    }
}
