//! Two hosts on this machine: the real ft-log and the real daemon, twice.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use tempfile::TempDir;

use super::support::daemon::{Daemon, text};

/// Sectors of the disk.
pub(crate) const SECTORS: u64 = 2048;

/// For a pair of which one side is to notice that the other one is silent. A killed peer's channel is away at once.
pub(crate) const SUSPICIOUS: [&str; 4] = ["--heartbeat-misses", "50", "--channel-timeout-ms", "4000"];

/// A side of the pair.
pub(crate) struct Host {
    pub(crate) directory: TempDir,
    pub(crate) log: Daemon,
    pub(crate) blk: Daemon,
}

impl Host {
    pub(crate) fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        std::fs::read(self.image()).unwrap()
    }

    /// The power cord; one of its processes dies first. Its disks are left.
    pub(crate) fn kill(self, log_first: bool) -> TempDir {
        let Self { log, blk, directory } = self;
        let (first, second) = if log_first { (log, blk) } else { (blk, log) };
        first.kill();
        second.kill();
        directory
    }

    /// Starts the two daemons of a side; `more` goes to its ft-log.
    pub(crate) fn spawn(
        directory: TempDir,
        addresses: [SocketAddr; 2],
        primary: bool,
        arbiter: &Path,
        more: &[&str],
        limit: Option<u64>,
    ) -> Self {
        let (role, [listen, peer]) = match primary {
            true => ("primary", addresses),
            false => ("backup", [addresses[1], addresses[0]]),
        };
        let path = |name: &str| directory.path().join(name);
        let mut command = Command::new(ft_log());
        command.args(["--vm", "stock", "--role", role, "--devices", "blk0"]);
        command.args(["--socket-path", text(&path("log")), "--arbiter", text(arbiter)]);
        command.args(["--listen", &listen.to_string(), "--peer", &peer.to_string()]);
        command.args(["--heartbeat-interval-ms", "100", "--leave-timeout-ms", "60000"]);
        if !more.contains(&SUSPICIOUS[0]) {
            // A busy machine is no failure.
            command.args(["--heartbeat-misses", "10000", "--channel-timeout-ms", "200000"]);
        }
        command.args(["--journal", text(&path("journal")), "--journal-earlier", "archive"]);
        command.args(more);
        let mut log = Daemon::spawn(&mut command);
        log.wait_line("waiting for");
        let mut command = daemon(limit);
        command.args([
            "--socket-path",
            text(&path("socket")),
            "--blk-file",
            text(&path("image")),
        ]);
        command.args(["--engine", "device", "--ft-log", text(&path("log")), "--vm", "stock"]);
        command.args(["--device", "blk0"]);
        let blk = Daemon::spawn(&mut command);
        Self { directory, log, blk }
    }
}

static PAIRS: AtomicU32 = AtomicU32::new(1);

/// Two addresses that no other test has, whatever runs beside this one; the port is none that the kernel gives to connections.
fn addresses() -> [SocketAddr; 2] {
    let (process, pair) = (std::process::id(), PAIRS.fetch_add(1, Ordering::Relaxed));
    let address = |host| {
        let ip = [127, 1 + (process % 250) as u8, (pair % 250) as u8, host];
        SocketAddr::from((ip, 10_000 + (process % 10_000) as u16))
    };
    [address(1), address(2)]
}

/// `ft-log` of this build, which is another package's.
pub(crate) fn ft_log() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_vhost-ft-blk")).with_file_name("ft-log");
    assert!(path.exists(), "{} is not there: cargo build -p ft-log", path.display());
    path
}

/// The daemon, whose files end at so many sectors: POSIX counts them by 512 bytes for `ulimit -f`.
fn daemon(limit: Option<u64>) -> Command {
    let program = env!("CARGO_BIN_EXE_vhost-ft-blk");
    let Some(sectors) = limit else {
        return Command::new(program);
    };
    let mut command = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {sectors}; exec \"$0\" \"$@\"");
    command.args(["-c", &script, program]);
    command
}

/// Notes on a host that its image was one of two.
pub(crate) fn mark(directory: &Path) {
    std::fs::write(directory.join("image.ft-state"), r#"{"version":1,"vm":"stock"}"#).unwrap();
}

/// Both sides and what they share.
pub(crate) struct Pair {
    pub(crate) primary: Host,
    pub(crate) backup: Host,
    /// The primary's and the backup's.
    pub(crate) addresses: [SocketAddr; 2],
    pub(crate) arbiter: TempDir,
}

impl Pair {
    /// Starts both sides on equal images; returns when the primary's socket is open. `more` goes to both ft-logs.
    pub(crate) fn start(more: &[&str]) -> Self {
        Self::start_limited(more, [None; 2])
    }

    /// The same; the daemon of either side may not write its image beyond so many sectors (primary, backup).
    pub(crate) fn start_limited(more: &[&str], limits: [Option<u64>; 2]) -> Self {
        let mut pair = Self::spawn(more, limits, [0; 2], false);
        pair.primary.blk.wait_line("listening");
        pair
    }

    /// Starts both sides on images filled with one byte each (primary, backup), `marked` as those of an earlier pair, and waits for nothing.
    pub(crate) fn spawn(more: &[&str], limits: [Option<u64>; 2], content: [u8; 2], marked: bool) -> Self {
        Self::spawn_on(more, limits, |primary, directory| {
            let byte = content[usize::from(!primary)];
            std::fs::write(directory.join("image"), vec![byte; SECTORS as usize * 512]).unwrap();
            if marked {
                mark(directory);
            }
        })
    }

    /// Starts both sides, each in a directory to which `prepare` gives the image, and waits for nothing.
    pub(crate) fn spawn_on(more: &[&str], limits: [Option<u64>; 2], prepare: impl Fn(bool, &Path)) -> Self {
        let arbiter = TempDir::new().unwrap();
        let addresses = addresses();
        let start = |primary: bool| {
            let directory = TempDir::new().unwrap();
            prepare(primary, directory.path());
            std::fs::create_dir(directory.path().join("journal")).unwrap();
            let limit = limits[usize::from(!primary)];
            Host::spawn(directory, addresses, primary, arbiter.path(), more, limit)
        };
        let (backup, primary) = (start(false), start(true));
        Self {
            primary,
            backup,
            addresses,
            arbiter,
        }
    }
}
