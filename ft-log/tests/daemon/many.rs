//! One process a host, many VMs: each has its own sockets, journal and thread, and the end of one is the end of one.

use std::{
    fmt::Write as _,
    io::{Read, Write as _},
    os::unix::net::{UnixDatagram, UnixStream},
    path::PathBuf,
    process::Command,
    time::Instant,
};

use ft_client::{
    handshake::{JoinError, join_device, report_failure},
    journal::JournalReader,
};
use ft_protocol::{Lsn, Role};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::world::{DEADLINE, Daemon, FINGERPRINT, HostId, Locals, World};

const BOTH: [HostId; 2] = [HostId::A, HostId::B];

/// Two hosts with one daemon each, for the same VMs.
struct Many {
    world: World,
    names: Vec<String>,
}

impl Many {
    fn new(count: usize) -> Self {
        let world = World::new();
        let names = (0..count).map(|number| format!("vm{number}")).collect();
        Self { world, names }
    }

    fn path(&self, host: HostId, what: &str) -> PathBuf {
        self.world.path(&format!("{host:?}.{what}"))
    }

    fn address(&self, host: HostId, number: usize) -> String {
        let (ip, port) = self.world.address(host).rsplit_once(':').unwrap();
        format!("{ip}:{}", port.parse::<usize>().unwrap() + number)
    }

    fn socket(&self, host: HostId, number: usize) -> PathBuf {
        self.path(host, &format!("{number}.sock"))
    }

    /// The configuration of a host; `more` is appended to the table of the VM of that number.
    fn file(&self, host: HostId, more: &[(usize, &str)]) -> PathBuf {
        let other = if host == HostId::A { HostId::B } else { HostId::A };
        let role = if host == HostId::A { "primary" } else { "backup" };
        let arbiter = self.world.path("arbiter");
        let mut text = format!(
            "role = '{role}'\narbiter = '{}'\njournal = '{}'\nevents = '/dev/stdout'\nheartbeat-misses = 10000\nchannel-timeout-ms = 200000\nleave-timeout-ms = 60000\nreplay-timeout-ms = 3600000\n",
            arbiter.display(),
            self.world.journal(host).display(),
        );
        for what in ["control", "metrics"] {
            let prefix = if what == "metrics" { "unix:" } else { "" };
            writeln!(text, "{what} = '{prefix}{}'", self.path(host, what).display()).unwrap();
        }
        for (number, name) in self.names.iter().enumerate() {
            let (listen, peer) = (self.address(host, number), self.address(other, number));
            let socket = self.socket(host, number);
            let (socket, table) = (socket.display(), format!("[vm.{name}]"));
            writeln!(
                text,
                "{table}\nsocket-path = '{socket}'\nlisten = '{listen}'\npeer = '{peer}'"
            )
            .unwrap();
            for (_, line) in more.iter().filter(|(of, _)| *of == number) {
                writeln!(text, "{line}").unwrap();
            }
        }
        let path = self.path(host, "toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    fn command(&self, host: HostId) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ft-log"));
        command.arg("--config").arg(self.file(host, &[]));
        command
    }

    /// Starts a host's daemon and waits until every VM can be joined.
    fn start(&self, host: HostId) -> Daemon {
        let mut daemon = Daemon::spawn(&mut self.command(host));
        // They come up in any order.
        for _ in &self.names {
            daemon.wait_log("waiting for blk0");
        }
        daemon
    }

    fn join(&self, host: HostId, number: usize) -> Locals {
        Locals::join(&self.socket(host, number), &self.names[number], &FINGERPRINT)
    }

    /// Everything up, joined and paired.
    fn pairs(&self) -> ([Daemon; 2], Vec<[Locals; 2]>) {
        let daemons = BOTH.map(|host| self.start(host));
        let numbers = 0..self.names.len();
        let locals: Vec<_> = numbers.map(|number| BOTH.map(|host| self.join(host, number))).collect();
        for [a, b] in &locals {
            a.wait_role(Role::Recording);
            b.wait_role(Role::Replaying);
        }
        (daemons, locals)
    }

    fn ask(&self, host: HostId, words: &[&str]) -> (i32, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_ft-log"))
            .arg(words[0])
            .arg("--control")
            .arg(self.path(host, "control"))
            .args(&words[1..])
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(said).unwrap())
    }

    fn status(&self, host: HostId, number: usize) -> Value {
        let (code, said) = self.ask(host, &["status", "--json", "--vm", &self.names[number]]);
        assert_eq!(code, 0, "{said}");
        serde_json::from_str(&said).unwrap()
    }

    fn wait_state(&self, host: HostId, number: usize, state: &str) -> Value {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let status = self.status(host, number);
            if status["state"] == state {
                return status;
            }
            assert!(Instant::now() < deadline, "{status}");
        }
    }

    fn metrics(&self, host: HostId) -> String {
        let mut stream = UnixStream::connect(self.path(host, "metrics")).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }
}

/// A pair that works: what the primary writes is committed and replayed.
fn work([a, b]: &mut [Locals; 2], from: Lsn) -> Lsn {
    let last = a.append(50);
    a.wait_committed(last);
    b.replay_through(from, last);
    last.next()
}

/// The command of a host where so many files are allowed, by a limit of that kind.
fn limited(many: &Many, host: HostId, limit: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit {limit} && exec \"$@\""), "sh"])
        .arg(env!("CARGO_BIN_EXE_ft-log"))
        .arg("--config")
        .arg(many.file(host, &[]));
    command
}

#[test]
fn more_files_are_allowed_where_the_host_lets_them_be_and_too_few_are_told_of() {
    let many = Many::new(8);
    let mut daemon = Daemon::spawn(&mut limited(&many, HostId::A, "-Sn 64"));
    for _ in &many.names {
        daemon.wait_log("waiting for blk0");
    }
    let locals: Vec<_> = (0..8).map(|number| many.join(HostId::A, number)).collect();
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    assert!((64..8 * 96).contains(&open), "{open}");
    drop((daemon, locals));
    let mut daemon = Daemon::spawn(&mut limited(&many, HostId::A, "-n 400"));
    assert_eq!(daemon.wait_code(), 3);
    let told = "8 VMs need up to 832 open files, and this process may have 400: raise its limit";
    assert!(daemon.logged.contains(told), "{}", daemon.logged);
}

#[test]
fn eight_vms_work_side_by_side_and_end_together() {
    let many = Many::new(8);
    let ([mut a, mut b], mut locals) = many.pairs();
    for pair in &mut locals {
        work(pair, Lsn(1));
    }
    let (code, said) = many.ask(HostId::A, &["list", "--json"]);
    let list: Value = serde_json::from_str(&said).unwrap();
    let expected: Vec<_> = many
        .names
        .iter()
        .map(|name| json!({ "vm": name, "role": "recording", "generation": 1 }))
        .collect();
    assert_eq!((code, list), (0, Value::from(expected)));
    let metrics = many.metrics(HostId::B);
    for name in &many.names {
        let line = format!("ft_log_role{{vm=\"{name}\",role=\"replaying\"}} 1");
        assert!(metrics.contains(&line), "'{line}' is not in:\n{metrics}");
    }
    let (code, said) = many.ask(HostId::A, &["status"]);
    assert!(code == 0 && said.contains("vm7") && said.contains("\n\n"), "{said}");
    for (words, part) in [
        (&["rotate"][..], "say which VM (--vm); there are: vm0, vm1"),
        (&["rotate", "--vm", "vm9"], "there is no VM 'vm9' here"),
    ] {
        let (code, said) = many.ask(HostId::A, words);
        assert!(code == 3 && said.contains(part), "{said}");
    }
    // One signal ends all of them: their backups go live, and end as well when they are told to.
    a.signal(Signal::SIGTERM);
    assert_eq!(a.wait_code(), 0, "{}", a.logged);
    for [_, backup] in &locals {
        backup.wait_role(Role::Live);
    }
    b.signal(Signal::SIGTERM);
    assert_eq!(b.wait_code(), 0, "{}", b.logged);
    for name in ft_client::journal::journals(&many.world.journal(HostId::A)).unwrap() {
        let mut reader = JournalReader::open_named(&many.world.journal(HostId::A), name).unwrap();
        while reader.next_entry().unwrap().is_some() {}
        assert_eq!((reader.last_good().lsn, reader.torn_tail()), (Lsn(50), None));
    }
}

#[test]
fn a_vm_that_fails_takes_no_other_one_with_it() {
    let many = Many::new(2);
    let ([mut a, mut b], mut locals) = many.pairs();
    let next = work(&mut locals[0], Lsn(1));
    work(&mut locals[1], Lsn(1));
    // The second VM's replica diverges on the backup's host.
    report_failure(&mut locals[1][1].shim.stream, "diverged at exit 7");
    let line = b.wait_log("VM 'vm1' is over");
    assert!(
        line.contains("status 5") && line.contains("diverged at exit 7"),
        "{line}"
    );
    let status = many.wait_state(HostId::B, 1, "ended");
    assert_eq!(status["ended"]["status"], 5, "{status}");
    // Its local processes are told; nobody can join it any more.
    locals[1][1].wait_role(Role::Halted);
    let refused = join_device(&many.socket(HostId::B, 1), "vm1", "blk0", &FINGERPRINT);
    assert!(
        matches!(refused, Err(JoinError::Connect { .. } | JoinError::Io(_))),
        "{refused:?}"
    );
    // Its primary goes on alone, the other VM as a pair.
    locals[1][0].wait_role(Role::Live);
    work(&mut locals[0], next);
    assert_eq!(many.status(HostId::B, 0)["state"], "running");
    let metrics = many.metrics(HostId::B);
    for line in [
        "ft_log_ended{vm=\"vm0\"} 0",
        "ft_log_ended{vm=\"vm1\"} 1",
        "ft_log_exit_status{vm=\"vm1\"} 5",
    ] {
        assert!(metrics.contains(line), "'{line}' is not in:\n{metrics}");
    }
    let (code, said) = many.ask(HostId::B, &["stop", "--vm", "vm1"]);
    assert!(code == 3 && said.contains("over already"), "{said}");
    // The last VM's end is the process' end, with the greatest status of all.
    let (code, _) = many.ask(HostId::B, &["stop", "--vm", "vm0"]);
    assert_eq!((code, b.wait_code()), (0, 5), "{}", b.logged);
    locals[0][0].wait_role(Role::Live);
    a.signal(Signal::SIGTERM);
    assert_eq!(a.wait_code(), 0, "{}", a.logged);
}

#[test]
fn a_hostile_client_of_one_vm_leaves_the_others_unharmed() {
    let many = Many::new(2);
    let ([mut a, _b], mut locals) = many.pairs();
    let next = work(&mut locals[0], Lsn(1));
    // It may be cut off before everything is written.
    let _ = locals[1][0].shim.stream.write_all(&[b'x'; 100_000]);
    let line = a.wait_log("VM 'vm1' is over");
    assert!(line.contains("status 6") && line.contains("no report"), "{line}");
    work(&mut locals[0], next);
    assert_eq!(locals[0][0].region().role(), Role::Recording);
    // What belonged to the VM is free again: its address, its socket, its journal.
    let status = many.wait_state(HostId::A, 1, "ended");
    assert_eq!(status["ended"]["status"], 6);
    let address = many.address(HostId::A, 1);
    std::net::UdpSocket::bind(&address).unwrap_or_else(|error| panic!("{address}: {error}"));
    assert!(!many.socket(HostId::A, 1).exists());
    ft_client::journal::JournalLock::take(&many.world.journal(HostId::A), "vm1").unwrap();
    a.signal(Signal::SIGTERM);
    assert_eq!(a.wait_code(), 6, "{}", a.logged);
}

#[test]
fn a_vm_that_cannot_start_is_told_of_and_the_others_start_and_are_ready() {
    let many = Many::new(2);
    let notify = UnixDatagram::bind(many.world.path("notify")).unwrap();
    notify.set_read_timeout(Some(DEADLINE)).unwrap();
    // A journal of an earlier run stops the second one.
    let directory = many.world.journal(HostId::A);
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("vm1.g1.000000.journal"), "old").unwrap();
    let mut command = many.command(HostId::A);
    let mut a = Daemon::spawn(command.env("NOTIFY_SOCKET", many.world.path("notify")));
    let mut told = [0; 1024];
    let length = notify.recv(&mut told).unwrap();
    let told = String::from_utf8_lossy(&told[..length]).into_owned();
    assert!(
        told.contains("READY=1") && told.contains("1 of 2 VMs; over: vm1"),
        "{told}"
    );
    let status = many.wait_state(HostId::A, 1, "ended");
    let reason = status["ended"]["reason"].as_str().unwrap();
    assert!(reason.contains("--journal-earlier archive"), "{reason}");
    let mut b = many.start(HostId::B);
    let mut pair = BOTH.map(|host| many.join(host, 0));
    pair[0].wait_role(Role::Recording);
    pair[1].wait_role(Role::Replaying);
    work(&mut pair, Lsn(1));
    a.signal(Signal::SIGTERM);
    assert_eq!(a.wait_code(), 3, "{}", a.logged);
    b.signal(Signal::SIGTERM);
    assert_eq!(b.wait_code(), 0, "{}", b.logged);
}

#[test]
fn a_wrong_configuration_names_the_table_and_the_key() {
    let many = Many::new(2);
    let check = |more: &[(usize, &str)], words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_ft-log"))
            .arg("--check-config")
            .arg("--config")
            .arg(many.file(HostId::A, more))
            .args(words)
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(said).unwrap())
    };
    let (code, shown) = check(&[(1, "ack = 'durable'")], &[]);
    assert_eq!(code, 0, "{shown}");
    let shown: toml::Table = shown.parse().unwrap();
    assert_eq!(shown["vm"]["vm1"]["ack"].as_str(), Some("durable"));
    assert_eq!(shown["vm"]["vm0"]["heartbeat-misses"].as_integer(), Some(10_000));
    let taken = format!("socket-path = '{}'", many.socket(HostId::A, 0).display());
    for (number, line, parts) in [
        (
            1,
            "heartbeat-interval-ms = 0",
            ["[vm.vm1] heartbeat-interval-ms = 0", "1..=60000"],
        ),
        (
            0,
            "heart-beat = 1",
            ["[vm.vm0] there is no key 'heart-beat'", "heartbeat-interval-ms"],
        ),
        (1, "control = '/c'", ["[vm.vm1] control", "above the tables"]),
        (1, "vm = 'x'", ["[vm.vm1] vm", "the table's name"]),
        (
            1,
            "lag-target-ms = 5000",
            ["[vm.vm1] --lag-target-ms", "--lag-limit-ms"],
        ),
        (1, "tls-cert = 'c.pem'", ["[vm.vm1] ", "--tls-key"]),
        (1, "[vm.'a/b']\nrole = 'backup'", ["[vm.a/b]", "A-Z a-z 0-9"]),
        (1, "[vm.vm2]", ["[vm.vm2] ", "--socket-path"]),
        (
            1,
            &format!("[vm.vm2]\nalone = true\n{taken}"),
            ["[vm.vm2] socket-path", "[vm.vm0] has it too"],
        ),
    ] {
        let (code, said) = check(&[(number, line)], &[]);
        for part in parts.iter().chain(&["A.toml"]) {
            assert!(code == 2 && said.contains(part), "{line}: '{part}' is not in: {said}");
        }
    }
    let (code, said) = check(&[], &["--vm", "vm0"]);
    assert!(code == 2 && said.contains("leave --vm out"), "{said}");
}
