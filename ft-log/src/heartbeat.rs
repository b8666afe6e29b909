//! Heartbeats: UDP datagrams of one frame, to and from one peer.

use std::{io, net::SocketAddr, os::fd::OwnedFd, rc::Rc};

use ft_protocol::{
    ids::Generation,
    message::{Message, vm_hash},
};
use tracing::{debug, warn};

use crate::{
    tls::HeartbeatKeys,
    token::{Done, Ring, Token},
    uring::{Datagram, Operation},
};

/// Room for a heartbeat; a longer datagram is cut and then malformed.
const DATAGRAM_BYTES: usize = 256;
/// Datagrams that may wait in the kernel for their sending.
const SENDING_MAX: u32 = 4;

/// Both directions.
#[derive(Debug)]
pub struct Heartbeats {
    socket: Rc<OwnedFd>,
    peer: SocketAddr,
    vm: u64,
    is_receiving: bool,
    sending: u32,
    spare: Vec<u8>,
    ignored: u64,
    /// With TLS nothing is said or heard before there are keys.
    is_authenticated: bool,
    keys: Option<HeartbeatKeys>,
    /// Of the peer's, under these keys: what is not newer was caught and sent again.
    newest: Option<u64>,
}

impl Heartbeats {
    /// Heartbeats of `vm` on a bound socket, with `peer`; authenticated ones wait for [`Heartbeats::set_keys`].
    #[must_use]
    pub fn new(socket: OwnedFd, peer: SocketAddr, vm: &str, is_authenticated: bool) -> Self {
        Self {
            socket: Rc::new(socket),
            peer,
            vm: vm_hash(vm),
            is_receiving: false,
            sending: 0,
            spare: Vec::new(),
            ignored: 0,
            is_authenticated,
            keys: None,
            newest: None,
        }
    }

    /// Takes the keys of a new session.
    pub fn set_keys(&mut self, keys: HeartbeatKeys) {
        self.keys = Some(keys);
        self.newest = None;
    }

    /// Datagrams that were not heartbeats of the peer.
    #[must_use]
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// Receives the next datagram, if that is not under way.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn receive(&mut self, ring: &mut Ring) -> io::Result<()> {
        if self.is_receiving {
            return Ok(());
        }
        self.is_receiving = true;
        let datagram = Datagram::to_receive(DATAGRAM_BYTES);
        let operation = Operation::ReceiveDatagram(Rc::clone(&self.socket), datagram);
        ring.submit(Token::HeartbeatReceive, operation)
    }

    /// Takes the completion of a receive; gives the heartbeat, if it was one of the peer's.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn received(&mut self, ring: &mut Ring, done: Done) -> io::Result<Option<(Generation, Message)>> {
        self.is_receiving = false;
        let datagram = done.memory.into_datagram();
        let length = match done.result {
            Ok(length) => length,
            Err(error) => {
                // The next heartbeat of our own starts a receive again, so that an error that stays does not make us spin.
                debug!("receiving a heartbeat: {error}");
                return Ok(None);
            }
        };
        let heartbeat = self.check(&datagram, length);
        if heartbeat.is_none() {
            self.ignored += 1;
            if self.ignored.is_power_of_two() {
                let source = datagram.source().map_or("unknown".into(), |source| source.to_string());
                warn!(
                    "ignored a datagram that is no heartbeat of {}: {length} bytes from {source} ({} so far)",
                    self.peer, self.ignored
                );
            }
        }
        self.receive(ring)?;
        Ok(heartbeat)
    }

    fn check(&mut self, datagram: &Datagram, length: usize) -> Option<(Generation, Message)> {
        if datagram.source() != Some(self.peer) {
            return None;
        }
        let mut bytes = datagram.bytes.get(..length)?;
        if self.is_authenticated {
            bytes = self.keys.as_ref()?.open(bytes)?;
        }
        let (generation, message) = Message::decode(bytes).ok()?;
        let Message::Heartbeat { vm, sequence, .. } = message else {
            return None;
        };
        if vm != self.vm || self.is_authenticated && self.newest.is_some_and(|newest| sequence <= newest) {
            return None;
        }
        self.newest = Some(sequence);
        Some((generation, message))
    }

    /// Sends a heartbeat, unless earlier ones are stuck.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn send(&mut self, ring: &mut Ring, message: &Message, generation: Generation) -> io::Result<()> {
        self.receive(ring)?;
        if self.sending >= SENDING_MAX || self.is_authenticated && self.keys.is_none() {
            return Ok(());
        }
        self.sending += 1;
        let mut bytes = std::mem::take(&mut self.spare);
        bytes.clear();
        message.encode(generation, &mut bytes);
        if let Some(keys) = &self.keys {
            keys.seal(&mut bytes);
        }
        let datagram = Datagram::to_send(self.peer, bytes);
        ring.submit(
            Token::HeartbeatSend,
            Operation::SendDatagram(Rc::clone(&self.socket), datagram),
        )
    }

    /// Takes the completion of a send. An error is what a missing heartbeat is for.
    pub fn sent(&mut self, done: Done) {
        self.sending -= 1;
        if let Err(error) = done.result {
            debug!("sending a heartbeat to {}: {error}", self.peer);
        }
        self.spare = done.memory.into_datagram().bytes;
    }
}
