//! The daemon without a TAP: a packet socket on one end of a cable, and a macvtap. Needs root, `ip` and `mount`: feature `real-hosts`.

#![cfg(feature = "real-hosts")]

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

mod wire;

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use ft_client::{
    counters::Lost,
    gate::{Answer, Request},
};
use ft_protocol::{Generation, Lsn, Role};
use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    libc,
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, SFlag, makedev, mknod},
};
use serde_json::{Value, json};
use support::{
    daemon::{Daemon, fails, text},
    driver::{Driver, memory, readable, writable},
    frontend::{PATIENCE, Session, readable_within},
    ft_log::{FtLog, Joined},
};
use tempfile::TempDir;
use vhost_ft_net::{packet::PacketSocket, tap::Received};
use wire::{Wire, frame, ip};

/// The daemon's end of the cable, and the test's.
const NEAR: &str = "near";
const FAR: &str = "far";
const ALL_FEATURES: u64 = u64::MAX;
/// VERSION_1 and mergeable buffers, but no offload.
const NO_OFFLOADS: u64 = 1 << 32 | 1 << 15;
/// Long enough for a frame that leaks to be seen.
const A_WHILE: Duration = Duration::from_millis(200);
const NO_HEADER: [u8; 12] = [0; 12];

struct Host {
    wire: Wire,
    directory: TempDir,
}

impl Host {
    fn new() -> Self {
        Self {
            wire: Wire::with_cable(NEAR, FAR),
            directory: TempDir::new().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-net"));
        command.args(["--socket-path", text(&self.path("socket"))]);
        command.args(["--events", text(&self.path("events"))]);
        command.args(options);
        command
    }

    fn daemon(&self, options: &[&str]) -> Daemon {
        let all = [&["--interface", NEAR, "--mac", wire::GUEST_MAC], options].concat();
        Daemon::listening(&mut self.command(&all))
    }

    /// The last event `counters`.
    fn counters(&self) -> Value {
        let events = std::fs::read_to_string(self.path("events")).unwrap();
        let mut events = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.rfind(|event| event["event"] == "counters").unwrap()
    }
}

/// A guest: buffers of 64 KiB to receive, from 2 MiB on, and frames of as many to send, from 16 MiB on.
struct Guest {
    receive: Driver,
    transmit: Driver,
}

const BUFFER_BYTES: u32 = 128 << 10;

impl Guest {
    fn new(memory: &GuestMemoryMmap) -> Self {
        let mut guest = Self {
            receive: Driver::new(memory, 0x1_0000, 64, true),
            transmit: Driver::new(memory, 0x3_0000, 64, true),
        };
        (0..16).for_each(|_| guest.add_buffer());
        guest
    }

    fn at(base: u64, head: u16) -> u64 {
        base + u64::from(head) * u64::from(BUFFER_BYTES)
    }

    fn add_buffer(&mut self) {
        let at = Self::at(2 << 20, self.receive.next_head());
        self.receive.add(&[writable(at, BUFFER_BYTES)]);
    }

    fn send(&mut self, header: [u8; 12], frame: &[u8]) {
        let at = Self::at(16 << 20, self.transmit.next_head());
        self.transmit.write(at, &header);
        self.transmit.write(at + 12, frame);
        self.transmit.add(&[readable(at, 12 + frame.len() as u32)]);
    }

    fn take(&mut self) -> Option<(Vec<u8>, Vec<u8>)> {
        let (head, length) = self.receive.take_used()?;
        let mut header = self.receive.read(Self::at(2 << 20, head), length as usize);
        let frame = header.split_off(12);
        self.add_buffer();
        Some((header, frame))
    }

    /// The next frame, with its header.
    fn receive(&mut self, session: &Session) -> (Vec<u8>, Vec<u8>) {
        loop {
            if let Some(received) = self.take() {
                return received;
            }
            session.wait_call(0);
        }
    }
}

/// A TCP frame over IPv4 whose checksum somebody else completes, and the header that says so.
fn tcp(number: u32, length: usize) -> ([u8; 12], Vec<u8>) {
    let mut frame = frame(number, length);
    frame[14..24].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6]);
    frame[16..18].copy_from_slice(&((length - 14) as u16).to_be_bytes());
    frame[34 + 12] = 5 << 4;
    frame[50..52].fill(0);
    ([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], frame)
}

/// The same, to be cut into pieces of 1448 bytes.
fn to_be_cut(number: u32, length: usize) -> ([u8; 12], Vec<u8>) {
    let (_, frame) = tcp(number, length);
    ([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], frame)
}

/// The frame with a VLAN tag.
fn tagged(mut frame: Vec<u8>) -> Vec<u8> {
    frame.splice(12..12, [0x81, 0, 0x20, 5]);
    frame
}

/// The sum of everything from the checksum's start on, which is all ones where it is right.
fn sums_up(frame: &[u8]) -> bool {
    let mut sum: u64 = frame[34..]
        .chunks(2)
        .map(|pair| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum == 0xffff
}

fn far_end() -> PacketSocket {
    PacketSocket::open(&FAR.parse().unwrap()).unwrap()
}

/// The next frame that comes there.
fn receive_at(far: &mut PacketSocket) -> Vec<u8> {
    let mut bytes = Vec::new();
    while far.receive_onto(&mut bytes).unwrap() == Received::Nothing {
        assert!(readable_within(far, PATIENCE), "no frame came");
    }
    bytes.split_off(12)
}

fn packet(header: [u8; 12], frame: &[u8]) -> Vec<u8> {
    [&header[..], frame].concat()
}

#[test]
fn frames_pass_a_packet_socket_both_ways_with_their_tags() {
    for threads in ["1", "2"] {
        let host = Host::new();
        let mut daemon = host.daemon(&["--io-threads", threads]);
        let memory = memory();
        let mut guest = Guest::new(&memory);
        // Sees tags, which the wire does not.
        let mut far = far_end();
        far.set_attached(true).unwrap();
        // Nobody is there yet: history.
        host.wire.send(&frame(99, 100));
        let mut session = Session::start(
            &host.path("socket"),
            &memory,
            ALL_FEATURES,
            &[&guest.receive, &guest.transmit],
        );
        assert_eq!(session.config(12)[..6], [0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(session.config(12)[10..], 1500u16.to_le_bytes());
        daemon.wait_line("attached");
        for round in 0..50 {
            let (mut out, mut back) = (frame(round, 100), frame(round + 1000, 1400));
            if round % 5 == 0 {
                (out, back) = (tagged(out), tagged(back));
            }
            guest.send(NO_HEADER, &out);
            session.kick(1);
            let seen = receive_at(&mut far);
            assert!(seen == out, "round {round}: {seen:?}");
            while guest.transmit.take_used().is_none() {
                session.wait_call(1);
            }
            host.wire.send(&back);
            let (_, received) = guest.receive(&session);
            assert!(received == back, "round {round}: {received:?}");
        }
        // What the host itself sends there is not the guest's.
        let near = PacketSocket::open(&NEAR.parse().unwrap()).unwrap();
        near.send(&packet(NO_HEADER, &frame(7, 100))).unwrap();
        assert_eq!(receive_at(&mut far), frame(7, 100));
        host.wire.send(&frame(8, 100));
        assert_eq!(guest.receive(&session).1, frame(8, 100));
        daemon.terminate();
        assert_eq!(daemon.wait().0, Some(0));
        let told = host.counters();
        assert_eq!(told["queues"][0]["frames"], 51);
        assert_eq!(told["queues"][1]["lost"], json!({}));
    }
}

#[test]
fn offloads_pass_to_a_driver_that_takes_them_and_are_done_for_one_that_does_not() {
    for (features, takes) in [(ALL_FEATURES, true), (NO_OFFLOADS, false)] {
        let host = Host::new();
        let mut daemon = host.daemon(&[]);
        let memory = memory();
        let mut guest = Guest::new(&memory);
        let drivers = [&guest.receive, &guest.transmit];
        let session = Session::start(&host.path("socket"), &memory, features, &drivers);
        daemon.wait_line("attached");
        let far = far_end();
        let (header, sent) = tcp(1, 301);
        far.send(&packet(header, &sent)).unwrap();
        let (found, received) = guest.receive(&session);
        assert_eq!(received[..50], sent[..50]);
        assert_eq!(received[52..], sent[52..]);
        if takes {
            assert_eq!(found[..10], header[..10]);
            assert_eq!(received[50..52], sent[50..52]);
        } else {
            assert_eq!(found[..10], [0; 10]);
            assert!(sums_up(&received), "the checksum is not complete");
        }
        // Longer than any wire takes.
        let (header, long) = to_be_cut(2, 20_000);
        far.send(&packet(header, &long)).unwrap();
        far.send(&packet(NO_HEADER, &frame(3, 100))).unwrap();
        if takes {
            let (found, received) = guest.receive(&session);
            assert_eq!((found[0], found[1], &found[4..6]), (1, 1, &header[4..6]));
            assert!(received == long);
        }
        assert_eq!(guest.receive(&session).1, frame(3, 100));
        // And out: whole, for whoever cuts it; one that lies never.
        if takes {
            host.wire.drain();
            let (header, out) = to_be_cut(4, 20_000);
            let mut lie = header;
            lie[6..8].fill(0xff);
            guest.send(lie, &out);
            guest.send(header, &out);
            session.kick(1);
            let mut seen = host.wire.receive();
            seen[50..52].fill(0);
            assert!(seen == out, "{} bytes", seen.len());
        }
        daemon.terminate();
        assert_eq!(daemon.wait().0, Some(0));
        let lost = &host.counters()["queues"][0]["lost"];
        assert_eq!(*lost, if takes { json!({}) } else { json!({ "offload": 1 }) });
    }
}

#[test]
fn an_interface_that_goes_down_comes_again() {
    let host = Host::new();
    let mut daemon = host.daemon(&[]);
    let memory = memory();
    let mut guest = Guest::new(&memory);
    let drivers = [&guest.receive, &guest.transmit];
    let session = Session::start(&host.path("socket"), &memory, ALL_FEATURES, &drivers);
    daemon.wait_line("attached");
    for round in 0..3 {
        ip(&["link", "set", NEAR, "down"]);
        guest.send(NO_HEADER, &frame(99, 100));
        session.kick(1);
        while guest.transmit.take_used().is_none() {
            session.wait_call(1);
        }
        ip(&["link", "set", NEAR, "up"]);
        host.wire.wait_for_link(FAR);
        guest.send(NO_HEADER, &frame(round, 100));
        session.kick(1);
        // The one of before went nowhere, unless the interface came up before the daemon saw it.
        let mut seen = host.wire.receive();
        if seen == frame(99, 100) {
            seen = host.wire.receive();
        }
        assert_eq!(seen, frame(round, 100));
        while guest.transmit.take_used().is_none() {
            session.wait_call(1);
        }
        host.wire.send(&frame(round, 200));
        assert_eq!(guest.receive(&session).1, frame(round, 200));
    }
    daemon.terminate();
    assert_eq!(daemon.wait().0, Some(0));
}

fn kick(joined: &mut Joined, queue: u16, marker: u64) -> Answer {
    let request = Request::Kick {
        queue,
        marker: Lsn(marker),
        generation: Generation(1),
    };
    joined.shim.call(&request).unwrap()
}

#[test]
fn a_protected_device_holds_on_a_packet_socket_too() {
    let host = Host::new();
    let log = FtLog::listen(&host.path("ft-log"));
    let _daemon = host.daemon(&["--ft-log", text(&log.path), "--vm", "ledger", "--device", "net0"]);
    let mut joined = log.welcome(1, Role::Recording);
    let memory = memory();
    let mut guest = Guest::new(&memory);
    let drivers = [&guest.receive, &guest.transmit];
    let _session = Session::start(&host.path("socket"), &memory, ALL_FEATURES, &drivers);
    joined.shim.call(&Request::Start { live: true }).unwrap();
    kick(&mut joined, 0, 1);
    let frames = [frame(1, 100), frame(2, 200)];
    frames.iter().for_each(|frame| guest.send(NO_HEADER, frame));
    kick(&mut joined, 1, 10);
    joined.commit(9);
    assert!(!host.wire.anything_within(A_WHILE));
    joined.commit(10);
    assert_eq!([(); 2].map(|()| host.wire.receive()), frames);
    // In: one that no driver without offloads can take, one whose checksum is completed for it.
    let far = far_end();
    let (header, long) = to_be_cut(3, 20_000);
    far.send(&packet(header, &long)).unwrap();
    let (header, sent) = tcp(4, 300);
    far.send(&packet(header, &sent)).unwrap();
    let (_, sequence, payload) = joined.next_input();
    assert_eq!((sequence, payload.len()), (1, 4 + 300));
    assert!(sums_up(&payload[4..]));
    assert_eq!(joined.counters.lost(0, Lost::Offload), 1);
    joined.shim.call(&Request::Deliver { through: 1 }).unwrap();
    assert_eq!(guest.take().unwrap().1, payload[4..]);
}

/// Has the interface put frames together, or not.
fn set_merges(merges: bool) {
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    const ETHTOOL_SGRO: u32 = 0x2c;
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let mut value = Value {
        command: ETHTOOL_SGRO,
        data: merges.into(),
    };
    // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NEAR.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: the socket is open; the request and the value are of the types this command is defined with, alive for the call.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// The address of an interface.
fn address(interface: &str) -> String {
    let shown = Command::new("ip")
        .args(["-o", "link", "show", interface])
        .output()
        .unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let mut words = shown.split_whitespace().skip_while(|word| *word != "link/ether");
    words.nth(1).unwrap().to_owned()
}

#[test]
fn an_interface_that_does_not_fit_is_one_clear_line() {
    let host = Host::new();
    let own = address(NEAR);
    for (options, says) in [
        (vec!["--interface", "nothing"], "no network interface 'nothing'"),
        (vec!["--interface", "lo"], "not an Ethernet interface"),
        (vec!["--interface", NEAR, "--mac", &own], "another --mac"),
        (vec!["--interface", NEAR, "--mtu", "1501"], "has 1500"),
    ] {
        let (code, said) = fails(&mut host.command(&options));
        assert_eq!((code, said.lines().count()), (Some(3), 1), "{said}");
        assert!(said.contains(says), "{said}");
    }
    set_merges(true);
    let member = ["--ft-log", "nowhere", "--vm", "v", "--device", "net0"];
    let protected = [&["--interface", NEAR][..], &member].concat();
    let (code, said) = fails(&mut host.command(&protected));
    assert_eq!((code, said.lines().count()), (Some(3), 1), "{said}");
    assert!(said.contains("ethtool -K near gro off"), "{said}");
    set_merges(false);
    let (_, said) = fails(&mut host.command(&protected));
    assert!(said.contains("cannot reach ft-log"), "{said}");
    for options in [
        &["--interface", NEAR, "--tap", "t"][..],
        &["--interface", NEAR, "--queue-pairs", "2"],
        &["--interface", NEAR, "--tap-fd", "5"],
    ] {
        let (code, said) = fails(&mut host.command(options));
        assert_eq!(code, Some(2), "{said}");
    }
}

/// Whether this is the machine's root, and not that of a user namespace, which may not make device nodes.
fn is_root_of_the_machine() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// A macvtap on the near end, and its device, opened as libvirt does.
fn macvtap(host: &Host) -> File {
    ip(&[
        "link", "add", "link", NEAR, "name", "mv", "type", "macvtap", "mode", "bridge",
    ]);
    ip(&["link", "set", "mv", "address", wire::GUEST_MAC]);
    wire::up("mv");
    // The numbers of its device are in the sysfs of this namespace.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let sysfs = host.path("sys");
    std::fs::create_dir(&sysfs).unwrap();
    for arguments in [vec!["--make-rprivate", "/"], vec!["-t", "sysfs", "none", text(&sysfs)]] {
        assert!(Command::new("mount").args(arguments).status().unwrap().success());
    }
    let mut devices = std::fs::read_dir(sysfs.join("class/net/mv/macvtap")).unwrap();
    let numbers = devices.next().unwrap().unwrap().path().join("dev");
    let numbers = std::fs::read_to_string(numbers).unwrap();
    let (major, minor) = numbers.trim().split_once(':').unwrap();
    let device = makedev(major.parse().unwrap(), minor.parse().unwrap());
    let node = host.path("tap");
    mknod(&node, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, device).unwrap();
    let file = File::options().read(true).write(true).open(node).unwrap();
    // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open; the request gets the argument type it is defined with, alive for the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is open as long as the file.
    let fd = unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) };
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    file
}

#[test]
fn an_inherited_macvtap_is_a_device_with_its_own_address() {
    if !is_root_of_the_machine() {
        eprintln!("not run: it needs the machine's own root");
        return;
    }
    let host = Host::new();
    let file = macvtap(&host);
    let fd = file.as_raw_fd().to_string();
    let (code, said) = fails(&mut host.command(&["--tap-fd", &fd, "--mac", "52:54:00:09:09:09"]));
    assert_eq!((code, said.lines().count()), (Some(3), 1), "{said}");
    assert!(said.contains(wire::GUEST_MAC), "{said}");
    let mut daemon = Daemon::listening(&mut host.command(&["--tap-fd", &fd]));
    let memory = memory();
    let mut guest = Guest::new(&memory);
    let drivers = [&guest.receive, &guest.transmit];
    let mut session = Session::start(&host.path("socket"), &memory, ALL_FEATURES, &drivers);
    assert_eq!(session.config(12)[..6], [0x52, 0x54, 0, 1, 2, 3]);
    daemon.wait_line("attached");
    for round in 0..20 {
        let out = frame(round, 100);
        guest.send(NO_HEADER, &out);
        session.kick(1);
        assert_eq!(host.wire.receive(), out);
        while guest.transmit.take_used().is_none() {
            session.wait_call(1);
        }
        // To the guest's own address: it gets nothing else.
        let mut back = frame(round, 1400);
        back[..6].copy_from_slice(&[0x52, 0x54, 0, 1, 2, 3]);
        back[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        host.wire.send(&back);
        assert!(guest.receive(&session).1 == back);
    }
    // Cut by whoever must: what the driver took, the macvtap has.
    let (header, out) = to_be_cut(4, 20_000);
    guest.send(header, &out);
    session.kick(1);
    let mut seen = host.wire.receive();
    seen[50..52].fill(0);
    assert!(seen == out, "{} bytes", seen.len());
    daemon.terminate();
    assert_eq!(daemon.wait().0, Some(0));
}
