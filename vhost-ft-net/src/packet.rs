//! The host's end of the network where there is no TAP: a packet socket on an Ethernet interface (packet(7)). This module is the home of
//! its socket options.
//!
//! ```text
//!  wire ─► interface, promiscuous ─► header of 10 bytes (PACKET_VNET_HDR), frame, VLAN tag beside it (PACKET_AUXDATA) ─► [fit] ─► driver
//!  driver ─► header, frame ─► the interface's queue; the kernel cuts what the interface cannot
//! ```
//! What the host itself sends on the interface is not the guest's to see, and the guest does not reach the host over it. Unlike a TAP a
//! packet socket cannot be told which offloads the driver lacks: a checksum is completed here, a frame that is still to be cut is lost.

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use ft_client::counters::Lost;
use ft_vhost::guest_side::net::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES};
use nix::{
    net::if_::if_nametoindex,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, socket},
        uio::writev,
    },
};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
};

use crate::tap::{Received, TapError, TapName, check};

/// Of linux/if_packet.h and linux/ethtool.h.
const PACKET_ADD_MEMBERSHIP: libc::c_int = 1;
const PACKET_AUXDATA: libc::c_int = 8;
const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
const PACKET_MR_PROMISC: u16 = 1;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;
const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;
const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETH_FLAG_LRO: u32 = 1 << 15;

/// Bytes of the kernel's header here: without the number of buffers.
const SHORT_HEADER_BYTES: usize = 10;
/// Where a VLAN tag stands in a frame, and its bytes.
const TAG_AT: usize = 12;
const TAG_BYTES: usize = 4;
const TAG_TYPE: u16 = 0x8100;
/// What waits in the kernel while the guest has no buffers, and what it takes at once.
const SOCKET_BYTES: libc::c_int = 4 << 20;

#[repr(C)]
struct Membership {
    interface: libc::c_int,
    kind: u16,
    address_bytes: u16,
    address: [u8; 8],
}

/// `struct tpacket_auxdata`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Beside {
    status: u32,
    bytes: u32,
    bytes_captured: u32,
    link_at: u16,
    network_at: u16,
    vlan: u16,
    vlan_type: u16,
}

#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// A packet socket on an interface. Frames carry a header of [`HEADER_BYTES`].
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    name: TapName,
    index: libc::c_int,
    /// What the driver took.
    features: u64,
    buffer: Box<[u8]>,
}

impl PacketSocket {
    /// A socket on an existing interface, which gives no frames to it before [`PacketSocket::set_attached`].
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &TapName) -> Result<Self, TapError> {
        name.check()?;
        let failed = |source| TapError::Packet {
            name: name.clone(),
            source,
        };
        let index = if_nametoindex(name.as_str()).map_err(|error| failed(error.into()))? as libc::c_int;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None).map_err(|error| failed(error.into()))?;
        let fd = socket.as_raw_fd();
        let membership = Membership {
            interface: index,
            kind: PACKET_MR_PROMISC,
            address_bytes: 0,
            address: [0; 8],
        };
        set(fd, libc::SOL_PACKET, PACKET_VNET_HDR, &1)
            .and_then(|()| set(fd, libc::SOL_PACKET, PACKET_AUXDATA, &1))
            .and_then(|()| set(fd, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &1))
            .and_then(|()| set(fd, libc::SOL_PACKET, PACKET_ADD_MEMBERSHIP, &membership))
            .map_err(failed)?;
        // Without the right to more, the usual must do.
        let _ = set(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &SOCKET_BYTES);
        let _ = set(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SOCKET_BYTES);
        let all = Self {
            socket,
            name: name.clone(),
            index,
            features: 0,
            buffer: buffer(),
        };
        all.set_attached(false).map_err(failed)?;
        Ok(all)
    }

    /// Whether the interface puts frames together before anybody sees them, which a driver without offloads cannot take.
    ///
    /// # Errors
    /// [`TapError::Merges`] if it does.
    pub fn check_merges_nothing(&self) -> Result<(), TapError> {
        let ask = |command| {
            let mut value = EthtoolValue { command, data: 0 };
            let mut request = self.name.request();
            request.ifr_ifru.ifru_data = (&raw mut value).cast();
            // SAFETY: the socket is open; the request and what it points to have the types this command is defined with, alive for the
            // call.
            check(unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) }).map(|()| value.data)
        };
        // An interface that does not know of it does not do it.
        let gro = ask(ETHTOOL_GGRO).is_ok_and(|on| on != 0);
        let lro = ask(ETHTOOL_GFLAGS).is_ok_and(|flags| flags & ETH_FLAG_LRO != 0);
        match gro || lro {
            true => Err(TapError::Merges(self.name.clone())),
            false => Ok(()),
        }
    }

    /// The same socket for another thread.
    ///
    /// # Errors
    /// As dup(2).
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            socket: self.socket.try_clone()?,
            name: self.name.clone(),
            index: self.index,
            features: self.features,
            buffer: buffer(),
        })
    }

    /// Whether frames come to it.
    ///
    /// # Errors
    /// As bind(2).
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        // SAFETY: an all-zero sockaddr_ll is a valid value of that plain C structure.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = if attached { (libc::ETH_P_ALL as u16).to_be() } else { 0 };
        address.sll_ifindex = self.index;
        let bytes = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the socket is open; the address is of the type and length that are given, alive for the call.
        check(unsafe { libc::bind(self.socket.as_raw_fd(), (&raw const address).cast(), bytes) })
    }

    /// The features that a driver may be offered: the kernel does for the interface what that cannot do itself.
    #[must_use]
    pub fn offloads(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
        ]
        .iter()
        .fold(0, |features, bit| features | 1 << bit)
    }

    /// Frames are for a driver with these features from here on.
    pub fn set_offloads(&mut self, features: u64) {
        self.features = features;
    }

    /// Reads one frame as the driver takes it, and appends it with its header.
    ///
    /// # Errors
    /// As recvmsg(2), and when the interface is gone.
    pub fn receive_onto(&mut self, out: &mut Vec<u8>) -> io::Result<Received> {
        let (bytes, tag) = match self.receive() {
            Ok(Some(received)) => received,
            Ok(None) => return Ok(Received::Lost(Lost::Offload)),
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::EAGAIN) => Ok(Received::Nothing),
                    // A frame to be cut in a way that the header cannot say.
                    Some(libc::EINVAL) => Ok(Received::Lost(Lost::Offload)),
                    // The interface went down, and may come again.
                    Some(libc::ENETDOWN) if self.is_there() => Ok(Received::Nothing),
                    _ => Err(error),
                };
            }
        };
        let Some((short, frame)) = self.buffer[..bytes].split_at_mut_checked(SHORT_HEADER_BYTES) else {
            return Ok(Received::Lost(Lost::Runt));
        };
        if frame.len() < FRAME_BYTES_MIN {
            return Ok(Received::Lost(Lost::Runt));
        }
        let mut header = [0; HEADER_BYTES];
        header[..SHORT_HEADER_BYTES].copy_from_slice(short);
        if !fit(&mut header, frame, self.features) {
            return Ok(Received::Lost(Lost::Offload));
        }
        let tag_bytes = if tag.is_some() { TAG_BYTES } else { 0 };
        if frame.len() + tag_bytes > FRAME_BYTES_MAX {
            return Ok(Received::Lost(Lost::TooLarge));
        }
        let start = out.len();
        shift(&mut header, tag_bytes as u16);
        out.extend_from_slice(&header);
        let (addresses, rest) = frame.split_at(TAG_AT);
        out.extend_from_slice(addresses);
        out.extend_from_slice(&tag.unwrap_or_default()[..tag_bytes]);
        out.extend_from_slice(rest);
        Ok(Received::Frame(out.len() - start))
    }

    /// Header and frame into the buffer: their bytes, and the tag the frame came with; `None` if they do not fit.
    fn receive(&mut self) -> io::Result<Option<(usize, Option<[u8; TAG_BYTES]>)>> {
        let mut part = libc::iovec {
            iov_base: self.buffer.as_mut_ptr().cast(),
            iov_len: self.buffer.len(),
        };
        // Aligned as control messages are, and with room for the one that was asked for.
        let mut control = [0u64; 16];
        // SAFETY: an all-zero msghdr is a valid value of that plain C structure.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: the socket is open; the message points to the buffer and the control buffer with their lengths, which nobody else has
        // during the call.
        let result = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) };
        let Ok(bytes) = usize::try_from(result) else {
            return Err(io::Error::last_os_error());
        };
        if message.msg_flags & libc::MSG_TRUNC != 0 {
            return Ok(None);
        }
        let mut tag = None;
        // SAFETY: the kernel filled in the control buffer and its length; the macros stay within it.
        let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        while !next.is_null() {
            // SAFETY: a control message that these macros give is whole, and lies within the buffer.
            let head = unsafe { next.read_unaligned() };
            let whole = head.cmsg_len as usize >= size_of::<libc::cmsghdr>() + size_of::<Beside>();
            if (head.cmsg_level, head.cmsg_type) == (libc::SOL_PACKET, PACKET_AUXDATA) && whole {
                // SAFETY: the message has at least as many bytes of data as this plain C structure, any of which are a value of it.
                let beside: Beside = unsafe { libc::CMSG_DATA(next).cast::<Beside>().read_unaligned() };
                tag = beside.tag();
            }
            // SAFETY: as above.
            next = unsafe { libc::CMSG_NXTHDR(&raw const message, next) };
        }
        Ok(Some((bytes, tag)))
    }

    fn is_there(&self) -> bool {
        if_nametoindex(self.name.as_str()) == Ok(self.index as libc::c_uint)
    }

    /// Drops the next frame; `false` if there is none.
    ///
    /// # Errors
    /// As [`PacketSocket::receive_onto`].
    pub fn discard(&mut self) -> io::Result<bool> {
        let mut dropped = Vec::new();
        Ok(self.receive_onto(&mut dropped)? != Received::Nothing)
    }

    /// Sends one frame with its header.
    ///
    /// # Errors
    /// As writev(2): the interface is down, or its queue full, say.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        let (header, frame) = packet.split_at(HEADER_BYTES);
        let parts = [IoSlice::new(&header[..SHORT_HEADER_BYTES]), IoSlice::new(frame)];
        writev(&self.socket, &parts)?;
        Ok(())
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Beside {
    /// The tag as it was on the wire.
    fn tag(&self) -> Option<[u8; TAG_BYTES]> {
        let has = |bit| self.status & bit != 0;
        let kind = if has(TP_STATUS_VLAN_TPID_VALID) {
            self.vlan_type
        } else {
            TAG_TYPE
        };
        let ([a, b], [c, d]) = (kind.to_be_bytes(), self.vlan.to_be_bytes());
        has(TP_STATUS_VLAN_VALID).then_some([a, b, c, d])
    }
}

fn buffer() -> Box<[u8]> {
    vec![0; SHORT_HEADER_BYTES + FRAME_BYTES_MAX].into_boxed_slice()
}

fn set<T>(fd: RawFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let bytes = size_of::<T>() as libc::socklen_t;
    // SAFETY: the socket is open; the value lives for the call, and its length is its own.
    check(unsafe { libc::setsockopt(fd, level, option, std::ptr::from_ref(value).cast(), bytes) })
}

fn word(header: &[u8; HEADER_BYTES], at: usize) -> usize {
    usize::from(u16::from_le_bytes([header[at], header[at + 1]]))
}

/// Makes a frame one that a driver with these features takes; `false` if that cannot be.
fn fit(header: &mut [u8; HEADER_BYTES], frame: &mut [u8], features: u64) -> bool {
    let has = |bit: u32| features & 1 << bit != 0;
    let (kind, ecn) = (
        u32::from(header[1]) & !VIRTIO_NET_HDR_GSO_ECN,
        u32::from(header[1]) & VIRTIO_NET_HDR_GSO_ECN != 0,
    );
    let takes = match kind {
        VIRTIO_NET_HDR_GSO_NONE => true,
        VIRTIO_NET_HDR_GSO_TCPV4 => has(VIRTIO_NET_F_GUEST_TSO4),
        VIRTIO_NET_HDR_GSO_TCPV6 => has(VIRTIO_NET_F_GUEST_TSO6),
        _ => false,
    };
    if !takes || ecn && !has(VIRTIO_NET_F_GUEST_ECN) {
        return false;
    }
    if has(VIRTIO_NET_F_GUEST_CSUM) {
        return true;
    }
    let complete = u32::from(header[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0
        || complete_checksum(frame, word(header, 6), word(header, 8));
    *header = [0; HEADER_BYTES];
    complete
}

/// The Internet checksum (RFC 1071) of everything from `start` on, whose place holds that of the pseudo header; `false` if it has none.
fn complete_checksum(frame: &mut [u8], start: usize, offset: usize) -> bool {
    if frame.get(start + offset..start + offset + 2).is_none() {
        return false;
    }
    let pairs = frame[start..].chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u64::from(u16::from_be_bytes([pair[0], low]))
    });
    let mut sum: u64 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // UDP has another meaning for zero.
    let checksum = match !(sum as u16) {
        0 => 0xffff,
        checksum => checksum,
    };
    frame[start + offset..start + offset + 2].copy_from_slice(&checksum.to_be_bytes());
    true
}

/// A tag makes everything behind the addresses lie further back.
fn shift(header: &mut [u8; HEADER_BYTES], bytes: u16) {
    if bytes == 0 {
        return;
    }
    let is_cut = u32::from(header[1]) != VIRTIO_NET_HDR_GSO_NONE;
    let has_checksum = u32::from(header[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    // Where the headers end, and where the checksum begins.
    for (at, is_used) in [(2, is_cut), (6, has_checksum)] {
        if is_used {
            let further = u16::from_le_bytes([header[at], header[at + 1]]).saturating_add(bytes);
            header[at..at + 2].copy_from_slice(&further.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
    const TSO4: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;

    #[test]
    fn a_checksum_is_completed_for_a_driver_that_takes_none() {
        // RFC 1071's example, the checksum behind it.
        let mut frame = [0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7, 0, 0, 9];
        let header = [1, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0];
        let mut kept = header;
        assert!(fit(&mut kept, &mut frame, CSUM));
        assert_eq!((kept, frame[8]), (header, 0));
        let mut completed = header;
        assert!(fit(&mut completed, &mut frame[..10], 0));
        assert_eq!((completed, &frame[8..10]), ([0; HEADER_BYTES], &[0x22, 0x0d][..]));
        // An odd byte counts as the high one.
        frame[8..10].fill(0);
        assert!(complete_checksum(&mut frame, 0, 8));
        assert_eq!(frame[8..10], [0x19, 0x0d]);
        // What sums up to all ones is not zero.
        let mut ones = [0xff, 0xff, 0, 0];
        assert!(complete_checksum(&mut ones, 0, 2));
        assert_eq!(ones[2..], [0xff, 0xff]);
        for (start, offset) in [(0, 3), (4, 0), (65535, 65535)] {
            assert!(!complete_checksum(&mut [0; 4], start, offset));
        }
        // What the kernel says of a checksum that was good is for those who asked.
        let mut good = [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(fit(&mut good, &mut [0; 20], 0));
        assert_eq!(good, [0; HEADER_BYTES]);
    }

    #[test]
    fn a_frame_to_be_cut_is_for_a_driver_that_takes_it() {
        let tcp4 = [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0];
        let ecn = 1 << VIRTIO_NET_F_GUEST_ECN;
        for (kind, features, takes) in [
            (1, CSUM | TSO4, true),
            (1, CSUM, false),
            (1, 0, false),
            (4, CSUM | TSO4, false),
            (4, CSUM | 1 << VIRTIO_NET_F_GUEST_TSO6, true),
            (0x81, CSUM | TSO4, false),
            (0x81, CSUM | TSO4 | ecn, true),
            (3, u64::MAX, false),
            (5, u64::MAX, false),
        ] {
            let mut header = tcp4;
            header[1] = kind;
            assert_eq!(fit(&mut header, &mut [0; 100], features), takes, "{kind} {features:#x}");
        }
    }

    #[test]
    fn a_tag_is_as_on_the_wire_and_what_lies_behind_it_moves() {
        let beside = |status| Beside {
            status,
            vlan: 0x2005,
            vlan_type: 0x88a8,
            ..Beside::default()
        };
        assert_eq!(beside(0).tag(), None);
        assert_eq!(beside(TP_STATUS_VLAN_VALID).tag(), Some([0x81, 0, 0x20, 5]));
        let both = TP_STATUS_VLAN_VALID | TP_STATUS_VLAN_TPID_VALID;
        assert_eq!(beside(both).tag(), Some([0x88, 0xa8, 0x20, 5]));
        let mut header = [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0];
        shift(&mut header, 4);
        assert_eq!(header, [1, 1, 58, 0, 100, 0, 38, 0, 16, 0, 0, 0]);
        let mut nothing = [0; HEADER_BYTES];
        shift(&mut nothing, 4);
        assert_eq!(nothing, [0; HEADER_BYTES]);
    }
}
