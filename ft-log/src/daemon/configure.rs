//! A new configuration of the running pair: the operator's order becomes an entry, the entry becomes the times of both sides.
//!
//! ```text
//!  order ──► entry of ft-log's own, in its place among those of the clients ──► times of this side ──► answer
//!                                                  └──── logging channel ─────► times of the backup
//! ```

use std::io;

use ft_protocol::{Body, DeviceId, Event, Lsn, Role, Timing, entry::Entry};
use serde_json::json;
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::Daemon;
use crate::control::configure::{self, Order};

/// An order whose entry is claimed and not yet taken.
#[derive(Debug)]
pub(super) struct Pending {
    lsn: Lsn,
    answer: oneshot::Sender<configure::Answer>,
}

impl Daemon {
    /// Writes the operator's change down, or says why not.
    pub(super) fn configure(&mut self, order: Order) -> io::Result<()> {
        let Order { change, answer } = order;
        let replica = &self.vm.replica;
        let wanted = match self.configuring {
            Some(_) => Err("the change before this one is not in the log yet: try again".into()),
            None => replica.takes_configuration().and_then(|()| change.of(replica.timing())),
        };
        match wanted {
            Ok(timing) => {
                let lsn = self.append_own(&Body::Configuration(timing));
                self.configuring = Some(Pending { lsn, answer });
                // Nobody rings for what this thread writes itself.
                self.record().map(drop)
            }
            Err(reason) => {
                warn!("the configuration stays as it is: {reason}");
                // Nobody waits any more, or hears it.
                let _ = answer.send(Err(reason));
                Ok(())
            }
        }
    }

    /// Claims the next LSN for an entry of ft-log's own and puts it among those of the clients.
    pub(super) fn append_own(&mut self, body: &Body<'_>) -> Lsn {
        let lsn = self.vm.local.region.claim_lsn();
        let entry = Entry {
            lsn,
            generation: self.vm.replica.generation(),
            device: DeviceId::SHIM,
            queue: 0,
            body: *body,
        };
        let mut frame = vec![0; body.frame_bytes()];
        entry.encode(&mut frame);
        self.vm.local.merger.insert(lsn, frame);
        lsn
    }

    /// The entry is in the log of this side: its times are in force.
    pub(super) fn note_configuration(&mut self, lsn: Lsn, timing: Timing) -> io::Result<()> {
        self.handle(Event::ConfigurationEntry { lsn, timing })?;
        let mut shown = configure::show(&timing);
        info!("the configuration of entry {lsn} is in force: {shown}");
        if let Some(fields) = shown.as_object_mut() {
            fields.insert("lsn".into(), json!(lsn.0));
        }
        self.events.emit("configured", shown);
        if let Some(Pending { answer, .. }) = self.configuring.take_if(|pending| pending.lsn == lsn) {
            let _ = answer.send(Ok((lsn, timing)));
        }
        self.apply_timing()
    }

    /// A pair was made: a backup has the times of its primary, which may not be those that it was started with.
    pub(super) fn note_timing_of_pair(&mut self) -> io::Result<()> {
        let (own, now) = (self.config.timing(), *self.vm.replica.timing());
        if self.vm.replica.role() == Role::Replaying && own != now {
            info!(
                "the times are those of the primary, {}, and not {}",
                configure::show(&now),
                configure::show(&own)
            );
        }
        self.apply_timing()
    }

    /// What the shell itself keeps time with.
    fn apply_timing(&mut self) -> io::Result<()> {
        let timeout_ms = self.vm.replica.timing().channel_timeout_ns / 1_000_000;
        self.vm.link.set_timeout(u32::try_from(timeout_ms).unwrap_or(u32::MAX))
    }
}
