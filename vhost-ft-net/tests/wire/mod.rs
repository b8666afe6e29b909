//! The host's side of a TAP, in a network namespace of the test's own.

#![allow(unreachable_pub, dead_code, reason = "a module of several test binaries")]

pub mod host;

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::Command,
    time::Duration,
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socket},
};

/// Source address of test frames.
pub const GUEST: [u8; 4] = [10, 77, 0, 10];

/// Address of the guest's card.
pub const GUEST_MAC: &str = "52:54:00:01:02:03";

/// A packet socket on a TAP.
pub struct Wire {
    socket: OwnedFd,
}

/// Runs `ip` in the namespace of this thread.
pub fn ip(arguments: &[&str]) {
    let status = Command::new("ip")
        .args(arguments)
        .status()
        .expect("the tool `ip` (iproute2)");
    assert!(status.success(), "ip {arguments:?} failed");
}

/// An IPv4 frame that says who it is.
pub fn frame(number: u32, length: usize) -> Vec<u8> {
    let mut frame = vec![number as u8; length];
    frame[..6].copy_from_slice(&[0x02, 0, 0, 0, 0, 1]);
    frame[6..12].copy_from_slice(&[0x52, 0x54, 0, 1, 2, 3]);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..18].copy_from_slice(&number.to_le_bytes());
    frame[26..30].copy_from_slice(&GUEST);
    frame
}

/// Has an interface go up, with nothing of the host's own on it.
pub fn up(interface: &str) {
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1").ok();
    ip(&["link", "set", interface, "up"]);
}

impl Wire {
    /// Makes the namespace and the TAP, and listens on it.
    pub fn in_a_new_namespace(tap: &str) -> Self {
        Self::with_options(tap, &[])
    }

    /// The same with a TAP that has more options of `ip tuntap`.
    pub fn with_options(tap: &str, options: &[&str]) -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace: this test needs root");
        assert!(
            std::path::Path::new("/dev/net/tun").exists(),
            "this test needs /dev/net/tun"
        );
        ip(&[&["tuntap", "add", tap, "mode", "tap"], options].concat());
        up(tap);
        Self::on(tap)
    }

    /// Makes the namespace and a pair of Ethernet interfaces with a cable between them, and listens on the `far` one.
    pub fn with_cable(near: &str, far: &str) -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace: this test needs root");
        ip(&["link", "add", near, "type", "veth", "peer", "name", far]);
        up(near);
        up(far);
        Self::on(far)
    }

    fn on(interface: &str) -> Self {
        let index = nix::net::if_::if_nametoindex(interface).unwrap();
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: an all-zero sockaddr_ll is a valid value of that plain C structure.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        // SAFETY: the address lives for the call and its length is its own.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
        Self { socket }
    }

    /// Waits until the kernel has taken note that somebody is at the other end; before that it drops what is sent there.
    pub fn wait_for_link(&self, tap: &str) {
        loop {
            let output = Command::new("ip").args(["-o", "link", "show", tap]).output().unwrap();
            if String::from_utf8_lossy(&output.stdout).contains("state UP") {
                return;
            }
        }
    }

    /// Whether a frame came from the daemon in time.
    pub fn anything_within(&self, patience: Duration) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(patience).unwrap()).unwrap() == 1
    }

    /// The next frame the daemon sent.
    pub fn receive(&self) -> Vec<u8> {
        assert!(self.anything_within(Duration::from_secs(60)), "no frame came");
        let mut buffer = vec![0; 70000];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        buffer.truncate(length);
        buffer
    }

    /// Sends a frame to the daemon.
    pub fn send(&self, frame: &[u8]) {
        assert_eq!(send(self.socket.as_raw_fd(), frame, MsgFlags::empty()), Ok(frame.len()));
    }

    /// What is there and nobody reads.
    pub fn drain(&self) {
        let (mut sent, mut received) = (0, 0);
        self.longest(&mut sent, &mut received);
    }

    /// Notes the longest frames the guest sent and was sent among those that are there.
    pub fn longest(&self, sent: &mut usize, received: &mut usize) {
        let mut buffer = [0; 14];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        while let Ok(length) = recv(self.socket.as_raw_fd(), &mut buffer, flags) {
            let of_guest = buffer[6..12] == [0x52, 0x54, 0, 1, 2, 3];
            let longest = if of_guest { &mut *sent } else { &mut *received };
            *longest = length.max(*longest);
        }
    }
}
