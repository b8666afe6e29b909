//! A recorded machine executed again, from its journal.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use ft_protocol::Lsn;

use crate::error::{HarnessError, IoContext};
use crate::output_rule::Sent;
use crate::pair::Pair;
use crate::roles::SHIM;
use crate::topology::HostId;

/// What executing a journal again showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replayed {
    /// Two replays, side by side, agree with the log and with each other at every stop; the shim's words.
    Same(String),
    /// They part somewhere; the shim's words.
    Different(String),
}

/// Executes what host `id` recorded twice, with the shim in `bin_dir` (`ft-vcpu-shim bisect`).
///
/// # Errors
/// When it cannot be executed at all.
pub fn replay(pair: &Pair, id: HostId) -> Result<Replayed, HarnessError> {
    let output = shim(pair, id, "bisect", &[])?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match output.status.code() {
        Some(0) => Ok(Replayed::Same(said)),
        Some(1) => Ok(Replayed::Different(said)),
        _ => Err(unexpected(id, "bisect", &output)),
    }
}

/// What the guest of host `id`'s journal sends, executed again (`ft-vcpu-shim replay --frames`).
///
/// # Errors
/// When it cannot be executed to the journal's end.
pub fn frames(pair: &Pair, id: HostId) -> Result<Vec<Sent>, HarnessError> {
    let path = pair.journal(id).with_extension("frames");
    let output = shim(pair, id, "replay", &["--frames".as_ref(), path.as_os_str()])?;
    if !output.status.success() {
        return Err(unexpected(id, "replay", &output));
    }
    let text = fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
    let sent = text
        .lines()
        .map(|line| parse(line).ok_or(line))
        .collect::<Result<_, _>>();
    sent.map_err(|line| HarnessError::Unexpected {
        awaited: format!("the frames of host {id}'s journal"),
        happened: "ft-vcpu-shim replay wrote a line that is none".to_owned(),
        context: format!(": {line}"),
    })
}

fn parse(line: &str) -> Option<Sent> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    let digits = line["frame"].as_str()?;
    let byte = |at: usize| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
    Some(Sent {
        marker: Lsn(line["lsn"].as_u64()?),
        frame: (0..digits.len()).step_by(2).map(byte).collect::<Option<_>>()?,
    })
}

/// Runs a command of the shim on host `id`'s journal.
fn shim(pair: &Pair, id: HostId, name: &str, more: &[&OsStr]) -> Result<Output, HarnessError> {
    let setup = pair.setup();
    let shim: &Path = &setup.bin_dir.join(SHIM);
    let mut command = Command::new(shim);
    command.arg(name).arg(pair.journal(id)).args(more);
    for (name, value) in setup.guest.machine() {
        command.arg(name).arg(value);
    }
    command.output().context(|| format!("start {}", shim.display()))
}

fn unexpected(id: HostId, name: &str, output: &Output) -> HarnessError {
    HarnessError::Unexpected {
        awaited: format!("the replay of host {id}'s journal"),
        happened: format!("ft-vcpu-shim {name} ended with {}", output.status),
        context: format!("\n{}", String::from_utf8_lossy(&output.stderr)),
    }
}
