//! How the daemon is started and told to end: the conventions that operators and service managers rely on.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    process::Command,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use support::{
    daemon::{Daemon, fails, text},
    driver::{BlkDriver, memory},
    frontend::{PATIENCE, Session, complete},
};
use tempfile::TempDir;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-ft-blk");

struct World {
    directory: TempDir,
}

impl World {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let image = File::create(directory.path().join("image")).unwrap();
        image.set_len(1 << 20).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn daemon(&self) -> Command {
        let mut command = Command::new(DAEMON);
        command.args(["--blk-file", text(&self.path("image"))]);
        command
    }
}

/// Lets children have the descriptor under the number it has here.
fn inheritable(fd: &impl AsFd) {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
}

/// One request there and back.
fn works(session: &Session, driver: &mut BlkDriver) {
    let write = driver.write(3, &[7; 512]);
    complete(session, driver, &[write]);
    assert_eq!(driver.status(write), 0);
}

#[test]
fn an_inherited_listening_socket_serves_one_frontend_after_the_other() {
    let world = World::new();
    let listener = UnixListener::bind(world.path("socket")).unwrap();
    inheritable(&listener);
    let daemon = Daemon::listening(world.daemon().args(["--fd", &listener.as_raw_fd().to_string()]));
    drop(listener);
    for _ in 0..2 {
        let memory = memory();
        let mut driver = BlkDriver::new(&memory, true);
        let session = Session::start(&world.path("socket"), &memory, u64::MAX, &[&driver.ring]);
        works(&session, &mut driver);
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
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let session = Session::start_over(ours, &memory, u64::MAX, &driver.ring);
    works(&session, &mut driver);
    drop(session);
    let (code, rest) = daemon.wait();
    assert_eq!(code, Some(0), "{rest}");
    assert!(rest.contains("no other frontend can come"), "{rest}");
}

/// The daemon as systemd starts it: its socket is descriptor 3, and it reports to `notify`.
fn activated(world: &World, listener: &UnixListener, notify: &str) -> Command {
    inheritable(listener);
    let mut command = Command::new("bash");
    let script = "exec 3<&\"$0\"; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";
    command.args(["-c", script, &listener.as_raw_fd().to_string(), DAEMON]);
    command.args(["--blk-file", text(&world.path("image"))]);
    command.env("NOTIFY_SOCKET", notify);
    command
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
    // A frontend may connect before the daemon has started: that is what activation is for.
    let early = UnixStream::connect(world.path("socket")).unwrap();
    let mut command = activated(&world, &listener, text(&world.path("notify")));
    let daemon = Daemon::listening(command.env("WATCHDOG_USEC", "20000"));
    assert!(said(&manager).contains("READY=1"));
    let memory = memory();
    let mut driver = BlkDriver::new(&memory, true);
    let session = Session::start_over(early, &memory, u64::MAX, &driver.ring);
    works(&session, &mut driver);
    for _ in 0..3 {
        assert!(said(&manager).contains("WATCHDOG=1"));
    }
    daemon.terminate();
    while !said(&manager).contains("STOPPING=1") {}
    assert_eq!(daemon.wait().0, Some(0));
}

#[test]
fn the_daemon_is_in_the_sandbox_unless_the_operator_says_no() {
    let world = World::new();
    let status_of = |process: &str| std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let field = |status: &str, name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        value.trim().to_owned()
    };
    // The test itself may be confined already.
    let outside = ["Seccomp:", "NoNewPrivs:"].map(|name| field(&status_of("self"), name));
    for (arguments, inside) in [
        (&[][..], ["2".to_owned(), "1".to_owned()]),
        (&["--sandbox", "off"], outside),
    ] {
        let socket = world.path("socket");
        let mut command = world.daemon();
        let daemon = Daemon::listening(command.args(["--socket-path", text(&socket)]).args(arguments));
        let status = status_of(&daemon.id().to_string());
        assert_eq!(["Seccomp:", "NoNewPrivs:"].map(|name| field(&status, name)), inside);
        daemon.terminate();
        assert_eq!(daemon.wait().0, Some(0));
        assert!(!socket.exists(), "it removes its socket");
    }
}

#[test]
fn capabilities_are_printed_without_an_image() {
    let output = Command::new(DAEMON).arg("--print-capabilities").output().unwrap();
    assert!(output.status.success());
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(capabilities["type"], "block");
    let described: serde_json::Value = serde_json::from_str(include_str!("../dist/50-vhost-ft-blk.json")).unwrap();
    assert_eq!(described["type"], "block");
}

#[test]
fn a_socket_that_cannot_be_is_one_clear_line() {
    let world = World::new();
    let file = File::open(world.path("image")).unwrap();
    inheritable(&file);
    for (arguments, says) in [
        (vec!["--fd".to_owned(), file.as_raw_fd().to_string()], "not a socket"),
        (vec!["--fd".to_owned(), "999".to_owned()], "not open"),
        (vec![], "systemd handed over 0 sockets"),
    ] {
        let (code, said) = fails(world.daemon().args(&arguments).env_remove("LISTEN_FDS"));
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains(says), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    let (code, _) = fails(world.daemon().args(["--fd", "5", "--socket-path", "s"]));
    assert_eq!(code, Some(2));
}
