//! `--events FILE`: one JSON object a line, for whoever watches a daemon.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

use nix::time::{ClockId, clock_gettime};
use serde_json::{Map, Value, json};

/// CLOCK_MONOTONIC in ns: the clock of every time stamp and timer here.
#[must_use]
pub fn monotonic_ns() -> u64 {
    clock_ns(ClockId::CLOCK_MONOTONIC)
}

/// Wall clock, ns since 1970.
#[must_use]
pub fn wall_ns() -> u64 {
    clock_ns(ClockId::CLOCK_REALTIME)
}

fn clock_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock).expect("the kernel knows its clocks");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Writes events of one daemon; silent without a file.
#[derive(Debug)]
pub struct Events {
    source: &'static str,
    vm: Option<String>,
    file: Option<File>,
}

impl Events {
    /// Opens `path` for appending.
    ///
    /// # Errors
    /// As [`std::fs::OpenOptions::open`].
    pub fn open(source: &'static str, path: Option<&Path>) -> io::Result<Self> {
        let file = path
            .map(|path| File::options().create(true).append(true).open(path))
            .transpose()?;
        let vm = None;
        Ok(Self { source, vm, file })
    }

    /// Every event says which VM it is about: a process may have several.
    #[must_use]
    pub fn about(self, vm: &str) -> Self {
        let vm = Some(vm.into());
        Self { vm, ..self }
    }

    /// Whether there is a file.
    #[must_use]
    pub fn are_told(&self) -> bool {
        self.file.is_some()
    }

    /// Appends `{"t_ns", "source", "vm", "event", ...fields}`; `fields` must be a JSON object. A full disk loses events, never the VM.
    pub fn emit(&mut self, event: &str, fields: Value) {
        let Some(file) = &mut self.file else { return };
        let mut object = Map::new();
        object.insert("t_ns".into(), json!(monotonic_ns()));
        object.insert("source".into(), json!(self.source));
        if let Some(vm) = &self.vm {
            object.insert("vm".into(), json!(vm));
        }
        object.insert("event".into(), json!(event));
        if let Value::Object(fields) = fields {
            object.extend(fields);
        }
        let mut line = Value::Object(object).to_string();
        line.push('\n');
        // One write a line, so that lines of processes that share a file do not mix.
        let _ = file.write_all(line.as_bytes());
    }
}
