//! Shared memory between the processes of a VM: a sealed memfd and its mapping.
//!
//! This is the one home of the raw pointers: everything above reads and writes through bounds-checked copies and atomics.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        mman::{MapFlags, ProtFlags, mmap, munmap},
        stat::fstat,
    },
    unistd::ftruncate,
};

/// A mapping that other processes may change at any time.
#[derive(Debug)]
pub struct SharedMemory {
    base: NonNull<u8>,
    length: usize,
    fd: OwnedFd,
}

// SAFETY: the mapping is process-wide and stays until drop; all access goes through atomics or through copies whose callers
// keep the ring and gate protocols (one writer at a time for a byte range).
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// A new zeroed region of `length` bytes that can neither shrink nor grow.
    ///
    /// # Errors
    /// When the kernel has no memory or descriptor for it.
    pub fn create(name: &str, length: usize) -> io::Result<Self> {
        let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
        let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&fd, length as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        Self::map(fd, length)
    }

    /// Maps a region that another process created; it must have exactly `length` bytes and be sealed against shrinking, so
    /// that no access can fault.
    ///
    /// # Errors
    /// A descriptor that is not such a region.
    pub fn open(fd: OwnedFd, length: usize) -> io::Result<Self> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS)?;
        let sealed = SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK);
        if !sealed || fstat(&fd)?.st_size != length as i64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the shared region has another size or is not sealed: both sides must be of one release",
            ));
        }
        Self::map(fd, length)
    }

    fn map(fd: OwnedFd, length: usize) -> io::Result<Self> {
        let size = NonZeroUsize::new(length).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh shared mapping at an address the kernel chooses; the memfd is sealed, so it cannot shrink under us.
        let base = unsafe {
            mmap(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &fd,
                0,
            )?
        };
        Ok(Self {
            base: base.cast(),
            length,
            fd,
        })
    }

    /// The descriptor, to hand to another process.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether the region has no bytes; never true.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    #[inline]
    fn at(&self, offset: usize, bytes: usize) -> NonNull<u8> {
        let end = offset.checked_add(bytes).expect("offset overflow");
        assert!(
            end <= self.length,
            "access {offset}+{bytes} outside a region of {} bytes",
            self.length
        );
        // SAFETY: the range is inside the mapping (checked above).
        unsafe { self.base.add(offset) }
    }

    /// The 32-bit word at `offset`.
    #[must_use]
    #[inline]
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        // SAFETY: in bounds, aligned (the mapping is page aligned), and mapped as long as `self`; shared words are only
        // accessed as atomics.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast().as_ptr()) }
    }

    /// The 64-bit word at `offset`.
    #[must_use]
    #[inline]
    pub fn long(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: as for `word`.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast().as_ptr()) }
    }

    /// Copies out `into.len()` bytes from `offset`. The bytes are untrusted and may be torn.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: `from` is valid for the length (checked), `into` is a private buffer, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) }
    }

    /// Appends `length` bytes from `offset` to `out`. The bytes are untrusted and may be torn.
    #[inline]
    pub fn append_to(&self, offset: usize, length: usize, out: &mut Vec<u8>) {
        let from = self.at(offset, length);
        out.reserve(length);
        let end = out.len();
        // SAFETY: `from` is valid for the length (checked); the Vec has room for it behind its end (just reserved), which is private, so
        // they do not overlap; all `length` bytes are initialised when the length is set.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr().add(end), length);
            out.set_len(end + length);
        }
    }

    /// Copies `bytes` in at `offset`.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: as for `read`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) }
    }

    /// Lets `fill` write `bytes` bytes in place at `offset`. The caller is the range's only writer until it is published.
    #[inline]
    pub fn write_in_place<R>(&self, offset: usize, bytes: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let to = self.at(offset, bytes);
        // SAFETY: in bounds; the ring or gate protocol gives this range to one writer, and peers do not read it before it is
        // published. A hostile peer can at worst garble the bytes, which every reader checks.
        fill(unsafe { std::slice::from_raw_parts_mut(to.as_ptr(), bytes) })
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base.cast(), self.length) };
    }
}
