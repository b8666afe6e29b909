//! The hosts and their cables.
//!
//! ```text
//!  client               switch                         host A                        host B
//!  ┌──────────────┐     ┌──────────────────────────┐   ┌─────────────────────────┐
//!  │ eth0         ├─────┤ lan-c ┐                  │   │                         │   as host A,
//!  │ 10.77.0.1/24 │     │      lan (bridge) ─ lan-a┼───┤ eth0 ── lan (bridge)    │   10.78.0.2/24
//!  └──────────────┘     │       └───────────  lan-b│   │          └── tap0 ── VM │
//!                       │                          │   │                         │
//!                       │     wire (bridge) ─wire-a┼───┤ log0 10.78.0.1/24       │
//!                       │       └─────────── wire-b│   │                         │
//!                       └──────────────────────────┘   └─────────────────────────┘
//! ```
//!
//! Cables are cut in the switch, as they are in life: a host that loses its port sees no carrier and no error; a cut in
//! the logging wire is seen by nobody, frames just stop arriving.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;

use crate::error::{HarnessError, IoContext};
use crate::netns::Namespace;

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostId {
    /// The host whose replica starts as primary.
    A,
    /// The host whose replica starts as backup.
    B,
}

impl HostId {
    /// Both of them.
    pub const BOTH: [HostId; 2] = [HostId::A, HostId::B];

    /// The other one.
    #[must_use]
    pub fn peer(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// `A` or `B`, as in reports and file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::B => "B",
        }
    }

    /// Its end of the logging wire.
    #[must_use]
    pub fn log_address(self) -> SocketAddrV4 {
        match self {
            Self::A => SocketAddrV4::new(Ipv4Addr::new(10, 78, 0, 1), LOG_PORT),
            Self::B => SocketAddrV4::new(Ipv4Addr::new(10, 78, 0, 2), LOG_PORT),
        }
    }

    /// Its two ports in the switch: LAN, logging wire.
    fn ports(self) -> [&'static str; 2] {
        match self {
            Self::A => ["lan-a", "wire-a"],
            Self::B => ["lan-b", "wire-b"],
        }
    }
}

impl std::fmt::Display for HostId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Port of the logging channel, TCP and UDP.
pub const LOG_PORT: u16 = 7700;
/// The guest's address and port.
pub const GUEST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 10), 7000);
/// A Linux guest's HTTP server.
pub const GUEST_HTTP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 10), 80);
/// The guest's MAC address.
pub const GUEST_MAC: &str = "52:54:00:77:00:0a";
/// The VM's TAP device, the same name in both hosts.
pub const TAP: &str = "tap0";

const BRIDGE: &str = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0";

/// The whole laboratory network. Dropping it removes it.
#[derive(Debug)]
pub struct Topology {
    client: Namespace,
    switch: Namespace,
    host_a: Namespace,
    host_b: Namespace,
    /// A socket of the switch, through which its ports are set up and down without starting a program.
    control: UdpSocket,
}

impl Topology {
    /// Builds the four namespaces and everything in them.
    ///
    /// # Errors
    /// When namespaces, `ip` or `/dev/net/tun` are not to be had.
    pub fn new() -> Result<Self, HarnessError> {
        let switch = Namespace::new("switch")?;
        let client = Namespace::new("client")?;
        let host_a = Namespace::new("host A")?;
        let host_b = Namespace::new("host B")?;
        switch.ip(&format!(
            "link add lan {BRIDGE}
             link add wire {BRIDGE}
             link add lan-c type veth peer name eth0 netns {client}
             link add lan-a type veth peer name eth0 netns {a}
             link add lan-b type veth peer name eth0 netns {b}
             link add wire-a type veth peer name log0 netns {a}
             link add wire-b type veth peer name log0 netns {b}
             link set lan-c master lan up
             link set lan-a master lan up
             link set lan-b master lan up
             link set wire-a master wire up
             link set wire-b master wire up
             link set lan up
             link set wire up",
            client = client.path(),
            a = host_a.path(),
            b = host_b.path(),
        ))?;
        client.ip("addr add 10.77.0.1/24 dev eth0\nlink set eth0 up")?;
        for (id, host) in [(HostId::A, &host_a), (HostId::B, &host_b)] {
            host.ip(&format!(
                "link add lan {BRIDGE}
                 link set eth0 master lan up
                 link set lan up
                 addr add {}/24 dev log0
                 link set log0 up
                 tuntap add dev {TAP} mode tap vnet_hdr
                 link set {TAP} master lan up",
                id.log_address().ip()
            ))?;
        }
        let control = switch
            .run(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)))
            .context(|| "open the switch's control socket".to_owned())?;
        Ok(Self {
            client,
            switch,
            host_a,
            host_b,
            control,
        })
    }

    /// The client's namespace, outside both hosts.
    #[must_use]
    pub fn client(&self) -> &Namespace {
        &self.client
    }

    /// A host's namespace.
    #[must_use]
    pub fn host(&self, id: HostId) -> &Namespace {
        match id {
            HostId::A => &self.host_a,
            HostId::B => &self.host_b,
        }
    }

    /// The switch's namespace.
    #[must_use]
    pub fn switch(&self) -> &Namespace {
        &self.switch
    }

    /// Cuts the logging wire: no frame passes it any more, in either direction, and no end is told.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn cut_wire(&self) -> Result<(), HarnessError> {
        self.set_down("wire")
    }

    /// Pulls both network cables of a host out of the switch.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unplug(&self, host: HostId) -> Result<(), HarnessError> {
        host.ports().into_iter().try_for_each(|port| self.set_down(port))
    }

    fn set_down(&self, port: &str) -> Result<(), HarnessError> {
        set_interface_down(&self.control, port).context(|| format!("set {port} down in the switch"))
    }
}

/// Clears IFF_UP of an interface in the namespace of `socket`.
fn set_interface_down(socket: &UdpSocket, interface: &str) -> io::Result<()> {
    let mut name = [0; libc::IFNAMSIZ];
    assert!(interface.len() < name.len(), "interface names here are short");
    for (to, from) in name.iter_mut().zip(interface.bytes()) {
        *to = libc::c_char::try_from(from).expect("interface names here are ASCII");
    }
    let mut request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    };
    // SAFETY: SIOCGIFFLAGS reads the name from and writes the flags to the ifreq it is given, which outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded, so the flags are the initialised member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = libc::c_short::try_from(libc::IFF_UP).expect("IFF_UP is 1");
    request.ifr_ifru = libc::__c_anonymous_ifr_ifru {
        ifru_flags: flags & !up,
    };
    // SAFETY: SIOCSIFFLAGS only reads the ifreq it is given, which outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
