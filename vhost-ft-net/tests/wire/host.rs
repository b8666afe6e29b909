//! A host with the daemon under test: its files, its end of the wire, and what it told.

use std::{path::PathBuf, process::Command};

use serde_json::Value;
use tempfile::TempDir;

use super::{GUEST_MAC, Wire};
use crate::support::daemon::text;

/// See the module.
pub struct Host {
    pub wire: Wire,
    directory: TempDir,
}

impl Host {
    pub fn on(wire: Wire) -> Self {
        Self {
            wire,
            directory: TempDir::new().unwrap(),
        }
    }

    /// A file of this host.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The daemon with a socket, the guest's address, a file for events, and `options`.
    pub fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-net"));
        command.args(["--socket-path", text(&self.path("socket"))]);
        command
            .env("RUST_LOG", "debug")
            .args(["--mac", GUEST_MAC, "--events", text(&self.path("events"))]);
        command.args(options);
        command
    }

    /// The events of this name so far.
    pub fn events(&self, name: &str) -> Vec<Value> {
        let events = std::fs::read_to_string(self.path("events")).unwrap();
        let events = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.filter(|event| event["event"] == name).collect()
    }

    /// The last event `counters`.
    pub fn counters(&self) -> Value {
        self.events("counters").pop().unwrap()
    }
}
