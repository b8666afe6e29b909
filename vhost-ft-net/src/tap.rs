//! The host's end of the network: a TAP interface. This module is the home of its ioctls.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    str::FromStr,
    time::{Duration, Instant},
};

use ft_vhost::guest_side::net::{HEADER_BYTES, MTUS};
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};
use thiserror::Error;
use tracing::info;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
};

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
    #[error("cannot attach to TAP '{name}': {source}. Is it a TAP that nobody else uses?")]
    Attach {
        /// Interface.
        name: TapName,
        /// Why.
        source: io::Error,
    },
    /// The interface does not have so many.
    #[error(
        "cannot attach to {count} queues of TAP '{name}': {source}. Was it made with multi_queue, and does nobody else use it?"
    )]
    Queues {
        /// Interface.
        name: TapName,
        /// Queues.
        count: u16,
        /// Why.
        source: io::Error,
    },
    /// What was inherited is no such thing.
    #[error("descriptor {fd} cannot be a queue of the device: {source}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// Why.
        source: io::Error,
    },
    /// Queues that were inherited belong together.
    #[error("the descriptors are of different interfaces: '{0}' and '{1}'")]
    Different(TapName, TapName),
    /// Bridges and the host would take the guest's frames for the interface's own.
    #[error("the guest cannot have the address of TAP '{0}' itself: give it another --mac")]
    Mac(TapName),
    /// Longer frames would be lost.
    #[error("the guest is to be told an MTU of {mtu}, but TAP '{name}' has {has}: ip link set {name} mtu {mtu}")]
    Mtu {
        /// Interface.
        name: TapName,
        /// MTU of the interface.
        has: i32,
        /// MTU for the guest.
        mtu: u16,
    },
}

impl TapError {
    fn of(name: &TapName) -> impl FnOnce(io::Error) -> Self + use<> {
        let name = name.clone();
        |source| Self::Attach { name, source }
    }
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
    /// An ioctl's argument that names the interface.
    fn request(&self) -> libc::ifreq {
        // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.0.bytes()) {
            *to = from as libc::c_char;
        }
        request
    }

    /// The MTU that a guest with this address is told: this one, or the interface's own; the latter only if the guest can be told of it.
    ///
    /// # Errors
    /// [`TapError`] if that guest cannot be behind this interface.
    pub fn mtu_for(&self, mac: [u8; 6], mtu: Option<u16>) -> Result<Option<u16>, TapError> {
        let failed = TapError::of(self);
        let (mut link, mut size) = (self.request(), self.request());
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|error| TapError::of(self)(error.into()))?;
        let fd = socket.as_raw_fd();
        // SAFETY: the socket is open; each request gets the argument type it is defined with, alive for the call, and fills in the part
        // that is read.
        let (own, has) = unsafe {
            check(libc::ioctl(fd, libc::SIOCGIFHWADDR, &raw mut link))
                .and_then(|()| check(libc::ioctl(fd, libc::SIOCGIFMTU, &raw mut size)))
                .map_err(failed)?;
            (link.ifr_ifru.ifru_hwaddr.sa_data, size.ifr_ifru.ifru_mtu)
        };
        if own[..6].iter().map(|byte| *byte as u8).eq(mac) {
            return Err(TapError::Mac(self.clone()));
        }
        match mtu {
            Some(mtu) if i32::from(mtu) > has => Err(TapError::Mtu {
                name: self.clone(),
                has,
                mtu,
            }),
            Some(mtu) => Ok(Some(mtu)),
            None => Ok(u16::try_from(has).ok().filter(|has| MTUS.contains(has))),
        }
    }

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

/// How long a TAP that somebody has is tried again: the kernel takes it from a daemon that was killed a moment after its end.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
/// How often: nothing tells when it is free.
const BUSY_RETRY: Duration = Duration::from_millis(10);

/// One queue of an attached TAP (or macvtap). Frames carry a header of [`HEADER_BYTES`].
#[derive(Debug)]
pub struct Tap {
    file: File,
    many: bool,
}

#[cfg(test)]
impl From<File> for Tap {
    /// Something else that gives and takes frames.
    fn from(file: File) -> Self {
        Self { file, many: false }
    }
}

/// What of the header a TAP understands, and the features with which a driver takes and gives it.
const OFFLOADS: [(libc::c_uint, &[u32], &[u32]); 6] = [
    (libc::TUN_F_CSUM, &[VIRTIO_NET_F_GUEST_CSUM], &[VIRTIO_NET_F_CSUM]),
    (libc::TUN_F_TSO4, &[VIRTIO_NET_F_GUEST_TSO4], &[VIRTIO_NET_F_HOST_TSO4]),
    (libc::TUN_F_TSO6, &[VIRTIO_NET_F_GUEST_TSO6], &[VIRTIO_NET_F_HOST_TSO6]),
    (libc::TUN_F_TSO_ECN, &[VIRTIO_NET_F_GUEST_ECN], &[VIRTIO_NET_F_HOST_ECN]),
    (libc::TUN_F_UFO, &[VIRTIO_NET_F_GUEST_UFO], &[VIRTIO_NET_F_HOST_UFO]),
    // The kernel has both or none.
    (
        libc::TUN_F_USO4 | libc::TUN_F_USO6,
        &[VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6],
        &[VIRTIO_NET_F_HOST_USO],
    ),
];

fn bits(features: &[u32]) -> u64 {
    features.iter().fold(0, |bits, bit| bits | 1 << bit)
}

impl Tap {
    /// Attaches to an existing interface: its link goes up.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &TapName) -> Result<Self, TapError> {
        name.check()?;
        let attached = Self::attached(name, 0).or_else(|error| match &error {
            TapError::Attach { source, .. } if source.kind() == io::ErrorKind::InvalidInput => {
                Self::attached(name, libc::IFF_MULTI_QUEUE)
            }
            _ => Err(error),
        });
        let tap = attached?;
        tap.set_offloads(0).map_err(TapError::of(name))?;
        Ok(tap)
    }

    /// Attaches to so many queues of an existing interface, which gets no frames to them before [`Tap::set_attached`]. One queue may be
    /// that of an interface that has one only.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open_queues(name: &TapName, count: u16) -> Result<Vec<Self>, TapError> {
        let taps = match count {
            1 => vec![Self::open(name)?],
            _ => {
                name.check()?;
                let attach = |_| Self::attached(name, libc::IFF_MULTI_QUEUE);
                (0..count)
                    .map(attach)
                    .collect::<Result<_, _>>()
                    .map_err(|error| match error {
                        TapError::Attach { name, source } => TapError::Queues { name, count, source },
                        other => other,
                    })?
            }
        };
        for tap in &taps {
            tap.set_offloads(0)
                .and_then(|()| tap.set_attached(false))
                .map_err(TapError::of(name))?;
        }
        Ok(taps)
    }

    fn attached(name: &TapName, more: libc::c_int) -> Result<Self, TapError> {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Device)?;
        let deadline = Instant::now() + BUSY_PATIENCE;
        let mut told = false;
        while let Err(error) = attach(&file, name, more) {
            if error.kind() != io::ErrorKind::ResourceBusy || Instant::now() > deadline {
                return Err(TapError::of(name)(error));
            }
            if !std::mem::replace(&mut told, true) {
                info!(tap = %name, "somebody has the TAP: tried again for a moment");
            }
            std::thread::sleep(BUSY_RETRY);
        }
        let many = more & libc::IFF_MULTI_QUEUE != 0;
        Ok(Self { file, many })
    }

    /// A queue that somebody else attached: of a TAP with IFF_VNET_HDR and IFF_NO_PI, or a macvtap.
    ///
    /// # Errors
    /// [`TapError::Descriptor`].
    pub fn from_descriptor(fd: RawFd) -> Result<(Self, TapName), TapError> {
        let refused = |source| TapError::Descriptor { fd, source };
        // SAFETY: the descriptor was inherited for this, and is looked at before anything else is done with it.
        let open = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        check(open).map_err(refused)?;
        // SAFETY: it is open, and belongs to whoever was told its number: this daemon.
        let file = unsafe { File::from_raw_fd(fd) };
        let (name, flags) = interface(&file).map_err(refused)?;
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            let reason = "not a TAP with IFF_VNET_HDR and IFF_NO_PI";
            return Err(refused(io::Error::new(io::ErrorKind::InvalidInput, reason)));
        }
        let tap = Self {
            file,
            many: flags & libc::IFF_MULTI_QUEUE != 0,
        };
        prepare(&tap.file)
            .and_then(|()| tap.set_offloads(0))
            .and_then(|()| tap.set_attached(false))
            .map_err(refused)?;
        Ok((tap, name))
    }

    /// The same queue for another thread.
    ///
    /// # Errors
    /// As dup(2).
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            many: self.many,
        })
    }

    /// Whether frames may come to this queue: the kernel distributes them among those that are attached. An interface with one queue
    /// keeps it.
    ///
    /// # Errors
    /// As ioctl(2).
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        if !self.many {
            return Ok(());
        }
        // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flags = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the descriptor is open; the request gets the argument type it is defined with, alive for the call.
        let result = check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) });
        match result {
            // It is so already.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput && self.is_attached() == Some(attached) => Ok(()),
            other => other,
        }
    }

    /// Whether the kernel takes the queue for attached; unknown where the interface has one queue.
    fn is_attached(&self) -> Option<bool> {
        let (_, flags) = interface(&self.file).ok()?;
        self.many.then_some(flags & libc::IFF_DETACH_QUEUE == 0)
    }

    /// The features that a driver may be offered on this interface: those of the offloads that the kernel takes.
    #[must_use]
    pub fn offloads(&self) -> u64 {
        let segments = libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
        let mut features = 0;
        for (offload, takes, gives) in OFFLOADS {
            // One without what it stands on is refused, or ignored.
            let with = match offload {
                libc::TUN_F_TSO_ECN => libc::TUN_F_CSUM | segments,
                _ => libc::TUN_F_CSUM,
            };
            if self.set_raw_offloads(offload | with).is_ok() {
                features |= bits(takes) | bits(gives);
            }
        }
        // What was just accepted can be taken back.
        let _ = self.set_raw_offloads(0);
        features
    }

    /// Has the kernel hand over frames as a driver with these features takes them.
    ///
    /// # Errors
    /// As ioctl(2).
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let taken = |(_, takes, _): &&(_, &[u32], _)| features & bits(takes) == bits(takes);
        let offloads = OFFLOADS
            .iter()
            .filter(taken)
            .fold(0, |all, (offload, ..)| all | offload);
        // All of them stand on the first.
        let stands = offloads & libc::TUN_F_CSUM != 0;
        self.set_raw_offloads(if stands { offloads } else { 0 })
    }

    fn set_raw_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        // SAFETY: the descriptor is open; the argument is a number.
        check(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        })
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

    /// Reads one frame of at most `bytes_max` with its header, and appends it; `None` if there is none.
    ///
    /// # Errors
    /// As read(2).
    pub fn receive_onto(&self, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<Option<usize>> {
        buffer.reserve(bytes_max);
        let (fd, start) = (self.file.as_raw_fd(), buffer.len());
        // SAFETY: the buffer has room for `bytes_max` bytes behind its content, and nobody else has it during the call.
        let result = unsafe { libc::read(fd, buffer.as_mut_ptr().add(start).cast(), bytes_max) };
        let Ok(bytes) = usize::try_from(result) else {
            return match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            };
        };
        // SAFETY: the kernel wrote so many bytes there, at most `bytes_max`.
        unsafe { buffer.set_len(start + bytes) };
        Ok(Some(bytes))
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

fn attach(file: &File, name: &TapName, more: libc::c_int) -> io::Result<()> {
    let mut request = name.request();
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more) as libc::c_short;
    // SAFETY: the descriptor is open; the request gets the argument type it is defined with, alive for the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    prepare(file)
}

/// Frames come with our header, and nobody waits for them.
fn prepare(file: &File) -> io::Result<()> {
    let header_bytes = HEADER_BYTES as libc::c_int;
    let fd = file.as_raw_fd();
    // SAFETY: the descriptor is open; each request gets the argument type it is defined with, alive for the call.
    unsafe {
        check(libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header_bytes))?;
        let flags = libc::fcntl(fd, libc::F_GETFL);
        check(flags)?;
        check(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK))
    }
}

/// Name and flags of the interface behind a descriptor.
fn interface(file: &File) -> io::Result<(TapName, libc::c_int)> {
    // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open; the request gets the argument type it is defined with, alive for the call; it fills in the flags.
    let flags = unsafe {
        check(libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request))?;
        request.ifr_ifru.ifru_flags
    };
    let name: String = request
        .ifr_name
        .iter()
        .take_while(|byte| **byte != 0)
        .map(|byte| char::from(*byte as u8))
        .collect();
    Ok((TapName(name), libc::c_int::from(flags as u16)))
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
