//! Where a replay's entries come from: ft-log, entry by entry as they arrive, or a finished journal.

use std::{sync::Arc, time::Duration};

use ft_client::{LogWriter, Region, log::Ended, ring::Consumer};
use ft_protocol::{Generation, Lsn, replica::Role};

use crate::error::Error;

/// How long to sleep at most, so that a replica that ended without a wake-up is noticed.
const ALIVE_CHECK: Duration = Duration::from_millis(500);

/// A source of frames.
pub trait Source {
    /// Puts the next frame into `frame` (cleared first), waiting for it if need be. `None`: the log is over, and this side is to
    /// go on with that generation.
    ///
    /// # Errors
    /// The replica ended, or the log is damaged.
    fn next(&mut self, frame: &mut Vec<u8>) -> Result<Option<Generation>, Error>;

    /// The guest powered off at the last entry: returns when the log's keeper knows.
    ///
    /// # Errors
    /// The replica ended otherwise.
    fn finish(&mut self) -> Result<(), Error>;
}

/// Entries from ft-log.
#[derive(Debug)]
pub struct Online {
    ring: Consumer,
    region: Arc<Region>,
    /// For its doorbell only: a following shim appends nothing.
    log: LogWriter,
    taken: u64,
}

impl Online {
    /// A source over the replay ring.
    #[must_use]
    pub fn new(ring: Consumer, region: Arc<Region>, log: LogWriter) -> Self {
        Self {
            ring,
            region,
            log,
            taken: 0,
        }
    }

    /// The way into the log, for whoever goes on after the replay.
    #[must_use]
    pub fn into_parts(self) -> (LogWriter, Arc<Region>) {
        (self.log, self.region)
    }

    fn wait_for(&self, ticket: u32) {
        self.region.sleep_shim(ticket, Some(ALIVE_CHECK));
    }
}

impl Source for Online {
    fn next(&mut self, frame: &mut Vec<u8>) -> Result<Option<Generation>, Error> {
        let mut told = false;
        loop {
            let ticket = self.region.shim_ticket();
            let role = self.region.role();
            frame.clear();
            let popped = self
                .ring
                .pop(frame)
                .map_err(|error| Error::environment(format!("ft-log's replay ring: {error}")))?;
            // Whoever asks for the next entry has applied the one before.
            if self.region.set_consumed(Lsn(self.taken)) {
                self.log.ring_doorbell();
            }
            if popped.is_some() {
                self.taken += 1;
                return Ok(None);
            }
            match role {
                Role::Halted | Role::Off => return Err(Ended { role }.into()),
                Role::Live => return Ok(Some(self.region.generation())),
                Role::GoingLive if !told => {
                    told = true;
                    self.log.ring_doorbell();
                }
                _ => self.wait_for(ticket),
            }
        }
    }

    fn finish(&mut self) -> Result<(), Error> {
        let _ = self.region.set_consumed(Lsn(self.taken));
        self.log.ring_doorbell();
        loop {
            let ticket = self.region.shim_ticket();
            match self.region.role() {
                Role::Off => return Ok(()),
                role @ Role::Halted => return Err(Ended { role }.into()),
                _ => self.wait_for(ticket),
            }
        }
    }
}
