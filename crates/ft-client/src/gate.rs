//! The gate: kick and delivery as a handshake between shim and device daemon, with the vCPU stopped.
//!
//! ```text
//!    0 u32 request number (shim)         64 u32 answer number (device; futex)   68 u32 shim waits   72 u32 device sleeps
//!  128 u32 operation  132 u32 queue  136 u64 lsn or sequence  144 u32 payload length  148 u32 generation
//!  192 u32 status     196 u32 interrupt  200 u64 digest
//!  256 u64 inputs the device has logged, ever (device)
//! 4096 payload
//! ```
//! One request at a time: the shim writes it, bumps the request number and waits until the answer number equals it. Guest
//! memory is touched by the device only between the two.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::Duration,
};

use ft_protocol::{
    ids::{Generation, Lsn},
    limits::PAYLOAD_BYTES_MAX,
};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::{futex, region::Region, shm::SharedMemory};

const REQUEST: usize = 0;
const ANSWER: usize = 64;
const SHIM_WAITS: usize = 68;
const DEVICE_SLEEPS: usize = 72;
const OPERATION: usize = 128;
const QUEUE: usize = 132;
const NUMBER: usize = 136;
const LENGTH: usize = 144;
const GENERATION: usize = 148;
const STATUS: usize = 192;
const INTERRUPT: usize = 196;
const DIGEST: usize = 200;
const INPUTS: usize = 256;
const PAYLOAD: usize = 4096;
const BYTES: usize = PAYLOAD + PAYLOAD_BYTES_MAX;

/// How often a side looks for the answer before it sleeps; some microseconds.
const SPINS: u32 = 300;
/// How long the shim sleeps before it looks whether the replica is still whole.
const ALIVE_CHECK: Duration = Duration::from_millis(100);

/// What the shim asks of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// The vCPU is about to start. `live`: the device reaches the outside world (primary); else it only follows (backup).
    Start {
        /// Whether outputs and inputs are real.
        live: bool,
    },
    /// The guest notified `queue`; outputs drained here are marked by the entry at `marker`.
    Kick {
        /// Queue index.
        queue: u16,
        /// Marker of the outputs.
        marker: Lsn,
        /// Generation of the marker.
        generation: Generation,
    },
    /// Deliver this device's own inputs up to `through` from its bounce buffers.
    Deliver {
        /// Sequence number.
        through: u64,
    },
    /// Deliver an input from the log.
    DeliverLogged {
        /// Its sequence number.
        sequence: u64,
        /// The queue of the entry.
        queue: u16,
        /// Its payload.
        payload: &'a [u8],
    },
    /// The replay is over: reach the outside world from here on, with this generation. Issue again what has no completion;
    /// number further inputs after `inputs`.
    GoLive {
        /// Inputs delivered so far.
        inputs: u64,
        /// The generation this side won.
        generation: Generation,
    },
}

/// What the device says back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The guest is to be interrupted for this device's used ring.
    pub interrupt: bool,
    /// Digest of the outputs that were drained or of the inputs that were delivered: folded into the shim's rolling digest.
    pub digest: u64,
}

/// Why a handshake failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GateError {
    /// The device could not do it.
    #[error("device '{device}' refused to {operation}: its log says why")]
    Refused {
        /// Device name.
        device: String,
        /// The operation.
        operation: &'static str,
    },
    /// The replica ended while the shim was waiting.
    #[error("the replica ended while device '{device}' was asked to {operation}")]
    Ended {
        /// Device name.
        device: String,
        /// The operation.
        operation: &'static str,
    },
}

const OP_START_LIVE: u32 = 1;
const OP_START_FOLLOW: u32 = 2;
const OP_KICK: u32 = 3;
const OP_DELIVER: u32 = 4;
const OP_DELIVER_LOGGED: u32 = 5;
const OP_GO_LIVE: u32 = 6;

impl Request<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::Start { .. } => "start",
            Self::Kick { .. } => "take a kick",
            Self::Deliver { .. } | Self::DeliverLogged { .. } => "deliver",
            Self::GoLive { .. } => "go live",
        }
    }
}

/// Makes the memory of a gate.
///
/// # Errors
/// As [`SharedMemory::create`].
pub fn create() -> io::Result<SharedMemory> {
    SharedMemory::create("ft-gate", BYTES)
}

/// The shim's side.
#[derive(Debug)]
pub struct ShimGate {
    device: String,
    memory: SharedMemory,
    doorbell: EventFd,
    region: Arc<Region>,
    number: u32,
}

impl ShimGate {
    /// Takes the shim's side of the gate to `device`.
    ///
    /// # Errors
    /// A descriptor that is not a gate.
    pub fn new(device: String, fd: OwnedFd, doorbell: EventFd, region: Arc<Region>) -> io::Result<Self> {
        let memory = SharedMemory::open(fd, BYTES)?;
        let number = memory.word(REQUEST).load(Ordering::Relaxed);
        Ok(Self {
            device,
            memory,
            doorbell,
            region,
            number,
        })
    }

    /// The device's name.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Inputs the device has logged, ever: those beyond the delivered ones are ready.
    #[must_use]
    pub fn inputs(&self) -> u64 {
        self.memory.long(INPUTS).load(Ordering::Acquire)
    }

    /// Asks the device and waits for its answer.
    ///
    /// # Errors
    /// [`GateError`]; either means the end of this replica.
    ///
    /// # Panics
    /// If a payload is longer than [`PAYLOAD_BYTES_MAX`]; the frame codec keeps that.
    pub fn call(&mut self, request: &Request<'_>) -> Result<Answer, GateError> {
        self.write(request);
        self.number = self.number.wrapping_add(1);
        self.memory.word(REQUEST).store(self.number, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.memory.word(DEVICE_SLEEPS).load(Ordering::SeqCst) != 0 {
            // A doorbell that cannot be rung is full, and thus rung.
            let _ = self.doorbell.write(1);
        }
        self.wait(request.name())?;
        if self.memory.word(STATUS).load(Ordering::Acquire) != 0 {
            return Err(GateError::Refused {
                device: self.device.clone(),
                operation: request.name(),
            });
        }
        Ok(Answer {
            interrupt: self.memory.word(INTERRUPT).load(Ordering::Acquire) != 0,
            digest: self.memory.long(DIGEST).load(Ordering::Acquire),
        })
    }

    fn write(&self, request: &Request<'_>) {
        let memory = &self.memory;
        let (operation, queue, number, generation, payload): (u32, u16, u64, Generation, &[u8]) = match *request {
            Request::Start { live } => (
                if live { OP_START_LIVE } else { OP_START_FOLLOW },
                0,
                0,
                Generation(0),
                &[],
            ),
            Request::Kick {
                queue,
                marker,
                generation,
            } => (OP_KICK, queue, marker.0, generation, &[]),
            Request::Deliver { through } => (OP_DELIVER, 0, through, Generation(0), &[]),
            Request::DeliverLogged {
                sequence,
                queue,
                payload,
            } => (OP_DELIVER_LOGGED, queue, sequence, Generation(0), payload),
            Request::GoLive { inputs, generation } => (OP_GO_LIVE, 0, inputs, generation, &[]),
        };
        assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        memory.word(OPERATION).store(operation, Ordering::Relaxed);
        memory.word(QUEUE).store(u32::from(queue), Ordering::Relaxed);
        memory.long(NUMBER).store(number, Ordering::Relaxed);
        memory.word(GENERATION).store(generation.0, Ordering::Relaxed);
        memory.word(LENGTH).store(payload.len() as u32, Ordering::Relaxed);
        memory.write(PAYLOAD, payload);
    }

    fn wait(&self, operation: &'static str) -> Result<(), GateError> {
        let answer = self.memory.word(ANSWER);
        for _ in 0..SPINS {
            if answer.load(Ordering::Acquire) == self.number {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.memory.word(SHIM_WAITS).store(1, Ordering::SeqCst);
        loop {
            let seen = answer.load(Ordering::SeqCst);
            if seen == self.number {
                self.memory.word(SHIM_WAITS).store(0, Ordering::Relaxed);
                return Ok(());
            }
            if self.region.role() == ft_protocol::Role::Halted {
                return Err(GateError::Ended {
                    device: self.device.clone(),
                    operation,
                });
            }
            futex::wait(answer, seen, Some(ALIVE_CHECK));
        }
    }
}

/// The device's side.
#[derive(Debug)]
pub struct DeviceGate {
    memory: SharedMemory,
    doorbell: EventFd,
    region: Arc<Region>,
    answered: u32,
    payload: Vec<u8>,
}

impl DeviceGate {
    /// Takes the device's side of a gate.
    ///
    /// # Errors
    /// A descriptor that is not a gate.
    pub fn new(fd: OwnedFd, doorbell: EventFd, region: Arc<Region>) -> io::Result<Self> {
        let memory = SharedMemory::open(fd, BYTES)?;
        let answered = memory.word(ANSWER).load(Ordering::Relaxed);
        Ok(Self {
            memory,
            doorbell,
            region,
            answered,
            payload: Vec::new(),
        })
    }

    /// The eventfd that is rung for a request while this side [says it sleeps](Self::set_sleeping).
    #[must_use]
    pub fn doorbell(&self) -> RawFd {
        self.doorbell.as_raw_fd()
    }

    /// Takes back the rings of the doorbell so far; call it when the doorbell is readable, and look for a request afterwards.
    pub fn silence_doorbell(&self) {
        let _ = self.doorbell.read();
    }

    /// Says whether this side is about to sleep. After `true` look once more for a request before sleeping.
    pub fn set_sleeping(&self, sleeping: bool) {
        self.memory
            .word(DEVICE_SLEEPS)
            .store(u32::from(sleeping), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Whether a request waits for its answer.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.memory.word(REQUEST).load(Ordering::Acquire) != self.answered
    }

    /// The request that waits, if any. Answer it with [`DeviceGate::answer`] or [`DeviceGate::refuse`]. An operation this release
    /// does not know is refused.
    pub fn take_request(&mut self) -> Option<Request<'_>> {
        if !self.is_pending() {
            return None;
        }
        let memory = &self.memory;
        let queue = memory.word(QUEUE).load(Ordering::Relaxed) as u16;
        let number = memory.long(NUMBER).load(Ordering::Relaxed);
        let generation = Generation(memory.word(GENERATION).load(Ordering::Relaxed));
        Some(match memory.word(OPERATION).load(Ordering::Relaxed) {
            OP_START_LIVE => Request::Start { live: true },
            OP_START_FOLLOW => Request::Start { live: false },
            OP_KICK => Request::Kick {
                queue,
                marker: Lsn(number),
                generation,
            },
            OP_DELIVER => Request::Deliver { through: number },
            OP_DELIVER_LOGGED => {
                let length = (memory.word(LENGTH).load(Ordering::Relaxed) as usize).min(PAYLOAD_BYTES_MAX);
                self.payload.resize(length, 0);
                memory.read(PAYLOAD, &mut self.payload);
                Request::DeliverLogged {
                    sequence: number,
                    queue,
                    payload: &self.payload,
                }
            }
            OP_GO_LIVE => Request::GoLive {
                inputs: number,
                generation,
            },
            _ => {
                self.refuse();
                return None;
            }
        })
    }

    /// Answers the pending request.
    pub fn answer(&mut self, answer: Answer) {
        self.finish(0, answer);
    }

    /// Refuses the pending request: the shim ends the replica. Say why in the log first.
    pub fn refuse(&mut self) {
        self.finish(1, Answer::default());
    }

    fn finish(&mut self, status: u32, answer: Answer) {
        let memory = &self.memory;
        memory.word(STATUS).store(status, Ordering::Relaxed);
        memory
            .word(INTERRUPT)
            .store(u32::from(answer.interrupt), Ordering::Relaxed);
        memory.long(DIGEST).store(answer.digest, Ordering::Relaxed);
        self.answered = memory.word(REQUEST).load(Ordering::Acquire);
        memory.word(ANSWER).store(self.answered, Ordering::SeqCst);
        if memory.word(SHIM_WAITS).load(Ordering::SeqCst) != 0 {
            futex::wake(memory.word(ANSWER));
        }
    }

    /// Tells the shim that `inputs` inputs are logged, ever, and can be delivered at its next stop point.
    pub fn set_inputs(&self, inputs: u64) {
        self.memory.long(INPUTS).store(inputs, Ordering::Release);
        self.region.wake_shim();
    }

    /// Descriptor of the gate's memory.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_arrive_as_asked_and_answers_come_back() {
        let region = Arc::new(Region::create().unwrap());
        let memory = create().unwrap();
        let doorbell = EventFd::new(0).unwrap();
        let bell = doorbell.try_clone().unwrap();
        let fd = memory.fd().try_clone_to_owned().unwrap();
        let mut device = DeviceGate::new(fd.try_clone().unwrap(), bell, Arc::clone(&region)).unwrap();
        let mut shim = ShimGate::new("blk0".into(), fd, doorbell, region).unwrap();
        let asked = [
            Request::Start { live: true },
            Request::Kick {
                queue: 3,
                marker: Lsn(9),
                generation: Generation(2),
            },
            Request::Deliver { through: 4 },
            Request::DeliverLogged {
                sequence: 5,
                queue: 1,
                payload: b"frame",
            },
            Request::GoLive {
                inputs: 5,
                generation: Generation(3),
            },
        ];
        let daemon = std::thread::spawn(move || {
            for (index, expected) in asked.iter().enumerate() {
                device.set_sleeping(true);
                while !device.is_pending() {
                    std::thread::yield_now();
                }
                device.set_sleeping(false);
                assert_eq!(device.take_request().as_ref(), Some(expected));
                device.answer(Answer {
                    interrupt: index % 2 == 0,
                    digest: index as u64,
                });
            }
            while !device.is_pending() {
                std::thread::yield_now();
            }
            device.refuse();
            device.set_inputs(7);
        });
        for (index, request) in asked.iter().enumerate() {
            let answer = shim.call(request).unwrap();
            assert_eq!(
                answer,
                Answer {
                    interrupt: index % 2 == 0,
                    digest: index as u64
                }
            );
        }
        assert!(matches!(
            shim.call(&Request::Deliver { through: 1 }),
            Err(GateError::Refused { .. })
        ));
        daemon.join().unwrap();
        assert_eq!(shim.inputs(), 7);
    }

    #[test]
    fn a_dead_device_does_not_hold_the_shim_once_the_replica_is_halted() {
        let region = Arc::new(Region::create().unwrap());
        let memory = create().unwrap();
        let fd = memory.fd().try_clone_to_owned().unwrap();
        let mut shim = ShimGate::new("blk0".into(), fd, EventFd::new(0).unwrap(), Arc::clone(&region)).unwrap();
        region.publish(ft_protocol::Role::Halted, Generation(1), Lsn(0));
        assert!(matches!(
            shim.call(&Request::Deliver { through: 1 }),
            Err(GateError::Ended { .. })
        ));
    }
}
