//! A backend process, ours or the peer's.

use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    bench::engine_pair::{self, Pair, Side},
    error::{HarnessError, IoContext},
};

/// How long a backend may take to listen.
const START: Duration = Duration::from_secs(10);

/// Where the backends are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `vhost-ft-blk`.
    pub ours: PathBuf,
    /// `ft-log`.
    pub log: PathBuf,
    /// `qemu-storage-daemon`.
    pub peer: PathBuf,
}

/// Whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// vhost-ft-blk.
    Ours,
    /// vhost-ft-blk with engine `device`: everything of both hosts on this one.
    Protected,
    /// qemu-storage-daemon.
    Peer,
}

/// A backend that listens; ended when dropped.
#[derive(Debug)]
pub(super) struct Backend {
    child: Child,
    socket: PathBuf,
    /// What else it needs; ended after it.
    pair: Option<Pair>,
}

impl Backend {
    pub(super) fn start(
        programs: &Programs,
        which: Which,
        directory: &Path,
        image: &Path,
        queues: usize,
        direct: bool,
    ) -> Result<Self, HarnessError> {
        let socket = directory.join("socket");
        let _ = std::fs::remove_file(&socket);
        let mut pair = match which {
            Which::Protected => {
                let programs = engine_pair::Programs {
                    log: &programs.log,
                    disk: &programs.ours,
                };
                Some(Pair::start(programs, directory, image, "blk0", &[])?)
            }
            Which::Ours | Which::Peer => None,
        };
        let mut command = match which {
            Which::Ours | Which::Protected => {
                let mut command = match &pair {
                    Some(pair) => pair.disk(&programs.ours, Side::Primary, image, &socket),
                    None => {
                        let mut command = Command::new(&programs.ours);
                        command.arg("--socket-path").arg(&socket).arg("--blk-file").arg(image);
                        command
                    }
                };
                command.args(["--num-queues", &queues.to_string()]);
                command.args(direct.then_some("--direct"));
                command
            }
            Which::Peer => {
                let on = if direct { "on" } else { "off" };
                let file = format!(
                    "driver=file,node-name=image,filename={},cache.direct={on},aio=io_uring,discard=unmap",
                    image.display()
                );
                let export = format!(
                    "type=vhost-user-blk,id=export,node-name=image,addr.type=unix,addr.path={},writable=on,num-queues={queues},iothread=thread",
                    socket.display()
                );
                let mut command = Command::new(&programs.peer);
                command.args([
                    "--object",
                    "iothread,id=thread",
                    "--blockdev",
                    &file,
                    "--export",
                    &export,
                ]);
                command
            }
        };
        command
            .env("RUST_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let deadline = Instant::now() + START;
        // The kernel gives the lock of a process back some time after its end: the next one may find the image locked.
        loop {
            let child = command
                .spawn()
                .context(|| format!("start {:?}", command.get_program()))?;
            let mut backend = Self {
                child,
                socket: socket.clone(),
                pair: pair.take(),
            };
            while backend
                .child
                .try_wait()
                .context(|| "look at a backend".to_owned())?
                .is_none()
            {
                if backend.listens() {
                    return Ok(backend);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            pair = backend.pair.take();
            if Instant::now() > deadline {
                let mut said = String::new();
                let _ = backend
                    .child
                    .stderr
                    .take()
                    .map(|mut stderr| stderr.read_to_string(&mut said));
                return Err(std::io::Error::other(said)).context(|| format!("start {:?}", command.get_program()));
            }
        }
    }

    /// Without connecting: a backend may take the first connection for its frontend.
    fn listens(&self) -> bool {
        self.socket.exists()
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// CPU time it has used so far, all its threads.
    pub(super) fn cpu(&self) -> Result<Duration, HarnessError> {
        let path = format!("/proc/{}/stat", self.child.id());
        let stat = std::fs::read_to_string(&path).context(|| format!("read {path}"))?;
        // Behind the name, which may hold anything but ends with the last parenthesis: utime and stime are the 12th and 13th.
        let behind = stat.rsplit(')').next().unwrap_or_default();
        let ticks = behind
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok());
        // USER_HZ is 100 in every ABI of Linux on x86-64.
        Ok(Duration::from_millis(ticks.sum::<u64>() * 10))
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes an image without holes, so that no read is of nothing.
pub(super) fn fill(path: &Path, bytes: u64) -> Result<(), HarnessError> {
    let write = || {
        let mut file = File::create(path)?;
        let block: Vec<u8> = (0..1u32 << 20).map(|byte| (byte / 7) as u8).collect();
        for _ in 0..bytes / block.len() as u64 {
            file.write_all(&block)?;
        }
        file.sync_all()
    };
    write().context(|| format!("write {}", path.display()))
}
