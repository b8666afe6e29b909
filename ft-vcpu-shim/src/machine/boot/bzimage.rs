//! bzImage: the compressed vmlinux in it (Linux' Documentation/arch/x86/boot.rst, protocol 2.08 and newer).
//!
//! ```text
//!  boot sector, setup │ 64-bit stub ... │ payload: compressed vmlinux │ its size (u32) │ ...
//!   header at 0x1f1 says where ─────────► payload_offset, payload_length
//! ```
//! What the distributions use is supported: LZ4 (Debian 12), Zstandard (Debian 12 backports, Debian 13, Ubuntu, Fedora).

use linux_loader::bootparam::{boot_params, setup_header};

use super::{bad_kernel, zstandard};
use crate::error::Error;

/// Where the header lies, both in the file and in the zero page.
const HEADER: usize = std::mem::offset_of!(boot_params, hdr);
const MAGIC: &[u8] = b"HdrS";
/// The first protocol that names the payload.
const VERSION_MIN: u16 = 0x208;
const SECTOR: usize = 512;
/// A header that says 0 means 4, for historical reasons.
const SETUP_SECTORS_DEFAULT: usize = 4;

/// No kernel is larger when decompressed.
const KERNEL_BYTES_MAX: usize = 512 << 20;
const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;
const ZSTD_MAGIC: u32 = 0xfd2f_b528;
/// Every block of the legacy LZ4 format is one of these, decompressed; the last is shorter.
const LZ4_BLOCK_BYTES: usize = 8 << 20;

fn field<const BYTES: usize>(file: &[u8], offset: usize) -> Option<[u8; BYTES]> {
    file.get(HEADER + offset..)?.get(..BYTES)?.try_into().ok()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.get(..4)?.try_into().ok()?))
}

/// The compressed kernel in `file`; `None` if it is no bzImage.
///
/// # Errors
/// One that is too old, or damaged.
pub(super) fn payload(file: &[u8]) -> Result<Option<&[u8]>, Error> {
    let magic = field::<4>(file, std::mem::offset_of!(setup_header, header));
    if magic.is_none_or(|magic| magic != MAGIC) {
        return Ok(None);
    }
    let truncated = || bad_kernel("its header names bytes that it does not have");
    let version = field(file, std::mem::offset_of!(setup_header, version)).ok_or_else(truncated)?;
    if u16::from_le_bytes(version) < VERSION_MIN {
        return Err(bad_kernel("it is a bzImage of before Linux 2.6.26"));
    }
    let number = |offset| field(file, offset).map(|bytes| u32::from_le_bytes(bytes) as usize);
    let offset = number(std::mem::offset_of!(setup_header, payload_offset)).ok_or_else(truncated)?;
    let length = number(std::mem::offset_of!(setup_header, payload_length)).ok_or_else(truncated)?;
    let sectors = match file[HEADER] {
        0 => SETUP_SECTORS_DEFAULT,
        sectors => usize::from(sectors),
    };
    let start = ((sectors + 1) * SECTOR).saturating_add(offset);
    let payload = file.get(start..).and_then(|rest| rest.get(..length));
    Ok(Some(payload.ok_or_else(truncated)?))
}

/// The vmlinux in a payload.
///
/// # Errors
/// Damage, or a compression that is not supported.
pub(super) fn decompress(payload: &[u8]) -> Result<Vec<u8>, Error> {
    let truncated = || bad_kernel("its payload is shorter than a compressed kernel");
    let size_at = payload.len().checked_sub(4).ok_or_else(truncated)?;
    let size = word(payload, size_at).ok_or_else(truncated)? as usize;
    if size > KERNEL_BYTES_MAX {
        return Err(bad_kernel(format!("it says that it has {size} bytes decompressed")));
    }
    let compressed = &payload[..size_at];
    let kernel = match word(compressed, 0) {
        Some(LZ4_LEGACY_MAGIC) => lz4(&compressed[4..], size)?,
        Some(ZSTD_MAGIC) => zstd(compressed, size)?,
        _ => {
            return Err(bad_kernel(
                "its kernel is compressed neither with LZ4 nor with Zstandard; take the vmlinux out with Linux' \
                 scripts/extract-vmlinux and give that",
            ));
        }
    };
    if kernel.len() != size {
        return Err(bad_kernel(format!(
            "its kernel has {} bytes decompressed, and {size} were announced",
            kernel.len()
        )));
    }
    Ok(kernel)
}

/// LZ4's legacy format: blocks, each after its compressed size.
fn lz4(mut blocks: &[u8], size: usize) -> Result<Vec<u8>, Error> {
    let damaged = || bad_kernel("its LZ4 payload is damaged");
    let mut kernel = vec![0; size];
    let mut filled = 0;
    while filled < size {
        let length = word(blocks, 0).ok_or_else(damaged)? as usize;
        let block = blocks[4..].get(..length).ok_or_else(damaged)?;
        let room = size.min(filled + LZ4_BLOCK_BYTES);
        let count = lz4_flex::block::decompress_into(block, &mut kernel[filled..room]).map_err(|_| damaged())?;
        if count == 0 {
            return Err(damaged());
        }
        filled += count;
        blocks = &blocks[4 + length..];
    }
    Ok(kernel)
}

fn zstd(compressed: &[u8], size: usize) -> Result<Vec<u8>, Error> {
    zstandard(compressed, size as u64).map_err(|error| bad_kernel(format!("its Zstandard payload is damaged: {error}")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A bzImage with one setup sector and this payload.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 2 * SECTOR];
        let mut set = |offset: usize, bytes: &[u8]| file[HEADER + offset..][..bytes.len()].copy_from_slice(bytes);
        set(0, &[1]);
        set(std::mem::offset_of!(setup_header, header), MAGIC);
        set(std::mem::offset_of!(setup_header, version), &0x20fu16.to_le_bytes());
        set(std::mem::offset_of!(setup_header, payload_offset), &16u32.to_le_bytes());
        set(
            std::mem::offset_of!(setup_header, payload_length),
            &(payload.len() as u32).to_le_bytes(),
        );
        file.extend([0xcc; 16]);
        file.extend(payload);
        file
    }

    fn with_size(mut compressed: Vec<u8>, size: usize) -> Vec<u8> {
        compressed.extend((size as u32).to_le_bytes());
        compressed
    }

    fn lz4_payload(blocks: &[&[u8]]) -> Vec<u8> {
        let mut compressed = LZ4_LEGACY_MAGIC.to_le_bytes().to_vec();
        for block in blocks {
            let block = lz4_flex::block::compress(block);
            compressed.extend((block.len() as u32).to_le_bytes());
            compressed.extend(block);
        }
        with_size(compressed, blocks.iter().map(|block| block.len()).sum())
    }

    fn zstd_payload(kernel: &[u8]) -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        with_size(ruzstd::encoding::compress_to_vec(kernel, level), kernel.len())
    }

    #[test]
    fn the_payload_is_found_and_decompressed() {
        let kernel: Vec<u8> = (0..100_000u32).flat_map(|word| (word / 7).to_le_bytes()).collect();
        let file = bzimage(&lz4_payload(&[&kernel]));
        assert_eq!(decompress(payload(&file).unwrap().unwrap()).unwrap(), kernel);
        let file = bzimage(&zstd_payload(&kernel));
        assert_eq!(decompress(payload(&file).unwrap().unwrap()).unwrap(), kernel);
        assert!(payload(b"\x7fELF").unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_a_reason() {
        let gzip = with_size(vec![0x1f, 0x8b, 8, 0], 100);
        let cases: [(Vec<u8>, &str); 4] = [
            (gzip, "extract-vmlinux"),
            (with_size(vec![0; 64], KERNEL_BYTES_MAX + 1), "decompressed"),
            (vec![1, 2], "shorter"),
            (with_size(lz4_payload(&[b"kernel"]), 7), "damaged"),
        ];
        for (payload, reason) in cases {
            let error = decompress(&payload).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let mut file = bzimage(b"12345678");
        file.truncate(file.len() - 1);
        assert!(payload(&file).unwrap_err().to_string().contains("does not have"));
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in 0usize..5000, value: u8, zstandard: bool) {
            let kernel = [7; 3000];
            let mut file = bzimage(&if zstandard { zstd_payload(&kernel) } else { lz4_payload(&[&kernel[..1000], &kernel[1000..]]) });
            let at = at % file.len();
            file[at] = value;
            if let Ok(Some(payload)) = payload(&file) {
                let _ = decompress(payload);
            }
        }
    }
}
