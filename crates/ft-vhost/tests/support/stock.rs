//! Stock QEMU with a Debian kernel of scripts/guest-image that runs one job, and its monitor.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

use serde_json::{Value, json};

use super::{daemon::text, frontend::PATIENCE};

/// The guest of a kernel, in `FT_STOCK_GUESTS`.
pub fn guest(kernel: &str) -> PathBuf {
    let guests = std::env::var_os("FT_STOCK_GUESTS").expect("FT_STOCK_GUESTS: run scripts/test");
    Path::new(&guests).join(format!("guest-{kernel}"))
}

/// How often QEMU tries to reach a backend that went away: an option that changed its name and unit in 9.2.
pub fn reconnect() -> &'static str {
    let version = Command::new("qemu-system-x86_64").arg("--version").output().unwrap();
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let number = version.split_whitespace().nth(3).expect("QEMU emulator version X");
    let mut parts = number.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    match (parts.next(), parts.next()) {
        (Some(9), Some(2..)) | (Some(10..), _) => "reconnect-ms=100",
        _ => "reconnect=1",
    }
}

/// QEMU with guest memory that a backend can share, and that job on the kernel's command line.
pub fn qemu(kernel: &str, job: &str, argument: &str) -> Command {
    let guest = guest(kernel);
    let accelerator = std::env::var("FT_ACCEL").unwrap_or_else(|_| "tcg".into());
    let append = format!("console=ttyS0 panic=-1 quiet ft.job={job} ft.argument={argument}");
    let mut command = Command::new("qemu-system-x86_64");
    for (option, value) in [
        ("-machine", "q35,memory-backend=memory"),
        ("-accel", &accelerator),
        // TCG of Debian 12 (7.2.22) now and then leaves nonsense in EFLAGS after CMPXCHG16B, and the guest dies of it.
        ("-cpu", "max,-cx16"),
        ("-m", "768"),
        ("-serial", "stdio"),
        ("-object", "memory-backend-memfd,id=memory,size=768M,share=on"),
        ("-kernel", text(&guest.join("vmlinuz"))),
        ("-initrd", text(&guest.join("initrd"))),
        ("-append", &append),
    ] {
        command.args([option, value]);
    }
    command.args(["-nodefaults", "-nographic"]);
    command
}

/// A machine that runs one job.
pub struct Machine {
    qemu: Child,
    console: BufReader<ChildStdout>,
}

impl Machine {
    /// Starts it.
    pub fn start(command: &mut Command) -> Self {
        let mut qemu = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let console = BufReader::new(qemu.stdout.take().unwrap());
        Self { qemu, console }
    }

    /// Reads the console up to a line with `text`, and gives all that was read.
    pub fn wait_line(&mut self, text: &str) -> String {
        let mut seen = String::new();
        let mut line = Vec::new();
        while self.console.read_until(b'\n', &mut line).unwrap() != 0 {
            let said = String::from_utf8_lossy(&line).into_owned();
            eprint!("console: {said}");
            seen.push_str(&said);
            if said.contains(text) {
                return seen;
            }
            assert!(!said.contains("ft: done"), "the job ended before '{text}'");
            line.clear();
        }
        panic!("the machine ended before '{text}': {:?}", self.qemu.wait());
    }

    /// Kills it, at once and for good; gives what it had said by then and nobody had read.
    pub fn kill(mut self) -> String {
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
        let mut rest = Vec::new();
        self.console.read_to_end(&mut rest).unwrap();
        String::from_utf8_lossy(&rest).into_owned()
    }

    pub fn ends_well(mut self) -> String {
        let seen = self.wait_line("ft: done");
        assert!(seen.contains("ft: done 0"), "the job failed");
        assert!(self.qemu.wait().unwrap().success());
        seen
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// A monitor connection after its greeting.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// Events that came while something else was waited for.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects to the monitor of a QEMU that has just been started.
    pub fn connect(path: &Path) -> Self {
        let deadline = std::time::Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(std::time::Instant::now() < deadline, "no monitor: {error}"),
            }
            std::thread::yield_now();
        };
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        assert!(qmp.read()["QMP"].is_object());
        qmp.execute("qmp_capabilities", &json!({}));
        qmp
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(self.stream.read_line(&mut line).unwrap(), 0, "the monitor is gone");
        eprint!("monitor: {line}");
        serde_json::from_str(&line).unwrap()
    }

    /// Executes a command that succeeds.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let message = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{message}").unwrap();
        loop {
            let answer = self.read();
            if answer["event"].is_string() {
                self.events.push(answer);
                continue;
            }
            assert!(answer["error"].is_null(), "{command}: {answer}");
            return answer["return"].clone();
        }
    }

    /// Waits for an event for which `is_it`.
    pub fn wait_event(&mut self, name: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        loop {
            let found = self
                .events
                .iter()
                .position(|event| event["event"] == name && is_it(&event["data"]));
            if let Some(place) = found {
                return self.events.remove(place)["data"].clone();
            }
            let event = self.read();
            self.events.push(event);
        }
    }
}
