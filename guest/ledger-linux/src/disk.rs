//! A block device, or a file, as the ledger's disk. Every request is carried out where it is made; its completion is then there to be taken.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use ledger_core::chain::SECTOR_BYTES;
use ledger_core::ledger::{BlockDevice, Completion};
use ledger_core::opening::WaitableDevice;

/// The disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    done: VecDeque<Completion>,
}

impl Disk {
    /// Opens a device or file for reading and writing. What lies beyond `sectors_max` is left alone.
    ///
    /// # Errors
    /// When it cannot be opened or has no size.
    pub fn open(path: &Path, sectors_max: Option<u64>) -> io::Result<Self> {
        let mut file = File::options().read(true).write(true).open(path)?;
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR_BYTES as u64;
        Ok(Self {
            file,
            sectors: sectors_max.map_or(sectors, |limit| sectors.min(limit)),
            done: VecDeque::new(),
        })
    }

    /// Sectors that the ledger may use.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The oldest completion not taken yet.
    pub fn poll(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn finish(&mut self, tag: u8, what: &str, result: io::Result<()>) {
        if let Err(error) = &result {
            println!("ledger: the disk failed to {what}: {error}");
        }
        self.done.push_back(Completion {
            tag,
            ok: result.is_ok(),
        });
    }
}

impl BlockDevice for Disk {
    unsafe fn read(&mut self, tag: u8, sector: u64, buffer: *mut u8, bytes: usize) {
        // SAFETY: the caller promises a buffer of so many bytes that nobody else touches before the completion.
        let buffer = unsafe { std::slice::from_raw_parts_mut(buffer, bytes) };
        let result = self.file.read_exact_at(buffer, sector * SECTOR_BYTES as u64);
        self.finish(tag, "read", result);
    }

    unsafe fn write(&mut self, tag: u8, sector: u64, buffer: *const u8, bytes: usize) {
        // SAFETY: the caller promises a buffer of so many bytes that does not change before the completion.
        let buffer = unsafe { std::slice::from_raw_parts(buffer, bytes) };
        let result = self.file.write_all_at(buffer, sector * SECTOR_BYTES as u64);
        self.finish(tag, "write", result);
    }

    fn flush(&mut self, tag: u8) {
        let result = self.file.sync_data();
        self.finish(tag, "flush", result);
    }
}

impl WaitableDevice for Disk {
    fn wait(&mut self) -> Completion {
        self.done.pop_front().expect("only what was begun is waited for")
    }
}
