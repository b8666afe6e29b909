//! Files of a frontend that are mapped here: what happens when it makes them shorter.
//!
//! An access behind the end of a mapped file is SIGBUS. A memfd is sealed against that before its length is checked; where that
//! cannot be done (a file in /dev/shm, hugetlbfs, a memfd made without sealing) the daemon ends, and says why: its one client is
//! the one that did it.

use std::fs::File;

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    libc,
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};

use crate::exit::Status;

const SAID: &[u8] = b"vhost-user: memory shared by the frontend is gone (SIGBUS): it made the file shorter, or the host has no page left for it. \
Give the VM sealed memory (memory-backend-memfd)\n";

/// Forbids the file to become shorter, if it can be forbidden.
pub(crate) fn keep_length(file: &File) {
    // Refused for what is no memfd, and for one whose seals are final: QEMU's then have this one.
    let _ = fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK));
}

extern "C" fn end(_signal: libc::c_int) {
    // SAFETY: write(2) and _exit(2) may be called in a signal handler, and the buffer is static.
    unsafe {
        libc::write(libc::STDERR_FILENO, SAID.as_ptr().cast(), SAID.len());
        libc::_exit(Status::Environment as libc::c_int);
    }
}

/// Ends the process with a clear message when shared memory is taken away under it.
///
/// # Errors
/// As sigaction(2).
pub(crate) fn end_clearly_on_sigbus() -> nix::Result<()> {
    let action = SigAction::new(SigHandler::Handler(end), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler calls only what is allowed in one, and does not return.
    unsafe { sigaction(Signal::SIGBUS, &action) }.map(drop)
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn a_memfd_keeps_its_length_and_a_file_does_not() {
        let memfd = File::from(memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        memfd.set_len(8192).unwrap();
        keep_length(&memfd);
        assert!(memfd.set_len(4096).is_err());
        memfd.set_len(16384).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        keep_length(&file);
        file.set_len(4096).unwrap();
    }
}
