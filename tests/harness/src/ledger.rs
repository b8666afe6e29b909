//! The ledger guest's client protocol and disk layout (docs/interfaces.md §2), from the outside.
//!
//! Written independently of the guest: the witness must not share the guest's mistakes.

use sha2::{Digest, Sha256};

/// A chain hash.
pub type Hash = [u8; 32];

/// The hash of the empty chain.
pub const GENESIS: Hash = [0; 32];
/// Longest payload of a record.
pub const PAYLOAD_MAX: usize = 256;
/// Bytes of a disk sector, and of a record on disk.
pub const SECTOR: usize = 512;

const REQUEST_MAGIC: u32 = 0x314C_5446;
const REQUEST_HEADER: usize = 16;
const ANSWER_MAGIC: u32 = 0x3141_5446;
const ANSWER_HEADER: usize = 56;
const DISK_MAGIC: u64 = 0x0031_474C_5446;
const DISK_VERSION: u32 = 1;
const RECORD_MAGIC: u32 = 0x3152_464C;
const RECORD_PAYLOAD: usize = 56;

/// Bytes that are not what the protocol or the layout say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// The first word is another one.
    #[error("bad magic {found:#x} (expected {expected:#x})")]
    Magic {
        /// The word found.
        found: u64,
        /// The word that belongs there.
        expected: u64,
    },
    /// A length beyond the limit.
    #[error("payload of {0} bytes is longer than {PAYLOAD_MAX}")]
    Length(usize),
    /// A code that has no meaning.
    #[error("unknown {what} {code}")]
    Code {
        /// What the code should have been.
        what: &'static str,
        /// The code.
        code: u16,
    },
    /// A disk layout of another version.
    #[error("disk layout version {0} (expected {DISK_VERSION})")]
    Version(u32),
    /// Fewer bytes than a layout has.
    #[error("only {0} bytes")]
    Short(usize),
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Append record n.
    Append,
    /// Read record n.
    Read,
    /// Number and hash of the last record.
    Head,
    /// Answer, then power off.
    PowerOff,
}

impl Op {
    fn code(self) -> u16 {
        match self {
            Self::Append => 1,
            Self::Read => 2,
            Self::Head => 3,
            Self::PowerOff => 4,
        }
    }

    fn from_code(code: u16) -> Result<Self, LedgerError> {
        [Self::Append, Self::Read, Self::Head, Self::PowerOff]
            .into_iter()
            .find(|op| op.code() == code)
            .ok_or(LedgerError::Code {
                what: "operation",
                code,
            })
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// n is not last+1; the answer carries the last n.
    Sequence,
    /// Another payload is stored under n.
    Conflict,
    /// No such record.
    NotFound,
    /// The guest's disk failed.
    Io,
    /// The guest's disk is full.
    Full,
    /// Not a request.
    BadRequest,
}

impl Status {
    const ALL: [Self; 7] = [
        Self::Ok,
        Self::Sequence,
        Self::Conflict,
        Self::NotFound,
        Self::Io,
        Self::Full,
        Self::BadRequest,
    ];

    fn code(self) -> u16 {
        let index = Self::ALL
            .iter()
            .position(|status| *status == self)
            .expect("every status is listed");
        u16::try_from(index).expect("there are seven")
    }

    fn from_code(code: u16) -> Result<Self, LedgerError> {
        Self::ALL
            .get(usize::from(code))
            .copied()
            .ok_or(LedgerError::Code { what: "status", code })
    }
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub op: Op,
    /// The record's number; 0 where the operation has none.
    pub n: u64,
    /// The record, for [`Op::Append`].
    pub payload: Vec<u8>,
}

impl Request {
    /// Appends the request's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        assert!(
            self.payload.len() <= PAYLOAD_MAX,
            "the witness makes only payloads within the limit"
        );
        let length = u16::try_from(self.payload.len()).expect("at most 256");
        out.extend_from_slice(&REQUEST_MAGIC.to_le_bytes());
        out.extend_from_slice(&self.op.code().to_le_bytes());
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&self.n.to_le_bytes());
        out.extend_from_slice(&self.payload);
    }

    /// Takes one request off the front of `bytes`: it and its size, or nothing while it is incomplete.
    ///
    /// # Errors
    /// When the bytes are no request.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, LedgerError> {
        if bytes.len() < REQUEST_HEADER {
            return Ok(None);
        }
        expect_magic(u32_at(bytes, 0), REQUEST_MAGIC)?;
        let length = payload_length(u16_at(bytes, 6))?;
        let size = REQUEST_HEADER + length;
        if bytes.len() < size {
            return Ok(None);
        }
        let op = Op::from_code(u16_at(bytes, 4))?;
        Ok(Some((
            Self {
                op,
                n: u64_at(bytes, 8),
                payload: bytes[REQUEST_HEADER..size].to_vec(),
            },
            size,
        )))
    }
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// How the request ended.
    pub status: Status,
    /// The record's number, or the last one for [`Status::Sequence`] and [`Op::Head`].
    pub n: u64,
    /// The guest's virtual time since power-on.
    pub uptime_ns: u64,
    /// h(n).
    pub hash: Hash,
    /// The record, for [`Op::Read`].
    pub payload: Vec<u8>,
}

impl Answer {
    /// Appends the answer's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        assert!(self.payload.len() <= PAYLOAD_MAX, "answers carry records");
        let length = u16::try_from(self.payload.len()).expect("at most 256");
        out.extend_from_slice(&ANSWER_MAGIC.to_le_bytes());
        out.extend_from_slice(&self.status.code().to_le_bytes());
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&self.n.to_le_bytes());
        out.extend_from_slice(&self.uptime_ns.to_le_bytes());
        out.extend_from_slice(&self.hash);
        out.extend_from_slice(&self.payload);
    }

    /// Takes one answer off the front of `bytes`: it and its size, or nothing while it is incomplete.
    ///
    /// # Errors
    /// When the bytes are no answer.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, LedgerError> {
        if bytes.len() < ANSWER_HEADER {
            return Ok(None);
        }
        expect_magic(u32_at(bytes, 0), ANSWER_MAGIC)?;
        let length = payload_length(u16_at(bytes, 6))?;
        let size = ANSWER_HEADER + length;
        if bytes.len() < size {
            return Ok(None);
        }
        let answer = Self {
            status: Status::from_code(u16_at(bytes, 4))?,
            n: u64_at(bytes, 8),
            uptime_ns: u64_at(bytes, 16),
            hash: hash_at(bytes, 24),
            payload: bytes[ANSWER_HEADER..size].to_vec(),
        };
        Ok(Some((answer, size)))
    }
}

/// h(n) = SHA-256(h(n-1) || n || payload).
#[must_use]
pub fn chain(previous: &Hash, n: u64, payload: &[u8]) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update(previous);
    hasher.update(n.to_le_bytes());
    hasher.update(payload);
    hasher.finalize().into()
}

/// One record as it lies on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRecord {
    /// h(n).
    pub hash: Hash,
    /// Virtual time of the append.
    pub uptime_ns: u64,
    /// The record.
    pub payload: Vec<u8>,
}

impl DiskRecord {
    /// The sector of record `n`.
    #[must_use]
    pub fn encode(&self, n: u64) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        let length = u16::try_from(self.payload.len()).expect("at most 256");
        sector[0..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
        sector[4..6].copy_from_slice(&length.to_le_bytes());
        sector[8..16].copy_from_slice(&n.to_le_bytes());
        sector[16..48].copy_from_slice(&self.hash);
        sector[48..56].copy_from_slice(&self.uptime_ns.to_le_bytes());
        sector[RECORD_PAYLOAD..RECORD_PAYLOAD + self.payload.len()].copy_from_slice(&self.payload);
        sector
    }

    fn decode(sector: &[u8]) -> Result<(u64, Self), LedgerError> {
        expect_magic(u32_at(sector, 0), RECORD_MAGIC)?;
        let length = payload_length(u16_at(sector, 4))?;
        let record = Self {
            hash: hash_at(sector, 16),
            uptime_ns: u64_at(sector, 48),
            payload: sector[RECORD_PAYLOAD..RECORD_PAYLOAD + length].to_vec(),
        };
        Ok((u64_at(sector, 8), record))
    }
}

/// The sector 0 of a ledger disk.
#[must_use]
pub fn disk_header() -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    sector[0..8].copy_from_slice(&DISK_MAGIC.to_le_bytes());
    sector[8..12].copy_from_slice(&DISK_VERSION.to_le_bytes());
    sector
}

/// What lies on a disk: the records in order, and where the chain breaks, if it does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiskImage {
    /// Records 1, 2, 3, ... up to the first empty or broken sector.
    pub records: Vec<DiskRecord>,
    /// What is wrong behind the last good record, if anything is.
    pub broken: Option<String>,
}

impl DiskImage {
    /// Reads a whole image, verifying every hash, and that nothing lies behind the end of the chain.
    ///
    /// # Errors
    /// When sector 0 is not that of a ledger disk.
    pub fn read(image: &[u8]) -> Result<Self, LedgerError> {
        let header = image.get(..SECTOR).ok_or(LedgerError::Short(image.len()))?;
        if header.iter().all(|byte| *byte == 0) && image.iter().all(|byte| *byte == 0) {
            // The guest never came as far as writing its header: an empty chain.
            return Ok(Self::default());
        }
        let magic = u64_at(header, 0);
        if magic != DISK_MAGIC {
            return Err(LedgerError::Magic {
                found: magic,
                expected: DISK_MAGIC,
            });
        }
        let version = u32_at(header, 8);
        if version != DISK_VERSION {
            return Err(LedgerError::Version(version));
        }
        let mut disk = Self::default();
        let mut previous = GENESIS;
        let mut uptime_ns = 0;
        let mut ended = false;
        for (sector, expected_n) in image.chunks_exact(SECTOR).skip(1).zip(1_u64..) {
            if sector.iter().all(|byte| *byte == 0) {
                ended = true;
                continue;
            }
            let fault = match DiskRecord::decode(sector) {
                _ if ended => "a record lies behind the end of the chain".to_owned(),
                Err(error) => error.to_string(),
                Ok((n, _)) if n != expected_n => format!("it carries number {n}"),
                Ok((n, record)) if record.hash != chain(&previous, n, &record.payload) => {
                    "its hash does not continue the chain".to_owned()
                }
                Ok((_, record)) if record.uptime_ns < uptime_ns => "it is older than the record before it".to_owned(),
                Ok((_, record)) => {
                    previous = record.hash;
                    uptime_ns = record.uptime_ns;
                    disk.records.push(record);
                    continue;
                }
            };
            disk.broken = Some(format!("sector {expected_n}: {fault}"));
            break;
        }
        Ok(disk)
    }

    /// Record `n`, if it is in the chain.
    #[must_use]
    pub fn record(&self, n: u64) -> Option<&DiskRecord> {
        let index = usize::try_from(n.checked_sub(1)?).ok()?;
        self.records.get(index)
    }
}

fn expect_magic(found: u32, expected: u32) -> Result<(), LedgerError> {
    if found == expected {
        Ok(())
    } else {
        Err(LedgerError::Magic {
            found: found.into(),
            expected: expected.into(),
        })
    }
}

fn payload_length(length: u16) -> Result<usize, LedgerError> {
    let length = usize::from(length);
    if length <= PAYLOAD_MAX {
        Ok(length)
    } else {
        Err(LedgerError::Length(length))
    }
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the slice has N bytes")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn hash_at(bytes: &[u8], at: usize) -> Hash {
    array_at(bytes, at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(payloads: &[&[u8]]) -> Vec<u8> {
        let mut bytes = disk_header().to_vec();
        let mut hash = GENESIS;
        for (payload, n) in payloads.iter().zip(1_u64..) {
            hash = chain(&hash, n, payload);
            bytes.extend(
                DiskRecord {
                    hash,
                    uptime_ns: n * 10,
                    payload: payload.to_vec(),
                }
                .encode(n),
            );
        }
        bytes.extend([0; 4 * SECTOR]);
        bytes
    }

    #[test]
    fn header_words_are_those_of_the_contract() {
        let mut request = Vec::new();
        Request {
            op: Op::Append,
            n: 7,
            payload: b"ab".to_vec(),
        }
        .encode(&mut request);
        assert_eq!(request, b"FTL1\x01\x00\x02\x00\x07\0\0\0\0\0\0\0ab");
        let mut answer = Vec::new();
        Answer {
            status: Status::Conflict,
            n: 1,
            uptime_ns: 2,
            hash: [9; 32],
            payload: vec![],
        }
        .encode(&mut answer);
        assert_eq!(&answer[..8], b"FTA1\x02\x00\x00\x00");
        assert_eq!(answer.len(), ANSWER_HEADER);
        assert_eq!(&disk_header()[..5], b"FTLG1");
    }

    #[test]
    fn chain_is_plain_sha256_of_hash_number_payload() {
        let mut bytes = vec![0; 32];
        bytes.extend(1_u64.to_le_bytes());
        bytes.extend(b"first");
        assert_eq!(chain(&GENESIS, 1, b"first"), Hash::from(Sha256::digest(&bytes)));
    }

    #[test]
    fn whole_image_is_read() {
        let disk = DiskImage::read(&image(&[b"one", b"two", b""])).expect("a ledger disk");
        assert_eq!(disk.broken, None);
        assert_eq!(disk.records.len(), 3);
        assert_eq!(
            disk.record(2).map(|record| record.payload.as_slice()),
            Some(b"two".as_slice())
        );
        assert_eq!(disk.record(0), None);
        assert_eq!(disk.record(4), None);
    }

    #[test]
    fn flipped_byte_breaks_the_chain_where_it_lies() {
        let mut bytes = image(&[b"one", b"two", b"three"]);
        bytes[2 * SECTOR + RECORD_PAYLOAD] ^= 1;
        let disk = DiskImage::read(&bytes).expect("a ledger disk");
        assert_eq!(disk.records.len(), 1);
        assert!(disk.broken.expect("broken").contains("sector 2: its hash"));
    }

    #[test]
    fn record_behind_a_hole_is_reported() {
        let mut bytes = image(&[b"one", b"two", b"three"]);
        bytes[2 * SECTOR..3 * SECTOR].fill(0);
        let disk = DiskImage::read(&bytes).expect("a ledger disk");
        assert!(disk.broken.expect("broken").contains("behind the end"));
    }

    #[test]
    fn foreign_disk_is_refused_and_a_fresh_one_is_empty() {
        let mut bytes = image(&[b"one"]);
        bytes[0] = b'X';
        assert!(matches!(DiskImage::read(&bytes), Err(LedgerError::Magic { .. })));
        assert_eq!(DiskImage::read(&[0; 8 * SECTOR]), Ok(DiskImage::default()));
        assert_eq!(DiskImage::read(&[0; 8]), Err(LedgerError::Short(8)));
    }

    proptest! {
        #[test]
        fn answers_survive_the_wire(n: u64, uptime_ns: u64, hash: Hash, status in 0_u16..7,
                                    payload in prop::collection::vec(any::<u8>(), 0..=PAYLOAD_MAX)) {
            let answer = Answer { status: Status::from_code(status).unwrap(), n, uptime_ns, hash, payload };
            let mut bytes = Vec::new();
            answer.encode(&mut bytes);
            for short in 0..bytes.len() {
                prop_assert_eq!(Answer::decode(&bytes[..short]), Ok(None));
            }
            bytes.push(0xFF);
            let size = bytes.len() - 1;
            prop_assert_eq!(Answer::decode(&bytes), Ok(Some((answer, size))));
        }

        #[test]
        fn no_bytes_make_the_decoders_panic(bytes in prop::collection::vec(any::<u8>(), 0..2 * SECTOR)) {
            let _ = Answer::decode(&bytes);
            let _ = Request::decode(&bytes);
            let _ = DiskImage::read(&bytes);
        }
    }
}
