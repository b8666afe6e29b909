//! What a protected disk needs besides its daemon: two ft-logs and the backup's daemon, on loopback.

use std::{
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::backend::Programs;
use crate::error::{HarnessError, IoContext};

/// How long an ft-log may take to listen.
const START: Duration = Duration::from_secs(10);

/// A side of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Primary,
    Backup,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }
}

/// The processes; ended when dropped.
#[derive(Debug)]
pub(super) struct Pair {
    directory: tempfile::TempDir,
    children: Vec<Child>,
}

impl Pair {
    /// Starts everything but the primary's daemon. The backup's image is a copy of `image`.
    pub(super) fn start(programs: &Programs, directory: &Path, image: &Path) -> Result<Self, HarnessError> {
        let scratch = tempfile::tempdir_in(directory).context(|| "make a directory".to_owned())?;
        let mut pair = Self {
            directory: scratch,
            children: Vec::new(),
        };
        let copy = pair.path("image");
        std::fs::copy(image, &copy).context(|| format!("copy {}", image.display()))?;
        let arbiter = pair.path("arbiter");
        std::fs::create_dir(&arbiter).context(|| format!("make {}", arbiter.display()))?;
        let [one, other] = [free_address()?, free_address()?];
        for (side, listen, peer) in [(Side::Backup, one, other), (Side::Primary, other, one)] {
            let mut command = Command::new(&programs.log);
            command.args(["--vm", "bench", "--devices", "blk0", "--role", side.name()]);
            command
                .arg("--socket-path")
                .arg(pair.socket(side))
                .arg("--arbiter")
                .arg(&arbiter);
            command.args(["--listen", &listen.to_string(), "--peer", &peer.to_string()]);
            pair.spawn(command)?;
            let deadline = Instant::now() + START;
            while !pair.socket(side).exists() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let mut command = Command::new(&programs.ours);
        command
            .arg("--socket-path")
            .arg(pair.path("unused"))
            .arg("--blk-file")
            .arg(&copy);
        pair.join(&mut command, Side::Backup);
        pair.spawn(command)?;
        Ok(pair)
    }

    /// Makes a daemon one of this pair.
    pub(super) fn join(&self, command: &mut Command, side: Side) {
        command.arg("--ft-log").arg(self.socket(side));
        command.args(["--engine", "device", "--vm", "bench", "--device", "blk0"]);
        // The next turn's daemon is alone on this image, whatever the end of this pair leaves noted.
        command
            .arg("--image-state")
            .arg(self.path(&format!("{}-image-state", side.name())));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn socket(&self, side: Side) -> PathBuf {
        self.path(side.name())
    }

    fn spawn(&mut self, mut command: Command) -> Result<(), HarnessError> {
        command
            .env("RUST_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = command
            .spawn()
            .context(|| format!("start {:?}", command.get_program()))?;
        self.children.push(child);
        Ok(())
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn free_address() -> Result<SocketAddr, HarnessError> {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .context(|| "find a free port".to_owned())
}
