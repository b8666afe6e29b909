//! The host's end of the network: a TAP interface. This module is the home of its ioctls.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, RawFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    str::FromStr,
    time::{Duration, Instant},
};

use ft_client::counters::Lost;
use ft_vhost::guest_side::net::{FRAME_BYTES_MIN, HEADER_BYTES, MTUS};
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

/// Why a TAP, or what stands in its place, cannot be used.
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
    /// No such socket, or not on this interface.
    #[error(
        "cannot open a packet socket on '{name}': {source}. Is it an Ethernet interface, and is CAP_NET_RAW given? Linux 4.20 is the oldest that will do"
    )]
    Packet {
        /// Interface.
        name: TapName,
        /// Why.
        source: io::Error,
    },
    /// Frames that nobody sent like this would be lost.
    #[error(
        "'{0}' puts frames together, which the driver of a protected VM cannot take: ethtool -K {0} gro off lro off"
    )]
    Merges(TapName),
    /// Only Ethernet has addresses for a guest.
    #[error("'{0}' is not an Ethernet interface")]
    NotEthernet(TapName),
    /// Bridges and the host would take the guest's frames for the interface's own.
    #[error("the guest cannot have the address of '{0}' itself: give it another --mac")]
    Mac(TapName),
    /// A macvtap gives what is for its own address, and nothing else.
    #[error("macvtap '{0}' is for a guest with its own address: leave --mac out, or ip link set {0} address, which is {mac} now", mac = shown(.1))]
    MacvtapMac(TapName, [u8; 6]),
    /// Longer frames would be lost.
    #[error("the guest is to be told an MTU of {mtu}, but '{name}' has {has}: ip link set {name} mtu {mtu}")]
    Mtu {
        /// Interface.
        name: TapName,
        /// MTU of the interface.
        has: i32,
        /// MTU for the guest.
        mtu: u16,
    },
}

fn shown(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
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
    /// Its characters.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// An ioctl's argument that names the interface.
    pub(crate) fn request(&self) -> libc::ifreq {
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
        let (own, _) = self.facts()?;
        if own == mac {
            return Err(TapError::Mac(self.clone()));
        }
        self.mtu(mtu)
    }

    /// The address of the interface, which a macvtap's guest has, and the MTU that the guest is told.
    ///
    /// # Errors
    /// [`TapError`], also if the guest is to have another address.
    pub fn macvtap_for(&self, mac: Option<[u8; 6]>, mtu: Option<u16>) -> Result<([u8; 6], Option<u16>), TapError> {
        let (own, _) = self.facts()?;
        if mac.is_some_and(|mac| mac != own) {
            return Err(TapError::MacvtapMac(self.clone(), own));
        }
        Ok((own, self.mtu(mtu)?))
    }

    fn mtu(&self, mtu: Option<u16>) -> Result<Option<u16>, TapError> {
        let (_, has) = self.facts()?;
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

    /// Address and MTU of the interface.
    fn facts(&self) -> Result<([u8; 6], i32), TapError> {
        let failed = TapError::of(self);
        let (mut link, mut size) = (self.request(), self.request());
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|error| TapError::of(self)(error.into()))?;
        let fd = socket.as_raw_fd();
        // SAFETY: the socket is open; each request gets the argument type it is defined with, alive for the call, and fills in the part
        // that is read.
        let (kind, own, has) = unsafe {
            check(libc::ioctl(fd, libc::SIOCGIFHWADDR, &raw mut link))
                .and_then(|()| check(libc::ioctl(fd, libc::SIOCGIFMTU, &raw mut size)))
                .map_err(failed)?;
            let address = link.ifr_ifru.ifru_hwaddr;
            (address.sa_family, address.sa_data, size.ifr_ifru.ifru_mtu)
        };
        match kind {
            libc::ARPHRD_ETHER => Ok((std::array::from_fn(|at| own[at] as u8), has)),
            _ => Err(TapError::NotEthernet(self.clone())),
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

/// Numbers of /dev/net/tun (Linux' devices.txt); a macvtap's device has others.
const TUN_MAJOR: libc::c_uint = 10;
const TUN_MINOR: libc::c_uint = 200;
/// How long a TAP that somebody has is tried again: the kernel takes it from a daemon that was killed a moment after its end.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
/// How often: nothing tells when it is free.
const BUSY_RETRY: Duration = Duration::from_millis(10);

/// What a look for a frame gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Nothing is there.
    Nothing,
    /// A frame, and its bytes with the header.
    Frame(usize),
    /// A frame that is not for the guest.
    Lost(Lost),
}

/// One queue of an attached TAP (or macvtap). Frames carry a header of [`HEADER_BYTES`].
#[derive(Debug)]
pub struct Tap {
    file: File,
    many: bool,
    is_macvtap: bool,
}

#[cfg(test)]
impl From<File> for Tap {
    /// Something else that gives and takes frames.
    fn from(file: File) -> Self {
        Self {
            file,
            many: false,
            is_macvtap: false,
        }
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
        Ok(Self {
            file,
            many,
            is_macvtap: false,
        })
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
        let metadata = file.metadata().map_err(refused)?;
        let tap = Self {
            file,
            many: flags & libc::IFF_MULTI_QUEUE != 0,
            is_macvtap: metadata.rdev() != libc::makedev(TUN_MAJOR, TUN_MINOR),
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
            is_macvtap: self.is_macvtap,
        })
    }

    /// Whether it is a macvtap's.
    #[must_use]
    pub fn is_macvtap(&self) -> bool {
        self.is_macvtap
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

    /// Drops the next frame; `false` if there is none.
    ///
    /// # Errors
    /// As read(2).
    pub fn discard(&self) -> io::Result<bool> {
        match (&self.file).read(&mut [0; HEADER_BYTES]) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads one frame of at most `bytes_max` with its header, and appends it. A runt is dropped.
    ///
    /// # Errors
    /// As read(2).
    pub fn receive_onto(&self, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<Received> {
        buffer.reserve(bytes_max);
        let (fd, start) = (self.file.as_raw_fd(), buffer.len());
        // SAFETY: the buffer has room for `bytes_max` bytes behind its content, and nobody else has it during the call.
        let result = unsafe { libc::read(fd, buffer.as_mut_ptr().add(start).cast(), bytes_max) };
        let Ok(bytes) = usize::try_from(result) else {
            return match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
                error => Err(error),
            };
        };
        if bytes < HEADER_BYTES + FRAME_BYTES_MIN {
            return Ok(Received::Lost(Lost::Runt));
        }
        // SAFETY: the kernel wrote so many bytes there, at most `bytes_max`.
        unsafe { buffer.set_len(start + bytes) };
        Ok(Received::Frame(bytes))
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

pub(crate) fn check(result: libc::c_int) -> io::Result<()> {
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
