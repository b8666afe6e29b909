//! What a protected device of engine `device` needs besides its daemon: two ft-logs on loopback, and the backup's disk.

use std::{
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::error::{HarnessError, IoContext};

/// How long an ft-log may take to listen.
const START: Duration = Duration::from_secs(10);

/// Where the programs of a pair are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Programs<'a> {
    /// `ft-log`.
    pub(super) log: &'a Path,
    /// `vhost-ft-blk`.
    pub(super) disk: &'a Path,
}

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
    /// Starts both `ft-log`s of a VM with these devices, with more arguments, and the disk `blk0` of the backup, whose image is a copy of `image`.
    pub(super) fn start(
        programs: Programs<'_>,
        directory: &Path,
        image: &Path,
        devices: &str,
        log_arguments: &[&str],
    ) -> Result<Self, HarnessError> {
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
            let mut command = Command::new(programs.log);
            command.args(["--vm", "bench", "--devices", devices, "--role", side.name()]);
            command.args(log_arguments);
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
        let disk = pair.disk(programs.disk, Side::Backup, &copy, &pair.path("unused"));
        pair.spawn(disk)?;
        Ok(pair)
    }

    /// A disk daemon of this pair, not started.
    pub(super) fn disk(&self, program: &Path, side: Side, image: &Path, socket: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(socket).arg("--blk-file").arg(image);
        self.join(&mut command, side, "blk0");
        // The next turn's daemon is alone on this image, whatever the end of this pair leaves noted.
        command
            .arg("--image-state")
            .arg(self.path(&format!("{}-image-state", side.name())));
        command
    }

    /// Makes a daemon one of this pair.
    pub(super) fn join(&self, command: &mut Command, side: Side, device: &str) {
        command.arg("--ft-log").arg(self.socket(side));
        command.args(["--engine", "device", "--vm", "bench", "--device", device]);
    }

    /// Fails if one of the processes has ended: what is measured then is not protected.
    pub(super) fn check(&mut self) -> Result<(), HarnessError> {
        for child in &mut self.children {
            if let Some(status) = child.try_wait().context(|| "look at a pair".to_owned())? {
                return Err(std::io::Error::other(format!("it ended with {status}")))
                    .context(|| "keep a pair running".to_owned());
            }
        }
        Ok(())
    }

    /// A file of the pair's own.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn socket(&self, side: Side) -> PathBuf {
        self.path(side.name())
    }

    /// Starts a process that ends with the pair.
    pub(super) fn spawn(&mut self, mut command: Command) -> Result<(), HarnessError> {
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
