//! The configuration space that frontends read, and how they hear that it changed.
//!
//! ```text
//!  operator: resize ─► device ─► ConfigSpace ─► CONFIG_CHANGE on the backend's channel ─► the frontend reads it again, tells the guest
//! ```
//! The crate `vhost` takes the backend's channel (SET_BACKEND_REQ_FD) and has no message for this in it. So its descriptor is looked at
//! before the crate receives it, and the message is sent from here.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard},
};

use tracing::{debug, warn};
use vhost::vhost_user::message::VHOST_USER_CONFIG_OFFSET;

use super::coming::Coming;

/// Code of SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, protocol version 1, no payload, no reply asked for.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

#[derive(Debug, Default)]
struct Space {
    bytes: Vec<u8>,
    /// The frontend's ear.
    channel: Option<UnixStream>,
}

/// The configuration space, shared by the control thread and the operator's.
#[derive(Clone, Debug)]
pub struct ConfigSpace(Arc<Mutex<Space>>);

impl ConfigSpace {
    /// With this content.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Space { bytes, channel: None })))
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.0.lock().expect("a panic aborts the process")
    }

    /// `size` bytes from `offset` on, as a frontend asks for them: some (Cloud Hypervisor) count from the space's place in an MMIO
    /// device, others (QEMU) from 0. Beyond the device's own space there are zeroes.
    #[must_use]
    pub fn read(&self, offset: u32, size: u32) -> Vec<u8> {
        let offset = offset.checked_sub(VHOST_USER_CONFIG_OFFSET).unwrap_or(offset) as usize;
        let mut config = self.space().bytes.get(offset..).unwrap_or_default().to_vec();
        config.resize(size as usize, 0);
        config
    }

    /// The driver wrote `bytes` at `offset`, and the device took it: it is within its space.
    pub(super) fn written(&self, offset: u32, bytes: &[u8]) {
        self.space().bytes[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// The device changed it: the frontend is told, if there is one that listens.
    pub(super) fn replace(&self, bytes: Vec<u8>) {
        let mut space = self.space();
        if std::mem::replace(&mut space.bytes, bytes) == space.bytes {
            return;
        }
        let Some(channel) = &mut space.channel else {
            debug!("no frontend listens for changes of the configuration space");
            return;
        };
        let message: Vec<u8> = CONFIG_CHANGE.iter().flat_map(|word| word.to_ne_bytes()).collect();
        if let Err(error) = channel.write_all(&message) {
            warn!(%error, "the frontend cannot be told of the new configuration space: it sees it when it reads it again");
        }
    }

    /// Where the frontend listens from here on.
    pub(super) fn listen(&self, channel: Option<UnixStream>) {
        self.space().channel = channel;
    }
}

/// The channel in the message that comes next, if it brings one.
pub(super) fn coming_channel(coming: Coming) -> Option<UnixStream> {
    let mut channels = coming.descriptors;
    let channel = UnixStream::from((coming.code == SET_BACKEND_REQ_FD).then(|| channels.pop())??);
    // The operator's thread must not wait for a frontend that does not read.
    channel.set_nonblocking(true).ok()?;
    Some(channel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frontends_count_from_either_place_and_read_zeroes_beyond() {
        let config = ConfigSpace::new(vec![1, 2, 3]);
        assert_eq!(config.read(0, 2), [1, 2]);
        assert_eq!(config.read(VHOST_USER_CONFIG_OFFSET + 1, 4), [2, 3, 0, 0]);
        assert_eq!(config.read(90, 1), [0]);
        config.written(1, &[9]);
        assert_eq!(config.read(0, 3), [1, 9, 3]);
    }

    #[test]
    fn a_change_is_announced_and_no_change_is_not() {
        use std::io::Read;
        let config = ConfigSpace::new(vec![1]);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        config.listen(Some(ours));
        config.replace(vec![1]);
        config.replace(vec![2]);
        config.listen(None);
        config.replace(vec![3]);
        let mut said = Vec::new();
        theirs.read_to_end(&mut said).unwrap();
        let expected: Vec<u8> = [2u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(said, expected);
        assert_eq!(config.read(0, 1), [3]);
    }
}
