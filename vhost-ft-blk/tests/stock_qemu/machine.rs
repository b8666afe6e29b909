//! A daemon, and a QEMU with a Debian kernel that runs one job.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

use tempfile::TempDir;

use crate::{
    qmp::Qmp,
    support::daemon::{Daemon, text},
};

const IMAGE_BYTES: u64 = 256 << 20;

fn guest(kernel: &str) -> PathBuf {
    let guests = std::env::var_os("FT_STOCK_GUESTS").expect("FT_STOCK_GUESTS: run scripts/test");
    Path::new(&guests).join(format!("guest-{kernel}"))
}

/// How often QEMU tries to reach a backend that went away: an option that changed its name and unit in 9.2.
fn reconnect() -> &'static str {
    let version = Command::new("qemu-system-x86_64").arg("--version").output().unwrap();
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let number = version.split_whitespace().nth(3).expect("QEMU emulator version X");
    let mut parts = number.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    match (parts.next(), parts.next()) {
        (Some(9), Some(2..)) | (Some(10..), _) => "reconnect-ms=100",
        _ => "reconnect=1",
    }
}

/// The directory of one test: image, sockets.
pub(crate) struct World {
    directory: TempDir,
    queues: u16,
}

impl World {
    pub(crate) fn new(queues: u16) -> Self {
        let directory = TempDir::new().unwrap();
        let image = File::create(directory.path().join("image")).unwrap();
        image.set_len(IMAGE_BYTES).unwrap();
        Self { directory, queues }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn daemon(&self) -> Daemon {
        self.daemon_at("socket", &[])
    }

    /// A daemon with other options, whose socket has that name.
    pub(crate) fn daemon_at(&self, socket: &str, options: &[&str]) -> Daemon {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
        command.args(["--socket-path", text(&self.path(socket))]);
        command.args(["--blk-file", text(&self.path("image"))]);
        command.args(["--num-queues", &self.queues.to_string()]);
        command.args(options);
        Daemon::listening(command.env("RUST_LOG", "debug"))
    }

    pub(crate) fn machine(&self, kernel: &str, job: &str, argument: &str) -> Machine {
        self.machine_at("socket", kernel, job, argument, &["-no-reboot"])
    }

    /// A machine with other options, on the daemon whose socket has that name.
    pub(crate) fn machine_at(
        &self,
        socket: &str,
        kernel: &str,
        job: &str,
        argument: &str,
        options: &[&str],
    ) -> Machine {
        let guest = guest(kernel);
        let accelerator = std::env::var("FT_ACCEL").unwrap_or_else(|_| "tcg".into());
        let chardev = format!("socket,id=blk,path={},{}", text(&self.path(socket)), reconnect());
        let device = format!(
            "vhost-user-blk-pci,id=disk,bus=plug,chardev=blk,num-queues={}",
            self.queues
        );
        let append = format!("console=ttyS0 panic=-1 quiet ft.job={job} ft.argument={argument}");
        let mut command = Command::new("qemu-system-x86_64");
        for (option, value) in [
            ("-machine", "q35,memory-backend=memory"),
            ("-accel", &accelerator),
            // TCG of Debian 12 (7.2.22) now and then leaves nonsense in EFLAGS after CMPXCHG16B, and the guest dies of it.
            ("-cpu", "max,-cx16"),
            ("-smp", "2"),
            ("-m", "768"),
            ("-serial", "stdio"),
            ("-object", "memory-backend-memfd,id=memory,size=768M,share=on"),
            ("-kernel", text(&guest.join("vmlinuz"))),
            ("-initrd", text(&guest.join("initrd"))),
            ("-append", &append),
            ("-chardev", &chardev),
            // A slot of its own: it can be unplugged.
            ("-device", "pcie-root-port,id=plug,chassis=1"),
            ("-device", &device),
        ] {
            command.args([option, value]);
        }
        command.args(["-nodefaults", "-nographic"]).args(options);
        let mut qemu = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let console = BufReader::new(qemu.stdout.take().unwrap());
        Machine { qemu, console }
    }

    /// The options of a monitor with that name.
    pub(crate) fn monitor(&self, name: &str) -> [String; 2] {
        [
            "-qmp".into(),
            format!("unix:{},server=on,wait=off", text(&self.path(name))),
        ]
    }

    pub(crate) fn qmp(&self, name: &str) -> Qmp {
        Qmp::connect(&self.path(name))
    }
}

/// A machine that runs one job.
pub(crate) struct Machine {
    qemu: Child,
    console: BufReader<ChildStdout>,
}

impl Machine {
    /// Reads the console up to a line with `text`, and gives all that was read.
    pub(crate) fn wait_line(&mut self, text: &str) -> String {
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

    pub(crate) fn ends_well(mut self) -> String {
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
