//! Command line, and the way from it to a running daemon.

use std::str::FromStr;

use clap::Parser;
use ft_vhost::{
    conventions::Conventions,
    daemon::{self, Membership, Signals},
    exit::End,
    guest_side::{GuestSide, net::NetGuestSide},
};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::{nic::Nic, tap::TapName};

/// vhost-user network device on a TAP. Exit codes: 0 ordinary end, 2 wrong usage, 3 environment, 4 halted, 6 this replica failed.
#[derive(Debug, Parser)]
#[command(name = "vhost-ft-net", version)]
pub struct Arguments {
    #[command(flatten)]
    conventions: Conventions,
    /// An existing TAP interface; opened once the device reaches the outside world.
    #[arg(long, value_name = "NAME", required_unless_present = "print_capabilities")]
    tap: Option<TapName>,
    /// MAC address of the guest; derived from VM and device (alone: TAP) name without it. The same on both hosts.
    #[arg(long, value_name = "MAC")]
    mac: Option<Mac>,
}

/// A unicast MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

/// Why a MAC address is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum MacError {
    /// Not six pairs of hex digits.
    #[error("expected six pairs of hex digits, as in 52:54:00:12:34:56")]
    Malformed,
    /// A group address cannot be a station's.
    #[error("a multicast address cannot be a guest's: the first byte must be even")]
    Multicast,
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let hex = |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            let part = parts.next().filter(hex).ok_or(MacError::Malformed)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError::Malformed)?;
        }
        match parts.next() {
            Some(_) => Err(MacError::Malformed),
            None if mac[0] & 1 != 0 => Err(MacError::Multicast),
            None => Ok(Self(mac)),
        }
    }
}

impl Mac {
    /// An address of QEMU's prefix, always the same for a name.
    #[must_use]
    pub fn derived(name: &str) -> Self {
        let digest = Sha256::digest(name);
        Self([0x52, 0x54, 0x00, digest[0], digest[1], digest[2]])
    }
}

/// Digest of what both hosts must agree on.
fn fingerprint(mac: Mac) -> [u8; 32] {
    let guest = NetGuestSide::new(mac.0);
    let mut digest = Sha256::new();
    digest.update(b"net");
    digest.update(mac.0);
    digest.update(guest.features().to_le_bytes());
    digest.finalize().into()
}

/// Runs the daemon.
///
/// # Errors
/// [`End`].
pub fn run(arguments: Arguments) -> Result<(), End> {
    let conventions = &arguments.conventions;
    if let Some(capabilities) = conventions.capabilities("net", &[]) {
        println!("{capabilities}");
        return Ok(());
    }
    let tap = arguments.tap.expect("clap asks for it");
    let signals = Signals::take().map_err(End::environment)?;
    let mac = arguments.mac.unwrap_or_else(|| {
        Mac::derived(&match conventions.membership() {
            Some(Membership { vm, device, .. }) => format!("{vm}/{device}"),
            None => tap.to_string(),
        })
    });
    // A TAP that is missing is better noticed now than when a failover wants it.
    tap.check().map_err(End::environment)?;
    let options = conventions.options();
    let make = move || Ok(Nic::new(tap.clone(), mac.0));
    daemon::serve(&options, "vhost-ft-net", 1, make, signals, || Ok(fingerprint(mac)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_read_as_people_write_them() {
        assert_eq!("52:54:00:Ab:cd:01".parse(), Ok(Mac([0x52, 0x54, 0, 0xab, 0xcd, 1])));
        for malformed in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:01:02",
            "52:54:00:ab:cd:1",
            "52-54-00-ab-cd-01",
            "52:54:00:ab:cd:+1",
        ] {
            assert_eq!(malformed.parse::<Mac>(), Err(MacError::Malformed), "{malformed}");
        }
        assert_eq!("01:00:5e:00:00:01".parse::<Mac>(), Err(MacError::Multicast));
        assert_eq!(Mac::derived("vm/net0"), Mac::derived("vm/net0"));
        assert_ne!(Mac::derived("vm/net0"), Mac::derived("vm/net1"));
        assert_ne!(fingerprint(Mac::derived("a")), fingerprint(Mac::derived("b")));
    }
}
