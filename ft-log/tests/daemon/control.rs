//! The management plane: what it shows, what it does, whom it refuses, and that the log does not notice.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    process::Command,
    time::Instant,
};

use ft_client::{
    counters::{HOLD_BUCKETS, Lost, OfDevice, OfQueue, QUEUES_MAX},
    shm::SharedMemory,
};
use ft_protocol::{Lsn, Role};
use serde_json::{Value, json};

use crate::world::{DEADLINE, Daemon, Host, HostId, VM, World};

fn start(world: &World, host: HostId) -> Host {
    let control = world.path(&format!("{host:?}.control")).display().to_string();
    let metrics = format!("unix:{}", world.path(&format!("{host:?}.metrics")).display());
    world.host_with(host, &["--control", &control, "--metrics", &metrics])
}

pub(crate) fn pair(world: &World) -> (Host, Host) {
    let (a, b) = (start(world, HostId::A), start(world, HostId::B));
    a.wait_role(Role::Recording);
    b.wait_role(Role::Replaying);
    (a, b)
}

/// One request as `ft-log` itself makes it: its exit status and what it printed.
pub(crate) fn ask(world: &World, host: HostId, words: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_ft-log"))
        .arg(words[0])
        .arg("--control")
        .arg(world.path(&format!("{host:?}.control")))
        .args(&words[1..])
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

pub(crate) fn ask_json(world: &World, host: HostId, words: &[&str]) -> Value {
    let words: Vec<_> = words.iter().chain(&["--json"]).copied().collect();
    let (code, out, error) = ask(world, host, &words);
    assert_eq!(code, 0, "{error}");
    serde_json::from_str(&out).unwrap()
}

/// Asks until the answer is right: figures are shown once a turn of the daemon's loop.
pub(crate) fn wait_status(world: &World, host: HostId, is_right: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let status = ask_json(world, host, &["status"]);
        if is_right(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "{status}");
    }
}

/// What Prometheus would read.
fn metrics(world: &World, host: HostId) -> String {
    let mut stream = UnixStream::connect(world.path(&format!("{host:?}.metrics"))).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn status_and_metrics_show_both_sides() {
    let world = World::new();
    let (mut a, mut b) = pair(&world);
    let last = a.append(300);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    let status = wait_status(&world, HostId::A, |status| status["committed_lsn"] == last.0);
    for (key, value) in [
        ("vm", json!(VM)),
        ("side", json!("primary")),
        ("role", json!("recording")),
        ("generation", json!(1)),
        ("last_lsn", json!(last.0)),
        ("lag_entries", json!(0)),
        ("channel", json!("up")),
        ("peer", json!(world.address(HostId::B))),
    ] {
        assert_eq!(status[key], value, "{key} in {status}");
    }
    assert_eq!(status["journal"]["state"], "open");
    assert_eq!(status["arbiter"]["state"], "ok");
    let status = wait_status(&world, HostId::B, |status| status["replayed_lsn"] == last.0);
    assert_eq!(
        (&status["role"], &status["lag_entries"]),
        (&json!("replaying"), &json!(0))
    );
    let (code, table, _) = ask(&world, HostId::A, &["status"]);
    assert!(
        code == 0
            && table
                .lines()
                .any(|line| line.split_whitespace().eq(["role", "recording"])),
        "{table}"
    );
    let list = ask_json(&world, HostId::A, &["list"]);
    assert_eq!(list, json!([{ "vm": VM, "role": "recording", "generation": 1 }]));

    let text = metrics(&world, HostId::A);
    for line in [
        "HTTP/1.1 200 OK".to_owned(),
        format!("ft_log_role{{vm=\"{VM}\",role=\"recording\"}} 1"),
        format!("ft_log_role{{vm=\"{VM}\",role=\"live\"}} 0"),
        format!("ft_log_committed_lsn{{vm=\"{VM}\"}} {}", last.0),
        format!("ft_log_entries_total{{vm=\"{VM}\"}} {}", last.0),
    ] {
        assert!(text.lines().any(|found| found == line), "'{line}' is not in:\n{text}");
    }
    let mode = fs::metadata(world.path("A.control")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn the_journal_is_rotated_listed_and_read_while_it_is_written() {
    let world = World::new();
    let (mut a, mut b) = pair(&world);
    let first = a.append(30);
    a.wait_committed(first);
    let (code, said, _) = ask(&world, HostId::A, &["rotate"]);
    assert_eq!((code, said.trim()), (0, "a new segment begins with the next entry"));
    a.daemon.wait_log("goes on with a new segment");
    let last = a.append(30);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    wait_status(&world, HostId::A, |status| {
        status["journal"]["segment"] == 1 && status["journal"]["waiting_bytes"] == 0
    });
    let segments = ask_json(&world, HostId::A, &["segments"]);
    assert_eq!(segments.as_array().map(Vec::len), Some(2), "{segments}");
    let found = ask_json(
        &world,
        HostId::A,
        &["entries", "--segment", "1", "--from", "33", "--limit", "4"],
    );
    let lsns: Vec<_> = found["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["lsn"].as_u64())
        .collect();
    assert_eq!(lsns, [33, 34, 35, 36].map(Some));
    let all = ask_json(&world, HostId::A, &["entries", "--segment", "0"]);
    assert_eq!(
        (all["entries"].as_array().map(Vec::len), &all["torn"]),
        (Some(30), &json!(false))
    );
    let (code, _, error) = ask(&world, HostId::A, &["entries", "--segment", "7"]);
    assert!(code == 3 && error.contains("ledger.g1.000007.journal"), "{error}");
    // Two segments are one log.
    let (code, _, _) = ask(&world, HostId::A, &["stop"]);
    assert_eq!((code, a.daemon.wait_code()), (0, 0));
    assert!(!world.path("A.control").exists());
    let verified = Command::new(env!("CARGO_BIN_EXE_ft-log"))
        .args(["verify", "--format", "json"])
        .arg(world.journal(HostId::A))
        .output()
        .unwrap();
    let verified: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert_eq!(
        (&verified["condition"], &verified["entries"]),
        (&json!("whole"), &json!(last.0))
    );
    b.wait_role(Role::Live);
}

fn say(path: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    // A refusal may come before everything is written.
    let _ = stream.write_all(bytes);
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

#[test]
fn hostile_managers_are_refused_with_a_reason_and_the_log_goes_on() {
    let world = World::new();
    let (mut a, mut b) = pair(&world);
    let path = world.path("A.control");
    for (bytes, reason) in [
        (&b"garbage\n"[..], "this is no request"),
        (b"{\"command\":\"explode\"}\n", "explode"),
        (b"{\"command\":\"status\",\"more\":1}\n", "more"),
        (
            b"{\"command\":\"entries\",\"generation\":1,\"segment\":-1}\n",
            "this is no request",
        ),
        (&[b'x'; 100_000], "at most 4096 bytes"),
    ] {
        let said = say(&path, bytes);
        assert!(said.starts_with("{\"error\"") && said.contains(reason), "{said}");
    }
    let crowd: Vec<_> = (0..40).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let answers = crowd.iter().map(|mut stream| {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let _ = stream.write_all(b"{\"command\":\"list\"}\n");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    });
    let (served, refused): (Vec<_>, Vec<_>) = answers.partition(|line| line.contains("recording"));
    assert!(served.len() <= 16, "{} at a time", served.len());
    assert!(
        refused.iter().all(|line| line.contains("too many connections")),
        "{refused:?}"
    );
    let last = a.append(100);
    a.wait_committed(last);
    b.replay_through(Lsn(1), last);
    drop(crowd);
    let deadline = Instant::now() + DEADLINE;
    while !say(&path, b"{\"command\":\"list\"}\n").contains("recording") {
        assert!(Instant::now() < deadline);
    }
    let metrics = say(&world.path("A.metrics"), b"POST /metrics HTTP/1.1\r\n\r\n");
    assert!(metrics.contains("405"), "{metrics}");
    assert_eq!(a.region().role(), Role::Recording);
}

#[test]
fn a_management_plane_that_cannot_listen_is_named() {
    let world = World::new();
    let command = |words: &[&str]| {
        let mut daemon = Daemon::spawn(world.command(HostId::A).args(["--vm", VM]).args(words));
        (daemon.wait_code(), daemon.logged.clone())
    };
    let (code, logged) = command(&["--control", "/nowhere/x.sock"]);
    assert!(
        code == 3 && logged.contains("/nowhere/x.sock") && logged.contains("--control"),
        "{logged}"
    );
    let (code, logged) = command(&["--metrics", "192.0.2.1:9100"]);
    assert!(code == 2 && logged.contains("only a loopback address"), "{logged}");
    std::fs::write(world.path("precious"), "precious").unwrap();
    let (code, logged) = command(&["--control", world.path("precious").to_str().unwrap()]);
    assert!(code == 3 && logged.contains("is not a socket"), "{logged}");
    let (code, _, error) = ask(&world, HostId::A, &["status"]);
    assert!(code == 3 && error.contains("is ft-log running"), "{error}");
}

#[test]
fn a_crowd_for_metrics_keeps_no_operator_out() {
    let world = World::new();
    let _a = start(&world, HostId::A);
    // Every one of them has a place and says nothing; the one behind them all is refused.
    let path = world.path("A.metrics");
    let _crowd: Vec<_> = (0..40).map(|_| UnixStream::connect(&path).unwrap()).collect();
    assert!(say(&path, b"GET /metrics HTTP/1.1\r\n\r\n").contains("too many connections"));
    assert!(say(&world.path("A.control"), b"{\"command\":\"list\"}\n").contains(VM));
}

#[test]
fn a_journal_that_takes_nothing_is_not_rotated_and_a_channel_without_a_hello_is_not_up() {
    let world = World::new();
    let mut a = start(&world, HostId::A);
    let (code, _, error) = ask(&world, HostId::A, &["rotate"]);
    assert!(code == 3 && error.contains("has not begun"), "{error}");
    // Somebody takes the connection and the hello, and says nothing.
    let mute = std::net::TcpListener::bind(world.address(HostId::B)).unwrap();
    let (mut taken, _) = mute.accept().unwrap();
    taken.read_exact(&mut [0; 24]).unwrap();
    let status = ask_json(&world, HostId::A, &["status"]);
    assert_eq!(
        (&status["role"], &status["channel"]),
        (&json!("pairing"), &json!("down"))
    );
    drop((taken, mute));
    let b = start(&world, HostId::B);
    a.wait_role(Role::Recording);
    wait_status(&world, HostId::A, |status| status["channel"] == "up");
    // Live without a backup: the generation is over, and its journal with it.
    b.daemon.signal(nix::sys::signal::Signal::SIGTERM);
    a.wait_role(Role::Live);
    wait_status(&world, HostId::A, |status| status["journal"]["state"] == "ended");
    let (code, _, error) = ask(&world, HostId::A, &["rotate"]);
    assert!(code == 3 && error.contains("has ended"), "{error}");
    a.daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(a.daemon.wait_code(), 0);
}

#[test]
fn what_a_network_device_counts_is_shown_as_its_own() {
    let world = World::new();
    let a = start(&world, HostId::A);
    // Nobody counts yet, and the disk never does.
    assert!(!metrics(&world, HostId::A).contains("ft_log_net"));
    let counters = &a.devices[1].counters;
    counters.begin(2);
    counters.add(1, OfQueue::Frames, 7);
    counters.add(0, OfQueue::Kicks, 2);
    counters.lose(0, Lost::NoBuffers, 3);
    counters.lose(1, Lost::Checksum, 4);
    counters.count(OfDevice::Held, 5);
    counters.set_held_bytes(900);
    counters.set_held_bytes(100);
    counters.released_after(3);
    counters.released_after(2000);
    let text = metrics(&world, HostId::A);
    let of = format!("vm=\"{VM}\",device=\"net0\"");
    for line in [
        format!("ft_log_net_frames_total{{{of},queue=\"transmit0\"}} 7"),
        format!("ft_log_net_frames_total{{{of},queue=\"receive0\"}} 0"),
        format!("ft_log_net_kicks_total{{{of},queue=\"receive0\"}} 2"),
        format!("ft_log_net_lost_total{{{of},queue=\"receive0\",reason=\"no_buffers\"}} 3"),
        format!("ft_log_net_lost_total{{{of},queue=\"transmit0\",reason=\"checksum\"}} 4"),
        format!("ft_log_net_held_total{{{of}}} 5"),
        format!("ft_log_net_held_bytes{{{of}}} 100"),
        format!("ft_log_net_held_bytes_max{{{of}}} 900"),
        format!("ft_log_net_hold_seconds_count{{{of}}} 2"),
        format!("ft_log_net_hold_seconds_sum{{{of}}} 0.002003"),
        format!("ft_log_net_hold_seconds_bucket{{le=\"+Inf\",{of}}} 2"),
    ] {
        assert!(text.lines().any(|found| found == line), "'{line}' is not in:\n{text}");
    }
    let buckets: Vec<u64> = text
        .lines()
        .filter(|line| line.starts_with("ft_log_net_hold_seconds_bucket"))
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(buckets.len(), HOLD_BUCKETS);
    assert_eq!((buckets[1], buckets[2], buckets[10], buckets[11]), (0, 1, 1, 2));
    assert!(!text.contains("device=\"blk0\""), "{text}");
}

#[test]
fn a_hostile_device_tells_wrong_numbers_of_itself_and_no_more() {
    let world = World::new();
    let mut a = start(&world, HostId::A);
    a.devices[1].counters.begin(2);
    let honest = metrics(&world, HostId::A);
    // Every word of the disk's page, the kind excepted: it takes itself for a network device.
    let page = &a.devices[0].counters;
    page.begin(u16::MAX);
    for queue in 0..QUEUES_MAX {
        for (what, ..) in OfQueue::ALL {
            page.add(queue, what, u64::MAX);
        }
        let reasons = Lost::RECEIVED.iter().chain(&Lost::TRANSMITTED);
        reasons.for_each(|(why, _)| page.lose(queue, *why, u64::MAX));
    }
    for (what, ..) in OfDevice::COUNTS {
        page.count(what, u64::MAX);
    }
    page.set_held_bytes(u64::MAX);
    // Raw memory: more than a device could count.
    let raw = SharedMemory::open(page.fd().unwrap().try_clone_to_owned().unwrap(), 9216).unwrap();
    (0..HOLD_BUCKETS).for_each(|bucket| raw.write(512 + 8 * bucket, &u64::MAX.to_ne_bytes()));
    let text = metrics(&world, HostId::A);
    assert!(text.contains(&format!(
        "ft_log_net_frames_total{{vm=\"{VM}\",device=\"blk0\",queue=\"transmit15\"}} {}",
        u64::MAX
    )));
    assert!(text.contains(&format!(
        "ft_log_net_hold_seconds_count{{vm=\"{VM}\",device=\"blk0\"}} {}",
        u64::MAX
    )));
    // What is not of this device is as before.
    let others = |text: &str| {
        let others = text.lines().filter(|line| !line.contains("device=\"blk0\""));
        others
            .skip_while(|line| !line.starts_with("# HELP ft_log_net"))
            .map(String::from)
            .collect::<Vec<_>>()
    };
    assert_eq!(others(&text), others(&honest));
    assert!(text.len() < 128 << 10, "{} bytes", text.len());
    // The log goes on.
    let b = start(&world, HostId::B);
    a.wait_role(Role::Recording);
    let last = a.append(10);
    a.wait_committed(last);
    drop(b);
}
