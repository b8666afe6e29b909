//! Joining a VM: one JSON line each way on a unix socket, the descriptors with the answer.
//!
//! ```text
//! client ► {"version":1,"vm":"ledger","client":{"device":"blk0"},"fingerprint":"..."}
//!            engine `device`, besides: "shape":"...", what a new backup must have in common
//! ft-log ◄ {"welcome":{"device":0,"devices":["blk0","net0"]}}   + region, ring, doorbell, then
//!            for a device: gate, gate doorbell, commit event, counters
//!            for the shim: replay ring, then gate and gate doorbell of each device
//! ft-log ◄ {"refused":"..."}
//! client ► {"failed":"..."} at any later time: this replica is over
//! ```
//! Without a shim (engine `device`) the VM's disk takes both seats; its network cards take their own only.
//! The socket stays open: its end is the end of the replica, for both sides.

use std::{
    io::{self, IoSlice, IoSliceMut, Write},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

use ft_protocol::{frame::VERSION, ids::DeviceId, limits::DEVICES_MAX};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    counters::Counters,
    gate::{DeviceGate, ShimGate},
    log::LogWriter,
    region::Region,
    ring::{Consumer, Producer},
};

/// Longest line of the handshake, so that a hostile client cannot make ft-log buffer more.
pub const LINE_BYTES_MAX: usize = 4096;
/// Most descriptors that come with a welcome.
const DESCRIPTORS_MAX: usize = 4 + 2 * DEVICES_MAX;

/// Who is joining.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Client {
    /// The vCPU shim.
    Shim,
    /// A device daemon, by name.
    Device(String),
}

/// A client's first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// [`VERSION`] of the client.
    pub version: u32,
    /// The VM it belongs to.
    pub vm: String,
    /// Who it is.
    pub client: Client,
    /// Hex digest of what it would run; must be equal on both hosts.
    pub fingerprint: String,
    /// The same without its state, where that can be brought up from the other host's (engine `device`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<String>,
}

/// ft-log's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Come in.
    Welcome {
        /// The client's device number; 255 for the shim.
        device: u8,
        /// All devices of the VM, in the order of their numbers.
        devices: Vec<String>,
    },
    /// Stay out.
    Refused(String),
}

/// A client's last line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The client cannot go on: the replica is over.
    Failed(String),
}

/// Why joining failed.
#[derive(Debug, Error)]
pub enum JoinError {
    /// Nobody listens there.
    #[error("cannot reach ft-log at {path}: {source}. Start ft-log first, or check --ft-log")]
    Connect {
        /// Socket path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// ft-log said no.
    #[error("ft-log refused: {0}")]
    Refused(String),
    /// Without a shim nobody puts the entries of several disks in place.
    #[error(
        "the VM has {disks} disks, and engine 'device' is for one: give ft-log --devices with this one and those that begin with net"
    )]
    Engine {
        /// Devices of the VM that are no network cards.
        disks: usize,
    },
    /// The conversation broke.
    #[error("the handshake with ft-log failed: {0}")]
    Io(#[from] io::Error),
}

/// What every client gets.
#[derive(Debug)]
struct Joined {
    stream: UnixStream,
    region: Arc<Region>,
    log: LogWriter,
    device: DeviceId,
    devices: Vec<String>,
    rest: std::vec::IntoIter<OwnedFd>,
}

/// A device daemon that has joined.
#[derive(Debug)]
pub struct DeviceSession {
    /// Stays open; its end is the end of the replica.
    pub stream: UnixStream,
    /// The VM's region.
    pub region: Arc<Region>,
    /// The way into the log.
    pub log: LogWriter,
    /// The way to the shim.
    pub gate: DeviceGate,
    /// Rung when what [`Region::want_commit`] asked for is committed, and on every change of role.
    pub commit_event: EventFd,
    /// Where ft-log shows what this device counts.
    pub counters: Counters,
    /// This device's number.
    pub device: DeviceId,
}

impl DeviceSession {
    /// Sleeps until the commit event is rung, and takes it, or until `timeout` passes.
    ///
    /// # Errors
    /// As poll(2).
    pub fn sleep_commit(&self, timeout: Duration) -> io::Result<()> {
        // SAFETY: the descriptor is open as long as `self` is borrowed.
        let event = unsafe { BorrowedFd::borrow_raw(self.commit_event.as_raw_fd()) };
        let milliseconds = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(event, PollFlags::POLLIN)], milliseconds)?;
        // Not rung: the time is over.
        let _ = self.commit_event.read();
        Ok(())
    }
}

/// The shim, joined.
#[derive(Debug)]
pub struct ShimSession {
    /// Stays open; its end is the end of the replica.
    pub stream: UnixStream,
    /// The VM's region.
    pub region: Arc<Region>,
    /// The way into the log.
    pub log: LogWriter,
    /// Entries to replay.
    pub replay: Consumer,
    /// Gates in the order of the device numbers.
    pub gates: Vec<ShimGate>,
}

/// Lower-case hex of `bytes`.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn join(path: &Path, join: &Join) -> Result<Joined, JoinError> {
    let mut stream = UnixStream::connect(path).map_err(|source| JoinError::Connect {
        path: path.display().to_string(),
        source,
    })?;
    write_line(&mut stream, join)?;
    let (line, descriptors) = receive_line(&stream)?;
    let (device, devices) = match serde_json::from_str(&line).map_err(io::Error::other)? {
        Reply::Refused(reason) => return Err(JoinError::Refused(reason)),
        Reply::Welcome { device, devices } => (DeviceId(device), devices),
    };
    let mut rest = descriptors.into_iter();
    let region = Arc::new(Region::open(take(&mut rest)?)?);
    let ring = Producer::new(take(&mut rest)?)?;
    let log = LogWriter::new(ring, event(take(&mut rest)?), Arc::clone(&region));
    Ok(Joined {
        stream,
        region,
        log,
        device,
        devices,
        rest,
    })
}

/// Joins as a device daemon.
///
/// # Errors
/// [`JoinError`].
pub fn join_device(path: &Path, vm: &str, device: &str, fingerprint: &[u8; 32]) -> Result<DeviceSession, JoinError> {
    join_device_as(path, vm, device, fingerprint, None)
}

fn join_device_as(
    path: &Path,
    vm: &str,
    device: &str,
    fingerprint: &[u8; 32],
    shape: Option<[u8; 32]>,
) -> Result<DeviceSession, JoinError> {
    let request = Join {
        version: VERSION,
        vm: vm.into(),
        client: Client::Device(device.into()),
        fingerprint: hex(fingerprint),
        shape: shape.map(|shape| hex(&shape)),
    };
    let mut joined = join(path, &request)?;
    let (gate, doorbell) = (take(&mut joined.rest)?, event(take(&mut joined.rest)?));
    Ok(DeviceSession {
        gate: DeviceGate::new(gate, doorbell, Arc::clone(&joined.region))?,
        commit_event: event(take(&mut joined.rest)?),
        counters: Counters::open(take(&mut joined.rest)?)?,
        stream: joined.stream,
        region: joined.region,
        log: joined.log,
        device: joined.device,
    })
}

/// Joins as the shim. ft-log answers once all devices have joined.
///
/// # Errors
/// [`JoinError`].
pub fn join_shim(path: &Path, vm: &str, fingerprint: &[u8; 32]) -> Result<ShimSession, JoinError> {
    join_shim_as(path, vm, fingerprint, None)
}

fn join_shim_as(
    path: &Path,
    vm: &str,
    fingerprint: &[u8; 32],
    shape: Option<[u8; 32]>,
) -> Result<ShimSession, JoinError> {
    let request = Join {
        version: VERSION,
        vm: vm.into(),
        client: Client::Shim,
        fingerprint: hex(fingerprint),
        shape: shape.map(|shape| hex(&shape)),
    };
    let mut joined = join(path, &request)?;
    let replay = Consumer::new(take(&mut joined.rest)?)?;
    let mut gates = Vec::with_capacity(joined.devices.len());
    for name in joined.devices {
        let (gate, doorbell) = (take(&mut joined.rest)?, event(take(&mut joined.rest)?));
        gates.push(ShimGate::new(name, gate, doorbell, Arc::clone(&joined.region))?);
    }
    Ok(ShimSession {
        stream: joined.stream,
        region: joined.region,
        log: joined.log,
        replay,
        gates,
    })
}

/// What the seat of the shim is taken with where there is none: no shim has it, so the two engines never pair.
const ENGINE_FINGERPRINT: [u8; 32] = *b"device engine: no shim, version1";

/// A device daemon that is all there is of its VM beside ft-log: engine `device`.
#[derive(Debug)]
pub struct EngineSession {
    /// The device's seat.
    pub device: DeviceSession,
    /// The shim's seat.
    pub shim: ShimSession,
}

/// Joins as the disk of a VM without a shim: takes the device's seat, and then the shim's, once all others have joined. `shape` is its
/// fingerprint without what is stored in it, if that can be brought up from the other host's.
///
/// # Errors
/// [`JoinError`]; a VM of several disks is refused.
pub fn join_engine(
    path: &Path,
    vm: &str,
    device: &str,
    fingerprint: &[u8; 32],
    shape: Option<[u8; 32]>,
) -> Result<EngineSession, JoinError> {
    let device = join_device_as(path, vm, device, fingerprint, shape)?;
    let shim = join_shim_as(path, vm, &ENGINE_FINGERPRINT, shape.map(|_| ENGINE_FINGERPRINT))?;
    match shim
        .gates
        .iter()
        .filter(|gate| !gate.device().starts_with("net"))
        .count()
    {
        1 => Ok(EngineSession { device, shim }),
        disks => Err(JoinError::Engine { disks }),
    }
}

/// Says that this replica is over, and why; best effort, since the end of the socket says it too.
pub fn report_failure(stream: &mut UnixStream, reason: &str) {
    let _ = write_line(stream, &Report::Failed(reason.chars().take(1000).collect()));
}

/// Writes one JSON line.
///
/// # Errors
/// As [`Write::write_all`].
pub fn write_line(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_string(message).map_err(io::Error::other)?;
    line.push('\n');
    stream.write_all(line.as_bytes())
}

/// Sends one JSON line with descriptors (ft-log's side).
///
/// # Errors
/// As sendmsg(2); a line that was sent in part counts as an error.
pub fn send_reply(socket: BorrowedFd<'_>, reply: &Reply, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut line = serde_json::to_string(reply).map_err(io::Error::other)?;
    line.push('\n');
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(line.as_bytes())],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent != line.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}

fn receive_line(stream: &UnixStream) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut line = Vec::new();
    let mut descriptors = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut buffer = [0; LINE_BYTES_MAX];
        let mut control = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<()>(
            stream.as_raw_fd(),
            &mut iov,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = part {
                // SAFETY: the kernel just installed these descriptors for us; nobody else owns them.
                descriptors.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let bytes = message.bytes;
        if bytes == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "ft-log closed the connection",
            ));
        }
        line.extend_from_slice(&buffer[..bytes]);
        if line.len() > LINE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the line is too long"));
        }
    }
    String::from_utf8(line)
        .map(|line| (line, descriptors))
        .map_err(io::Error::other)
}

fn take(descriptors: &mut impl Iterator<Item = OwnedFd>) -> io::Result<OwnedFd> {
    descriptors.next().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "ft-log sent too few descriptors: both sides must be of one release",
        )
    })
}

fn event(fd: OwnedFd) -> EventFd {
    use std::os::fd::IntoRawFd;
    // SAFETY: ownership of the descriptor moves into the EventFd.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}
