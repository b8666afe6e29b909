//! One queue of the TAP, as the device's thread sees it: whether frames may come to it, and whether some are there.

use std::{io, os::fd::AsRawFd};

use ft_vhost::{
    device::Uring,
    guest_side::net::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, LENGTH_BYTES},
};

use crate::tap::Tap;

/// Token of the first port's poll.
const TOKEN_TAP: u64 = 1;
/// Frames of before its start that a queue may hold: more than the kernel keeps (txqueuelen).
const OLD_FRAMES_MAX: usize = 1 << 16;

/// One queue of the TAP.
#[derive(Debug)]
pub struct Port {
    tap: Tap,
    token: u64,
    attached: bool,
    readable: bool,
    /// A poll is under way.
    polling: bool,
}

impl Port {
    /// The queue of a pair.
    #[must_use]
    pub fn new(pair: u64, tap: Tap) -> Self {
        Self {
            tap,
            token: TOKEN_TAP + pair,
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
    pub fn set_attached(&mut self, attached: bool, io: &mut Uring) -> io::Result<()> {
        self.tap.set_attached(attached)?;
        self.attached = attached;
        self.readable = false;
        if attached {
            let mut old = [0; HEADER_BYTES];
            for _ in 0..OLD_FRAMES_MAX {
                if self.tap.receive(&mut old)?.is_none() {
                    break;
                }
            }
            self.arm(io);
        }
        Ok(())
    }

    /// Asks to be told when there is something.
    fn arm(&mut self, io: &mut Uring) {
        if !std::mem::replace(&mut self.polling, true) {
            io.poll(self.tap.as_raw_fd(), self.token);
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
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.tap.set_offloads(features)
    }

    /// Reads one frame with its header; `None`, and a poll for the next, if there is none.
    ///
    /// # Errors
    /// As read(2).
    pub fn receive(&mut self, buffer: &mut [u8], io: &mut Uring) -> io::Result<Option<usize>> {
        let received = self.tap.receive(buffer)?;
        if received.is_none() {
            self.readable = false;
            self.arm(io);
        }
        Ok(received)
    }

    /// Appends one frame with its header and length to a payload; `false`, and a poll for the next, if there is none.
    ///
    /// # Errors
    /// As read(2).
    pub fn receive_onto(&mut self, payload: &mut Vec<u8>, io: &mut Uring) -> io::Result<bool> {
        let start = payload.len();
        loop {
            payload.extend_from_slice(&[0; LENGTH_BYTES]);
            let Some(bytes) = self.tap.receive_onto(payload, HEADER_BYTES + FRAME_BYTES_MAX)? else {
                payload.truncate(start);
                self.readable = false;
                self.arm(io);
                return Ok(false);
            };
            if bytes >= HEADER_BYTES + FRAME_BYTES_MIN {
                payload[start..start + LENGTH_BYTES].copy_from_slice(&(bytes as u32).to_le_bytes());
                return Ok(true);
            }
            payload.truncate(start);
        }
    }

    /// Sends one frame with its header.
    ///
    /// # Errors
    /// As write(2).
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.tap.send(frame)
    }
}
