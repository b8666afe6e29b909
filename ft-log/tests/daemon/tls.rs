//! Two daemons that prove to each other who they are, and all the ones that cannot.

use std::{
    io::Write,
    net::{SocketAddr, TcpStream, UdpSocket},
};

use ft_protocol::{
    Generation, Lsn, Role,
    message::{Message, vm_hash},
};
use nix::sys::signal::Signal;

use crate::world::{Daemon, Host, HostId, SUSPICIOUS, VM, World};

/// Makes a certificate and its key.
fn make(world: &World, name: &str) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    std::fs::write(world.path(&format!("{name}.crt")), made.cert.pem()).unwrap();
    std::fs::write(world.path(&format!("{name}.key")), made.signing_key.serialize_pem()).unwrap();
}

/// The same of a side that suspects a silent peer soon.
fn suspicious(world: &World, own: &str, peer: &str) -> Vec<String> {
    let mut options = options(world, own, peer);
    options.extend(SUSPICIOUS.iter().map(|word| (*word).to_owned()));
    options
}

/// The options of a side that is `own` and takes `peer` for its peer.
fn options(world: &World, own: &str, peer: &str) -> Vec<String> {
    let path = |name: String| -> String { world.path(&name).display().to_string() };
    [
        "--tls-cert".into(),
        path(format!("{own}.crt")),
        "--tls-key".into(),
        path(format!("{own}.key")),
        "--tls-peer".into(),
        path(format!("{peer}.crt")),
    ]
    .into()
}

fn host(world: &World, id: HostId, options: &[String]) -> Host {
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    world.host_with(id, &options)
}

fn identities() -> World {
    let world = World::new();
    ["a", "b", "stranger"].iter().for_each(|name| make(&world, name));
    world
}

#[test]
fn a_pair_that_knows_each_other_commits_and_fails_over() {
    let world = identities();
    let mut a = host(&world, HostId::A, &suspicious(&world, "a", "b"));
    let mut b = host(&world, HostId::B, &suspicious(&world, "b", "a"));
    for side in [&mut a, &mut b] {
        side.daemon.wait_event("paired");
        side.daemon.wait_log("the peer is who it should be (TLS 1.3)");
    }
    a.wait_role(Role::Recording);
    let last = a.append(3000);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    a.daemon.signal(Signal::SIGKILL);
    b.wait_role(Role::Live);
}

#[test]
fn a_wrong_certificate_is_refused_with_the_reason_on_both_sides() {
    let world = identities();
    let mut a = host(&world, HostId::A, &options(&world, "stranger", "b"));
    let mut b = host(&world, HostId::B, &options(&world, "b", "a"));
    b.daemon.wait_log("the peer's certificate is not the one in --tls-peer");
    a.daemon.wait_log("the peer refused this side");
    drop(a);
    // The right one is still taken. (The claim of the wrong one is removed by hand, as its message says.)
    std::fs::remove_dir_all(world.path("arbiter")).unwrap();
    std::fs::create_dir(world.path("arbiter")).unwrap();
    let mut a = host(&world, HostId::A, &options(&world, "a", "b"));
    a.daemon.wait_event("paired");
    b.daemon.wait_event("paired");
}

#[test]
fn a_backup_that_is_somebody_else_is_refused_with_the_reason_on_both_sides() {
    let world = identities();
    let mut b = host(&world, HostId::B, &options(&world, "stranger", "a"));
    let mut a = host(&world, HostId::A, &options(&world, "a", "b"));
    a.daemon.wait_log("the peer's certificate is not the one in --tls-peer");
    b.daemon.wait_log("the peer refused this side");
}

#[test]
fn a_side_without_tls_is_refused_with_the_reason_on_both_sides() {
    let world = identities();
    let mut a = host(&world, HostId::A, &[]);
    let mut b = host(&world, HostId::B, &options(&world, "b", "a"));
    b.daemon.wait_log("the peer does not speak TLS");
    a.daemon.wait_log("the peer speaks TLS, this side does not");

    let world = identities();
    let mut a = host(&world, HostId::A, &options(&world, "a", "b"));
    let mut b = host(&world, HostId::B, &[]);
    b.daemon.wait_log("the peer speaks TLS, this side does not");
    a.daemon.wait_log("the peer does not speak TLS");
}

/// Garbage, half a handshake, and silence: whoever has no certificate gets nowhere, and the pair goes on.
#[test]
fn strangers_on_the_port_harm_nobody() {
    let world = identities();
    let mut b = host(&world, HostId::B, &options(&world, "b", "a"));
    let address: SocketAddr = world.address(HostId::B).parse().unwrap();
    let mut garbage = crate::hostile::connect_as_a(&world);
    garbage.write_all(&[0x16, 3, 1, 0xff, 0xff, 1, 2, 3]).unwrap();
    garbage.write_all(&[0xa5; 50_000]).unwrap_or_default();
    let _silent = crate::hostile::connect_as_a(&world);
    drop(TcpStream::connect(address));
    b.daemon.wait_log("refused the logging channel");
    let mut a = host(&world, HostId::A, &options(&world, "a", "b"));
    a.daemon.wait_event("paired");
    b.daemon.wait_event("paired");
    let last = a.append(100);
    a.wait_committed(last);
    assert_eq!(b.region().role(), Role::Replaying);
}

/// Heartbeats that the peer's session did not make do not keep it alive, though all they say is right.
#[test]
fn heartbeats_without_the_sessions_key_are_ignored() {
    let world = identities();
    let mut a = host(&world, HostId::A, &suspicious(&world, "a", "b"));
    let mut b = host(&world, HostId::B, &suspicious(&world, "b", "a"));
    a.wait_role(Role::Recording);
    b.wait_role(Role::Replaying);
    let last = a.append(3);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    a.daemon.signal(Signal::SIGKILL);
    a.daemon.wait();
    // From the very address of the peer, now that it is free.
    let socket = loop {
        match UdpSocket::bind(world.address(HostId::A)) {
            Ok(socket) => break socket,
            Err(_) => std::thread::yield_now(),
        }
    };
    let mut forged = Vec::new();
    let heartbeat = Message::Heartbeat {
        vm: vm_hash(VM),
        lsn: last,
        sequence: u64::MAX,
        replayed: last,
        full: false,
        asks: false,
    };
    heartbeat.encode(Generation(1), &mut forged);
    forged.extend([0; 16]);
    socket.send_to(&forged, world.address(HostId::B)).unwrap();
    while b.daemon.wait_event("log")["datagrams_ignored"] == 0 {}
    b.wait_role(Role::Live);
}

#[test]
fn plaintext_between_hosts_must_be_asked_for() {
    let world = identities();
    let run = |words: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ft-log"));
        command
            .args(["--vm", VM, "--role", "backup", "--socket-path"])
            .arg(world.path("s"));
        command.arg("--arbiter").arg(world.path("arbiter"));
        command
            .args(["--listen", "192.0.2.1:7700", "--peer", "192.0.2.2:7700"])
            .args(words);
        let mut daemon = Daemon::spawn(&mut command);
        (daemon.wait_code(), daemon.logged.clone())
    };
    let (code, logged) = run(&[]);
    assert!(
        code == 2 && logged.contains("--plaintext on a network of its own"),
        "{logged}"
    );
    // With either it gets as far as the address, which is nobody's.
    let (code, logged) = run(&["--plaintext"]);
    assert!(code == 3 && logged.contains("192.0.2.1"), "{logged}");
    let tls = options(&world, "b", "a");
    let tls: Vec<_> = tls.iter().map(String::as_str).collect();
    let (code, logged) = run(&tls);
    assert!(code == 3 && logged.contains("192.0.2.1"), "{logged}");
    let (code, logged) = run(&tls[..4]);
    assert!(code == 2 && logged.contains("--tls-peer"), "{logged}");
    let (code, logged) = run(&[tls[0], tls[1], tls[2], "/none", tls[4], tls[5]]);
    assert!(code == 3 && logged.contains("/none"), "{logged}");
}
