//! Heartbeats: when one is due, what it says, and what the peer's say.
//!
//! ```text
//!  busy, or the peer is late   ●  ●  ●  ●  ●  ●     one an interval
//!  at rest                     ●           ●        one in four intervals, 80 of the usual 200 ms of silence
//!  the peer is late            ?──►  ◄──●           it is asked, every interval, and answers at once
//! ```
//! A pair is at rest when the backup has replayed everything there is. Its heartbeats say nothing but that both sides live, and a side that
//! misses one asks for it: what is left of the silence until suspicion is enough for several questions and answers, whatever datagram was lost.

use super::{Action, Replica, Sync};
use crate::{
    ids::Lsn,
    message::{Message, vm_hash},
    versions::Versions,
};

/// Most intervals between two heartbeats of a pair at rest.
const REST_INTERVALS_MAX: u32 = 4;

/// What a heartbeat of the peer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heard {
    pub(super) last: Lsn,
    pub(super) replayed: Lsn,
    pub(super) full: bool,
    pub(super) asks: bool,
}

/// This side's heartbeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Beat {
    /// When the last one left; `None` before the first one of a pair: it is due at once.
    sent_ns: Option<u64>,
    sequence: u64,
    /// The peer asks for one.
    is_asked: bool,
}

impl Beat {
    /// The next one is due at once.
    pub(super) fn begin(&mut self) {
        self.sent_ns = None;
    }
}

impl Replica {
    /// Whether there is nothing to tell but that this side lives.
    fn is_at_rest(&self) -> bool {
        self.version >= Some(Versions::FIRST_WITH_TIMING)
            && self.sync == Sync::Done
            && self.channel.open
            && self.channel.still_since_ns.is_none()
            && !self.replay_full
            && self.progress.replayed >= self.last
    }

    /// Time between two heartbeats of a pair at rest: at most two fifths of the silence until suspicion.
    fn rest_ns(&self) -> u64 {
        let intervals = (self.config.timing.heartbeat_misses * 2 / 5).clamp(1, REST_INTERVALS_MAX);
        self.heartbeat_interval_ns() * u64::from(intervals)
    }

    /// From when on the peer, at rest, is late.
    fn late_ns(&self) -> u64 {
        self.heard_ns
            .saturating_add(self.rest_ns() + self.heartbeat_interval_ns())
    }

    /// When the next heartbeat of a pair is due.
    pub(super) fn heartbeat_due_ns(&self) -> u64 {
        let Some(sent_ns) = self.beat.sent_ns else { return 0 };
        let interval_ns = self.heartbeat_interval_ns();
        let usual_ns = sent_ns.saturating_add(interval_ns);
        match self.is_at_rest() {
            // Whoever asks a lot gets no more answers than that.
            true if self.beat.is_asked => sent_ns.saturating_add(interval_ns / 2),
            true => usual_ns.max(self.late_ns()).min(sent_ns.saturating_add(self.rest_ns())),
            false => usual_ns,
        }
    }

    pub(super) fn send_heartbeat(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        let asks = self.is_at_rest() && now_ns >= self.late_ns();
        self.beat = Beat {
            sent_ns: Some(now_ns),
            sequence: self.beat.sequence + 1,
            is_asked: false,
        };
        let replayed = if self.leads { self.last } else { self.progress.replayed };
        actions.push(Action::SendHeartbeat(Message::Heartbeat {
            vm: vm_hash(&self.config.vm),
            lsn: self.last,
            sequence: self.beat.sequence,
            replayed,
            full: self.replay_full,
            asks,
        }));
    }

    pub(super) fn heartbeat(&mut self, now_ns: u64, heard: Heard, actions: &mut Vec<Action>) {
        self.heard_ns = now_ns;
        if !self.is_pair() {
            return;
        }
        self.beat.is_asked |= heard.asks;
        if !self.leads {
            if self.greets && heard.last > self.last && !self.replay_full {
                // Whoever connects must notice that another connection is needed.
                self.channel.still_since_ns.get_or_insert(now_ns);
            } else {
                self.channel.still_since_ns = None;
            }
            return;
        }
        // A backup that has not its state cannot make room, and the VM is not to wait for that.
        if heard.full && self.sync != Sync::Transfer && self.channel.still_since_ns.is_some() {
            // It stands still because the replay has no room: that is flow control.
            self.channel.still_since_ns = Some(now_ns);
        }
        // Datagrams are no acknowledgements: this is for the lag only.
        self.lag.replayed(heard.replayed.min(self.last));
        self.set_throttle(now_ns, actions);
    }
}
