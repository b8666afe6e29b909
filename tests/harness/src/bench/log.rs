//! What `ft-log` itself costs: bare daemons, this program their only client, next to plain TCP over the same wire in the same run.
//!
//! ```text
//!  this program: device + shim of the primary ──ring──► ft-log ══ wire ══► ft-log ──ring──► this program: replays
//!                     ▲ commit event ────────────────────┘  ◄── ack ──┘
//! ```
//! One `ft-log` a VM and a host: eight VMs are sixteen daemons. No journal, no TLS.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ft_client::handshake::{DeviceSession, ShimSession, join_device, join_shim};
use ft_client::log::Urgency;
use ft_protocol::entry::{Body, Entry};
use ft_protocol::{Lsn, Role};

use super::log_peer::Wire;
use super::row::Row;
use super::stats::{median, percentile, range};
use crate::error::{HarnessError, IoContext};
use crate::topology::{HostId, Topology};

/// Nothing here waits longer.
const PATIENCE: Duration = Duration::from_secs(60);
const VM: &str = "bench";
const DEVICE: &str = "dev0";
const FINGERPRINT: [u8; 32] = [7; 32];
/// Payload of a commit and of an echo.
const LATENCY_BYTES: usize = 128;
/// Commits of each VM in a round.
const LATENCY_COUNT: usize = 3000;
/// Bytes of a round of throughput.
const STREAM_BYTES: usize = 64 * 1024 * 1024;
/// Frames of these sizes; the header of an input is 32 bytes of them.
const FRAME_BYTES: [usize; 3] = [64, 1024, 16 * 1024];
const INPUT_HEADER_BYTES: usize = 32;
/// How long an idle pair is watched.
const IDLE: Duration = Duration::from_secs(5);

/// One protected VM of which nothing is there but its log.
struct Vm {
    daemons: [Child; 2],
    device: DeviceSession,
    _others: (ShimSession, DeviceSession),
    replayer: Option<JoinHandle<()>>,
    is_over: Arc<AtomicBool>,
    sequence: u64,
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        if let Some(replayer) = self.replayer.take() {
            let _ = replayer.join();
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

impl Vm {
    fn start(bin_dir: &Path, directory: &Path, wire: &Wire<'_>, number: usize) -> io::Result<Self> {
        let port = 7800 + number;
        let addresses = [wire.a.1, wire.b.1].map(|ip| format!("{ip}:{port}"));
        let place = directory.join(format!("{}-{number}", wire.name));
        fs::create_dir_all(place.join("arbiter"))?;
        let socket = |side: usize| place.join(format!("{side}.sock"));
        let daemon = |side: usize| {
            let mut command = Command::new(bin_dir.join("ft-log"));
            command
                .args(["--vm", VM, "--devices", DEVICE, "--role", ["primary", "backup"][side]])
                .args(["--listen", &addresses[side], "--peer", &addresses[1 - side]])
                .arg("--arbiter")
                .arg(place.join("arbiter"))
                .arg("--socket-path")
                .arg(socket(side))
                .env("RUST_LOG", "warn")
                .stdin(Stdio::null());
            // Busy machines are measured too: nobody is to be suspected meanwhile.
            command.args(["--heartbeat-misses", "500", "--plaintext"]);
            [wire.a.0, wire.b.0][side].run(|| command.spawn())
        };
        let daemons = [daemon(0)?, daemon(1)?];
        let join = |side: usize| {
            let device = patiently(|| join_device(&socket(side), VM, DEVICE, &FINGERPRINT))?;
            let shim = patiently(|| join_shim(&socket(side), VM, &FINGERPRINT))?;
            io::Result::Ok((shim, device))
        };
        let (shim, device) = join(0)?;
        let (mut backup, backup_device) = join(1)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let replayer = thread::spawn(move || replay(&mut backup, &over));
        let mut vm = Self {
            daemons,
            device,
            _others: (shim, backup_device),
            replayer: Some(replayer),
            is_over,
            sequence: 0,
        };
        let deadline = Instant::now() + PATIENCE;
        while vm.device.region.role() != Role::Recording {
            if Instant::now() >= deadline {
                return Err(io::Error::other("the two ft-logs did not pair"));
            }
            thread::sleep(Duration::from_millis(5));
        }
        vm.commit(&[0; LATENCY_BYTES])?;
        Ok(vm)
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

    fn latencies_us(&mut self) -> io::Result<Vec<f64>> {
        let payload = [0x5a; LATENCY_BYTES];
        let one = |_| {
            let start = Instant::now();
            self.commit(&payload)?;
            Ok(start.elapsed().as_secs_f64() * 1e6)
        };
        (0..LATENCY_COUNT).map(one).collect()
    }

    /// Sends so many frames of a size as fast as they are taken; seconds until all are committed.
    fn stream(&mut self, frame_bytes: usize, count: usize) -> io::Result<f64> {
        let payload = vec![0x5a; frame_bytes - INPUT_HEADER_BYTES];
        let start = Instant::now();
        for _ in 1..count {
            self.append(&payload, Urgency::Later)?;
        }
        let last = self.append(&payload, Urgency::Now)?;
        self.wait(last)?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn cpu_seconds(&self) -> io::Result<f64> {
        self.daemons.iter().map(|daemon| cpu_seconds(daemon.id())).sum()
    }

    /// Most memory that either daemon had.
    fn peak_mib(&self) -> io::Result<f64> {
        let peaks: io::Result<Vec<f64>> = self.daemons.iter().map(|daemon| peak_mib(daemon.id())).collect();
        Ok(peaks?.into_iter().fold(0.0, f64::max))
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

/// Every figure of the log, or those of the parts whose names contain `only`.
///
/// # Errors
/// When the daemons or the wires cannot be set up, or a daemon ends early.
pub fn rows(
    bin_dir: &Path,
    directory: &Path,
    rounds: u8,
    only: Option<&str>,
    add: &mut dyn FnMut(Vec<Row>),
) -> Result<(), HarnessError> {
    raise_priority();
    let is_wanted = |part: String| only.is_none_or(|text| part.contains(text));
    let topology = Topology::new()?;
    let (a, b) = (topology.host(HostId::A), topology.host(HostId::B));
    let loopback = |last| std::net::Ipv4Addr::new(127, 0, 0, last);
    let wires = [
        Wire {
            name: "loopback",
            a: (a, loopback(1)),
            b: (a, loopback(2)),
        },
        Wire {
            name: "veth",
            a: (a, *HostId::A.log_address().ip()),
            b: (b, *HostId::B.log_address().ip()),
        },
    ];
    for wire in &wires {
        let action = || format!("measure the log over {}", wire.name);
        for vms in [1, 8] {
            if is_wanted(format!("commit latency, {}, {vms} VM", wire.name)) {
                add(latency(bin_dir, directory, wire, vms, rounds).context(action)?);
            }
        }
        if is_wanted(format!("throughput, {}", wire.name)) {
            add(throughput(bin_dir, directory, wire, rounds).context(action)?);
        }
    }
    if is_wanted("idle channel, veth".to_owned()) {
        add(vec![
            idle(bin_dir, directory, &wires[1]).context(|| "watch an idle pair".to_owned())?,
        ]);
    }
    Ok(())
}

/// `ft-log` runs at this niceness where it may: what it is compared with, and its client, must not be worse off.
fn raise_priority() {
    const NICE: i32 = -10;
    // SAFETY: no memory is involved.
    let _ = unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, NICE) };
}

fn latency(bin_dir: &Path, directory: &Path, wire: &Wire<'_>, count: usize, rounds: u8) -> io::Result<Vec<Row>> {
    let start = |number| Vm::start(bin_dir, directory, wire, count * 10 + number);
    let mut vms = (0..count).map(start).collect::<io::Result<Vec<_>>>()?;
    let (mut ours, mut peers) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for _ in 0..rounds {
        let all = together(&mut vms, |vm| vm.latencies_us())?;
        let echoes = together(&mut vec![(); count], |()| wire.echo_us(LATENCY_COUNT, LATENCY_BYTES))?;
        for (percent, at) in [(50, 0), (99, 1)] {
            ours[at].push(percentile(&all, percent));
            peers[at].push(percentile(&echoes, percent));
        }
    }
    let row = |name: &str, at: usize| {
        let conditions = format!(
            "peer: TCP echo of {LATENCY_BYTES} bytes, {count} at once; {LATENCY_COUNT} commits each, median of {rounds} rounds ({} and {})",
            range(&ours[at]),
            range(&peers[at]),
        );
        let name = format!("commit latency {name}, {}, {count} VM", wire.name);
        Row::new(name, median(&ours[at]), median(&peers[at]), "us", conditions)
    };
    Ok(vec![row("p50", 0), row("p99", 1)])
}

/// Runs one job on each, all at once from a common start; everything they measured.
fn together<T: Send>(on: &mut [T], job: impl Fn(&mut T) -> io::Result<Vec<f64>> + Sync) -> io::Result<Vec<f64>> {
    let barrier = Barrier::new(on.len());
    let (barrier, job) = (&barrier, &job);
    thread::scope(|scope| {
        let jobs: Vec<_> = on
            .iter_mut()
            .map(|one| {
                scope.spawn(move || {
                    barrier.wait();
                    job(one)
                })
            })
            .collect();
        let mut all = Vec::new();
        for job in jobs {
            all.extend(job.join().map_err(|_| io::Error::other("a measurement panicked"))??);
        }
        Ok(all)
    })
}

fn throughput(bin_dir: &Path, directory: &Path, wire: &Wire<'_>, rounds: u8) -> io::Result<Vec<Row>> {
    let mut vm = Vm::start(bin_dir, directory, wire, 99)?;
    let mut rows = Vec::new();
    for bytes in FRAME_BYTES {
        let count = STREAM_BYTES / bytes;
        let mebibytes = (count * bytes) as f64 / f64::from(1 << 20);
        let (mut ours, mut peers, mut cpu, mut peers_cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            let before = vm.cpu_seconds()?;
            ours.push(mebibytes / vm.stream(bytes, count)?);
            let millions = count as f64 / 1e6;
            cpu.push((vm.cpu_seconds()? - before) / millions);
            let stream = wire.stream(count * bytes)?;
            peers.push(mebibytes / stream.seconds);
            peers_cpu.push(stream.cpu_seconds / millions);
        }
        let conditions = format!(
            "peer: one TCP stream of the same bytes; {mebibytes:.0} MiB, median of {rounds} rounds ({} and {})",
            range(&ours),
            range(&peers)
        );
        let name = format!("throughput, {bytes} B entries, {}", wire.name);
        rows.push(Row::new(name, median(&ours), median(&peers), "MiB/s", conditions));
        let name = format!("CPU per million entries of {bytes} B, {}", wire.name);
        let conditions = format!(
            "both ft-logs, without their client; peer: both ends of the TCP stream; {} and {}",
            range(&cpu),
            range(&peers_cpu)
        );
        rows.push(Row::new(name, median(&cpu), median(&peers_cpu), "s", conditions));
    }
    let conditions = "VmHWM of the larger daemon after that; peer: its three rings of 8 MiB".to_owned();
    let name = format!("resident memory, {}", wire.name);
    rows.push(Row::new(name, vm.peak_mib()?, 24.0, "MiB", conditions));
    Ok(rows)
}

/// What a pair says when there is nothing to say, as the interface counts it.
fn idle(bin_dir: &Path, directory: &Path, wire: &Wire<'_>) -> io::Result<Row> {
    let _vm = Vm::start(bin_dir, directory, wire, 98)?;
    let bytes = || {
        let text = wire.a.0.run(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
        let count = |line: &str| -> Option<f64> {
            let (name, numbers) = line.split_once(':')?;
            let numbers: Vec<f64> = numbers
                .split_whitespace()
                .filter_map(|number| number.parse().ok())
                .collect();
            (name.trim() != "lo").then(|| {
                numbers
                    .first()
                    .zip(numbers.get(8))
                    .map(|(received, sent)| received + sent)
            })?
        };
        io::Result::Ok(text.lines().filter_map(count).sum::<f64>())
    };
    let (before, start) = (bytes()?, Instant::now());
    thread::sleep(IDLE);
    let kbit = (bytes()? - before) * 8.0 / 1000.0 / start.elapsed().as_secs_f64();
    let conditions =
        "both directions, Ethernet headers included, heartbeats every 20 ms; peer: the bound that was set, 20 kbit/s"
            .to_owned();
    Ok(Row::new("idle channel, veth", kbit, 20.0, "kbit/s", conditions))
}
