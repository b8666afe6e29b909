//! What the peer sends: entries into the shim's replay ring, messages to the core.
//!
//! An entry is acknowledged only after it is in the ring; the shim is woken after the acknowledgement left, and not for every batch. When
//! the ring is full nothing more is received: TCP then stops the primary. So it is when outputs wait for this side's journal and its
//! disk is slower than the log. An entry that is there already came again because the channel broke, and is dropped.

use std::io;

use ft_client::events::monotonic_ns;
use ft_protocol::{
    Event, Lsn, Place, Role,
    entry::{self, Body, Entry, KIND_CONFIGURATION, KIND_POWER_OFF, KIND_SYNCED, KIND_TRANSFERRED},
    frame::{self, KIND_MESSAGE_FIRST},
    message::Message,
};
use tracing::warn;

use super::Daemon;
use crate::{exit::Exit, merge::Batch};

/// A shim that was woken for what was received is woken again with the first entries after this time: a replay that trails by so little costs
/// nothing, and a wake-up more than an entry.
const NEWS_PAUSE_NS: u64 = 1_000_000;
/// Or after this time, if no more entries come. A timer that is nearer costs more than the wake-up.
const NEWS_WAIT_NS: u64 = 5_000_000;
/// Offset of the kind in a frame's header.
const KIND: usize = 20;

/// Why a run of entries ended.
enum Stop {
    /// The next frame is not there yet.
    Starved,
    /// The replay ring has no room, or a journal that is waited for has none.
    Full,
    /// A control message of this length is next.
    Message(usize),
    /// The bytes that are next are not what a peer may send.
    Damaged(String),
}

impl Daemon {
    /// Goes through everything that was received.
    pub(super) fn receive_log(&mut self) -> io::Result<()> {
        self.vm.is_full = false;
        while self.vm.link.channel.is_some() {
            let stop = self.store_entries()?;
            // The acknowledgement may have found a gap, or the power-off ended the pair.
            let Some(channel) = &mut self.vm.link.channel else {
                break;
            };
            match stop {
                // The next receive starts behind what is to be sent.
                Stop::Starved => return Ok(()),
                Stop::Full => {
                    self.vm.is_full = true;
                    return Ok(());
                }
                Stop::Message(length) => {
                    let position = channel.position();
                    let decoded = Message::decode(&channel.unused()[..length]);
                    channel.taken(length);
                    match decoded {
                        Ok((generation, message @ Message::Digests { .. })) => self.digests_came(generation, &message),
                        Ok((generation, message @ Message::Ack(_))) => {
                            self.handle(Event::Message { generation, message })?;
                            self.show_applied();
                        }
                        Ok((generation, message)) => self.handle(Event::Message { generation, message })?,
                        Err(error) => return self.damaged(format!("at byte {position}: {error}")),
                    }
                }
                Stop::Damaged(reason) => return self.damaged(reason),
            }
        }
        Ok(())
    }

    /// Tells the core when the replay ring gets full and when it is not any more.
    pub(super) fn tell_full(&mut self) -> io::Result<()> {
        let full = self.vm.is_full;
        if std::mem::replace(&mut self.vm.told_full, full) != full {
            self.handle(Event::ReplayFull { full })?;
        }
        Ok(())
    }

    /// Puts the entries at the start of what was received into the replay ring, and acknowledges them all at once.
    fn store_entries(&mut self) -> io::Result<Stop> {
        let flushes_first = self.is_waited_for();
        let Some(channel) = &mut self.vm.link.channel else {
            return Ok(Stop::Starved);
        };
        let generation = self.vm.replica.generation();
        let from = self.vm.replica.last().next();
        let mut next = from;
        let (mut power_off, mut synced) = (None, None);
        let mut configurations = Vec::new();
        let received = channel.unused();
        let (mut used, mut known) = (0, 0);
        let stop = loop {
            let rest = &received[used..];
            let place = || format!("entry {next} at byte {}", channel.position() + used as u64);
            let length = match frame::peek_length(rest) {
                Ok(Some(length)) if length <= rest.len() => length,
                Ok(_) => break Stop::Starved,
                Err(error) => break Stop::Damaged(format!("{}: {error}", place())),
            };
            if rest[KIND] >= KIND_MESSAGE_FIRST {
                break Stop::Message(length);
            }
            let bytes = &rest[..length];
            let header = match entry::check(bytes) {
                Ok(header) => header,
                Err(error) => break Stop::Damaged(format!("{}: {error}", place())),
            };
            match self.vm.replica.place(header.generation, header.lsn, Lsn(next.0 - 1)) {
                Place::Next => {}
                // Only what comes first can be known: the entries behind it follow each other.
                Place::Known if next == from => {
                    used += length;
                    known = used;
                    continue;
                }
                Place::Known | Place::Foreign => {
                    break Stop::Damaged(format!(
                        "{}: entry {} of generation {} came there",
                        place(),
                        header.lsn,
                        header.generation
                    ));
                }
            }
            let is_written = !flushes_first || self.vm.journal.has_room(used - known + length);
            if !is_written || !self.vm.local.replay.fits(length) {
                break Stop::Full;
            }
            self.vm.local.replay.stage(length, |out| out.copy_from_slice(bytes));
            match header.kind {
                KIND_POWER_OFF => power_off = Some(next),
                KIND_TRANSFERRED => self.vm.transferred = Some(next),
                KIND_CONFIGURATION | KIND_SYNCED => match Entry::decode(bytes).map(|entry| entry.body) {
                    Ok(Body::Configuration(timing)) => configurations.push((next, timing)),
                    Ok(Body::Synced { instance }) => synced = Some((next, instance)),
                    _ => {}
                },
                _ => {}
            }
            used += length;
            next = next.next();
        };
        self.vm.local.replay.publish();
        let through = Lsn(next.0 - 1);
        let journalled = if used > known {
            self.vm
                .journal
                .append(&received[known..used], from, through, monotonic_ns())
        } else {
            Ok(())
        };
        channel.taken(used);
        if used > known {
            let batch = Batch {
                from,
                through,
                power_off,
                configuration: None,
                synced,
            };
            self.count(batch, used - known);
            self.note_synced(batch)?;
            self.handle(Event::Received {
                generation,
                from,
                through,
            })?;
            self.vm.has_news = true;
            if let Err(failure) = journalled {
                self.journal_failed(failure)?;
            }
            for (lsn, timing) in configurations {
                self.note_configuration(lsn, timing)?;
            }
            self.note(batch)?;
        }
        Ok(stop)
    }

    /// When the shim hears of what was received at the latest; `None` if there is nothing new.
    pub(super) fn news_due_ns(&self) -> Option<u64> {
        self.vm.has_news.then_some(self.vm.told_shim_ns + NEWS_WAIT_NS)
    }

    /// Wakes the shim for what was received, once the acknowledgement is on its way: waking costs more than sending.
    pub(super) fn tell_shim(&mut self) -> io::Result<()> {
        let vm = &self.vm;
        let is_awaited = vm.replica.awaits_replay() || vm.is_full || vm.power_off.is_some();
        if !vm.has_news || !is_awaited && monotonic_ns() < vm.told_shim_ns + NEWS_PAUSE_NS {
            return Ok(());
        }
        if self.ring.has_queued() {
            self.ring.enter(None)?;
        }
        self.vm.has_news = false;
        self.vm.told_shim_ns = monotonic_ns();
        self.vm.local.region.wake_shim();
        Ok(())
    }

    /// The peer sent what no peer sends. Before pairing that is a stranger on the backup's port; in a pair it is a damaged log,
    /// and this side cannot go on with it.
    fn damaged(&mut self, reason: String) -> io::Result<()> {
        if self.vm.replica.role() == Role::Pairing && !self.vm.leads() {
            warn!("closed a connection that does not speak this protocol: {reason}");
            return self.drop_channel();
        }
        self.fail(
            Exit::Environment,
            format!("what came over the logging channel is damaged: {reason}"),
        )
    }
}
