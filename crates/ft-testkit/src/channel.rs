//! The model of ft-log's logging channel: encoding, reassembly, flow control, closing, and connecting again.
//!
//! A setting with `resume` has daemons that connect a broken channel again within the generation: the primary sends again
//! what was not acknowledged, the backup drops what it has already. Without it a break is the end of the pair.

use ft_protocol::{Event, Header, Lsn, Role, entry::KIND_POWER_OFF, frame, message::Message};
use rand::Rng;

use crate::{
    crash_points::{Deed, Point},
    guest::mix,
    host::{Host, HostId},
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
        let is_ack = matches!(message, Message::Ack(_));
        let deed = if is_ack { Deed::Ack } else { Deed::Send };
        if self.passes(id, Point { deed, after: false }) {
            return;
        }
        self.judge.spoke(id, "a message");
        self.note(Some(id), || match message {
            Message::Ack(lsn) => format!("acknowledges {lsn}"),
            Message::Hello(_) => "sends hello".into(),
            other => format!("sends {other:?}"),
        });
        let host = self.host(id);
        let generation = host.replica.generation();
        let connection = host.connection;
        let greets = host.is_primary() && matches!(message, Message::Hello(_));
        if let Some(connection) = connection {
            message.encode(generation, &mut host.tx);
            if greets {
                let suspect_ns = self.setting().suspect_ns();
                self.later(id, suspect_ns, Task::HelloTimeout { connection });
            }
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
        let host = self.host(id);
        let sent = host.sent;
        if host.connection.is_some() {
            let Host { log, tx, sent, .. } = host;
            // The entries to send are the last ones of the log.
            let first = log.partition_point(|(lsn, _)| *lsn <= *sent);
            for (lsn, frame) in log.range(first..).take_while(|(lsn, _)| *lsn <= through) {
                tx.extend_from_slice(frame);
                *sent = *lsn;
            }
        }
        let now = self.host(id).sent;
        if now > sent {
            self.note(Some(id), || format!("sends entries {}..={now}", sent.next()));
        }
        self.flush(id);
        if self.is_mutant(Mutant::ReleaseEarly) {
            self.wake_devices(id);
        }
        self.passes(id, point(true));
    }

    /// Gives the channel what it takes.
    pub(crate) fn flush(&mut self, id: HostId) {
        let window_bytes = self.setting().window_bytes;
        let room = self.network.room(id, window_bytes);
        let host = self.host(id);
        let Some(connection) = host.connection else {
            host.tx.clear();
            return;
        };
        let bytes = room.min(host.tx.len());
        if !host.is_running() || host.paused > 0 || bytes == 0 {
            return;
        }
        let was_full = self.is_log_full(id);
        let mut piece: Vec<u8> = self.host(id).tx.drain(..bytes).collect();
        // TCP keeps no boundaries.
        if piece.len() > 1 && self.rng.random_range(0..4) == 0 {
            let at = self.rng.random_range(1..piece.len());
            let rest = piece.split_off(at);
            self.with_way(|network, way| network.send(id, connection, Packet::Bytes(piece), way));
            piece = rest;
        }
        self.with_way(|network, way| network.send(id, connection, Packet::Bytes(piece), way));
        if was_full && !self.is_log_full(id) {
            self.wake_guest(id, 0);
        }
    }

    pub(crate) fn is_log_full(&mut self, id: HostId) -> bool {
        let log_bytes_max = self.setting().log_bytes_max;
        self.host(id).tx.len() > log_bytes_max
    }

    // ---- receiving ---------------------------------------------------------------------------------------------------

    pub(crate) fn packet(&mut self, id: HostId, connection: ConnectionId, packet: Packet) {
        if !self.host(id).is_running() {
            return;
        }
        match packet {
            Packet::Open => self.accept(id, connection),
            _ if self.host(id).connection != Some(connection) => {}
            Packet::Bytes(bytes) => {
                self.host(id).rx.extend_from_slice(&bytes);
                self.read_channel(id);
            }
            Packet::Close => {
                self.host(id).close_pending = true;
                self.read_channel(id);
            }
            Packet::Reset => self.closed(id, connection, true),
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
            if is_entry && host.replay.len() >= replay_entries_max && host.is_replaying() {
                return;
            }
            if is_entry {
                self.read_entries(id, &header, replay_entries_max);
            } else {
                let bytes: Vec<u8> = host.rx.drain(..length).collect();
                self.was_read(id, length);
                let (generation, message) = Message::decode(&bytes).expect("the network does not change bytes");
                let generation = self.heard(id, generation);
                self.drive(id, Event::Message { generation, message });
            }
        }
        let host = self.host(id);
        if let Some(connection) = host.connection.filter(|_| host.close_pending) {
            self.closed(id, connection, false);
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
        let stores = host.role == Role::Replaying || (host.role == Role::Arbitrating && !host.is_primary());
        let (last, generation) = (host.replica.last(), host.replica.generation());
        let connection = host.connection.expect("checked by the caller");
        let mut room = replay_entries_max.saturating_sub(host.replay.len()).max(1);
        let (mut read, mut run, mut power_off) = (0, Vec::new(), None);
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
            if header.kind == KIND_POWER_OFF {
                power_off = Some(header.lsn);
            }
            run.push(bytes.to_vec());
            read += length;
            next = next.next();
            room -= 1;
        }
        self.host(id).rx.drain(..read);
        self.was_read(id, read);
        let heard = self.heard(id, first.generation);
        let mut from = first.lsn;
        let mut through = Lsn(next.0 - 1);
        if self.is_mutant(Mutant::ResendWithoutDedup) {
            // Takes the stream for what follows, whatever the entries say.
            (from, through) = (last.next(), Lsn(last.0 + run.len() as u64));
        } else {
            let known = (last.0 + 1).saturating_sub(from.0).min(run.len() as u64);
            run.drain(..known as usize);
            from = Lsn(from.0 + known);
            if run.is_empty() {
                return;
            }
        }
        if stores && heard == generation && from == last.next() {
            for frame in run {
                if self.is_mutant(Mutant::AckEarly) {
                    let delay_ns = self.setting().heartbeat_interval_ns / 2;
                    self.later(id, delay_ns, Task::StoreLate { connection, frame });
                } else if !self.store(id, frame) {
                    return;
                }
            }
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
        let is_power_off = frame::read(&frame).is_ok_and(|(header, _)| header.kind == KIND_POWER_OFF);
        self.judge.stored(id, digest(&frame), is_power_off);
        self.host(id).replay.push_back(frame);
        let replay_ns = self.setting().replay_ns;
        self.wake_guest(id, replay_ns);
        !self.passes(id, point(true))
    }

    // ---- connecting and closing --------------------------------------------------------------------------------------

    pub(crate) fn plan_connect(&mut self, id: HostId, delay_ns: u64) {
        let host = self.host(id);
        if host.is_primary() && !host.connecting {
            host.connecting = true;
            self.later(id, delay_ns, Task::Connect);
        }
    }

    pub(crate) fn connect(&mut self, id: HostId) {
        let listening = self.host(id.other()).is_running();
        let host = self.host(id);
        host.connecting = false;
        if host.connection.is_some() || !(host.role == Role::Pairing || host.resuming) {
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
        self.host(id).connection = Some(connection);
        if self.host(id).resuming {
            self.resume(id);
        } else {
            self.drive(id, Event::ChannelUp);
        }
    }

    /// The backup's listening socket has a connection.
    fn accept(&mut self, id: HostId, connection: ConnectionId) {
        let resume = self.setting().resume;
        let host = self.host(id);
        let pairs = host.role == Role::Pairing;
        let resumes = resume && matches!(host.role, Role::Replaying | Role::Arbitrating);
        if !pairs && !resumes {
            self.with_way(|network, way| network.send(id, connection, Packet::Reset, way));
            return;
        }
        // A connection that comes anew says that the old one is gone.
        let former = host.connection.replace(connection);
        host.tx.clear();
        host.rx.clear();
        host.close_pending = false;
        if resumes {
            self.resume(id);
        } else {
            if former.is_some() {
                self.drive(id, Event::ChannelDown);
            }
            self.drive(id, Event::ChannelUp);
        }
    }

    /// The channel is back within the generation.
    fn resume(&mut self, id: HostId) {
        self.note(Some(id), || "has the channel back".into());
        let host = self.host(id);
        host.resuming = false;
        let (primary, acknowledged, last) = (host.is_primary(), host.replica.acknowledged(), host.replica.last());
        if primary {
            host.sent = acknowledged;
            self.send_entries(id, last);
        } else if last > Lsn::ZERO {
            self.send_message(id, &Message::Ack(acknowledged));
        }
    }

    /// The core closes the channel.
    pub(crate) fn close_channel(&mut self, id: HostId) {
        let Some(connection) = self.host(id).connection else {
            return;
        };
        // What waits in the daemon goes with the close, as far as the channel takes it.
        self.flush(id);
        let packet = if self.rng.random_bool(0.8) {
            Packet::Close
        } else {
            Packet::Reset
        };
        self.with_way(|network, way| network.send(id, connection, packet, way));
        self.later(
            id,
            0,
            Task::Closed {
                connection,
                broke: false,
            },
        );
    }

    /// The local end is closed or broken.
    pub(crate) fn closed(&mut self, id: HostId, connection: ConnectionId, broke: bool) {
        let resume = self.setting().resume;
        let suspect_ns = self.setting().suspect_ns();
        let host = self.host(id);
        if host.connection != Some(connection) {
            return;
        }
        host.connection = None;
        host.tx.clear();
        host.rx.clear();
        host.close_pending = false;
        self.note(Some(id), || {
            if broke {
                "the channel broke"
            } else {
                "the channel closed"
            }
            .into()
        });
        let host = self.host(id);
        let pair = matches!(host.role, Role::Recording | Role::Replaying | Role::Arbitrating);
        if resume && broke && pair {
            host.resuming = true;
            self.later(id, suspect_ns / 3, Task::GiveUpResuming);
            self.plan_connect(id, 0);
        } else {
            self.drive(id, Event::ChannelDown);
            if self.host(id).role == Role::Pairing {
                let delay_ns = self.setting().heartbeat_interval_ns / 2;
                self.plan_connect(id, delay_ns);
            }
        }
        self.wake_guest(id, 0);
    }

    pub(crate) fn give_up_resuming(&mut self, id: HostId) {
        let host = self.host(id);
        if host.resuming && host.connection.is_none() {
            host.resuming = false;
            self.drive(id, Event::ChannelDown);
        }
    }
}
