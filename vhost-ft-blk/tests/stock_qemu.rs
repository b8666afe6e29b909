//! Stock QEMU and Debian's own kernels on the daemon. Needs `FT_STOCK_GUESTS`, the directory of scripts/guest-image's guests; run by
//! scripts/test.

#[path = "../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::daemon::{Daemon, text};
use tempfile::TempDir;

const IMAGE_BYTES: u64 = 256 << 20;
const KERNELS: [&str; 2] = ["6.1", "6.12"];

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

/// A machine that runs one job.
struct Machine {
    qemu: Child,
    console: BufReader<ChildStdout>,
}

impl Machine {
    fn start(kernel: &str, job: &str, argument: &str, socket: &Path, queues: u16) -> Self {
        let guest = guest(kernel);
        let accelerator = std::env::var("FT_ACCEL").unwrap_or_else(|_| "tcg".into());
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-machine",
            "q35,memory-backend=memory",
            "-accel",
            &accelerator,
            "-cpu",
            "max",
        ]);
        command.args([
            "-smp",
            "2",
            "-m",
            "768",
            "-nodefaults",
            "-no-reboot",
            "-nographic",
            "-serial",
            "stdio",
        ]);
        command.args(["-object", "memory-backend-memfd,id=memory,size=768M,share=on"]);
        command.args([
            "-kernel",
            text(&guest.join("vmlinuz")),
            "-initrd",
            text(&guest.join("initrd")),
        ]);
        command.args([
            "-append",
            &format!("console=ttyS0 panic=-1 quiet ft.job={job} ft.argument={argument}"),
        ]);
        command.args([
            "-chardev",
            &format!("socket,id=blk,path={},{}", text(socket), reconnect()),
        ]);
        command.args([
            "-device",
            &format!("vhost-user-blk-pci,chardev=blk,num-queues={queues}"),
        ]);
        let mut qemu = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let console = BufReader::new(qemu.stdout.take().unwrap());
        Self { qemu, console }
    }

    /// Reads the console up to a line that begins with `text`, and gives all that was read.
    fn wait_line(&mut self, text: &str) -> String {
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

    fn ends_well(mut self) -> String {
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

struct World {
    directory: TempDir,
    queues: u16,
}

impl World {
    fn new(queues: u16) -> Self {
        let directory = TempDir::new().unwrap();
        let image = File::create(directory.path().join("image")).unwrap();
        image.set_len(IMAGE_BYTES).unwrap();
        Self { directory, queues }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn daemon(&self) -> Daemon {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-blk"));
        command.args(["--socket-path", text(&self.socket())]);
        command.args(["--blk-file", text(&self.directory.path().join("image"))]);
        command.args(["--num-queues", &self.queues.to_string()]);
        Daemon::listening(command.env("RUST_LOG", "debug"))
    }

    fn machine(&self, kernel: &str, job: &str, argument: &str) -> Machine {
        Machine::start(kernel, job, argument, &self.socket(), self.queues)
    }
}

#[test]
fn fio_verifies_at_every_depth_and_number_of_queues() {
    for kernel in KERNELS {
        for (queues, depth) in [(1, 1), (1, 32), (4, 1), (4, 32)] {
            eprintln!("--- {kernel}, {queues} queues, depth {depth}");
            let world = World::new(queues);
            let _daemon = world.daemon();
            let seen = world.machine(kernel, "fio-verify", &format!("{depth},1")).ends_well();
            // A queue of the device for each of the guest's two processors, if it has as many.
            assert!(seen.contains(&format!("queues: {}", queues.min(2))), "{seen}");
        }
    }
}

#[test]
fn a_file_system_survives_discards_flushes_and_a_second_mount() {
    for kernel in KERNELS {
        let world = World::new(2);
        let _daemon = world.daemon();
        let seen = world.machine(kernel, "filesystem", "-").ends_well();
        assert!(seen.contains("files: 37"), "{seen}");
    }
}

#[test]
fn the_daemon_is_killed_under_fio_and_the_guest_goes_on() {
    let seed = std::env::var("FT_SEED").map_or_else(|_| rand::rng().random(), |seed| seed.parse().unwrap());
    let kills: u32 = std::env::var("FT_KILLS").map_or(10, |kills| kills.parse().unwrap());
    println!("FT_SEED={seed} FT_KILLS={kills}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let world = World::new(2);
    let mut daemon = world.daemon();
    // More passes than the kills can last; the last daemon is left alone for two of them.
    let mut machine = world.machine("6.1", "fio-verify", "32,1000");
    machine.wait_line("ft: ready");
    for _ in 0..kills {
        // Not a wait for anything: the instant of the fault.
        std::thread::sleep(Duration::from_millis(random.random_range(0..400)));
        daemon.kill();
        daemon = world.daemon();
        daemon.wait_line("a queue started");
    }
    for _ in 0..2 {
        machine.wait_line("ft: pass");
    }
}
