//! The backup's half of engine `device`: entries are applied in their order, until this side is to serve.
//!
//! ```text
//!  Pairing ─► Replaying: apply ─► GoingLive: apply the rest ─► Live: serve
//!     └─────► Recording: serve                                Off, asked to end: the end
//! ```
//! One plain loop: entries have an order, and nobody waits for this thread but the log's room.

use std::{
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use ft_client::{LogWriter, Region, handshake::ShimSession, ring::Consumer};
use ft_protocol::{Body, Lsn, Role, entry::Entry, message::Message};
use tracing::info;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Device, Part, Uring};
use crate::{daemon::Signals, exit::End};

const TOKEN_SIGNALS: u64 = 0;
const TOKEN_LOG: u64 = 1;
const TOKEN_STOP: u64 = 2;

/// Why nothing is followed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Followed {
    /// This side serves, in this role.
    Serve(Role),
    /// The VM is over, or the daemon was asked to end.
    Over,
}

/// What the watching thread saw.
#[derive(Debug, Default)]
struct Seen {
    asked_to_end: AtomicBool,
    log_gone: AtomicBool,
}

/// Follows until this side is to serve.
///
/// # Errors
/// [`End`]; where the device could not apply an entry, ft-log is to be told.
pub(crate) fn follow(device: &mut impl Device, shim: &mut ShimSession, signals: &Signals) -> Result<Followed, End> {
    let stop = EventFd::new(EFD_NONBLOCK).map_err(End::environment)?;
    let seen = Seen::default();
    let (region, stream) = (Arc::clone(&shim.region), shim.stream.as_raw_fd());
    std::thread::scope(|scope| {
        scope.spawn(|| watch([signals.as_raw_fd(), stream, stop.as_raw_fd()], &seen, &region));
        let mut follower = Follower {
            device,
            replay: &mut shim.replay,
            region: Arc::clone(&shim.region),
            log: &mut shim.log,
            frame: Vec::new(),
            applied: Lsn::ZERO,
            unsynced: false,
        };
        let result = follower.run(&seen);
        // A stop that cannot be rung is full, and thus rung.
        let _ = stop.write(1);
        result
    })
}

/// Wakes the follower when it is asked to end, and when ft-log is gone.
fn watch([signals, stream, stop]: [i32; 3], seen: &Seen, region: &Region) {
    let Ok(mut io) = Uring::new() else {
        // There was one a moment ago; without one nobody would hear of an end.
        seen.log_gone.store(true, Ordering::Release);
        region.wake_shim();
        return;
    };
    for (fd, token) in [(signals, TOKEN_SIGNALS), (stream, TOKEN_LOG), (stop, TOKEN_STOP)] {
        io.poll(fd, token);
    }
    loop {
        io.wait(None);
        while let Some(completion) = io.next_completion() {
            match completion.token {
                TOKEN_SIGNALS => seen.asked_to_end.store(true, Ordering::Release),
                // It says nothing after its welcome: readable is its end.
                TOKEN_LOG => seen.log_gone.store(true, Ordering::Release),
                _ => return,
            }
            region.wake_shim();
        }
    }
}

struct Follower<'a, D> {
    device: &'a mut D,
    replay: &'a mut Consumer,
    region: Arc<Region>,
    /// For its doorbell, and what a survivor asks.
    log: &'a mut LogWriter,
    frame: Vec<u8>,
    applied: Lsn,
    /// Entries were applied that nothing made durable since.
    unsynced: bool,
}

impl<D: Device> Follower<'_, D> {
    fn run(&mut self, seen: &Seen) -> Result<Followed, End> {
        let mut told = Role::Pairing;
        loop {
            // What comes after the ticket was taken wakes.
            let ticket = self.region.shim_ticket();
            let (role, gone) = (self.region.role(), seen.log_gone.load(Ordering::Acquire));
            let moved = self.apply_all()?;
            if std::mem::replace(&mut told, role) != role {
                info!(?role, "following");
            }
            match role {
                Role::Recording => return Ok(Followed::Serve(role)),
                Role::Live => {
                    self.sync()?;
                    // Who takes over has an entry at least.
                    self.device.take_part(match self.applied {
                        Lsn::ZERO => Part::Alone,
                        _ => Part::Last,
                    })?;
                    return Ok(Followed::Serve(role));
                }
                Role::Halted => return Err(End::Halted),
                Role::Off => {
                    self.sync()?;
                    self.device.take_part(Part::Last)?;
                    return Ok(Followed::Over);
                }
                // ft-log looks how far this side is when it is rung.
                Role::GoingLive => self.log.ring_doorbell(),
                _ => {}
            }
            if seen.asked_to_end.load(Ordering::Acquire) {
                info!("asked to end: this ends the replica");
                self.sync()?;
                return Ok(Followed::Over);
            }
            if gone {
                return Err(End::LogGone);
            }
            if !moved {
                self.region.sleep_shim(ticket, None);
            }
        }
    }

    /// Applies what is there; whether there was something.
    fn apply_all(&mut self) -> Result<bool, End> {
        let before = self.applied;
        loop {
            self.frame.clear();
            let popped = self.replay.pop(&mut self.frame).map_err(End::environment)?;
            if popped.is_none() {
                return Ok(self.applied != before);
            }
            self.apply()?;
            if self.region.set_consumed(self.applied) {
                self.log.ring_doorbell();
            }
        }
    }

    /// Applies the entry in `frame`.
    fn apply(&mut self) -> Result<(), End> {
        let entry = Entry::decode(&self.frame).map_err(End::environment)?;
        if self.applied == Lsn::ZERO {
            // A new backup begins where its synchronisation did.
            self.applied = self.region.start();
        }
        if entry.lsn != self.applied.next() {
            return Err(End::Replica(format!(
                "entry {} follows entry {}: the log has a gap",
                entry.lsn, self.applied
            )));
        }
        match entry.body {
            // A kick marks frames of a card of this VM: the primary's to send.
            Body::Boot { .. }
            | Body::PowerOff { .. }
            | Body::Synced { .. }
            | Body::Transferred
            | Body::Configuration(_)
            | Body::Kick(_) => {}
            Body::Compare { sector, sectors } => {
                let digests = self.device.digests(sector, sectors)?;
                if !self.log.tell(&Message::Digests { sector, digests }) {
                    return Err(End::Replica("the survivor asks more than it listens to".into()));
                }
            }
            Body::Flush => {
                if std::mem::replace(&mut self.unsynced, false) {
                    self.device.apply(&Body::Flush)?;
                }
            }
            body => {
                self.device.apply(&body)?;
                self.unsynced = true;
            }
        }
        self.applied = entry.lsn;
        Ok(())
    }

    fn sync(&mut self) -> Result<(), End> {
        if std::mem::replace(&mut self.unsynced, false) {
            self.device.apply(&Body::Flush)?;
        }
        Ok(())
    }
}
