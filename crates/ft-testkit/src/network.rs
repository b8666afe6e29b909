//! The model network between the two hosts: one logging channel, and datagrams.
//!
//! The channel is what TCP promises: bytes arrive in order, once, cut anywhere, as late as they like; or the connection
//! breaks and what was under way is lost. Datagrams promise nothing.

use std::collections::VecDeque;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::{
    arbiter::count,
    faults::Setting,
    host::HostId,
    queue::{Happening, Queue},
};

/// One connection of the logging channel; a new one gets a new number.
pub type ConnectionId = u32;

/// What travels on the channel.
#[derive(Clone, Debug)]
pub enum Packet {
    /// The connection is there.
    Open,
    /// A piece of the byte stream.
    Bytes(Vec<u8>),
    /// The sender closed; everything before it has arrived.
    Close,
    /// The connection broke.
    Reset,
}

/// What happens to datagrams of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weather {
    /// Lost, percent.
    pub loss_percent: u8,
    /// Sent twice, percent.
    pub duplicate_percent: u8,
    /// Longest extra delay, ns: this is what reorders.
    pub delay_ns_max: u64,
}

#[derive(Debug, Default)]
struct Direction {
    blocked: u32,
    stalled: u32,
    parked: VecDeque<(ConnectionId, Packet)>,
    last_arrival_ns: u64,
    in_flight: usize,
    weather: Vec<Weather>,
}

/// Both directions; indexed by the sender.
#[derive(Debug, Default)]
pub struct Network {
    directions: [Direction; 2],
    current: Option<ConnectionId>,
    connections: ConnectionId,
    /// The connection on which nothing arrives any more, though both ends believe in it.
    wedged: Option<ConnectionId>,
}

impl Network {
    /// Opens a connection from `from`, if the path is free both ways; the other side learns of it by [`Packet::Open`].
    pub fn connect(&mut self, from: HostId, way: &mut Way<'_>) -> Option<ConnectionId> {
        if self
            .directions
            .iter()
            .any(|direction| direction.blocked + direction.stalled > 0)
        {
            return None;
        }
        self.connections += 1;
        self.current = Some(self.connections);
        for direction in &mut self.directions {
            direction.parked.clear();
            direction.in_flight = 0;
        }
        self.send(from, self.connections, Packet::Open, way);
        self.current
    }

    /// The connection that packets can still travel on.
    #[must_use]
    pub fn current(&self) -> Option<ConnectionId> {
        self.current
    }

    /// Bytes that the channel takes from `from` now.
    #[must_use]
    pub fn room(&self, from: HostId, window: usize) -> usize {
        window.saturating_sub(self.directions[from.index()].in_flight)
    }

    /// The receiver of what `from` sent has read `bytes`.
    pub fn was_read(&mut self, from: HostId, bytes: usize) {
        let direction = &mut self.directions[from.index()];
        direction.in_flight = direction.in_flight.saturating_sub(bytes);
    }

    /// Puts a packet on its way, behind everything that went before it.
    pub fn send(&mut self, from: HostId, connection: ConnectionId, packet: Packet, way: &mut Way<'_>) {
        if self.current != Some(connection) {
            return;
        }
        let direction = &mut self.directions[from.index()];
        if let Packet::Bytes(bytes) = &packet {
            direction.in_flight += bytes.len();
        }
        let arrival = (way.now_ns + way.latency_ns()).max(direction.last_arrival_ns);
        direction.last_arrival_ns = arrival;
        let to = from.other();
        way.queue.push(arrival, Happening::Packet { to, connection, packet });
    }

    /// A packet is at the receiver's door: gives it back, unless the way is blocked (it waits) or its connection is gone.
    pub fn arrive(&mut self, to: HostId, connection: ConnectionId, packet: Packet) -> Option<Packet> {
        if self.current != Some(connection) || self.wedged == Some(connection) {
            return None;
        }
        let direction = &mut self.directions[to.other().index()];
        if direction.blocked + direction.stalled > 0 || !direction.parked.is_empty() {
            direction.parked.push_back((connection, packet));
            return None;
        }
        Some(packet)
    }

    /// Nothing arrives on the current connection any more, and nobody is told.
    pub fn wedge(&mut self) {
        self.wedged = self.current;
    }

    /// The connection breaks: what is under way is lost. Gives the number of the broken one.
    pub fn reset(&mut self) -> Option<ConnectionId> {
        for direction in &mut self.directions {
            direction.parked.clear();
            direction.in_flight = 0;
        }
        self.current.take()
    }

    /// Sends a datagram, or loses it, or sends it twice.
    pub fn datagram(&mut self, from: HostId, bytes: &[u8], way: &mut Way<'_>) {
        let direction = &self.directions[from.index()];
        let to = from.other();
        let mut copies = 1;
        let mut delay_ns = 0;
        for weather in &direction.weather {
            if way.percent(weather.loss_percent) {
                return;
            }
            copies += u32::from(way.percent(weather.duplicate_percent));
            delay_ns = delay_ns.max(weather.delay_ns_max);
        }
        for _ in 0..copies {
            let extra = if delay_ns == 0 {
                0
            } else {
                way.rng.random_range(0..=delay_ns)
            };
            let arrival = way.now_ns + way.latency_ns() + extra;
            let bytes = bytes.to_vec();
            way.queue.push(arrival, Happening::Datagram { to, bytes });
        }
    }

    /// Whether a datagram from `from` gets through at the moment of its arrival.
    #[must_use]
    pub fn is_open(&self, from: HostId) -> bool {
        self.directions[from.index()].blocked == 0
    }

    /// Begins (or ends) a partition of this direction: datagrams are lost, the channel stalls.
    pub fn set_blocked(&mut self, from: HostId, begin: bool, way: &mut Way<'_>) {
        count(&mut self.directions[from.index()].blocked, begin);
        self.unpark(from, way);
    }

    /// Begins (or ends) a stall of the channel in this direction.
    pub fn set_stalled(&mut self, from: HostId, begin: bool, way: &mut Way<'_>) {
        count(&mut self.directions[from.index()].stalled, begin);
        self.unpark(from, way);
    }

    /// Begins (or ends) bad weather for the datagrams of this direction.
    pub fn set_weather(&mut self, from: HostId, weather: Weather, begin: bool) {
        let all = &mut self.directions[from.index()].weather;
        if begin {
            all.push(weather);
        } else if let Some(at) = all.iter().position(|other| *other == weather) {
            all.swap_remove(at);
        }
    }

    /// The way is free again: what waited arrives now, in order, before anything that was sent after it.
    pub fn take_parked(&mut self, from: HostId) -> VecDeque<(ConnectionId, Packet)> {
        let direction = &mut self.directions[from.index()];
        if direction.blocked + direction.stalled > 0 {
            return VecDeque::new();
        }
        let current = self.current;
        let mut parked = std::mem::take(&mut direction.parked);
        let wedged = self.wedged;
        parked.retain(|(connection, _)| Some(*connection) == current && Some(*connection) != wedged);
        parked
    }

    fn unpark(&mut self, from: HostId, way: &mut Way<'_>) {
        let direction = &self.directions[from.index()];
        if direction.blocked + direction.stalled == 0 && !direction.parked.is_empty() {
            let at = way.now_ns + way.latency_ns();
            way.queue.push(at, Happening::Unpark { from });
        }
    }
}

/// What the network needs of the world for one packet.
#[derive(Debug)]
pub struct Way<'a> {
    /// Virtual time.
    pub now_ns: u64,
    /// Where arrivals go.
    pub queue: &'a mut Queue,
    /// The one source of chance.
    pub rng: &'a mut ChaCha8Rng,
    /// Latencies.
    pub setting: &'a Setting,
}

impl Way<'_> {
    fn latency_ns(&mut self) -> u64 {
        self.setting.latency_ns + self.rng.random_range(0..=self.setting.jitter_ns)
    }

    fn percent(&mut self, percent: u8) -> bool {
        percent > 0 && self.rng.random_range(0..100) < percent
    }
}
