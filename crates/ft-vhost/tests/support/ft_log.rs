//! An ft-log that does what the test says: welcomes one device, commits when told, and keeps the device's entries.

use std::{
    io::{BufRead, BufReader},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use ft_client::{
    Counters, Region, ShimGate, gate,
    handshake::{Join, Reply, send_reply},
    ring::{self, Consumer},
    shm::SharedMemory,
};
use ft_protocol::{
    Committed, DeviceId, Generation, Lsn, Role,
    entry::{Body, Entry},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::frontend::PATIENCE;

/// Where a device joins.
pub struct FtLog {
    listener: UnixListener,
    pub path: PathBuf,
}

/// A device that has joined, from the side of ft-log and of the shim.
pub struct Joined {
    pub join: Join,
    pub stream: UnixStream,
    pub region: Arc<Region>,
    pub shim: ShimGate,
    /// What the device counts.
    pub counters: Counters,
    entries: Consumer,
    _log_bell: EventFd,
    commit_event: EventFd,
    _ring: SharedMemory,
}

impl FtLog {
    pub fn listen(path: &Path) -> Self {
        Self {
            listener: UnixListener::bind(path).unwrap(),
            path: path.into(),
        }
    }

    /// Welcomes the next device as number `device`, in `role`.
    pub fn welcome(&self, device: u8, role: Role) -> Joined {
        let (stream, _) = self.listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        let join: Join = serde_json::from_str(&line).unwrap();
        let region = Arc::new(Region::create().unwrap());
        region.publish(role, Generation(1), Lsn(0));
        let ring = ring::create("test-ring").unwrap();
        let gate = gate::create().unwrap();
        let counters = Counters::create().unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let (log_bell, doorbell, commit_event) = (event(), event(), event());
        let reply = Reply::Welcome {
            device,
            devices: vec!["blk0".into(), "net0".into()],
        };
        fn borrow(event: &EventFd) -> BorrowedFd<'_> {
            use std::os::fd::AsRawFd;
            // SAFETY: the descriptor is open as long as the reference.
            unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
        }
        let descriptors = [
            region.fd(),
            ring.fd(),
            borrow(&log_bell),
            gate.fd(),
            borrow(&doorbell),
            borrow(&commit_event),
            counters.fd().unwrap(),
        ];
        send_reply(stream.as_fd(), &reply, &descriptors).unwrap();
        let gate_fd = gate.fd().try_clone_to_owned().unwrap();
        let shim = ShimGate::new(join.vm.clone(), gate_fd, doorbell, Arc::clone(&region)).unwrap();
        let entries = Consumer::new(ring.fd().try_clone_to_owned().unwrap()).unwrap();
        entries.set_sleeping(true);
        Joined {
            join,
            stream,
            region,
            shim,
            counters,
            entries,
            _log_bell: log_bell,
            commit_event,
            _ring: ring,
        }
    }
}

impl Joined {
    /// Commits up to `lsn`, as ft-log does on an acknowledgement.
    pub fn commit(&self, lsn: u64) {
        if self.region.commit(Committed::through(Lsn(lsn))).count() != 0 {
            self.commit_event.write(1).unwrap();
        }
    }

    /// The disk of the same VM has logged everything up to `lsn`.
    pub fn log_through(&self, lsn: u64) {
        self.region.restart_log(Lsn(lsn + 1));
    }

    /// The next entry that the device has logged by now: its LSN, queue and kind.
    pub fn take_entry(&mut self) -> Option<(u64, u16, &'static str)> {
        let mut bytes = Vec::new();
        self.entries.pop(&mut bytes).unwrap()?;
        let entry = Entry::decode(&bytes).unwrap();
        Some((entry.lsn.0, entry.queue, entry.body.name()))
    }

    /// Publishes a role and rings the device, as ft-log does.
    pub fn publish(&self, role: Role) {
        self.region.publish(role, Generation(1), Lsn(0));
        self.commit_event.write(1).unwrap();
    }

    /// The next input the device logs: LSN, sequence, payload. Nobody has to be woken for an input but the shim.
    pub fn next_input(&mut self) -> (u64, u64, Vec<u8>) {
        let start = Instant::now();
        let mut bytes = Vec::new();
        loop {
            let ticket = self.region.shim_ticket();
            if self.entries.pop(&mut bytes).unwrap().is_some() {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "the device logs nothing");
            self.region.sleep_shim(ticket, Some(PATIENCE));
        }
        let entry = Entry::decode(&bytes).unwrap();
        let Body::Input { sequence, payload } = entry.body else {
            panic!("a device logs inputs only: {entry:?}")
        };
        (entry.lsn.0, sequence, payload.to_vec())
    }

    /// Waits until the device has said that `inputs` inputs are ready.
    pub fn wait_inputs(&self, inputs: u64) {
        let start = Instant::now();
        loop {
            let ticket = self.region.shim_ticket();
            if self.shim.inputs() >= inputs {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "input {inputs} never became ready");
            self.region.sleep_shim(ticket, Some(PATIENCE));
        }
    }

    /// The device's number, as the log knows it.
    pub fn device(&self) -> DeviceId {
        DeviceId(0)
    }
}
