//! A disk for tests: writes are volatile until a flush, completions come in any order the test likes.

use crate::chain::{SECTOR_BYTES, Sector};
use crate::ledger::{BlockDevice, Completion};
use crate::opening::WaitableDevice;

pub(crate) struct FakeDisk {
    pub(crate) sectors: Vec<Sector>,
    /// What a crash would leave.
    pub(crate) durable: Vec<Sector>,
    pub(crate) fail: bool,
    /// Requests whose completion has not been taken.
    pub(crate) done: Vec<Completion>,
    pub(crate) flushes: usize,
}

impl FakeDisk {
    pub(crate) fn new(capacity: usize) -> Self {
        let sectors = vec![[0; SECTOR_BYTES]; capacity];
        FakeDisk {
            durable: sectors.clone(),
            sectors,
            fail: false,
            done: Vec::new(),
            flushes: 0,
        }
    }

    fn finish(&mut self, tag: u8) {
        assert!(
            self.done.iter().all(|completion| completion.tag != tag),
            "tag {tag} is in use"
        );
        self.done.push(Completion { tag, ok: !self.fail });
    }
}

impl BlockDevice for FakeDisk {
    unsafe fn read(&mut self, tag: u8, sector: u64, buffer: *mut u8, bytes: usize) {
        // SAFETY: the caller promises a valid buffer.
        let buffer = unsafe { core::slice::from_raw_parts_mut(buffer, bytes) };
        for (offset, piece) in buffer.chunks_mut(SECTOR_BYTES).enumerate() {
            piece.copy_from_slice(&self.sectors[sector as usize + offset]);
        }
        self.finish(tag);
    }

    unsafe fn write(&mut self, tag: u8, sector: u64, buffer: *const u8, bytes: usize) {
        // SAFETY: the caller promises a valid buffer.
        let buffer = unsafe { core::slice::from_raw_parts(buffer, bytes) };
        if !self.fail {
            for (offset, piece) in buffer.chunks(SECTOR_BYTES).enumerate() {
                self.sectors[sector as usize + offset].copy_from_slice(piece);
            }
        }
        self.finish(tag);
    }

    fn flush(&mut self, tag: u8) {
        // Only what is complete is covered: a flush beside unfinished writes would be a bug of the ledger.
        assert!(
            self.done.iter().all(|completion| completion.tag > tag),
            "flush beside writes in flight"
        );
        if !self.fail {
            self.durable.clone_from(&self.sectors);
            self.flushes += 1;
        }
        self.finish(tag);
    }
}

impl WaitableDevice for FakeDisk {
    fn wait(&mut self) -> Completion {
        self.done.pop().expect("waiting for nothing")
    }
}
