//! Guest memory: one memfd, mapped here, by KVM and by the device daemons.

use std::{fs::File, os::fd::AsRawFd};

use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::error::Error;

/// Guest RAM, one region from guest address 0.
#[derive(Debug)]
pub struct Ram {
    memory: GuestMemoryMmap,
    bytes: u64,
}

impl Ram {
    /// Allocates `mib` MiB of zeroed RAM.
    ///
    /// # Errors
    /// When the host has no memory or descriptors for it.
    pub fn new(mib: u32) -> Result<Self, Error> {
        let bytes = u64::from(mib) << 20;
        let failed = |source: std::io::Error| {
            Error::environment(format!(
                "cannot allocate {mib} MiB of guest memory: {source}. Lower --ram-mib"
            ))
        };
        let fd = memfd_create(c"guest-ram", MFdFlags::MFD_CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let file = File::from(fd);
        file.set_len(bytes).map_err(failed)?;
        let range = (GuestAddress(0), bytes as usize, Some(FileOffset::new(file, 0)));
        let memory =
            GuestMemoryMmap::from_ranges_with_files([range]).map_err(|error| failed(std::io::Error::other(error)))?;
        Ok(Self { memory, bytes })
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The mapping.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Where guest address 0 is mapped in this process.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        let region = self.memory.iter().next().expect("RAM has one region");
        region.as_ptr() as u64
    }

    /// The region as a vhost-user frontend describes it.
    #[must_use]
    pub fn vhost_region(&self) -> VhostUserMemoryRegionInfo {
        let region = self.memory.iter().next().expect("RAM has one region");
        let file = region.file_offset().expect("RAM is a memfd");
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: self.bytes,
            userspace_addr: self.host_address(),
            mmap_offset: 0,
            mmap_handle: file.file().as_raw_fd(),
        }
    }
}
