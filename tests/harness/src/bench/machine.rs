//! A virtual machine to measure: protected or not, its files in memory or on a disk.

use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use tempfile::TempDir;

use crate::bench::client::Client;
use crate::error::{HarnessError, IoContext};
use crate::pair::{Pair, PairSetup};
use crate::topology::{GUEST, HostId};

/// Whether somebody would take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Two hosts, outputs held until the backup has their entries.
    Pair,
    /// One host, `ft-log --alone`: everything is logged, nothing is sent or held.
    Alone,
    /// One host as well, whose shim records nothing (`run --unrecorded`): the guest's kernel as it is, no entries, no state deltas.
    Unrecorded,
}

/// Where images and journals are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// In memory: a flush costs nothing, which leaves the cost of protection to be seen.
    Memory,
    /// In the directory for temporary files.
    Disk,
}

impl Medium {
    /// The directory.
    #[must_use]
    pub fn directory(self) -> PathBuf {
        match self {
            Self::Memory => PathBuf::from("/dev/shm"),
            Self::Disk => std::env::temp_dir(),
        }
    }

    /// Whether files there are in memory.
    ///
    /// # Errors
    /// When the directory is not there.
    pub fn is_memory(self) -> Result<bool, HarnessError> {
        let directory = self.directory();
        let found = statfs(&directory).context(|| format!("look at {}", directory.display()))?;
        Ok(found.filesystem_type() == TMPFS_MAGIC)
    }
}

/// A machine that is up, and a client that is connected to it. Dropping it ends everything.
#[derive(Debug)]
pub struct Machine {
    // Dropped in this order: the client, the processes and their network, their files.
    /// The client.
    pub client: Client,
    /// The machine's hosts.
    pub pair: Pair,
    _directory: TempDir,
}

impl Machine {
    /// Boots a machine with its files in a new directory under `parent`.
    ///
    /// # Errors
    /// When it does not boot.
    pub fn boot(setup: &PairSetup, protection: Protection, parent: &Path) -> Result<Self, HarnessError> {
        let directory = TempDir::new_in(parent).context(|| format!("create a directory in {}", parent.display()))?;
        let mut setup = setup.clone();
        let hosts: &[HostId] = match protection {
            Protection::Pair => &[HostId::B, HostId::A],
            Protection::Alone | Protection::Unrecorded => {
                setup.ft_log_arguments.push("--alone".to_owned());
                if protection == Protection::Unrecorded {
                    setup.shim_arguments.push("--unrecorded".to_owned());
                }
                &[HostId::A]
            }
        };
        let deadline = Instant::now() + setup.guest.patience().boot;
        let mut pair = Pair::new(setup, directory.path())?;
        pair.start_hosts(hosts, deadline)?;
        if protection == Protection::Pair {
            pair.wait_for_pairing(deadline)?;
        }
        pair.wait_for_guest(deadline)?;
        let client = Client::connect(pair.topology().client(), GUEST.into(), deadline)?;
        Ok(Self {
            client,
            pair,
            _directory: directory,
        })
    }
}
