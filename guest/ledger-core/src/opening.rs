//! Opening the disk at boot: sector 0, then the chain, every hash verified.
//!
//! The chain ends at the first sector that does not hold the next record. A crash in the middle of a group may leave
//! records of that group behind the end; they were never answered and will be overwritten. A record further away than a
//! group is long cannot come from there: then a record in the middle is damaged, and truncating the chain would lose
//! answered records.

use crate::chain::{Format, Head, Record, SECTOR_BYTES};
use crate::group::{FLUSH_TAG, GroupSectors};
use crate::ledger::{BlockDevice, Completion};
use crate::limits::{GROUP_RECORDS_MAX, WRITE_RECORDS_MAX};
use core::fmt;

/// A disk that can be waited for; only boot does.
pub trait WaitableDevice: BlockDevice {
    /// Waits for the next completion.
    fn wait(&mut self) -> Completion;
}

/// Why the disk cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// Less than two sectors.
    TooSmall,
    /// Sector 0 is neither ours nor blank.
    Foreign,
    /// The disk refused.
    Io {
        /// First sector of the request.
        sector: u64,
    },
    /// Not the next record, and yet there are later ones.
    Damaged {
        /// The record.
        n: u64,
    },
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::TooSmall => write!(f, "the disk has less than two sectors"),
            OpenError::Foreign => write!(
                f,
                "sector 0 of the disk belongs to something else (blank it to use the disk)"
            ),
            OpenError::Io { sector } => write!(f, "the disk failed at sector {sector}"),
            OpenError::Damaged { n } => write!(
                f,
                "record {n} is damaged: later records exist, but the chain breaks here"
            ),
        }
    }
}

/// Opens the disk, formatting a blank one; returns the end of the chain.
pub fn open(device: &mut impl WaitableDevice, sectors: &mut GroupSectors, capacity: u64) -> Result<Head, OpenError> {
    if capacity < 2 {
        return Err(OpenError::TooSmall);
    }
    read(device, sectors, 0, 1)?;
    match Format::read(&sectors[0]) {
        Format::Ledger => {}
        Format::Foreign => return Err(OpenError::Foreign),
        Format::Blank => {
            Format::write(&mut sectors[0]);
            // SAFETY: nothing touches the sector before the wait below is over.
            unsafe { device.write(0, 0, sectors[0].as_ptr(), SECTOR_BYTES) };
            check(device.wait(), 0)?;
            device.flush(FLUSH_TAG);
            check(device.wait(), 0)?;
        }
    }
    let head = read_chain(device, sectors, capacity)?;
    let beyond = head.n + 1 + GROUP_RECORDS_MAX as u64;
    if beyond < capacity {
        read(device, sectors, beyond, 1)?;
        if Record::read(&sectors[0]).is_some_and(|record| record.n == beyond) {
            return Err(OpenError::Damaged { n: head.n + 1 });
        }
    }
    Ok(head)
}

fn read_chain(device: &mut impl WaitableDevice, sectors: &mut GroupSectors, capacity: u64) -> Result<Head, OpenError> {
    let mut head = Head::EMPTY;
    loop {
        let first = head.n + 1;
        let count = (capacity - first).min(GROUP_RECORDS_MAX as u64) as usize;
        if count == 0 {
            return Ok(head);
        }
        read(device, sectors, first, count)?;
        for sector in &sectors[..count] {
            let Some(record) = Record::read_next(sector, &head) else {
                return Ok(head);
            };
            head = Head {
                n: record.n,
                hash: record.hash,
            };
        }
    }
}

/// Reads consecutive sectors, a request a page, all in flight.
fn read(
    device: &mut impl WaitableDevice,
    sectors: &mut GroupSectors,
    first: u64,
    count: usize,
) -> Result<(), OpenError> {
    let mut sector = first;
    let mut in_flight = 0;
    for (tag, page) in sectors[..count].chunks_mut(WRITE_RECORDS_MAX).enumerate() {
        // SAFETY: every request is waited for before this function returns.
        unsafe { device.read(tag as u8, sector, page.as_mut_ptr().cast(), page.len() * SECTOR_BYTES) };
        sector += page.len() as u64;
        in_flight += 1;
    }
    let mut result = Ok(());
    for _ in 0..in_flight {
        let outcome = check(device.wait(), first);
        result = result.and(outcome);
    }
    result
}

fn check(completion: Completion, sector: u64) -> Result<(), OpenError> {
    if completion.ok {
        Ok(())
    } else {
        Err(OpenError::Io { sector })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_disk::FakeDisk;
    use crate::ledger::Buffers;

    fn opened(disk: &mut FakeDisk) -> Result<Head, OpenError> {
        let capacity = disk.sectors.len() as u64;
        open(disk, &mut Buffers::new().group, capacity)
    }

    fn disk_with(records: usize, capacity: usize) -> (FakeDisk, Head) {
        let mut disk = FakeDisk::new(capacity);
        Format::write(&mut disk.sectors[0]);
        let mut head = Head::EMPTY;
        for n in 1..=records {
            head = head.next(&[n as u8]);
            Record {
                n: n as u64,
                hash: head.hash,
                uptime_ns: 0,
                payload: &[n as u8],
            }
            .write(&mut disk.sectors[n]);
        }
        disk.durable = disk.sectors.clone();
        (disk, head)
    }

    #[test]
    fn a_blank_disk_is_formatted_and_flushed() {
        let mut disk = FakeDisk::new(8);
        assert_eq!(opened(&mut disk), Ok(Head::EMPTY));
        assert_eq!(Format::read(&disk.durable[0]), Format::Ledger);
        disk.sectors[0][3] = 9;
        assert_eq!(opened(&mut disk), Err(OpenError::Foreign));
    }

    #[test]
    fn the_chain_is_read_to_its_end() {
        for records in [0, 1, 63, 64, 65, 200] {
            let (mut disk, head) = disk_with(records, 400);
            assert_eq!(opened(&mut disk), Ok(head), "{records}");
        }
        let (mut disk, head) = disk_with(9, 10);
        assert_eq!(opened(&mut disk), Ok(head), "a full disk");
    }

    #[test]
    fn leftovers_of_a_group_end_the_chain_but_a_long_tail_is_damage() {
        let (mut disk, _) = disk_with(200, 400);
        disk.sectors[137] = [0; 512];
        assert_eq!(opened(&mut disk).map(|head| head.n), Ok(136));
        disk.sectors[135][20] ^= 1;
        assert_eq!(opened(&mut disk), Err(OpenError::Damaged { n: 135 }));
    }

    #[test]
    fn a_failing_disk_is_an_error() {
        let (mut disk, _) = disk_with(100, 400);
        disk.fail = true;
        assert_eq!(opened(&mut disk), Err(OpenError::Io { sector: 0 }));
        assert_eq!(FakeDisk::new(1).sectors.len(), 1);
        assert_eq!(opened(&mut FakeDisk::new(1)), Err(OpenError::TooSmall));
    }
}
