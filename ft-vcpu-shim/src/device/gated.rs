//! A device daemon behind its gate. The vhost-user protocol sets it up; kicks and deliveries go through the gate.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use ft_client::{
    ShimGate,
    gate::{Answer, Request},
};
use vhost::{
    VhostBackend, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use vmm_sys_util::eventfd::EventFd;

use super::{Port, TYPE_BLOCK, TYPE_NET, describe::Description};
use crate::{
    error::Error,
    machine::memory::Ram,
    platform::virtio_mmio::{QUEUE_SIZE_MAX, QueueSetup},
};

/// How long a daemon that is just starting may take to listen.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Legacy bits that mean nothing to a modern driver, and vhost's own.
const NOT_FOR_DRIVERS: u64 = 1 << 26 | 1 << 30;

/// The kind of device a daemon must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    device_type: u32,
    queues: usize,
    config_bytes: u32,
}

impl Kind {
    /// virtio-blk with one queue; configuration up to and including `write_zeroes_may_unmap`.
    pub const BLOCK: Self = Self {
        device_type: TYPE_BLOCK,
        queues: 1,
        config_bytes: 60,
    };
    /// virtio-net with one queue pair; configuration: MAC, status, pairs, MTU.
    pub const NET: Self = Self {
        device_type: TYPE_NET,
        queues: 2,
        config_bytes: 12,
    };
}

/// A device daemon.
pub struct GatedPort {
    gate: ShimGate,
    frontend: Frontend,
    description: Description,
    ram: Arc<Ram>,
    /// Handed over because starting a ring takes them; nobody rings them while there is a gate.
    unused_events: Vec<EventFd>,
}

fn connect(path: &Path, queues: usize) -> Result<Frontend, Error> {
    let deadline = Instant::now() + CONNECT_WITHIN;
    loop {
        match Frontend::connect(path, queues as u64) {
            Ok(frontend) => return Ok(frontend),
            // The daemon has joined, so it is about to listen.
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => {
                return Err(Error::environment(format!(
                    "cannot connect to the device daemon at {}: {error}. Check --blk and --net",
                    path.display()
                )));
            }
        }
    }
}

impl GatedPort {
    /// Connects to the daemon at `path`, whose gate is `gate`.
    ///
    /// # Errors
    /// Nobody listens there, or it is not a device of this kind.
    pub fn connect(path: &Path, kind: Kind, gate: ShimGate, ram: Arc<Ram>) -> Result<Self, Error> {
        let mut frontend = connect(path, kind.queues)?;
        let (features, config) = Self::negotiate(&mut frontend, kind).map_err(|error| {
            Error::environment(format!(
                "the device daemon at {} does not speak vhost-user as expected: {error}",
                path.display()
            ))
        })?;
        let description = Description {
            device_type: kind.device_type,
            features: features & !NOT_FOR_DRIVERS,
            config,
            queues: kind.queues,
        };
        Ok(Self {
            gate,
            frontend,
            description,
            ram,
            unused_events: Vec::new(),
        })
    }

    fn negotiate(frontend: &mut Frontend, kind: Kind) -> vhost::Result<(u64, Vec<u8>)> {
        frontend.set_owner()?;
        let features = frontend.get_features()?;
        let wanted =
            VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ;
        let protocol = frontend.get_protocol_features()? & wanted;
        frontend.set_protocol_features(protocol)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let empty = vec![0; kind.config_bytes as usize];
        let (_, config) = frontend.get_config(0, kind.config_bytes, VhostUserConfigFlags::empty(), &empty)?;
        Ok((features, config))
    }

    fn host_address(&self, guest_address: u64) -> u64 {
        self.ram.host_address().wrapping_add(guest_address)
    }

    fn start_queue(&mut self, index: usize, queue: &QueueSetup) -> vhost::Result<()> {
        self.frontend.set_vring_num(index, queue.size)?;
        let addresses = VringConfigData {
            queue_max_size: QUEUE_SIZE_MAX,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: self.host_address(queue.descriptors),
            used_ring_addr: self.host_address(queue.used),
            avail_ring_addr: self.host_address(queue.available),
            log_addr: None,
        };
        self.frontend.set_vring_addr(index, &addresses)?;
        self.frontend.set_vring_base(index, 0)?;
        let (call, kick) = (EventFd::new(0), EventFd::new(0));
        let (call, kick) = (
            call.map_err(vhost::Error::IOError)?,
            kick.map_err(vhost::Error::IOError)?,
        );
        self.frontend.set_vring_call(index, &call)?;
        self.frontend.set_vring_kick(index, &kick)?;
        self.unused_events.extend([call, kick]);
        self.frontend.set_vring_enable(index, true)
    }

    fn failed(&self, what: &str, error: &vhost::Error) -> Error {
        Error::environment(format!(
            "device '{}' refused to {what}: {error}. Its log says why",
            self.gate.device()
        ))
    }
}

impl Port for GatedPort {
    fn description(&self) -> &Description {
        &self.description
    }

    fn activate(&mut self, driver_features: u64, queues: &[QueueSetup]) -> Result<(), Error> {
        let features = driver_features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend
            .set_features(features)
            .map_err(|error| self.failed("accept the features", &error))?;
        self.frontend
            .set_mem_table(&[self.ram.vhost_region()])
            .map_err(|error| self.failed("map guest memory", &error))?;
        for (index, queue) in queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
            self.start_queue(index, queue)
                .map_err(|error| self.failed("start a queue", &error))?;
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        for index in 0..self.description.queues {
            self.frontend
                .get_vring_base(index)
                .map_err(|error| self.failed("stop a queue", &error))?;
        }
        self.unused_events.clear();
        Ok(())
    }

    fn call(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        Ok(self.gate.call(request)?)
    }

    fn inputs(&self) -> u64 {
        self.gate.inputs()
    }
}
