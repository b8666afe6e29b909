//! Local clients and peers that break the rules: refused or halted with a reason, in bounded memory, others unharmed.

use std::{
    fs::File,
    io::{IoSliceMut, Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    time::Duration,
};

use ft_client::{
    handshake::{Client, Join, LINE_BYTES_MAX, hex, join_device, join_shim, write_line},
    ring::Producer,
};
use ft_protocol::{
    DeviceId, Generation, Lsn, Role, Timing,
    entry::{Body, Entry, Stop},
    frame::{self, VERSION},
    limits::CANDIDATES_MAX,
    message::{Hello, Message, Standing, Strength, Watermarks, vm_hash},
    versions::Versions,
};
use nix::sys::{
    signal::Signal,
    socket::{
        AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, recvmsg,
        socket,
    },
};

use crate::world::{DEADLINE, Daemon, FINGERPRINT, Host, HostId, Locals, VM, World};

// ---- local clients -------------------------------------------------------------------------------------------------------

/// What the daemon says before it closes the connection.
fn answer(stream: &mut UnixStream) -> String {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut text = Vec::new();
    // A connection that is reset with our bytes unread is closed too.
    let _ = stream.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn lines_that_are_no_join_are_answered_and_closed_and_others_join() {
    let world = World::new();
    let daemon = world.start(HostId::A);
    let socket = world.socket(HostId::A);
    let mut garbage = UnixStream::connect(&socket).unwrap();
    garbage.write_all(b"\x00\xff not json\n").unwrap();
    assert!(answer(&mut garbage).contains("no join line"));
    let mut old = UnixStream::connect(&socket).unwrap();
    let join = Join {
        version: VERSION + 1,
        vm: VM.into(),
        client: Client::Shim,
        fingerprint: hex(&FINGERPRINT),
        shape: None,
    };
    write_line(&mut old, &join).unwrap();
    assert!(answer(&mut old).contains(&format!("version {}", VERSION + 1)));
    let mut endless = UnixStream::connect(&socket).unwrap();
    endless.write_all(&[b'x'; LINE_BYTES_MAX]).unwrap();
    assert!(answer(&mut endless).contains("too long"));
    // More silent connections than there is room for: the last one is refused, and room is there again when they end.
    let mut silent: Vec<_> = (0..26).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    assert!(answer(silent.last_mut().unwrap()).contains("too many connections"));
    drop(silent);
    let probe = || {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(b"room?\n").unwrap();
        answer(&mut stream)
    };
    while probe().contains("too many") {}
    let mut host = Host::join(daemon, &socket, &FINGERPRINT);
    host.daemon.signal(Signal::SIGTERM);
    assert_eq!(host.daemon.wait_code(), 0);
}

#[test]
fn a_member_that_says_garbage_ends_its_replica() {
    let world = World::new();
    let (mut a, mut b) = world.pair();
    let last = a.append(3);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    a.devices[0].stream.write_all(b"garbage\n").unwrap();
    assert_eq!(a.daemon.wait_code(), 6);
    assert!(a.daemon.logged.contains("blk0 sent something that is no report"));
    b.wait_role(Role::Live);
}

/// Joins by hand, to get at the ring itself.
struct Raw {
    _stream: UnixStream,
    ring: OwnedFd,
    doorbell: File,
}

fn join_raw(path: &std::path::Path, device: &str) -> Raw {
    let mut stream = UnixStream::connect(path).unwrap();
    let join = Join {
        version: VERSION,
        vm: VM.into(),
        client: Client::Device(device.into()),
        fingerprint: hex(&FINGERPRINT),
        shape: None,
    };
    write_line(&mut stream, &join).unwrap();
    let mut buffer = [0; 4096];
    let mut control = nix::cmsg_space!([i32; 16]);
    let mut vectors = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut vectors, Some(&mut control), MsgFlags::empty()).unwrap();
    let mut descriptors = Vec::new();
    for part in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel just installed these descriptors; nobody else owns them.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let mut descriptors = descriptors.into_iter().skip(1);
    let ring = descriptors.next().unwrap();
    let doorbell = File::from(descriptors.next().unwrap());
    Raw {
        _stream: stream,
        ring,
        doorbell,
    }
}

/// A pair whose primary has one device in hostile hands; what it does, and what the primary says of it.
fn misbehave(deed: impl FnOnce(&mut Raw)) -> String {
    let world = World::new();
    let daemon = world.start(HostId::A);
    let path = world.socket(HostId::A);
    let mut raw = join_raw(&path, "blk0");
    let net = join_device(&path, VM, "net0", &FINGERPRINT).unwrap();
    let shim = join_shim(&path, VM, &FINGERPRINT).unwrap();
    let mut a = Host {
        daemon,
        locals: Locals {
            shim,
            devices: vec![net],
        },
    };
    let mut b = world.host_with(HostId::B, &[]);
    a.wait_role(Role::Recording);
    a.append(1);
    a.wait_committed(Lsn(1));
    b.replay_through(Lsn(1), Lsn(1));
    deed(&mut raw);
    raw.doorbell.write_all(&1u64.to_le_bytes()).unwrap();
    assert_eq!(a.daemon.wait_code(), 6, "{}", a.daemon.logged);
    b.wait_role(Role::Live);
    let line = a.daemon.logged.lines().find(|line| line.contains("halted:"));
    line.unwrap().to_owned()
}

pub(crate) fn entry(lsn: u64, generation: u32) -> Vec<u8> {
    let body = Body::Sync(Stop::default());
    let entry = Entry {
        lsn: Lsn(lsn),
        generation: Generation(generation),
        device: DeviceId(0),
        queue: 0,
        body,
    };
    let mut bytes = vec![0; body.frame_bytes()];
    entry.encode(&mut bytes);
    bytes
}

fn push(raw: &Raw, bytes: &[u8]) {
    let mut ring = Producer::new(raw.ring.try_clone().unwrap()).unwrap();
    ring.push(bytes.len(), |out| out.copy_from_slice(bytes));
}

#[test]
fn a_corrupt_ring_ends_the_replica_and_names_the_client() {
    let line = misbehave(|raw| {
        let memory = File::from(raw.ring.try_clone().unwrap());
        memory.write_all_at(&u64::MAX.to_le_bytes(), 64).unwrap();
    });
    assert!(line.contains("blk0 broke the rules of the log: corrupt ring"), "{line}");
}

#[test]
fn entries_that_are_damaged_or_out_of_place_end_the_replica() {
    let line = misbehave(|raw| {
        let mut bytes = entry(2, 1);
        bytes[40] ^= 1;
        push(raw, &bytes);
    });
    assert!(
        line.contains("blk0") && line.contains("entry 2 is damaged: checksum"),
        "{line}"
    );
    let line = misbehave(|raw| push(raw, &entry(0, 1)));
    assert!(line.contains("entry 0 was appended where 2"), "{line}");
    let line = misbehave(|raw| push(raw, &entry(2, 7)));
    assert!(line.contains("generation 7"), "{line}");
    // An LSN far ahead: everybody behind it would wait for ever.
    let line = misbehave(|raw| push(raw, &entry(1000, 1)));
    assert!(line.contains("entry 1000") && line.contains("2 has not come"), "{line}");
}

#[test]
fn a_backup_whose_clients_write_is_over() {
    let world = World::new();
    let (_a, mut b) = world.pair();
    b.append(2);
    assert_eq!(b.daemon.wait_code(), 6);
    assert!(
        b.daemon.logged.contains("while this side does not execute"),
        "{}",
        b.daemon.logged
    );
}

// ---- peers ---------------------------------------------------------------------------------------------------------------

/// Connects to host B as host A would, from its address.
pub(crate) fn connect_as_a(world: &World) -> TcpStream {
    let a: SocketAddr = world.address(HostId::A).parse().unwrap();
    let b: SocketAddr = world.address(HostId::B).parse().unwrap();
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(a.ip(), 0))).unwrap();
    connect(fd.as_raw_fd(), &SockaddrStorage::from(b)).unwrap();
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// A peer that says these times makes a backup suspect nobody.
const PATIENT: Timing = Timing {
    heartbeat_interval_ns: 20_000_000,
    heartbeat_misses: 10_000,
    channel_timeout_ns: 600_000_000_000,
    replay_timeout_ns: 600_000_000_000,
    lag_target_ns: 100_000_000,
    lag_limit_ns: 1_000_000_000,
};

pub(crate) fn hello() -> Hello {
    Hello {
        versions: Versions::SPOKEN,
        vm: VM.into(),
        primary: true,
        fingerprint: fingerprint(),
        instance: 1,
        ack: Strength::Received,
        last: Lsn::ZERO,
        standing: Standing::Whole,
        timing: Some(PATIENT),
    }
}

/// An acknowledgement of receipt.
fn ack(received: Lsn) -> Message {
    Message::Ack(Watermarks {
        received,
        ..Watermarks::default()
    })
}

/// What a host of this test computes from its clients' fingerprints.
fn fingerprint() -> [u8; 32] {
    let mut local = ft_log::local::Local::new(&["blk0".into(), "net0".into()]).unwrap();
    (0..3).for_each(|seat| assert!(local.occupy(seat, hex(&FINGERPRINT), None)));
    local.fingerprint()
}

pub(crate) fn send(stream: &mut TcpStream, message: &Message) {
    let mut bytes = Vec::new();
    message.encode(Generation(1), &mut bytes);
    stream.write_all(&bytes).unwrap();
}

pub(crate) fn receive(stream: &mut TcpStream) -> Message {
    Message::decode(&receive_frame(stream)).unwrap().1
}

/// The next entry, as a backup receives it.
fn receive_entry(stream: &mut TcpStream) -> Lsn {
    Entry::decode(&receive_frame(stream)).unwrap().lsn
}

pub(crate) fn receive_frame(stream: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let length_bytes = frame::peek_length(&length).unwrap().unwrap();
    let mut bytes = length.to_vec();
    bytes.resize(length_bytes, 0);
    stream.read_exact(&mut bytes[4..]).unwrap();
    bytes
}

pub(crate) fn wait_closed(stream: &mut TcpStream) {
    let mut rest = [0; 4096];
    while matches!(stream.read(&mut rest), Ok(count) if count > 0) {}
}

/// A backup that a fake primary is paired with.
fn paired_backup(world: &World) -> (Host, TcpStream) {
    paired_backup_with(world, PATIENT)
}

fn paired_backup_with(world: &World, timing: Timing) -> (Host, TcpStream) {
    let mut b = world.host_with(HostId::B, &[]);
    let mut stream = connect_as_a(world);
    let timing = Some(timing);
    send(&mut stream, &Message::Hello(Hello { timing, ..hello() }));
    assert!(matches!(
        receive(&mut stream),
        Message::Hello(Hello { primary: false, .. })
    ));
    b.daemon.wait_event("paired");
    (b, stream)
}

#[test]
fn a_backup_that_lost_its_primary_before_the_first_entry_can_be_paired_again() {
    let world = World::new();
    // A channel that is away for so long is not expected back.
    let timing = Timing {
        channel_timeout_ns: 1_000_000_000,
        ..PATIENT
    };
    let (mut b, stream) = paired_backup_with(&world, timing);
    drop(stream);
    b.wait_role(Role::Pairing);
    let mut stream = connect_as_a(&world);
    let timing = Some(timing);
    send(&mut stream, &Message::Hello(Hello { timing, ..hello() }));
    b.daemon.wait_event("paired");
    assert!(matches!(receive(&mut stream), Message::Hello(_)));
    stream.write_all(&entry(1, 1)).unwrap();
    assert_eq!(receive(&mut stream), ack(Lsn(1)));
    b.replay_through(Lsn(1), Lsn(1));
    drop(stream);
    b.wait_role(Role::Live);
}

#[test]
fn a_stranger_on_the_backups_port_is_refused_and_the_peer_still_pairs() {
    let world = World::new();
    // So long a connection may be silent: all of a crowd must be there before the first of them is closed for it.
    let mut b = world.host_with(HostId::B, &["--channel-timeout-ms", "4000"]);
    let address = world.address(HostId::B);
    // From another address.
    let mut other = TcpStream::connect(address).unwrap();
    wait_closed(&mut other);
    // From the right one, but not the protocol.
    let mut garbage = connect_as_a(&world);
    garbage.write_all(&[0xa5; 100_000]).unwrap_or_default();
    wait_closed(&mut garbage);
    let mut early = connect_as_a(&world);
    early.write_all(&entry(1, 1)).unwrap();
    wait_closed(&mut early);
    b.daemon.wait_log("it is no hello");
    // Those that say nothing are few, and are closed in time; nobody has to wait for them.
    let mut silent: Vec<_> = (0..CANDIDATES_MAX).map(|_| connect_as_a(&world)).collect();
    let mut another = connect_as_a(&world);
    wait_closed(&mut another);
    b.daemon.wait_log("have not said hello yet");
    wait_closed(&mut silent[0]);
    b.daemon.wait_log("no hello came");
    // Datagrams that are no heartbeats are counted.
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    (0..3).for_each(|_| assert!(udp.send_to(b"noise", address).is_ok()));
    while b.daemon.wait_event("log")["datagrams_ignored"] != 3 {}
    let mut a = world.host_with(HostId::A, &[]);
    a.daemon.wait_event("paired");
    b.daemon.wait_event("paired");
}

fn hello_of(oldest: u32, newest: u32) -> Hello {
    let versions = Versions { oldest, newest };
    Hello { versions, ..hello() }
}

#[test]
fn a_peer_that_speaks_more_versions_or_older_ones_too_is_met_at_the_highest_common_one() {
    for (oldest, newest, common) in [(3, 3, 3), (1, 3, 3), (3, 4, 4), (4, 5, 5), (3, 9, 5), (1, 9, 5)] {
        let world = World::new();
        let mut b = world.host_with(HostId::B, &[]);
        let mut stream = connect_as_a(&world);
        send(&mut stream, &Message::Hello(hello_of(oldest, newest)));
        let answer = receive(&mut stream);
        assert!(
            matches!(&answer, Message::Hello(hello) if hello.versions == Versions::SPOKEN),
            "{answer:?}"
        );
        assert_eq!(b.daemon.wait_event("paired")["version"], common, "{oldest} to {newest}");
    }
}

#[test]
fn a_hello_that_does_not_fit_is_refused_with_the_reason_on_both_sides() {
    for (wrong, reason) in [
        (hello_of(9, 11), "version 9 to 11 there, 3 to 5 here"),
        // A release that knows no ranges.
        (hello_of(2, 2), "version 2 there, 3 to 5 here"),
        (
            Hello {
                vm: "other".into(),
                ..hello()
            },
            "'other'",
        ),
        (
            Hello {
                primary: false,
                ..hello()
            },
            "both sides were started as backup",
        ),
        (
            Hello {
                fingerprint: [0; 32],
                ..hello()
            },
            "different machines",
        ),
    ] {
        let world = World::new();
        let mut b = world.host_with(HostId::B, &[]);
        let mut stream = connect_as_a(&world);
        send(&mut stream, &Message::Hello(wrong));
        let Message::Refuse { reason: said } = receive(&mut stream) else {
            panic!("not refused");
        };
        assert!(said.contains(reason), "{said}");
        wait_closed(&mut stream);
        assert_eq!(b.daemon.wait_code(), 3);
        assert!(b.daemon.logged.contains(reason), "{}", b.daemon.logged);
        assert_eq!(b.region().role(), Role::Halted);
    }
}

#[test]
fn a_primary_that_is_refused_ends_with_the_peers_reason() {
    let world = World::new();
    let listener = std::net::TcpListener::bind(world.address(HostId::B)).unwrap();
    let mut a = world.host_with(HostId::A, &[]);
    let (mut stream, _) = listener.accept().unwrap();
    assert!(matches!(
        receive(&mut stream),
        Message::Hello(Hello { primary: true, .. })
    ));
    send(
        &mut stream,
        &Message::Refuse {
            reason: "I am full".into(),
        },
    );
    assert_eq!(a.daemon.wait_code(), 3);
    assert!(a.daemon.logged.contains("I am full"));
}

#[test]
fn a_log_that_was_damaged_on_the_way_halts_the_backup_at_the_entry() {
    let world = World::new();
    let (mut b, mut stream) = paired_backup(&world);
    let mut log: Vec<u8> = (1..=5).flat_map(|lsn| entry(lsn, 1)).collect();
    stream.write_all(&log).unwrap();
    while receive(&mut stream) != ack(Lsn(5)) {}
    let hello_bytes = {
        let mut bytes = Vec::new();
        Message::Hello(hello()).encode(Generation(1), &mut bytes);
        bytes.len()
    };
    let position = hello_bytes + log.len();
    log = entry(6, 1);
    log[50] ^= 4;
    stream.write_all(&log).unwrap();
    // It says that it is gone, so that the primary goes on alone.
    assert!(matches!(receive(&mut stream), Message::Gone { .. }));
    assert_eq!(b.daemon.wait_code(), 3);
    let expected = format!("entry 6 at byte {position}: checksum mismatch");
    assert!(b.daemon.logged.contains(&expected), "{}", b.daemon.logged);
    assert_eq!(b.region().role(), Role::Halted);
}

#[test]
fn gaps_other_generations_and_impossible_lengths_halt_the_backup() {
    let mut endless = entry(1, 1);
    endless[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    for (bytes, reason) in [
        (entry(2, 1), "entry 1 at byte"),
        (entry(1, 3), "of generation 3 came there"),
        (endless, "frame length 4294967295"),
    ] {
        let world = World::new();
        let (mut b, mut stream) = paired_backup(&world);
        stream.write_all(&bytes).unwrap();
        assert_eq!(b.daemon.wait_code(), 3);
        assert!(b.daemon.logged.contains(reason), "{}", b.daemon.logged);
    }
}

#[test]
fn a_hello_that_is_repeated_breaks_the_channel_and_not_the_pair() {
    let world = World::new();
    let (b, mut stream) = paired_backup(&world);
    stream.write_all(&entry(1, 1)).unwrap();
    assert_eq!(receive(&mut stream), ack(Lsn(1)));
    let again = Message::Hello(Hello {
        last: Lsn(1),
        ..hello()
    });
    send(&mut stream, &again);
    assert_eq!(stream.read(&mut [0; 64]).unwrap_or(0), 0, "it was answered");
    let mut stream = connect_as_a(&world);
    send(&mut stream, &again);
    assert!(matches!(
        receive(&mut stream),
        Message::Hello(Hello { last: Lsn(1), .. })
    ));
    assert_eq!(b.region().role(), Role::Replaying);
}

/// Peak resident memory of a process, KiB.
fn peak_kib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_peer_that_floods_fills_the_ring_and_nothing_else() {
    let world = World::new();
    let (b, mut stream) = paired_backup(&world);
    // Nobody consumes: the ring, then the sockets fill up, and then a write does not return in time.
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut lsn = 0;
    let sent = (0..2000).find_map(|_| {
        let log: Vec<u8> = (0..1000)
            .flat_map(|_| {
                lsn += 1;
                entry(lsn, 1)
            })
            .collect();
        stream.write_all(&log).err()
    });
    assert!(sent.is_some(), "the backup took everything");
    let peak = peak_kib(&b.daemon);
    assert!(peak < 96 * 1024, "{peak} KiB");
    assert_eq!(b.region().role(), Role::Replaying);
}

#[test]
fn a_backup_that_acknowledges_too_much_halts_the_primary() {
    let world = World::new();
    let listener = std::net::TcpListener::bind(world.address(HostId::B)).unwrap();
    let mut a = world.host_with(HostId::A, &[]);
    let (mut stream, _) = listener.accept().unwrap();
    let Message::Hello(own) = receive(&mut stream) else {
        panic!("no hello");
    };
    let backup = Hello { primary: false, ..own };
    send(&mut stream, &Message::Hello(backup));
    a.wait_role(Role::Recording);
    let last = a.append(3);
    // An entry that is still in its producer's ring is one too much, too.
    while receive_entry(&mut stream) != last {}
    send(&mut stream, &ack(last));
    a.wait_committed(last);
    send(&mut stream, &ack(Lsn(99)));
    assert_eq!(a.daemon.wait_code(), 3);
    assert!(a.daemon.logged.contains("acknowledged entry 99"), "{}", a.daemon.logged);
    assert_eq!(a.region().committed().lsn(), last);
}

#[test]
fn heartbeats_of_another_vm_or_address_do_not_keep_a_peer_alive() {
    let world = World::new();
    let suspicious = Timing {
        heartbeat_misses: 100,
        ..PATIENT
    };
    let (mut b, _stream) = paired_backup_with(&world, suspicious);
    let heartbeat = |vm: &str| {
        let mut bytes = Vec::new();
        let message = Message::Heartbeat {
            vm: vm_hash(vm),
            lsn: Lsn(0),
            sequence: 1,
            replayed: Lsn(0),
            full: false,
            asks: false,
        };
        message.encode(Generation(1), &mut bytes);
        bytes
    };
    let right = UdpSocket::bind(world.address(HostId::A)).unwrap();
    let wrong = UdpSocket::bind("127.0.0.1:0").unwrap();
    right.send_to(&heartbeat("other"), world.address(HostId::B)).unwrap();
    wrong.send_to(&heartbeat(VM), world.address(HostId::B)).unwrap();
    assert_eq!(
        b.daemon.wait_event("suspect")["reason"],
        "no heartbeat and no log traffic"
    );
    while b.daemon.wait_event("log")["datagrams_ignored"] != 2 {}
}
