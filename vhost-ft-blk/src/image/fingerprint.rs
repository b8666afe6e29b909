//! What both hosts must start from, as a digest of an image.

use std::{io, os::unix::fs::FileExt};

use sha2::{Digest, Sha256};
use tracing::info;

use super::Image;

/// Up to here a fingerprint covers every byte.
const WHOLE_BYTES_MAX: u64 = 256 << 20;
/// Beyond, this many evenly spaced samples.
const SAMPLES: u64 = 1024;
/// Bytes of a sample, and of each read.
const SAMPLE_BYTES: u64 = 64 << 10;

impl Image {
    /// Digest of what both hosts must start from: size and content. Of an image beyond 256 MiB, 1024 evenly spaced samples of
    /// 64 KiB, unless the `whole` content is wanted.
    ///
    /// # Errors
    /// As read(2).
    pub fn fingerprint(&self, whole: bool) -> io::Result<[u8; 32]> {
        let whole = whole || self.bytes <= WHOLE_BYTES_MAX;
        // From the first byte to the last; the whole image is as many samples as it takes, end to end.
        let samples = if whole {
            self.bytes.div_ceil(SAMPLE_BYTES)
        } else {
            SAMPLES
        };
        let offset = |sample: u64| match whole {
            true => sample * SAMPLE_BYTES,
            false => {
                let span = u128::from(self.bytes - SAMPLE_BYTES);
                (span * u128::from(sample) / u128::from(SAMPLES - 1)) as u64
            }
        };
        let mut digest = Sha256::new();
        digest.update(b"blk");
        digest.update(self.bytes.to_le_bytes());
        digest.update([u8::from(self.read_only)]);
        let mut buffer = vec![0; SAMPLE_BYTES as usize];
        for sample in 0..samples {
            let offset = offset(sample);
            let length = SAMPLE_BYTES.min(self.bytes - offset) as usize;
            self.file.read_exact_at(&mut buffer[..length], offset)?;
            digest.update(&buffer[..length]);
        }
        info!(
            bytes = self.bytes,
            content = if whole { "whole" } else { "1024 samples of 64 KiB" },
            "image fingerprinted"
        );
        Ok(digest.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, time::Duration};

    use super::*;
    use crate::image::{Access, Locking};

    const WRITES: Access = Access {
        read_only: false,
        direct: false,
    };

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn the_fingerprint_is_of_size_and_content() {
        let fingerprint = |content: &[u8], bytes: u64| {
            let mut file = image(0);
            file.write_all(content).unwrap();
            file.as_file().set_len(bytes).unwrap();
            Image::open(file.path(), WRITES, 512, Locking::Life, Duration::ZERO)
                .unwrap()
                .fingerprint(false)
                .unwrap()
        };
        let base = fingerprint(b"x", 100 << 10);
        assert_eq!(base, fingerprint(b"x", 100 << 10));
        assert_ne!(base, fingerprint(b"y", 100 << 10));
        assert_ne!(base, fingerprint(b"x", 101 << 10));
        // Beyond the limit, samples: the first and the last byte are among them.
        let large = WHOLE_BYTES_MAX + 512;
        let base = fingerprint(b"x", large);
        assert_ne!(base, fingerprint(b"y", large));
        let mut file = image(large);
        file.write_all(b"x").unwrap();
        file.as_file().write_all_at(b"z", large - 1).unwrap();
        let end = Image::open(file.path(), WRITES, 512, Locking::Life, Duration::ZERO)
            .unwrap()
            .fingerprint(false)
            .unwrap();
        assert_ne!(base, end);
    }

    #[test]
    fn a_whole_fingerprint_sees_every_byte_of_a_large_image() {
        let file = image(WHOLE_BYTES_MAX + (1 << 20));
        let open = Image::open(file.path(), WRITES, 512, Locking::Life, Duration::ZERO).unwrap();
        let both = || [false, true].map(|whole| open.fingerprint(whole).unwrap());
        let before = both();
        // Between two samples.
        file.as_file().write_all_at(b"x", 100 << 10).unwrap();
        let after = both();
        assert_eq!(before[0], after[0]);
        assert_ne!(before[1], after[1]);
    }
}
