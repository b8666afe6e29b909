//! The model of ft-log's logging channel: encoding, reassembly, flow control, connecting and closing. Breaks, hellos and what is
//! sent again are the core's ([`ft_protocol::replica`], [`ft_protocol::backlog`]).

use ft_protocol::{
    Body, Event, Header, Lsn, Place, Role, Strength,
    entry::{Entry, KIND_SYNCED},
    frame,
    message::Message,
};
use rand::Rng;

use crate::{
    crash_points::{Deed, Point},
    guest::mix,
    host::HostId,
    mutants::Mutant,
    network::{ConnectionId, Packet},
    queue::Task,
    world::World,
};

/// What an entry is to the judge.
pub(crate) fn digest(frame: &[u8]) -> u64 {
    frame.chunks(8).fold(frame.len() as u64, |hash, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mix(hash, u64::from_le_bytes(word))
    })
}

impl World {
    // ---- sending -----------------------------------------------------------------------------------------------------

    pub(crate) fn send_message(&mut self, id: HostId, message: &Message) {
        if matches!(message, Message::Adopted) && self.is_mutant(Mutant::WinUnsynced) {
            return;
        }
        let is_ack = matches!(message, Message::Ack(_));
        let deed = if is_ack { Deed::Ack } else { Deed::Send };
        if self.passes(id, Point { deed, after: false }) {
            return;
        }
        self.judge.spoke(id, "a message");
        self.note(Some(id), || match message {
            Message::Ack(said) => format!(
                "acknowledges {} (flushed {}, replayed {})",
                said.received, said.durable, said.replayed
            ),
            Message::Hello(_) => "sends hello".into(),
            other => format!("sends {other:?}"),
        });
        let host = self.host(id);
        let generation = host.replica.generation();
        if host.connection.is_some() {
            message.encode(generation, &mut host.tx);
        }
        self.flush(id);
        self.passes(id, Point { deed, after: true });
    }

    pub(crate) fn send_entries(&mut self, id: HostId, through: Lsn) {
        let point = |after| Point {
            deed: Deed::Send,
            after,
        };
        if self.passes(id, point(false)) {
            return;
        }
        self.judge.spoke(id, "entries");
        self.note(Some(id), || format!("sends entries through {through}"));
        let host = self.host(id);
        host.sends_entries = true;
        host.sent = host.sent.max(through);
        // ft-log takes what there is in batches.
        if self.rng.random_bool(0.5) {
            self.flush(id);
        } else {
            let delay_ns = self.rng.random_range(0..=self.setting().idle_ns);
            self.later(id, delay_ns, Task::Flush);
        }
        if self.is_mutant(Mutant::ReleaseEarly) {
            self.wake_devices(id);
        }
        self.passes(id, point(true));
    }

    pub(crate) fn rewind(&mut self, id: HostId, after: Lsn) {
        self.note(Some(id), || {
            format!("has the channel back, the peer is at entry {after}")
        });
        if !self.is_mutant(Mutant::NoResend) {
            self.host(id).backlog.rewind(after);
        }
    }

    /// Gives the channel what it takes: a piece of the backlog after the other, each when the one before is gone.
    pub(crate) fn flush(&mut self, id: HostId) {
        let was_full = self.is_log_full(id);
        loop {
            let window_bytes = self.setting().window_bytes;
            let room = self.network.room(id, window_bytes);
            let host = self.host(id);
            let Some(connection) = host.connection else {
                host.tx.clear();
                return;
            };
            if host.tx.is_empty()
                && host.sends_entries
                && let Some(bytes) = host.backlog.take()
            {
                host.tx.extend_from_slice(&bytes);
                host.backlog.give_back(bytes);
            }
            let bytes = room.min(host.tx.len());
            if !host.is_running() || host.paused > 0 || bytes == 0 {
                break;
            }
            let mut piece: Vec<u8> = self.host(id).tx.drain(..bytes).collect();
            // TCP keeps no boundaries.
            if piece.len() > 1 && self.rng.random_range(0..4) == 0 {
                let at = self.rng.random_range(1..piece.len());
                let rest = piece.split_off(at);
                self.with_way(|network, way| network.send(id, connection, Packet::Bytes(piece), way));
                piece = rest;
            }
            self.with_way(|network, way| network.send(id, connection, Packet::Bytes(piece), way));
        }
        if was_full && !self.is_log_full(id) {
            self.wake_guest(id, 0);
        }
    }

    pub(crate) fn is_log_full(&mut self, id: HostId) -> bool {
        self.host(id).backlog.is_full()
    }

    // ---- receiving ---------------------------------------------------------------------------------------------------

    pub(crate) fn packet(&mut self, id: HostId, connection: ConnectionId, packet: Packet) {
        if !self.host(id).is_running() {
            return;
        }
        match packet {
            Packet::Open => self.accept(id, connection),
            packet
                if self
                    .host(id)
                    .candidate
                    .as_ref()
                    .is_some_and(|(of, _)| *of == connection) =>
            {
                self.candidate_packet(id, connection, &packet);
            }
            _ if self.host(id).connection != Some(connection) => {}
            Packet::Bytes(bytes) => {
                self.host(id).rx.extend_from_slice(&bytes);
                self.read_channel(id);
            }
            Packet::Close => {
                self.host(id).close_pending = true;
                self.read_channel(id);
            }
            Packet::Reset => self.closed(id, connection),
        }
    }

    /// Reads frames as long as there are whole ones, and room for entries.
    pub(crate) fn read_channel(&mut self, id: HostId) {
        let replay_entries_max = self.setting().replay_entries_max;
        loop {
            let host = self.host(id);
            if !host.is_running() || host.connection.is_none() {
                return;
            }
            let length = match frame::peek_length(&host.rx).expect("the network does not change bytes") {
                Some(length) if length <= host.rx.len() => length,
                _ => break,
            };
            let (header, _) = frame::read(&host.rx[..length]).expect("the network does not change bytes");
            let is_entry = header.is_entry();
            let full = is_entry && host.replay.len() >= replay_entries_max && host.is_replaying();
            self.tell_full(id, full);
            let host = self.host(id);
            if full || host.connection.is_none() {
                return;
            }
            if is_entry {
                self.read_entries(id, &header, replay_entries_max);
            } else {
                let bytes: Vec<u8> = host.rx.drain(..length).collect();
                self.was_read(id, length);
                let (generation, message) = Message::decode(&bytes).expect("the network does not change bytes");
                let generation = self.heard(id, generation);
                let acknowledged = match &message {
                    Message::Ack(said) if self.is_mutant(Mutant::CountUnsynced) => Some(said.received),
                    _ => None,
                };
                self.drive(id, Event::Message { generation, message });
                if let Some(received) = acknowledged {
                    self.count_unsynced(id, received);
                }
            }
        }
        self.tell_full(id, false);
        let host = self.host(id);
        if let Some(connection) = host.connection.filter(|_| host.close_pending) {
            self.closed(id, connection);
        }
    }

    fn tell_full(&mut self, id: HostId, full: bool) {
        if std::mem::replace(&mut self.host(id).replay_full, full) != full {
            self.drive(id, Event::ReplayFull { full });
        }
    }

    fn was_read(&mut self, id: HostId, bytes: usize) {
        let sender = id.other();
        self.network.was_read(sender, bytes);
        // The sender learns of the room at once; one round trip later would change nothing.
        if self.network.current().is_some() && self.network.current() == self.host(sender).connection {
            self.flush(sender);
        }
    }

    /// Reads the dense run of entries that starts the buffer, stores it, then tells the core.
    fn read_entries(&mut self, id: HostId, first: &Header, replay_entries_max: usize) {
        let host = self.host(id);
        let last = host.replica.last();
        let connection = host.connection.expect("checked by the caller");
        let mut room = replay_entries_max.saturating_sub(host.replay.len()).max(1);
        let (mut read, mut run, mut power_off, mut synced) = (0, Vec::new(), None, None);
        let mut configurations = Vec::new();
        let mut next = first.lsn;
        while room > 0 {
            let host = self.host(id);
            let Ok(Some(length)) = frame::peek_length(&host.rx[read..]) else {
                break;
            };
            let Some(bytes) = host.rx.get(read..read + length) else {
                break;
            };
            let (header, _) = frame::read(bytes).expect("the network does not change bytes");
            if !header.is_entry() || header.generation != first.generation || header.lsn != next {
                break;
            }
            let entry = Entry::decode(bytes).expect("the network does not change bytes");
            match entry.body {
                Body::PowerOff { .. } => power_off = Some(entry.lsn),
                Body::Synced { instance } => synced = Some((entry.lsn, instance)),
                Body::Configuration(timing) => configurations.push((entry.lsn, timing)),
                _ => {}
            }
            run.push(bytes.to_vec());
            read += length;
            next = next.next();
            room -= 1;
        }
        self.host(id).rx.drain(..read);
        self.was_read(id, read);
        if !self.host(id).replica.is_channel_open() {
            // The core has broken the channel, and the daemon reads what had arrived before.
            return;
        }
        let heard = self.heard(id, first.generation);
        let mut from = first.lsn;
        let mut through = Lsn(next.0 - 1);
        if self.is_mutant(Mutant::ResendWithoutDedup) {
            // Takes the stream for what follows, whatever the entries say.
            (from, through) = (last.next(), Lsn(last.0 + run.len() as u64));
        } else {
            while !run.is_empty() && self.host(id).replica.place(heard, from, last) == Place::Known {
                run.remove(0);
                from = from.next();
            }
            if run.is_empty() {
                return;
            }
        }
        if self.host(id).replica.place(heard, from, last) == Place::Next {
            for frame in run {
                if self.is_mutant(Mutant::AckEarly) {
                    let delay_ns = self.setting().heartbeat_interval_ns / 2;
                    self.later(id, delay_ns, Task::StoreLate { connection, frame });
                } else if !self.store(id, frame) {
                    return;
                }
            }
        }
        if let Some((lsn, instance)) = synced.filter(|(lsn, _)| *lsn >= from) {
            self.drive(id, Event::SyncedEntry { lsn, instance });
        }
        let generation = heard;
        self.drive(
            id,
            Event::Received {
                generation,
                from,
                through,
            },
        );
        match self.setting().ack {
            Strength::Durable if self.is_mutant(Mutant::AckBeforeFlush) => self.drive(id, Event::Durable { through }),
            Strength::Replayed if self.is_mutant(Mutant::AckBeforeReplay) => {
                self.drive(id, Event::Consumed { through });
            }
            _ => self.start_flush(id),
        }
        configurations.retain(|(lsn, _)| *lsn >= from && !self.is_mutant(Mutant::IgnoreConfiguration));
        for (lsn, timing) in configurations {
            self.drive(id, Event::ConfigurationEntry { lsn, timing });
        }
        if let Some(lsn) = power_off.filter(|_| !self.is_mutant(Mutant::HidePowerOff)) {
            self.drive(id, Event::PowerOffEntry { lsn });
        }
    }

    /// Puts a received entry where the replay finds it; `false` if the host died over it.
    pub(crate) fn store(&mut self, id: HostId, frame: Vec<u8>) -> bool {
        let point = |after| Point {
            deed: Deed::Store,
            after,
        };
        if self.passes(id, point(false)) {
            return false;
        }
        let kind = frame::read(&frame).map_or(0, |(header, _)| header.kind);
        self.judge.stored(id, digest(&frame), kind);
        self.outcome.repairs += u64::from(kind == KIND_SYNCED);
        let host = self.host(id);
        host.replay.push_back(frame);
        host.stored += 1;
        let replay_ns = self.setting().replay_ns;
        self.wake_guest(id, replay_ns);
        !self.passes(id, point(true))
    }

    // ---- the backup's journal ----------------------------------------------------------------------------------------

    /// Flushes what is stored, one flush at a time.
    fn start_flush(&mut self, id: HostId) {
        let (ack, flush_ns) = (self.setting().ack, self.setting().flush_ns);
        let host = self.host(id);
        let durable = host.replica.progress().durable.0;
        if ack == Strength::Durable && host.flushing.is_none() && host.stored > durable {
            let entries = host.stored;
            host.flushing = Some(entries);
            self.later(id, flush_ns, Task::Flushed { entries });
        }
    }

    pub(crate) fn flushed(&mut self, id: HostId, entries: u64) {
        if self.host(id).flushing.take() == Some(entries) {
            self.judge.flushed(id, Lsn(entries));
            self.drive(id, Event::Durable { through: Lsn(entries) });
            self.start_flush(id);
        }
    }

    // ---- connecting and closing --------------------------------------------------------------------------------------

    pub(crate) fn plan_connect(&mut self, id: HostId, delay_ns: u64) {
        let host = self.host(id);
        if host.replica.connects() && !host.connecting {
            host.connecting = true;
            self.later(id, delay_ns, Task::Connect);
        }
    }

    pub(crate) fn connect(&mut self, id: HostId) {
        let listening = self.host(id.other()).is_running();
        let host = self.host(id);
        host.connecting = false;
        if host.connection.is_some() || !host.wants_channel() || !host.replica.connects() {
            return;
        }
        let connection = if listening {
            self.with_way(|network, way| network.connect(id, way))
        } else {
            None
        };
        let Some(connection) = connection else {
            let delay_ns = self.setting().heartbeat_interval_ns / 2;
            self.plan_connect(id, delay_ns);
            return;
        };
        let host = self.host(id);
        host.connection = Some(connection);
        host.sends_entries = false;
        self.drive(id, Event::ChannelUp);
    }

    /// The listening socket has a connection. The old one stays until this one has said hello.
    fn accept(&mut self, id: HostId, connection: ConnectionId) {
        let host = self.host(id);
        if host.wants_channel() {
            host.candidate = Some((connection, Vec::new()));
        } else {
            self.with_way(|network, way| network.send(id, connection, Packet::Reset, way));
        }
    }

    fn candidate_packet(&mut self, id: HostId, connection: ConnectionId, packet: &Packet) {
        let Some((_, mut received)) = self.host(id).candidate.take() else {
            return;
        };
        let Packet::Bytes(bytes) = packet else { return };
        received.extend_from_slice(bytes);
        let length = match frame::peek_length(&received).expect("the network does not change bytes") {
            Some(length) if length <= received.len() => length,
            _ => {
                self.host(id).candidate = Some((connection, received));
                return;
            }
        };
        let (generation, message) = Message::decode(&received[..length]).expect("the network does not change bytes");
        let Message::Hello(hello) = message else {
            panic!("whoever connects says hello first, and this is {message:?}")
        };
        let generation = self.heard(id, generation);
        let host = self.host(id);
        if let Some(reason) = host.replica.refusal(generation, &hello) {
            self.note(Some(id), || format!("refuses: {reason}"));
            let mut bytes = Vec::new();
            Message::Refuse { reason }.encode(generation, &mut bytes);
            self.with_way(|network, way| network.send(id, connection, Packet::Bytes(bytes), way));
            self.with_way(|network, way| network.send(id, connection, Packet::Close, way));
            return;
        }
        host.connection = Some(connection);
        host.sends_entries = false;
        host.rx = received;
        host.tx.clear();
        host.close_pending = false;
        self.drive(id, Event::ChannelUp);
        self.read_channel(id);
    }

    /// The core closes the channel.
    pub(crate) fn close_channel(&mut self, id: HostId) {
        // What waits in the daemon goes with the close, as far as the channel takes it.
        self.flush(id);
        let packet = if self.rng.random_bool(0.8) {
            Packet::Close
        } else {
            Packet::Reset
        };
        self.end_connection(id, packet);
    }

    /// The core gives the channel up for a new one.
    pub(crate) fn break_channel(&mut self, id: HostId) {
        self.note(Some(id), || "breaks the channel".into());
        self.end_connection(id, Packet::Reset);
    }

    fn end_connection(&mut self, id: HostId, packet: Packet) {
        if let Some(connection) = self.host(id).connection {
            self.with_way(|network, way| network.send(id, connection, packet, way));
            self.later(id, 0, Task::Closed { connection });
        }
    }

    /// The local end is closed or broken.
    pub(crate) fn closed(&mut self, id: HostId, connection: ConnectionId) {
        let retry_ns = self.setting().heartbeat_interval_ns / 2;
        let host = self.host(id);
        if host.connection != Some(connection) {
            return;
        }
        host.connection = None;
        host.tx.clear();
        host.rx.clear();
        host.close_pending = false;
        self.note(Some(id), || "the channel is gone".into());
        self.drive(id, Event::ChannelDown);
        self.tell_full(id, false);
        let host = self.host(id);
        if host.wants_channel() {
            let delay_ns = if host.role == Role::Pairing { retry_ns } else { 0 };
            self.plan_connect(id, delay_ns);
        }
        self.wake_guest(id, 0);
    }
}
