//! The chain of records on the disk: sector 0 names the format, sector n holds record n and the hash that ties it to n-1.
//!
//! `h(0) = 0`, `h(n) = SHA-256(h(n-1) || n as u64 LE || payload)`. Whoever knows h(n) knows the whole past: neither a
//! rollback nor a fork survives a comparison.
//!
//! Version 1 (the first):
//! ```text
//! sector 0   0 u64 "FTLG1"   8 u32 version 1   zeros
//! sector n   0 u32 "LF21"    4 u16 length   6 u16 0   8 u64 n   16 hash[32]   48 u64 uptime_ns   56 payload[256]   zeros
//! ```

use crate::limits::PAYLOAD_BYTES_MAX;
use sha2::{Digest, Sha256};

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;
/// One sector.
pub type Sector = [u8; SECTOR_BYTES];
/// h(n).
pub type Hash = [u8; 32];
/// h(0).
pub const HASH_OF_NOTHING: Hash = [0; 32];

const FORMAT_MAGIC: u64 = 0x31_474C_5446;
const FORMAT_VERSION: u32 = 1;
const RECORD_MAGIC: u32 = 0x3152_464C;

/// The last record: all that is needed to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Number of the record; 0 if there is none.
    pub n: u64,
    /// h(n).
    pub hash: Hash,
}

impl Head {
    /// The head of an empty chain.
    pub const EMPTY: Head = Head {
        n: 0,
        hash: HASH_OF_NOTHING,
    };

    /// The head after one more record.
    pub fn next(&self, payload: &[u8]) -> Head {
        let n = self.n + 1;
        Head {
            n,
            hash: hash(&self.hash, n, payload),
        }
    }
}

/// h(n) from h(n-1).
pub fn hash(previous: &Hash, n: u64, payload: &[u8]) -> Hash {
    let mut digest = Sha256::new();
    digest.update(previous);
    digest.update(n.to_le_bytes());
    digest.update(payload);
    digest.finalize().into()
}

/// A record as it lies in its sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its number, and its sector's.
    pub n: u64,
    /// h(n).
    pub hash: Hash,
    /// Virtual time of the append.
    pub uptime_ns: u64,
    /// What the client gave.
    pub payload: &'a [u8],
}

impl<'a> Record<'a> {
    /// Fills a whole sector.
    ///
    /// # Panics
    /// If the payload is longer than the format allows.
    pub fn write(&self, sector: &mut Sector) {
        assert!(self.payload.len() <= PAYLOAD_BYTES_MAX);
        sector.fill(0);
        sector[0..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
        sector[4..6].copy_from_slice(&(self.payload.len() as u16).to_le_bytes());
        sector[8..16].copy_from_slice(&self.n.to_le_bytes());
        sector[16..48].copy_from_slice(&self.hash);
        sector[48..56].copy_from_slice(&self.uptime_ns.to_le_bytes());
        sector[56..56 + self.payload.len()].copy_from_slice(self.payload);
    }

    /// The record in a sector, if it looks like one. Whether it belongs to the chain only its predecessor can tell.
    pub fn read(sector: &'a Sector) -> Option<Record<'a>> {
        let length = usize::from(u16::from_le_bytes([sector[4], sector[5]]));
        if le_u32(sector, 0) != RECORD_MAGIC || length > PAYLOAD_BYTES_MAX || sector[6..8] != [0, 0] {
            return None;
        }
        let mut hash = HASH_OF_NOTHING;
        hash.copy_from_slice(&sector[16..48]);
        Some(Record {
            n: le_u64(sector, 8),
            hash,
            uptime_ns: le_u64(sector, 48),
            payload: &sector[56..56 + length],
        })
    }

    /// The record in a sector, if it is the one that follows `head`.
    pub fn read_next(sector: &'a Sector, head: &Head) -> Option<Record<'a>> {
        let record = Record::read(sector)?;
        let next = head.next(record.payload);
        (record.n == next.n && record.hash == next.hash).then_some(record)
    }
}

/// What sector 0 says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// All zero: a new disk.
    Blank,
    /// A ledger of a version we know.
    Ledger,
    /// Something else; hands off.
    Foreign,
}

impl Format {
    /// Reads sector 0.
    pub fn read(sector: &Sector) -> Format {
        if sector.iter().all(|byte| *byte == 0) {
            Format::Blank
        } else if le_u64(sector, 0) == FORMAT_MAGIC && le_u32(sector, 8) == FORMAT_VERSION {
            Format::Ledger
        } else {
            Format::Foreign
        }
    }

    /// Fills sector 0.
    pub fn write(sector: &mut Sector) {
        sector.fill(0);
        sector[0..8].copy_from_slice(&FORMAT_MAGIC.to_le_bytes());
        sector[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    }
}

fn le_u32(bytes: &[u8], offset: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(value)
}

fn le_u64(bytes: &[u8], offset: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_its_sector() {
        let head = Head::EMPTY.next(b"first");
        let record = Record {
            n: 1,
            hash: head.hash,
            uptime_ns: 77,
            payload: b"first",
        };
        let mut sector = [0xAA; SECTOR_BYTES];
        record.write(&mut sector);
        assert_eq!(Record::read(&sector), Some(record));
        assert_eq!(Record::read_next(&sector, &Head::EMPTY), Some(record));
        assert_eq!(&sector[0..4], b"LFR1");
    }

    #[test]
    fn the_hash_is_that_of_the_interface() {
        // printf '%064x0100000000000000' 0 | xxd -r -p | cat - <(printf a) | sha256sum
        let hash = Head::EMPTY.next(b"a").hash;
        let expected: Hash = Sha256::new()
            .chain_update([0; 32])
            .chain_update([1, 0, 0, 0, 0, 0, 0, 0])
            .chain_update(b"a")
            .finalize()
            .into();
        assert_eq!(hash, expected);
    }

    #[test]
    fn a_changed_bit_breaks_the_chain() {
        let head = Head::EMPTY.next(b"first");
        let mut sector = [0; SECTOR_BYTES];
        Record {
            n: 1,
            hash: head.hash,
            uptime_ns: 1,
            payload: b"first",
        }
        .write(&mut sector);
        for offset in [0, 4, 6, 8, 16, 47, 56, 60] {
            let mut damaged = sector;
            damaged[offset] ^= 1;
            assert_eq!(Record::read_next(&damaged, &Head::EMPTY), None, "offset {offset}");
        }
        let other = Head { n: 0, hash: [1; 32] };
        assert_eq!(Record::read_next(&sector, &other), None);
    }

    #[test]
    fn sector_zero_is_ours_blank_or_foreign() {
        let mut sector = [0; SECTOR_BYTES];
        assert_eq!(Format::read(&sector), Format::Blank);
        Format::write(&mut sector);
        assert_eq!(&sector[0..5], b"FTLG1");
        assert_eq!(Format::read(&sector), Format::Ledger);
        sector[8] = 2;
        assert_eq!(Format::read(&sector), Format::Foreign);
    }

    #[test]
    fn an_overlong_length_is_no_record() {
        let mut sector = [0; SECTOR_BYTES];
        Record {
            n: 1,
            hash: HASH_OF_NOTHING,
            uptime_ns: 1,
            payload: &[9; 256],
        }
        .write(&mut sector);
        assert!(Record::read(&sector).is_some());
        sector[4..6].copy_from_slice(&257u16.to_le_bytes());
        assert_eq!(Record::read(&sector), None);
    }
}
