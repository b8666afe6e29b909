//! Socket addresses in the form the kernel wants them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// A sockaddr_in or sockaddr_in6, in memory that is large enough for either.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct RawAddress {
    bytes: [u8; Self::BYTES],
    length: u32,
}

const V4_BYTES: u32 = 16;
const V6_BYTES: u32 = 28;

impl RawAddress {
    const BYTES: usize = 32;

    /// Room for an address.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            bytes: [0; Self::BYTES],
            length: Self::BYTES as u32,
        }
    }

    /// Where the kernel reads or writes it.
    pub fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        self.bytes.as_mut_ptr().cast()
    }

    /// Bytes of the address, or of the room for one.
    #[must_use]
    pub fn len(&self) -> libc::socklen_t {
        self.length
    }

    /// Whether it has no bytes; never true.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The address, of which the kernel says that it has `length` bytes.
    #[must_use]
    pub fn get(&self, length: libc::socklen_t) -> Option<SocketAddr> {
        let family = i32::from(u16::from_ne_bytes([self.bytes[0], self.bytes[1]]));
        let port = u16::from_be_bytes([self.bytes[2], self.bytes[3]]);
        match family {
            libc::AF_INET if length >= V4_BYTES => {
                let ip: [u8; 4] = self.bytes[4..8].try_into().ok()?;
                Some(SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::from(ip), port)))
            }
            libc::AF_INET6 if length >= V6_BYTES => {
                let ip: [u8; 16] = self.bytes[8..24].try_into().ok()?;
                let scope = u32::from_ne_bytes(self.bytes[24..28].try_into().ok()?);
                Some(SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope)))
            }
            _ => None,
        }
    }
}

impl From<SocketAddr> for RawAddress {
    fn from(address: SocketAddr) -> Self {
        let mut raw = Self::empty();
        raw.bytes[2..4].copy_from_slice(&address.port().to_be_bytes());
        let family = match address {
            SocketAddr::V4(v4) => {
                raw.bytes[4..8].copy_from_slice(&v4.ip().octets());
                raw.length = V4_BYTES;
                libc::AF_INET
            }
            SocketAddr::V6(v6) => {
                raw.bytes[8..24].copy_from_slice(&v6.ip().octets());
                raw.bytes[24..28].copy_from_slice(&v6.scope_id().to_ne_bytes());
                raw.length = V6_BYTES;
                libc::AF_INET6
            }
        };
        raw.bytes[0..2].copy_from_slice(&(family as u16).to_ne_bytes());
        raw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back() {
        for text in ["10.77.0.1:7000", "[::1]:7000", "[fe80::1%3]:9"] {
            let address: SocketAddr = text.parse().unwrap();
            let raw = RawAddress::from(address);
            assert_eq!(raw.get(raw.len()), Some(address));
        }
        assert_eq!(RawAddress::empty().get(32), None);
    }
}
