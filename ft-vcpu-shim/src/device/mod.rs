//! The devices as the vCPU side sees them: one port each.

pub mod describe;
pub mod gated;
pub mod offline;

use ft_client::gate::{Answer, Request};

use crate::{error::Error, platform::virtio_mmio::QueueSetup};

/// virtio device type of a block device.
pub const TYPE_BLOCK: u32 = 2;
/// virtio device type of a network device.
pub const TYPE_NET: u32 = 1;

/// A virtio device behind its transport. It touches guest memory only inside [`Port::call`].
pub trait Port {
    /// What the transport shows of it.
    fn description(&self) -> &describe::Description;

    /// The driver is ready.
    ///
    /// # Errors
    /// The device refused the setup, or its daemon is gone.
    fn activate(&mut self, driver_features: u64, queues: &[QueueSetup]) -> Result<(), Error>;

    /// The driver reset the device.
    ///
    /// # Errors
    /// See [`Port::activate`].
    fn reset(&mut self) -> Result<(), Error>;

    /// One gate request.
    ///
    /// # Errors
    /// The device refused, or the replica ended.
    fn call(&mut self, request: &Request<'_>) -> Result<Answer, Error>;

    /// Whether what the guest puts into `queue` leaves this machine. What goes to a replicated disk does not: each host has its own.
    fn marks_output(&self, queue: u16) -> bool {
        self.description().device_type == TYPE_NET && queue % 2 == 1
    }

    /// Inputs the device has logged, ever.
    fn inputs(&self) -> u64;
}
