//! What passes the switch: the frames that the guest sends from host A, and what host B acknowledges to it.
//!
//! ```text
//!  host A ── lan-a ──► [switch] ──► client      each frame of the guest
//!  host B ── wire-b ─► [switch] ──► host A      the TCP stream of the logging channel, put together: acknowledgements
//! ```
//! One packet socket hears both ports, and has one queue. An acknowledgement is in it before host A can have it, and a frame only after host A
//! sent it: the order of the two in the queue is the order of cause and effect, whatever the clocks and the load.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use ft_protocol::Lsn;
use ft_protocol::frame;
use ft_protocol::message::Message;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};

use crate::error::{HarnessError, IoContext};
use crate::topology::{GUEST_MAC, HostId, Topology};

/// Room for everything that may wait while this program is not scheduled.
const BUFFER_BYTES: usize = 64 << 20;
/// More than a frame that the kernel has not cut yet.
const PACKET_BYTES_MAX: usize = 128 << 10;
/// Of a frame.
const ETHERNET_BYTES: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [8, 0];
const TCP: u8 = 6;
const TCP_SYN: u8 = 2;

/// One thing that passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Host A sent this frame for its guest.
    Frame(Vec<u8>),
    /// Host B said that it has all entries up to this one.
    Acknowledged(Lsn),
}

/// A capture that is going on.
#[derive(Debug)]
pub struct Capture {
    /// Its end is the end of the capture.
    running: UnixStream,
    thread: JoinHandle<io::Result<Vec<Seen>>>,
}

impl Capture {
    /// Listens from here on.
    ///
    /// # Errors
    /// When the kernel refuses, as it does without CAP_NET_RAW.
    pub fn start(topology: &Topology) -> Result<Self, HarnessError> {
        let (running, ended) = UnixStream::pair().context(|| "make a socket pair".to_owned())?;
        let (socket, ports) = topology
            .switch()
            .run(|| {
                // First the ports: what is heard of others before the socket knows them would be in its queue.
                let ports = [if_nametoindex("lan-a")?, if_nametoindex("wire-b")?];
                let socket = socket(
                    AddressFamily::Packet,
                    SockType::Raw,
                    SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                    SockProtocol::EthAll,
                )?;
                // A user namespace may not force it, and has what it has.
                let _ = setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES);
                Ok((socket, ports))
            })
            .context(|| "open a packet socket in the switch".to_owned())?;
        let thread = thread::spawn(move || listen(&socket, &ended, ports));
        Ok(Self { running, thread })
    }

    /// Ends, and gives everything that passed, in its order.
    ///
    /// # Errors
    /// When it could not be listened to, or what host B said cannot be read.
    pub fn finish(self) -> Result<Vec<Seen>, HarnessError> {
        drop(self.running);
        let seen = self.thread.join().expect("the capture does not panic");
        seen.context(|| "listen at the switch".to_owned())
    }
}

fn listen(socket: &OwnedFd, ended: &UnixStream, [lan, wire]: [u32; 2]) -> io::Result<Vec<Seen>> {
    let guest = mac(GUEST_MAC);
    let mut channels = Channels::default();
    let mut seen = Vec::new();
    let mut packet = vec![0; PACKET_BYTES_MAX];
    loop {
        let (bytes, from) = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut packet) {
            Ok((bytes, Some(from))) => (bytes, from),
            Ok((_, None)) | Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => {
                let mut fds = [
                    PollFd::new(socket.as_fd(), PollFlags::POLLIN),
                    PollFd::new(ended.as_fd(), PollFlags::POLLIN),
                ];
                poll(&mut fds, PollTimeout::NONE)?;
                let any = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
                if any(&fds[1]) && !any(&fds[0]) {
                    return Ok(seen);
                }
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        // What the switch itself sends there came from elsewhere.
        if from.pkttype() == libc::PACKET_OUTGOING {
            continue;
        }
        let packet = &packet[..bytes];
        if from.ifindex() == lan as usize && packet.get(6..12) == Some(&guest[..]) {
            seen.push(Seen::Frame(packet.to_vec()));
        } else if from.ifindex() == wire as usize
            && let Some(segment) = Segment::parse(packet)
        {
            channels.take(&segment, &mut seen)?;
        }
    }
}

fn mac(text: &str) -> Vec<u8> {
    let byte = |byte: &str| u8::from_str_radix(byte, 16).expect("it is a MAC address");
    text.split(':').map(byte).collect()
}

/// A piece of what host B sends on the logging channel.
#[derive(Clone, Copy, Debug)]
struct Segment<'a> {
    /// Host A's port: one for each connection.
    port: u16,
    /// Number of the first byte.
    number: u32,
    begins: bool,
    bytes: &'a [u8],
}

impl<'a> Segment<'a> {
    fn parse(packet: &'a [u8]) -> Option<Self> {
        let (ethernet, rest) = packet.split_at_checked(ETHERNET_BYTES)?;
        let from = HostId::B.log_address();
        let header_bytes = usize::from(rest.first()? & 0xf) * 4;
        let total = usize::from(u16::from_be_bytes(rest.get(2..4)?.try_into().ok()?));
        let source = Ipv4Addr::from(<[u8; 4]>::try_from(rest.get(12..16)?).ok()?);
        if ethernet[12..14] != ETHERTYPE_IPV4 || rest[9] != TCP || source != *from.ip() {
            return None;
        }
        // Short frames are padded; of one that is not cut yet the length is 0 where it does not fit.
        let end = if total == 0 { rest.len() } else { total };
        let tcp = rest.get(header_bytes..end)?;
        if tcp.get(..2)? != from.port().to_be_bytes() {
            return None;
        }
        let offset = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            port: u16::from_be_bytes([tcp[2], tcp[3]]),
            number: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
            begins: tcp[13] & TCP_SYN != 0,
            bytes: tcp.get(offset..)?,
        })
    }
}

/// The byte stream of a connection, as far as it has no gap.
#[derive(Debug)]
struct Stream {
    first: u32,
    /// Bytes that were read.
    taken: u32,
    unread: Vec<u8>,
    /// Pieces behind a gap, by their place.
    ahead: BTreeMap<u32, Vec<u8>>,
}

impl Stream {
    /// Takes a piece, whether it is the next one, came before, or comes too early.
    fn take(&mut self, number: u32, bytes: &[u8]) {
        self.ahead.insert(number.wrapping_sub(self.first), bytes.to_vec());
        while let Some((place, piece)) = self.ahead.pop_first() {
            let end = self.taken + self.unread.len() as u32;
            if place > end {
                self.ahead.insert(place, piece);
                return;
            }
            let known = (end - place) as usize;
            self.unread.extend_from_slice(piece.get(known..).unwrap_or_default());
        }
    }

    /// Takes the first whole message off.
    fn message(&mut self) -> io::Result<Option<Message>> {
        let Some(length) = frame::peek_length(&self.unread).map_err(io::Error::other)? else {
            return Ok(None);
        };
        if self.unread.len() < length {
            return Ok(None);
        }
        let (_, message) = Message::decode(&self.unread[..length]).map_err(io::Error::other)?;
        self.unread.drain(..length);
        self.taken += length as u32;
        Ok(Some(message))
    }
}

/// The connections of the logging channel, by host A's port.
#[derive(Debug, Default)]
struct Channels(BTreeMap<u16, Stream>);

impl Channels {
    fn take(&mut self, segment: &Segment<'_>, seen: &mut Vec<Seen>) -> io::Result<()> {
        if segment.begins {
            let stream = Stream {
                first: segment.number.wrapping_add(1),
                taken: 0,
                unread: Vec::new(),
                ahead: BTreeMap::new(),
            };
            self.0.insert(segment.port, stream);
            return Ok(());
        }
        let Some(stream) = self.0.get_mut(&segment.port) else {
            return Ok(());
        };
        if segment.bytes.is_empty() {
            return Ok(());
        }
        stream.take(segment.number, segment.bytes);
        while let Some(message) = stream.message()? {
            match message {
                Message::Ack(watermarks) => seen.push(Seen::Acknowledged(watermarks.received)),
                // Where a channel that broke goes on.
                Message::Hello(hello) => seen.push(Seen::Acknowledged(hello.last)),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ft_protocol::Generation;
    use ft_protocol::message::Watermarks;

    use super::*;

    #[test]
    fn acknowledgements_are_read_from_pieces_that_come_twice_and_out_of_order() {
        let mut stream = Vec::new();
        for lsn in [3, 7, 900] {
            let watermarks = Watermarks {
                received: Lsn(lsn),
                ..Watermarks::default()
            };
            Message::Ack(watermarks).encode(Generation(1), &mut stream);
        }
        // Numbers wrap in the middle.
        let first = u32::MAX - 20;
        let mut channels = Channels::default();
        let mut seen = Vec::new();
        let mut take = |number: u32, begins, bytes| {
            let segment = Segment {
                port: 9,
                number,
                begins,
                bytes,
            };
            channels.take(&segment, &mut seen).unwrap();
            seen.len()
        };
        take(first.wrapping_sub(1), true, &[]);
        let at = |place: usize| first.wrapping_add(place as u32);
        assert_eq!(take(at(0), false, &stream[..10]), 0);
        assert_eq!(take(at(50), false, &stream[50..]), 0, "there is a gap");
        assert_eq!(take(at(0), false, &stream[..45]), 1, "a part is known");
        assert_eq!(take(at(45), false, &stream[45..50]), 3, "the gap is closed");
        assert_eq!(take(at(45), false, &stream[45..]), 3, "all is known");
        assert_eq!(seen, [3, 7, 900].map(|lsn| Seen::Acknowledged(Lsn(lsn))));
    }
}
