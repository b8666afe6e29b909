//! The life of the logging channel: connect or accept, use, wind down.
//!
//! ```text
//!  primary: every 100 ms until paired   connect ──► Channel ──► Leaving (last messages, 200 ms at most)
//!  backup:  one at a time               accept  ──►
//! ```

use std::{io, net::SocketAddr, os::fd::OwnedFd, rc::Rc};

use ft_client::events::monotonic_ns;
use ft_protocol::{Event, Role};
use tracing::{debug, info, warn};

use super::Daemon;
use crate::{
    channel::{self, Channel},
    token::{Done, Ring, Token},
    uring::Operation,
};

/// After an error of accept, which may go away by itself.
const ACCEPT_RETRY_NS: u64 = 100_000_000;
/// Between two attempts to connect.
const CONNECT_RETRY_NS: u64 = 100_000_000;
/// How long one attempt may take.
const CONNECT_NS: u64 = 1_000_000_000;
/// How long the last messages may take to leave.
const LEAVE_NS: u64 = 200_000_000;

/// A channel that is over but for its last messages.
#[derive(Debug)]
struct Leaving {
    channel: Channel,
    until_ns: u64,
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
    told: Option<io::ErrorKind>,
}

impl Link {
    pub(super) fn new(listener: Option<OwnedFd>, connect_at_ns: Option<u64>) -> Self {
        Self {
            listener: listener.map(Rc::new),
            accept_at_ns: None,
            connect_at_ns,
            connecting: None,
            numbers: 0,
            channel: None,
            leaving: None,
            told: None,
        }
    }

    pub(super) fn channel(&mut self) -> Option<&mut Channel> {
        self.channel.as_mut()
    }

    /// Bytes that wait to be sent.
    pub(super) fn backlog(&self) -> usize {
        self.channel.as_ref().map_or(0, Channel::backlog)
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.channel.is_none() && self.leaving.is_none()
    }

    pub(super) fn deadline_ns(&self) -> Option<u64> {
        let connecting = self.connecting.as_ref().map(|connecting| connecting.until_ns);
        let leaving = self.leaving.as_ref().map(|leaving| leaving.until_ns);
        [self.connect_at_ns, self.accept_at_ns, connecting, leaving]
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
            Some(leaving) => leaving.channel.cut(ring),
            None => Ok(()),
        }
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
            warn!("refused a connection from {peer}, which is not the peer's address (--peer)");
        } else if self.vm.link.channel.is_some() || self.vm.replica.role() != Role::Pairing {
            warn!("refused a second connection from {peer}");
        } else {
            self.open_channel(Rc::new(socket), peer)?;
        }
        Ok(())
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
            until_ns: now_ns + CONNECT_NS,
        });
        self.ring
            .submit(Token::ChannelConnect, Operation::Connect(socket, peer))
    }

    pub(super) fn channel_connected(&mut self, done: Done) -> io::Result<()> {
        let (Some(connecting), Some(peer)) = (self.vm.link.connecting.take(), self.config.peer) else {
            return Ok(());
        };
        if self.vm.replica.role() != Role::Pairing || self.ending.is_some() {
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
        self.vm.link.connect_at_ns = Some(monotonic_ns() + CONNECT_RETRY_NS);
    }

    fn open_channel(&mut self, socket: Rc<OwnedFd>, peer: SocketAddr) -> io::Result<()> {
        self.vm.link.numbers = self.vm.link.numbers.wrapping_add(1);
        match Channel::new(&mut self.ring, self.vm.link.numbers, socket, peer) {
            Ok(channel) => {
                debug!("channel with {peer} is up");
                self.vm.link.channel = Some(channel);
                self.handle(Event::ChannelUp)
            }
            Err(error) => {
                warn!("the channel with {peer} broke at once: {error}");
                self.connect_again();
                Ok(())
            }
        }
    }

    fn connect_again(&mut self) {
        let waits = self.vm.replica.role() == Role::Pairing && self.ending.is_none();
        if waits && self.vm.link.listener.is_none() {
            self.vm.link.connect_at_ns = Some(monotonic_ns() + CONNECT_RETRY_NS);
        }
    }

    // ---- in use ------------------------------------------------------------------------------------------------------

    pub(super) fn channel_received(&mut self, number: u32, done: Done) -> io::Result<()> {
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
            Ok(false) => self.drop_channel(),
            Err(error) => {
                debug!("receiving from {}: {error}", channel.peer());
                self.drop_channel()
            }
        }
    }

    pub(super) fn channel_sent(&mut self, number: u32, done: Done) -> io::Result<()> {
        if let Some(channel) = self.vm.link.leaving(number) {
            return match channel.sent(&mut self.ring, done) {
                Ok(()) => Ok(()),
                Err(_) => self.vm.link.left(&mut self.ring),
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
        if let Err(error) = channel.sent(&mut self.ring, done) {
            debug!("sending to {}: {error}", channel.peer());
            return self.drop_channel();
        }
        Ok(())
    }

    pub(super) fn flush_link(&mut self) -> io::Result<()> {
        if let Some(leaving) = &mut self.vm.link.leaving {
            leaving.channel.wind_down(&mut self.ring)?;
        }
        match &mut self.vm.link.channel {
            Some(channel) => channel.flush(&mut self.ring),
            None => Ok(()),
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
        // Whatever comes is dropped; a receive must be in flight, since it tells the end of the stream.
        channel.discard();
        channel.receive(&mut self.ring)?;
        self.vm.link.leaving = Some(Leaving {
            channel,
            until_ns: monotonic_ns() + LEAVE_NS,
        });
        self.gone();
        Ok(())
    }

    /// The channel broke.
    pub(super) fn drop_channel(&mut self) -> io::Result<()> {
        let Some(channel) = self.vm.link.channel.take() else {
            return Ok(());
        };
        self.vm.is_full = false;
        channel.cut(&mut self.ring)?;
        self.gone();
        self.handle_queued()
    }

    fn gone(&mut self) {
        self.queue.push_back(Event::ChannelDown);
        self.connect_again();
    }
}
