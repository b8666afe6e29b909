//! A backend with a TAP, ours or the peer's.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::testpmd::Testpmd;
use crate::{
    bench::engine_pair::{self, Pair, Side},
    error::{HarnessError, IoContext},
};

/// Address of the guest's card.
pub(super) const GUEST_MAC: &str = "52:54:00:01:02:03";
/// TAP of the daemon that is measured.
pub(super) const TAP: &str = "tap-bench";
/// TAP of the other host's card.
pub(super) const TAP_BACKUP: &str = "tap-backup";
/// The peer makes its own.
const TAP_PEER: &str = "tap-peer";
/// How long a backend may take to listen.
const START: Duration = Duration::from_secs(20);
/// A side that gets no processor for a moment is not taken for dead.
const PATIENT: [&str; 6] = [
    "--heartbeat-interval-ms",
    "100",
    "--heartbeat-misses",
    "10000",
    "--channel-timeout-ms",
    "200000",
];

/// Where the daemons are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `vhost-ft-net`.
    pub ours: PathBuf,
    /// `ft-log`.
    pub log: PathBuf,
    /// `vhost-ft-blk`.
    pub disk: PathBuf,
}

/// Whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// vhost-ft-net.
    Ours,
    /// vhost-ft-net with engine `device`: everything of both hosts on this one.
    Protected,
    /// testpmd with `net_vhost` and `net_tap`.
    Peer,
}

/// The process that serves the guest.
#[derive(Debug)]
enum Server {
    Daemon(Child),
    Testpmd(Testpmd),
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Self::Daemon(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A backend that listens; ended when dropped.
#[derive(Debug)]
pub(super) struct Backend {
    server: Server,
    /// What else it needs; ended after it.
    pair: Option<Pair>,
    socket: PathBuf,
    tap: &'static str,
}

impl Backend {
    /// Starts it in the network namespace of this thread, which has the TAPs.
    pub(super) fn start(programs: &Programs, which: Which, directory: &Path) -> Result<Self, HarnessError> {
        let socket = directory.join("socket");
        let _ = std::fs::remove_file(&socket);
        let pair = match which {
            Which::Protected => Some(start_pair(programs, directory)?),
            Which::Ours | Which::Peer => None,
        };
        let server = match which {
            Which::Peer => {
                let ports = [
                    format!("net_vhost0,iface={},queues=1", socket.display()),
                    format!("net_tap0,iface={TAP_PEER}"),
                ];
                // The guest forwards with the other processor.
                Server::Testpmd(Testpmd::start("peer", directory, 0, &ports, &["--forward-mode=io"])?)
            }
            Which::Ours | Which::Protected => {
                let mut command = card(programs, &socket, TAP);
                if let Some(pair) = &pair {
                    pair.join(&mut command, Side::Primary, "net0");
                }
                let child = command
                    .env("RUST_LOG", "error")
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .spawn()
                    .context(|| format!("start {}", programs.ours.display()))?;
                Server::Daemon(child)
            }
        };
        let tap = if which == Which::Peer { TAP_PEER } else { TAP };
        let mut backend = Self {
            server,
            pair,
            socket,
            tap,
        };
        let deadline = Instant::now() + START;
        while !backend.socket.exists() {
            backend.check()?;
            if Instant::now() > deadline {
                return Err(HarnessError::Deadline {
                    awaited: format!("{which:?} to listen at {}", backend.socket.display()),
                    context: String::new(),
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(backend)
    }

    /// Fails if a process of it has ended.
    pub(super) fn check(&mut self) -> Result<(), HarnessError> {
        if let Some(pair) = &mut self.pair {
            pair.check()?;
        }
        match &mut self.server {
            Server::Testpmd(testpmd) => testpmd.check(),
            Server::Daemon(child) => match child.try_wait().context(|| "look at vhost-ft-net".to_owned())? {
                None => Ok(()),
                Some(status) => Err(std::io::Error::other(format!("it ended with {status}")))
                    .context(|| "keep vhost-ft-net running".to_owned()),
            },
        }
    }

    /// Where the guest's driver connects.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Frames that the TAP has taken so far, as the kernel counts them.
    pub(super) fn frames(&self) -> Result<u64, HarnessError> {
        let path = "/proc/thread-self/net/dev";
        let devices = std::fs::read_to_string(path).context(|| format!("read {path}"))?;
        // Behind the name: bytes, frames.
        let counted = devices
            .lines()
            .find_map(|line| line.trim().strip_prefix(self.tap)?.strip_prefix(':'))
            .and_then(|counters| counters.split_whitespace().nth(1)?.parse().ok());
        // The peer makes its TAP when it starts.
        Ok(counted.unwrap_or(0))
    }
}

fn card(programs: &Programs, socket: &Path, tap: &str) -> Command {
    let mut command = Command::new(&programs.ours);
    command.arg("--socket-path").arg(socket);
    command.args(["--tap", tap, "--mac", GUEST_MAC]);
    command
}

/// Everything of a protected VM but its card on the primary.
fn start_pair(programs: &Programs, directory: &Path) -> Result<Pair, HarnessError> {
    let image = directory.join("image");
    std::fs::write(&image, [0; 1 << 16]).context(|| format!("write {}", image.display()))?;
    let of_pair = engine_pair::Programs {
        log: &programs.log,
        disk: &programs.disk,
    };
    let mut pair = Pair::start(of_pair, directory, &image, "blk0,net0", &PATIENT)?;
    let mut backup = card(programs, &pair.path("backup-card"), TAP_BACKUP);
    pair.join(&mut backup, Side::Backup, "net0");
    pair.spawn(backup)?;
    let disk = pair.disk(&programs.disk, Side::Primary, &image, &pair.path("primary-disk"));
    pair.spawn(disk)?;
    Ok(pair)
}
