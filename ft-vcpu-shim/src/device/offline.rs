//! A device of an offline replay: the guest side in this process, and nothing behind it. What the guest asked for is
//! dropped, or told to whoever wants to know what it sent; what the world answered is in the log.

use std::{rc::Rc, sync::Arc};

use ft_client::gate::{Answer, Request};
use ft_protocol::Lsn;
use ft_vhost::guest_side::{
    self, GuestSide, Outcome, RingError,
    blk::{BlkGuestSide, Geometry},
    net::{Frame, NetGuestSide},
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::{Port, TYPE_BLOCK, TYPE_NET, describe::Description};
use crate::{error::Error, machine::memory::Ram, platform::virtio_mmio::QueueSetup};

/// Is told of each frame that the guest sends: the entry that marks it, the queue, the frame.
pub type OnFrame = Rc<dyn Fn(Lsn, u16, &[u8])>;

/// What the device is to the guest.
enum Side {
    Disk(Box<BlkGuestSide>),
    Net(Box<NetGuestSide>),
}

impl Side {
    fn guest(&mut self) -> &mut dyn GuestSide {
        match self {
            Self::Disk(disk) => &mut **disk,
            Self::Net(net) => &mut **net,
        }
    }
}

/// The device.
pub struct OfflinePort {
    side: Side,
    description: Description,
    ram: Arc<Ram>,
    on_frame: Option<OnFrame>,
    frames: Vec<Frame>,
}

impl OfflinePort {
    /// Builds the device that `description` describes. `on_frame` is told what its guest sends.
    ///
    /// # Errors
    /// A description of no device this release knows.
    pub fn new(description: Description, ram: Arc<Ram>, on_frame: Option<OnFrame>) -> Result<Self, Error> {
        let unknown = || {
            Error::environment(format!(
                "the journal has a device of type {} that this release cannot replay",
                description.device_type
            ))
        };
        let side = match description.device_type {
            TYPE_BLOCK => {
                let geometry = Geometry::described(description.features, &description.config);
                Side::Disk(Box::new(BlkGuestSide::new(geometry.ok_or_else(unknown)?)))
            }
            TYPE_NET => {
                let mac = description.config.get(..6).and_then(|bytes| bytes.try_into().ok());
                Side::Net(Box::new(NetGuestSide::new(mac.ok_or_else(unknown)?)))
            }
            _ => return Err(unknown()),
        };
        Ok(Self {
            side,
            description,
            ram,
            on_frame,
            frames: Vec::new(),
        })
    }

    fn failed(&self, error: &RingError) -> Error {
        Error::environment(format!(
            "the replayed device of type {} cannot go on: {error}",
            self.description.device_type
        ))
    }

    /// Tells what the kick at `marker` sent.
    fn tell(&mut self, marker: Lsn, queue: u16) {
        if let (Side::Net(net), Some(on_frame)) = (&mut self.side, &self.on_frame) {
            net.take_frames(&mut self.frames);
            for frame in self.frames.drain(..) {
                on_frame(marker, queue, frame.ethernet());
                net.recycle(frame);
            }
        }
    }

    fn answer(&mut self, outcome: Result<Outcome, RingError>) -> Result<Answer, Error> {
        let outcome = outcome.map_err(|error| self.failed(&error))?;
        self.side.guest().discard_outputs();
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
        self.side.guest().set_memory(self.ram.memory().clone());
        for (index, queue) in (0..).zip(queues).filter(|(_, queue)| queue.ready) {
            let setup = guest_side::QueueSetup {
                size: queue.size,
                descriptor_table: queue.descriptors,
                available_ring: queue.available,
                used_ring: queue.used,
                next_available: 0,
                event_idx: driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            };
            self.side
                .guest()
                .configure_queue(index, &setup)
                .map_err(|error| self.failed(&error))?;
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.side.guest().reset();
        Ok(())
    }

    fn call(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        match *request {
            Request::Kick { queue, marker, .. } => {
                let outcome = self.side.guest().kick(queue);
                self.tell(marker, queue);
                self.answer(outcome)
            }
            Request::DeliverLogged {
                sequence,
                queue,
                payload,
            } => {
                let outcome = self.side.guest().deliver(sequence, queue, payload);
                self.answer(outcome)
            }
            Request::Start { .. } | Request::Deliver { .. } | Request::GoLive { .. } => Ok(Answer::default()),
        }
    }

    fn inputs(&self) -> u64 {
        0
    }
}
