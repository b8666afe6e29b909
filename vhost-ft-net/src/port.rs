//! One queue of the host's end, as the device's thread sees it: whether frames may come to it, and whether some are there.

use std::{io, os::fd::AsRawFd};

use ft_client::counters::{Counters, Lost};
use ft_vhost::{device::Uring, guest_side::net::LENGTH_BYTES};

use crate::{host_end::HostEnd, tap::Received};

/// Token of the first port's poll.
const TOKEN_TAP: u64 = 1;
/// Frames of before its start that a queue may hold: more than the kernel keeps (txqueuelen).
const OLD_FRAMES_MAX: usize = 1 << 16;

/// One queue of the host's end.
#[derive(Debug)]
pub struct Port {
    end: HostEnd,
    /// The queue of the device that receives what comes here.
    queue: u16,
    token: u64,
    attached: bool,
    readable: bool,
    /// A poll is under way.
    polling: bool,
}

impl Port {
    /// The queue of a pair.
    #[must_use]
    pub fn new(pair: u16, end: HostEnd) -> Self {
        Self {
            end,
            queue: 2 * pair,
            token: TOKEN_TAP + u64::from(pair),
            attached: false,
            readable: false,
            polling: false,
        }
    }

    /// Whether a completion is of this port.
    #[must_use]
    pub fn is_token(&self, token: u64) -> bool {
        token == self.token
    }

    /// Whether frames may come.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// Whether frames may be there.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        self.attached && self.readable
    }

    /// Frames may come from here on, and those of before are history; or no more.
    ///
    /// # Errors
    /// As ioctl(2) and read(2).
    pub fn set_attached(&mut self, attached: bool, counters: &Counters, io: &mut Uring) -> io::Result<()> {
        self.end.set_attached(attached)?;
        self.attached = attached;
        self.readable = false;
        if attached {
            for _ in 0..OLD_FRAMES_MAX {
                if !self.end.discard()? {
                    break;
                }
                counters.lose(self.queue, Lost::Stale, 1);
            }
            self.arm(io);
        }
        Ok(())
    }

    /// Asks to be told when there is something.
    fn arm(&mut self, io: &mut Uring) {
        if !std::mem::replace(&mut self.polling, true) {
            io.poll(self.end.as_raw_fd(), self.token);
        }
    }

    /// The poll is over.
    pub fn polled(&mut self) {
        self.polling = false;
        self.readable = true;
    }

    /// Something may be there all the same.
    pub fn look_again(&mut self) {
        self.readable = true;
    }

    /// Has frames come as a driver with these features takes them, on all queues of the TAP.
    ///
    /// # Errors
    /// As ioctl(2).
    pub fn set_offloads(&mut self, features: u64) -> io::Result<()> {
        self.end.set_offloads(features)
    }

    /// Appends one frame with its header; `None`, and a poll for the next, if there is none. Frames that are not for the guest are lost here.
    ///
    /// # Errors
    /// As read(2).
    pub fn receive(&mut self, buffer: &mut Vec<u8>, counters: &Counters, io: &mut Uring) -> io::Result<Option<usize>> {
        loop {
            match self.end.receive_onto(buffer)? {
                Received::Frame(bytes) => return Ok(Some(bytes)),
                Received::Lost(why) => counters.lose(self.queue, why, 1),
                Received::Nothing => {
                    self.readable = false;
                    self.arm(io);
                    return Ok(None);
                }
            }
        }
    }

    /// The same with the frame's length before it, as a payload has it; `false` if there is none.
    ///
    /// # Errors
    /// As read(2).
    pub fn receive_onto(&mut self, payload: &mut Vec<u8>, counters: &Counters, io: &mut Uring) -> io::Result<bool> {
        let start = payload.len();
        payload.extend_from_slice(&[0; LENGTH_BYTES]);
        let Some(bytes) = self.receive(payload, counters, io)? else {
            payload.truncate(start);
            return Ok(false);
        };
        payload[start..start + LENGTH_BYTES].copy_from_slice(&(bytes as u32).to_le_bytes());
        Ok(true)
    }

    /// Sends one frame with its header.
    ///
    /// # Errors
    /// As write(2).
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.end.send(frame)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{fd::OwnedFd, unix::net::UnixDatagram},
    };

    use ft_vhost::guest_side::net::{FRAME_BYTES_MIN, HEADER_BYTES};

    use super::*;
    use crate::tap::Tap;

    /// A port, the far end of what it reads, and what it counts.
    fn port() -> (Port, UnixDatagram, Counters) {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let tap = Tap::from(File::from(OwnedFd::from(near)));
        (Port::new(1, HostEnd::Tap(tap)), far, Counters::own(4))
    }

    fn lost(counters: &Counters) -> [u64; 2] {
        [Lost::Stale, Lost::Runt].map(|why| counters.lost(2, why))
    }

    #[test]
    fn what_was_there_before_the_start_is_lost_and_counted() {
        let (mut port, far, counters) = port();
        let mut io = Uring::new().unwrap();
        for _ in 0..3 {
            far.send(&[1; 100]).unwrap();
        }
        port.set_attached(true, &counters, &mut io).unwrap();
        assert_eq!(lost(&counters), [3, 0]);
        far.send(&[2; 100]).unwrap();
        let mut payload = Vec::new();
        assert!(port.receive_onto(&mut payload, &counters, &mut io).unwrap());
        assert_eq!((payload.len(), lost(&counters)), (104, [3, 0]));
    }

    #[test]
    fn runts_are_lost_and_counted_either_way() {
        let (mut port, far, counters) = port();
        let mut io = Uring::new().unwrap();
        port.set_attached(true, &counters, &mut io).unwrap();
        let shortest = HEADER_BYTES + FRAME_BYTES_MIN;
        for bytes in [shortest - 1, shortest, 1] {
            far.send(&vec![7; bytes]).unwrap();
        }
        let mut payload = Vec::new();
        assert!(port.receive_onto(&mut payload, &counters, &mut io).unwrap());
        assert_eq!((payload.len(), lost(&counters)), (LENGTH_BYTES + shortest, [0, 1]));
        assert!(!port.receive_onto(&mut payload, &counters, &mut io).unwrap());
        assert_eq!((payload.len(), lost(&counters)), (LENGTH_BYTES + shortest, [0, 2]));
        for bytes in [shortest - 1, shortest] {
            far.send(&vec![7; bytes]).unwrap();
        }
        let mut buffer = Vec::new();
        let received = port.receive(&mut buffer, &counters, &mut io).unwrap();
        assert_eq!((received, buffer.len()), (Some(shortest), shortest));
        assert_eq!(lost(&counters), [0, 3]);
        assert_eq!(port.receive(&mut buffer, &counters, &mut io).unwrap(), None);
    }
}
