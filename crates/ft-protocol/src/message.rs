//! Control messages between the two `ft-log` daemons of a VM, in the same frames as log entries.
//!
//! The logging channel (TCP) carries entries and every message but heartbeats; heartbeats are UDP datagrams of one frame.

use crate::{
    frame::{self, BodyReader, BodyWriter, FrameError, Header},
    ids::{DeviceId, Generation, Lsn},
    limits::{DIGEST_BYTES, DIGESTS_MAX, HEADER_BYTES, MESSAGE_BYTES_MAX, VM_NAME_BYTES_MAX},
    timing::Timing,
    versions::Versions,
};

/// What an acknowledgement must say of an entry before the outputs it marks may leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Strength {
    /// The backup has it where its replay will find it.
    #[default]
    Received,
    /// The backup's journal has it on stable storage.
    Durable,
    /// The backup's replay has applied it.
    Replayed,
}

impl Strength {
    const ALL: [Self; 3] = [Self::Received, Self::Durable, Self::Replayed];
}

/// How far the backup is with the log: what it has received, flushed and replayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Watermarks {
    /// Every entry up to here is where the replay will find it.
    pub received: Lsn,
    /// Every entry up to here is in the journal, flushed.
    pub durable: Lsn,
    /// Every entry up to here was applied.
    pub replayed: Lsn,
}

impl Watermarks {
    /// The one that a strength is about.
    #[must_use]
    pub fn of(&self, strength: Strength) -> Lsn {
        match strength {
            Strength::Received => self.received,
            Strength::Durable => self.durable,
            Strength::Replayed => self.replayed,
        }
    }
}

/// What one side says to the other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// First message of both sides on a new channel. The primary speaks first. The first one makes the pair, later ones resume it.
    Hello(Hello),
    /// The other side's hello was refused; the channel closes.
    Refuse {
        /// For the other side's operator.
        reason: String,
    },
    /// New backup to survivor: the state is here, whole. Said again on each new channel while `Synced` has not come.
    Adopted,
    /// New backup to survivor: what its disk holds there, as of an entry [`crate::Body::Compare`] that it has applied.
    Digests {
        /// First sector of the range.
        sector: u64,
        /// One for each block of the range, in order; at least one, at most [`DIGESTS_MAX`](crate::limits::DIGESTS_MAX).
        digests: Vec<Digest>,
    },
    /// Backup to primary: how far it is. The header's LSN is what it has received.
    Ack(Watermarks),
    /// The sender's replica ended: take over, or go on alone.
    Gone {
        /// For the operator.
        reason: String,
    },
    /// UDP: the sender is alive. The LSN is its last one (appended, or received).
    Heartbeat {
        /// Which VM, since a daemon serves many: [`vm_hash`].
        vm: u64,
        /// The sender's last LSN.
        lsn: Lsn,
        /// Grows by one with each datagram.
        sequence: u64,
        /// The last entry that the sender's guest applied or wrote.
        replayed: Lsn,
        /// The sender takes no more entries from the channel until its replay has made room.
        full: bool,
        /// The sender has not heard of this side for longer than it should have, and wants an answer at once. From version 5 on.
        asks: bool,
    },
}

/// Digest of a block of a disk: the first half of its SHA-256.
pub type Digest = [u8; DIGEST_BYTES];

/// What the sender of a hello has of the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Standing {
    /// The whole: it is the primary, a backup from the log's first entry on, or one that is synchronised.
    #[default]
    Whole,
    /// Nothing. It asks a live side to synchronise it as its new backup.
    Nothing,
    /// Something, which is not enough to take over: it is being synchronised.
    Part,
}

impl Standing {
    const ALL: [Self; 3] = [Self::Whole, Self::Nothing, Self::Part];
}

/// Who a side is, what it would run, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hello {
    /// What the sender speaks.
    pub versions: Versions,
    /// The VM.
    pub vm: String,
    /// Whether the sender is the primary.
    pub primary: bool,
    /// Digest of everything both sides must start from.
    pub fingerprint: [u8; 32],
    /// Drawn at random at every start: a daemon that was started anew is another one, and has not what the former one had.
    pub instance: u64,
    /// What the primary waits for; a backup repeats it.
    pub ack: Strength,
    /// The sender's last entry (header LSN). Where it answers a host that has nothing: the last entry whose effect is in the state.
    pub last: Lsn,
    /// What the sender has. Those who speak no version that knows it have the whole.
    pub standing: Standing,
    /// The times that the sender keeps, from version 5 on; a backup takes those of the side that executes the VM.
    pub timing: Option<Timing>,
}

/// Bytes of a hello's body but for the VM's name and what versions 4 and 5 appended.
const HELLO_BYTES: usize = 51;

const KIND_HELLO: u8 = 128;
const KIND_REFUSE: u8 = 129;
const KIND_ACK: u8 = 130;
const KIND_GONE: u8 = 131;
const KIND_HEARTBEAT: u8 = 132;
const KIND_ADOPTED: u8 = 133;
/// Kind byte of [`Message::Digests`].
const KIND_DIGESTS: u8 = 134;

/// Short stable name of a VM for datagrams (FNV-1a); a collision is caught by the channel's hello.
#[must_use]
pub fn vm_hash(vm: &str) -> u64 {
    vm.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

fn truncated(reason: &str) -> &str {
    let mut end = reason.len().min(MESSAGE_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

impl Message {
    /// Appends the message's frame to `out`, stamped with the sender's generation. A reason that is too long is cut.
    ///
    /// # Panics
    /// If a hello's VM name is longer than [`VM_NAME_BYTES_MAX`]: it is checked where it enters the program. With more digests than a
    /// message has room for.
    pub fn encode(&self, generation: Generation, out: &mut Vec<u8>) {
        let (kind, lsn, length) = match self {
            Self::Hello(hello) => {
                assert!(hello.vm.len() <= VM_NAME_BYTES_MAX);
                let timing = hello.says_timing().map_or(0, |_| Timing::BYTES);
                let appended = usize::from(hello.says_standing()) + timing;
                (KIND_HELLO, hello.last, HELLO_BYTES + hello.vm.len() + appended)
            }
            Self::Refuse { reason } => (KIND_REFUSE, Lsn::ZERO, truncated(reason).len()),
            Self::Adopted => (KIND_ADOPTED, Lsn::ZERO, 0),
            Self::Digests { digests, .. } => {
                assert!(digests.len() <= DIGESTS_MAX);
                (KIND_DIGESTS, Lsn::ZERO, 8 + digests.len() * DIGEST_BYTES)
            }
            Self::Ack(watermarks) => (KIND_ACK, watermarks.received, 16),
            Self::Gone { reason } => (KIND_GONE, Lsn::ZERO, truncated(reason).len()),
            Self::Heartbeat { lsn, .. } => (KIND_HEARTBEAT, *lsn, 25),
        };
        let header = Header {
            lsn,
            generation,
            kind,
            device: DeviceId::SHIM,
            queue: 0,
        };
        let start = out.len();
        out.resize(start + HEADER_BYTES + length, 0);
        frame::write(&mut out[start..], &header, length, |body| {
            let mut body = BodyWriter::new(body);
            match self {
                Self::Hello(hello) => {
                    body.u32(hello.versions.newest);
                    body.u8(u8::from(hello.primary));
                    body.bytes(&hello.fingerprint);
                    body.u64(hello.instance);
                    body.u8(hello.ack as u8);
                    body.u32(hello.versions.oldest);
                    body.u8(hello.vm.len() as u8);
                    body.bytes(hello.vm.as_bytes());
                    if hello.says_standing() {
                        body.u8(hello.standing as u8);
                    }
                    if let Some(timing) = hello.says_timing() {
                        timing.put(&mut body);
                    }
                }
                Self::Adopted => {}
                Self::Digests { sector, digests } => {
                    body.u64(*sector);
                    digests.iter().for_each(|digest| body.bytes(digest));
                }
                Self::Refuse { reason } | Self::Gone { reason } => body.bytes(truncated(reason).as_bytes()),
                Self::Ack(watermarks) => {
                    body.u64(watermarks.durable.0);
                    body.u64(watermarks.replayed.0);
                }
                Self::Heartbeat {
                    vm,
                    sequence,
                    replayed,
                    full,
                    asks,
                    ..
                } => {
                    body.u64(*vm);
                    body.u64(*sequence);
                    body.u64(replayed.0);
                    body.u8(u8::from(*full) | u8::from(*asks) << 1);
                }
            }
        });
    }

    /// Reads the message in exactly one frame; gives the sender's generation with it.
    ///
    /// # Errors
    /// [`FrameError`] for a frame that is damaged, malformed, or not a control message.
    pub fn decode(bytes: &[u8]) -> Result<(Generation, Self), FrameError> {
        let (header, body) = frame::read(bytes)?;
        let (kind, lsn) = (header.kind, header.lsn);
        let malformed = FrameError::Body { kind, lsn };
        if body.len() > MESSAGE_BYTES_MAX {
            return Err(malformed);
        }
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| malformed);
        let mut reader = BodyReader::new(body);
        let message = match kind {
            KIND_HELLO => {
                let (Some(newest), Some(primary), Some(fingerprint)) = (reader.u32(), reader.u8(), reader.array())
                else {
                    return Err(malformed);
                };
                if newest < Versions::FIRST_WITH_RANGE {
                    // What follows is another release's affair; the answer names the versions.
                    return Ok((header.generation, Self::Hello(Hello::of_version(newest, primary == 1))));
                }
                let (Some(instance), Some(ack), Some(oldest), Some(length)) =
                    (reader.u64(), reader.u8(), reader.u32(), reader.u8())
                else {
                    return Err(malformed);
                };
                let ack = *Strength::ALL.get(usize::from(ack)).ok_or(malformed)?;
                let vm = text(reader.bytes(length.into()).ok_or(malformed)?)?;
                if vm.len() > VM_NAME_BYTES_MAX || primary > 1 || oldest > newest {
                    return Err(malformed);
                }
                let standing = match newest >= Versions::FIRST_WITH_REPAIR {
                    true => reader.u8().ok_or(malformed)?,
                    false => 0,
                };
                let standing = *Standing::ALL.get(usize::from(standing)).ok_or(malformed)?;
                let timing = match newest >= Versions::FIRST_WITH_TIMING {
                    true => Some(Timing::take(&mut reader).ok_or(malformed)?),
                    false => None,
                };
                // Who speaks a newer version may have more to say, which is for those who understand it.
                if newest <= Versions::SPOKEN.newest && !reader.is_empty() {
                    return Err(malformed);
                }
                Self::Hello(Hello {
                    versions: Versions { oldest, newest },
                    vm,
                    primary: primary == 1,
                    fingerprint,
                    instance,
                    ack,
                    last: lsn,
                    standing,
                    timing,
                })
            }
            KIND_ADOPTED if reader.is_empty() => Self::Adopted,
            KIND_ADOPTED => return Err(malformed),
            KIND_DIGESTS => {
                let sector = reader.u64().ok_or(malformed)?;
                let (digests, rest) = body[8..].as_chunks::<DIGEST_BYTES>();
                if digests.is_empty() || !rest.is_empty() || digests.len() > DIGESTS_MAX {
                    return Err(malformed);
                }
                Self::Digests {
                    sector,
                    digests: digests.to_vec(),
                }
            }
            KIND_REFUSE => Self::Refuse { reason: text(body)? },
            KIND_GONE => Self::Gone { reason: text(body)? },
            KIND_ACK => {
                let (Some(durable), Some(replayed), true) = (reader.u64(), reader.u64(), reader.is_empty()) else {
                    return Err(malformed);
                };
                Self::Ack(Watermarks {
                    received: lsn,
                    durable: Lsn(durable),
                    replayed: Lsn(replayed),
                })
            }
            KIND_HEARTBEAT => {
                let (Some(vm), Some(sequence), Some(replayed)) = (reader.u64(), reader.u64(), reader.u64()) else {
                    return Err(malformed);
                };
                let (Some(flags @ 0..=3), true) = (reader.u8(), reader.is_empty()) else {
                    return Err(malformed);
                };
                Self::Heartbeat {
                    vm,
                    lsn,
                    sequence,
                    replayed: Lsn(replayed),
                    full: flags & 1 != 0,
                    asks: flags & 2 != 0,
                }
            }
            _ => return Err(FrameError::Kind { kind, lsn }),
        };
        Ok((header.generation, message))
    }
}

impl Hello {
    /// A hello of which no more is understood than its version.
    fn of_version(version: u32, primary: bool) -> Self {
        Self {
            versions: Versions {
                oldest: version,
                newest: version,
            },
            vm: String::new(),
            primary,
            fingerprint: [0; 32],
            instance: 0,
            ack: Strength::default(),
            last: Lsn::ZERO,
            standing: Standing::default(),
            timing: None,
        }
    }

    fn says_timing(&self) -> Option<&Timing> {
        let is_known = self.versions.newest >= Versions::FIRST_WITH_TIMING;
        is_known.then(|| self.timing.as_ref().expect("who speaks this version has times"))
    }

    fn says_standing(&self) -> bool {
        self.versions.newest >= Versions::FIRST_WITH_REPAIR
    }

    /// Why `self` (what this side is) cannot be paired with `other`; `None` if it can.
    #[must_use]
    pub fn mismatch(&self, other: &Self) -> Option<String> {
        if self.versions.common(other.versions).is_none() {
            return Some(format!(
                "protocol version {} there, {} here: none is spoken on both hosts, bring the older one to the newer one's release",
                other.versions, self.versions
            ));
        }
        if other.vm != self.vm {
            return Some(format!(
                "the peer protects VM '{}', this side VM '{}': check --vm and --peer on both hosts",
                other.vm, self.vm
            ));
        }
        if other.primary == self.primary {
            let role = if self.primary { "primary" } else { "backup" };
            return Some(format!(
                "both sides were started as {role}: start one with --role primary and one with --role backup"
            ));
        }
        if other.fingerprint != self.fingerprint {
            return Some(
                "the two sides would start different machines: kernel, command line, memory, CPUID and disk image must be identical"
                    .into(),
            );
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::timing::EXAMPLE;

    fn hello() -> Hello {
        Hello {
            versions: Versions::SPOKEN,
            vm: "ledger".into(),
            primary: true,
            fingerprint: [7; 32],
            instance: 11,
            ack: Strength::Durable,
            last: Lsn(12),
            standing: Standing::Whole,
            timing: Some(EXAMPLE),
        }
    }

    #[test]
    fn every_message_reads_back() {
        let standing = |standing| Message::Hello(Hello { standing, ..hello() });
        for message in [
            Message::Hello(hello()),
            standing(Standing::Nothing),
            standing(Standing::Part),
            Message::Adopted,
            Message::Digests {
                sector: 1 << 40,
                digests: vec![[7; DIGEST_BYTES]; DIGESTS_MAX],
            },
            Message::Refuse { reason: "no".into() },
            Message::Ack(Watermarks {
                received: Lsn(99),
                durable: Lsn(98),
                replayed: Lsn(97),
            }),
            Message::Gone {
                reason: "vhost-ft-blk ended".into(),
            },
            Message::Heartbeat {
                vm: vm_hash("ledger"),
                lsn: Lsn(4),
                sequence: 5,
                replayed: Lsn(3),
                full: true,
                asks: true,
            },
        ] {
            let mut bytes = Vec::new();
            message.encode(Generation(3), &mut bytes);
            assert_eq!(Message::decode(&bytes).unwrap(), (Generation(3), message));
        }
    }

    #[test]
    fn a_hello_of_another_release_still_says_its_version() {
        let mut bytes = Vec::new();
        let other = hello_of(2, 2);
        Message::Hello(other).encode(Generation(3), &mut bytes);
        let Ok((_, Message::Hello(read))) = Message::decode(&bytes) else {
            panic!("not read");
        };
        assert!(
            hello()
                .mismatch(&read)
                .unwrap()
                .contains("version 2 there, 3 to 5 here")
        );
    }

    fn hello_of(oldest: u32, newest: u32) -> Hello {
        let versions = Versions { oldest, newest };
        Hello { versions, ..hello() }
    }

    #[test]
    fn a_hello_of_newer_versions_may_say_more_and_one_of_ours_may_not() {
        let read = |hello: &Hello, more: &[u8]| {
            let mut bytes = Vec::new();
            Message::Hello(hello.clone()).encode(Generation(3), &mut bytes);
            let (header, body) = frame::read(&bytes).unwrap();
            let body = [body, more].concat();
            let mut longer = vec![0; HEADER_BYTES + body.len()];
            frame::write(&mut longer, &header, body.len(), |out| out.copy_from_slice(&body));
            Message::decode(&longer).map(|(_, message)| message)
        };
        let newer = hello_of(3, 9);
        assert_eq!(read(&newer, b"more"), Ok(Message::Hello(newer.clone())));
        assert_eq!(read(&newer, b""), Ok(Message::Hello(newer)));
        assert!(read(&hello(), b"more").is_err());
        assert!(read(&hello_of(10, 9), b"").is_err(), "an impossible range");
    }

    #[test]
    fn a_range_that_overlaps_is_taken_and_one_that_does_not_is_named() {
        let backup = |oldest, newest| Hello {
            primary: false,
            ..hello_of(oldest, newest)
        };
        assert_eq!(hello_of(3, 5).mismatch(&backup(4, 7)), None);
        let refused = hello_of(3, 5).mismatch(&backup(6, 7)).unwrap();
        assert!(refused.contains("version 6 to 7 there, 3 to 5 here"), "{refused}");
    }

    #[test]
    fn a_pair_must_agree_on_everything_but_the_role() {
        let backup = Hello {
            primary: false,
            ..hello()
        };
        assert_eq!(hello().mismatch(&backup), None);
        assert!(hello().mismatch(&hello()).unwrap().contains("primary"));
        assert!(
            hello()
                .mismatch(&Hello {
                    versions: hello_of(9, 9).versions,
                    ..backup.clone()
                })
                .unwrap()
                .contains("version 9")
        );
        assert!(
            hello()
                .mismatch(&Hello {
                    vm: "other".into(),
                    ..backup.clone()
                })
                .unwrap()
                .contains("'other'")
        );
        assert!(
            hello()
                .mismatch(&Hello {
                    fingerprint: [0; 32],
                    ..backup
                })
                .unwrap()
                .contains("different machines")
        );
    }

    proptest! {
        #[test]
        fn arbitrary_messages_never_panic(kind in 120u8..140, body in proptest::collection::vec(any::<u8>(), 0..120)) {
            let header = Header { lsn: Lsn(1), generation: Generation(1), kind, device: DeviceId(0), queue: 0 };
            let mut bytes = vec![0; HEADER_BYTES + body.len()];
            frame::write(&mut bytes, &header, body.len(), |out| out.copy_from_slice(&body));
            let _ = Message::decode(&bytes);
        }
    }
}
