//! The logging channel breaks and comes back within the generation: nothing is lost, nothing comes twice, nobody goes live.

use ft_client::journal::JournalReader;
use ft_protocol::{Generation, Lsn, Role};

use crate::{
    proxy::Proxy,
    world::{Host, HostId, World, append},
};

/// A pair with a relay in between. Silence is never the reason for anything.
fn pair(world: &World, channel_timeout_ms: &str) -> (Proxy, Host, Host) {
    let proxy = Proxy::new(world);
    let (a, b) = world.pair_with(&["--channel-timeout-ms", channel_timeout_ms]);
    (proxy, a, b)
}

/// Ends the pair in good order; nobody suspected anybody, and both journals hold what was replayed.
fn end_in_good_order(world: &World, mut a: Host, mut b: Host, mut replayed: Vec<u8>, last: Lsn) {
    assert_eq!(a.region().generation(), Generation(1));
    let off = a.power_off();
    replayed.extend(b.replay_through(last.next(), off));
    for host in [&mut a, &mut b] {
        assert_eq!(host.daemon.wait_code(), 0, "{}", host.daemon.logged);
        let events = host.daemon.rest_of_events();
        assert!(!events.iter().any(|event| event == "suspect"), "{events:?}");
    }
    for host in [HostId::A, HostId::B] {
        let mut reader = JournalReader::open(&world.journal(host)).unwrap();
        let mut journal = Vec::new();
        while let Some((_, bytes)) = reader.next_entry().unwrap() {
            journal.extend_from_slice(bytes);
        }
        assert!(reader.torn_tail().is_none());
        assert!(journal == replayed, "the journal of {host:?} is another log");
    }
}

#[test]
fn a_channel_that_is_cut_again_and_again_under_load_costs_nothing() {
    let world = World::proxied_world();
    let (proxy, mut a, mut b) = pair(&world, "60000");
    let count = 30_000;
    let mut replayed = Vec::new();
    std::thread::scope(|scope| {
        let (shim, devices) = (&mut a.locals.shim, &mut a.locals.devices);
        let appended = scope.spawn(move || append(shim, devices, count));
        // A cut whenever another part of the log has been replayed.
        for part in 0..30 {
            let (from, through) = (part * count / 30 + 1, (part + 1) * count / 30);
            replayed.extend(b.replay_through(Lsn(from), Lsn(through)));
            let accepted = proxy.accepted();
            proxy.cut();
            proxy.wait_accepted(accepted + 1);
        }
        assert_eq!(appended.join().unwrap(), Lsn(count));
    });
    a.wait_committed(Lsn(count));
    assert!(proxy.accepted() > 30);
    end_in_good_order(&world, a, b, replayed, Lsn(count));
}

#[test]
fn a_connection_on_which_nothing_arrives_is_replaced() {
    let world = World::proxied_world();
    let (proxy, mut a, mut b) = pair(&world, "8000");
    let last = a.append(100);
    a.wait_committed(last);
    proxy.wedge();
    // Both ends believe in the connection; the backup's is replaced by a new hello while it is still open.
    let last = a.append(100);
    a.daemon.wait_log("connected anew");
    a.wait_committed(last);
    let replayed = b.replay_through(Lsn(1), last);
    end_in_good_order(&world, a, b, replayed, last);
}

#[test]
fn a_hello_that_nobody_answers_is_said_again_on_another_connection() {
    let world = World::proxied_world();
    let (proxy, mut a, mut b) = pair(&world, "8000");
    let last = a.append(10);
    a.wait_committed(last);
    proxy.mute(true);
    let accepted = proxy.accepted();
    proxy.cut();
    proxy.wait_accepted(accepted + 1);
    let last = a.append(10);
    // The connection is there, and silent.
    a.daemon.wait_log("connected anew");
    proxy.mute(false);
    a.wait_committed(last);
    let replayed = b.replay_through(Lsn(1), last);
    end_in_good_order(&world, a, b, replayed, last);
}

#[test]
fn a_channel_that_stays_away_is_suspected_though_heartbeats_come() {
    let world = World::proxied_world();
    let (proxy, mut a, mut b) = pair(&world, "4000");
    let last = a.append(10);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    let accepted = proxy.accepted();
    proxy.refuse();
    proxy.cut();
    for host in [&mut a, &mut b] {
        let reason = host.daemon.wait_event("suspect")["reason"].clone();
        assert!(reason.as_str().unwrap().contains("is away"), "{reason}");
    }
    // Whoever takes connections and closes them at once is not asked without a pause: 4 s are 200 of the shortest, 25 of the longest.
    let attempts = proxy.accepted() - accepted;
    assert!(attempts < 60, "{attempts} attempts");
    // One of them goes on, the other one ends.
    let verdict = a.daemon.wait_event("arbiter")["verdict"].clone();
    let (winner, loser) = if verdict == "won" { (&a, &mut b) } else { (&b, &mut a) };
    winner.wait_role(Role::Live);
    assert_eq!(loser.daemon.wait_code(), 4);
}

#[test]
fn a_channel_that_stands_still_is_suspected_though_heartbeats_come() {
    let world = World::proxied_world();
    let (proxy, mut a, mut b) = pair(&world, "4000");
    let last = a.append(10);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    proxy.wedge_for_good();
    a.append(10);
    let reason = a.daemon.wait_event("suspect")["reason"].clone();
    assert!(reason.as_str().unwrap().contains("stands still"), "{reason}");
    a.wait_role(Role::Live);
    assert_eq!(a.region().generation(), Generation(2));
}

#[test]
fn a_pair_leaves_the_question_who_lives_to_its_heartbeats() {
    let world = World::new();
    let (mut a, mut b) = world.pair();
    let last = a.append(3);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    // proc(5), tcp: addresses in the order of their bytes here, and the kind of timer is 02 while keepalive probes are due.
    let address: std::net::SocketAddrV4 = world.address(HostId::B).parse().unwrap();
    let end = format!(
        "{:08X}:{:04X}",
        u32::from_ne_bytes(address.ip().octets()),
        address.port()
    );
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let connections: Vec<_> = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields[3] == "01" && fields[1..3].contains(&end.as_str()))
        .collect();
    assert_eq!(connections.len(), 2, "both ends of the channel at {end}, in:\n{table}");
    assert!(
        connections.iter().all(|fields| !fields[5].starts_with("02:")),
        "{connections:?}"
    );
}
