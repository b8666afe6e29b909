//! The logging channel: one TCP connection, frames both ways.
//!
//! ```text
//!  entries ──► backlog ──chunk──► send in flight (one at a time) ──► back to the backlog, until they are acknowledged
//!  messages ──► outgoing ──swap──►        "
//!  receive ──► incoming (one fixed buffer) ──► frames ──► replay ring, core
//! ```
//! With TLS, [`crate::tls`] stands between both and the socket; everything else stays as it is.
//!
//! Entries leave only once the core said so ([`Channel::allow`]): after both sides said hello. What a message says holds for the
//! entries before it, so that those leave first.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    rc::Rc,
};

use ft_client::crash;
use ft_protocol::{
    backlog::Backlog,
    ids::Generation,
    limits::{FRAME_BYTES_MAX, OUTGOING_BYTES_MAX},
    message::Message,
};
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt};

use crate::{
    tls::{self, HeartbeatKeys, Session},
    token::{Done, Ring, Token},
    uring::Operation,
};

/// Bytes of the receive buffer: the largest frame and as much again behind it.
const INCOMING_BYTES: usize = 2 * FRAME_BYTES_MAX;

/// Ciphertext is received in pieces of this size: with what a session still has of an earlier record it fits where the largest frame does.
const RECEIVED_BYTES: usize = 64 * 1024;
const _: () = assert!(RECEIVED_BYTES + 32 * 1024 <= FRAME_BYTES_MAX);

/// What a connection with TLS has besides.
#[derive(Debug)]
struct Secure {
    session: Session,
    /// `None` while a receive is in flight.
    received: Option<Vec<u8>>,
}

/// One connection.
#[derive(Debug)]
pub struct Channel {
    number: u32,
    socket: Rc<OwnedFd>,
    peer: SocketAddr,
    outgoing: Vec<u8>,
    /// Entries may leave once everything that was said before is on its way.
    is_allowed: bool,
    is_open: bool,
    sending: usize,
    sending_entries: bool,
    spare: Vec<u8>,
    /// `None` while a receive is in flight.
    incoming: Option<Vec<u8>>,
    start: usize,
    end: usize,
    /// Bytes of the stream before `start`.
    position: u64,
    is_shut: bool,
    /// Both sides said hello on it.
    is_in_use: bool,
    secure: Option<Secure>,
}

/// Data that the peer's kernel does not take for so long: the path is gone, and another connection may find another one.
fn limit(socket: &OwnedFd, timeout_ms: u32) -> io::Result<()> {
    Ok(setsockopt(socket, sockopt::TcpUserTimeout, &timeout_ms)?)
}

/// Socket options of both ends.
fn prepare(socket: &OwnedFd, timeout_ms: u32) -> io::Result<()> {
    setsockopt(socket, sockopt::TcpNoDelay, &true)?;
    limit(socket, timeout_ms)?;
    // Before pairing nothing else tells that the peer's host is gone; afterwards heartbeats are much faster.
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &1)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &1)?;
    setsockopt(socket, sockopt::TcpKeepCount, &3)?;
    Ok(())
}

impl Channel {
    /// Both sides said hello: heartbeats tell of a peer that is gone, long before TCP's own probes, which need not be sent any more.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn use_it(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.is_in_use, true) {
            return Ok(());
        }
        Ok(setsockopt(&self.socket, sockopt::KeepAlive, &false)?)
    }

    /// Changes how long data may not be taken before the connection breaks.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn set_timeout(&self, timeout_ms: u32) -> io::Result<()> {
        limit(&self.socket, timeout_ms)
    }

    /// Takes a connected socket and starts to receive, with TLS if there is a session. Data that is not taken for `timeout_ms` breaks the connection.
    ///
    /// # Errors
    /// As setsockopt(2) and [`Ring::submit`].
    pub fn new(
        ring: &mut Ring,
        number: u32,
        socket: Rc<OwnedFd>,
        peer: SocketAddr,
        timeout_ms: u32,
        session: Option<Session>,
    ) -> io::Result<Self> {
        prepare(&socket, timeout_ms)?;
        let mut channel = Self {
            number,
            socket,
            peer,
            outgoing: Vec::new(),
            is_allowed: false,
            is_open: false,
            sending: 0,
            sending_entries: false,
            spare: Vec::new(),
            incoming: Some(vec![0; INCOMING_BYTES]),
            start: 0,
            end: 0,
            position: 0,
            is_shut: false,
            is_in_use: false,
            secure: session.map(|session| Secure {
                session,
                received: Some(vec![0; RECEIVED_BYTES]),
            }),
        };
        channel.receive(ring)?;
        Ok(channel)
    }

    /// Its number: completions of an earlier connection are told apart by it.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The other end.
    #[must_use]
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    // ---- sending -----------------------------------------------------------------------------------------------------

    /// Queues a control message.
    pub fn message(&mut self, message: &Message, generation: Generation) {
        message.encode(generation, &mut self.outgoing);
    }

    /// Whether the peer has not read for so long that nothing more may wait for it: the channel is to be cut.
    #[must_use]
    pub fn is_overfull(&self) -> bool {
        self.outgoing.len() > OUTGOING_BYTES_MAX
    }

    /// Entries of the backlog may leave on this connection, behind this side's hello: a side that was spoken to may not have sent it yet.
    pub fn allow(&mut self) {
        self.is_allowed = true;
    }

    /// Whether a send of entries is in flight: their memory comes back with its completion, whatever becomes of the channel.
    #[must_use]
    pub fn has_entries_out(&self) -> bool {
        self.sending > 0 && self.sending_entries
    }

    /// Starts a send of what there is, if none is in flight.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn flush(&mut self, ring: &mut Ring, backlog: &mut Backlog) -> io::Result<()> {
        if self.sending > 0 || self.is_shut {
            return Ok(());
        }
        self.is_open |= self.is_allowed && self.outgoing.is_empty();
        if self.secure.is_some() {
            return self.flush_secure(ring, backlog);
        }
        let entries = if self.is_open { backlog.take() } else { None };
        self.sending_entries = entries.is_some();
        let bytes = match entries {
            Some(bytes) => {
                crash::point("log.send.before");
                bytes
            }
            None if self.outgoing.is_empty() => return Ok(()),
            None => std::mem::replace(&mut self.outgoing, std::mem::take(&mut self.spare)),
        };
        self.sending = bytes.len();
        ring.submit(
            Token::ChannelSend(self.number),
            Operation::Send(Rc::clone(&self.socket), bytes, 0),
        )
    }

    /// The same with TLS: entries are encrypted out of the backlog's memory, which comes back at once.
    fn flush_secure(&mut self, ring: &mut Ring, backlog: &mut Backlog) -> io::Result<()> {
        let Some(secure) = &mut self.secure else { return Ok(()) };
        if secure.session.is_open() {
            match if self.is_open { backlog.take() } else { None } {
                Some(entries) => {
                    crash::point("log.send.before");
                    let written = secure.session.write(&entries);
                    backlog.give_back(entries);
                    written?;
                }
                None => {
                    secure.session.write(&self.outgoing)?;
                    self.outgoing.clear();
                }
            }
        }
        let mut bytes = std::mem::take(&mut self.spare);
        secure.session.output(&mut bytes)?;
        if bytes.is_empty() {
            self.spare = bytes;
            return Ok(());
        }
        self.sending_entries = false;
        self.sending = bytes.len();
        ring.submit(
            Token::ChannelSend(self.number),
            Operation::Send(Rc::clone(&self.socket), bytes, 0),
        )
    }

    /// The keys for heartbeats, once, when both sides know each other; never without TLS.
    pub fn take_heartbeat_keys(&mut self) -> Option<HeartbeatKeys> {
        self.secure.as_mut()?.session.take_heartbeat_keys()
    }

    /// Whether the peer is still to prove who it is.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.secure.as_ref().is_some_and(|secure| !secure.session.is_open())
    }

    /// Takes the completion of a send.
    ///
    /// # Errors
    /// A broken connection.
    pub fn sent(&mut self, ring: &mut Ring, backlog: &mut Backlog, done: Done) -> io::Result<()> {
        let bytes = done.memory.into_bytes();
        let count = match done.result {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            result => result,
        };
        if let Ok(count) = count
            && count < self.sending
        {
            self.sending -= count;
            let from = bytes.len() - self.sending;
            let rest = Operation::Send(Rc::clone(&self.socket), bytes, from);
            return ring.submit(Token::ChannelSend(self.number), rest);
        }
        self.sending = 0;
        if self.sending_entries {
            backlog.give_back(bytes);
            crash::point("log.send.after");
        } else {
            self.spare = bytes;
            self.spare.clear();
        }
        count.map(|_| ())
    }

    // ---- receiving ---------------------------------------------------------------------------------------------------

    /// Takes the completion of a receive; `false` at the end of the stream.
    ///
    /// # Errors
    /// A broken connection. [`io::ErrorKind::InvalidData`]: a peer that is not who it should be, or does not speak as this side does.
    pub fn received(&mut self, done: Done) -> io::Result<bool> {
        let bytes = done.memory.into_bytes();
        let Some(secure) = &mut self.secure else {
            self.incoming = Some(bytes);
            let count = done.result?;
            self.end += count;
            if self.position == 0 && tls::looks_like_tls(self.unused()) {
                return Err(invalid(
                    "the peer speaks TLS, this side does not (--tls-cert, --tls-key, --tls-peer)",
                ));
            }
            return Ok(count > 0);
        };
        let count = *done.result.as_ref().unwrap_or(&0);
        let plain = self
            .incoming
            .as_mut()
            .map_or(&mut [][..], |plain| &mut plain[self.end..]);
        let read = secure.session.read(&bytes[..count], plain);
        secure.received = Some(bytes);
        done.result?;
        match read {
            Ok(length) => self.end += length,
            Err(error) => {
                self.say_last_word();
                return Err(error);
            }
        }
        Ok(count > 0)
    }

    /// Tells the peer why: the session has an alert for it. Nothing waits for this, and a full socket does without.
    fn say_last_word(&mut self) {
        let mut alert = Vec::new();
        if let Some(secure) = &mut self.secure
            && self.sending == 0
            && secure.session.output(&mut alert).is_ok()
        {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let _ = socket::send(self.socket.as_raw_fd(), &alert, flags);
        }
    }

    /// Bytes that were received and not used yet.
    #[must_use]
    pub fn unused(&self) -> &[u8] {
        self.incoming.as_ref().map_or(&[], |bytes| &bytes[self.start..self.end])
    }

    /// Where in the stream the unused bytes start.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// `length` more bytes are used.
    pub fn taken(&mut self, length: usize) {
        self.start += length;
        self.position += length as u64;
        debug_assert!(self.start <= self.end);
    }

    /// Starts the next receive, if none is in flight.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn receive(&mut self, ring: &mut Ring) -> io::Result<()> {
        if let Some(secure) = &mut self.secure {
            let (Some(received), Some(plain)) = (secure.received.take(), &mut self.incoming) else {
                return Ok(());
            };
            plain.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            let operation = Operation::Receive(Rc::clone(&self.socket), received, 0);
            return ring.submit(Token::ChannelReceive(self.number), operation);
        }
        let Some(mut bytes) = self.incoming.take() else {
            return Ok(());
        };
        // The rest of a frame moves to the start: then the largest frame always fits behind it.
        bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let operation = Operation::Receive(Rc::clone(&self.socket), bytes, self.end);
        ring.submit(Token::ChannelReceive(self.number), operation)
    }

    // ---- the end -----------------------------------------------------------------------------------------------------

    /// Drops what was received: the pair is over.
    pub fn discard(&mut self) {
        self.taken(self.end - self.start);
    }

    /// Entries stop here: they may have to leave on another connection.
    pub fn hold_entries(&mut self) {
        (self.is_allowed, self.is_open) = (false, false);
    }

    /// What was queued still leaves, then the stream ends.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn wind_down(&mut self, ring: &mut Ring, backlog: &mut Backlog) -> io::Result<()> {
        self.flush(ring, backlog)?;
        if self.sending == 0 && !self.is_shut {
            self.is_shut = true;
            let shut = Operation::Shutdown(Rc::clone(&self.socket), libc::SHUT_WR);
            ring.submit(Token::Cleanup, shut)?;
        }
        Ok(())
    }

    /// Ends both directions at once; operations in flight complete.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn cut(self, ring: &mut Ring) -> io::Result<()> {
        ring.submit(Token::Cleanup, Operation::Shutdown(self.socket, libc::SHUT_RDWR))
    }
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// A socket to connect to `peer` with, from `local`: the peer knows this host by that address.
///
/// # Errors
/// As socket(2) and bind(2).
pub fn socket_for(local: IpAddr, peer: SocketAddr) -> io::Result<OwnedFd> {
    let family = match peer {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let address = SockaddrStorage::from(SocketAddr::new(local, 0));
    socket::bind(socket.as_raw_fd(), &address)?;
    Ok(socket)
}

/// Who is at the other end of an accepted connection; `None` if it is gone already. A look at kernel memory, not I/O.
#[must_use]
pub fn peer_of(socket: &OwnedFd) -> Option<SocketAddr> {
    let stream = std::net::TcpStream::from(socket.as_fd().try_clone_to_owned().ok()?);
    stream.peer_addr().ok()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use ft_protocol::{limits::BACKLOG_BYTES_MAX, message::Watermarks};

    use super::*;

    #[test]
    fn a_peer_that_does_not_read_is_noticed_before_its_messages_fill_the_memory() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, address) = listener.accept().unwrap();
        let (mut ring, mut backlog) = (Ring::new().unwrap(), Backlog::new(BACKLOG_BYTES_MAX));
        let mut channel = Channel::new(&mut ring, 1, Rc::new(socket.into()), address, 1000, None).unwrap();
        let ack = Message::Ack(Watermarks::default());
        // The sockets' buffers fill up first.
        let overfull = (0..100_000).any(|_| {
            (0..100).for_each(|_| channel.message(&ack, Generation(1)));
            channel.flush(&mut ring, &mut backlog).unwrap();
            ring.enter(Some(0)).unwrap();
            while let Some(done) = ring.next_completion() {
                if done.token == Token::ChannelSend(1) {
                    channel.sent(&mut ring, &mut backlog, done).unwrap();
                }
            }
            channel.is_overfull()
        });
        assert!(overfull, "{} bytes wait", channel.outgoing.len());
        assert!(channel.outgoing.len() < OUTGOING_BYTES_MAX + 100 * 256);
        drop(peer);
    }
}
