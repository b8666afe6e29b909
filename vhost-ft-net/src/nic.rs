//! What frames do.
//!
//! ```text
//!  guest ─► alone: TAP     live: [hold] ─ committed ─► TAP     following: kept, for the primary may not have sent the last ones
//!  TAP ─► input (a batch per poll) ─► alone: delivered at once    live: logged first    following: overheard
//!  engine device: [marking] ─► [hold] ─ committed ─► TAP     TAP ─► delivered at once
//!  go live: announce, send the kept frames (a duplicate is legal on a network), take what was overheard
//! ```

use std::{collections::VecDeque, io};

use ft_client::{
    counters::{Counters, Lost, OfDevice, OfQueue},
    crash,
    events::{Events, monotonic_ns},
};
use ft_protocol::{Committed, Lsn};
use ft_vhost::{
    device::{Completion, Device, Input, Life, Mirror, Part, Uring},
    exit::End,
    guest_side::{
        BOUNCE, GuestSide,
        net::{FRAME_BYTES_MAX, Frame, HEADER_BYTES, LENGTH_BYTES, NetGuestSide, RECEIVE, Shape},
    },
};
use serde_json::json;
use tracing::{info, warn};

use crate::{
    announce::{self, Addresses, Repeats},
    capture::{Capture, Kind},
    hold::Hold,
    host_end::{HostEnd, Named},
    marking::Marking,
    overheard::Overheard,
    port::Port,
    telling::Teller,
};

/// Held bytes beyond which no further kick is answered: the guest stops.
const HELD_BYTES_MAX: usize = 16 << 20;
/// Frames of the guest that a backup keeps, newest first.
const KEPT_FRAMES_MAX: usize = 256;
/// And their age at which they are history: the primary has sent them, or has been gone for long.
const KEPT_AGE_NS: u64 = 5_000_000_000;
/// Frames and bytes in one input.
const BATCH_FRAMES_MAX: usize = 64;
const BATCH_BYTES_MAX: usize = 128 << 10;
/// Batches taken from the TAP before the guest's own queues are looked at again.
const BATCHES_MAX: u32 = 4;
/// How often hold times are reported.
const HOLD_EVENT_NS: u64 = 500_000_000;

const _: () = assert!(BATCH_BYTES_MAX + LENGTH_BYTES + FRAME_BYTES_MAX <= ft_protocol::limits::PAYLOAD_BYTES_MAX);

#[derive(Debug)]
struct Kept {
    frame: Frame,
    since_ns: u64,
}

/// The device.
#[derive(Debug)]
pub struct Nic {
    guest: NetGuestSide,
    mac: [u8; 6],
    host_end: Named,
    ports: Vec<Port>,
    life: Life,
    /// Batches taken since the guest's queues were looked at.
    batches: u32,
    hold: Hold,
    /// Engine `device`.
    marking: Option<Marking>,
    /// The network is to learn that the guest is here, once it is.
    announces: bool,
    kept: VecDeque<Kept>,
    overheard: Overheard,
    addresses: Addresses,
    repeats: Repeats,
    frames: Vec<Frame>,
    received: Vec<u8>,
    spare: Vec<Vec<u8>>,
    /// That the TAP takes no frames was said.
    said_unsent: bool,
    teller: Teller,
    capture: Option<Capture>,
    hold_reported: u64,
    hold_report_due_ns: u64,
}

impl Nic {
    /// A plain device on what is named here, which is not touched yet.
    #[must_use]
    pub fn new(host_end: Named, mac: [u8; 6]) -> Self {
        Self::on(host_end, Vec::new(), Shape::plain(mac))
    }

    /// A device on these queues, one for each pair.
    #[must_use]
    pub fn on(host_end: Named, ends: Vec<HostEnd>, shape: Shape) -> Self {
        Self {
            guest: NetGuestSide::with_shape(shape),
            mac: shape.mac,
            host_end,
            ports: (0..).zip(ends).map(|(pair, end)| Port::new(pair, end)).collect(),
            life: Life::Alone,
            batches: 0,
            hold: Hold::default(),
            marking: None,
            announces: false,
            kept: VecDeque::new(),
            overheard: Overheard::default(),
            addresses: Addresses::default(),
            repeats: Repeats::default(),
            frames: Vec::new(),
            received: Vec::new(),
            spare: Vec::new(),
            said_unsent: false,
            teller: Teller::default(),
            capture: None,
            hold_reported: 0,
            hold_report_due_ns: 0,
        }
    }

    /// The same, one thread of several that count together.
    #[must_use]
    pub fn counting_in(mut self, counters: Counters) -> Self {
        self.guest.count_in(counters);
        self.teller.set_watchful();
        self
    }

    /// The same, with what happens to frames noted.
    #[must_use]
    pub fn capturing(mut self, capture: Capture) -> Self {
        self.capture = Some(capture);
        self
    }

    fn note(&mut self, kind: Kind, frame: &Frame) {
        if let Some(capture) = &mut self.capture {
            capture.note(kind, frame.ethernet(), self.guest.counters());
        }
    }

    fn is_free(&self) -> bool {
        self.guest.shape().free
    }

    /// Queues that started or stopped: the TAP's go with them.
    fn follow_queues(&mut self, io: &mut Uring) -> Result<(), End> {
        if !self.is_free() {
            return Ok(());
        }
        for (pair, port) in self.ports.iter_mut().enumerate() {
            let runs = self.guest.is_configured(2 * pair as u16);
            if runs != port.is_attached() {
                port.set_attached(runs, self.guest.counters(), io)
                    .map_err(|error| End::environment(format!("a queue of '{}' is gone: {error}", self.host_end)))?;
                let state = if runs { "attached" } else { "detached" };
                info!(interface = %self.host_end, pair, "{state}");
            }
        }
        if self.announces && self.guest.is_configured(RECEIVE) {
            self.announces = false;
            self.announce_addresses();
            self.repeats = Repeats::after(monotonic_ns());
        }
        Ok(())
    }

    /// Gives a frame to the interface, which is noted as this.
    fn send(&mut self, kind: Kind, frame: &Frame) {
        let Some(port) = self.ports.get_mut(frame.pair()) else {
            return;
        };
        if let Err(error) = port.send(frame.with_header()) {
            // As on any wire: lost, counted, and said once.
            let queue = 2 * frame.pair() as u16 + 1;
            self.guest.counters().lose(queue, Lost::Interface, 1);
            if !std::mem::replace(&mut self.said_unsent, true) {
                warn!(%error, "the interface takes no frames");
            }
            return;
        }
        self.note(kind, frame);
    }

    fn count_held(&self, frames: usize) {
        if frames != 0 {
            self.guest.counters().count(OfDevice::Held, frames as u64);
            self.guest.counters().set_held_bytes(self.hold.bytes() as u64);
        }
    }

    fn announce_addresses(&mut self) {
        let frames = self.addresses.announcements(self.mac);
        frames.iter().for_each(|frame| self.send(Kind::Sent, frame));
        self.guest.counters().count(OfDevice::Announced, frames.len() as u64);
    }

    fn keep(&mut self, frame: Frame, now_ns: u64) {
        if self.kept.len() == KEPT_FRAMES_MAX
            && let Some(oldest) = self.kept.pop_front()
        {
            self.guest.recycle(oldest.frame);
        }
        let since_ns = now_ns;
        self.kept.push_back(Kept { frame, since_ns });
        self.guest.counters().count(OfDevice::Kept, 1);
    }

    /// Reads one frame; `None`, and a poll for the next, if there is none.
    fn receive(&mut self, io: &mut Uring) -> io::Result<Option<usize>> {
        self.received.clear();
        match self.ports.first_mut() {
            Some(port) => port.receive(&mut self.received, self.guest.counters(), io),
            None => Ok(None),
        }
    }

    /// Reads what the TAP has, up to a batch, into a payload; empty if it has nothing.
    fn receive_batch(&mut self, payload: &mut Vec<u8>, io: &mut Uring) -> io::Result<()> {
        let mut frames = 0;
        while frames < BATCH_FRAMES_MAX && payload.len() < BATCH_BYTES_MAX {
            let start = payload.len();
            if let Some(frame) = self.overheard.take(monotonic_ns()) {
                push_frame(payload, &frame);
            } else {
                let Some(bytes) = self.receive(io)? else { break };
                push_frame(payload, &self.received[HEADER_BYTES..bytes]);
            }
            if let Some(capture) = &mut self.capture {
                capture.note(Kind::Received, &payload[start + LENGTH_BYTES..], self.guest.counters());
            }
            frames += 1;
        }
        Ok(())
    }

    /// A batch of a queue of the TAP, with the frames' headers, for the first pair that has one and whose guest has taken the last one:
    /// what it does not take waits in the kernel, which counts what it drops.
    fn receive_free(&mut self, payload: &mut Vec<u8>, io: &mut Uring) -> io::Result<Option<u16>> {
        for (pair, port) in self.ports.iter_mut().enumerate() {
            if !port.is_readable() || self.guest.waits(pair) {
                continue;
            }
            let mut frames = 0;
            let counters = self.guest.counters();
            let mut start = payload.len();
            while frames < BATCH_FRAMES_MAX
                && payload.len() < BATCH_BYTES_MAX
                && port.receive_onto(payload, counters, io)?
            {
                frames += 1;
                if let Some(capture) = &mut self.capture {
                    let frame = &payload[start + LENGTH_BYTES + HEADER_BYTES..];
                    capture.note(Kind::Received, frame, counters);
                }
                start = payload.len();
            }
            if frames != 0 {
                return Ok(Some(2 * pair as u16));
            }
        }
        Ok(None)
    }

    /// What arrives while this side follows is not for its guest, unless it goes live soon.
    fn overhear(&mut self, io: &mut Uring) -> io::Result<()> {
        while let Some(bytes) = self.receive(io)? {
            self.overheard.note(&self.received[HEADER_BYTES..bytes], monotonic_ns());
            self.guest.counters().count(OfDevice::Overheard, 1);
        }
        Ok(())
    }

    fn tap_gone(&self, error: &io::Error) -> End {
        End::environment(format!("'{}' is gone: {error}", self.host_end))
    }
}

fn push_frame(payload: &mut Vec<u8>, frame: &[u8]) {
    payload.extend_from_slice(&(frame.len() as u32).to_le_bytes());
    payload.extend_from_slice(frame);
}

impl Device for Nic {
    fn guest(&mut self) -> &mut dyn GuestSide {
        &mut self.guest
    }

    fn is_network(&self) -> bool {
        true
    }

    fn set_mtu(&mut self, mtu: u64) -> Result<(), String> {
        match self.guest.shape().mtu {
            Some(has) if mtu <= has.into() => Ok(()),
            has => Err(format!("an MTU of {mtu} is more than the TAP's: {}", has.unwrap_or(0))),
        }
    }

    fn announce(&mut self, mac: [u8; 6]) {
        // One thread is enough to say it: the one that serves the first queue.
        if self.guest.is_configured(RECEIVE) {
            info!("the guest came from elsewhere: announced");
            self.send(Kind::Sent, &announce::rarp(mac));
            self.guest.counters().count(OfDevice::Announced, 1);
        }
    }

    fn set_features(&mut self, features: u64) {
        self.guest.set_features(features);
        if let (true, Some(port)) = (self.is_free(), self.ports.first_mut())
            && let Err(error) = port.set_offloads(features)
        {
            warn!(%error, "the interface goes on with the offloads it had");
        }
    }

    fn count_in(&mut self, counters: Counters) {
        counters.begin(self.guest.shape().queues());
        self.guest.count_in(counters);
    }

    fn kicked(&mut self, queue: u16) {
        self.guest.counters().add(queue, OfQueue::Kicks, 1);
        self.teller.note();
    }

    fn start(&mut self, life: Life, io: &mut Uring) -> Result<(), End> {
        self.life = life;
        if !self.is_free() {
            let end = self.host_end.open().map_err(End::environment)?;
            let mut port = Port::new(0, end);
            port.set_attached(true, self.guest.counters(), io)
                .map_err(|error| self.tap_gone(&error))?;
            self.ports = vec![port];
            info!(interface = %self.host_end, "attached");
        }
        Ok(())
    }

    fn perform(&mut self, marker: Option<Lsn>, io: &mut Uring) -> Result<(), End> {
        self.follow_queues(io)?;
        let now_ns = monotonic_ns();
        let mut frames = std::mem::take(&mut self.frames);
        self.guest.take_frames(&mut frames);
        let held_before = self.hold.frames();
        for frame in frames.drain(..) {
            self.addresses.note(frame.ethernet());
            match (self.life, marker) {
                (Life::Follows, _) => self.keep(frame, now_ns),
                (Life::Live, Some(marker)) => {
                    self.note(Kind::Held, &frame);
                    self.hold.push(marker, frame, now_ns);
                }
                _ => match &mut self.marking {
                    Some(marking) => {
                        if let Some(capture) = &mut self.capture {
                            capture.note(Kind::Held, frame.ethernet(), self.guest.counters());
                        }
                        marking.push(frame);
                    }
                    None => {
                        self.send(Kind::Sent, &frame);
                        self.guest.recycle(frame);
                    }
                },
            }
        }
        self.frames = frames;
        self.count_held(self.hold.frames() - held_before);
        Ok(())
    }

    fn complete(&mut self, completion: Completion, io: &mut Uring) -> Result<(), End> {
        // The only operations here are the polls of the TAP; an error shows in the read.
        if let Some(port) = self.ports.iter_mut().find(|port| port.is_token(completion.token)) {
            port.polled();
        }
        self.teller.note();
        if self.life == Life::Follows {
            self.overhear(io).map_err(|error| self.tap_gone(&error))?;
        }
        Ok(())
    }

    fn take_input(&mut self, io: &mut Uring) -> Result<Option<Input>, End> {
        let mut payload = self.spare.pop().unwrap_or_default();
        payload.clear();
        if self.is_free() {
            self.follow_queues(io)?;
            let received = match self.batches {
                BATCHES_MAX.. => Ok(None),
                _ => self.receive_free(&mut payload, io),
            };
            let Some(queue) = received.map_err(|error| self.tap_gone(&error))? else {
                self.recycle(payload);
                return Ok(None);
            };
            self.batches += 1;
            return Ok(Some(Input { queue, payload }));
        }
        if !self.ports.first().is_some_and(Port::is_readable) {
            self.recycle(payload);
            return Ok(None);
        }
        self.receive_batch(&mut payload, io)
            .map_err(|error| self.tap_gone(&error))?;
        if payload.is_empty() {
            self.recycle(payload);
            return Ok(None);
        }
        if !BOUNCE {
            self.guest.write_ahead(&payload)?;
        }
        Ok(Some(Input {
            queue: RECEIVE,
            payload,
        }))
    }

    fn recycle(&mut self, payload: Vec<u8>) {
        if payload.capacity() != 0 && self.spare.len() < BATCH_FRAMES_MAX {
            self.spare.push(payload);
        }
    }

    fn go_live(&mut self, _io: &mut Uring, events: &mut Events) -> Result<(), End> {
        self.life = Life::Live;
        // What was overheard counts as arrived.
        self.ports.iter_mut().for_each(Port::look_again);
        self.announce_addresses();
        let now_ns = monotonic_ns();
        self.repeats = Repeats::after(now_ns);
        let mut again = 0;
        for Kept { frame, since_ns } in std::mem::take(&mut self.kept) {
            if now_ns - since_ns <= KEPT_AGE_NS {
                self.send(Kind::Sent, &frame);
                again += 1;
            }
            self.guest.recycle(frame);
        }
        self.guest.counters().count(OfDevice::SentAgain, again);
        info!(again, "announced; the last frames are sent again");
        events.emit("announced", json!({ "sent_again": again }));
        Ok(())
    }

    fn release(&mut self, committed: Committed) -> Result<Option<Lsn>, End> {
        let mut frames = std::mem::take(&mut self.frames);
        self.hold
            .release(committed, monotonic_ns(), self.guest.counters(), &mut frames);
        if !frames.is_empty() {
            let counters = self.guest.counters();
            counters.count(OfDevice::Released, frames.len() as u64);
            counters.set_held_bytes(self.hold.bytes() as u64);
            self.teller.note();
            crash::point("net.release.before");
            for frame in frames.drain(..) {
                self.send(Kind::Released, &frame);
                self.guest.recycle(frame);
            }
            crash::point("net.release.after");
        }
        self.frames = frames;
        Ok(self.hold.first())
    }

    fn take_part(&mut self, part: Part) -> Result<(), End> {
        // Who took over has no guest yet: it is announced with its first queue.
        self.announces = part == Part::Last && !self.ports.iter().any(Port::is_attached);
        Ok(())
    }

    fn mirror(&mut self, mirror: Mirror) -> Result<(), End> {
        self.marking = Some(Marking::new(mirror));
        Ok(())
    }

    fn committed(&mut self, committed: Committed, _io: &mut Uring) -> Result<Option<Lsn>, End> {
        // First what is held: when nothing is, all that this device logged is committed, and there is room for more.
        let first = self.release(committed)?;
        let held = match &mut self.marking {
            Some(marking) => marking.mark(&mut self.hold, monotonic_ns()),
            None => 0,
        };
        if held == 0 {
            return Ok(first);
        }
        self.count_held(held);
        self.release(committed)
    }

    fn power_off(&mut self) {
        info!("nobody uses the card: the VM ends with its disk's daemon, which is waited for");
    }

    fn has_room(&self) -> bool {
        self.hold.bytes() + self.marking.as_ref().map_or(0, Marking::bytes) < HELD_BYTES_MAX
    }

    fn is_idle(&self) -> bool {
        true
    }

    fn tick(&mut self, now_ns: u64, io: &mut Uring, events: &mut Events) -> Result<Option<u64>, End> {
        self.batches = 0;
        self.follow_queues(io)?;
        if self.repeats.take_due(now_ns) {
            self.announce_addresses();
        }
        let times = self.hold.times();
        let mut report_due = None;
        if times.total() != self.hold_reported {
            if self.hold_report_due_ns <= now_ns {
                self.hold_reported = times.total();
                self.hold_report_due_ns = now_ns + HOLD_EVENT_NS;
                let buckets: Vec<[u64; 2]> = times.buckets().map(|(upper, count)| [upper, count]).collect();
                events.emit("hold", json!({ "buckets": buckets }));
            } else {
                report_due = Some(self.hold_report_due_ns);
            }
        }
        let tell_due = self.teller.tick(now_ns, self.guest.counters(), events);
        let next = [self.repeats.next(), report_due, tell_due];
        Ok(next.into_iter().flatten().min())
    }

    fn ended(&mut self, events: &mut Events) {
        // What is held leaves never.
        let counters = self.guest.counters();
        if let Some(capture) = &mut self.capture {
            let waiting = self.hold.waiting();
            waiting.for_each(|frame| capture.note(Kind::Discarded, frame.ethernet(), counters));
        }
        counters.count(OfDevice::Discarded, self.hold.frames() as u64);
        counters.set_held_bytes(0);
        self.teller.tell(counters, events);
    }
}
