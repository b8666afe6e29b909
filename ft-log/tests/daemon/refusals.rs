//! What does not belong together is refused: with one clear line, status 3, and nothing damaged.

use std::{
    net::TcpListener,
    os::unix::net::{UnixListener, UnixStream},
};

use ft_client::handshake::{JoinError, join_device, join_shim};
use nix::sys::signal::Signal;

use crate::world::{Daemon, FINGERPRINT, Host, HostId, Locals, VM, World};

/// Starts a daemon that must refuse to start, and gives its only line.
fn refused(world: &World, host: HostId) -> String {
    let mut daemon = Daemon::spawn(world.command(host).args(["--vm", VM]));
    assert_eq!(daemon.wait_code(), 3, "{}", daemon.logged);
    assert_eq!(daemon.logged.lines().count(), 1, "{}", daemon.logged);
    daemon.logged.clone()
}

#[test]
fn a_socket_in_use_is_left_alone_and_a_stale_one_replaced() {
    let world = World::new();
    let socket = world.socket(HostId::A);
    let listener = UnixListener::bind(&socket).unwrap();
    assert!(refused(&world, HostId::A).contains(&format!("{}: another ft-log", socket.display())));
    UnixStream::connect(&socket).unwrap();
    drop(listener);
    let mut daemon = world.start(HostId::A);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_code(), 0);
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let world = World::new();
    std::fs::write(world.socket(HostId::A), "precious").unwrap();
    assert!(refused(&world, HostId::A).contains("is not a socket"));
    assert_eq!(std::fs::read(world.socket(HostId::A)).unwrap(), b"precious");
}

#[test]
fn an_address_in_use_is_named() {
    let world = World::new();
    let _taken = TcpListener::bind(world.address(HostId::B)).unwrap();
    assert!(refused(&world, HostId::B).contains(world.address(HostId::B)));
    assert!(!world.socket(HostId::B).exists());
}

#[test]
fn an_earlier_journal_of_the_generation_is_kept() {
    let world = World::new();
    std::fs::create_dir(world.journal(HostId::A)).unwrap();
    let old = world.journal(HostId::A).join("ledger.g1.000000.journal");
    std::fs::write(&old, "old").unwrap();
    std::fs::write(world.journal(HostId::A).join("other.g1.000000.journal"), "old").unwrap();
    assert!(refused(&world, HostId::A).contains("VM 'ledger' generation 1 is already here"));
    assert_eq!(std::fs::read(&old).unwrap(), b"old");
}

#[test]
fn local_clients_that_do_not_belong_here_are_refused_and_others_join() {
    let world = World::new();
    let mut daemon = world.start(HostId::A);
    let socket = world.socket(HostId::A);
    let device = |vm, name| join_device(&socket, vm, name, &FINGERPRINT);
    let refusal = |result: Result<_, JoinError>| match result {
        Err(JoinError::Refused(reason)) => reason,
        other => panic!("not refused: {other:?}"),
    };
    assert!(refusal(device("other", "blk0")).contains("protects VM 'ledger', not 'other'"));
    assert!(refusal(device(VM, "blk1")).contains("no device 'blk1'"));
    daemon.wait_log("refused a local client: VM 'ledger' has no device 'blk1'");
    let first = device(VM, "blk0").unwrap();
    assert!(refusal(device(VM, "blk0")).contains("blk0 has joined already"));
    // The one that is in notices nothing.
    let net = device(VM, "net0").unwrap();
    let shim = join_shim(&socket, VM, &FINGERPRINT).unwrap();
    let _complete = Host {
        daemon,
        locals: Locals {
            shim,
            devices: vec![first, net],
        },
    };
}

#[test]
fn two_hosts_that_would_start_different_machines_refuse_each_other() {
    let world = World::new();
    let mut a = Host::join(world.start(HostId::A), &world.socket(HostId::A), &[1; 32]);
    let mut b = Host::join(world.start(HostId::B), &world.socket(HostId::B), &[2; 32]);
    for host in [&mut a, &mut b] {
        assert_eq!(host.daemon.wait_code(), 3, "{}", host.daemon.logged);
        assert!(
            host.daemon.logged.contains("different machines"),
            "{}",
            host.daemon.logged
        );
    }
}

#[test]
fn two_hosts_with_other_devices_refuse_each_other() {
    let world = World::new();
    let mut a = world.host_with(HostId::A, &[]);
    let mut other = Daemon::spawn(world.command(HostId::B).args(["--vm", VM, "--devices", "net0,blk0"]));
    assert_eq!(other.wait_code(), 2, "an option that is there twice is wrong usage");
    let b = world.start_devices(HostId::B, "net0,blk0");
    let mut b = Host::join(b, &world.socket(HostId::B), &FINGERPRINT);
    for host in [&mut a, &mut b] {
        assert_eq!(host.daemon.wait_code(), 3, "{}", host.daemon.logged);
    }
}
