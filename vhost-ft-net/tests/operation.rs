//! How the daemon is started and told to end: the conventions that operators and service managers rely on. Needs root, `ip` and
//! /dev/net/tun (feature `real-hosts`) but for what is printed.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

mod wire;

use std::process::Command;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-ft-net");

#[test]
fn capabilities_are_printed_without_a_tap() {
    let output = Command::new(DAEMON).arg("--print-capabilities").output().unwrap();
    assert!(output.status.success());
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(capabilities["type"], "net");
    let described: serde_json::Value = serde_json::from_str(include_str!("../dist/50-vhost-ft-net.json")).unwrap();
    assert_eq!(described["type"], "net");
}

#[test]
fn what_a_protected_device_has_not_is_refused() {
    let protected = [
        "--socket-path",
        "s",
        "--tap",
        "t",
        "--ft-log",
        "l",
        "--vm",
        "v",
        "--device",
        "d",
    ];
    for (more, code) in [
        (["--queue-pairs", "2"], 3),
        (["--io-threads", "2"], 3),
        (["--mtu", "1500"], 2),
        (["--tap-fd", "5"], 2),
    ] {
        let (ended, said) = support::daemon::fails(Command::new(DAEMON).args(protected).args(more));
        assert_eq!(ended, Some(code), "{said}");
    }
}

#[cfg(feature = "real-hosts")]
mod with_a_tap {
    use std::{
        os::{
            fd::{AsFd, AsRawFd},
            unix::net::{UnixDatagram, UnixListener, UnixStream},
        },
        path::PathBuf,
        process::Command,
    };

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    use tempfile::TempDir;

    use super::{
        DAEMON,
        support::{
            daemon::{Daemon, text},
            driver::{Driver, memory, readable},
            frontend::{PATIENCE, Session},
        },
        wire::{Wire, frame},
    };

    const TAP: &str = "tap-operation";

    struct World {
        directory: TempDir,
        wire: Wire,
    }

    impl World {
        fn new() -> Self {
            Self {
                wire: Wire::in_a_new_namespace(TAP),
                directory: TempDir::new().unwrap(),
            }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn daemon(&self) -> Command {
            let mut command = Command::new(DAEMON);
            command.args(["--tap", TAP]);
            command
        }

        /// A session over a connected stream sends a frame.
        fn works(&self, stream: UnixStream) -> Session {
            let memory = memory();
            let mut transmit = Driver::new(&memory, 0x1_0000, 64, true);
            // The first queue receives; what it has is not looked at here.
            let receive = Driver::new(&memory, 0x3_0000, 64, true);
            let session = Session::over(
                stream,
                &memory,
                u64::MAX,
                &[&receive, &transmit],
                vhost::vhost_user::message::VhostUserProtocolFeatures::empty(),
            );
            let sent = frame(3, 100);
            transmit.write((1 << 20) + 12, &sent);
            transmit.add(&[readable(1 << 20, 112)]);
            session.kick(1);
            assert_eq!(self.wire.receive(), sent);
            session
        }
    }

    /// Lets children have the descriptor under the number it has here.
    fn inheritable(fd: &impl AsFd) {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    }

    #[test]
    fn an_inherited_listening_socket_serves_one_frontend_after_the_other() {
        let world = World::new();
        let listener = UnixListener::bind(world.path("socket")).unwrap();
        inheritable(&listener);
        let daemon = Daemon::listening(world.daemon().args(["--fd", &listener.as_raw_fd().to_string()]));
        drop(listener);
        for _ in 0..2 {
            world.works(UnixStream::connect(world.path("socket")).unwrap());
        }
        daemon.terminate();
        assert_eq!(daemon.wait().0, Some(0));
        assert!(world.path("socket").exists(), "whoever bound it removes it");
    }

    #[test]
    fn an_inherited_connected_socket_is_the_only_frontend() {
        let world = World::new();
        let (ours, theirs) = UnixStream::pair().unwrap();
        inheritable(&theirs);
        let daemon = Daemon::listening(world.daemon().args(["--fd", &theirs.as_raw_fd().to_string()]));
        drop(theirs);
        drop(world.works(ours));
        let (code, rest) = daemon.wait();
        assert_eq!(code, Some(0), "{rest}");
        assert!(rest.contains("no other frontend can come"), "{rest}");
    }

    fn said(manager: &UnixDatagram) -> String {
        let mut buffer = [0; 512];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[test]
    fn systemd_hands_over_the_socket_and_is_told_how_it_goes() {
        let world = World::new();
        let manager = UnixDatagram::bind(world.path("notify")).unwrap();
        manager.set_read_timeout(Some(PATIENCE)).unwrap();
        let listener = UnixListener::bind(world.path("socket")).unwrap();
        inheritable(&listener);
        // A frontend may connect before the daemon has started: that is what activation is for.
        let early = UnixStream::connect(world.path("socket")).unwrap();
        let mut command = Command::new("bash");
        let script = "exec 3<&\"$0\"; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";
        command.args(["-c", script, &listener.as_raw_fd().to_string(), DAEMON, "--tap", TAP]);
        command.env("NOTIFY_SOCKET", text(&world.path("notify")));
        let daemon = Daemon::listening(command.env("WATCHDOG_USEC", "20000"));
        assert!(said(&manager).contains("READY=1"));
        let _session = world.works(early);
        for _ in 0..3 {
            assert!(said(&manager).contains("WATCHDOG=1"));
        }
        daemon.terminate();
        while !said(&manager).contains("STOPPING=1") {}
        assert_eq!(daemon.wait().0, Some(0));
    }
}
