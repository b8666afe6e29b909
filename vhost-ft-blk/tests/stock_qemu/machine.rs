//! A daemon, and a QEMU with a Debian kernel that runs one job.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::support::{
    daemon::{Daemon, text},
    stock::{Machine, Qmp, qemu, reconnect},
};

const IMAGE_BYTES: u64 = 256 << 20;

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
        machine_on(&self.path(socket), self.queues, kernel, job, argument, options)
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

/// A machine with other options, on the daemon with that socket.
pub(crate) fn machine_on(
    socket: &Path,
    queues: u16,
    kernel: &str,
    job: &str,
    argument: &str,
    options: &[&str],
) -> Machine {
    let chardev = format!("socket,id=blk,path={},{}", text(socket), reconnect());
    let device = format!("vhost-user-blk-pci,id=disk,bus=plug,chardev=blk,num-queues={queues}");
    let mut command = qemu(kernel, job, argument);
    for (option, value) in [
        ("-smp", "2"),
        ("-chardev", &*chardev),
        // A slot of its own: it can be unplugged.
        ("-device", "pcie-root-port,id=plug,chassis=1"),
        ("-device", &device),
    ] {
        command.args([option, value]);
    }
    Machine::start(command.args(options))
}
