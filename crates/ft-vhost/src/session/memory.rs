//! The memory table a frontend sends: checked, mapped, and the way from its addresses to the guest's.

use std::{fs::File, io, sync::Arc};

use thiserror::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionCollectionError,
    mmap::{MmapRegionBuilder, MmapRegionError},
};

use crate::{
    guest_side::dirty::{DirtyLog, GuestMemoryMmap, GuestRegionMmap, LogSlot},
    shared_file::keep_length,
};

/// Regions a frontend may add one by one: what QEMU can have at most on x86-64.
pub const SLOTS_MAX: usize = 512;

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
    /// Regions that overlap.
    #[error("the regions do not make a memory: {0}")]
    Layout(#[from] GuestRegionCollectionError),
    /// More than [`SLOTS_MAX`].
    #[error("there are {SLOTS_MAX} memory regions already")]
    TooMany,
    /// A region to remove that is not there.
    #[error("there is no memory region of {length:#x} bytes at {guest:#x}")]
    Unknown {
        /// Guest address.
        guest: u64,
        /// Bytes.
        length: u64,
    },
}

/// One region: where the frontend and where the guest sees it.
#[derive(Clone, Debug)]
struct Slot {
    user: u64,
    region: Arc<GuestRegionMmap>,
}

impl Slot {
    fn guest(&self) -> u64 {
        self.region.start_addr().0
    }
}

/// Guest memory as the frontend describes it: all at once (`SET_MEM_TABLE`), or region by region.
#[derive(Clone, Debug, Default)]
pub struct MemoryTable {
    slots: Vec<Slot>,
    log: LogSlot,
}

impl MemoryTable {
    /// The guest-physical address of a frontend address.
    #[must_use]
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        self.slots.iter().find_map(|slot| {
            let offset = user.checked_sub(slot.user)?;
            (offset < slot.region.len()).then(|| slot.guest() + offset)
        })
    }

    /// Where the writes to this memory, and to what it becomes, are logged.
    #[must_use]
    pub fn log(&self) -> &LogSlot {
        &self.log
    }

    /// The table with these regions and no others.
    ///
    /// # Errors
    /// [`MemoryError`] for a table that is inconsistent or lies about its files.
    pub fn with_all(&self, table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<Self, MemoryError> {
        let mut slots = Vec::with_capacity(table.len());
        for (index, (entry, file)) in table.iter().zip(files).enumerate() {
            slots.push(self.map(index, entry, file)?);
        }
        Ok(Self {
            slots,
            log: self.log.clone(),
        })
    }

    /// The table with one region more.
    ///
    /// # Errors
    /// As [`MemoryTable::with_all`], and beyond [`SLOTS_MAX`].
    pub fn with(&self, entry: &VhostUserMemoryRegion, file: File) -> Result<Self, MemoryError> {
        let index = self.slots.len();
        if index == SLOTS_MAX {
            return Err(MemoryError::TooMany);
        }
        let mut table = self.clone();
        table.slots.push(self.map(index, entry, file)?);
        Ok(table)
    }

    /// The table without a region.
    ///
    /// # Errors
    /// [`MemoryError::Unknown`].
    pub fn without(&self, entry: &VhostUserMemoryRegion) -> Result<Self, MemoryError> {
        let (guest, length) = (entry.guest_phys_addr, entry.memory_size);
        let mut table = self.clone();
        table
            .slots
            .remove(self.place(entry).ok_or(MemoryError::Unknown { guest, length })?);
        Ok(table)
    }

    /// Whether this region is in the table.
    #[must_use]
    pub fn has(&self, entry: &VhostUserMemoryRegion) -> bool {
        self.place(entry).is_some()
    }

    fn place(&self, entry: &VhostUserMemoryRegion) -> Option<usize> {
        let (guest, user, length) = (entry.guest_phys_addr, entry.user_addr, entry.memory_size);
        let is_it = |slot: &Slot| slot.guest() == guest && slot.user == user && slot.region.len() == length;
        self.slots.iter().position(is_it)
    }

    /// The memory.
    ///
    /// # Errors
    /// [`MemoryError::Layout`] for regions that overlap.
    pub fn memory(&self) -> Result<GuestMemoryMmap, MemoryError> {
        let mut regions: Vec<_> = self.slots.iter().map(|slot| Arc::clone(&slot.region)).collect();
        if regions.is_empty() {
            return Ok(GuestMemoryMmap::new());
        }
        regions.sort_by_key(|region| region.start_addr());
        Ok(GuestMemoryMmap::from_arc_regions(regions)?)
    }

    fn map(&self, index: usize, entry: &VhostUserMemoryRegion, file: File) -> Result<Slot, MemoryError> {
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
        keep_length(&file);
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
        let log = DirtyLog::new(self.log.clone(), guest);
        let mapping = MmapRegionBuilder::new_with_bitmap(length as usize, log)
            .with_file_offset(FileOffset::new(file, offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_NORESERVE | libc::MAP_SHARED)
            .build()
            .map_err(|source| MemoryError::Map { index, source })?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or(wraps)?;
        Ok(Slot {
            user,
            region: Arc::new(region),
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryBackend;

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
        let table = MemoryTable::default()
            .with_all(&table, vec![file(0x3000), file(0x1000)])
            .unwrap();
        assert_eq!(table.guest_address(0x7000_1fff), Some(0x10_1fff));
        assert_eq!(table.guest_address(0x7000_2000), None);
        assert_eq!(table.guest_address(0x6000_0000), Some(0));
        assert_eq!(table.memory().unwrap().num_regions(), 2);
    }

    #[test]
    fn regions_come_and_go_one_by_one() {
        let (low, high) = (
            entry(0, 0x1000, 0x6000_0000, 0),
            entry(0x10_0000, 0x2000, 0x7000_0000, 0),
        );
        let both = MemoryTable::default()
            .with(&high, file(0x2000))
            .and_then(|table| table.with(&low, file(0x1000)))
            .unwrap();
        assert_eq!(both.memory().unwrap().num_regions(), 2);
        let one = both.without(&high).unwrap();
        assert_eq!(one.guest_address(0x7000_0000), None);
        assert_eq!(one.guest_address(0x6000_0000), Some(0));
        assert!(matches!(one.without(&high), Err(MemoryError::Unknown { .. })));
        let elsewhere = entry(0, 0x1000, 0x6000_1000, 0);
        assert!(matches!(one.without(&elsewhere), Err(MemoryError::Unknown { .. })));
        assert_eq!(one.without(&low).unwrap().memory().unwrap().num_regions(), 0);
        let overlaps = both
            .with(&entry(0x10_1000, 0x1000, 0x8000_0000, 0), file(0x1000))
            .unwrap();
        assert!(matches!(overlaps.memory(), Err(MemoryError::Layout(_))));
        let mut full = MemoryTable::default();
        for slot in 0..SLOTS_MAX as u64 {
            full = full
                .with(&entry(slot << 12, 0x1000, slot << 12, 0), file(0x1000))
                .unwrap();
        }
        assert!(matches!(full.with(&high, file(0x2000)), Err(MemoryError::TooMany)));
    }

    #[test]
    fn hostile_tables_are_refused() {
        let refused = |table: &[VhostUserMemoryRegion], lengths: &[u64]| {
            let files = lengths.iter().map(|length| file(*length)).collect();
            MemoryTable::default()
                .with_all(table, files)
                .and_then(|table| table.memory())
                .unwrap_err()
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
    }
}
