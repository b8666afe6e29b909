//! One client's socket with its buffers, as the sessions want it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use ledger_core::limits::{SOCKET_RECEIVE_BYTES, SOCKET_TRANSMIT_BYTES};
use ledger_core::session::Stream;
use nix::poll::PollFlags;

mod ioctl {
    nix::ioctl_read_bad!(
        /// Bytes that the other side has not acknowledged.
        unacknowledged_bytes,
        libc::TIOCOUTQ,
        libc::c_int
    );
}

/// A client.
#[derive(Debug)]
pub struct Client {
    socket: TcpStream,
    received: VecDeque<u8>,
    unsent: VecDeque<u8>,
    /// The client will send no more.
    half_closed: bool,
    closing: bool,
    /// Our direction is closed.
    shut: bool,
}

impl Client {
    /// Takes a connection over.
    ///
    /// # Errors
    /// When the socket refuses its options.
    pub fn new(socket: TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(Self {
            socket,
            received: VecDeque::new(),
            unsent: VecDeque::new(),
            half_closed: false,
            closing: false,
            shut: false,
        })
    }

    /// What to wait for.
    #[must_use]
    pub fn interest(&self) -> PollFlags {
        let mut interest = PollFlags::empty();
        if self.received.len() < SOCKET_RECEIVE_BYTES && !self.half_closed {
            interest |= PollFlags::POLLIN;
        }
        if !self.unsent.is_empty() {
            interest |= PollFlags::POLLOUT;
        }
        interest
    }

    /// Reads what has arrived, as far as there is room.
    ///
    /// # Errors
    /// When the connection is no more.
    pub fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; 4096];
        while !self.half_closed && self.received.len() < SOCKET_RECEIVE_BYTES {
            let room = chunk.len().min(SOCKET_RECEIVE_BYTES - self.received.len());
            match self.socket.read(&mut chunk[..room]) {
                Ok(0) => self.half_closed = true,
                Ok(bytes) => self.received.extend(&chunk[..bytes]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends what the socket takes; closes our direction after the last of it.
    ///
    /// # Errors
    /// When the connection is no more.
    pub fn drain(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.socket.write(self.unsent.as_slices().0) {
                Ok(bytes) => drop(self.unsent.drain(..bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.closing && !self.shut {
            self.socket.shutdown(Shutdown::Write)?;
            self.shut = true;
        }
        Ok(())
    }

    /// Bytes that the socket has not taken yet.
    #[must_use]
    pub fn unsent_bytes(&self) -> usize {
        self.unsent.len()
    }

    /// Both directions are closed.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.shut && self.half_closed
    }

    /// Whether the client's kernel has acknowledged everything.
    #[must_use]
    pub fn is_delivered(&self) -> bool {
        let mut bytes: libc::c_int = 0;
        // SAFETY: TIOCOUTQ writes one int, into one that outlives the call.
        let asked = unsafe { ioctl::unacknowledged_bytes(self.socket.as_raw_fd(), &raw mut bytes) };
        self.unsent.is_empty() && (asked.is_err() || bytes == 0)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Stream for Client {
    fn peek(&mut self, buffer: &mut [u8]) -> usize {
        let length = buffer.len().min(self.received.len());
        for (to, from) in buffer.iter_mut().zip(&self.received) {
            *to = *from;
        }
        length
    }

    fn consume(&mut self, bytes: usize) {
        self.received.drain(..bytes.min(self.received.len()));
    }

    fn room(&self) -> usize {
        SOCKET_TRANSMIT_BYTES - self.unsent.len()
    }

    fn send(&mut self, bytes: &[u8]) {
        self.unsent.extend(bytes);
    }

    fn is_half_closed(&self) -> bool {
        self.half_closed
    }

    fn close(&mut self) {
        self.closing = true;
    }
}
