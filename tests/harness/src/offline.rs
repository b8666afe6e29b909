//! A recorded machine executed again, from its journal.

use std::path::Path;
use std::process::Command;

use crate::error::{HarnessError, IoContext};
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
    let setup = pair.setup();
    let shim: &Path = &setup.bin_dir.join(SHIM);
    let mut command = Command::new(shim);
    command.arg("bisect").arg(pair.journal(id));
    for (name, value) in setup.guest.machine() {
        command.arg(name).arg(value);
    }
    let output = command.output().context(|| format!("start {}", shim.display()))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match output.status.code() {
        Some(0) => Ok(Replayed::Same(said)),
        Some(1) => Ok(Replayed::Different(said)),
        _ => Err(HarnessError::Unexpected {
            awaited: format!("the replay of host {id}'s journal"),
            happened: format!("ft-vcpu-shim bisect ended with {}", output.status),
            context: format!("\n{}", String::from_utf8_lossy(&output.stderr)),
        }),
    }
}
