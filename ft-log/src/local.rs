//! What the local processes of a VM share with this daemon, and who of them has joined.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use ft_client::{Counters, gate, handshake::Reply, region::Region, ring, shm::SharedMemory};
use ft_protocol::ids::DeviceId;
use nix::sys::eventfd::{EfdFlags, EventFd};
use sha2::{Digest, Sha256};

use crate::merge::Merger;

/// A client's place: its ring, and whether it is taken.
#[derive(Debug)]
struct Seat {
    name: String,
    ring: OwnedFd,
    fingerprint: Option<String>,
    shape: Option<String>,
}

/// What only a device has.
#[derive(Debug)]
struct DeviceParts {
    gate: SharedMemory,
    doorbell: EventFd,
    commit: EventFd,
    counters: Counters,
}

/// The local side of one VM. Seats are numbered as the devices are; the shim's comes last.
#[derive(Debug)]
pub struct Local {
    /// The shared region.
    pub region: Region,
    /// The producers' rings.
    pub merger: Merger,
    /// Entries for the shim to replay; on a live side what its new backup says.
    pub replay: ring::Producer,
    doorbell: EventFd,
    seats: Vec<Seat>,
    devices: Vec<DeviceParts>,
    is_answered: bool,
}

fn seat(name: &str) -> io::Result<(Seat, ring::Consumer)> {
    let memory = ring::create("ft-log-ring")?;
    let seat = Seat {
        name: name.into(),
        ring: memory.fd().try_clone_to_owned()?,
        fingerprint: None,
        shape: None,
    };
    Ok((seat, ring::Consumer::on(memory)))
}

fn event(flags: EfdFlags) -> io::Result<EventFd> {
    Ok(EventFd::from_value_and_flags(0, flags | EfdFlags::EFD_CLOEXEC)?)
}

impl Local {
    /// Makes everything that a VM with these devices shares.
    ///
    /// # Errors
    /// When the kernel has no memory or descriptors for it.
    pub fn new(devices: &[String]) -> io::Result<Self> {
        let names = devices.iter().map(String::as_str).chain(["shim"]);
        let (seats, rings) = names.map(seat).collect::<io::Result<(Vec<_>, Vec<_>)>>()?;
        let parts = |_| {
            Ok(DeviceParts {
                gate: gate::create()?,
                doorbell: event(EfdFlags::EFD_NONBLOCK)?,
                commit: event(EfdFlags::EFD_NONBLOCK)?,
                counters: Counters::create()?,
            })
        };
        Ok(Self {
            region: Region::create()?,
            merger: Merger::new(rings),
            replay: ring::Producer::on(ring::create("ft-log-replay")?),
            doorbell: event(EfdFlags::empty())?,
            seats,
            devices: devices.iter().map(parts).collect::<io::Result<_>>()?,
            is_answered: false,
        })
    }

    /// The descriptor that the doorbell is read from.
    ///
    /// # Errors
    /// As dup(2).
    pub fn doorbell(&self) -> io::Result<OwnedFd> {
        self.doorbell.as_fd().try_clone_to_owned()
    }

    /// The shim's seat.
    #[must_use]
    pub fn shim(&self) -> usize {
        self.devices.len()
    }

    /// The seat of a device, by name.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<usize> {
        self.seats[..self.shim()].iter().position(|seat| seat.name == name)
    }

    /// Who has a seat.
    #[must_use]
    pub fn name(&self, seat: usize) -> &str {
        &self.seats[seat].name
    }

    /// Gives a seat to a client; `false` if it is taken.
    pub fn occupy(&mut self, seat: usize, fingerprint: String, shape: Option<String>) -> bool {
        let seat = &mut self.seats[seat];
        if seat.fingerprint.is_some() {
            return false;
        }
        (seat.fingerprint, seat.shape) = (Some(fingerprint), shape);
        true
    }

    /// Whether the shim has its answer.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.is_answered
    }

    /// The shim has its answer.
    pub fn set_answered(&mut self) {
        self.is_answered = true;
    }

    /// Where each device counts, with its name.
    #[must_use]
    pub fn counters(&self) -> Vec<(String, Counters)> {
        let devices = self.seats.iter().zip(&self.devices);
        devices
            .map(|(seat, parts)| (seat.name.clone(), parts.counters.clone()))
            .collect()
    }

    /// Names of those who have not joined yet.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        let empty = self.seats.iter().filter(|seat| seat.fingerprint.is_none());
        empty.map(|seat| seat.name.as_str())
    }

    /// Digest of what the VM consists of: the clients' fingerprints in the order of the seats. Equal on both hosts, or the
    /// pair is refused.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        self.digest(|seat| seat.fingerprint.as_deref().unwrap_or_default())
    }

    /// The same without the state of the devices, which a new backup gets from the live side; `None` where that cannot be.
    #[must_use]
    pub fn shape(&self) -> Option<[u8; 32]> {
        let has_shape = |seat: &Seat| seat.shape.is_some();
        let can_be = self.seats.iter().all(has_shape);
        can_be.then(|| self.digest(|seat| seat.shape.as_deref().unwrap_or_default()))
    }

    fn digest(&self, of: impl Fn(&Seat) -> &str) -> [u8; 32] {
        let mut digest = Sha256::new();
        for seat in &self.seats {
            for part in [seat.name.as_str(), of(seat)] {
                digest.update((part.len() as u64).to_le_bytes());
                digest.update(part);
            }
        }
        digest.finalize().into()
    }

    /// The welcome of a seat and the descriptors that go with it, in the order of `ft_client::handshake`.
    #[must_use]
    pub fn welcome(&self, seat: usize) -> (Reply, Vec<BorrowedFd<'_>>) {
        let is_shim = seat == self.shim();
        let names = self.seats[..self.shim()].iter().map(|seat| seat.name.clone());
        let reply = Reply::Welcome {
            device: if is_shim { DeviceId::SHIM.0 } else { seat as u8 },
            devices: names.collect(),
        };
        let mut descriptors = vec![self.region.fd(), self.seats[seat].ring.as_fd(), self.doorbell.as_fd()];
        if is_shim {
            descriptors.push(self.replay.fd());
            let gates = self
                .devices
                .iter()
                .map(|device| [device.gate.fd(), device.doorbell.as_fd()]);
            descriptors.extend(gates.flatten());
        } else {
            let device = &self.devices[seat];
            descriptors.extend([device.gate.fd(), device.doorbell.as_fd(), device.commit.as_fd()]);
            descriptors.extend(device.counters.fd());
        }
        (reply, descriptors)
    }

    /// Rings a device's commit event. An eventfd write does not block; a full one is rung already.
    pub fn ring_commit(&self, device: DeviceId) {
        if let Some(device) = self.devices.get(usize::from(device.0)) {
            let _ = device.commit.write(1);
        }
    }

    /// Rings every device: the role changed.
    pub fn ring_all(&self) {
        (0..self.devices.len()).for_each(|device| self.ring_commit(DeviceId(device as u8)));
    }
}
