//! Two bare `ft-log`s, one a host, and the VMs they protect, of which nothing is there but their logs.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ft_client::handshake::{DeviceSession, ShimSession, join_device, join_shim};
use ft_client::log::Urgency;
use ft_protocol::entry::{Body, Entry};
use ft_protocol::{Lsn, Role};

use super::identity::Identities;
use super::peer::Wire;

/// Nothing here waits longer.
const PATIENCE: Duration = Duration::from_secs(60);
const DEVICE: &str = "dev0";
const FINGERPRINT: [u8; 32] = [7; 32];
/// Payload of a commit and of an echo.
pub(super) const LATENCY_BYTES: usize = 128;
/// Of a frame, these are not the payload of an input.
const INPUT_HEADER_BYTES: usize = 32;

/// The daemons of both hosts and what joined them.
pub(super) struct Pair {
    pub(super) vms: Vec<Vm>,
    daemons: [Child; 2],
}

/// One VM's clients on both hosts.
pub(super) struct Vm {
    device: DeviceSession,
    _others: (ShimSession, DeviceSession),
    replayer: Option<JoinHandle<()>>,
    is_over: Arc<AtomicBool>,
    sequence: u64,
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(replayer) = self.replayer.take() {
            let _ = replayer.join();
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Tries until it works: the daemons are coming up.
fn patiently<T, E: std::fmt::Display>(attempt: impl Fn() -> Result<T, E>) -> io::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() >= deadline => return Err(io::Error::other(error.to_string())),
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The name of the VM of that number.
fn name(vm: usize) -> String {
    format!("bench{vm}")
}

fn socket(place: &Path, side: usize, vm: usize) -> PathBuf {
    place.join(format!("{side}.{vm}.sock"))
}

/// The configuration of one side, with a table for each VM.
fn configuration(place: &Path, wire: &Wire<'_>, side: usize, vms: usize, identities: Option<&Identities>) -> String {
    let security = identities.map_or("plaintext = true".to_owned(), |identities| identities.options(side));
    // Busy machines are measured too: nobody is to be suspected meanwhile.
    let mut text = format!(
        "role = '{}'\ndevices = ['{DEVICE}']\narbiter = '{}'\nheartbeat-misses = 500\n{security}\n",
        ["primary", "backup"][side],
        place.join("arbiter").display(),
    );
    for vm in 0..vms {
        let [own, peer] = [side, 1 - side].map(|side| format!("{}:{}", [wire.a.1, wire.b.1][side], 7800 + vm));
        let socket = socket(place, side, vm);
        write!(
            text,
            "[vm.{}]\nsocket-path = '{}'\nlisten = '{own}'\npeer = '{peer}'\n",
            name(vm),
            socket.display()
        )
        .expect("a string takes everything");
    }
    text
}

impl Pair {
    /// Starts both daemons with their files in a directory of that name, and joins as the clients of every VM.
    ///
    /// # Errors
    /// Daemons that do not start or do not pair.
    pub(super) fn start(
        bin_dir: &Path,
        place: &Path,
        wire: &Wire<'_>,
        vms: usize,
        identities: Option<&Identities>,
    ) -> io::Result<Self> {
        fs::create_dir_all(place.join("arbiter"))?;
        let daemon = |side: usize| {
            let file = place.join(format!("{side}.toml"));
            fs::write(&file, configuration(place, wire, side, vms, identities))?;
            let mut command = Command::new(bin_dir.join("ft-log"));
            command.arg("--config").arg(file);
            command.env("RUST_LOG", "warn").stdin(Stdio::null());
            [wire.a.0, wire.b.0][side].run(|| command.spawn())
        };
        let mut pair = Self {
            daemons: [daemon(0)?, daemon(1)?],
            vms: Vec::new(),
        };
        for vm in 0..vms {
            pair.vms.push(Vm::join(place, vm)?);
        }
        for vm in &mut pair.vms {
            vm.wait_paired()?;
        }
        Ok(pair)
    }

    /// Processor time of both daemons so far.
    ///
    /// # Errors
    /// A daemon that is gone.
    pub(super) fn cpu_seconds(&self) -> io::Result<f64> {
        self.daemons.iter().map(|daemon| cpu_seconds(daemon.id())).sum()
    }

    /// Most memory that either daemon had.
    ///
    /// # Errors
    /// A daemon that is gone.
    pub(super) fn peak_mib(&self) -> io::Result<f64> {
        let peaks: io::Result<Vec<f64>> = self.daemons.iter().map(|daemon| peak_mib(daemon.id())).collect();
        Ok(peaks?.into_iter().fold(0.0, f64::max))
    }
}

impl Vm {
    fn join(place: &Path, vm: usize) -> io::Result<Self> {
        let join = |side: usize| {
            let (socket, name) = (socket(place, side, vm), name(vm));
            let device = patiently(|| join_device(&socket, &name, DEVICE, &FINGERPRINT))?;
            let shim = patiently(|| join_shim(&socket, &name, &FINGERPRINT))?;
            io::Result::Ok((shim, device))
        };
        let (shim, device) = join(0)?;
        let (mut backup, backup_device) = join(1)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let replayer = thread::spawn(move || replay(&mut backup, &over));
        Ok(Self {
            device,
            _others: (shim, backup_device),
            replayer: Some(replayer),
            is_over,
            sequence: 0,
        })
    }

    fn wait_paired(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.device.region.role() != Role::Recording {
            if Instant::now() >= deadline {
                return Err(io::Error::other("the two ft-logs did not pair"));
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.commit(&[0; LATENCY_BYTES])
    }

    fn append(&mut self, payload: &[u8], urgency: Urgency) -> io::Result<Lsn> {
        self.sequence += 1;
        let body = Body::Input {
            sequence: self.sequence,
            payload,
        };
        let appended = self.device.log.append(self.device.device, 0, &body, urgency);
        appended.map_err(|_| io::Error::other("the replica ended"))
    }

    /// Appends an entry and waits as a device daemon does until it is committed.
    fn commit(&mut self, payload: &[u8]) -> io::Result<()> {
        let lsn = self.append(payload, Urgency::Now)?;
        self.wait(lsn)
    }

    fn wait(&self, lsn: Lsn) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        self.device.region.want_commit(self.device.device, lsn);
        while !self.device.region.committed().covers(lsn) {
            if Instant::now() >= deadline {
                return Err(io::Error::other(format!("entry {lsn} is not committed")));
            }
            self.device.sleep_commit(PATIENCE)?;
        }
        Ok(())
    }

    /// Commits one after the other; what each took, in microseconds.
    ///
    /// # Errors
    /// A replica that ended.
    pub(super) fn latencies_us(&mut self, count: usize) -> io::Result<Vec<f64>> {
        let payload = [0x5a; LATENCY_BYTES];
        let one = |_| {
            let start = Instant::now();
            self.commit(&payload)?;
            Ok(start.elapsed().as_secs_f64() * 1e6)
        };
        (0..count).map(one).collect()
    }

    /// Sends so many frames of a size as fast as they are taken; seconds until all are committed.
    ///
    /// # Errors
    /// A replica that ended.
    pub(super) fn stream(&mut self, frame_bytes: usize, count: usize) -> io::Result<f64> {
        let payload = vec![0x5a; frame_bytes - INPUT_HEADER_BYTES];
        let start = Instant::now();
        for _ in 1..count {
            self.append(&payload, Urgency::Later)?;
        }
        let last = self.append(&payload, Urgency::Now)?;
        self.wait(last)?;
        Ok(start.elapsed().as_secs_f64())
    }
}

fn replay(shim: &mut ShimSession, is_over: &AtomicBool) {
    let mut bytes = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        let ticket = shim.region.shim_ticket();
        let mut last = Lsn::ZERO;
        while let Ok(Some(_)) = shim.replay.pop(&mut bytes) {
            if let Ok(entry) = Entry::decode(&bytes) {
                last = entry.lsn;
            }
            bytes.clear();
        }
        if last > Lsn::ZERO && shim.region.set_consumed(last) {
            shim.log.ring_doorbell();
        }
        shim.region.sleep_shim(ticket, Some(Duration::from_millis(100)));
    }
}

fn cpu_seconds(process: u32) -> io::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| {
        fields
            .get(at)
            .and_then(|field| field.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    // utime and stime; a tick is 1/100 s on every Linux.
    Ok((ticks(11) + ticks(12)) / 100.0)
}

fn peak_mib(process: u32) -> io::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    let kib = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok());
    Ok(kib.unwrap_or(f64::NAN) / 1024.0)
}
