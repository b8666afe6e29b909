//! A device of an offline replay: the guest side in this process, and nothing behind it. What the guest asked for is
//! dropped; what the world answered is in the log.

use std::sync::Arc;

use ft_client::gate::{Answer, Request};
use ft_vhost::guest_side::{
    self, GuestSide, Outcome, RingError,
    blk::{BlkGuestSide, Geometry},
    net::NetGuestSide,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::{Port, TYPE_BLOCK, TYPE_NET, describe::Description};
use crate::{error::Error, machine::memory::Ram, platform::virtio_mmio::QueueSetup};

/// The device.
pub struct OfflinePort {
    guest_side: Box<dyn GuestSide>,
    description: Description,
    ram: Arc<Ram>,
}

impl OfflinePort {
    /// Builds the device that `description` describes.
    ///
    /// # Errors
    /// A description of no device this release knows.
    pub fn new(description: Description, ram: Arc<Ram>) -> Result<Self, Error> {
        let unknown = || {
            Error::environment(format!(
                "the journal has a device of type {} that this release cannot replay",
                description.device_type
            ))
        };
        let guest_side: Box<dyn GuestSide> = match description.device_type {
            TYPE_BLOCK => {
                let geometry = Geometry::described(description.features, &description.config);
                Box::new(BlkGuestSide::new(geometry.ok_or_else(unknown)?))
            }
            TYPE_NET => {
                let mac = description.config.get(..6).and_then(|bytes| bytes.try_into().ok());
                Box::new(NetGuestSide::new(mac.ok_or_else(unknown)?))
            }
            _ => return Err(unknown()),
        };
        Ok(Self {
            guest_side,
            description,
            ram,
        })
    }

    fn failed(&self, error: &RingError) -> Error {
        Error::environment(format!(
            "the replayed device of type {} cannot go on: {error}",
            self.description.device_type
        ))
    }

    fn answer(&mut self, outcome: Result<Outcome, RingError>) -> Result<Answer, Error> {
        let outcome = outcome.map_err(|error| self.failed(&error))?;
        self.guest_side.discard_outputs();
        Ok(Answer {
            interrupt: outcome.interrupt,
            digest: outcome.digest,
        })
    }
}

impl Port for OfflinePort {
    fn description(&self) -> &Description {
        &self.description
    }

    fn activate(&mut self, driver_features: u64, queues: &[QueueSetup]) -> Result<(), Error> {
        self.guest_side.set_memory(self.ram.memory().clone());
        for (index, queue) in (0..).zip(queues).filter(|(_, queue)| queue.ready) {
            let setup = guest_side::QueueSetup {
                size: queue.size,
                descriptor_table: queue.descriptors,
                available_ring: queue.available,
                used_ring: queue.used,
                next_available: 0,
                event_idx: driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            };
            self.guest_side
                .configure_queue(index, &setup)
                .map_err(|error| self.failed(&error))?;
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.guest_side.reset();
        Ok(())
    }

    fn call(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        match *request {
            Request::Kick { queue, .. } => {
                let outcome = self.guest_side.kick(queue);
                self.answer(outcome)
            }
            Request::DeliverLogged {
                sequence,
                queue,
                payload,
            } => {
                let outcome = self.guest_side.deliver(sequence, queue, payload);
                self.answer(outcome)
            }
            Request::Start { .. } | Request::Deliver { .. } | Request::GoLive { .. } => Ok(Answer::default()),
        }
    }

    fn inputs(&self) -> u64 {
        0
    }
}
