//! The host's end of the network, whichever it is: queues of a [TAP](Tap), or a [packet socket](PacketSocket).

use std::{
    fmt, io,
    os::fd::{AsRawFd, RawFd},
};

use ft_vhost::guest_side::net::{FRAME_BYTES_MAX, HEADER_BYTES};

use crate::{
    packet::PacketSocket,
    tap::{Received, Tap, TapError, TapName},
};

/// What the operator named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// A TAP.
    Tap(TapName),
    /// Another Ethernet interface.
    Interface(TapName),
}

impl Named {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &TapName {
        match self {
            Self::Tap(name) | Self::Interface(name) => name,
        }
    }

    /// Whether it can be the host's end of a protected device, which opens it later.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn check(&self, mac: [u8; 6]) -> Result<(), TapError> {
        match self {
            Self::Tap(name) => name.check(),
            Self::Interface(name) => {
                let socket = PacketSocket::open(name)?;
                socket.check_merges_nothing()?;
                name.mtu_for(mac, None).map(drop)
            }
        }
    }

    /// Opens it for a driver without offloads.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(&self) -> Result<HostEnd, TapError> {
        match self {
            Self::Tap(name) => Tap::open(name).map(HostEnd::Tap),
            Self::Interface(name) => PacketSocket::open(name).map(HostEnd::Packet),
        }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().fmt(f)
    }
}

/// See the module. Frames carry a header of [`HEADER_BYTES`].
#[derive(Debug)]
pub enum HostEnd {
    /// A queue of a TAP.
    Tap(Tap),
    /// A packet socket.
    Packet(PacketSocket),
}

impl HostEnd {
    /// The same for another thread.
    ///
    /// # Errors
    /// As dup(2).
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tap(tap) => Self::Tap(tap.try_clone()?),
            Self::Packet(socket) => Self::Packet(socket.try_clone()?),
        })
    }

    /// Whether frames may come.
    ///
    /// # Errors
    /// As ioctl(2) and bind(2).
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_attached(attached),
            Self::Packet(socket) => socket.set_attached(attached),
        }
    }

    /// The features that a driver may be offered.
    #[must_use]
    pub fn offloads(&self) -> u64 {
        match self {
            Self::Tap(tap) => tap.offloads(),
            Self::Packet(socket) => socket.offloads(),
        }
    }

    /// Frames come as a driver with these features takes them.
    ///
    /// # Errors
    /// As ioctl(2).
    pub fn set_offloads(&mut self, features: u64) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_offloads(features),
            Self::Packet(socket) => {
                socket.set_offloads(features);
                Ok(())
            }
        }
    }

    /// Reads one frame and appends it with its header.
    ///
    /// # Errors
    /// As read(2).
    pub fn receive_onto(&mut self, out: &mut Vec<u8>) -> io::Result<Received> {
        match self {
            Self::Tap(tap) => tap.receive_onto(out, HEADER_BYTES + FRAME_BYTES_MAX),
            Self::Packet(socket) => socket.receive_onto(out),
        }
    }

    /// Drops the next frame; `false` if there is none.
    ///
    /// # Errors
    /// As read(2).
    pub fn discard(&mut self) -> io::Result<bool> {
        match self {
            Self::Tap(tap) => tap.discard(),
            Self::Packet(socket) => socket.discard(),
        }
    }

    /// Sends one frame with its header.
    ///
    /// # Errors
    /// As write(2).
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.send(packet),
            Self::Packet(socket) => socket.send(packet),
        }
    }
}

impl AsRawFd for HostEnd {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tap(tap) => tap.as_raw_fd(),
            Self::Packet(socket) => socket.as_raw_fd(),
        }
    }
}
