//! The frame: one format for the rings, the wire and the journal.
//!
//! ```text
//!  0 u32 length      whole frame, header included
//!  4 u32 crc32c      over bytes 8..length
//!  8 u64 lsn         log entries: the LSN; messages: as the message says
//! 16 u32 generation
//! 20 u8  kind        1..=127 log entry (see `entry`), 128..=255 control message (see `message`)
//! 21 u8  device
//! 22 u16 queue
//! 24 body
//! ```
//! All numbers are little endian. Version 2. A change of this layout is a new [`VERSION`], and new [`crate::versions`] between two hosts.

use thiserror::Error;

use crate::{
    ids::{DeviceId, Generation, Lsn},
    limits::{FRAME_BYTES_MAX, HEADER_BYTES},
};

/// Version of the frame format and of the entries in it: in the rings of a host, its local handshake and its journal. What two hosts say to
/// each other has [`crate::versions`] of its own.
///
/// 1: first. 2: as version 2 there.
pub const VERSION: u32 = 2;

/// First kind that is a control message and not a log entry.
pub const KIND_MESSAGE_FIRST: u8 = 128;

/// The fixed part of every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Position in the log, or what a control message says of one.
    pub lsn: Lsn,
    /// Generation of the sender.
    pub generation: Generation,
    /// What the body is.
    pub kind: u8,
    /// The device it is about.
    pub device: DeviceId,
    /// The queue of that device.
    pub queue: u16,
}

impl Header {
    /// Whether the frame is a log entry.
    #[must_use]
    pub fn is_entry(&self) -> bool {
        self.kind < KIND_MESSAGE_FIRST
    }
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// A length no frame can have.
    #[error("frame length {length} is outside {HEADER_BYTES}..={FRAME_BYTES_MAX}")]
    Length {
        /// The length the frame claims.
        length: usize,
    },
    /// The checksum does not match: bytes were changed.
    #[error("checksum mismatch in the frame that claims LSN {lsn}: stored {stored:#010x}, computed {computed:#010x}")]
    Checksum {
        /// The LSN in the (untrusted) header.
        lsn: Lsn,
        /// The checksum in the frame.
        stored: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// A kind this version does not know.
    #[error("unknown frame kind {kind} at LSN {lsn}")]
    Kind {
        /// The kind.
        kind: u8,
        /// The LSN in the header.
        lsn: Lsn,
    },
    /// A body that is too short, too long or has an impossible field.
    #[error("malformed body of frame kind {kind} at LSN {lsn}")]
    Body {
        /// The kind.
        kind: u8,
        /// The LSN in the header.
        lsn: Lsn,
    },
}

#[inline]
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[inline]
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}

/// The length of the frame that starts `bytes`, once its first four bytes are there.
///
/// # Errors
/// [`FrameError::Length`] for a length outside the limits; nothing is trusted before this check.
#[inline]
pub fn peek_length(bytes: &[u8]) -> Result<Option<usize>, FrameError> {
    if bytes.len() < 4 {
        return Ok(None);
    }
    let length = u32_at(bytes, 0) as usize;
    if !(HEADER_BYTES..=FRAME_BYTES_MAX).contains(&length) {
        return Err(FrameError::Length { length });
    }
    Ok(Some(length))
}

/// Writes a whole frame to the start of `out`: header and checksum round a body that `fill` writes into `body_length` bytes.
///
/// # Panics
/// If `out` is shorter than the frame, or the frame longer than [`FRAME_BYTES_MAX`]: both are the caller's bug.
#[inline]
pub fn write(out: &mut [u8], header: &Header, body_length: usize, fill: impl FnOnce(&mut [u8])) -> usize {
    let length = HEADER_BYTES + body_length;
    assert!(length <= FRAME_BYTES_MAX, "frame of {length} bytes");
    let out = &mut out[..length];
    fill(&mut out[HEADER_BYTES..]);
    out[0..4].copy_from_slice(&(length as u32).to_le_bytes());
    out[8..16].copy_from_slice(&header.lsn.0.to_le_bytes());
    // One store: a checksum that reads what several narrower ones have just written waits until they are in the cache.
    let rest = u64::from(header.generation.0)
        | u64::from(header.kind) << 32
        | u64::from(header.device.0) << 40
        | u64::from(header.queue) << 48;
    out[16..24].copy_from_slice(&rest.to_le_bytes());
    let checksum = crc_fast::crc32_iscsi(&out[8..]);
    out[4..8].copy_from_slice(&checksum.to_le_bytes());
    length
}

/// Reads one whole frame: checks length and checksum, gives header and body.
///
/// # Errors
/// [`FrameError`]; `bytes` must be exactly one frame.
#[inline(always)]
pub fn read(bytes: &[u8]) -> Result<(Header, &[u8]), FrameError> {
    if peek_length(bytes)? != Some(bytes.len()) {
        return Err(FrameError::Length { length: bytes.len() });
    }
    let rest = u64_at(bytes, 16);
    let header = Header {
        lsn: Lsn(u64_at(bytes, 8)),
        generation: Generation(rest as u32),
        kind: (rest >> 32) as u8,
        device: DeviceId((rest >> 40) as u8),
        queue: (rest >> 48) as u16,
    };
    let stored = u32_at(bytes, 4);
    let computed = crc_fast::crc32_iscsi(&bytes[8..]);
    if stored != computed {
        return Err(FrameError::Checksum {
            lsn: header.lsn,
            stored,
            computed,
        });
    }
    Ok((header, &bytes[HEADER_BYTES..]))
}

/// Sequential reader of a body; every read is bounds-checked.
pub(crate) struct BodyReader<'a> {
    rest: &'a [u8],
}

impl<'a> BodyReader<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Self {
        Self { rest: body }
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        Some(self.array::<1>()?[0])
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

/// Sequential writer of a body whose length the caller computed.
pub(crate) struct BodyWriter<'a> {
    rest: &'a mut [u8],
}

impl<'a> BodyWriter<'a> {
    pub(crate) fn new(body: &'a mut [u8]) -> Self {
        Self { rest: body }
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        let rest = std::mem::take(&mut self.rest);
        let (head, rest) = rest.split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.rest = rest;
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let header = Header {
            lsn: Lsn(7),
            generation: Generation(3),
            kind: 9,
            device: DeviceId(1),
            queue: 2,
        };
        let mut out = vec![0; 64];
        let length = write(&mut out, &header, 5, |body| body.copy_from_slice(b"hello"));
        out.truncate(length);
        out
    }

    #[test]
    fn a_frame_reads_back() {
        let bytes = sample();
        let (header, body) = read(&bytes).unwrap();
        assert_eq!((header.lsn, header.generation, header.kind), (Lsn(7), Generation(3), 9));
        assert_eq!((header.device, header.queue, body), (DeviceId(1), 2, &b"hello"[..]));
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let bytes = sample();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bad).is_err(), "bit {bit} flipped unseen");
        }
    }

    #[test]
    fn the_checksum_is_crc32c_at_every_length_and_place() {
        // RFC 3720, and bit by bit.
        assert_eq!(crc_fast::crc32_iscsi(b"123456789"), 0xe306_9283);
        let bytes: Vec<u8> = (0..9000u32).map(|index| ((index * index) >> 3) as u8).collect();
        for length in (0..300).chain((300..8900).step_by(97)) {
            let bytes = &bytes[length % 17..][..length];
            let bit_by_bit = bytes.iter().fold(u32::MAX, |crc, byte| {
                (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ ((crc & 1) * 0x82f6_3b78))
            });
            assert_eq!(crc_fast::crc32_iscsi(bytes), !bit_by_bit, "of {length} bytes");
        }
    }

    #[test]
    fn lengths_outside_the_limits_are_refused_before_anything_is_read() {
        assert_eq!(peek_length(&[1, 0, 0]), Ok(None));
        assert!(matches!(
            peek_length(&[23, 0, 0, 0]),
            Err(FrameError::Length { length: 23 })
        ));
        assert!(peek_length(&u32::MAX.to_le_bytes()).is_err());
        assert_eq!(
            peek_length(&(FRAME_BYTES_MAX as u32).to_le_bytes()),
            Ok(Some(FRAME_BYTES_MAX))
        );
    }
}
