//! `ft-log status` and its siblings: one request to a running daemon's control socket.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand};
use serde_json::Value;
use thiserror::Error;

use super::configure::Change;
use super::protocol::{Answer, ENTRIES_MAX, Request};

/// A daemon that is alive answers at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// No answer is longer.
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What to ask a running daemon.
#[derive(Clone, Debug, Subcommand)]
pub enum Ask {
    /// Show role, generation, LSNs, lag, peer, journal and arbiter of a running ft-log.
    Status(OfVm),
    /// List the VMs of a running ft-log.
    List(Where),
    /// Let the journal go on with a new segment.
    Rotate(OfVm),
    /// Change heartbeats, timeouts and lag of a running pair: on both sides, from one entry of the log on. Asked of the side that executes the VM.
    Configure {
        /// Of which VM.
        #[command(flatten)]
        of: OfVm,
        /// What changes.
        #[command(flatten)]
        change: Change,
    },
    /// End a running ft-log, as SIGTERM does; with --vm, one VM of it.
    Stop(OfVm),
    /// List the journal's segments.
    Segments(OfVm),
    /// Show entries of a segment, as a running ft-log reads them.
    Entries {
        /// Of which VM.
        #[command(flatten)]
        of: OfVm,
        /// Generation of the segment.
        #[arg(long, value_name = "NUMBER", default_value_t = 1)]
        generation: u32,
        /// Number of the segment.
        #[arg(long, value_name = "NUMBER")]
        segment: u32,
        /// First LSN.
        #[arg(long, value_name = "LSN", default_value_t = 0)]
        from: u64,
        /// Most entries.
        #[arg(long, value_name = "COUNT", default_value_t = ENTRIES_MAX)]
        limit: usize,
    },
}

/// Which daemon.
#[derive(Clone, Debug, Args)]
pub struct Where {
    /// Control socket of the daemon (its --control).
    #[arg(long, value_name = "SOCK")]
    control: PathBuf,
    /// The answer as one line of JSON.
    #[arg(long)]
    json: bool,
}

/// Which VM of which daemon.
#[derive(Clone, Debug, Args)]
pub struct OfVm {
    #[command(flatten)]
    at: Where,
    /// Which VM, where the daemon has several.
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum AskError {
    /// Nobody there.
    #[error("{path}: cannot ask the daemon: {source} (is ft-log running, with this --control?)")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It said no.
    #[error("ft-log says: {0}")]
    Refused(String),
}

/// Asks, and writes the answer to `out`.
///
/// # Errors
/// [`AskError`].
pub fn run(ask: &Ask, out: &mut dyn Write) -> Result<(), AskError> {
    let (at, request) = match ask {
        Ask::Status(of) => (&of.at, Request::Status { vm: of.vm.clone() }),
        Ask::List(at) => (at, Request::List {}),
        Ask::Rotate(of) => (&of.at, Request::Rotate { vm: of.vm.clone() }),
        Ask::Configure { of, change } => {
            let (vm, change) = (of.vm.clone(), *change);
            (&of.at, Request::Configure { vm, change })
        }
        Ask::Stop(of) => (&of.at, Request::Stop { vm: of.vm.clone() }),
        Ask::Segments(of) => (&of.at, Request::Segments { vm: of.vm.clone() }),
        Ask::Entries {
            of,
            generation,
            segment,
            from,
            limit,
        } => {
            let (generation, segment, from, limit) = (*generation, *segment, *from, *limit);
            let request = Request::Entries {
                vm: of.vm.clone(),
                generation,
                segment,
                from,
                limit,
            };
            (&of.at, request)
        }
    };
    let failed = |source| AskError::Io {
        path: at.control.clone(),
        source,
    };
    match exchange(&at.control, &request).map_err(failed)? {
        Answer::Error(reason) => Err(AskError::Refused(reason)),
        Answer::Ok(value) if at.json => writeln!(out, "{value}").map_err(failed),
        Answer::Ok(Value::Array(vms)) if matches!(ask, Ask::Status(_)) => {
            // One paragraph a VM.
            let mut shown = vms.iter().enumerate();
            shown
                .try_for_each(|(at, vm)| {
                    if at > 0 {
                        writeln!(out)?;
                    }
                    show(vm, "", out)
                })
                .map_err(failed)
        }
        Answer::Ok(value) => show(&value, "", out).map_err(failed),
    }
}

fn exchange(path: &Path, request: &Request) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_string(request).map_err(io::Error::other)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut answer)?;
    serde_json::from_str(&answer).map_err(io::Error::other)
}

/// One value a line, the way to it before it.
fn show(value: &Value, way: &str, out: &mut dyn Write) -> io::Result<()> {
    match value {
        Value::Object(fields) => fields.iter().try_for_each(|(key, value)| {
            let way = if way.is_empty() {
                key.clone()
            } else {
                format!("{way}.{key}")
            };
            show(value, &way, out)
        }),
        // A list of records: one line each.
        Value::Array(values) => values.iter().try_for_each(|value| writeln!(out, "{value}")),
        Value::String(text) if way.is_empty() => writeln!(out, "{text}"),
        Value::String(text) => writeln!(out, "{way:<24} {text}"),
        Value::Null => writeln!(out, "{way:<24} -"),
        other => writeln!(out, "{way:<24} {other}"),
    }
}
