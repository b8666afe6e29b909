//! DPDK's testpmd, as a guest's driver without a VM and as the peer's backend.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::error::{HarnessError, IoContext};

/// A running testpmd; ended when dropped.
#[derive(Debug)]
pub(super) struct Testpmd {
    child: Child,
    log: PathBuf,
}

impl Testpmd {
    /// Starts one that forwards with the processor `forwards_on`, 0 or 1, and lives in `directory` with what it says.
    pub(super) fn start(
        name: &str,
        directory: &Path,
        forwards_on: usize,
        ports: &[String],
        arguments: &[&str],
    ) -> Result<Self, HarnessError> {
        let log = directory.join(format!("{name}.log"));
        let action = || "start dpdk-testpmd (install the package dpdk-dev)".to_owned();
        let output = File::create(&log).context(action)?;
        let mut command = Command::new("dpdk-testpmd");
        command.args(["--no-huge", "-m", "256", "--no-pci", "-l", "0,1"]);
        command.args(["--main-lcore", if forwards_on == 0 { "1" } else { "0" }]);
        command.args(["--file-prefix", name]);
        for port in ports {
            command.args(["--vdev", port]);
        }
        // Its main thread reads commands from a pipe that nobody writes to, so it stays.
        command.args(["--", "-i", "--auto-start", "--total-num-mbufs=4096"]);
        command.args(arguments);
        let child = command
            .env("RUNTIME_DIRECTORY", directory)
            .stdin(Stdio::piped())
            .stdout(output.try_clone().context(action)?)
            .stderr(output)
            .spawn()
            .context(action)?;
        Ok(Self { child, log })
    }

    /// Fails if it has ended.
    pub(super) fn check(&mut self) -> Result<(), HarnessError> {
        if let Some(status) = self.child.try_wait().context(|| "look at testpmd".to_owned())? {
            let said = std::fs::read_to_string(&self.log).unwrap_or_default();
            return Err(std::io::Error::other(format!("it ended with {status}: {said}")))
                .context(|| "keep testpmd running".to_owned());
        }
        Ok(())
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
