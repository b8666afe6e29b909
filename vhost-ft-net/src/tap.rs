//! The host's end of the network: a TAP interface. This module is the home of its ioctls.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    str::FromStr,
};

use ft_vhost::guest_side::net::HEADER_BYTES;
use nix::net::if_::if_nametoindex;
use thiserror::Error;

/// Why a TAP cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// The kernel would silently create another.
    #[error("no network interface '{0}': create it first (ip tuntap add {0} mode tap)")]
    Missing(TapName),
    /// /dev/net/tun.
    #[error("cannot open /dev/net/tun: {0}")]
    Device(io::Error),
    /// Not a TAP, in use, or not ours.
    #[error("cannot attach to TAP '{name}': {source}. Is it a TAP (not multi_queue) that nobody else uses?")]
    Attach {
        /// Interface.
        name: TapName,
        /// Why.
        source: io::Error,
    },
}

/// Name of an interface: 1 to 15 bytes without NUL, '/' or white space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapName(String);

/// Not a name an interface can have.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("an interface name has 1 to 15 characters, without spaces and slashes")]
pub struct TapNameError;

impl FromStr for TapName {
    type Err = TapNameError;

    fn from_str(name: &str) -> Result<Self, TapNameError> {
        let legal = (1..libc::IFNAMSIZ).contains(&name.len())
            && !name.contains(|c: char| c == '/' || c == '\0' || c == ':' || c == '%' || c.is_whitespace());
        legal.then(|| Self(name.to_owned())).ok_or(TapNameError)
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TapName {
    /// Whether there is such an interface.
    ///
    /// # Errors
    /// [`TapError::Missing`].
    pub fn check(&self) -> Result<(), TapError> {
        if_nametoindex(self.0.as_str())
            .map(drop)
            .map_err(|_| TapError::Missing(self.clone()))
    }
}

/// An attached TAP. Frames carry a header of [`HEADER_BYTES`]; no offload is on.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Attaches to an existing interface: its link goes up.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &TapName) -> Result<Self, TapError> {
        name.check()?;
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Device)?;
        attach(&file, name).map_err(|source| TapError::Attach {
            name: name.clone(),
            source,
        })?;
        Ok(Self { file })
    }

    /// Reads one frame with its header; `None` if there is none.
    ///
    /// # Errors
    /// As read(2).
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.file).read(buffer) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends one frame with its header.
    ///
    /// # Errors
    /// As write(2): the interface is down, say.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn attach(file: &File, name: &TapName) -> io::Result<()> {
    // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.0.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    let header_bytes = HEADER_BYTES as libc::c_int;
    let fd = file.as_raw_fd();
    // SAFETY: the descriptor is open; each request gets the argument type it is defined with, alive for the call.
    unsafe {
        check(libc::ioctl(fd, libc::TUNSETIFF, &raw mut request))?;
        check(libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header_bytes))?;
        check(libc::ioctl(fd, libc::TUNSETOFFLOAD, 0 as libc::c_ulong))
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_before_the_kernel_sees_them() {
        assert!("tap0".parse::<TapName>().is_ok());
        for illegal in ["", "sixteen-bytes-xx", "a b", "a/b", "tap%d"] {
            assert_eq!(illegal.parse::<TapName>(), Err(TapNameError), "{illegal}");
        }
        let missing: TapName = "no-such-tap".parse().unwrap();
        assert!(matches!(missing.check(), Err(TapError::Missing(_))));
    }
}
