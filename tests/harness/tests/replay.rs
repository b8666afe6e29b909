//! One journal, executed again and again: the digests of the live primary, of the live backup and of every offline replay
//! must be the same, and a damaged journal must be called damaged.

mod lab;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use ft_harness::faults::{Fault, FaultPlan, Moment};
use ft_harness::scenario;
use ft_harness::topology::GUEST;
use lab::{Build, setup, variable};

/// How often each journal is replayed.
const REPLAYS: usize = 5;

/// A subcommand of the shim on these journals of the bundled guest.
fn command(subcommand: &str, journals: &[&Path]) -> Command {
    let mut command = Command::new(Build::Release.directory().join("ft-vcpu-shim"));
    command
        .arg(subcommand)
        .args(journals)
        .args(["--kernel".as_ref(), variable("FT_GUEST").as_os_str()])
        .args(["--cmdline", &format!("ip={}/24 port={}", GUEST.ip(), GUEST.port())]);
    command
}

fn replay(journal: &Path) -> Output {
    command("replay", &[journal]).output().expect("the shim runs")
}

/// gdb at the stop of entry 100: the guest's symbols and code are where its ELF file says.
fn debugged(journal: &Path, socket: &Path) {
    let mut shim = command("replay", &[journal]);
    shim.args(["--to", "lsn:100", "--gdb", &format!("unix:{}", socket.display())]);
    let mut shim = shim.stderr(Stdio::piped()).spawn().expect("the shim runs");
    let mut errors = BufReader::new(shim.stderr.take().expect("piped"));
    let mut said = String::new();
    while !said.contains("waiting for gdb") {
        let count = errors.read_line(&mut said).expect("readable");
        assert!(count > 0, "the shim ended: {said}");
    }
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch"]).arg(variable("FT_GUEST"));
    let connect = format!("target remote {}", socket.display());
    for line in [
        &connect,
        "info symbol $rip",
        "compare-sections .text",
        "reverse-stepi",
        "monitor position",
    ] {
        gdb.args(["-ex", line]);
    }
    let output = gdb.output().expect("gdb runs: install the package gdb");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let status = shim.wait().expect("the shim ends with gdb");
    for part in [" in section .text", "matched.", "=> 0x"] {
        assert!(text.contains(part), "'{part}' is missing: {text}\n{said}");
    }
    assert!(status.success(), "{said}");
}

/// The JSON line of a replay that went well.
fn replayed(journal: &Path) -> serde_json::Value {
    let output = replay(journal);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", journal.display());
    serde_json::from_slice(&output.stdout).expect("a line of JSON")
}

/// The digests in the last line of a live shim's log, as `exits, registers, outputs`.
fn live_digests(log: &Path) -> [String; 3] {
    let log = fs::read_to_string(log).expect("the shim's log");
    let line = log
        .lines()
        .find(|line| line.contains("the guest ended"))
        .expect("an end");
    let after = |word: &str| {
        let (_, rest) = line.rsplit_once(word).expect(word);
        rest.split_whitespace().next().expect(word).to_owned()
    };
    [after(": exits "), after(" registers "), after(" outputs ")]
}

fn journal_of(directory: &Path, host: &str) -> PathBuf {
    directory.join(host).join("journal")
}

fn copy_with(journal: &Path, to: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    fs::create_dir_all(to).expect("a directory");
    let segments = ft_client::journal::segments(journal).expect("the journal");
    let file = &segments.first().expect("a segment").path;
    let mut bytes = fs::read(file).expect("a segment");
    change(&mut bytes);
    fs::write(to.join(file.file_name().expect("its name")), bytes).expect("a copy");
}

#[test]
fn live_and_offline_executions_have_the_same_digests_and_damage_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let seed = 71;
    let moment = Moment {
        answers: 1,
        offset: Duration::ZERO,
    };
    let plan = FaultPlan::At(Fault::None, moment);
    let outcome = scenario::run(&setup(Build::Release, seed, plan), directory.path()).expect("a run without faults");
    assert!(outcome.report.good(), "seed {seed}: {:?}", outcome.report);

    let logs = directory.path().join("logs");
    let live = live_digests(&logs.join("A.ft-vcpu-shim.log"));
    assert_eq!(
        live_digests(&logs.join("B.ft-vcpu-shim.log")),
        live,
        "primary and backup"
    );
    for host in ["A", "B"] {
        for _ in 0..REPLAYS {
            let report = replayed(&journal_of(directory.path(), host));
            assert_eq!(report["ended"], "power-off");
            let offline = ["exit_digest", "register_digest", "output_digest"]
                .map(|name| report[name].as_str().unwrap_or_default());
            assert_eq!(offline, live, "the journal of host {host}");
        }
    }

    let journal = journal_of(directory.path(), "A");
    let backups = journal_of(directory.path(), "B");
    for journals in [&[journal.as_path(), &backups][..], &[&journal]] {
        let output = command("bisect", journals).output().expect("the shim runs");
        assert_eq!(
            output.status.code(),
            Some(0),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
    debugged(&journal, &directory.path().join("gdb.sock"));

    let flipped = directory.path().join("flipped");
    copy_with(&journal, &flipped, |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
    });
    let output = replay(&flipped);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{errors}");
    for part in ["entry ", "at byte ", "the replay had come to exit "] {
        assert!(errors.contains(part), "'{part}' is missing: {errors}");
    }

    // A torn tail is what a dead host leaves: the replay goes as far as the log does, and says so.
    let torn = directory.path().join("torn");
    copy_with(&journal, &torn, |bytes| bytes.truncate(bytes.len() - 7));
    let output = replay(&torn);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.contains("torn"), "{errors}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a line of JSON");
    assert_eq!(report["ended"], "end of log");
}
