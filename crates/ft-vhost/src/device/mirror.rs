//! The primary's half of engine `device`: what the device changes is logged, and completions wait until it is committed.
//!
//! ```text
//!  [Recording, Arbitrating]  append ─► marker ─► ... ─► committed ─► the guest is told
//!  [Live, synchronising]     append ─► marker ─► the guest is told: all is committed
//!  [Live]                    there is no backup: nothing is logged, nothing waits
//!  [any other role]          nothing may be changed any more (Halted), or yet
//! ```

use std::{os::unix::net::UnixStream, sync::Arc};

use ft_client::{
    LogWriter, Region,
    events::Events,
    handshake::{self, DeviceSession, ShimSession},
    log::Urgency,
};
use ft_protocol::{
    Body, Committed, DeviceId, Generation, Lsn, Role, Stop,
    message::{Digest, Message},
};
use serde_json::json;
use tracing::{info, warn};
use vmm_sys_util::eventfd::EventFd;

use crate::{daemon::Doors, exit::End};

/// What became of a change that is to be logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logged {
    /// It is entry so-and-so; its completion waits for the commit.
    At(Lsn),
    /// There is no backup.
    Unprotected,
    /// Not now: the log is full, or this side may change nothing. To be asked again.
    NotNow,
}

/// A device's way into the log.
#[derive(Debug)]
pub struct Mirror {
    log: LogWriter,
    region: Arc<Region>,
    device: DeviceId,
}

impl Mirror {
    /// Appends an entry, if there is a backup to tell and room for it. Never waits.
    pub fn append(&mut self, queue: u16, body: &Body<'_>) -> Logged {
        match self.region.role() {
            Role::Live if self.region.synchronisation().is_none() => Logged::Unprotected,
            // Room stays: nobody else writes to this ring. A role that changes meanwhile commits the entry, or ends this side.
            Role::Live | Role::Recording | Role::Arbitrating if self.log.has_room(body) => self
                .log
                .append(self.device, queue, body, Urgency::Later)
                .map_or(Logged::NotNow, Logged::At),
            _ => Logged::NotNow,
        }
    }

    /// Appends the marker of what `queue` is about to send, as [`Mirror::append`] does. Once it is committed no other side was live before it, and
    /// everything that was logged before it is committed.
    pub fn mark(&mut self, queue: u16) -> Logged {
        self.append(queue, &Body::Kick(Stop::default()))
    }

    /// Live side: the last entry that the new backup is known to have applied.
    #[must_use]
    pub fn peer_applied(&self) -> Lsn {
        self.region.peer_applied()
    }

    /// Has ft-log take what was appended.
    pub fn announce(&mut self) {
        self.log.flush();
    }

    /// The VM is over, in order: so is the other side once it has read so far. The last entry.
    pub fn power_off(&mut self) {
        info!("nobody uses the disk: the VM ends in order");
        let stop = Stop::default();
        let body = Body::PowerOff { stop, reset: false };
        if self.log.has_room(&body) {
            // A side that halted meanwhile is over as well.
            let _ = self.log.append(self.device, 0, &body, Urgency::Now);
        }
    }

    /// Whether there is a backup, or may be: the arbiter has not decided.
    #[must_use]
    pub fn has_backup(&self) -> bool {
        matches!(self.region.role(), Role::Recording | Role::Arbitrating)
    }
}

/// Lets frontends in.
pub(crate) type Open = Box<dyn FnOnce() -> Result<Doors, End>>;

/// What the device's loop has to do with ft-log.
pub(crate) struct Link {
    pub(super) stream: UnixStream,
    pub(super) commit_event: EventFd,
    region: Arc<Region>,
    device: DeviceId,
    /// Frontends are let in once this entry is committed: the backup would then take over.
    opening: Option<(Lsn, Open)>,
    doors: Option<Doors>,
    protected: bool,
    /// A disk: the seat of the shim, which the VM has none of.
    shim: Option<ShimSession>,
    frame: Vec<u8>,
    /// The last fall of the watermark that the device obeys.
    obeyed: u32,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

/// Where a side that begins to serve stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It goes on.
    Serves,
    /// It goes on, and from now on without a backup. Said once.
    Unprotected,
    /// The log is complete on both sides: an end in order.
    Over,
}

impl Link {
    /// Begins to serve, in [`Role::Recording`] or [`Role::Live`]: gives the device its mirror, and the log its first entry, which is the
    /// disk's to write (`boot`). A disk has the shim's seat.
    pub(crate) fn begin(
        session: DeviceSession,
        shim: Option<ShimSession>,
        role: Role,
        boot: Option<&Body<'_>>,
        open: Open,
    ) -> (Self, Mirror) {
        let mut mirror = Mirror {
            log: session.log,
            region: Arc::clone(&session.region),
            device: session.device,
        };
        let protected = role != Role::Live;
        // Without an entry the backup would have nothing to take over, and would not.
        let marker = match boot.map(|boot| mirror.append(0, boot)) {
            Some(Logged::At(marker)) => marker,
            Some(Logged::Unprotected | Logged::NotNow) => Lsn::ZERO,
            None => Lsn::ZERO.next(),
        };
        mirror.announce();
        if !protected {
            warn!("there is no backup: nothing is replicated, and nothing is held");
        }
        let link = Self {
            stream: session.stream,
            commit_event: session.commit_event,
            region: session.region,
            device: session.device,
            opening: Some((marker, open)),
            doors: None,
            protected,
            shim,
            frame: Vec::new(),
            obeyed: 0,
        };
        (link, mirror)
    }

    pub(super) fn committed(&self) -> Committed {
        self.region.committed()
    }

    pub(super) fn generation(&self) -> Generation {
        self.region.generation()
    }

    /// Looks at the role, and lets frontends in when it is time.
    pub(super) fn stand(&mut self, events: &mut Events) -> Result<Standing, End> {
        match self.region.role() {
            Role::Halted => return Err(End::Halted),
            Role::Off => return Ok(Standing::Over),
            Role::Live if std::mem::replace(&mut self.protected, false) => {
                warn!("the backup is gone: from here on nothing is replicated, and nothing is held");
                events.emit("unprotected", json!({ "generation": self.generation().0 }));
                return Ok(Standing::Unprotected);
            }
            Role::Recording if !std::mem::replace(&mut self.protected, true) => {
                info!("from here on writes wait for the new backup");
                events.emit("protected", json!({ "generation": self.generation().0 }));
            }
            _ => {}
        }
        let due = |(marker, _): &mut (Lsn, Open)| self.region.committed().covers(*marker);
        if let Some((_, open)) = self.opening.take_if(due) {
            self.doors = Some(open()?);
            events.emit(
                "serving",
                json!({ "generation": self.generation().0, "protected": self.protected }),
            );
        }
        Ok(Standing::Serves)
    }

    /// The synchronisation of a new backup that goes on.
    pub(super) fn synchronisation(&self) -> Option<u32> {
        self.region.synchronisation()
    }

    /// What the new backup's device says.
    pub(super) fn next_digests(&mut self) -> Result<Option<(u64, Vec<Digest>)>, End> {
        let Some(shim) = &mut self.shim else { return Ok(None) };
        loop {
            self.frame.clear();
            let popped = shim.replay.pop(&mut self.frame).map_err(End::environment)?;
            if popped.is_none() {
                return Ok(None);
            }
            if let Ok((_, Message::Digests { sector, digests })) = Message::decode(&self.frame) {
                return Ok(Some((sector, digests)));
            }
        }
    }

    /// The watermark fell, and the device does not obey yet: nothing may leave by what was read before.
    pub(super) fn fall(&self) -> Option<u32> {
        Some(self.region.holds()).filter(|holds| *holds != self.obeyed)
    }

    /// The device reads the watermark anew from here on.
    pub(super) fn obey(&mut self, holds: u32) {
        self.obeyed = holds;
        self.region.obey(self.device, holds);
        if let Some(shim) = &self.shim {
            shim.log.ring_doorbell();
        }
    }

    /// The entry that the loop waits for, if the device waits for none: the first one.
    pub(super) fn awaits(&self) -> Option<Lsn> {
        self.opening.as_ref().map(|(marker, _)| *marker)
    }

    /// Asks to be woken when `marker` is committed; `false` if it is already.
    pub(super) fn sleeps_until(&self, marker: Option<Lsn>) -> bool {
        let Some(marker) = marker else { return true };
        self.region.want_commit(self.device, marker);
        !self.region.committed().covers(marker)
    }

    pub(super) fn report(&mut self, end: &End) {
        handshake::report_failure(&mut self.stream, &end.to_string());
    }
}
