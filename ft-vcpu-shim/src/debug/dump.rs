//! Guest memory in a file: raw, byte n of the file is guest-physical address n, pages of zeros are holes.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use vm_memory::{Bytes, GuestAddress};

use crate::{error::Error, machine::memory::Ram};

/// Unit in which zeros are looked for: a page, so that a file system can leave it out.
const PAGE_BYTES: usize = 4096;
/// Bytes read at once.
const CHUNK_BYTES: usize = 256 * PAGE_BYTES;

/// Writes all of `ram` to `path`, which is created or replaced.
///
/// # Errors
/// What the file system refuses.
pub fn write(ram: &Ram, path: &Path) -> Result<(), Error> {
    let failed = |source: std::io::Error| {
        Error::environment(format!(
            "cannot write {}: {source}. Check --dump-memory",
            path.display()
        ))
    };
    let file = File::create(path).map_err(failed)?;
    file.set_len(ram.bytes()).map_err(failed)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut at = 0;
    while at < ram.bytes() {
        let count = CHUNK_BYTES.min(usize::try_from(ram.bytes() - at).unwrap_or(CHUNK_BYTES));
        let chunk = &mut chunk[..count];
        ram.memory().read_slice(chunk, GuestAddress(at)).expect("inside RAM");
        for (page, offset) in chunk.chunks(PAGE_BYTES).zip((at..).step_by(PAGE_BYTES)) {
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(page, offset).map_err(failed)?;
            }
        }
        at += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn memory_is_all_there_and_zeros_take_no_space() {
        let ram = Ram::new(8).unwrap();
        for (at, byte) in [(0u64, 1u8), (0x1234, 2), ((8 << 20) - 1, 3)] {
            ram.memory().write_obj(byte, GuestAddress(at)).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ram");
        write(&ram, &path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 8 << 20);
        assert_eq!((bytes[0], bytes[0x1234], bytes[(8 << 20) - 1]), (1, 2, 3));
        assert_eq!(bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>(), 6);
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20, "not sparse");
    }
}
