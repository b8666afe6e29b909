//! Engine `device`: the marker of each batch of frames.
//!
//! ```text
//!  [frames of the guest] ─► unmarked ─ one entry for all of them ─► hold ─ committed ─► the interface
//!                              └─ no room in the log: later              └─ no backup: at once
//! ```
//! The log has one order, so a committed marker says that every write of the VM's disk that was logged before it is on the other host, and
//! that no other side was live by then.

use std::collections::VecDeque;

use ft_protocol::Lsn;
use ft_vhost::{
    device::{Logged, Mirror},
    guest_side::net::{Frame, TRANSMIT},
};

use crate::hold::Hold;

/// Frames on their way to the hold.
#[derive(Debug)]
pub struct Marking {
    mirror: Mirror,
    unmarked: VecDeque<Frame>,
    bytes: usize,
}

impl Marking {
    /// Markers go there.
    #[must_use]
    pub fn new(mirror: Mirror) -> Self {
        Self {
            mirror,
            unmarked: VecDeque::new(),
            bytes: 0,
        }
    }

    /// Takes a frame that the guest sends.
    pub fn push(&mut self, frame: Frame) {
        self.bytes += frame.with_header().len();
        self.unmarked.push_back(frame);
    }

    /// Marks what has no marker yet, and has it held; gives the number of frames. None where the log takes nothing now: then a commit or another
    /// role is to come, and this is to be called again.
    pub fn mark(&mut self, hold: &mut Hold, now_ns: u64) -> usize {
        if self.unmarked.is_empty() {
            return 0;
        }
        let marker = match self.mirror.mark(TRANSMIT) {
            Logged::At(marker) => marker,
            // What is committed always; behind what is held already.
            Logged::Unprotected => Lsn::ZERO,
            Logged::NotNow => return 0,
        };
        self.mirror.announce();
        let frames = self.unmarked.len();
        for frame in self.unmarked.drain(..) {
            hold.push(marker, frame, now_ns);
        }
        self.bytes = 0;
        frames
    }

    /// Bytes of the frames that have no marker.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}
