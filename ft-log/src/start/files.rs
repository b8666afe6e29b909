//! How many files this process may have open.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::exit::StartError;

/// Of one VM at the most: sockets, rings, events and memory of its seats and their connections, the channel, the journal, the arbiter.
const FILES_PER_VM: u64 = 96;
/// Of the process: the management plane with its clients, signals, standard streams.
const FILES_OF_PROCESS: u64 = 64;

/// Allows as many open files as the host lets this process have, and sees that they are enough for so many VMs.
///
/// # Errors
/// [`StartError::OpenFiles`] if they are not: a VM that runs out of files later would lose its protection then.
pub(super) fn allow(vms: usize) -> Result<(), StartError> {
    let failed = |source: nix::Error| StartError::Kernel {
        what: "raise the limit of open files",
        source: io::Error::from(source),
    };
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed)?;
    let needed = vms as u64 * FILES_PER_VM + FILES_OF_PROCESS;
    if hard < needed {
        return Err(StartError::OpenFiles { vms, needed, hard });
    }
    // No more than that: some libraries go through every number that a process may have.
    match soft < needed {
        true => setrlimit(Resource::RLIMIT_NOFILE, needed, hard).map_err(failed),
        false => Ok(()),
    }
}
