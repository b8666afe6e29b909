//! Appending to the log: claim an LSN, encode in place, publish.
//!
//! Waking `ft-log` costs more than everything else here, and most entries need not hurry: nobody outside waits for them until
//! an output does. So only the marker of an output is [`Urgency::Now`]; what is [`Urgency::Later`] travels with the next one, or
//! when the guest has been idle for a moment ([`LogWriter::flush`]), or before the ring gets full.

use std::{sync::Arc, time::Duration};

use ft_protocol::{
    entry::Body,
    ids::{DeviceId, Lsn},
    message::Message,
    replica::Role,
};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::{region::Region, ring::Producer};

/// The replica is over; whoever sees this must end.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the replica ended ({role:?}): ft-log's log says why")]
pub struct Ended {
    /// How it ended.
    pub role: Role,
}

/// Bytes that nobody was told of, at which an entry that could wait is announced all the same.
const QUIET_BYTES_MAX: usize = 256 * 1024;
const _: () = assert!(QUIET_BYTES_MAX <= ft_protocol::limits::RING_BYTES / 4);

/// When `ft-log` must take an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Somebody outside waits for its commit.
    Now,
    /// Nobody does.
    Later,
}

/// How long a producer sleeps on a full log before it looks whether the replica still runs.
const ALIVE_CHECK: Duration = Duration::from_millis(100);

/// One process's way into the log of its VM.
#[derive(Debug)]
pub struct LogWriter {
    ring: Producer,
    doorbell: EventFd,
    region: Arc<Region>,
    quiet: bool,
    /// Bytes appended since the consumer was last looked after.
    quiet_bytes: usize,
}

impl LogWriter {
    /// A writer on `ring`, whose consumer listens to `doorbell`.
    #[must_use]
    pub fn new(ring: Producer, doorbell: EventFd, region: Arc<Region>) -> Self {
        Self {
            ring,
            doorbell,
            region,
            quiet: false,
            quiet_bytes: 0,
        }
    }

    /// Appends an entry in the current generation and gives its LSN. A full log stops the caller: that is the log's flow control.
    ///
    /// # Errors
    /// [`Ended`] when the replica halted while the caller waited.
    pub fn append(&mut self, device: DeviceId, queue: u16, body: &Body<'_>, urgency: Urgency) -> Result<Lsn, Ended> {
        let length = body.frame_bytes();
        if !self.ring.fits(length) {
            self.wait_for_space(length)?;
        }
        // Room first, claim second: a claimed LSN that is not published would stop everybody's entries behind it.
        let lsn = self.region.claim_lsn();
        let generation = self.region.generation();
        self.ring.push(length, |out| {
            body.encode(lsn, generation, device, queue, out);
        });
        self.quiet = true;
        self.quiet_bytes += length;
        // To look whether the consumer sleeps costs more than the rest of this: it is done when somebody waits, or once for many entries.
        if urgency == Urgency::Now || self.quiet_bytes >= QUIET_BYTES_MAX {
            self.flush();
        }
        Ok(lsn)
    }

    #[cold]
    fn wait_for_space(&mut self, length: usize) -> Result<(), Ended> {
        while !self.ring.fits(length) {
            let role = self.region.role();
            if role == Role::Halted {
                return Err(Ended { role });
            }
            self.ring.wait_for_space(length, ALIVE_CHECK);
        }
        Ok(())
    }

    /// Whether [`LogWriter::append`] would take an entry with this body without waiting.
    pub fn has_room(&mut self, body: &Body<'_>) -> bool {
        self.ring.fits(body.frame_bytes())
    }

    /// New backup: hands `ft-log` a message for the survivor; `false` where there is no room. It is no entry, and has no LSN.
    pub fn tell(&mut self, message: &Message) -> bool {
        let mut frame = Vec::new();
        message.encode(self.region.generation(), &mut frame);
        if !self.ring.fits(frame.len()) {
            return false;
        }
        self.ring.push(frame.len(), |out| out.copy_from_slice(&frame));
        self.ring_doorbell();
        true
    }

    /// Announces what was appended quietly, if anything. A log that is awake looks at its rings before it sleeps.
    pub fn flush(&mut self) {
        self.quiet_bytes = 0;
        if std::mem::take(&mut self.quiet) && self.ring.must_ring() {
            self.ring_doorbell();
        }
    }

    /// Whether something was appended that `ft-log` may not know of.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Makes `ft-log` look at the region and the rings.
    pub fn ring_doorbell(&self) {
        // A doorbell that cannot be rung is full, and thus rung.
        let _ = self.doorbell.write(1);
    }
}

#[cfg(test)]
mod tests {
    use ft_protocol::entry::{Entry, Stop};

    use super::*;
    use crate::ring::{self, Consumer};

    #[test]
    fn a_sleeping_log_is_rung_for_outputs_and_for_the_rest_on_request() {
        let region = Arc::new(Region::create().unwrap());
        let memory = ring::create("test").unwrap();
        let consumer = Consumer::new(memory.fd().try_clone_to_owned().unwrap()).unwrap();
        let bell = EventFd::new(nix::libc::EFD_NONBLOCK).unwrap();
        let mut writer = LogWriter::new(Producer::on(memory), bell.try_clone().unwrap(), region);
        let append = |writer: &mut LogWriter, urgency| {
            writer
                .append(DeviceId(0), 0, &Body::Kick(Stop::default()), urgency)
                .unwrap();
            bell.read().is_ok()
        };
        consumer.set_sleeping(true);
        assert!(!append(&mut writer, Urgency::Later));
        assert!(append(&mut writer, Urgency::Now));
        consumer.set_sleeping(true);
        assert!(!append(&mut writer, Urgency::Later) && writer.is_quiet());
        writer.flush();
        assert!(bell.read().is_ok() && !writer.is_quiet());
        consumer.set_sleeping(true);
        let rung = (0..100_000).find(|_| append(&mut writer, Urgency::Later));
        assert!(rung.is_some(), "a backlog grew without bound");
    }

    #[test]
    fn entries_of_two_writers_are_one_dense_order() {
        let region = Arc::new(Region::create().unwrap());
        let mut consumers = Vec::new();
        let writers: Vec<_> = (0..2u8)
            .map(|device| {
                let memory = ring::create("test").unwrap();
                consumers.push(Consumer::new(memory.fd().try_clone_to_owned().unwrap()).unwrap());
                let writer = LogWriter::new(Producer::on(memory), EventFd::new(0).unwrap(), Arc::clone(&region));
                (device, writer)
            })
            .map(|(device, mut writer)| {
                std::thread::spawn(move || {
                    for _ in 0..1000 {
                        writer
                            .append(DeviceId(device), 0, &Body::Kick(Stop::default()), Urgency::Now)
                            .unwrap();
                    }
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        let mut bytes = Vec::new();
        for lsn in 1..=2000 {
            let ready = |consumer: &mut Consumer| consumer.peek_lsn().unwrap() == Some(lsn);
            let from = consumers.iter_mut().position(ready).expect("dense");
            bytes.clear();
            consumers[from].pop(&mut bytes).unwrap();
            assert_eq!(Entry::decode(&bytes).unwrap().lsn, Lsn(lsn));
        }
    }
}
