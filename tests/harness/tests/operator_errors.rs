//! Operators' mistakes: each ends the daemon at once, with the exit status of the contract and one line that names the
//! problem, and damages nothing.

mod lab;

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ft_harness::events::Events;
use ft_harness::netns::Namespace;
use ft_harness::pair::{Pair, PairSetup};
use ft_harness::process::{EXITED, Exit, HostProcesses, ProcessSpec};
use ft_harness::roles::{BLK, FT_LOG, NET, SHIM};
use ft_harness::topology::HostId;
use ft_protocol::Timing;
use ft_protocol::ids::{Generation, Lsn};
use ft_protocol::message::{Hello, Message, Standing, Strength};
use ft_protocol::versions::Versions;
use lab::{Build, variable};
use tempfile::TempDir;

/// Every daemon that is given a reason to end ends well within it.
const PATIENCE: Duration = Duration::from_secs(30);
const USAGE: Exit = Exit::Code(2);
const ENVIRONMENT: Exit = Exit::Code(3);

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// A directory, a network namespace and the daemons started in it.
struct Bench {
    directory: TempDir,
    namespace: Namespace,
    // Dropped before the events they report to.
    processes: Vec<HostProcesses>,
    events: Events,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(directory.path().join("events")).expect("created");
        let events = Events::watch(&directory.path().join("events")).expect("inotify");
        Self {
            directory,
            namespace: Namespace::new("bench").expect("a namespace"),
            processes: Vec::new(),
            events,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("the path is UTF-8").to_owned()
    }

    /// A file of so many bytes.
    fn file(&self, name: &str, bytes: u64) -> String {
        fs::File::create(self.path(name))
            .and_then(|file| file.set_len(bytes))
            .expect("created");
        self.text(name)
    }

    fn start(&mut self, binary: PathBuf, name: &'static str, arguments: &[String]) -> usize {
        let index = self.processes.len();
        let logs = self.path(&format!("log{index}"));
        fs::create_dir_all(&logs).expect("created");
        let mut processes = HostProcesses::new(HostId::A, &logs, self.events.sink());
        let arguments = arguments.iter().map(OsString::from).collect();
        processes
            .start(
                &self.namespace,
                &ProcessSpec {
                    name,
                    binary,
                    arguments,
                    environment: Vec::new(),
                },
            )
            .expect("it starts");
        self.processes.push(processes);
        index
    }

    /// Runs a daemon that must end by itself; how it ended, and what it said.
    fn ended(&mut self, binary: PathBuf, name: &'static str, arguments: &[String]) -> (Exit, String) {
        let exits = |events: &[ft_harness::events::Event]| {
            events
                .iter()
                .filter(|event| event.is(HostId::A, name, EXITED))
                .filter_map(Exit::from_event)
                .collect()
        };
        let before: Vec<Exit> = exits(&self.events.all());
        let index = self.start(binary, name, arguments);
        let log = HostProcesses::log_file(&self.path(&format!("log{index}")), HostId::A, name);
        let said = || fs::read_to_string(&log).expect("it has a log");
        let exit = self
            .events
            .wait(soon(), |events| exits(events).get(before.len()).copied(), |_| None)
            .unwrap_or_else(|_| panic!("{name} {arguments:?} did not end; it said:\n{}", said()));
        (exit, said())
    }

    fn refused(&mut self, name: &'static str, arguments: &[String]) -> (Exit, String) {
        self.ended(Build::Release.directory().join(name), name, arguments)
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The last line names the problem, and it is the only error line: no backtrace, no cascade.
fn one_line(said: &str, needles: &[&str]) {
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines.last().unwrap_or_else(|| panic!("it said nothing"));
    for needle in needles {
        assert!(
            last.to_lowercase().contains(&needle.to_lowercase()),
            "no {needle:?} in the last line of:\n{said}"
        );
    }
    assert!(
        !said.contains("panicked"),
        "a mistake of the operator is no bug:\n{said}"
    );
    let errors = lines.iter().filter(|line| line.contains(needles[0])).count();
    assert_eq!(errors, 1, "one line names the problem:\n{said}");
}

fn blk(bench: &Bench, image: &str) -> Vec<String> {
    words(&["--socket-path", &bench.text("blk.sock"), "--blk-file", image])
}

fn ft_log(bench: &Bench, socket: &str) -> Vec<String> {
    fs::create_dir_all(bench.path("arbiter")).expect("created");
    fs::create_dir_all(bench.path("journal")).expect("created");
    words(&[
        "--vm",
        "v",
        "--role",
        "backup",
        "--socket-path",
        socket,
        "--arbiter",
        &bench.text("arbiter"),
        "--journal",
        &bench.text("journal"),
        "--listen",
        "127.0.0.1:7700",
        "--peer",
        "127.0.0.1:7701",
    ])
}

#[test]
fn unknown_flags_are_usage_errors() {
    let mut bench = Bench::new();
    for name in [FT_LOG, BLK, NET, SHIM] {
        let (exit, said) = bench.refused(name, &words(&["--no-such-flag"]));
        assert_eq!(exit, USAGE, "{name}: {said}");
        assert!(
            said.contains("--no-such-flag"),
            "{name} does not name the flag:\n{said}"
        );
    }
}

#[test]
fn missing_arguments_are_usage_errors() {
    let mut bench = Bench::new();
    for (name, arguments, needle) in [
        (FT_LOG, words(&["--vm", "v"]), "--role"),
        (BLK, words(&["--socket-path", "s"]), "--blk-file"),
        (NET, words(&["--socket-path", "s"]), "--tap"),
        (SHIM, words(&["run", "--vm", "v"]), "--kernel"),
    ] {
        let (exit, said) = bench.refused(name, &arguments);
        assert_eq!(exit, USAGE, "{name}: {said}");
        assert!(said.contains(needle), "{name} does not ask for {needle}:\n{said}");
    }
}

#[test]
fn socket_in_use_is_named_and_left_alone() {
    let mut bench = Bench::new();
    let image = bench.file("disk.img", 16 << 20);
    let socket = bench.path("blk.sock");
    let listener = UnixListener::bind(&socket).expect("bound");
    let (exit, said) = {
        let arguments = blk(&bench, &image);
        bench.refused(BLK, &arguments)
    };
    assert_eq!(exit, ENVIRONMENT, "{said}");
    one_line(&said, &["blk.sock"]);
    // Whoever held it still does.
    listener.set_nonblocking(true).expect("non-blocking");
    while listener.accept().is_ok() {}
    std::os::unix::net::UnixStream::connect(&socket).expect("the socket is still the first one's");
    listener.accept().expect("and it still accepts");

    let socket = bench.path("log.sock");
    let _listener = UnixListener::bind(&socket).expect("bound");
    let arguments = ft_log(&bench, &bench.text("log.sock"));
    let (exit, said) = bench.refused(FT_LOG, &arguments);
    assert_eq!(exit, ENVIRONMENT, "{said}");
    one_line(&said, &["log.sock"]);
}

#[test]
fn image_that_is_missing_or_too_small_is_named() {
    let mut bench = Bench::new();
    let missing = bench.text("missing.img");
    let empty = bench.file("empty.img", 0);
    let odd = bench.file("odd.img", 100);
    for image in [&missing, &empty, &odd] {
        let arguments = blk(&bench, image);
        let (exit, said) = bench.refused(BLK, &arguments);
        assert_eq!(exit, ENVIRONMENT, "{image}: {said}");
        one_line(&said, &[image]);
    }
    assert!(!Path::new(&missing).exists(), "nothing is created");
    assert_eq!(
        fs::metadata(&odd).expect("it is there").len(),
        100,
        "nothing is changed"
    );
}

#[test]
fn image_in_use_is_refused_to_a_second_daemon() {
    let mut bench = Bench::new();
    let image = bench.file("disk.img", 16 << 20);
    let first = words(&[
        "--socket-path",
        &bench.text("events/A.first.sock"),
        "--blk-file",
        &image,
    ]);
    bench.start(Build::Release.directory().join(BLK), "first", &first);
    bench
        .events
        .wait(
            soon(),
            |events| {
                events
                    .iter()
                    .any(|event| event.is(HostId::A, "first", "socket"))
                    .then_some(())
            },
            |events| {
                events
                    .iter()
                    .any(|event| event.name == EXITED)
                    .then(|| "it ended".to_owned())
            },
        )
        .expect("the first daemon serves the image");
    let arguments = blk(&bench, &image);
    let (exit, said) = bench.refused(BLK, &arguments);
    assert_eq!(exit, ENVIRONMENT, "{said}");
    one_line(&said, &[&image, "lock"]);
}

#[test]
fn tap_that_cannot_be_had_is_named() {
    let mut bench = Bench::new();
    let arguments = words(&[
        "--socket-path",
        &bench.text("net.sock"),
        "--tap",
        "a-name-that-is-too-long",
    ]);
    let (exit, said) = bench.refused(NET, &arguments);
    assert!(exit == ENVIRONMENT || exit == USAGE, "{exit}: {said}");
    assert!(said.contains("a-name-that-is-too-long"), "{said}");
}

#[test]
fn arbiter_that_is_not_there_is_named() {
    let mut bench = Bench::new();
    let mut arguments = ft_log(&bench, &bench.text("log.sock"));
    let arbiter = bench.text("nowhere");
    let at = arguments
        .iter()
        .position(|word| word == "--arbiter")
        .expect("it is there");
    arguments[at + 1].clone_from(&arbiter);
    let (exit, said) = bench.refused(FT_LOG, &arguments);
    assert_eq!(exit, ENVIRONMENT, "{said}");
    one_line(&said, &[&arbiter, "--arbiter"]);
}

#[test]
fn journal_that_cannot_be_written_is_named() {
    let mut bench = Bench::new();
    let mut arguments = ft_log(&bench, &bench.text("log.sock"));
    let journal = bench.file("a-file-and-no-directory", 1);
    let at = arguments
        .iter()
        .position(|word| word == "--journal")
        .expect("it is there");
    arguments[at + 1].clone_from(&journal);
    let (exit, said) = bench.refused(FT_LOG, &arguments);
    assert_eq!(exit, ENVIRONMENT, "{said}");
    one_line(&said, &[&journal]);
}

#[test]
fn address_of_another_host_is_named() {
    let mut bench = Bench::new();
    let mut arguments = ft_log(&bench, &bench.text("log.sock"));
    let listen = arguments
        .iter()
        .position(|word| word == "127.0.0.1:7700")
        .expect("it is there");
    arguments[listen] = "192.0.2.1:7700".to_owned();
    // Not on loopback: without a certificate it would be refused before its socket is.
    arguments.push("--plaintext".to_owned());
    let (exit, said) = bench.refused(FT_LOG, &arguments);
    assert_eq!(exit, ENVIRONMENT, "{said}");
    one_line(&said, &["192.0.2.1:7700"]);
}

#[test]
fn missing_ft_log_is_named() {
    let mut bench = Bench::new();
    let image = bench.file("disk.img", 16 << 20);
    let mut arguments = blk(&bench, &image);
    arguments.extend(words(&[
        "--ft-log",
        &bench.text("no-log.sock"),
        "--vm",
        "v",
        "--device",
        "blk0",
    ]));
    let (exit, said) = bench.refused(BLK, &arguments);
    assert_eq!(exit, ENVIRONMENT, "{said}");
    one_line(&said, &["no-log.sock"]);
}

/// The shim's arguments for a pair's files.
fn shim(bench: &Bench, kernel: &str) -> Vec<String> {
    words(&[
        "run",
        "--vm",
        "v",
        "--ft-log",
        &bench.text("log.sock"),
        "--kernel",
        kernel,
        "--cmdline",
        "port=7000",
        "--blk",
        &bench.text("blk.sock"),
        "--net",
        &bench.text("net.sock"),
    ])
}

#[test]
fn kernel_that_is_none_is_named() {
    let mut bench = Bench::new();
    let kernel = bench.file("not-a-kernel", 4096);
    for kernel in [kernel, bench.text("missing-kernel")] {
        let arguments = shim(&bench, &kernel);
        let (exit, said) = bench.refused(SHIM, &arguments);
        assert_eq!(exit, ENVIRONMENT, "{said}");
        one_line(&said, &["--kernel"]);
    }
}

#[test]
fn missing_kvm_is_named() {
    let mut bench = Bench::new();
    let kernel = variable("FT_GUEST").to_str().expect("the path is UTF-8").to_owned();
    // A mount namespace with an empty /dev.
    let mut arguments = words(&[
        "--mount",
        "--",
        "sh",
        "-c",
        r#"mount -t tmpfs none /dev && exec "$@""#,
        "sh",
    ]);
    arguments.push(
        Build::Release
            .directory()
            .join(SHIM)
            .to_str()
            .expect("the path is UTF-8")
            .to_owned(),
    );
    arguments.extend(shim(&bench, &kernel));
    let unshare = Command::new("sh")
        .args(["-c", "command -v unshare"])
        .output()
        .expect("a shell")
        .stdout;
    let unshare = PathBuf::from(String::from_utf8(unshare).expect("a path").trim());
    let (exit, said) = bench.ended(unshare, "shim-without-kvm", &arguments);
    assert_eq!(exit, ENVIRONMENT, "{said}");
    one_line(&said, &["/dev/kvm"]);
}

fn pair(directory: &TempDir) -> Pair {
    let setup = PairSetup {
        bin_dir: Build::Release.directory(),
        guest: variable("FT_GUEST").into(),
        ft_log_arguments: Vec::new(),
        shim_arguments: Vec::new(),
        crash: None,
    };
    Pair::new(setup, directory.path()).expect("a network")
}

#[test]
fn peer_that_protects_another_machine_is_refused() {
    let hello = Hello {
        vm: "another".to_owned(),
        ..foreign_hello()
    };
    refused(&hello, "another", "'another'");
}

#[test]
fn peer_of_another_version_is_refused() {
    let newer = Versions::SPOKEN.newest + 1;
    let hello = Hello {
        versions: Versions {
            oldest: newer,
            newest: newer,
        },
        ..foreign_hello()
    };
    let told = format!("protocol version {newer} there, {} here", Versions::SPOKEN);
    refused(&hello, "version", &told);
}

/// What a primary of the demo's machine would say, but for its fingerprint.
fn foreign_hello() -> Hello {
    Hello {
        versions: Versions::SPOKEN,
        vm: "ledger".to_owned(),
        primary: true,
        fingerprint: [0; 32],
        instance: 1,
        ack: Strength::default(),
        last: Lsn::ZERO,
        standing: Standing::Whole,
        timing: Some(Timing {
            heartbeat_interval_ns: 20_000_000,
            heartbeat_misses: 10,
            channel_timeout_ns: 1_000_000_000,
            replay_timeout_ns: 10_000_000_000,
            lag_target_ns: 100_000_000,
            lag_limit_ns: 1_000_000_000,
        }),
    }
}

/// A backup that is greeted so answers with this reason, and ends with that line.
fn refused(hello: &Hello, reason_has: &str, line_has: &str) {
    let directory = tempfile::tempdir().expect("a directory");
    let mut pair = pair(&directory);
    pair.start_hosts(&[HostId::B], soon()).expect("the backup starts");
    let answer = greet(&pair, hello);
    assert!(
        matches!(&answer, Message::Refuse { reason } if reason.contains(reason_has)),
        "{answer:?}"
    );
    assert_eq!(
        pair.wait_for_exit(HostId::B, FT_LOG, soon()).expect("it ends"),
        ENVIRONMENT
    );
    one_line(&pair.log(HostId::B, FT_LOG), &[line_has]);
}

/// Speaks to the backup's logging channel as a primary would, from host A; its answer. A backup whose machine is not
/// assembled yet closes the channel, and the primary comes again: so do we.
fn greet(pair: &Pair, hello: &Hello) -> Message {
    let deadline = soon();
    let mut frame = Vec::new();
    Message::Hello(hello.clone()).encode(Generation(1), &mut frame);
    loop {
        assert!(
            Instant::now() < deadline,
            "the backup never answered; it said:\n{}",
            pair.log(HostId::B, FT_LOG)
        );
        let address = HostId::B.log_address().into();
        let mut stream = pair
            .topology()
            .host(HostId::A)
            .run(|| TcpStream::connect_timeout(&address, PATIENCE))
            .expect("the backup listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.write_all(&frame).expect("sent");
        let mut answer = Vec::new();
        // A reset after the answer is as good an end as a close.
        let _ = stream.read_to_end(&mut answer);
        if !answer.is_empty() {
            return Message::decode(&answer).expect("the answer is one message").1;
        }
    }
}
