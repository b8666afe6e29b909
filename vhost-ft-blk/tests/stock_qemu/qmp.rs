//! QEMU's monitor.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use serde_json::{Value, json};

use crate::support::frontend::PATIENCE;

/// A monitor connection after its greeting.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    /// Events that came while something else was waited for.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects to the monitor of a QEMU that has just been started.
    pub(crate) fn connect(path: &Path) -> Self {
        let deadline = std::time::Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(std::time::Instant::now() < deadline, "no monitor: {error}"),
            }
            std::thread::yield_now();
        };
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        assert!(qmp.read()["QMP"].is_object());
        qmp.execute("qmp_capabilities", &json!({}));
        qmp
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(self.stream.read_line(&mut line).unwrap(), 0, "the monitor is gone");
        eprint!("monitor: {line}");
        serde_json::from_str(&line).unwrap()
    }

    /// Executes a command that succeeds.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let message = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{message}").unwrap();
        loop {
            let answer = self.read();
            if answer["event"].is_string() {
                self.events.push(answer);
                continue;
            }
            assert!(answer["error"].is_null(), "{command}: {answer}");
            return answer["return"].clone();
        }
    }

    /// Waits for an event for which `is_it`.
    pub(crate) fn wait_event(&mut self, name: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        loop {
            let found = self
                .events
                .iter()
                .position(|event| event["event"] == name && is_it(&event["data"]));
            if let Some(place) = found {
                return self.events.remove(place)["data"].clone();
            }
            let event = self.read();
            self.events.push(event);
        }
    }
}
