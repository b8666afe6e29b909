//! After a failover the network must learn that the guest's addresses are here now: gratuitous ARP and RARP (paper §4.2 calls
//! for nothing less on a switched network).

use std::net::Ipv4Addr;

use ft_vhost::guest_side::net::Frame;

/// Addresses remembered.
const ADDRESSES_MAX: usize = 64;
/// When the announcements after the first one are due, after it: the switch port may need a moment to forward.
const REPEATS_NS: [u64; 2] = [20_000_000, 100_000_000];

const ETHERTYPE: std::ops::Range<usize> = 12..14;
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
const RARP: [u8; 2] = [0x80, 0x35];
const BROADCAST: [u8; 6] = [0xff; 6];
/// Without the checksum; shorter ones are padded.
const FRAME_BYTES_MIN: usize = 60;

/// The addresses a guest speaks from.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    seen: Vec<Ipv4Addr>,
    /// Most frames come from the address the last one came from.
    last: Option<Ipv4Addr>,
}

impl Addresses {
    /// Notes the source address of a frame the guest sent.
    pub fn note(&mut self, frame: &[u8]) {
        let Some(address) = source(frame).filter(|address| Some(*address) != self.last) else {
            return;
        };
        self.last = Some(address);
        if !self.seen.contains(&address) && self.seen.len() < ADDRESSES_MAX {
            self.seen.push(address);
        }
    }

    /// What to send so that the network finds them at `mac`.
    #[must_use]
    pub fn announcements(&self, mac: [u8; 6]) -> Vec<Frame> {
        let arps = self.seen.iter().map(|address| frame(mac, ARP, 1, *address));
        arps.chain([rarp(mac)]).collect()
    }
}

/// The IPv4 source of an ARP or IPv4 frame, if a station can have it.
fn source(frame: &[u8]) -> Option<Ipv4Addr> {
    let at = match frame.get(ETHERTYPE)? {
        kind if kind == IPV4 => 26,
        kind if kind == ARP => 28,
        _ => return None,
    };
    let bytes: [u8; 4] = frame.get(at..at + 4)?.try_into().ok()?;
    let address = Ipv4Addr::from(bytes);
    let possible =
        !address.is_unspecified() && !address.is_broadcast() && !address.is_multicast() && !address.is_loopback();
    possible.then_some(address)
}

/// What switches learn from that `mac` is here.
#[must_use]
pub fn rarp(mac: [u8; 6]) -> Frame {
    frame(mac, RARP, 3, Ipv4Addr::UNSPECIFIED)
}

/// An ARP or RARP request about ourselves.
fn frame(mac: [u8; 6], ethertype: [u8; 2], operation: u8, address: Ipv4Addr) -> Frame {
    let mut bytes = Vec::with_capacity(FRAME_BYTES_MIN);
    bytes.extend_from_slice(&BROADCAST);
    bytes.extend_from_slice(&mac);
    bytes.extend_from_slice(&ethertype);
    // Ethernet, IPv4, lengths of their addresses, operation.
    bytes.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    bytes.extend_from_slice(&mac);
    bytes.extend_from_slice(&address.octets());
    // RARP asks for its own address; a gratuitous ARP asks nobody.
    bytes.extend_from_slice(if ethertype == RARP { &mac } else { &[0; 6] });
    bytes.extend_from_slice(&address.octets());
    bytes.resize(FRAME_BYTES_MIN, 0);
    Frame::new(&bytes)
}

/// When to announce again.
#[derive(Clone, Debug, Default)]
pub struct Repeats {
    due_ns: Vec<u64>,
}

impl Repeats {
    /// The first announcement was made.
    #[must_use]
    pub fn after(now_ns: u64) -> Self {
        Self {
            due_ns: REPEATS_NS.iter().rev().map(|delay| now_ns + delay).collect(),
        }
    }

    /// Whether to announce now.
    pub fn take_due(&mut self, now_ns: u64) -> bool {
        let due = self.next().is_some_and(|due| due <= now_ns);
        if due {
            self.due_ns.pop();
        }
        due
    }

    /// When to look again.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        self.due_ns.last().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    fn ipv4(source: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[ETHERTYPE].copy_from_slice(&IPV4);
        frame[26..30].copy_from_slice(&source);
        frame
    }

    #[test]
    fn every_source_address_is_announced_once_and_the_mac_always() {
        let mut addresses = Addresses::default();
        assert_eq!(addresses.announcements(MAC).len(), 1);
        for source in [
            [10, 0, 0, 1],
            [10, 0, 0, 1],
            [0; 4],
            [255; 4],
            [224, 0, 0, 1],
            [10, 0, 0, 2],
            [10, 0, 0, 1],
        ] {
            addresses.note(&ipv4(source));
        }
        // A gratuitous ARP says its own sender.
        let own = frame(MAC, ARP, 1, Ipv4Addr::new(10, 0, 0, 3));
        addresses.note(own.ethernet());
        addresses.note(&[0; 13]);
        addresses.note(&ipv4([10, 0, 0, 9])[..28]);
        let frames = addresses.announcements(MAC);
        assert_eq!(frames.len(), 4);
        assert_eq!(frames[2], own);
        assert_eq!(frames[3].ethernet()[ETHERTYPE], RARP);
    }

    #[test]
    fn an_announcement_is_byte_for_byte_what_the_standard_says() {
        let mut expected = vec![0xff; 6];
        expected.extend_from_slice(&MAC);
        expected.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        expected.extend_from_slice(&MAC);
        expected.extend_from_slice(&[10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1]);
        expected.resize(60, 0);
        assert_eq!(frame(MAC, ARP, 1, Ipv4Addr::new(10, 0, 0, 1)).ethernet(), expected);
    }

    #[test]
    fn repeats_come_one_after_the_other() {
        let mut repeats = Repeats::after(1000);
        assert!(!repeats.take_due(1000));
        assert!(repeats.take_due(20_001_000));
        assert!(!repeats.take_due(20_001_000));
        assert_eq!(repeats.next(), Some(100_001_000));
        assert!(repeats.take_due(200_000_000));
        assert_eq!(repeats.next(), None);
    }
}
