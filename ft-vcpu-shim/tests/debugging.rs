//! What is shown of a recorded execution: positions, traces, memory, the first difference, and the places between stops.
//!
//! The tiny guest stays in ring 0, where the software KVM of the test machines has breakpoints too.

mod tiny;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use ft_protocol::{Body, entry::Entry};
use ft_vcpu_shim::{
    debug::{
        session::{Halt, Session},
        target::Target,
    },
    lockstep::journal::Recording,
};
use serde_json::Value;

/// A recording of the tiny guest in a directory of its own.
struct Recorded {
    directory: tempfile::TempDir,
    frames: Vec<Vec<u8>>,
}

impl Recorded {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let machine = tiny::machine(&directory);
        let (_, frames) = tiny::record(&machine, &directory.path().join("console"));
        tiny::write_journal(&directory.path().join("journal"), &frames);
        Self { directory, frames }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The entries with one changed, as another journal.
    fn planted(&self, index: usize, change: impl FnOnce(&mut Entry<'_>)) -> PathBuf {
        let mut frames = self.frames.clone();
        let mut entry = Entry::decode(&self.frames[index]).unwrap();
        change(&mut entry);
        let mut frame = vec![0; entry.body.frame_bytes()];
        entry.encode(&mut frame);
        frames[index] = frame;
        let path = self.path(&format!("planted-{index}"));
        tiny::write_journal(&path, &frames);
        path
    }

    fn command(&self, subcommand: &str, journals: &[&Path]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ft-vcpu-shim"));
        command
            .arg(subcommand)
            .args(journals)
            .arg("--kernel")
            .arg(tiny::kernel(&self.directory))
            .args(["--ram-mib", "4"]);
        command
    }

    fn replay(&self, flags: &[&str]) -> Output {
        let mut command = self.command("replay", &[&self.path("journal")]);
        command.args(flags).output().unwrap()
    }

    fn session(&self) -> Session {
        let recording = Recording {
            journal: self.path("journal"),
            machine: tiny::machine(&self.directory),
        };
        Session::new(recording, Ok(())).unwrap()
    }
}

/// The last line of what a command printed.
fn report(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().unwrap_or_default();
    serde_json::from_str(line)
        .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_replay_stops_exactly_where_it_is_told_and_its_trace_ends_there() {
    let recorded = Recorded::new();
    let (trace, whole) = (recorded.path("trace"), recorded.path("whole"));
    let (trace, whole) = (trace.to_str().unwrap(), whole.to_str().unwrap());
    let output = recorded.replay(&["--trace", whole, "--trace-json"]);
    assert!(output.status.success(), "{output:?}");
    let stops = lines(whole.as_ref());
    let end = report(&output);
    assert_eq!(end["exits"], stops.len());
    for stop in stops.iter().step_by(97) {
        let exits = stop["exits"].to_string();
        let output = recorded.replay(&["--to", &exits, "--trace", trace, "--trace-json"]);
        assert_eq!(report(&output)["ended"], "position");
        assert_eq!(report(&output)["exits"], stop["exits"]);
        assert_eq!(lines(trace.as_ref()), stops[..stop["exits"].as_u64().unwrap() as usize]);
    }
    for logged in stops.iter().filter(|stop| !stop["lsn"].is_null()).step_by(83) {
        let output = recorded.replay(&["--to", &format!("lsn:{}", logged["lsn"])]);
        assert_eq!(report(&output)["exits"], logged["exits"]);
    }
    for beyond in [&(stops.len() + 1).to_string(), "lsn:100000", "3+1"] {
        let output = recorded.replay(&["--to", beyond]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{errors}");
        assert!(errors.contains("no stop at"), "{errors}");
    }
}

#[test]
fn memory_and_registers_are_those_of_the_position() {
    let recorded = Recorded::new();
    let file = recorded.path("ram");
    let output = recorded.replay(&["--to", "100", "--registers", "--dump-memory", file.to_str().unwrap()]);
    let memory = std::fs::read(&file).unwrap();
    assert_eq!(memory.len(), 4 << 20);
    let code = tiny::tiny_guest().split_off(120);
    assert_eq!(memory[0x10_0000..0x10_0000 + code.len()], code);
    assert_ne!(
        memory[0x20000 + 0x29 * 16..][..16],
        [0; 16],
        "the guest's interrupt table"
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let report = report(&output);
    assert!(text.contains("=> ") && text.contains("cr3"), "{text}");
    assert_eq!(report["registers"]["rbx"], "0xd000f000", "{text}");
    assert_eq!(report["registers"]["rip"], report["rip"]);
}

#[test]
fn bisect_finds_a_difference_planted_at_any_time() {
    let recorded = Recorded::new();
    let journal = recorded.path("journal");
    let bisect = |other: &[&Path]| {
        let mut journals = vec![journal.as_path()];
        journals.extend(other);
        recorded.command("bisect", &journals).output().unwrap()
    };
    assert_eq!(bisect(&[]).status.code(), Some(0));
    let times = recorded
        .frames
        .iter()
        .enumerate()
        .filter(|(_, frame)| matches!(Entry::decode(frame).unwrap().body, Body::Time { .. }));
    for (index, frame) in times.step_by(37) {
        let exits = Entry::decode(frame).unwrap().body.stop().unwrap().position.exits;
        let other = recorded.planted(index, |entry| {
            if let Body::Time { now_ns, .. } = &mut entry.body {
                *now_ns += 1;
            }
        });
        let output = bisect(&[&other]);
        let found = report(&output);
        assert_eq!(output.status.code(), Some(1), "{found}");
        assert_eq!(found["entry"], index + 1);
        assert_eq!(found["stop"]["left"]["exits"], exits, "{found}");
        assert_eq!(found["stop"]["same"], exits - 1);
    }
    let short = recorded.path("short");
    tiny::write_journal(&short, &recorded.frames[..recorded.frames.len() / 2]);
    let output = bisect(&[&short]);
    assert_eq!(
        (output.status.code(), &report(&output)["different"]),
        (Some(0), &Value::Bool(false))
    );
}

#[test]
fn a_journal_that_its_replay_contradicts_is_explained_with_the_recording_sides_registers() {
    let recorded = Recorded::new();
    let index = recorded.frames.len() / 2;
    // What the recording side would have logged, had its guest gone another way between two stops.
    let planted = recorded.planted(index, |entry| match &mut entry.body {
        Body::Time { stop, .. } => stop.digest ^= 1,
        other => panic!("entry {index} is {other:?}"),
    });
    let output = recorded.command("replay", &[&planted]).output().unwrap();
    assert_eq!(output.status.code(), Some(5));

    let stops = recorded.path("stops");
    recorded.replay(&["--trace", stops.to_str().unwrap(), "--trace-json"]);
    let mut command = recorded.command("bisect", &[&planted]);
    let output = command.arg("--stops").arg(&stops).output().unwrap();
    let found = report(&output);
    assert_eq!(output.status.code(), Some(1), "{found}");
    assert_eq!(found["diverged"]["entry"], index + 1);
    assert!(found["diverged"]["instructions"].to_string().contains("=>"));
    assert!(!found["diverged"]["stops"].as_array().unwrap().is_empty());
    let text = String::from_utf8_lossy(&output.stdout);
    for part in [
        "registers of the replay",
        "log and replay agreed at entry",
        "recorded         replayed",
    ] {
        assert!(text.contains(part), "'{part}' is missing: {text}");
    }

    // The recording side had another register at a stop that no entry belongs to: that very stop is found.
    let mut changed = lines(&stops);
    let stop = changed.iter_mut().skip(200).find(|stop| stop["lsn"].is_null()).unwrap();
    stop["registers"]["r8"] = "0x1".into();
    let exits = stop["exits"].as_u64().unwrap();
    let text: String = changed.iter().map(|stop| format!("{stop}\n")).collect();
    std::fs::write(&stops, text).unwrap();
    let mut command = recorded.command("bisect", &[&recorded.path("journal")]);
    let output = command.arg("--stops").arg(&stops).output().unwrap();
    let found = report(&output);
    assert_eq!(output.status.code(), Some(1), "{found}");
    assert_eq!(found["stop"]["same"], exits - 1);
    assert!(found["stop"]["what"].as_str().unwrap().contains("r8"), "{found}");
}

/// Where a session is, as far as it can be told from outside.
fn place(session: &Session) -> (u64, bool, u64, u64) {
    let regs = session.execution().vcpu().state().unwrap().regs;
    (session.position().exits, session.is_at_stop(), regs.rip, regs.rcx)
}

#[test]
fn single_steps_are_undone_one_by_one() {
    let recorded = Recorded::new();
    let mut session = recorded.session();
    session.goto("28".parse::<Target>().unwrap()).unwrap();
    let mut places = vec![place(&session)];
    for _ in 0..25 {
        assert_eq!(session.step().unwrap(), Halt::There);
        places.push(place(&session));
    }
    assert!(places.iter().any(|place| place.1) && places.iter().any(|place| !place.1));
    for expected in places.iter().rev().skip(1) {
        assert_eq!(session.reverse_step().unwrap(), Halt::There);
        assert_eq!(place(&session), *expected);
    }
}

#[test]
fn breakpoints_are_met_in_both_directions_and_the_log_ends_the_run() {
    let recorded = Recorded::new();
    let mut session = recorded.session();
    session.goto("30".parse::<Target>().unwrap()).unwrap();
    // An instruction between two stops, which the guest comes by once in every round.
    while session.is_at_stop() {
        session.step().unwrap();
    }
    let address = place(&session).2;
    session.goto("1".parse::<Target>().unwrap()).unwrap();
    session.add_breakpoint(address).unwrap();
    let mut met = Vec::new();
    while session.resume(|| false).unwrap() == Halt::Breakpoint {
        assert_eq!(place(&session).2, address);
        met.push(place(&session));
        // As gdb does to leave a breakpoint behind.
        session.step().unwrap();
    }
    assert!(met.len() >= 150, "{} of 200 rounds", met.len());
    assert_eq!(session.end(), Some("PowerOff"));
    for expected in met.iter().rev().take(5) {
        assert_eq!(session.reverse_continue().unwrap(), Halt::Breakpoint);
        assert_eq!(place(&session), *expected);
    }
    assert!(session.remove_breakpoint(address) && !session.remove_breakpoint(address));
    assert_eq!(session.reverse_continue().unwrap(), Halt::Begin);
    assert_eq!(place(&session).0, 0);
    for address in 0..4 {
        session.add_breakpoint(address).unwrap();
    }
    assert!(session.add_breakpoint(4).unwrap_err().contains("all are set"));
}

/// The shim, waiting for gdb at a socket; killed with the test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn gdb_reads_registers_and_memory_and_goes_both_ways() {
    let recorded = Recorded::new();
    let socket = recorded.path("gdb.sock");
    let listen = format!("unix:{}", socket.display());
    let mut shim = recorded.command("replay", &[&recorded.path("journal")]);
    let shim = shim
        .args(["--to", "100", "--gdb", &listen])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut shim = Served(shim.spawn().unwrap());
    // The line that says that the socket is there.
    let mut errors = std::io::BufReader::new(shim.0.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("waiting for gdb") {
        let before = said.len();
        std::io::BufRead::read_line(&mut errors, &mut said).unwrap();
        assert!(said.len() > before, "the shim ended: {said}");
    }
    let commands = [
        &format!("target remote {}", socket.display()),
        "printf \"rip=%lx rbx=%lx\\n\", $rip, $rbx",
        "printf \"code=%lx\\n\", *(unsigned long *)0x100000",
        "monitor next-stop 2",
        "monitor goto 5+1",
        "maintenance flush register-cache",
        "monitor goto 42",
        "maintenance flush register-cache",
        "monitor position",
        "reverse-continue",
        "printf \"rip=%lx\\n\", $rip",
        "continue",
        "kill",
    ];
    let mut gdb = Command::new("gdb");
    gdb.args([
        "-nx",
        "-batch",
        "-ex",
        "set confirm off",
        "-ex",
        "set architecture i386:x86-64",
    ]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let output = gdb.output().expect("gdb runs: install the package gdb");
    std::io::Read::read_to_string(&mut errors, &mut said).unwrap();
    // gdb shows what `monitor` answers on its standard error.
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let at_100 = report(&recorded.replay(&["--to", "100"]));
    let code = u64::from_le_bytes(tiny::tiny_guest()[120..128].try_into().unwrap());
    let rip = at_100["rip"].as_str().unwrap().trim_start_matches("0x");
    for part in [
        format!("rip={rip} rbx=d000f000"),
        format!("code={code:x}"),
        "no stop at exit 5+1".into(),
        "\n       42 ".into(),
        "=> 0x".into(),
        "No more reverse-execution history".into(),
        "rip=100000\n".into(),
    ] {
        assert!(text.contains(&part), "'{part}' is missing: {text}\n{said}");
    }
}

#[test]
fn a_trace_names_every_entry_of_the_journal_in_order() {
    let recorded = Recorded::new();
    let output = recorded.replay(&["--trace", "-"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let mut kinds: HashMap<&str, usize> = HashMap::new();
    for word in ["time", "console", "interrupt", "power-off"] {
        kinds.insert(word, text.matches(&format!(" {word}")).count());
    }
    assert!(kinds["time"] >= 400 && kinds["interrupt"] == 200, "{kinds:?}");
    assert_eq!((kinds["console"], kinds["power-off"]), (1, 1), "{kinds:?}");
}
