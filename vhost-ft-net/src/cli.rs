//! Command line, and the way from it to a running daemon.

use std::{
    os::fd::RawFd,
    path::PathBuf,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use clap::Parser;
use ft_client::{Counters, events::Events};
use ft_vhost::{
    conventions::Conventions,
    daemon::{self, Engine, Membership, Options, Signals},
    exit::End,
    guest_side::net::{MTUS, PAIRS_MAX, Shape},
};
use sha2::{Digest, Sha256};
use thiserror::Error;
use tracing::info;

use crate::{
    capture::{self, Recorder, Writer},
    host_end::{HostEnd, Named},
    nic::Nic,
    packet::PacketSocket,
    tap::{Tap, TapError, TapName},
};

/// vhost-user network device on a TAP. Exit codes: 0 ordinary end, 2 wrong usage, 3 environment, 4 halted, 6 this replica failed.
#[derive(Debug, Parser)]
#[command(name = "vhost-ft-net", version)]
pub struct Arguments {
    #[command(flatten)]
    conventions: Conventions,
    /// An existing TAP interface. That of a protected VM is opened once the device reaches the outside world.
    #[arg(long, value_name = "NAME", required_unless_present_any = ["print_capabilities", "tap_fd", "interface"])]
    tap: Option<TapName>,
    /// Inherited queues of a TAP or macvtap instead, one for each pair, opened with IFF_VNET_HDR and IFF_NO_PI: numbers with commas between.
    #[arg(long, value_name = "FD", value_delimiter = ',', conflicts_with_all = ["tap", "ft_log"])]
    tap_fd: Vec<RawFd>,
    /// An Ethernet interface instead, where there is no TAP: a packet socket on it. One pair of queues.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["tap", "tap_fd", "queue_pairs"])]
    interface: Option<TapName>,
    /// How the backup stays equal: `lockstep` under ft-vcpu-shim; `device` under a stock VMM whose disk is replicated, whose frames leave once
    /// every write before them is on the other host, and which restarts there.
    #[arg(
        long,
        value_enum,
        value_name = "ENGINE",
        default_value = "lockstep",
        requires = "ft_log",
        requires_if("device", "mac")
    )]
    engine: Engine,
    /// Pairs of queues; more than one wants a TAP with multi_queue. Under engine lockstep there is one.
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "tap_fd", value_parser = clap::value_parser!(u16).range(1..=i64::from(PAIRS_MAX)))]
    queue_pairs: u16,
    /// Threads that serve the queues, at most one for each queue. A protected VM's device has one.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(2 * PAIRS_MAX)))]
    io_threads: u16,
    /// MTU that the guest is told, at most the TAP's, which it is without this. A protected VM's guest is told none.
    #[arg(long, value_name = "BYTES", conflicts_with = "ft_log", value_parser = clap::value_parser!(u16).range(i64::from(*MTUS.start())..))]
    mtu: Option<u16>,
    /// MAC address of the guest; derived from VM and device (alone: interface) name without it, a macvtap's own. The same on both hosts.
    #[arg(long, value_name = "MAC")]
    mac: Option<Mac>,
    /// Capture what is received, held, released and discarded to this file (pcapng). One that is there is kept as FILE.old.
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
    /// Most MiB of that file: there the capture ends, and the device goes on.
    #[arg(long, value_name = "N", default_value_t = 1024, requires = "pcap", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pcap_limit_mib: u64,
}

/// The daemon's name in events.
const SOURCE: &str = "vhost-ft-net";

/// The capture, which begins with the first part of the device: until then another daemon may have the file.
#[derive(Debug)]
struct CaptureTo {
    path: PathBuf,
    bytes_max: u64,
    interface: String,
    events: Option<PathBuf>,
    begun: Mutex<Option<(Recorder, Writer)>>,
}

impl CaptureTo {
    fn attach(&self, nic: Nic) -> Result<Nic, End> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        if begun.is_none() {
            let events = Events::open(SOURCE, self.events.as_deref()).map_err(End::environment)?;
            let capture = capture::start(self.path.clone(), self.bytes_max, &self.interface, events);
            *begun = Some(capture.map_err(End::environment)?);
        }
        let capture = begun.as_ref().map(|(recorder, _)| recorder.capture());
        let capture = capture.transpose().map_err(End::environment)?;
        Ok(match capture {
            Some(capture) => nic.capturing(capture),
            None => nic,
        })
    }

    fn finish(&self) {
        let begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((_, writer)) = begun {
            writer.finish();
        }
    }
}

/// Serves what `make` makes until the end, with a capture if there is to be one.
fn serve(
    arguments: &Arguments,
    interface: &Named,
    threads: usize,
    mac: Mac,
    signals: Signals,
    make: impl Fn() -> Result<Nic, End> + Send + Sync + 'static,
) -> Result<(), End> {
    let mut options = arguments.options();
    if let Some(sandbox) = &mut options.sandbox {
        sandbox.networks();
        if let Some(pcap) = &arguments.pcap {
            sandbox.keeps(pcap);
        }
    }
    let capture = arguments.pcap.clone().map(|path| CaptureTo {
        path,
        bytes_max: arguments.pcap_limit_mib << 20,
        interface: interface.to_string(),
        events: options.events.clone(),
        begun: Mutex::default(),
    });
    let capture = capture.map(Arc::new);
    let captures = capture.clone();
    let make = move || match &captures {
        Some(capture) => capture.attach(make()?),
        None => make(),
    };
    let engine = arguments.engine;
    let result = daemon::serve(&options, SOURCE, threads, make, signals, || {
        Ok(fingerprint(engine, mac))
    });
    if let Some(capture) = capture {
        capture.finish();
    }
    result
}

/// A unicast MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

/// Why a MAC address is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum MacError {
    /// Not six pairs of hex digits.
    #[error("expected six pairs of hex digits, as in 52:54:00:12:34:56")]
    Malformed,
    /// A group address cannot be a station's.
    #[error("a multicast address cannot be a guest's: the first byte must be even")]
    Multicast,
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let hex = |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            let part = parts.next().filter(hex).ok_or(MacError::Malformed)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError::Malformed)?;
        }
        match parts.next() {
            Some(_) => Err(MacError::Malformed),
            None if mac[0] & 1 != 0 => Err(MacError::Multicast),
            None => Ok(Self(mac)),
        }
    }
}

impl Mac {
    /// An address of QEMU's prefix, always the same for a name.
    #[must_use]
    pub fn derived(name: &str) -> Self {
        let digest = Sha256::digest(name);
        Self([0x52, 0x54, 0x00, digest[0], digest[1], digest[2]])
    }
}

/// Digest of what both hosts must agree on.
fn fingerprint(engine: Engine, mac: Mac) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(b"net");
    digest.update(mac.0);
    match engine {
        Engine::Lockstep => digest.update(Shape::plain(mac.0).features().to_le_bytes()),
        // The VM starts anew on the other host, with what that one's interface has.
        Engine::Device => digest.update(b"device"),
    }
    digest.finalize().into()
}

impl Arguments {
    fn options(&self) -> Options {
        let mut options = self.conventions.options();
        if let Some(membership) = &mut options.membership {
            membership.engine = self.engine;
        }
        options
    }
}

/// Runs the daemon.
///
/// # Errors
/// [`End`].
pub fn run(arguments: Arguments) -> Result<(), End> {
    let conventions = &arguments.conventions;
    if let Some(capabilities) = conventions.capabilities("net", &[]) {
        println!("{capabilities}");
        return Ok(());
    }
    let signals = Signals::take().map_err(End::environment)?;
    let Some(Membership { vm, device, .. }) = conventions.membership() else {
        return run_free(&arguments, signals);
    };
    if arguments.engine == Engine::Device {
        if arguments.io_threads > 1 {
            return Err(End::environment(
                "a protected VM's device has one thread: leave --io-threads out, or --ft-log",
            ));
        }
        return run_free(&arguments, signals);
    }
    if arguments.queue_pairs > 1 || arguments.io_threads > 1 {
        return Err(End::environment(
            "a protected VM's device has one pair of queues and one thread: leave --queue-pairs and --io-threads out, or --ft-log",
        ));
    }
    let tap = arguments.tap.clone().map(Named::Tap);
    let other = arguments.interface.clone().map(Named::Interface);
    let named = tap.or(other).expect("clap asks for one of them");
    let mac = arguments.mac.unwrap_or_else(|| Mac::derived(&format!("{vm}/{device}")));
    // One that is missing is better noticed now than when a failover wants it.
    named.check(mac.0).map_err(End::environment)?;
    let interface = named.clone();
    let make = move || Ok(Nic::new(named.clone(), mac.0));
    serve(&arguments, &interface, 1, mac, signals, make)
}

/// Runs the device of a VM that nobody replays: what the host's end has of queues and offloads is the driver's.
fn run_free(arguments: &Arguments, signals: Signals) -> Result<(), End> {
    let (ends, named) = host_ends(arguments).map_err(End::environment)?;
    let (mac, mtu) = match &ends[0] {
        HostEnd::Tap(tap) if tap.is_macvtap() => {
            let wanted = arguments.mac.map(|mac| mac.0);
            let (mac, mtu) = named
                .name()
                .macvtap_for(wanted, arguments.mtu)
                .map_err(End::environment)?;
            (Mac(mac), mtu)
        }
        _ => {
            let mac = arguments.mac.unwrap_or_else(|| Mac::derived(&named.to_string()));
            let mtu = named.name().mtu_for(mac.0, arguments.mtu);
            (mac, mtu.map_err(End::environment)?)
        }
    };
    let shape = Shape {
        mac: mac.0,
        mtu,
        pairs: ends.len() as u16,
        offloads: ends[0].offloads(),
        free: true,
    };
    info!(interface = %named, pairs = shape.pairs, features = format!("{:#x}", shape.features()), "the host's end is ready");
    let threads = arguments.io_threads.min(shape.queues());
    let counters = Counters::own(shape.queues());
    let interface = named.clone();
    let make = move || {
        let ends = ends.iter().map(HostEnd::try_clone).collect::<Result<_, _>>();
        let nic = Nic::on(named.clone(), ends.map_err(End::environment)?, shape);
        Ok(match threads {
            1 => nic,
            _ => nic.counting_in(counters.clone()),
        })
    };
    serve(arguments, &interface, threads.into(), mac, signals, make)
}

/// The queues the operator named, and whose they are.
fn host_ends(arguments: &Arguments) -> Result<(Vec<HostEnd>, Named), TapError> {
    if let Some(name) = &arguments.interface {
        let socket = HostEnd::Packet(PacketSocket::open(name)?);
        return Ok((vec![socket], Named::Interface(name.clone())));
    }
    if let Some(name) = &arguments.tap {
        let taps = Tap::open_queues(name, arguments.queue_pairs)?;
        let ends = taps.into_iter().map(HostEnd::Tap).collect();
        return Ok((ends, Named::Tap(name.clone())));
    }
    let mut ends = Vec::new();
    let mut name: Option<TapName> = None;
    for fd in &arguments.tap_fd {
        let (tap, other) = Tap::from_descriptor(*fd)?;
        match &name {
            Some(name) if *name != other => return Err(TapError::Different(name.clone(), other)),
            _ => name = Some(other),
        }
        ends.push(HostEnd::Tap(tap));
    }
    let name = name.expect("clap asks for an interface or for a descriptor");
    Ok((ends, Named::Tap(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_read_as_people_write_them() {
        assert_eq!("52:54:00:Ab:cd:01".parse(), Ok(Mac([0x52, 0x54, 0, 0xab, 0xcd, 1])));
        for malformed in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:01:02",
            "52:54:00:ab:cd:1",
            "52-54-00-ab-cd-01",
            "52:54:00:ab:cd:+1",
        ] {
            assert_eq!(malformed.parse::<Mac>(), Err(MacError::Malformed), "{malformed}");
        }
        assert_eq!("01:00:5e:00:00:01".parse::<Mac>(), Err(MacError::Multicast));
        assert_eq!(Mac::derived("vm/net0"), Mac::derived("vm/net0"));
        assert_ne!(Mac::derived("vm/net0"), Mac::derived("vm/net1"));
        let of = |engine, name| fingerprint(engine, Mac::derived(name));
        assert_ne!(of(Engine::Lockstep, "a"), of(Engine::Lockstep, "b"));
        assert_ne!(of(Engine::Lockstep, "a"), of(Engine::Device, "a"));
    }
}
