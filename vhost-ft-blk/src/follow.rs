//! Engine `device`, backup: an entry, done to this image.

use std::{io, os::unix::fs::FileExt};

use ft_protocol::{
    Body,
    limits::{BLOCK_BYTES, DIGESTS_MAX},
    message::Digest,
};
use ft_vhost::guest_side::blk::SECTOR_BYTES;
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
};

use sha2::{Digest as _, Sha256};

use crate::{
    image::Image,
    resync::{BLOCK_SECTORS, digest},
};

/// Zeroes written at once where the image cannot make them itself.
const ZEROES_BYTES: u64 = 1 << 20;

impl Image {
    /// Does what an entry says. Nothing in it is trusted but its checksum.
    ///
    /// # Errors
    /// What the operator is to know: the image is no equal of the primary's any more.
    pub(crate) fn apply(&mut self, body: &Body<'_>) -> Result<(), String> {
        let (what, result) = match *body {
            Body::Write { sector, payload } => {
                let offset = self.range(sector, payload.len() as u64)?;
                (
                    format!("write {} bytes at sector {sector}", payload.len()),
                    self.file().write_all_at(payload, offset),
                )
            }
            Body::Zeroes { sector, sectors, unmap } => {
                let bytes = u64::from(sectors) * SECTOR_BYTES;
                let offset = self.range(sector, bytes)?;
                (
                    format!("zero {bytes} bytes at sector {sector}"),
                    self.zero(offset, bytes, unmap),
                )
            }
            Body::Flush => ("flush".into(), self.file().sync_data()),
            _ => return Err(format!("a disk cannot follow a {} entry", body.name())),
        };
        result.map_err(|error| {
            format!("this image cannot {what} as the primary's did, and is no equal of it any more: {error}")
        })
    }

    /// What both hosts' images have in common from the start, whatever they hold.
    pub(crate) fn shape(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        digest.update(b"blk shape");
        digest.update(self.sectors().to_le_bytes());
        digest.update([u8::from(self.is_read_only())]);
        digest.finalize().into()
    }

    /// What this image holds in a range, block by block.
    ///
    /// # Errors
    /// A range that is none of the disk or too long, and an image that cannot be read.
    pub(crate) fn digests(&self, sector: u64, sectors: u32) -> Result<Vec<Digest>, String> {
        let end = sector.saturating_add(sectors.into());
        let blocks = u64::from(sectors).div_ceil(BLOCK_SECTORS);
        if sectors == 0 || end > self.sectors() || blocks > DIGESTS_MAX as u64 {
            return Err(format!(
                "an entry asks about {sectors} sectors at sector {sector}: it does not fit this disk"
            ));
        }
        let mut buffer = vec![0; BLOCK_BYTES];
        let starts = (sector..end).step_by(BLOCK_SECTORS as usize);
        starts
            .map(|start| {
                let bytes = &mut buffer[..((end - start).min(BLOCK_SECTORS) * SECTOR_BYTES) as usize];
                self.file().read_exact_at(bytes, start * SECTOR_BYTES)?;
                Ok(digest(bytes))
            })
            .collect::<io::Result<_>>()
            .map_err(|error| format!("this image cannot be read at sector {sector}: {error}"))
    }

    /// Where a range begins, if it is one of the disk.
    fn range(&self, sector: u64, bytes: u64) -> Result<u64, String> {
        let refused = |why| format!("an entry about {bytes} bytes at sector {sector} {why}");
        if self.is_read_only() {
            return Err(refused("came for a disk that is read-only"));
        }
        let sectors = bytes / SECTOR_BYTES;
        let is_within = bytes != 0
            && bytes.is_multiple_of(SECTOR_BYTES)
            && sector.checked_add(sectors).is_some_and(|end| end <= self.sectors());
        match is_within {
            true => Ok(sector * SECTOR_BYTES),
            false => Err(refused("does not fit this disk")),
        }
    }

    fn zero(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let how = match unmap {
            true => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            false => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        let flags = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            match fallocate(self.file(), flags, offset as i64, bytes as i64) {
                Err(Errno::EINTR) => {}
                Err(Errno::EOPNOTSUPP) => break,
                result => return result.map_err(io::Error::from),
            }
        }
        let zeroes = vec![0; bytes.min(ZEROES_BYTES) as usize];
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(ZEROES_BYTES);
            self.file().write_all_at(&zeroes[..part as usize], offset + done)?;
            done += part;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::image::{Access, Locking};

    fn image(sectors: u64) -> (tempfile::NamedTempFile, Image) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(sectors * SECTOR_BYTES).unwrap();
        let open = Image::open(file.path(), Access::default(), 512, Locking::Life, Duration::ZERO).unwrap();
        (file, open)
    }

    #[test]
    fn entries_change_what_they_say_and_nothing_else() {
        let (file, mut image) = image(16);
        let payload = &[7; 2048][..];
        image.apply(&Body::Write { sector: 3, payload }).unwrap();
        for (sector, unmap) in [(4, true), (5, false)] {
            image
                .apply(&Body::Zeroes {
                    sector,
                    sectors: 1,
                    unmap,
                })
                .unwrap();
        }
        image.apply(&Body::Flush).unwrap();
        let mut expected = vec![0; 16 * 512];
        expected[3 * 512..4 * 512].fill(7);
        expected[6 * 512..7 * 512].fill(7);
        assert_eq!(std::fs::read(file.path()).unwrap(), expected);
    }

    #[test]
    fn entries_that_do_not_fit_are_refused_and_change_nothing() {
        let (file, mut image) = image(4);
        let payload = &[7; 1024][..];
        for body in [
            Body::Write { sector: 3, payload },
            Body::Write {
                sector: u64::MAX,
                payload,
            },
            Body::Write {
                sector: 0,
                payload: &payload[..100],
            },
            Body::Write {
                sector: 0,
                payload: &[],
            },
            Body::Zeroes {
                sector: 0,
                sectors: 0,
                unmap: true,
            },
            Body::Zeroes {
                sector: 1,
                sectors: u32::MAX,
                unmap: false,
            },
        ] {
            assert!(
                image.apply(&body).unwrap_err().contains("does not fit this disk"),
                "{body:?}"
            );
        }
        let sync = Body::Sync(ft_protocol::Stop::default());
        assert!(image.apply(&sync).unwrap_err().contains("cannot follow a sync entry"));
        assert_eq!(std::fs::read(file.path()).unwrap(), [0; 4 * 512]);
        let read_only = Access {
            read_only: true,
            direct: false,
        };
        drop(image);
        let mut image = Image::open(file.path(), read_only, 512, Locking::Life, Duration::ZERO).unwrap();
        assert!(
            image
                .apply(&Body::Write { sector: 0, payload })
                .unwrap_err()
                .contains("read-only")
        );
    }
}
