//! A vhost-user frontend that speaks as Cloud Hypervisor does, with an answer asked for everything.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};

use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures},
    },
};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::{BlkDriver, BlkRequest, Driver};

/// How long a test waits for something that must happen.
pub const PATIENCE: Duration = Duration::from_secs(60);

const PROTOCOL_FEATURES: u64 = 1 << 30;

/// A connected frontend with the eventfds of its queues.
pub struct Session {
    pub frontend: Frontend,
    pub kicks: Vec<EventFd>,
    pub calls: Vec<EventFd>,
    pub features: u64,
}

impl Session {
    /// Connects, negotiates `features` (those of them that are offered), shares memory and starts the queues.
    pub fn start(path: &Path, memory: &GuestMemoryMmap, features: u64, drivers: &[&Driver]) -> Self {
        let mut session = Self::negotiate(path, features, drivers.len());
        session.share(memory);
        for (index, driver) in drivers.iter().enumerate() {
            session.start_queue(index, driver);
        }
        session
    }

    /// The same over a socket that is connected already.
    pub fn start_over(stream: UnixStream, memory: &GuestMemoryMmap, features: u64, driver: &Driver) -> Self {
        Self::over(stream, memory, features, &[driver], VhostUserProtocolFeatures::empty())
    }

    /// The same with several queues, and protocol features that the backend must have.
    pub fn over(
        stream: UnixStream,
        memory: &GuestMemoryMmap,
        features: u64,
        drivers: &[&Driver],
        more: VhostUserProtocolFeatures,
    ) -> Self {
        let frontend = Frontend::from_stream(stream, drivers.len() as u64);
        let mut session = Self::negotiate_over(frontend, features, drivers.len(), more);
        session.share(memory);
        for (index, driver) in drivers.iter().enumerate() {
            session.start_queue(index, driver);
        }
        session
    }

    pub fn negotiate(path: &Path, features: u64, queues: usize) -> Self {
        Self::negotiate_with(path, features, queues, VhostUserProtocolFeatures::empty())
    }

    /// The same with more protocol features, which the backend must have.
    pub fn negotiate_with(path: &Path, features: u64, queues: usize, more: VhostUserProtocolFeatures) -> Self {
        Self::negotiate_over(Frontend::connect(path, queues as u64).unwrap(), features, queues, more)
    }

    fn negotiate_over(mut frontend: Frontend, features: u64, queues: usize, more: VhostUserProtocolFeatures) -> Self {
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_ne!(offered & PROTOCOL_FEATURES, 0);
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | more;
        assert!(protocol.contains(wanted));
        frontend
            .set_protocol_features(wanted | protocol & VhostUserProtocolFeatures::INFLIGHT_SHMFD)
            .unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(frontend.get_queue_num().unwrap() >= queues as u64);
        let features = offered & (features | PROTOCOL_FEATURES);
        frontend.set_features(features).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            frontend,
            kicks: (0..queues).map(|_| event()).collect(),
            calls: (0..queues).map(|_| event()).collect(),
            features,
        }
    }

    /// Has the device track its chains: in `region` of an earlier session, or in a new one, which is given back.
    pub fn track(&mut self, region: Option<(VhostUserInflight, File)>, queue_size: u16) -> (VhostUserInflight, File) {
        let asked = VhostUserInflight::new(0, 0, self.kicks.len() as u16, queue_size);
        let (inflight, file) = region.unwrap_or_else(|| self.frontend.get_inflight_fd(&asked).unwrap());
        self.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        (inflight, file)
    }

    pub fn share(&mut self, memory: &GuestMemoryMmap) {
        let regions: Vec<_> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
            .collect();
        self.frontend.set_mem_table(&regions).unwrap();
    }

    pub fn start_queue(&mut self, index: usize, driver: &Driver) {
        let setup = driver.setup();
        self.frontend.set_vring_num(index, setup.size).unwrap();
        self.set_addresses(index, driver, false);
        let frontend = &mut self.frontend;
        frontend.set_vring_base(index, setup.next_available).unwrap();
        frontend.set_vring_call(index, &self.calls[index]).unwrap();
        frontend.set_vring_kick(index, &self.kicks[index]).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }

    /// Says where the rings of a queue are, and whether writes to its used ring are logged.
    pub fn set_addresses(&mut self, index: usize, driver: &Driver, logged: bool) {
        let setup = driver.setup();
        let user = |address| driver.memory().get_host_address(GuestAddress(address)).unwrap() as u64;
        let addresses = VringConfigData {
            queue_max_size: setup.size,
            queue_size: setup.size,
            flags: u32::from(logged),
            desc_table_addr: user(setup.descriptor_table),
            used_ring_addr: user(setup.used_ring),
            avail_ring_addr: user(setup.available_ring),
            log_addr: logged.then_some(setup.used_ring),
        };
        self.frontend.set_vring_addr(index, &addresses).unwrap();
    }

    pub fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    /// Waits for the interrupt of a queue.
    pub fn wait_call(&self, queue: usize) {
        let call = &self.calls[queue];
        assert!(readable_within(call, PATIENCE), "no interrupt on queue {queue}");
        call.read().unwrap();
    }

    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), vhost::Error> {
        self.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
    }

    pub fn config(&mut self, length: u32) -> Vec<u8> {
        let buffer = vec![0; length as usize];
        let (_, config) = self
            .frontend
            .get_config(0, length, VhostUserConfigFlags::WRITABLE, &buffer)
            .unwrap();
        config
    }
}

/// Kicks if the device asked for it and waits until all of `requests` are used.
pub fn complete(session: &Session, driver: &mut BlkDriver, requests: &[BlkRequest]) {
    complete_on(session, 0, driver, requests);
}

/// The same on any queue.
pub fn complete_on(session: &Session, queue: usize, driver: &mut BlkDriver, requests: &[BlkRequest]) {
    if driver.ring.wants_kick() {
        session.kick(queue);
    }
    let mut left: Vec<u16> = requests.iter().map(|request| request.head).collect();
    loop {
        while let Some((head, _)) = driver.ring.take_used() {
            left.retain(|other| *other != head);
        }
        if left.is_empty() {
            return;
        }
        session.wait_call(queue);
    }
}

/// Whether a descriptor becomes readable in time.
pub fn readable_within(fd: &impl std::os::fd::AsRawFd, patience: Duration) -> bool {
    // SAFETY: the descriptor is open as long as the reference.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(patience).unwrap()).unwrap() == 1
}
