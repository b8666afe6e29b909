//! The raw image: opened, locked, measured.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use ft_vhost::guest_side::blk::SECTOR_BYTES;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};
use thiserror::Error;
use tracing::info;

use crate::standing::Standing;

mod fingerprint;

/// How long a daemon waits for the lock of the one before it.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// How often it looks: fcntl(2) has no wait with a limit.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// What direct I/O may want, smallest first.
const ALIGNMENTS: [usize; 4] = [512, 1024, 2048, 4096];

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Not there, or not allowed.
    #[error("cannot open image {path}: {source}")]
    Open {
        /// Image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its file system knows no direct I/O.
    #[error("the file system of image {0} has no direct I/O: leave --direct out")]
    NoDirect(PathBuf),
    /// Blocks too small for direct I/O.
    #[error(
        "direct I/O on image {path} wants blocks of {alignment} bytes and the disk has {block_bytes}: --block-size {alignment}, or leave --direct out"
    )]
    Alignment {
        /// Image.
        path: PathBuf,
        /// What is wanted.
        alignment: usize,
        /// Bytes of a logical block.
        block_bytes: u32,
    },
    /// Somebody else uses it.
    #[error("image {0} is locked: another process uses it")]
    Locked(PathBuf),
    /// Nothing in it.
    #[error("image {0} is too small: a disk has at least one sector of 512 bytes")]
    TooSmall(PathBuf),
    /// A part of a block at its end.
    #[error("image {path} has {bytes} bytes, which is not a multiple of {block_bytes}: is it a raw image?")]
    PartBlock {
        /// Image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Bytes of a logical block.
        block_bytes: u32,
    },
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// For reading only.
    pub read_only: bool,
    /// Past the page cache.
    pub direct: bool,
}

/// For how long an image is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locking {
    /// From its opening to its end.
    Life,
    /// While a queue runs: the image of a VM that migrates has a daemon at both ends.
    WhileAttached,
}

/// An image, and our lock on it.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: File,
    alignment: usize,
    locking: Locking,
    patience: Duration,
    /// Looked at whenever the image becomes ours again.
    standing: Option<Standing>,
    /// Devices that hold the lock, of all clones of this image.
    holders: Arc<Mutex<u32>>,
    bytes: u64,
    block_bytes: u32,
    read_only: bool,
}

impl Image {
    /// Opens `path`, whose size must be whole blocks, and locks it if it is to be ours for life: exclusively, or shared with other
    /// readers if `read_only`.
    ///
    /// A lock is waited for for as long as `patience`: the writes of a daemon that was killed hold it until they are through, and
    /// none of ours may be overtaken by them.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn open(
        path: &Path,
        access: Access,
        block_bytes: u32,
        locking: Locking,
        patience: Duration,
    ) -> Result<Self, ImageError> {
        let open = |source| ImageError::Open {
            path: path.into(),
            source,
        };
        let Access { read_only, direct } = access;
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let opened = File::options()
            .read(true)
            .write(!read_only)
            .custom_flags(flags)
            .open(path);
        let mut file = opened.map_err(|source| match (direct, source.raw_os_error()) {
            (true, Some(libc::EINVAL)) => ImageError::NoDirect(path.into()),
            _ => open(source),
        })?;
        if locking == Locking::Life {
            lock_patiently(&file, read_only, patience).map_err(|errno| match errno {
                Errno::EAGAIN | Errno::EACCES => ImageError::Locked(path.into()),
                errno => open(errno.into()),
            })?;
        }
        let bytes = measure(&mut file).map_err(open)?;
        if bytes < SECTOR_BYTES {
            return Err(ImageError::TooSmall(path.into()));
        }
        if !bytes.is_multiple_of(block_bytes.into()) {
            let path = path.into();
            return Err(ImageError::PartBlock {
                path,
                bytes,
                block_bytes,
            });
        }
        let alignment = if direct {
            alignment(&file, bytes).map_err(open)?
        } else {
            1
        };
        if alignment > block_bytes as usize {
            return Err(ImageError::Alignment {
                path: path.into(),
                alignment,
                block_bytes,
            });
        }
        Ok(Self {
            path: path.into(),
            alignment,
            file,
            locking,
            patience,
            standing: None,
            holders: Arc::default(),
            bytes,
            block_bytes,
            read_only,
        })
    }

    /// The same, which no device begins to use while it may be outdated.
    #[must_use]
    pub fn judged_by(self, standing: Standing) -> Self {
        Self {
            standing: Some(standing),
            ..self
        }
    }

    /// A device begins to use the image: from here on it is ours.
    ///
    /// # Errors
    /// What the operator is to know: another process uses it, or it is not the image it was.
    ///
    /// # Panics
    /// If another thread panicked here, which ends the process anyway.
    pub fn attach(&mut self) -> Result<(), String> {
        if self.locking == Locking::Life {
            return Ok(());
        }
        let mut holders = self.holders.lock().expect("a panic aborts the process");
        if *holders == 0 {
            lock_patiently(&self.file, self.read_only, self.patience)
                .map_err(|_| ImageError::Locked(self.path.clone()).to_string())?;
            if let Some(Err(refused)) = self.standing.as_ref().map(Standing::require_current) {
                let _ = lock(&self.file, libc::F_UNLCK);
                return Err(refused.to_string());
            }
            let found = measure(&mut self.file).map_err(|error| error.to_string())?;
            if self.whole_blocks(found) != self.bytes {
                let _ = lock(&self.file, libc::F_UNLCK);
                return Err(format!(
                    "image {} has {found} bytes and had {} when it was opened: say resize to this daemon",
                    self.path.display(),
                    self.bytes
                ));
            }
        }
        *holders += 1;
        Ok(())
    }

    /// A device is done with the image. After the last one it is durable, and another process may have it.
    ///
    /// # Errors
    /// As fdatasync(2): the image stays ours, for what it holds may not be on the disk.
    ///
    /// # Panics
    /// As [`Image::attach`].
    pub fn detach(&mut self) -> io::Result<()> {
        if self.locking == Locking::Life {
            return Ok(());
        }
        let mut holders = self.holders.lock().expect("a panic aborts the process");
        *holders -= 1;
        if *holders == 0 {
            if !self.read_only {
                self.file.sync_data()?;
            }
            lock(&self.file, libc::F_UNLCK)?;
        }
        Ok(())
    }

    /// Makes a file that many bytes long, or (`None`) looks how long it is by now. A disk in use only grows on demand; what was made
    /// shorter elsewhere is gone already.
    ///
    /// # Errors
    /// What the operator is to know. The size is then as it was.
    pub fn resize(&mut self, bytes: Option<u64>) -> Result<(), String> {
        let block_bytes = u64::from(self.block_bytes);
        if let Some(wanted) = bytes {
            if wanted < self.bytes {
                return Err(format!(
                    "the disk has {} bytes: it is not made smaller while a guest may use it",
                    self.bytes
                ));
            }
            if !wanted.is_multiple_of(block_bytes) {
                return Err(format!("{wanted} bytes are not a multiple of {block_bytes}"));
            }
            self.file.set_len(wanted).map_err(|error| {
                format!("the image cannot be made larger: {error}. Of a block device, resize that, then say resize")
            })?;
        }
        let found = measure(&mut self.file).map_err(|error| error.to_string())?;
        let whole = self.whole_blocks(found);
        if whole == 0 {
            return Err("nothing is left of the image".into());
        }
        info!(bytes = whole, before = self.bytes, "the image has a new size");
        self.bytes = whole;
        Ok(())
    }

    /// Bytes of a disk on a file of `bytes`: a part of a block at the end is not part of it.
    fn whole_blocks(&self, bytes: u64) -> u64 {
        bytes - bytes % u64::from(self.block_bytes)
    }

    /// Sectors of the disk.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.bytes / SECTOR_BYTES
    }

    /// Whether it was opened for reading only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The file, for I/O.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Whether direct reads of this process, once it is killed, may go on while its successor serves the guest already: readers share
    /// the image, so nobody waits for them. Memory that outlives the process is then not for the kernel to write to.
    #[must_use]
    pub fn may_be_read_after_us(&self) -> bool {
        self.read_only && self.alignment > 1
    }

    /// Where in memory the data of an I/O must begin and end: multiples of this.
    #[must_use]
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Another handle on the same open image; the lock lasts as long as either.
    ///
    /// # Errors
    /// As dup(2).
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            path: self.path.clone(),
            standing: self.standing.clone(),
            holders: Arc::clone(&self.holders),
            ..*self
        })
    }

    /// The file, for those who follow.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

/// What O_DIRECT wants of offsets, lengths and addresses, found by trying: file systems that cannot tell are many.
fn alignment(file: &File, bytes: u64) -> io::Result<usize> {
    let mut buffer = vec![0; 4 * ALIGNMENTS[ALIGNMENTS.len() - 1]];
    for alignment in ALIGNMENTS {
        // Not at a multiple of the next larger one, in memory as on the disk, if the image is that long.
        let from = buffer.as_ptr().align_offset(2 * alignment) + alignment;
        let offset = if bytes >= 2 * alignment as u64 {
            alignment as u64
        } else {
            0
        };
        match file.read_at(&mut buffer[from..from + alignment], offset) {
            Ok(_) => return Ok(alignment),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "direct I/O wants blocks beyond 4096 bytes: leave --direct out",
    ))
}

/// Bytes of an image. A block device has its size here too, not in its metadata.
fn measure(file: &mut File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

fn lock_patiently(file: &File, shared: bool, patience: Duration) -> nix::Result<()> {
    let deadline = Instant::now() + patience;
    let kind = if shared { libc::F_RDLCK } else { libc::F_WRLCK };
    loop {
        match lock(file, kind) {
            Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < deadline => std::thread::sleep(LOCK_RETRY),
            result => return result,
        }
    }
}

/// An open-file-description lock on the whole file: other processes, QEMU among them, see it.
fn lock(file: &File, kind: libc::c_int) -> nix::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITES: Access = Access {
        read_only: false,
        direct: false,
    };
    const READS: Access = Access {
        read_only: true,
        direct: false,
    };

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn a_second_writer_is_locked_out_and_readers_share() {
        let file = image(1024);
        let first = Image::open(file.path(), WRITES, 512, Locking::Life, Duration::ZERO).unwrap();
        assert_eq!(first.sectors(), 2);
        assert!(matches!(
            Image::open(file.path(), WRITES, 512, Locking::Life, Duration::ZERO),
            Err(ImageError::Locked(_))
        ));
        assert!(matches!(
            Image::open(file.path(), READS, 512, Locking::Life, Duration::ZERO),
            Err(ImageError::Locked(_))
        ));
        drop(first);
        let _reader = Image::open(file.path(), READS, 512, Locking::Life, Duration::ZERO).unwrap();
        let _other = Image::open(file.path(), READS, 512, Locking::Life, Duration::ZERO).unwrap();
        assert!(matches!(
            Image::open(file.path(), WRITES, 512, Locking::Life, Duration::ZERO),
            Err(ImageError::Locked(_))
        ));
    }

    #[test]
    fn an_image_that_is_marked_meanwhile_is_not_attached_and_not_kept() {
        let file = image(1024);
        let standing = Standing::of(file.path(), None).unwrap();
        let image = Image::open(file.path(), WRITES, 512, Locking::WhileAttached, Duration::ZERO).unwrap();
        let mut image = image.judged_by(standing.clone());
        image.attach().unwrap();
        image.detach().unwrap();
        standing.mark("web").unwrap();
        assert!(image.attach().unwrap_err().contains("one of two images of VM 'web'"));
        drop(Image::open(file.path(), WRITES, 512, Locking::Life, Duration::ZERO).unwrap());
        standing.clear().unwrap();
        image.attach().unwrap();
    }

    #[test]
    fn a_part_of_a_block_at_the_end_keeps_nobody_from_the_image() {
        let file = image(1024);
        let mut image = Image::open(file.path(), WRITES, 512, Locking::WhileAttached, Duration::ZERO).unwrap();
        file.as_file().set_len(2000).unwrap();
        image.resize(None).unwrap();
        assert_eq!(image.sectors(), 3);
        image.attach().unwrap();
        image.detach().unwrap();
        file.as_file().set_len(2048).unwrap();
        assert!(image.attach().unwrap_err().contains("say resize"));
    }

    #[test]
    fn an_image_of_two_daemons_is_locked_by_the_one_that_uses_it() {
        let file = image(1024);
        let open = || Image::open(file.path(), WRITES, 512, Locking::WhileAttached, Duration::ZERO).unwrap();
        let (mut here, mut there) = (open(), open());
        let mut second = here.try_clone().unwrap();
        here.attach().unwrap();
        second.attach().unwrap();
        assert!(there.attach().unwrap_err().contains("locked"));
        here.detach().unwrap();
        assert!(there.attach().unwrap_err().contains("locked"));
        second.detach().unwrap();
        there.attach().unwrap();
        assert!(here.attach().unwrap_err().contains("locked"));
        there.detach().unwrap();
        file.as_file().set_len(2048).unwrap();
        assert!(here.attach().unwrap_err().contains("had 1024"));
        here.resize(None).unwrap();
        here.attach().unwrap();
    }

    #[test]
    fn sizes_that_are_no_disk_are_refused() {
        for bytes in [0, 100, 511] {
            let refused = Image::open(image(bytes).path(), WRITES, 512, Locking::Life, Duration::ZERO);
            assert!(matches!(refused, Err(ImageError::TooSmall(_))));
        }
        let refused = Image::open(image(1000).path(), WRITES, 512, Locking::Life, Duration::ZERO);
        assert!(matches!(refused, Err(ImageError::PartBlock { bytes: 1000, .. })));
        let refused = Image::open(
            Path::new("/nonexistent/image"),
            WRITES,
            512,
            Locking::Life,
            Duration::ZERO,
        );
        assert!(matches!(refused, Err(ImageError::Open { .. })));
    }

    #[test]
    fn an_image_grows_on_demand_and_is_measured_again() {
        let file = image(4096);
        let mut open = Image::open(file.path(), WRITES, 4096, Locking::Life, Duration::ZERO).unwrap();
        open.resize(Some(8192)).unwrap();
        assert_eq!((open.sectors(), file.as_file().metadata().unwrap().len()), (16, 8192));
        assert!(open.resize(Some(4096)).unwrap_err().contains("not made smaller"));
        assert!(open.resize(Some(8200)).unwrap_err().contains("not a multiple"));
        file.as_file().set_len(3 * 4096 + 1).unwrap();
        open.resize(None).unwrap();
        assert_eq!(open.sectors(), 24);
        file.as_file().set_len(100).unwrap();
        assert!(open.resize(None).unwrap_err().contains("nothing is left"));
        assert_eq!(open.sectors(), 24);
    }
}
