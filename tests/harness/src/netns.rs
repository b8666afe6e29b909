//! Anonymous network namespaces.
//!
//! A namespace lives as long as something holds it: our file descriptor, a process in it. Nothing is mounted under
//! `/run/netns`, so nothing has a name that two runs could share, and nothing is left when a run is killed: the kernel
//! takes the devices down with the last holder. For the same reason it works in a user namespace without any mount.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{HarnessError, IoContext};

/// One network namespace, that is: one host's network.
#[derive(Debug)]
pub struct Namespace {
    name: &'static str,
    handle: File,
}

impl Namespace {
    /// Makes a namespace with loopback up and IPv6 off.
    ///
    /// # Errors
    /// When the kernel refuses, which it does for an ordinary user outside a user namespace.
    pub fn new(name: &'static str) -> Result<Self, HarnessError> {
        let handle = in_thread(|| -> io::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            for scope in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
                // A kernel without IPv6 has no such file, and nothing to switch off.
                match fs::write(path, "1") {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            File::open("/proc/thread-self/ns/net")
        })
        .context(|| {
            format!("create network namespace {name} (root, or `unshare --user --map-root-user`, is needed)")
        })?;
        let namespace = Self { name, handle };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The name used in messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// A path by which `ip link add ... netns PATH` finds this namespace.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.handle.as_raw_fd())
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets opened there stay there.
    ///
    /// # Errors
    /// What `work` returns, or the refusal to enter.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        in_thread(|| {
            setns(&self.handle, CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }

    /// Runs `ip` with a batch of commands, one a line.
    ///
    /// # Errors
    /// When `ip` is missing or one of the commands fails.
    pub fn ip(&self, batch: &str) -> Result<(), HarnessError> {
        let mut command = Command::new("ip");
        command
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        self.enter_on_exec(&mut command);
        let mut child = command
            .spawn()
            .context(|| "run `ip` (install the package iproute2)".to_owned())?;
        let mut input = child.stdin.take().expect("stdin was asked for");
        input
            .write_all(batch.as_bytes())
            .context(|| "write to `ip`".to_owned())?;
        drop(input);
        let output = child.wait_with_output().context(|| "wait for `ip`".to_owned())?;
        if output.status.success() {
            return Ok(());
        }
        Err(HarnessError::Ip {
            namespace: self.name.to_owned(),
            command: batch.lines().map(str::trim).collect::<Vec<_>>().join("; "),
            stderr: String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "),
        })
    }

    /// Makes `command` start inside the namespace.
    pub fn enter_on_exec(&self, command: &mut Command) {
        let handle: RawFd = self.handle.as_raw_fd();
        let enter = move || -> io::Result<()> {
            // SAFETY: `handle` is open until exec, since `self.handle` outlives the spawn and the child has a copy of the
            // descriptor table.
            let handle = unsafe { BorrowedFd::borrow_raw(handle) };
            setns(handle, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
        };
        // SAFETY: the closure makes one system call and allocates nothing, so it may run between fork and exec.
        unsafe {
            command.pre_exec(enter);
        }
    }
}

/// Runs `work` on a new thread: only threads, not processes, change their namespace.
fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(work)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
