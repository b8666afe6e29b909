//! The memory table a frontend sends: checked, mapped, and the way from its addresses to the guest's.

use std::{fs::File, io};

use thiserror::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollectionError, GuestRegionMmap,
    MmapRegion, mmap::MmapRegionError,
};

/// Why a memory table is refused.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The frontend's descriptor cannot be examined.
    #[error("region {index}: {source}")]
    Examine {
        /// Place in the table.
        index: usize,
        /// Why.
        source: io::Error,
    },
    /// The file ends before the region does: an access would kill the daemon.
    #[error("region {index} ends at byte {end} of a file of {length}. Is guest memory shared (share=on)?")]
    BeyondFile {
        /// Place in the table.
        index: usize,
        /// Where the region ends.
        end: u64,
        /// Where the file ends.
        length: u64,
    },
    /// Address arithmetic that does not work out.
    #[error("region {index} wraps around the end of an address space")]
    Wraps {
        /// Place in the table.
        index: usize,
    },
    /// The kernel cannot map it.
    #[error("region {index} cannot be mapped: {source}")]
    Map {
        /// Place in the table.
        index: usize,
        /// Why.
        source: MmapRegionError,
    },
    /// Regions that overlap, or none.
    #[error("the regions do not make a memory: {0}")]
    Layout(#[from] GuestRegionCollectionError),
}

/// One region: where the frontend and where the guest sees it.
#[derive(Clone, Copy, Debug)]
struct Range {
    user: u64,
    guest: u64,
    length: u64,
}

/// The table's translation of frontend addresses.
#[derive(Clone, Debug, Default)]
pub struct Translation {
    ranges: Vec<Range>,
}

impl Translation {
    /// The guest-physical address of a frontend address.
    #[must_use]
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        self.ranges.iter().find_map(|range| {
            let offset = user.checked_sub(range.user)?;
            (offset < range.length).then(|| range.guest + offset)
        })
    }
}

/// Maps a table.
///
/// # Errors
/// [`MemoryError`] for a table that is inconsistent or lies about its files.
pub fn map(table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<(GuestMemoryMmap, Translation), MemoryError> {
    let mut regions = Vec::with_capacity(table.len());
    let mut translation = Translation::default();
    for (index, (entry, file)) in table.iter().zip(files).enumerate() {
        let wraps = MemoryError::Wraps { index };
        // The fields are packed: copy them.
        let (guest, user, length, offset) = (
            entry.guest_phys_addr,
            entry.user_addr,
            entry.memory_size,
            entry.mmap_offset,
        );
        let (Some(end), Some(_), Some(_)) = (
            offset.checked_add(length),
            user.checked_add(length),
            guest.checked_add(length),
        ) else {
            return Err(wraps);
        };
        let file_length = file
            .metadata()
            .map_err(|source| MemoryError::Examine { index, source })?
            .len();
        if end > file_length {
            return Err(MemoryError::BeyondFile {
                index,
                end,
                length: file_length,
            });
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), length as usize)
            .map_err(|source| MemoryError::Map { index, source })?;
        regions.push(GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or(wraps)?);
        translation.ranges.push(Range { user, guest, length });
    }
    regions.sort_by_key(GuestMemoryRegion::start_addr);
    Ok((GuestMemoryMmap::from_regions(regions)?, translation))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        file
    }

    fn entry(guest: u64, length: u64, user: u64, offset: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, length, user, offset)
    }

    #[test]
    fn addresses_translate_within_their_region_only() {
        let table = [
            entry(0x10_0000, 0x2000, 0x7000_0000, 0x1000),
            entry(0, 0x1000, 0x6000_0000, 0),
        ];
        let (_, translation) = map(&table, vec![file(0x3000), file(0x1000)]).unwrap();
        assert_eq!(translation.guest_address(0x7000_1fff), Some(0x10_1fff));
        assert_eq!(translation.guest_address(0x7000_2000), None);
        assert_eq!(translation.guest_address(0x6000_0000), Some(0));
    }

    #[test]
    fn hostile_tables_are_refused() {
        let refused = |table: &[VhostUserMemoryRegion], lengths: &[u64]| {
            map(table, lengths.iter().map(|length| file(*length)).collect()).unwrap_err()
        };
        assert!(matches!(
            refused(&[entry(0, 0x2000, 0, 0)], &[0x1000]),
            MemoryError::BeyondFile { .. }
        ));
        assert!(matches!(
            refused(&[entry(u64::MAX - 0xfff, 0x2000, 0, 0)], &[0x2000]),
            MemoryError::Wraps { .. }
        ));
        assert!(matches!(
            refused(&[entry(0, 0x1000, 0, u64::MAX - 0xfff)], &[0x1000]),
            MemoryError::Wraps { .. }
        ));
        assert!(matches!(
            refused(&[entry(0, 0x1000, 0, 7)], &[0x2000]),
            MemoryError::Map { .. }
        ));
        assert!(matches!(
            refused(
                &[entry(0, 0x2000, 0, 0), entry(0x1000, 0x1000, 0x9000, 0)],
                &[0x2000, 0x1000]
            ),
            MemoryError::Layout(_)
        ));
        assert!(matches!(refused(&[], &[]), MemoryError::Layout(_)));
    }
}
