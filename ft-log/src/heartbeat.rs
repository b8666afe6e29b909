//! Heartbeats: UDP datagrams of one frame, to and from one peer.

use std::{collections::VecDeque, io, net::SocketAddr, os::fd::OwnedFd, rc::Rc};

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

/// Sessions whose heartbeats are heard: connections may come and go before one of them is a channel, and the two sides need not agree on
/// which was the last.
const SESSIONS_MAX: usize = 4;

/// Keys of a session, and what was heard under them.
#[derive(Debug)]
struct Session {
    keys: HeartbeatKeys,
    /// What is not newer was caught and sent again.
    newest: Option<u64>,
}

/// Which keys heartbeats have where the channel speaks TLS.
///
/// ```text
///  connected, TLS ──► both sessions' heartbeats are heard, one's own have the former keys
///  hello of both  ──► one's own have the new keys
/// ```
/// A connection that breaks in between must not make the two sides deaf to each other.
#[derive(Debug, Default)]
struct Sessions {
    /// The latest first.
    heard: VecDeque<Session>,
    /// One's own have these.
    own: Option<HeartbeatKeys>,
    /// The latest session is not settled.
    is_new: bool,
}

impl Sessions {
    fn add(&mut self, keys: HeartbeatKeys) {
        self.heard.truncate(SESSIONS_MAX - 1);
        self.heard.push_front(Session { keys, newest: None });
        self.is_new = true;
    }

    fn settle(&mut self) {
        if std::mem::take(&mut self.is_new) {
            self.own = self.heard.front().map(|session| session.keys.clone());
        }
    }

    /// The message in a datagram that the peer made for one of the sessions and that was not heard before.
    fn open(&mut self, datagram: &[u8]) -> Option<(Generation, Message)> {
        self.heard.iter_mut().find_map(|session| {
            let decoded = Message::decode(session.keys.open(datagram)?).ok()?;
            let Message::Heartbeat { sequence, .. } = decoded.1 else {
                return None;
            };
            if session.newest.is_some_and(|newest| sequence <= newest) {
                return None;
            }
            session.newest = Some(sequence);
            Some(decoded)
        })
    }
}

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
    /// With TLS nothing is said or heard before there is a session.
    sessions: Option<Sessions>,
}

impl Heartbeats {
    /// Heartbeats of `vm` on a bound socket, with `peer`; authenticated ones wait for [`Heartbeats::add_keys`].
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
            sessions: is_authenticated.then(Sessions::default),
        }
    }

    /// A connection with the peer has a session with these keys. The peer's heartbeats may have them from now on.
    pub fn add_keys(&mut self, keys: HeartbeatKeys) {
        if let Some(sessions) = &mut self.sessions {
            sessions.add(keys);
        }
    }

    /// That connection is the logging channel: both sides said hello on it, so the peer has the keys too.
    pub fn settle_keys(&mut self) {
        if let Some(sessions) = &mut self.sessions {
            sessions.settle();
        }
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
        let bytes = datagram.bytes.get(..length)?;
        let heartbeat = match &mut self.sessions {
            Some(sessions) => sessions.open(bytes)?,
            None => Message::decode(bytes).ok()?,
        };
        matches!(heartbeat.1, Message::Heartbeat { vm, .. } if vm == self.vm).then_some(heartbeat)
    }

    /// Sends a heartbeat, unless earlier ones are stuck.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn send(&mut self, ring: &mut Ring, message: &Message, generation: Generation) -> io::Result<()> {
        self.receive(ring)?;
        let keys = match &self.sessions {
            Some(Sessions { own: None, .. }) => return Ok(()),
            Some(Sessions { own, .. }) => own.as_ref(),
            None => None,
        };
        if self.sending >= SENDING_MAX {
            return Ok(());
        }
        self.sending += 1;
        let mut bytes = std::mem::take(&mut self.spare);
        bytes.clear();
        message.encode(generation, &mut bytes);
        if let Some(keys) = keys {
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

#[cfg(test)]
mod tests {
    use ft_protocol::Lsn;

    use super::*;

    fn heartbeat(sequence: u64, by: &Sessions) -> Vec<u8> {
        let mut datagram = Vec::new();
        let message = Message::Heartbeat {
            vm: vm_hash("v"),
            lsn: Lsn(0),
            sequence,
            replayed: Lsn(0),
            full: false,
            asks: false,
        };
        message.encode(Generation(1), &mut datagram);
        by.own.as_ref().expect("settled").seal(&mut datagram);
        datagram
    }

    /// A connection whose TLS handshake is over on both sides.
    fn connect(a: &mut Sessions, b: &mut Sessions, number: u8) {
        let (to_b, to_a) = ([number; 32], [number | 0x80; 32]);
        a.add(HeartbeatKeys::of(to_b, to_a));
        b.add(HeartbeatKeys::of(to_a, to_b));
    }

    #[test]
    fn connections_that_break_before_both_have_said_hello_make_nobody_deaf() {
        let (mut a, mut b) = (Sessions::default(), Sessions::default());
        connect(&mut a, &mut b, 1);
        assert!(a.own.is_none(), "nobody knows that the other side has it");
        a.settle();
        b.settle();
        assert!(b.open(&heartbeat(1, &a)).is_some() && a.open(&heartbeat(1, &b)).is_some());
        // The next one breaks when only one side has heard the hello, the one after it before that; only the first side noticed the third.
        connect(&mut a, &mut b, 2);
        b.settle();
        connect(&mut a, &mut b, 3);
        a.add(HeartbeatKeys::of([4; 32], [0x84; 32]));
        for sequence in 2..5 {
            assert!(b.open(&heartbeat(sequence, &a)).is_some(), "{sequence} to b");
            assert!(a.open(&heartbeat(sequence, &b)).is_some(), "{sequence} to a");
        }
        connect(&mut a, &mut b, 5);
        a.settle();
        b.settle();
        assert!(b.open(&heartbeat(5, &a)).is_some() && a.open(&heartbeat(5, &b)).is_some());
    }

    #[test]
    fn a_heartbeat_is_heard_once_and_not_at_all_when_its_session_is_long_over() {
        let (mut a, mut b) = (Sessions::default(), Sessions::default());
        connect(&mut a, &mut b, 1);
        a.settle();
        let (first, second) = (heartbeat(1, &a), heartbeat(2, &a));
        assert!(b.open(&second).is_some());
        assert!(b.open(&second).is_none() && b.open(&first).is_none());
        let late = heartbeat(9, &a);
        for number in 2..2 + SESSIONS_MAX as u8 {
            connect(&mut a, &mut b, number);
        }
        assert!(b.open(&late).is_none());
    }
}
