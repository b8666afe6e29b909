//! A new configuration of a running pair: an entry of the log, so that both sides keep the same times, whoever goes live.
//!
//! ```text
//!  primary: appended ────────────────────────► received there: only the new times
//!           sends as often, and is as patient, as either demands
//!  backup:            received: only the new times
//! ```
//! A pair begins with the times of the side that executes the VM, which its hello says.
//!
//! Between the two moments one side has the new times and the other one may not. Nobody is suspected for that: until the backup has the entry,
//! the primary speaks as often as the shorter interval says and waits as long as the longer silence allows.

use super::{Replica, Role};
use crate::{ids::Lsn, message::Hello, timing::Timing, versions::Versions};

/// Primary: the times that the backup may still have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Changing {
    /// The entry with the newest ones.
    lsn: Lsn,
    heartbeat_interval_ns: u64,
    silence_ns: u64,
    channel_timeout_ns: u64,
}

impl Replica {
    /// The times in force.
    #[must_use]
    pub fn timing(&self) -> &Timing {
        &self.config.timing
    }

    /// Whether [`crate::Body::Configuration`] may be appended now.
    ///
    /// # Errors
    /// Why not, for the operator.
    pub fn takes_configuration(&self) -> Result<(), String> {
        if !self.leads || !matches!(self.role, Role::Recording | Role::Live) {
            return Err(format!(
                "this side is {:?}: the side that executes the VM, recording or live, takes a configuration, and the other one has it from there",
                self.role
            ));
        }
        if self.is_pair() && self.version < Some(Versions::FIRST_WITH_TIMING) {
            return Err(format!(
                "the other host speaks protocol version {}, and a configuration needs {}: bring it to this release first",
                self.version.unwrap_or_default(),
                Versions::FIRST_WITH_TIMING
            ));
        }
        Ok(())
    }

    /// Between two heartbeats of this side.
    pub(super) fn heartbeat_interval_ns(&self) -> u64 {
        let of = |changing: &Changing| changing.heartbeat_interval_ns;
        let new = self.config.timing.heartbeat_interval_ns;
        self.changing.as_ref().map_or(new, of).min(new)
    }

    /// Silence after which the peer is suspected.
    pub(super) fn silence_ns(&self) -> u64 {
        let new = self.config.timing.silence_ns();
        self.changing.map_or(new, |changing| changing.silence_ns).max(new)
    }

    /// How long the channel may be away or stand still.
    pub(super) fn channel_timeout_ns(&self) -> u64 {
        let new = self.config.timing.channel_timeout_ns;
        self.changing
            .map_or(new, |changing| changing.channel_timeout_ns)
            .max(new)
    }

    /// The entry with new times is in the log (the side that executes), or was received.
    pub(super) fn configuration_entry(&mut self, lsn: Lsn, timing: Timing) {
        if self.leads && self.is_pair() {
            self.changing = Some(Changing {
                lsn,
                heartbeat_interval_ns: self.heartbeat_interval_ns(),
                silence_ns: self.silence_ns(),
                channel_timeout_ns: self.channel_timeout_ns(),
            });
        } else if !self.leads && lsn > self.last {
            // It did not come this far.
            return;
        }
        self.config.timing = timing;
    }

    /// Primary: the backup has everything through `received`.
    pub(super) fn settle_configuration(&mut self) {
        let received = self.progress.received;
        self.changing.take_if(|changing| changing.lsn <= received);
    }

    /// Backup: the pair begins, with the times of the side that executes the VM.
    pub(super) fn adopt_timing(&mut self, other: &Hello) {
        if let Some(timing) = other.timing {
            self.config.timing = timing;
        }
    }
}
