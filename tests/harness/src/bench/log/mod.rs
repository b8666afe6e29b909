//! What `ft-log` itself costs: bare daemons, this program their only client, next to plain TCP over the same wire in the same run.
//!
//! ```text
//!  this program: device + shim of the primary ──ring──► ft-log ══ wire ══► ft-log ──ring──► this program: replays
//!                     ▲ commit event ────────────────────┘  ◄── ack ──┘
//! ```
//! One `ft-log` a host, whatever the number of VMs. No journal.

mod identity;
mod pair;
pub(super) mod peer;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use self::identity::Identities;
use self::pair::{LATENCY_BYTES, Pair};
use self::peer::Wire;
use super::row::Row;
use super::stats::{median, percentile, range};
use crate::error::{HarnessError, IoContext};
use crate::topology::{HostId, Topology};

/// Commits of each VM in a round.
const LATENCY_COUNT: usize = 3000;
/// Bytes of a round of throughput.
const STREAM_BYTES: usize = 64 * 1024 * 1024;
/// Frames of these sizes; the header of an input is 32 bytes of them.
const FRAME_BYTES: [usize; 3] = [64, 1024, 16 * 1024];
/// How long an idle pair is watched.
const IDLE: Duration = Duration::from_secs(5);

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
    let identities = Identities::make(directory).context(|| "make certificates".to_owned())?;
    for wire in &wires {
        let action = || format!("measure the log over {}", wire.name);
        for vms in [1, 8] {
            if is_wanted(format!("commit latency, {}, {vms} VM", wire.name)) {
                add(latency(bin_dir, directory, wire, vms, rounds).context(action)?);
            }
        }
        for (kind, identities) in [("", None), (" with TLS", Some(&identities))] {
            let part = |bytes| format!("throughput{kind}, {bytes} B entries, {}", wire.name);
            let all = is_wanted(format!("throughput{kind}, {}", wire.name));
            let sizes: Vec<_> = FRAME_BYTES
                .into_iter()
                .filter(|bytes| all || is_wanted(part(*bytes)))
                .collect();
            if !sizes.is_empty() {
                add(throughput(bin_dir, directory, wire, rounds, identities, &sizes).context(action)?);
            }
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
    let place = directory.join(format!("{}-latency{count}", wire.name));
    let mut pair = Pair::start(bin_dir, &place, wire, count, None)?;
    let (mut ours, mut peers) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for _ in 0..rounds {
        let all = together(&mut pair.vms, |vm| vm.latencies_us(LATENCY_COUNT))?;
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

/// Speed and price of a stream of entries of each of these sizes, in TLS sessions where identities are given.
fn throughput(
    bin_dir: &Path,
    directory: &Path,
    wire: &Wire<'_>,
    rounds: u8,
    identities: Option<&Identities>,
    sizes: &[usize],
) -> io::Result<Vec<Row>> {
    let kind = if identities.is_some() { " with TLS" } else { "" };
    let place = directory.join(format!(
        "{}-throughput{}",
        wire.name,
        kind.trim_start().replace(' ', "-")
    ));
    let mut pair = Pair::start(bin_dir, &place, wire, 1, identities)?;
    let mut rows = Vec::new();
    for bytes in sizes.iter().copied() {
        let count = STREAM_BYTES / bytes;
        let mebibytes = (count * bytes) as f64 / f64::from(1 << 20);
        let (mut ours, mut peers, mut cpu, mut peers_cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            let before = pair.cpu_seconds()?;
            ours.push(mebibytes / pair.vms[0].stream(bytes, count)?);
            let millions = count as f64 / 1e6;
            cpu.push((pair.cpu_seconds()? - before) / millions);
            let stream = wire.stream(count * bytes, identities)?;
            peers.push(mebibytes / stream.seconds);
            peers_cpu.push(stream.cpu_seconds / millions);
        }
        let conditions = format!(
            "peer: one TCP stream{kind} of the same bytes; {mebibytes:.0} MiB, median of {rounds} rounds ({} and {})",
            range(&ours),
            range(&peers)
        );
        let name = format!("throughput{kind}, {bytes} B entries, {}", wire.name);
        rows.push(Row::new(name, median(&ours), median(&peers), "MiB/s", conditions));
        let name = format!("CPU per million entries{kind} of {bytes} B, {}", wire.name);
        let conditions = format!(
            "both ft-logs, without their client; peer: both ends of the TCP stream; {} and {}",
            range(&cpu),
            range(&peers_cpu)
        );
        rows.push(Row::new(name, median(&cpu), median(&peers_cpu), "s", conditions));
    }
    let conditions = "VmHWM of the larger daemon after that; peer: its three rings of 8 MiB".to_owned();
    let name = format!("resident memory{kind}, {}", wire.name);
    rows.push(Row::new(name, pair.peak_mib()?, 24.0, "MiB", conditions));
    Ok(rows)
}

/// What a pair says when there is nothing to say, as the interface counts it.
fn idle(bin_dir: &Path, directory: &Path, wire: &Wire<'_>) -> io::Result<Row> {
    let _pair = Pair::start(bin_dir, &directory.join("idle"), wire, 1, None)?;
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
