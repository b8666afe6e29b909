//! What Ctrl-C leaves behind: nothing.

use std::path::PathBuf;
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use crate::error::{HarnessError, IoContext};

/// Exit status after Ctrl-C.
const INTERRUPTED: i32 = 130;

/// On Ctrl-C the processes die with this program and the network with them; these directories are ours to remove. Call it
/// before other threads start: they inherit the blocked signals.
///
/// # Errors
/// When the kernel refuses a thread.
pub fn clean_up(directories: Vec<PathBuf>) -> Result<(), HarnessError> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context(|| "block signals".to_owned())?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if signals.wait().is_ok() {
                for directory in directories {
                    // Best effort: a daemon may still be writing there.
                    let _ = std::fs::remove_dir_all(directory);
                }
                std::process::exit(INTERRUPTED);
            }
        })
        .context(|| "start a thread".to_owned())?;
    Ok(())
}
