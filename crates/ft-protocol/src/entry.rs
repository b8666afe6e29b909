//! Log entries: the nondeterministic events of a primary, and the markers of its outputs.
//!
//! An entry that the shim wrote carries the [`Stop`] it was written at, so that a replay knows where it applies and whether it
//! is still the same execution.

use crate::{
    frame::{self, BodyReader, BodyWriter, FrameError, Header},
    ids::{DeviceId, Generation, Lsn},
    limits::{HEADER_BYTES, PAYLOAD_BYTES_MAX},
    timing::Timing,
};

/// Where in the guest's execution an entry applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// VM exits to userspace since power-on, the current one included.
    pub exits: u64,
    /// Progress since that exit; 0 at a natural stop point.
    pub offset: u32,
    /// Instruction pointer, as a check.
    pub rip: u64,
    /// RCX, as a check of the iteration inside a `rep` string instruction.
    pub rcx: u64,
}

/// A stop point and the digest of everything the guest did up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stop {
    /// The position.
    pub position: Position,
    /// Rolling digest of exits, registers and outputs.
    pub digest: u64,
}

const STOP_BYTES: usize = 36;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body<'a> {
    /// Power-on. The first entry of a generation that boots.
    Boot {
        /// Digest of everything both sides must start from (kernel, command line, memory size, CPUID, devices).
        fingerprint: [u8; 32],
        /// Wall clock at virtual time 0, ns since 1970.
        wall_ns: u64,
        /// What devices the machine has, as the shim describes them: an offline replay builds them from this.
        devices: &'a [u8],
    },
    /// The guest notified a queue; marks the outputs the device drains here.
    Kick(Stop),
    /// Data from outside, in the bounce buffer of a device. Guest memory does not change yet.
    Input {
        /// Number of this input among those of its device, from 1.
        sequence: u64,
        /// What the device's guest side consumes.
        payload: &'a [u8],
    },
    /// Inputs of a device reach guest memory here.
    Deliver {
        /// Where.
        stop: Stop,
        /// All inputs up to this sequence number, in order.
        through: u64,
    },
    /// The guest's virtual time moves here: it was read, or its alarm is due.
    Time {
        /// Where.
        stop: Stop,
        /// Virtual time, ns since power-on.
        now_ns: u64,
    },
    /// Console bytes leave; marks them as output.
    Console {
        /// Where.
        stop: Stop,
        /// How many bytes since the last marker.
        bytes: u32,
    },
    /// Nothing happened: lets a backup follow and compare digests.
    Sync(Stop),
    /// Guest pages of the state delta whose [`Body::State`] follows. Guest memory does not change yet.
    Pages {
        /// As the shim encodes them.
        payload: &'a [u8],
    },
    /// The guest was stopped where it has no stop of its own: from the stop before, a replay does not execute on but adopts the pages
    /// since the last entry of this kind, and this state of the vCPU.
    State {
        /// The stop that this makes.
        stop: Stop,
        /// The vCPU, as the shim encodes it.
        payload: &'a [u8],
    },
    /// `device` engine: sectors of a disk have this content from here on.
    Write {
        /// First sector, of 512 bytes.
        sector: u64,
        /// Whole sectors.
        payload: &'a [u8],
    },
    /// `device` engine: a range of a disk is zero from here on.
    Zeroes {
        /// First sector, of 512 bytes.
        sector: u64,
        /// Sectors.
        sectors: u32,
        /// The space of the range may be given back.
        unmap: bool,
    },
    /// `device` engine: what the disk was told before must last.
    Flush,
    /// `device` engine, no change: a backup that is being synchronised says what this range of its disk holds, block by block of
    /// [`BLOCK_BYTES`](crate::limits::BLOCK_BYTES) ([`Message::Digests`](crate::message::Message::Digests)).
    Compare {
        /// First sector, of 512 bytes.
        sector: u64,
        /// Sectors; no more than [`DIGESTS_MAX`](crate::limits::DIGESTS_MAX) blocks.
        sectors: u32,
    },
    /// `device` engine, no change: the disk of a backup that has applied everything up to here is equal to the survivor's at this place.
    Transferred,
    /// The backup of this instance has the state and every entry before this one: from here on it may take over. Written by the survivor
    /// that synchronised it; no part of the guest's execution.
    Synced {
        /// The backup, as its hello names it.
        instance: u64,
    },
    /// The operator changed the times of the pair: they hold from here on, on both sides. No part of the guest's execution.
    Configuration(Timing),
    /// The guest powered off, or reset itself. The last entry.
    PowerOff {
        /// Where.
        stop: Stop,
        /// A reset, not a power-off.
        reset: bool,
    },
}

const KIND_BOOT: u8 = 1;
const KIND_KICK: u8 = 2;
const KIND_INPUT: u8 = 3;
const KIND_DELIVER: u8 = 4;
const KIND_TIME: u8 = 5;
const KIND_CONSOLE: u8 = 6;
const KIND_SYNC: u8 = 7;
/// Kind byte of [`Body::PowerOff`]: `ft-log` looks for it, since an orderly end is not a failure.
pub const KIND_POWER_OFF: u8 = 8;
const KIND_PAGES: u8 = 9;
const KIND_STATE: u8 = 10;
const KIND_WRITE: u8 = 11;
const KIND_ZEROES: u8 = 12;
const KIND_FLUSH: u8 = 13;
/// Kind byte of [`Body::Synced`].
pub const KIND_SYNCED: u8 = 14;
/// Kind byte of [`Body::Configuration`].
pub const KIND_CONFIGURATION: u8 = 15;
const KIND_COMPARE: u8 = 16;
/// Kind byte of [`Body::Transferred`].
pub const KIND_TRANSFERRED: u8 = 17;

/// What [`Body::name`] says of the kinds, in their order.
pub const NAMES: [&str; 17] = [
    "boot",
    "kick",
    "input",
    "deliver",
    "time",
    "console",
    "sync",
    "power-off",
    "pages",
    "state",
    "write",
    "zeroes",
    "flush",
    "synced",
    "configuration",
    "compare",
    "transferred",
];

/// A decoded entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Its place in the order.
    pub lsn: Lsn,
    /// The generation that wrote it.
    pub generation: Generation,
    /// The device it is about.
    pub device: DeviceId,
    /// The queue of that device.
    pub queue: u16,
    /// What happened.
    pub body: Body<'a>,
}

impl Body<'_> {
    fn kind(&self) -> u8 {
        match self {
            Self::Boot { .. } => KIND_BOOT,
            Self::Kick(_) => KIND_KICK,
            Self::Input { .. } => KIND_INPUT,
            Self::Deliver { .. } => KIND_DELIVER,
            Self::Time { .. } => KIND_TIME,
            Self::Console { .. } => KIND_CONSOLE,
            Self::Sync(_) => KIND_SYNC,
            Self::PowerOff { .. } => KIND_POWER_OFF,
            Self::Pages { .. } => KIND_PAGES,
            Self::State { .. } => KIND_STATE,
            Self::Write { .. } => KIND_WRITE,
            Self::Zeroes { .. } => KIND_ZEROES,
            Self::Flush => KIND_FLUSH,
            Self::Synced { .. } => KIND_SYNCED,
            Self::Configuration(_) => KIND_CONFIGURATION,
            Self::Compare { .. } => KIND_COMPARE,
            Self::Transferred => KIND_TRANSFERRED,
        }
    }

    /// Name of the kind of entry, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        NAMES[usize::from(self.kind()) - 1]
    }

    fn body_bytes(&self) -> usize {
        match self {
            Self::Boot { devices, .. } => 40 + devices.len(),
            Self::Kick(_) | Self::Sync(_) => STOP_BYTES,
            Self::Input { payload, .. } => 8 + payload.len(),
            Self::Deliver { .. } | Self::Time { .. } => STOP_BYTES + 8,
            Self::Console { .. } => STOP_BYTES + 4,
            Self::PowerOff { .. } => STOP_BYTES + 1,
            Self::Pages { payload } => payload.len(),
            Self::State { payload, .. } => STOP_BYTES + payload.len(),
            Self::Write { payload, .. } => 8 + payload.len(),
            Self::Zeroes { .. } => 13,
            Self::Flush => 0,
            Self::Synced { .. } => 8,
            Self::Configuration(_) => Timing::BYTES,
            Self::Compare { .. } => 12,
            Self::Transferred => 0,
        }
    }

    /// Bytes of the whole frame of an entry with this body.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        HEADER_BYTES + self.body_bytes()
    }

    /// Where the entry applies; `None` for those that apply wherever the next one does, and for those of an engine without positions.
    #[must_use]
    pub fn stop(&self) -> Option<Stop> {
        match *self {
            Self::Boot { .. }
            | Self::Input { .. }
            | Self::Pages { .. }
            | Self::Write { .. }
            | Self::Zeroes { .. }
            | Self::Flush
            | Self::Synced { .. }
            | Self::Compare { .. }
            | Self::Transferred
            | Self::Configuration(_) => None,
            Self::Kick(stop)
            | Self::Sync(stop)
            | Self::Deliver { stop, .. }
            | Self::Time { stop, .. }
            | Self::Console { stop, .. }
            | Self::State { stop, .. }
            | Self::PowerOff { stop, .. } => Some(stop),
        }
    }
}

fn check_payload(payload: &[u8]) {
    assert!(payload.len() <= PAYLOAD_BYTES_MAX, "payload of {} bytes", payload.len());
}

fn put_stop(out: &mut BodyWriter<'_>, stop: &Stop) {
    out.u64(stop.position.exits);
    out.u64(stop.position.rip);
    out.u64(stop.position.rcx);
    out.u32(stop.position.offset);
    out.u64(stop.digest);
}

fn take_stop(body: &mut BodyReader<'_>) -> Option<Stop> {
    let (exits, rip, rcx) = (body.u64()?, body.u64()?, body.u64()?);
    let (offset, digest) = (body.u32()?, body.u64()?);
    Some(Stop {
        position: Position {
            exits,
            offset,
            rip,
            rcx,
        },
        digest,
    })
}

impl Body<'_> {
    /// Writes the frame of an entry with this body to the start of `out` and gives its length.
    ///
    /// # Panics
    /// If `out` is shorter than [`Body::frame_bytes`] or a payload exceeds [`PAYLOAD_BYTES_MAX`].
    pub fn encode(&self, lsn: Lsn, generation: Generation, device: DeviceId, queue: u16, out: &mut [u8]) -> usize {
        let header = Header {
            lsn,
            generation,
            kind: self.kind(),
            device,
            queue,
        };
        frame::write(out, &header, self.body_bytes(), |body| {
            let mut out = BodyWriter::new(body);
            match self {
                Body::Boot {
                    fingerprint,
                    wall_ns,
                    devices,
                } => {
                    out.bytes(fingerprint);
                    out.u64(*wall_ns);
                    out.bytes(devices);
                }
                Body::Kick(stop) | Body::Sync(stop) => put_stop(&mut out, stop),
                Body::Input { sequence, payload } => {
                    check_payload(payload);
                    out.u64(*sequence);
                    out.bytes(payload);
                }
                Body::Pages { payload } => {
                    check_payload(payload);
                    out.bytes(payload);
                }
                Body::State { stop, payload } => {
                    check_payload(payload);
                    put_stop(&mut out, stop);
                    out.bytes(payload);
                }
                Body::Write { sector, payload } => {
                    check_payload(payload);
                    out.u64(*sector);
                    out.bytes(payload);
                }
                Body::Zeroes { sector, sectors, unmap } => {
                    out.u64(*sector);
                    out.u32(*sectors);
                    out.u8(u8::from(*unmap));
                }
                Body::Flush => {}
                Body::Synced { instance } => out.u64(*instance),
                Body::Configuration(timing) => timing.put(&mut out),
                Body::Compare { sector, sectors } => {
                    out.u64(*sector);
                    out.u32(*sectors);
                }
                Body::Transferred => {}
                Body::Deliver { stop, through } => {
                    put_stop(&mut out, stop);
                    out.u64(*through);
                }
                Body::Time { stop, now_ns } => {
                    put_stop(&mut out, stop);
                    out.u64(*now_ns);
                }
                Body::Console { stop, bytes } => {
                    put_stop(&mut out, stop);
                    out.u32(*bytes);
                }
                Body::PowerOff { stop, reset } => {
                    put_stop(&mut out, stop);
                    out.u8(u8::from(*reset));
                }
            }
        })
    }
}

impl<'a> Entry<'a> {
    /// Writes the entry's frame to the start of `out` and gives its length.
    ///
    /// # Panics
    /// As [`Body::encode`].
    pub fn encode(&self, out: &mut [u8]) -> usize {
        self.body
            .encode(self.lsn, self.generation, self.device, self.queue, out)
    }

    /// Reads the entry in exactly one frame.
    ///
    /// # Errors
    /// [`FrameError`] for a frame that is damaged, malformed, or not a log entry.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, FrameError> {
        let (header, body) = frame::read(bytes)?;
        let (kind, lsn) = (header.kind, header.lsn);
        let mut reader = BodyReader::new(body);
        let rest = |reader: &mut BodyReader<'a>| std::mem::replace(reader, BodyReader::new(&[])).rest();
        let body = match kind {
            KIND_BOOT => reader
                .array()
                .zip(reader.u64())
                .map(|(fingerprint, wall_ns)| Body::Boot {
                    fingerprint,
                    wall_ns,
                    devices: rest(&mut reader),
                }),
            KIND_KICK => take_stop(&mut reader).map(Body::Kick),
            KIND_SYNC => take_stop(&mut reader).map(Body::Sync),
            KIND_INPUT => reader.u64().map(|sequence| Body::Input {
                sequence,
                payload: rest(&mut reader),
            }),
            KIND_PAGES => Some(Body::Pages {
                payload: rest(&mut reader),
            }),
            KIND_STATE => take_stop(&mut reader).map(|stop| Body::State {
                stop,
                payload: rest(&mut reader),
            }),
            KIND_WRITE => reader.u64().map(|sector| Body::Write {
                sector,
                payload: rest(&mut reader),
            }),
            KIND_ZEROES => (|| {
                let (sector, sectors) = (reader.u64()?, reader.u32()?);
                let unmap = reader.u8().filter(|unmap| *unmap <= 1)? == 1;
                Some(Body::Zeroes { sector, sectors, unmap })
            })(),
            KIND_FLUSH => Some(Body::Flush),
            KIND_SYNCED => reader.u64().map(|instance| Body::Synced { instance }),
            KIND_CONFIGURATION => Timing::take(&mut reader).map(Body::Configuration),
            KIND_COMPARE => reader
                .u64()
                .zip(reader.u32())
                .map(|(sector, sectors)| Body::Compare { sector, sectors }),
            KIND_TRANSFERRED => Some(Body::Transferred),
            KIND_DELIVER => take_stop(&mut reader)
                .zip(reader.u64())
                .map(|(stop, through)| Body::Deliver { stop, through }),
            KIND_TIME => take_stop(&mut reader)
                .zip(reader.u64())
                .map(|(stop, now_ns)| Body::Time { stop, now_ns }),
            KIND_CONSOLE => take_stop(&mut reader)
                .zip(reader.u32())
                .map(|(stop, bytes)| Body::Console { stop, bytes }),
            KIND_POWER_OFF => {
                take_stop(&mut reader)
                    .zip(reader.u8().filter(|reset| *reset <= 1))
                    .map(|(stop, reset)| Body::PowerOff {
                        stop,
                        reset: reset == 1,
                    })
            }
            _ => return Err(FrameError::Kind { kind, lsn }),
        };
        let body = body
            .filter(|_| reader.is_empty())
            .ok_or(FrameError::Body { kind, lsn })?;
        Ok(Self {
            lsn,
            generation: header.generation,
            device: header.device,
            queue: header.queue,
            body,
        })
    }
}

/// The header of the frame in `bytes`, if [`Entry::decode`] would take it: for whoever passes entries on and wants nothing of their bodies.
/// An entry is large, and to build it costs more than to check it.
///
/// # Errors
/// As [`Entry::decode`].
pub fn check(bytes: &[u8]) -> Result<Header, FrameError> {
    let (header, body) = frame::read(bytes)?;
    let (kind, lsn) = (header.kind, header.lsn);
    let is_flag = |at: usize| body.get(at).is_some_and(|flag| *flag <= 1);
    let is_whole = match kind {
        KIND_BOOT => body.len() >= 40,
        KIND_KICK | KIND_SYNC => body.len() == STOP_BYTES,
        KIND_INPUT | KIND_WRITE => body.len() >= 8,
        KIND_PAGES => true,
        KIND_STATE => body.len() >= STOP_BYTES,
        KIND_ZEROES => body.len() == 13 && is_flag(12),
        KIND_FLUSH | KIND_TRANSFERRED => body.is_empty(),
        KIND_COMPARE => body.len() == 12,
        KIND_SYNCED => body.len() == 8,
        // There are few, and its numbers are checked too.
        KIND_CONFIGURATION => {
            let mut reader = BodyReader::new(body);
            Timing::take(&mut reader).is_some() && reader.is_empty()
        }
        KIND_DELIVER | KIND_TIME => body.len() == STOP_BYTES + 8,
        KIND_CONSOLE => body.len() == STOP_BYTES + 4,
        KIND_POWER_OFF => body.len() == STOP_BYTES + 1 && is_flag(STOP_BYTES),
        _ => return Err(FrameError::Kind { kind, lsn }),
    };
    match is_whole {
        true => Ok(header),
        false => Err(FrameError::Body { kind, lsn }),
    }
}

#[cfg(test)]
mod tests;
