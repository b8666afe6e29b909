//! The life of the logging channel: connect or accept, use, break and connect again, wind down.
//!
//! ```text
//!  primary: while a channel is of use   connect ──────────────► Channel ──► Leaving (last messages, 200 ms at most)
//!  backup:  accept ──► Candidate ──hello that the core takes──►    │
//!                          └─ none in time, a stranger: closed     └─ broken: at once, and from the start
//! ```
//! A backup's channel is replaced by a connection that begins with its primary's hello, and by nothing else: the old one may be
//! half open, and strangers must not cut it.

use std::{io, net::SocketAddr, os::fd::OwnedFd, rc::Rc};

use ft_client::events::monotonic_ns;
use ft_protocol::{
    Event, FrameError, Generation, Role, frame,
    limits::{CANDIDATES_MAX, HEADER_BYTES, MESSAGE_BYTES_MAX},
    message::Message,
};
use tracing::{debug, info, warn};

use super::Daemon;
use crate::{
    channel::{self, Channel},
    config::Side,
    timers::ns,
    tls::Identity,
    token::{Done, Ring, Token},
    uring::Operation,
};

/// After an error of accept, which may go away by itself.
const ACCEPT_RETRY_NS: u64 = 100_000_000;
/// Between two attempts to connect where a pair waits for it, after the first one that led to nothing; twice as long after each
/// further connection that was taken and never became a channel.
const RECONNECT_RETRY_NS: u64 = 20_000_000;
/// How often it doubles.
const RECONNECT_DOUBLINGS_MAX: u32 = 3;

/// A channel that is over but for its last messages.
#[derive(Debug)]
struct Leaving {
    channel: Channel,
    until_ns: u64,
}

/// An accepted connection that has not said hello, or was refused and takes its leave.
#[derive(Debug)]
struct Candidate {
    channel: Channel,
    until_ns: u64,
    is_refused: bool,
}

/// An attempt to connect.
#[derive(Debug)]
struct Connecting {
    socket: Rc<OwnedFd>,
    until_ns: u64,
}

/// The channel, in whatever state.
#[derive(Debug)]
pub(super) struct Link {
    listener: Option<Rc<OwnedFd>>,
    /// When to accept again after an error.
    accept_at_ns: Option<u64>,
    connect_at_ns: Option<u64>,
    connecting: Option<Connecting>,
    numbers: u32,
    pub(super) channel: Option<Channel>,
    leaving: Option<Leaving>,
    candidates: Vec<Candidate>,
    /// A connection that is gone, whose send of entries has not completed.
    orphan: Option<u32>,
    told: Option<io::ErrorKind>,
    timeout_ms: u32,
    /// For TLS.
    identity: Option<Identity>,
    /// Why the peer was refused, as the operator was told.
    refused: Option<String>,
    /// Why the last connection was turned away, as the operator was told.
    turned_away: Option<String>,
    /// Connections since the last channel on which both sides said hello.
    fruitless: u32,
}

impl Link {
    pub(super) fn new(
        listener: Option<OwnedFd>,
        connect_at_ns: Option<u64>,
        timeout_ms: u32,
        identity: Option<Identity>,
    ) -> Self {
        Self {
            listener: listener.map(Rc::new),
            accept_at_ns: None,
            connect_at_ns,
            connecting: None,
            numbers: 0,
            channel: None,
            leaving: None,
            candidates: Vec::new(),
            orphan: None,
            told: None,
            timeout_ms,
            identity,
            refused: None,
            turned_away: None,
            fruitless: 0,
        }
    }

    /// Sets how long a connection may carry nothing.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub(super) fn set_timeout(&mut self, timeout_ms: u32) -> io::Result<()> {
        self.timeout_ms = timeout_ms;
        self.channel
            .as_ref()
            .map_or(Ok(()), |channel| channel.set_timeout(timeout_ms))
    }

    /// A connection was turned away. Whoever tries again and again for the same reason is told of once.
    fn tell_turned_away(&mut self, peer: SocketAddr, reason: String) {
        if self.turned_away.as_ref() != Some(&reason) {
            warn!("refused a connection from {peer}: {reason}");
            self.turned_away = Some(reason);
        }
    }

    /// Both sides said hello.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub(super) fn is_in_use(&mut self) -> io::Result<()> {
        self.fruitless = 0;
        self.turned_away = None;
        self.channel.as_mut().map_or(Ok(()), Channel::use_it)
    }

    /// The other end is not the peer, or does not speak as this side does. A trouble that stays is told once.
    fn tell_refused(&mut self, peer: SocketAddr, error: &io::Error) {
        if error.kind() != io::ErrorKind::InvalidData {
            debug!("receiving from {peer}: {error}");
            return;
        }
        let reason = error.to_string();
        if self.refused.as_ref() != Some(&reason) {
            warn!("refused the logging channel with {peer}: {reason}");
            self.refused = Some(reason);
        }
    }

    /// Whether the operator was not told of this last.
    pub(super) fn is_new_refusal(&mut self, reason: &str) -> bool {
        let is_new = self.refused.as_deref() != Some(reason);
        self.refused = Some(reason.into());
        is_new
    }

    pub(super) fn channel(&mut self) -> Option<&mut Channel> {
        self.channel.as_mut()
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.channel.is_none() && self.leaving.is_none()
    }

    pub(super) fn deadline_ns(&self) -> Option<u64> {
        let connecting = self.connecting.as_ref().map(|connecting| connecting.until_ns);
        let leaving = self.leaving.as_ref().map(|leaving| leaving.until_ns);
        let candidate = self.candidates.iter().map(|candidate| candidate.until_ns).min();
        [self.connect_at_ns, self.accept_at_ns, connecting, leaving, candidate]
            .into_iter()
            .flatten()
            .min()
    }

    /// The channel that is leaving, if it has this number.
    fn leaving(&mut self, number: u32) -> Option<&mut Channel> {
        let leaving = self.leaving.as_mut().map(|leaving| &mut leaving.channel);
        leaving.filter(|channel| channel.number() == number)
    }

    fn left(&mut self, ring: &mut Ring) -> io::Result<()> {
        match self.leaving.take() {
            Some(leaving) => self.cut(leaving.channel, ring),
            None => Ok(()),
        }
    }

    fn cut(&mut self, channel: Channel, ring: &mut Ring) -> io::Result<()> {
        if channel.has_entries_out() {
            self.orphan = Some(channel.number());
        }
        channel.cut(ring)
    }

    /// A new connection, of which nothing is known. Whoever connects it speaks as the primary does, to TLS and in heartbeats.
    fn open(&mut self, ring: &mut Ring, socket: Rc<OwnedFd>, peer: SocketAddr, side: Side) -> io::Result<Channel> {
        self.numbers = self.numbers.wrapping_add(1);
        let session = self
            .identity
            .as_ref()
            .map(|identity| identity.session(side))
            .transpose()?;
        Channel::new(ring, self.numbers, socket, peer, self.timeout_ms, session)
    }

    fn candidate(&self, number: u32) -> Option<usize> {
        let has_number = |candidate: &Candidate| candidate.channel.number() == number;
        self.candidates.iter().position(has_number)
    }
}

impl Daemon {
    // ---- coming up ---------------------------------------------------------------------------------------------------

    pub(super) fn accept_channel(&mut self) -> io::Result<()> {
        match &self.vm.link.listener {
            Some(listener) => self
                .ring
                .submit(Token::ChannelAccept, Operation::Accept(Rc::clone(listener))),
            None => Ok(()),
        }
    }

    pub(super) fn channel_accepted(&mut self, done: Done) -> io::Result<()> {
        if let Err(error) = &done.result {
            warn!("accepting the logging channel: {error}");
            self.vm.link.accept_at_ns = Some(monotonic_ns() + ACCEPT_RETRY_NS);
            return Ok(());
        }
        self.accept_channel()?;
        let Some(socket) = done.descriptor else { return Ok(()) };
        let Some(peer) = channel::peer_of(&socket) else {
            return Ok(());
        };
        let expected = self.config.peer.map(|expected| expected.ip());
        if expected != Some(peer.ip()) {
            let reason = format!("{} is not the peer's address (--peer)", peer.ip());
            self.vm.link.tell_turned_away(peer, reason);
        } else if self.vm.replica.connects() {
            let reason = "this side connects the channel itself".into();
            self.vm.link.tell_turned_away(peer, reason);
        } else if !self.vm.wants_channel() || self.ending.is_some() {
            let reason = format!("this side is {:?}", self.vm.replica.role());
            self.vm.link.tell_turned_away(peer, reason);
        } else if self.vm.link.candidates.len() >= CANDIDATES_MAX {
            let reason = format!("{CANDIDATES_MAX} others have not said hello yet");
            self.vm.link.tell_turned_away(peer, reason);
        } else {
            match self.vm.link.open(&mut self.ring, Rc::new(socket), peer, Side::Backup) {
                Ok(channel) => self.vm.link.candidates.push(Candidate {
                    channel,
                    // The primary gives up after half of it.
                    until_ns: monotonic_ns() + u64::from(self.vm.link.timeout_ms) * 1_000_000,
                    is_refused: false,
                }),
                Err(error) => debug!("a connection from {peer} broke at once: {error}"),
            }
        }
        Ok(())
    }

    /// Something came on a connection that is no channel yet.
    fn candidate_received(&mut self, at: usize, done: Done) -> io::Result<()> {
        let candidate = &mut self.vm.link.candidates[at];
        let channel = &mut candidate.channel;
        match channel.received(done) {
            Ok(true) => {}
            Ok(false) => return self.drop_candidate(at),
            Err(error) => {
                let peer = channel.peer();
                let is_refused = candidate.is_refused;
                self.vm.link.tell_refused(peer, &error);
                // A side without TLS can still say why.
                if error.kind() == io::ErrorKind::InvalidData && self.vm.link.identity.is_none() && !is_refused {
                    let reason = "this side has no TLS identity (--tls-cert, --tls-key, --tls-peer)".into();
                    return self.refuse_candidate(at, Message::Refuse { reason });
                }
                return self.drop_candidate(at);
            }
        }
        if candidate.is_refused {
            channel.discard();
            return channel.receive(&mut self.ring);
        }
        let peer = channel.peer();
        let bytes = channel.unused();
        let decoded = match frame::peek_length(bytes) {
            Ok(Some(length)) if length > HEADER_BYTES + MESSAGE_BYTES_MAX => Err("it is no hello".to_owned()),
            Ok(Some(length)) if length <= bytes.len() => match Message::decode(&bytes[..length]) {
                Ok((generation, Message::Hello(hello))) => Ok((generation, hello)),
                Ok(_) | Err(FrameError::Kind { .. }) => Err("it is no hello".to_owned()),
                Err(error) => Err(error.to_string()),
            },
            Ok(_) => return channel.receive(&mut self.ring),
            Err(error) => Err(error.to_string()),
        };
        match decoded {
            Ok((generation, hello)) => match self.vm.replica.refusal(generation, &hello) {
                None => self.promote(at),
                Some(reason) => {
                    self.vm.link.tell_turned_away(peer, reason.clone());
                    self.refuse_candidate(at, Message::Refuse { reason })
                }
            },
            Err(reason) => {
                warn!("closed a connection from {peer} that does not speak this protocol: {reason}");
                self.drop_candidate(at)
            }
        }
    }

    /// The peer is back: whatever channel there was is over.
    fn promote(&mut self, at: usize) -> io::Result<()> {
        // What was appended before belongs to the time without a new backup.
        while self.record()? {}
        let candidate = self.vm.link.candidates.swap_remove(at);
        if let Some(former) = self.vm.link.channel.take() {
            self.vm.link.cut(former, &mut self.ring)?;
        }
        self.vm.is_full = false;
        debug!("channel with {} is up", candidate.channel.peer());
        self.vm.link.channel = Some(candidate.channel);
        self.handle(Event::ChannelUp)?;
        self.receive_log()
    }

    fn refuse_candidate(&mut self, at: usize, answer: Message) -> io::Result<()> {
        let generation: Generation = self.vm.replica.generation();
        let candidate = &mut self.vm.link.candidates[at];
        candidate.is_refused = true;
        candidate.until_ns = monotonic_ns() + ns(self.config.timers.leave_timeout_ms);
        candidate.channel.message(&answer, generation);
        candidate.channel.discard();
        candidate.channel.receive(&mut self.ring)
    }

    fn drop_candidate(&mut self, at: usize) -> io::Result<()> {
        let candidate = self.vm.link.candidates.swap_remove(at);
        candidate.channel.cut(&mut self.ring)
    }

    fn connect(&mut self, now_ns: u64) -> io::Result<()> {
        self.vm.link.connect_at_ns = None;
        let (Some(local), Some(peer)) = (self.config.listen, self.config.peer) else {
            return Ok(());
        };
        let socket = match channel::socket_for(local.ip(), peer) {
            Ok(socket) => Rc::new(socket),
            Err(error) => {
                self.cannot_connect(&error);
                return Ok(());
            }
        };
        self.vm.link.connecting = Some(Connecting {
            socket: Rc::clone(&socket),
            until_ns: now_ns + ns(self.config.timers.connect_timeout_ms),
        });
        self.ring
            .submit(Token::ChannelConnect, Operation::Connect(socket, peer))
    }

    pub(super) fn channel_connected(&mut self, done: Done) -> io::Result<()> {
        let (Some(connecting), Some(peer)) = (self.vm.link.connecting.take(), self.config.peer) else {
            return Ok(());
        };
        if !self.vm.wants_channel() || self.ending.is_some() {
            return Ok(());
        }
        match done.result {
            Ok(_) => self.open_channel(connecting.socket, peer),
            Err(error) => {
                self.cannot_connect(&error);
                Ok(())
            }
        }
    }

    fn cannot_connect(&mut self, error: &io::Error) {
        if self.vm.link.told != Some(error.kind()) {
            info!("waiting for the peer: {error}");
            self.vm.link.told = Some(error.kind());
        }
        self.connect_again(true);
    }

    fn open_channel(&mut self, socket: Rc<OwnedFd>, peer: SocketAddr) -> io::Result<()> {
        self.vm.link.told = None;
        self.vm.link.fruitless = self.vm.link.fruitless.saturating_add(1);
        match self.vm.link.open(&mut self.ring, socket, peer, Side::Primary) {
            Ok(channel) => {
                debug!("channel with {peer} is up");
                self.vm.link.channel = Some(channel);
                self.handle(Event::ChannelUp)
            }
            Err(error) => {
                warn!("the channel with {peer} broke at once: {error}");
                self.connect_again(true);
                Ok(())
            }
        }
    }

    /// Plans the next attempt; after one that failed, with a pause.
    fn connect_again(&mut self, failed: bool) {
        if !self.vm.wants_channel() || self.ending.is_some() || !self.vm.replica.connects() {
            return;
        }
        let pause_ns = match self.vm.replica.role() {
            Role::Pairing => ns(self.config.timers.connect_retry_ms),
            _ if failed => {
                let doublings = self.vm.link.fruitless.saturating_sub(1);
                RECONNECT_RETRY_NS << doublings.min(RECONNECT_DOUBLINGS_MAX)
            }
            _ => 0,
        };
        self.vm.link.connect_at_ns = Some(monotonic_ns() + pause_ns);
    }

    // ---- in use ------------------------------------------------------------------------------------------------------

    pub(super) fn channel_received(&mut self, number: u32, done: Done) -> io::Result<()> {
        if let Some(at) = self.vm.link.candidate(number) {
            return self.candidate_received(at, done);
        }
        if let Some(channel) = self.vm.link.leaving(number) {
            return match channel.received(done) {
                Ok(true) => {
                    channel.discard();
                    channel.receive(&mut self.ring)
                }
                _ => self.vm.link.left(&mut self.ring),
            };
        }
        let Some(channel) = self
            .vm
            .link
            .channel
            .as_mut()
            .filter(|channel| channel.number() == number)
        else {
            return Ok(());
        };
        match channel.received(done) {
            Ok(true) => self.receive_log(),
            Ok(false) => {
                if channel.is_handshaking() {
                    let (peer, closed) = (channel.peer(), "the peer ended the connection before it said who it is");
                    let error = io::Error::new(io::ErrorKind::InvalidData, closed);
                    self.vm.link.tell_refused(peer, &error);
                }
                self.drop_channel()
            }
            Err(error) => {
                let peer = channel.peer();
                self.vm.link.tell_refused(peer, &error);
                self.drop_channel()
            }
        }
    }

    pub(super) fn channel_sent(&mut self, number: u32, done: Done) -> io::Result<()> {
        let vm = &mut self.vm;
        if vm.link.orphan == Some(number) {
            vm.link.orphan = None;
            vm.backlog.give_back(done.memory.into_bytes());
            return Ok(());
        }
        if let Some(channel) = vm.link.leaving(number) {
            return match channel.sent(&mut self.ring, &mut vm.backlog, done) {
                Ok(()) => Ok(()),
                Err(_) => self.vm.link.left(&mut self.ring),
            };
        }
        if let Some(at) = vm.link.candidate(number) {
            let channel = &mut vm.link.candidates[at].channel;
            return match channel.sent(&mut self.ring, &mut vm.backlog, done) {
                Ok(()) => Ok(()),
                Err(_) => self.drop_candidate(at),
            };
        }
        let Some(channel) = vm.link.channel.as_mut().filter(|channel| channel.number() == number) else {
            return Ok(());
        };
        if let Err(error) = channel.sent(&mut self.ring, &mut vm.backlog, done) {
            debug!("sending to {}: {error}", channel.peer());
            return self.drop_channel();
        }
        Ok(())
    }

    pub(super) fn flush_link(&mut self) -> io::Result<()> {
        let (link, backlog) = (&mut self.vm.link, &mut self.vm.backlog);
        if let Some(leaving) = &mut link.leaving {
            leaving.channel.wind_down(&mut self.ring, backlog)?;
        }
        for candidate in &mut link.candidates {
            match candidate.is_refused {
                true => candidate.channel.wind_down(&mut self.ring, backlog)?,
                false => candidate.channel.flush(&mut self.ring, backlog)?,
            }
        }
        let Some(channel) = &mut link.channel else {
            return Ok(());
        };
        if let (Some(heartbeats), Some(keys)) = (&mut self.heartbeats, channel.take_heartbeat_keys()) {
            info!("the peer is who it should be (TLS 1.3)");
            link.refused = None;
            heartbeats.add_keys(keys);
        }
        if channel.is_overfull() {
            warn!(
                "{} does not read what it is told: the logging channel is cut",
                channel.peer()
            );
            return self.drop_channel();
        }
        channel.flush(&mut self.ring, backlog)?;
        // What is sent is waited for; what will be received is not there yet.
        match self.vm.is_full {
            true => Ok(()),
            false => channel.receive(&mut self.ring),
        }
    }

    pub(super) fn link_on_time(&mut self, now_ns: u64) -> io::Result<()> {
        let due = |at: Option<u64>| at.is_some_and(|at| at <= now_ns);
        if due(self.vm.link.connect_at_ns) {
            self.connect(now_ns)?;
        }
        if due(self.vm.link.accept_at_ns) {
            self.vm.link.accept_at_ns = None;
            self.accept_channel()?;
        }
        if let Some(connecting) = &mut self.vm.link.connecting
            && connecting.until_ns <= now_ns
        {
            // The connect then completes with an error.
            connecting.until_ns = u64::MAX;
            let shut = Operation::Shutdown(Rc::clone(&connecting.socket), libc::SHUT_RDWR);
            self.ring.submit(Token::Cleanup, shut)?;
        }
        if due(self.vm.link.leaving.as_ref().map(|leaving| leaving.until_ns)) {
            self.vm.link.left(&mut self.ring)?;
        }
        let is_late = |candidate: &Candidate| candidate.until_ns <= now_ns;
        while let Some(at) = self.vm.link.candidates.iter().position(is_late) {
            let candidate = &self.vm.link.candidates[at];
            if !candidate.is_refused {
                warn!("closed a connection from {}: no hello came", candidate.channel.peer());
            }
            self.drop_candidate(at)?;
        }
        Ok(())
    }

    // ---- going down --------------------------------------------------------------------------------------------------

    /// The core closes the channel: the last messages leave, nothing more is taken from it.
    pub(super) fn close_channel(&mut self) -> io::Result<()> {
        let Some(mut channel) = self.vm.link.channel.take() else {
            return Ok(());
        };
        self.vm.link.left(&mut self.ring)?;
        self.vm.is_full = false;
        if !matches!(self.vm.replica.role(), Role::Halted | Role::Off) {
            channel.hold_entries();
        }
        // Whatever comes is dropped; a receive must be in flight, since it tells the end of the stream.
        channel.discard();
        channel.receive(&mut self.ring)?;
        self.vm.link.leaving = Some(Leaving {
            channel,
            until_ns: monotonic_ns() + ns(self.config.timers.leave_timeout_ms),
        });
        self.gone();
        Ok(())
    }

    /// The channel broke.
    pub(super) fn drop_channel(&mut self) -> io::Result<()> {
        self.break_channel()?;
        self.handle_queued()
    }

    /// The channel is of no use any more; what follows from that is queued.
    pub(super) fn break_channel(&mut self) -> io::Result<()> {
        let Some(channel) = self.vm.link.channel.take() else {
            return Ok(());
        };
        self.vm.is_full = false;
        self.vm.link.cut(channel, &mut self.ring)?;
        self.gone();
        Ok(())
    }

    fn gone(&mut self) {
        self.queue.push_back(Event::ChannelDown);
        // A connection that never became a channel is one more attempt that failed.
        self.connect_again(self.vm.link.fruitless > 0);
    }
}
