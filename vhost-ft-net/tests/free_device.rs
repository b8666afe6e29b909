//! The daemon of a VM that is not protected, on a real TAP: offloads, mergeable buffers, queues, and what a hostile guest tries.
//! Needs root, `ip` and /dev/net/tun: feature `real-hosts`.

#![cfg(feature = "real-hosts")]

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

mod wire;

use std::{
    io::{IoSlice, Read, Write},
    os::{
        fd::{AsRawFd, IntoRawFd},
        unix::net::UnixStream,
    },
    process::Command,
    time::{Duration, Instant},
};

use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::{
        signal::Signal,
        socket::{ControlMessage, MsgFlags, sendmsg},
    },
};
use support::{
    daemon::{Daemon, fails, text},
    driver::{Driver, memory, readable, writable},
    frontend::{PATIENCE, Session, readable_within},
};
use vhost::{
    VhostBackend as _, VhostUserMemoryRegionInfo,
    vhost_user::{VhostUserFrontend as _, message::VhostUserProtocolFeatures},
};
use vhost_ft_net::tap::{Tap, TapName};
use vm_memory::GuestMemoryBackend as _;
use wire::{Wire, frame, host::Host, ip};

const ALL_FEATURES: u64 = u64::MAX;
const MQ: u64 = 1 << 22;
const TAP: &str = "tap-free";
const PAIRS: usize = 4;
/// Long enough for a frame that leaks to be seen.
const A_WHILE: Duration = Duration::from_millis(200);
const BUFFER_BYTES: u32 = 2048;

/// The drivers of a pair of queues: 32 buffers of 2 KiB to receive, frames of up to 64 KiB to send.
struct Pair {
    receive: Driver,
    transmit: Driver,
    receives_at: u64,
    sends_at: u64,
    sent: u64,
}

impl Pair {
    fn new(memory: &GuestMemoryMmap, number: u64) -> Self {
        let mut pair = Self {
            receive: Driver::new(memory, 0x1_0000 * (2 * number + 1), 32, true),
            transmit: Driver::new(memory, 0x1_0000 * (2 * number + 2), 32, true),
            receives_at: (2 << 20) + number * (1 << 20),
            sends_at: (8 << 20) + number * (4 << 20),
            sent: 0,
        };
        (0..32).for_each(|_| pair.add_buffer());
        pair
    }

    fn add_buffer(&mut self) {
        let at = self.receives_at + u64::from(self.receive.next_head()) * u64::from(BUFFER_BYTES);
        self.receive.add(&[writable(at, BUFFER_BYTES)]);
    }

    fn send(&mut self, header: &[u8; 12], frame: &[u8]) {
        let at = self.sends_at + (self.sent % 32) * (128 << 10);
        self.sent += 1;
        self.transmit.write(at, header);
        self.transmit.write(at + 12, frame);
        let length = 12 + frame.len() as u32;
        self.transmit.add(&[readable(at, 12), readable(at + 12, length - 12)]);
    }

    /// The next frame, with its header, and the number of buffers it took; these are made available again.
    fn take(&mut self) -> Option<(Vec<u8>, u16)> {
        let (head, length) = self.receive.take_used()?;
        let at = |head: u16| self.receives_at + u64::from(head) * u64::from(BUFFER_BYTES);
        let mut bytes = self.receive.read(at(head), length as usize);
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            let (head, length) = self.receive.take_used().expect("the rest of the frame");
            bytes.extend(self.receive.read(at(head), length as usize));
        }
        (0..count).for_each(|_| self.add_buffer());
        Some((bytes, count))
    }
}

impl Host {
    fn new(options: &[&str]) -> Self {
        Self::on(Wire::with_options(TAP, options))
    }

    fn daemon(&self, options: &[&str]) -> Daemon {
        Daemon::listening(&mut self.command(&[&["--tap", TAP], options].concat()))
    }

    fn session(&self, memory: &GuestMemoryMmap, features: u64, pairs: &[Pair]) -> Session {
        let drivers: Vec<_> = pairs.iter().flat_map(|pair| [&pair.receive, &pair.transmit]).collect();
        Session::start(&self.path("socket"), memory, features, &drivers)
    }
}

fn pairs(memory: &GuestMemoryMmap, count: usize) -> Vec<Pair> {
    (0..count as u64).map(|number| Pair::new(memory, number)).collect()
}

/// The next frame of a pair.
fn receive(session: &Session, pair: &mut Pair, queue: usize) -> (Vec<u8>, u16) {
    loop {
        if let Some(taken) = pair.take() {
            return taken;
        }
        session.wait_call(queue);
    }
}

/// A TCP frame over IPv4, longer than any wire takes, with the header of a driver that wants it cut into pieces of 1448 bytes.
fn to_be_cut(number: u32, length: usize) -> ([u8; 12], Vec<u8>) {
    let mut frame = frame(number, length);
    frame[14..24].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6]);
    frame[16..18].copy_from_slice(&((length - 14) as u16).to_be_bytes());
    frame[34 + 12] = 5 << 4;
    ([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], frame)
}

#[test]
fn a_frame_to_be_cut_leaves_whole_and_one_that_lies_never() {
    let host = Host::new(&[]);
    let _daemon = host.daemon(&[]);
    let memory = memory();
    let mut pairs = pairs(&memory, 1);
    let session = host.session(&memory, ALL_FEATURES, &pairs);
    let pair = &mut pairs[0];
    // Runts, giants, and a header that its frame contradicts, in each of these ways.
    pair.send(&[0; 12], &[1; 13]);
    pair.send(&[0; 12], &vec![1; 65536 + 18]);
    let (honest, data) = to_be_cut(1, 61_000);
    type Change = fn(&mut [u8; 12]);
    let lies: [Change; 9] = [
        |header| header[0] = 0,
        |header| header[1] = 4,
        |header| header[1] = 3,
        |header| header[1] = 0x7f,
        |header| header[4..6].fill(0),
        |header| header[4..6].fill(0xff),
        |header| header[6..8].fill(0xff),
        |header| header[8..10].fill(0xff),
        |header| header[6] += 2,
    ];
    for lie in lies {
        let mut header = honest;
        lie(&mut header);
        pair.send(&header, &data);
    }
    pair.send(&honest, &data);
    session.kick(1);
    let mut seen = host.wire.receive();
    // The kernel prepares the checksum for whoever cuts it.
    seen[50..52].copy_from_slice(&data[50..52]);
    assert!(seen == data, "{} bytes", seen.len());
    assert!(!host.wire.anything_within(A_WHILE));
    while pair.transmit.take_used().is_none() {
        session.wait_call(1);
    }
    assert_eq!(std::iter::from_fn(|| pair.transmit.take_used()).count(), 11);
}

#[test]
fn a_long_frame_comes_in_several_buffers() {
    let host = Host::new(&[]);
    ip(&["link", "set", TAP, "mtu", "9000"]);
    let mut daemon = host.daemon(&[]);
    let memory = memory();
    let mut pairs = pairs(&memory, 1);
    let mut session = host.session(&memory, ALL_FEATURES, &pairs);
    assert_eq!(session.config(12), [0x52, 0x54, 0, 1, 2, 3, 0, 0, 1, 0, 0x28, 0x23]);
    daemon.wait_line("attached");
    host.wire.wait_for_link(TAP);
    // Twice the ring: buffers are used again.
    for number in 0..64 {
        let sent = frame(number, 9014);
        host.wire.send(&sent);
        let (bytes, count) = receive(&session, &mut pairs[0], 0);
        assert_eq!(count, 5);
        assert!(bytes[12..] == sent);
    }
}

/// Frames that differ in what the kernel chooses the queue by.
fn flow(number: u32) -> Vec<u8> {
    let mut frame = frame(number, 100);
    frame[14..24].copy_from_slice(&[0x45, 0, 0, 86, 0, 1, 0, 0, 64, 17]);
    frame[30..34].copy_from_slice(&[10, 77, 1, number as u8]);
    frame[34..38].copy_from_slice(&[number as u8, 1, 7, number as u8]);
    frame
}

/// Sends as many flows as `sends`, and gives how many frames came to each pair.
fn distribution(host: &Host, session: &Session, pairs: &mut [Pair], sends: u32) -> [usize; PAIRS] {
    (0..sends).for_each(|number| host.wire.send(&flow(number)));
    let mut counts = [0; PAIRS];
    let deadline = Instant::now() + PATIENCE;
    let mut ids: Vec<u8> = Vec::new();
    while ids.len() < sends as usize {
        let before = ids.len();
        for (pair, count) in pairs.iter_mut().zip(&mut counts) {
            while let Some((bytes, _)) = pair.take() {
                *count += 1;
                ids.push(bytes[12 + 33]);
            }
        }
        if ids.len() == before {
            assert!(
                Instant::now() < deadline,
                "{} of {sends} frames came: {counts:?}",
                ids.len()
            );
            let polled = session
                .calls
                .iter()
                .step_by(2)
                .any(|call| readable_within(call, PATIENCE / 1000));
            session
                .calls
                .iter()
                .filter(|_| polled)
                .for_each(|call| drop(call.read()));
        }
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), sends as usize, "each came once");
    counts
}

#[test]
fn frames_come_to_the_pairs_that_run_and_a_broken_queue_leaves_the_others() {
    for threads in ["1", "3"] {
        // A TAP of its own: the kernel is late to tell of a link that went down and up.
        let host = Host::new(&["multi_queue"]);
        let mut daemon = host.daemon(&["--queue-pairs", "4", "--io-threads", threads]);
        let memory = memory();
        let mut pairs = pairs(&memory, PAIRS);
        let mut session = host.session(&memory, ALL_FEATURES, &pairs);
        assert_ne!(session.features & MQ, 0);
        for _ in 0..PAIRS {
            daemon.wait_line("attached");
        }
        host.wire.wait_for_link(TAP);
        let counts = distribution(&host, &session, &mut pairs, 100);
        assert!(counts.iter().filter(|count| **count != 0).count() > 1, "{counts:?}");
        // What each sends leaves, whichever queue of the TAP it takes.
        for (number, pair) in pairs.iter_mut().enumerate() {
            pair.send(&[0; 12], &frame(number as u32, 80));
            session.kick(2 * number + 1);
            assert_eq!(host.wire.receive(), frame(number as u32, 80));
        }
        // Without three of them, the first has all.
        for queue in 2..2 * PAIRS {
            session.frontend.set_vring_enable(queue, false).unwrap();
        }
        for _ in 1..PAIRS {
            daemon.wait_line("detached");
        }
        assert_eq!(distribution(&host, &session, &mut pairs, 20), [20, 0, 0, 0]);
        for queue in 2..2 * PAIRS {
            session.frontend.set_vring_enable(queue, true).unwrap();
        }
        // A ring that cannot be: its queue stops, the others go on.
        pairs[1].transmit.publish_head(999);
        session.kick(3);
        daemon.wait_line("broke this queue");
        pairs[2].send(&[0; 12], &frame(7, 80));
        session.kick(5);
        assert_eq!(host.wire.receive(), frame(7, 80));
        drop(session);
        daemon.terminate();
        assert_eq!(daemon.wait().0, Some(0));
    }
}

#[test]
fn a_driver_without_offloads_gets_frames_without_and_the_next_one_all() {
    let host = Host::new(&[]);
    let _daemon = host.daemon(&[]);
    let csum = 1 << 0;
    for (features, offered) in [(1 << 32, false), (ALL_FEATURES, true)] {
        let memory = memory();
        let mut pairs = pairs(&memory, 1);
        let session = host.session(&memory, features, &pairs);
        assert_eq!(session.features & csum != 0, offered);
        let (header, data) = to_be_cut(5, 3000);
        pairs[0].send(&header, &data);
        pairs[0].send(&[0; 12], &frame(6, 100));
        session.kick(1);
        if offered {
            assert_eq!(host.wire.receive().len(), 3000);
        }
        assert_eq!(host.wire.receive(), frame(6, 100));
    }
}

#[test]
fn what_came_while_no_guest_was_there_is_history() {
    let host = Host::new(&[]);
    let mut daemon = host.daemon(&[]);
    for round in 0..2 {
        // Of its own: the daemon may be with the guest of before for a moment more.
        let memory = memory();
        let mut pairs = pairs(&memory, 1);
        host.wire.wait_for_link(TAP);
        host.wire.send(&frame(99, 100));
        let session = host.session(&memory, ALL_FEATURES, &pairs);
        daemon.wait_line("attached");
        host.wire.send(&frame(round, 100));
        assert_eq!(receive(&session, &mut pairs[0], 0).0[12..], frame(round, 100));
    }
}

/// A message of one number, as QEMU sends it, and what is answered.
fn number_message(stream: &mut UnixStream, code: u32, number: [u8; 8]) -> u64 {
    let mut message: Vec<u8> = [code, 1 | 8, 8].iter().flat_map(|word| word.to_ne_bytes()).collect();
    message.extend_from_slice(&number);
    stream.write_all(&message).unwrap();
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..4], code.to_ne_bytes());
    assert_eq!(answer[4..8], 5u32.to_ne_bytes());
    u64::from_ne_bytes(answer[12..].try_into().unwrap())
}

#[test]
fn a_frontend_says_the_mtu_and_when_to_announce() {
    let host = Host::new(&[]);
    let _daemon = host.daemon(&[]);
    let memory = memory();
    let pairs = pairs(&memory, 1);
    let mut stream = UnixStream::connect(host.path("socket")).unwrap();
    let mut session = Session::over(
        stream.try_clone().unwrap(),
        &memory,
        ALL_FEATURES,
        &[&pairs[0].receive, &pairs[0].transmit],
        VhostUserProtocolFeatures::RARP | VhostUserProtocolFeatures::MTU,
    );
    let (enable, rarp, mtu) = (18, 19, 20);
    assert_eq!(number_message(&mut stream, mtu, 1500u64.to_ne_bytes()), 0);
    assert_eq!(number_message(&mut stream, mtu, 1501u64.to_ne_bytes()), 1);
    assert_eq!(number_message(&mut stream, rarp, [0x52, 0x54, 0, 9, 9, 9, 0, 0]), 0);
    let seen = host.wire.receive();
    assert_eq!(
        (&seen[6..12], &seen[12..14]),
        (&[0x52, 0x54, 0, 9, 9, 9][..], &[0x80, 0x35][..])
    );
    let queue = |number: u64| number.to_ne_bytes();
    assert_eq!(number_message(&mut stream, enable, queue(1 << 32 | 1)), 0);
    assert_eq!(number_message(&mut stream, enable, queue(1 << 32 | 9)), 1);
    assert_eq!(number_message(&mut stream, enable, queue(2 << 32)), 1);
    // The conversation goes on.
    assert_eq!(session.config(6), [0x52, 0x54, 0, 1, 2, 3]);
}

#[test]
fn queues_may_be_enabled_before_features_are_taken() {
    let host = Host::new(&[]);
    let daemon = host.daemon(&[]);
    let mut stream = UnixStream::connect(host.path("socket")).unwrap();
    for queue in [0, 1] {
        assert_eq!(number_message(&mut stream, 18, (1u64 << 32 | queue).to_ne_bytes()), 0);
    }
    // One more, and behind it a message with a descriptor (SET_VRING_CALL), as they lie there when the daemon is slow.
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let enable = words(&[18, 1, 8, 0, 1]);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    daemon.stop();
    stream.write_all(&enable).unwrap();
    let descriptors = [theirs.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let call = [words(&[13, 1, 8]), 0u64.to_ne_bytes().to_vec()].concat();
    let parts = [IoSlice::new(&call)];
    sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
    daemon.signal(Signal::SIGCONT);
    let memory = memory();
    let pairs = pairs(&memory, 1);
    let none = VhostUserProtocolFeatures::empty();
    let drivers = [&pairs[0].receive, &pairs[0].transmit];
    drop(Session::over(stream, &memory, ALL_FEATURES, &drivers, none));
}

#[test]
fn memory_may_be_told_of_once_for_each_pair() {
    let host = Host::new(&[]);
    let _daemon = host.daemon(&[]);
    let memory = memory();
    let mut pairs = pairs(&memory, 1);
    let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    let mut session = Session::negotiate_with(&host.path("socket"), ALL_FEATURES, 2, slots);
    let region = memory.iter().next().unwrap();
    let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
    for _ in 0..2 {
        session.frontend.add_mem_region(&region).unwrap();
    }
    session.start_queue(0, &pairs[0].receive);
    session.start_queue(1, &pairs[0].transmit);
    pairs[0].send(&[0; 12], &frame(1, 80));
    session.kick(1);
    assert_eq!(host.wire.receive(), frame(1, 80));
    for queue in [0, 1] {
        session.frontend.get_vring_base(queue).unwrap();
    }
    for _ in 0..2 {
        session.frontend.remove_mem_region(&region).unwrap();
    }
}

#[test]
fn a_tap_is_waited_for_while_its_last_daemon_ends() {
    let host = Host::new(&[]);
    let first = host.daemon(&[]);
    let mut second = Daemon::spawn(&mut host.command(&["--tap", TAP]));
    second.wait_line("somebody has the TAP");
    first.terminate();
    assert_eq!(first.wait().0, Some(0));
    second.wait_line("listening");
}

#[test]
fn inherited_queues_of_a_tap_are_a_device() {
    let host = Host::new(&["multi_queue"]);
    let name: TapName = TAP.parse().unwrap();
    let taps = Tap::open_queues(&name, 2).unwrap();
    let numbers = taps
        .iter()
        .map(|tap| tap.as_raw_fd().to_string())
        .collect::<Vec<_>>()
        .join(",");
    let mut command = host.command(&["--tap-fd", &numbers]);
    for tap in &taps {
        // SAFETY: the descriptor is open as long as the TAP.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(tap.as_raw_fd()) };
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    }
    let _daemon = Daemon::listening(&mut command);
    drop(taps);
    let memory = memory();
    let mut pairs = pairs(&memory, 2);
    let session = host.session(&memory, ALL_FEATURES, &pairs);
    for (number, pair) in pairs.iter_mut().enumerate() {
        pair.send(&[0; 12], &frame(number as u32, 80));
        session.kick(2 * number + 1);
        assert_eq!(host.wire.receive(), frame(number as u32, 80));
    }
}

#[test]
fn a_tap_that_does_not_fit_is_one_clear_line() {
    let host = Host::new(&[]);
    let shown = Command::new("ip").args(["-o", "link", "show", TAP]).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let own = shown
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let null = file.into_raw_fd();
    // SAFETY: just opened, and kept open.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(null) };
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    for (options, says) in [
        (vec!["--tap", TAP, "--queue-pairs", "2"], "made with multi_queue"),
        (vec!["--tap", TAP, "--mtu", "1501"], "has 1500"),
        (vec!["--tap", TAP, "--mac", own], "another --mac"),
        (vec!["--tap-fd", &null.to_string()], "cannot be a queue of the device"),
        (vec!["--tap-fd", "777"], "descriptor 777"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-net"));
        command
            .args(["--socket-path", text(&host.path("socket"))])
            .args(&options);
        let (code, said) = fails(&mut command);
        assert_eq!((code, said.lines().count()), (Some(3), 1), "{said}");
        assert!(said.contains(says), "{said}");
    }
    for options in [
        &["--tap", TAP, "--tap-fd", "5"][..],
        &["--tap", TAP, "--queue-pairs", "17"],
        &["--tap", TAP, "--mtu", "67"],
    ] {
        let (code, said) = fails(&mut host.command(options));
        assert_eq!(code, Some(2), "{said}");
    }
}
