//! The client protocol: requests in, answers out, both little endian, both with an optional payload.
//!
//! ```text
//! request   u32 "FTL1"  u16 op      u16 length  u64 n  payload[length]
//! answer    u32 "FTA1"  u16 status  u16 length  u64 n  u64 uptime_ns  hash[32]  payload[length]
//! ```

use crate::chain::{HASH_OF_NOTHING, Hash};
use crate::limits::PAYLOAD_BYTES_MAX;

const REQUEST_MAGIC: u32 = 0x314C_5446;
const ANSWER_MAGIC: u32 = 0x3141_5446;

/// Bytes of a request without its payload.
pub const REQUEST_HEADER_BYTES: usize = 16;
/// Bytes of the longest request.
pub const REQUEST_BYTES_MAX: usize = REQUEST_HEADER_BYTES + PAYLOAD_BYTES_MAX;
/// Bytes of an answer without its payload.
pub const ANSWER_HEADER_BYTES: usize = 56;
/// Bytes of the longest answer.
pub const ANSWER_BYTES_MAX: usize = ANSWER_HEADER_BYTES + PAYLOAD_BYTES_MAX;

/// What a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Append record n.
    Append,
    /// Payload and hash of record n.
    Read,
    /// The last record.
    Head,
    /// Answer, then power off.
    PowerOff,
}

/// One request, still in the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// What the client wants.
    pub operation: Operation,
    /// Record number.
    pub n: u64,
    /// Of an APPEND; else empty.
    pub payload: &'a [u8],
    /// Bytes it takes in the stream.
    pub bytes: usize,
}

/// What the front of a receive buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// Not all of it is here.
    Incomplete,
    /// A request.
    Request(Request<'a>),
    /// Nothing this protocol knows; there is no way to find the next request.
    Malformed,
}

/// Looks at the front of a receive buffer. Needs at most `REQUEST_BYTES_MAX` bytes of it.
pub fn parse(bytes: &[u8]) -> Parsed<'_> {
    let magic = REQUEST_MAGIC.to_le_bytes();
    let seen = bytes.len().min(magic.len());
    if bytes[..seen] != magic[..seen] {
        return Parsed::Malformed;
    }
    let Some((header, rest)) = bytes.split_first_chunk::<REQUEST_HEADER_BYTES>() else {
        return Parsed::Incomplete;
    };
    let length = usize::from(u16::from_le_bytes([header[6], header[7]]));
    let operation = match u16::from_le_bytes([header[4], header[5]]) {
        1 => Operation::Append,
        2 => Operation::Read,
        3 => Operation::Head,
        4 => Operation::PowerOff,
        _ => return Parsed::Malformed,
    };
    let length_max = if operation == Operation::Append {
        PAYLOAD_BYTES_MAX
    } else {
        0
    };
    if length > length_max {
        return Parsed::Malformed;
    }
    let Some(payload) = rest.get(..length) else {
        return Parsed::Incomplete;
    };
    let mut n = [0; 8];
    n.copy_from_slice(&header[8..16]);
    let n = u64::from_le_bytes(n);
    Parsed::Request(Request {
        operation,
        n,
        payload,
        bytes: REQUEST_HEADER_BYTES + length,
    })
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// n is not last+1; the answer carries the last n.
    Sequence = 1,
    /// Another payload is stored under n.
    Conflict = 2,
    /// No record n.
    NotFound = 3,
    /// The disk refused.
    Io = 4,
    /// The disk is full.
    Full = 5,
    /// The request made no sense; the guest closes the connection.
    BadRequest = 6,
}

/// An answer without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How it went.
    pub status: Status,
    /// Record number.
    pub n: u64,
    /// Hash of record n, or zeros.
    pub hash: Hash,
}

impl Answer {
    /// An answer that carries no hash.
    pub const fn refusal(status: Status, n: u64) -> Answer {
        Answer {
            status,
            n,
            hash: HASH_OF_NOTHING,
        }
    }

    /// Writes the answer and its payload; returns the bytes used of `buffer`.
    pub fn write(&self, uptime_ns: u64, payload: &[u8], buffer: &mut [u8; ANSWER_BYTES_MAX]) -> usize {
        let end = ANSWER_HEADER_BYTES + payload.len();
        buffer[0..4].copy_from_slice(&ANSWER_MAGIC.to_le_bytes());
        buffer[4..6].copy_from_slice(&(self.status as u16).to_le_bytes());
        buffer[6..8].copy_from_slice(&(payload.len() as u16).to_le_bytes());
        buffer[8..16].copy_from_slice(&self.n.to_le_bytes());
        buffer[16..24].copy_from_slice(&uptime_ns.to_le_bytes());
        buffer[24..56].copy_from_slice(&self.hash);
        buffer[ANSWER_HEADER_BYTES..end].copy_from_slice(payload);
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(op: u16, length: u16, n: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = b"FTL1".to_vec();
        bytes.extend(op.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(n.to_le_bytes());
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn every_prefix_is_incomplete_and_the_whole_is_a_request() {
        let bytes = request(1, 3, 7, b"abc");
        for end in 0..bytes.len() {
            assert_eq!(parse(&bytes[..end]), Parsed::Incomplete, "{end}");
        }
        let mut two = bytes.clone();
        two.extend(request(3, 0, 0, b""));
        let expected = Request {
            operation: Operation::Append,
            n: 7,
            payload: b"abc",
            bytes: 19,
        };
        assert_eq!(parse(&two), Parsed::Request(expected));
    }

    #[test]
    fn nonsense_is_malformed_as_soon_as_it_shows() {
        assert_eq!(parse(b"G"), Parsed::Malformed);
        assert_eq!(parse(b"GET / HTTP/1.1\r\n"), Parsed::Malformed);
        assert_eq!(parse(&request(0, 0, 0, b"")), Parsed::Malformed);
        assert_eq!(parse(&request(5, 0, 0, b"")), Parsed::Malformed);
        assert_eq!(parse(&request(1, 257, 0, b"")), Parsed::Malformed);
        assert_eq!(parse(&request(3, 1, 0, b"x")), Parsed::Malformed);
        assert_eq!(parse(&request(1, 256, 0, b"")), Parsed::Incomplete);
    }

    #[test]
    fn an_answer_has_the_published_layout() {
        let mut buffer = [0; ANSWER_BYTES_MAX];
        let answer = Answer {
            status: Status::Conflict,
            n: 0x0102,
            hash: [7; 32],
        };
        let end = answer.write(5, b"xy", &mut buffer);
        assert_eq!(end, 58);
        assert_eq!(&buffer[0..4], b"FTA1");
        assert_eq!(&buffer[4..8], &[2, 0, 2, 0]);
        assert_eq!(&buffer[8..16], &[2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&buffer[16..24], &[5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&buffer[24..56], &[7; 32]);
        assert_eq!(&buffer[56..58], b"xy");
    }
}
