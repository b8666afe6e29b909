//! What a guest may ask of the host for a frame it sends: `virtio_net_hdr_v1`, read, judged against the frame, and written anew.
//!
//! ```text
//!  flags  gso_type  hdr_len:u16  gso_size:u16  csum_start:u16  csum_offset:u16  num_buffers:u16
//! ```
//! The host's kernel believes much of it. So nothing passes that the driver did not negotiate, nothing that points out of the frame, and
//! nothing that the frame's own headers contradict; what the host has no use for is zero.

use ft_client::counters::Lost;
use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::{FRAME_BYTES_MIN, HEADER_BYTES};

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const GSO_UDP: u8 = VIRTIO_NET_HDR_GSO_UDP as u8;
const GSO_UDP_L4: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// Smallest piece a frame is cut into: what is left of Linux's smallest MSS behind the longest TCP options.
const PIECE_BYTES_MIN: usize = 8;
/// What Linux takes for "cut by fragments", which nobody outside may say.
const PIECE_BYTES_FORBIDDEN: usize = 0xffff;
/// VLAN tags before the protocol.
const TAGS_MAX: usize = 2;
/// Extension headers of IPv6 before the protocol.
const EXTENSIONS_MAX: usize = 8;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Why a frame is not sent.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Lie {
    /// The driver did not negotiate what it asks for.
    #[error("an offload that was not negotiated")]
    NotNegotiated,
    /// The checksum, or what it covers, is not within the frame.
    #[error("a checksum outside the frame")]
    Checksum,
    /// A way of cutting that does not exist, or not without a checksum.
    #[error("an impossible way of cutting the frame")]
    Kind,
    /// Pieces of no or an impossible size.
    #[error("pieces of an impossible size")]
    Size,
    /// The frame is not of the protocol that it is to be cut as, or its headers do not fit into it.
    #[error("headers that are not what the frame is to be cut as")]
    Protocol,
}

impl From<Lie> for Lost {
    fn from(lie: Lie) -> Self {
        match lie {
            Lie::NotNegotiated => Self::NotNegotiated,
            Lie::Checksum => Self::Checksum,
            Lie::Kind => Self::Kind,
            Lie::Size => Self::Size,
            Lie::Protocol => Self::Protocol,
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(usize::from(pair[0]) << 8 | usize::from(pair[1]))
}

/// The header for the host of a frame that came with `header`, if a driver with these features may ask for that.
///
/// # Errors
/// [`Lie`].
pub fn judge(header: &[u8; HEADER_BYTES], frame: &[u8], features: u64) -> Result<[u8; HEADER_BYTES], Lie> {
    let has = |bit: u32| features & (1 << bit) != 0;
    let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (kind, ecn) = (header[1] & !GSO_ECN, header[1] & GSO_ECN != 0);
    let (piece_bytes, checksum_start, checksum_offset) = (word(4), word(6), word(8));
    let mut out = [0; HEADER_BYTES];
    if header[0] & NEEDS_CSUM != 0 {
        if !has(VIRTIO_NET_F_CSUM) {
            return Err(Lie::NotNegotiated);
        }
        if checksum_start < FRAME_BYTES_MIN || checksum_start + checksum_offset + 2 > frame.len() {
            return Err(Lie::Checksum);
        }
        out[0] = NEEDS_CSUM;
        out[6..10].copy_from_slice(&header[6..10]);
    }
    if kind == GSO_NONE {
        return if ecn { Err(Lie::Kind) } else { Ok(out) };
    }
    let (bit, protocol, checksum_at) = match kind {
        GSO_TCPV4 => (VIRTIO_NET_F_HOST_TSO4, TCP, 16),
        GSO_TCPV6 => (VIRTIO_NET_F_HOST_TSO6, TCP, 16),
        GSO_UDP => (VIRTIO_NET_F_HOST_UFO, UDP, 6),
        GSO_UDP_L4 => (VIRTIO_NET_F_HOST_USO, UDP, 6),
        _ => return Err(Lie::Kind),
    };
    if !has(bit) || ecn && !has(VIRTIO_NET_F_HOST_ECN) {
        return Err(Lie::NotNegotiated);
    }
    if out[0] == 0 || ecn && protocol != TCP {
        return Err(Lie::Kind);
    }
    if piece_bytes < PIECE_BYTES_MIN || piece_bytes == PIECE_BYTES_FORBIDDEN {
        return Err(Lie::Size);
    }
    let wants_version = match kind {
        GSO_TCPV4 => Some(4),
        GSO_TCPV6 => Some(6),
        _ => None,
    };
    let transport = transport(frame, protocol, wants_version).ok_or(Lie::Protocol)?;
    let headers = transport + transport_bytes(frame, transport, protocol).ok_or(Lie::Protocol)?;
    if checksum_start != transport || checksum_offset != checksum_at || headers > frame.len() {
        return Err(Lie::Protocol);
    }
    out[1] = header[1];
    // A hint for the host; the driver's own is not needed.
    out[2..4].copy_from_slice(&(headers as u16).to_le_bytes());
    out[4..6].copy_from_slice(&header[4..6]);
    Ok(out)
}

/// Where the header of `protocol` begins, in a frame that is IP of that version (either, if `None`) and has one.
fn transport(frame: &[u8], protocol: u8, version: Option<u8>) -> Option<usize> {
    let mut at = 12;
    let mut ethertype = u16_at(frame, at)?;
    for _ in 0..TAGS_MAX {
        if !matches!(ethertype, 0x8100 | 0x88a8) {
            break;
        }
        at += 4;
        ethertype = u16_at(frame, at)?;
    }
    let network = at + 2;
    let (first, found) = match ethertype {
        0x0800 => (4, ipv4(frame, network, protocol)?),
        0x86dd => (6, ipv6(frame, network, protocol)?),
        _ => return None,
    };
    version.is_none_or(|version| version == first).then_some(found)
}

fn ipv4(frame: &[u8], at: usize, protocol: u8) -> Option<usize> {
    let header = frame.get(at..at + 20)?;
    let bytes = usize::from(header[0] & 0xf) * 4;
    // A fragment is not cut again, and has no header but in its first part.
    let fragment = u16_at(header, 6)? & 0x3fff != 0;
    (header[0] >> 4 == 4 && bytes >= 20 && header[9] == protocol && !fragment).then_some(at + bytes)
}

fn ipv6(frame: &[u8], at: usize, protocol: u8) -> Option<usize> {
    let header = frame.get(at..at + 40)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let (mut next, mut at) = (header[6], at + 40);
    for _ in 0..EXTENSIONS_MAX {
        if next == protocol {
            return Some(at);
        }
        // Hop by hop, routing, for the destination; a fragment is not cut again.
        if !matches!(next, 0 | 43 | 60) {
            return None;
        }
        let extension = frame.get(at..at + 2)?;
        next = extension[0];
        at += (usize::from(extension[1]) + 1) * 8;
    }
    None
}

/// Bytes of the transport header at `at`.
fn transport_bytes(frame: &[u8], at: usize, protocol: u8) -> Option<usize> {
    match protocol {
        TCP => {
            let bytes = usize::from(frame.get(at + 12)? >> 4) * 4;
            (bytes >= 20).then_some(bytes)
        }
        _ => Some(8),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = u64::MAX;

    /// A TCP frame over IPv4 with 4 KiB of data, and the header of a driver that wants it cut.
    fn tcp4() -> ([u8; HEADER_BYTES], Vec<u8>) {
        let mut frame = vec![0; 14 + 20 + 20 + 4096];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14] = 0x45;
        frame[23] = TCP;
        frame[34 + 12] = 5 << 4;
        ([1, GSO_TCPV4, 0, 0, 0xb4, 5, 34, 0, 16, 0, 9, 9], frame)
    }

    fn tcp6(extension: bool) -> ([u8; HEADER_BYTES], Vec<u8>) {
        let transport = 54 + if extension { 16 } else { 0 };
        let mut frame = vec![0; transport + 20 + 4096];
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[14] = 0x60;
        frame[20] = if extension { 60 } else { TCP };
        frame[54] = TCP;
        frame[55] = 1;
        frame[transport + 12] = 5 << 4;
        ([1, GSO_TCPV6, 0, 0, 0xb4, 5, transport as u8, 0, 16, 0, 0, 0], frame)
    }

    fn udp4(kind: u8) -> ([u8; HEADER_BYTES], Vec<u8>) {
        let (mut header, mut frame) = tcp4();
        frame[23] = UDP;
        (header[1], header[8]) = (kind, 6);
        (header, frame)
    }

    #[test]
    fn what_a_driver_may_ask_for_passes_without_what_the_host_has_no_use_for() {
        let (header, frame) = tcp4();
        let passed = judge(&header, &frame, ALL).unwrap();
        assert_eq!(passed, [1, GSO_TCPV4, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]);
        for (header, frame) in [tcp6(false), tcp6(true), udp4(GSO_UDP), udp4(GSO_UDP_L4)] {
            let passed = judge(&header, &frame, ALL).unwrap();
            assert_eq!(passed[4..10], header[4..10]);
        }
        let (mut header, mut frame) = tcp4();
        header[1] |= GSO_ECN;
        assert_eq!(judge(&header, &frame, ALL).unwrap()[1], GSO_TCPV4 | GSO_ECN);
        // Two tags: everything is eight bytes further back.
        frame.splice(12..12, [0x88, 0xa8, 0, 1, 0x81, 0, 0, 2]);
        header[6] += 8;
        assert_eq!(judge(&header, &frame, ALL).unwrap()[2], 62);
        // A frame without an offload, with nonsense where nobody looks.
        assert_eq!(
            judge(&[0xfe, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], &[0; 14], 0),
            Ok([0; 12])
        );
        let checksum = [1, 0, 0, 0, 0, 0, 20, 0, 4, 0, 0, 0];
        assert_eq!(judge(&checksum, &[0; 26], ALL), Ok(checksum));
    }

    #[test]
    fn a_checksum_lies_within_the_frame() {
        let header = |start: u16, offset: u16| {
            let mut header = [0; HEADER_BYTES];
            header[0] = 1;
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
            header
        };
        for (start, offset) in [(20, 5), (25, 0), (0, 0), (13, 4), (65535, 65535), (20, 65535)] {
            assert_eq!(
                judge(&header(start, offset), &[0; 26], ALL),
                Err(Lie::Checksum),
                "{start} {offset}"
            );
        }
        assert_eq!(judge(&header(20, 4), &[0; 26], 0), Err(Lie::NotNegotiated));
    }

    #[test]
    fn a_frame_is_cut_as_what_it_is_or_not_at_all() {
        type Change = fn(&mut [u8; HEADER_BYTES], &mut Vec<u8>);
        let lies: [(Lie, Change); 18] = [
            (Lie::Kind, |header, _| header[1] = 2),
            (Lie::Kind, |header, _| header[1] = 0x7f),
            (Lie::Kind, |header, _| header[1] = GSO_ECN),
            (Lie::Kind, |header, _| header[0] = 0),
            (Lie::Kind, |header, _| header[1] = GSO_UDP | GSO_ECN),
            (Lie::Size, |header, _| header[4..6].fill(0)),
            (Lie::Size, |header, _| header[4..6].copy_from_slice(&[7, 0])),
            (Lie::Size, |header, _| header[4..6].fill(0xff)),
            (Lie::Protocol, |header, _| header[1] = GSO_TCPV6),
            (Lie::Protocol, |header, _| header[1] = GSO_UDP),
            (Lie::Protocol, |header, _| header[6] = 35),
            (Lie::Protocol, |header, _| header[8] = 6),
            (Lie::Protocol, |_, frame| frame[12] = 0),
            (Lie::Protocol, |_, frame| frame[14] = 0x65),
            (Lie::Protocol, |_, frame| frame[14] = 0x44),
            (Lie::Protocol, |_, frame| frame[20] = 0x20),
            (Lie::Protocol, |_, frame| frame[34 + 12] = 4 << 4),
            // The frame ends within its own TCP header.
            (Lie::Protocol, |_, frame| frame.truncate(53)),
        ];
        for (number, (lie, change)) in lies.into_iter().enumerate() {
            let (mut header, mut frame) = tcp4();
            change(&mut header, &mut frame);
            assert_eq!(judge(&header, &frame, ALL), Err(lie), "{number}");
        }
        let (header, mut frame) = tcp6(true);
        frame[20] = 44;
        assert_eq!(judge(&header, &frame, ALL), Err(Lie::Protocol), "a fragment");
    }

    #[test]
    fn nothing_passes_that_was_not_negotiated() {
        let checksum = 1 << VIRTIO_NET_F_CSUM;
        for ((header, frame), bit) in [
            (tcp4(), VIRTIO_NET_F_HOST_TSO4),
            (tcp6(false), VIRTIO_NET_F_HOST_TSO6),
            (udp4(GSO_UDP), VIRTIO_NET_F_HOST_UFO),
            (udp4(GSO_UDP_L4), VIRTIO_NET_F_HOST_USO),
        ] {
            assert!(judge(&header, &frame, checksum | 1 << bit).is_ok());
            assert_eq!(judge(&header, &frame, ALL & !(1 << bit)), Err(Lie::NotNegotiated));
        }
        let (mut header, frame) = tcp4();
        header[1] |= GSO_ECN;
        assert_eq!(
            judge(&header, &frame, ALL & !(1 << VIRTIO_NET_F_HOST_ECN)),
            Err(Lie::NotNegotiated)
        );
    }

    proptest! {
        /// Whatever a guest writes: what the host is told lies within the frame.
        #[test]
        fn what_passes_is_within_the_frame(mut header in any::<[u8; HEADER_BYTES]>(), bytes in proptest::collection::vec(any::<u8>(), 14..120), shape in 0u8..5, features in prop_oneof![Just(ALL), any::<u64>()]) {
            let (template, mut frame) = match shape {
                0 => (header, Vec::new()),
                1 => tcp4(),
                2 => tcp6(false),
                3 => tcp6(true),
                _ => udp4(GSO_UDP_L4),
            };
            frame.truncate(bytes.len());
            let from = bytes.len() / 2;
            if frame.is_empty() { frame = bytes.clone() } else { frame[from..].copy_from_slice(&bytes[from..bytes.len()]) }
            if shape != 0 {
                header[..2].copy_from_slice(&template[..2]);
                header[6..10].copy_from_slice(&template[6..10]);
            }
            if let Ok(out) = judge(&header, &frame, features) {
                let word = |at: usize| usize::from(u16::from_le_bytes([out[at], out[at + 1]]));
                prop_assert_eq!(out[0] & !1, 0);
                prop_assert!(out[0] == 0 || word(6) + word(8) + 2 <= frame.len());
                prop_assert!(out[1] == 0 || (word(2) <= frame.len() && word(4) >= 8));
                prop_assert_eq!(word(10), 0);
            }
        }
    }
}
