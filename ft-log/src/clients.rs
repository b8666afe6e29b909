//! Connections of local processes: the join line, reports, and the end of each.
//!
//! ```text
//!  accept ──► Greeting ──line──► admitted: Member ──┬─ {"failed": ...} ──► Failed
//!                 │                                 └─ end, garbage ─────► Failed
//!                 └─ refused, too long, too late: one line with the reason, closed
//! ```

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
};

use ft_client::handshake::{Client, Join, LINE_BYTES_MAX, Reply, Report, send_reply};
use ft_protocol::{frame::VERSION, limits::DEVICES_MAX};
use tracing::{debug, info, warn};

use crate::{
    local::Local,
    token::{Done, Ring, Token},
    uring::Operation,
};

/// Connections at a time: everybody who belongs here, and room for those who are refused.
const CONNECTIONS_MAX: usize = DEVICES_MAX + 1 + 16;
/// Bytes of a fingerprint, of which we only need that it is bounded.
const FINGERPRINT_BYTES_MAX: usize = 256;
/// After an error that may go away by itself, such as too many open files.
const ACCEPT_RETRY_NS: u64 = 100_000_000;

#[derive(Debug)]
struct Connection {
    number: u32,
    socket: Rc<OwnedFd>,
    /// The seat it has, once it has joined.
    seat: Option<usize>,
    greet_until_ns: u64,
    filled: usize,
}

/// What a connection brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Everybody has joined, and the shim has its answer.
    Complete,
    /// A member reported that it cannot go on.
    Reported {
        /// Who.
        seat: usize,
        /// Why.
        reason: String,
    },
    /// A member's connection ended.
    Ended {
        /// Who.
        seat: usize,
    },
    /// A member said something that is no report.
    Garbage {
        /// Who.
        seat: usize,
    },
}

/// The unix socket and its connections.
#[derive(Debug)]
pub struct Clients {
    vm: String,
    /// A connection that has not said who it is after this time is closed.
    join_timeout_ns: u64,
    listener: Rc<OwnedFd>,
    connections: Vec<Connection>,
    numbers: u32,
    /// When to accept again after an error.
    accept_at_ns: Option<u64>,
}

impl Clients {
    /// Serves `vm` on a listening socket.
    #[must_use]
    pub fn new(vm: &str, listener: OwnedFd, join_timeout_ns: u64) -> Self {
        Self {
            vm: vm.into(),
            join_timeout_ns,
            listener: Rc::new(listener),
            connections: Vec::new(),
            numbers: 0,
            accept_at_ns: None,
        }
    }

    /// Accepts the next connection.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn accept(&self, ring: &mut Ring) -> io::Result<()> {
        ring.submit(Token::LocalAccept, Operation::Accept(Rc::clone(&self.listener)))
    }

    /// Takes an accepted connection.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn accepted(&mut self, ring: &mut Ring, socket: io::Result<Option<OwnedFd>>, now_ns: u64) -> io::Result<()> {
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                warn!("accepting a local client: {error}");
                self.accept_at_ns = Some(now_ns + ACCEPT_RETRY_NS);
                return Ok(());
            }
        };
        self.accept(ring)?;
        let Some(socket) = socket else { return Ok(()) };
        if self.connections.len() >= CONNECTIONS_MAX {
            refuse(&socket, "too many connections");
            return Ok(());
        }
        self.numbers = self.numbers.wrapping_add(1);
        let connection = Connection {
            number: self.numbers,
            socket: Rc::new(socket),
            seat: None,
            greet_until_ns: now_ns + self.join_timeout_ns,
            filled: 0,
        };
        connection.receive(ring, vec![0; LINE_BYTES_MAX])?;
        self.connections.push(connection);
        Ok(())
    }

    /// When [`Clients::on_time`] has something to do.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        let greeting = self.connections.iter().filter(|connection| connection.seat.is_none());
        let greeting = greeting.map(|connection| connection.greet_until_ns).min();
        [greeting, self.accept_at_ns].into_iter().flatten().min()
    }

    /// Closes connections that do not say who they are, and accepts again after an error.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn on_time(&mut self, ring: &mut Ring, now_ns: u64) -> io::Result<()> {
        if self.accept_at_ns.is_some_and(|at| at <= now_ns) {
            self.accept_at_ns = None;
            self.accept(ring)?;
        }
        let late = |connection: &Connection| connection.seat.is_none() && connection.greet_until_ns <= now_ns;
        while let Some(at) = self.connections.iter().position(late) {
            let connection = self.connections.swap_remove(at);
            refuse(&connection.socket, "no join line came");
            connection.close(ring)?;
        }
        Ok(())
    }

    /// Takes the completion of a receive on connection `number`. What it brought is appended to `news`.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn received(
        &mut self,
        ring: &mut Ring,
        number: u32,
        done: Done,
        local: &mut Local,
        news: &mut Vec<News>,
    ) -> io::Result<()> {
        let Some(at) = self
            .connections
            .iter()
            .position(|connection| connection.number == number)
        else {
            return Ok(());
        };
        let mut bytes = done.memory.into_bytes();
        let count = done.result.unwrap_or(0);
        let connection = &mut self.connections[at];
        connection.filled += count;
        let mut keep = count > 0;
        while keep && let Some(end) = bytes[..connection.filled].iter().position(|byte| *byte == b'\n') {
            keep = match connection.seat {
                None => connection.join(&self.vm, &bytes[..end], local),
                Some(seat) => report(seat, &bytes[..end], news),
            };
            bytes.copy_within(end + 1..connection.filled, 0);
            connection.filled -= end + 1;
        }
        if keep && connection.filled == bytes.len() {
            keep = false;
            match connection.seat {
                None => refuse(&connection.socket, "the line is too long"),
                Some(seat) => news.push(News::Garbage { seat }),
            }
        }
        if keep {
            connection.receive(ring, bytes)?;
        } else {
            let connection = self.connections.swap_remove(at);
            if let (0, Some(seat)) = (count, connection.seat) {
                news.push(News::Ended { seat });
            }
            connection.close(ring)?;
        }
        self.complete(local, news);
        Ok(())
    }

    /// Answers the shim once everybody is there.
    fn complete(&mut self, local: &mut Local, news: &mut Vec<News>) {
        if local.is_answered() || local.missing().next().is_some() {
            return;
        }
        let shim = self
            .connections
            .iter()
            .find(|connection| connection.seat == Some(local.shim()));
        let Some(connection) = shim else { return };
        local.set_answered();
        connection.welcome(local, local.shim());
        news.push(News::Complete);
    }
}

impl Connection {
    fn receive(&self, ring: &mut Ring, bytes: Vec<u8>) -> io::Result<()> {
        let operation = Operation::Receive(Rc::clone(&self.socket), bytes, self.filled);
        ring.submit(Token::Local(self.number), operation)
    }

    fn close(self, ring: &mut Ring) -> io::Result<()> {
        ring.submit(Token::Cleanup, Operation::Shutdown(self.socket, libc::SHUT_RDWR))
    }

    /// Reads the join line; `false` if the client was refused.
    fn join(&mut self, vm: &str, line: &[u8], local: &mut Local) -> bool {
        match admit(vm, line, local) {
            Err(reason) => {
                refuse(&self.socket, &reason);
                false
            }
            Ok(seat) => {
                self.seat = Some(seat);
                info!("{} joined", local.name(seat));
                if seat != local.shim() {
                    self.welcome(local, seat);
                }
                true
            }
        }
    }

    /// A fresh unix socket has room for one line: a plain sendmsg(2) with the descriptors does not block. If the client is
    /// gone already, its receive says so.
    fn welcome(&self, local: &Local, seat: usize) {
        let (reply, descriptors) = local.welcome(seat);
        if let Err(error) = send_reply(self.socket.as_fd(), &reply, &descriptors) {
            debug!("{}: the welcome could not be sent: {error}", local.name(seat));
        }
    }
}

/// Gives the client of a join line its seat, or says why not.
///
/// # Errors
/// What the client is told.
pub fn admit(vm: &str, line: &[u8], local: &mut Local) -> Result<usize, String> {
    let join: Join = serde_json::from_slice(line).map_err(|error| format!("this is no join line: {error}"))?;
    if join.version != VERSION {
        return Err(format!(
            "protocol version {} there, {VERSION} here: run programs of one release",
            join.version
        ));
    }
    if join.vm != vm {
        return Err(format!("this ft-log protects VM '{vm}', not '{}': check --vm", join.vm));
    }
    let shape_bytes = join.shape.as_ref().map_or(0, String::len);
    if join.fingerprint.len().max(shape_bytes) > FINGERPRINT_BYTES_MAX {
        return Err("the fingerprint is too long".into());
    }
    let seat = match &join.client {
        Client::Shim => local.shim(),
        Client::Device(name) => local
            .device(name)
            .ok_or_else(|| format!("VM '{vm}' has no device '{name}': check --devices of ft-log"))?,
    };
    if !local.occupy(seat, join.fingerprint, join.shape) {
        return Err(format!("{} has joined already", local.name(seat)));
    }
    Ok(seat)
}

/// Reads a member's report; `false` after garbage.
pub fn report(seat: usize, line: &[u8], news: &mut Vec<News>) -> bool {
    match serde_json::from_slice(line) {
        Ok(Report::Failed(reason)) => {
            news.push(News::Reported { seat, reason });
            true
        }
        Err(_) => {
            news.push(News::Garbage { seat });
            false
        }
    }
}

fn refuse(socket: &OwnedFd, reason: &str) {
    warn!("refused a local client: {reason}");
    // The client may be gone; then nobody needs the answer.
    let _ = send_reply(socket.as_fd(), &Reply::Refused(reason.into()), &[]);
}
