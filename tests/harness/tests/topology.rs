//! The laboratory network itself: real frames between namespaces, real cables cut.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use ft_harness::netns::Namespace;
use ft_harness::topology::{GUEST, HostId, TAP, Topology};
use nix::poll::{PollFd, PollFlags, poll};

/// Long enough for any frame that will ever come.
const PATIENCE: Duration = Duration::from_secs(10);
const VNET_HEADER: usize = 10;
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x77, 0x00, 0x0A];
const BROADCAST: [u8; 6] = [0xFF; 6];
const ETHERTYPE_ARP: [u8; 2] = [8, 6];
const ETHERTYPE_IPV4: [u8; 2] = [8, 0];

fn socket(namespace: &Namespace, address: SocketAddrV4) -> UdpSocket {
    let socket = namespace
        .run(|| UdpSocket::bind(address))
        .expect("the namespace has this address");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    socket
}

fn log_socket(topology: &Topology, id: HostId) -> UdpSocket {
    socket(topology.host(id), id.log_address())
}

/// A virtual machine's end of a TAP device, as the network daemon holds it.
struct Port(File);

impl Port {
    fn attach(topology: &Topology, id: HostId) -> Self {
        let file = topology.host(id).run(|| {
            let file = File::options().read(true).write(true).open("/dev/net/tun")?;
            let mut request = libc::ifreq {
                ifr_name: [0; libc::IFNAMSIZ],
                ifr_ifru: libc::__c_anonymous_ifr_ifru {
                    ifru_flags: i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
                        .expect("the flags fit"),
                },
            };
            for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
                *to = libc::c_char::try_from(from).expect("ASCII");
            }
            // SAFETY: TUNSETIFF reads and writes the ifreq, which outlives the call.
            if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(file)
        });
        Self(file.expect("the TAP exists and is free"))
    }

    fn send(&mut self, frame: &[u8]) {
        let mut bytes = vec![0; VNET_HEADER];
        bytes.extend_from_slice(frame);
        self.0.write_all(&bytes).expect("the TAP takes a frame");
    }

    /// The next frame of this type, if one comes in time.
    fn receive_within(&mut self, ethertype: [u8; 2], patience: Duration) -> Option<Vec<u8>> {
        let mut bytes = [0; 2048];
        loop {
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            let patience = u16::try_from(patience.as_millis()).expect("short");
            if poll(&mut fds, patience).expect("poll") == 0 {
                return None;
            }
            let count = self.0.read(&mut bytes).expect("a frame");
            let frame = &bytes[VNET_HEADER..count];
            if frame[12..14] == ethertype {
                return Some(frame.to_vec());
            }
        }
    }

    fn receive(&mut self, ethertype: [u8; 2]) -> Vec<u8> {
        self.receive_within(ethertype, PATIENCE)
            .unwrap_or_else(|| panic!("no frame of type {ethertype:?} came"))
    }

    /// Announces the guest's address until the client's frames come here. Once is not enough: the bridge takes a port into
    /// service only a moment after its TAP is attached, and drops what comes before.
    fn take_over(&mut self, client: &UdpSocket, message: &[u8]) {
        let taken = (0..100).any(|_| {
            self.send(&arp(1, BROADCAST, [0; 6], *GUEST.ip()));
            client.send_to(message, GUEST).expect("sent");
            let frame = self.receive_within(ETHERTYPE_IPV4, Duration::from_millis(100));
            frame.is_some_and(|frame| frame.ends_with(message))
        });
        assert!(
            taken,
            "the client's frames never came to the machine that announced itself"
        );
    }
}

/// An ARP packet of the guest: a request or an answer about `target`.
fn arp(operation: u8, to: [u8; 6], target_mac: [u8; 6], target: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(to);
    frame.extend(GUEST_MAC);
    frame.extend(ETHERTYPE_ARP);
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(GUEST_MAC);
    frame.extend(GUEST.ip().octets());
    frame.extend(target_mac);
    frame.extend(target.octets());
    frame
}

#[test]
fn logging_wire_carries_both_ways_until_it_is_cut() {
    let topology = Topology::new().expect("a network");
    let (a, b) = (log_socket(&topology, HostId::A), log_socket(&topology, HostId::B));
    let mut buffer = [0; 16];
    for (from, to, id) in [(&a, &b, HostId::B), (&b, &a, HostId::A)] {
        from.send_to(b"beat", id.log_address()).expect("sent");
        let (count, sender) = to.recv_from(&mut buffer).expect("it arrives");
        assert_eq!(&buffer[..count], b"beat");
        assert_eq!(sender, from.local_addr().expect("bound"));
    }
    topology.cut_wire().expect("cut");
    // Neither end is told; nothing arrives. (Frames between namespaces are delivered before send returns.)
    a.send_to(b"lost", HostId::B.log_address())
        .expect("the sender sees no error");
    b.send_to(b"lost", HostId::A.log_address())
        .expect("the sender sees no error");
    for socket in [&a, &b] {
        socket.set_nonblocking(true).expect("non-blocking");
        assert_eq!(
            socket.recv_from(&mut buffer).expect_err("nothing").kind(),
            io::ErrorKind::WouldBlock
        );
    }
}

#[test]
fn lan_and_wire_are_separate_networks() {
    let topology = Topology::new().expect("a network");
    let client = socket(topology.client(), SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 1), 0));
    let refused = client.send_to(b"x", HostId::A.log_address()).expect_err("no route");
    assert_eq!(refused.kind(), io::ErrorKind::NetworkUnreachable);
}

#[test]
fn client_reaches_the_machine_that_announced_itself_last() {
    let topology = Topology::new().expect("a network");
    let client_ip = Ipv4Addr::new(10, 77, 0, 1);
    let client = socket(topology.client(), SocketAddrV4::new(client_ip, 0));
    let mut on_a = Port::attach(&topology, HostId::A);
    client.send_to(b"first", GUEST).expect("sent");
    let question = on_a.receive(ETHERTYPE_ARP);
    assert_eq!(
        &question[38..42],
        &GUEST.ip().octets(),
        "the client asks who has the guest's address"
    );
    let client_mac: [u8; 6] = question[6..12].try_into().expect("six bytes");
    on_a.send(&arp(2, client_mac, client_mac, client_ip));
    let packet = on_a.receive(ETHERTYPE_IPV4);
    assert!(packet.ends_with(b"first"));
    assert_eq!(packet[..6], GUEST_MAC);

    // The same machine, on the other host now, says so.
    topology.unplug(HostId::A).expect("unplugged");
    let mut on_b = Port::attach(&topology, HostId::B);
    on_b.take_over(&client, b"second");
}

#[test]
fn both_hosts_alive_the_announcement_moves_the_traffic() {
    let topology = Topology::new().expect("a network");
    let client_ip = Ipv4Addr::new(10, 77, 0, 1);
    let client = socket(topology.client(), SocketAddrV4::new(client_ip, 0));
    let mut on_a = Port::attach(&topology, HostId::A);
    client.send_to(b"question", GUEST).expect("sent");
    let question = on_a.receive(ETHERTYPE_ARP);
    let client_mac: [u8; 6] = question[6..12].try_into().expect("six bytes");
    on_a.send(&arp(2, client_mac, client_mac, client_ip));
    assert!(on_a.receive(ETHERTYPE_IPV4).ends_with(b"question"));
    let mut on_b = Port::attach(&topology, HostId::B);
    on_b.take_over(&client, b"moved");
}

#[test]
fn runs_do_not_see_each_other() {
    let (one, two) = (Topology::new().expect("a network"), Topology::new().expect("another"));
    let (a, b) = (log_socket(&one, HostId::A), log_socket(&two, HostId::B));
    a.send_to(b"x", HostId::B.log_address()).expect("sent");
    b.set_nonblocking(true).expect("non-blocking");
    assert_eq!(
        b.recv_from(&mut [0; 4]).expect_err("nothing").kind(),
        io::ErrorKind::WouldBlock
    );
}
