//! The dirty log: which pages of guest memory the device has written, for a frontend that migrates the VM meanwhile.
//!
//! ```text
//!  every write to guest memory, used rings included ─► region's DirtyLog ─► bit of the page in memory of the frontend
//! ```
//! The memory itself marks ([`GuestMemoryMmap`] has a log in each region), so no writer can forget it. A bit is set after the
//! write: a frontend that reads and clears the bits in between sends the page again. The layout is vhost-user's ("Migration"):
//! one bit per page of 4 KiB, counted from guest address 0, set atomically. The frontend owns the log and may write to it.

use std::{
    fs::File,
    io,
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use thiserror::Error;
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryRegion, MmapRegion, VolatileMemory,
    bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice},
    mmap::MmapRegionError,
};

use crate::shared_file::keep_length;

/// Guest memory whose writes can be logged.
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<DirtyLog>;
/// A region of it.
pub type GuestRegionMmap = vm_memory::GuestRegionMmap<DirtyLog>;

/// Bytes of guest memory per bit.
const PAGE_BYTES: u64 = 4096;

/// Why a log is refused.
#[derive(Debug, Error)]
pub enum DirtyLogError {
    /// The kernel cannot examine it.
    #[error("the dirty log cannot be examined: {0}")]
    Examine(#[from] io::Error),
    /// The kernel cannot map it.
    #[error("the dirty log cannot be mapped: {0}")]
    Map(#[from] MmapRegionError),
    /// Not all of it is there.
    #[error("the dirty log has {bytes} bytes at {offset} of a file of {length}")]
    Size {
        /// Its size.
        bytes: u64,
        /// Where it begins.
        offset: u64,
        /// Bytes of the file.
        length: u64,
    },
    /// Memory it has no bits for.
    #[error("the dirty log has bits up to guest address {covered:#x}, and guest memory ends at {end:#x}")]
    TooShort {
        /// First address without a bit.
        covered: u64,
        /// Where guest memory ends.
        end: u64,
    },
}

/// The bits, in memory of the frontend.
#[derive(Clone, Debug)]
pub struct LogPages(Arc<MmapRegion>);

impl LogPages {
    /// Maps the frontend's log. The file must be that long already, so that no access can end the process.
    ///
    /// # Errors
    /// [`DirtyLogError`].
    pub fn map(file: File, offset: u64, bytes: u64) -> Result<Self, DirtyLogError> {
        keep_length(&file);
        let length = file.metadata()?.len();
        if bytes == 0 || offset.checked_add(bytes).is_none_or(|end| end > length) {
            return Err(DirtyLogError::Size { bytes, offset, length });
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), bytes as usize)?;
        Ok(Self(Arc::new(mapping)))
    }

    /// First guest address without a bit.
    fn covered(&self) -> u64 {
        (self.0.size() as u64).saturating_mul(8 * PAGE_BYTES)
    }

    /// Whether it has bits for all of `memory`.
    ///
    /// # Errors
    /// [`DirtyLogError::TooShort`].
    pub fn covers(&self, memory: &GuestMemoryMmap) -> Result<(), DirtyLogError> {
        let end = memory.iter().map(|region| region.last_addr().0 + 1).max().unwrap_or(0);
        let covered = self.covered();
        (end <= covered)
            .then_some(())
            .ok_or(DirtyLogError::TooShort { covered, end })
    }

    fn mark(&self, address: u64, length: u64) {
        let bits = self.0.as_volatile_slice();
        // The log covers all of guest memory (`covers`), and only guest memory is written.
        for page in address / PAGE_BYTES..=(address + length - 1) / PAGE_BYTES {
            let byte = bits.get_atomic_ref::<AtomicU8>((page / 8) as usize);
            byte.expect("the log covers guest memory")
                .fetch_or(1 << (page % 8), Ordering::AcqRel);
        }
    }
}

/// The one place where all regions of a memory find the log of the moment.
#[derive(Clone, Debug, Default)]
pub struct LogSlot(Arc<Slot>);

#[derive(Debug, Default)]
struct Slot {
    /// There are pages: saves the lock while nobody migrates.
    logs: AtomicBool,
    pages: RwLock<Option<LogPages>>,
}

impl LogSlot {
    /// Logs into `pages` from here on, or no more.
    ///
    /// # Panics
    /// If another thread panicked here, which ends the process anyway.
    pub fn set(&self, pages: Option<LogPages>) {
        self.0.logs.store(pages.is_some(), Ordering::Release);
        *self.0.pages.write().expect("a panic aborts the process") = pages;
    }
}

/// The log as one region of guest memory sees it.
#[derive(Clone, Debug, Default)]
pub struct DirtyLog {
    slot: LogSlot,
    /// Guest address of the region.
    base: u64,
}

impl DirtyLog {
    /// Of a region that begins at guest address `base`.
    #[must_use]
    pub fn new(slot: LogSlot, base: u64) -> Self {
        Self { slot, base }
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, length: usize) {
        if length == 0 || !self.slot.0.logs.load(Ordering::Acquire) {
            return;
        }
        let pages = self.slot.0.pages.read().expect("a panic aborts the process");
        if let Some(pages) = pages.as_ref() {
            pages.mark(self.base + offset as u64, length as u64);
        }
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        // The bits are the frontend's: it reads and clears them.
        false
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DirtyLog {
    /// Of memory that nobody migrates.
    fn with_len(_length: usize) -> Self {
        Self::default()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const REGION_BYTES: usize = 64 << 10;
    const HIGH: u64 = 0x10_0000;

    fn memory(slot: &LogSlot) -> GuestMemoryMmap {
        let region = |base: u64| {
            let log = DirtyLog::new(slot.clone(), base);
            let mapping = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(REGION_BYTES, log)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
                .build()
                .unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(base)).unwrap()
        };
        GuestMemoryMmap::from_regions(vec![region(0), region(HIGH)]).unwrap()
    }

    fn file(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        file
    }

    /// The pages whose bits are set.
    fn marked(file: &File) -> Vec<u64> {
        let mut bits = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bits, 0).unwrap();
        let is_set = |page: &u64| bits[(page / 8) as usize] & 1 << (page % 8) != 0;
        (0..bits.len() as u64 * 8).filter(is_set).collect()
    }

    #[test]
    fn every_kind_of_write_marks_its_pages_and_only_while_it_is_logged() {
        let slot = LogSlot::default();
        let memory = memory(&slot);
        let file = file(64);
        let pages = LogPages::map(file.try_clone().unwrap(), 0, 64).unwrap();
        pages.covers(&memory).unwrap();
        memory.write_slice(&[1; 100], GuestAddress(0)).unwrap();
        assert!(marked(&file).is_empty());
        slot.set(Some(pages));
        memory.write_slice(&[1; 2], GuestAddress(0x1fff)).unwrap();
        memory.write_obj(7u64, GuestAddress(0x5000)).unwrap();
        memory.store(7u16, GuestAddress(HIGH), Ordering::Release).unwrap();
        let last = HIGH + REGION_BYTES as u64 - 1;
        memory.write_slice(&[1], GuestAddress(last)).unwrap();
        let mut nothing = [0; 8];
        memory.read_slice(&mut nothing, GuestAddress(0x8000)).unwrap();
        assert_eq!(marked(&file), [1, 2, 5, HIGH >> 12, last >> 12]);
        slot.set(None);
        memory.write_slice(&[1], GuestAddress(0xa000)).unwrap();
        assert_eq!(marked(&file).len(), 5);
    }

    #[test]
    fn a_log_that_lies_or_does_not_cover_the_memory_is_refused() {
        for (offset, bytes, length) in [(0, 65, 64), (4096, 1, 4096), (u64::MAX, 2, 64), (0, 0, 64)] {
            let refused = LogPages::map(file(length), offset, bytes);
            assert!(matches!(refused, Err(DirtyLogError::Size { .. })), "{offset} {bytes}");
        }
        let memory = memory(&LogSlot::default());
        let short = LogPages::map(file(64), 0, 33).unwrap();
        let refused = short.covers(&memory);
        assert!(
            matches!(refused, Err(DirtyLogError::TooShort { covered: 0x10_8000, .. })),
            "{refused:?}"
        );
        LogPages::map(file(64), 0, 34).unwrap().covers(&memory).unwrap();
    }
}
