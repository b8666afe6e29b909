//! The command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Parser, ValueEnum};
use ft_protocol::{
    limits::{DEVICES_MAX, VM_NAME_BYTES_MAX},
    message::Strength,
    replica,
    timing::{HEARTBEATS_PER_CHANNEL_TIMEOUT, Timing},
    versions::Versions,
};

use crate::{
    arbiter::ArbiterAddress,
    control::MetricsAddress,
    journal_writer::JournalSettings,
    timers::{Timers, ns},
};

/// Which side of the pair this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// Executes and records; connects to the backup.
    Primary,
    /// Replays; listens for the primary.
    Backup,
}

/// When the journal cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum JournalPolicy {
    /// The VM goes on without a journal, and its operator is told.
    GoOn,
    /// This side ends; the other one goes on alone.
    Stop,
}

/// When an earlier run left its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EarlierPolicy {
    /// Do not start.
    Refuse,
    /// Cut a torn tail off and move it into a directory of its own beside the new one.
    Archive,
}

/// See [`Strength`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ack {
    /// It has arrived.
    Received,
    /// It is in the backup's journal, flushed.
    Durable,
    /// It was replayed.
    Replayed,
}

/// VMs of one process.
pub const VMS_MAX: usize = 64;
/// The usual time that a channel may be away.
const CHANNEL_TIMEOUT_MS: u64 = 1000;

/// Orders, journals and replicates the log of a fault-tolerant VM, and decides with its peer who goes live.
#[derive(Clone, Debug, Parser)]
#[command(name = "ft-log", version)]
pub struct Config {
    /// Take what is not on the command line from this TOML file; its keys are these options without the dashes.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Check the configuration, show what is in force, and end.
    #[arg(long)]
    pub check_config: bool,
    /// Name of the VM; the same on both hosts.
    #[arg(long, value_parser = file_name)]
    pub vm: String,
    /// Which side this is.
    #[arg(long)]
    pub role: Side,
    /// Unix socket on which the VM's other processes join.
    #[arg(long, value_name = "SOCK")]
    pub socket_path: PathBuf,
    /// The arbiter: a directory on storage that both hosts share, or etcd://HOST:PORT[,HOST:PORT]...[/PREFIX].
    #[arg(long, value_name = "DIR|etcd://...")]
    pub arbiter: ArbiterAddress,
    /// Directory for the journal; without it there is none.
    #[arg(long, value_name = "DIR")]
    pub journal: Option<PathBuf>,
    /// Size at which a segment of the journal is followed by the next one.
    #[arg(long, value_name = "KIB", default_value_t = 65_536, value_parser = clap::value_parser!(u64).range(64..=65_536))]
    pub journal_segment_kib: u64,
    /// Segments that are kept, the current one included; 0 for all. A journal without its beginning cannot be replayed.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub journal_keep_segments: u32,
    /// What to do when the journal cannot be written, as on a full disk.
    #[arg(long, value_name = "POLICY", default_value = "go-on")]
    pub journal_failure: JournalPolicy,
    /// What to do at the start with a journal of an earlier run of the VM.
    #[arg(long, value_name = "POLICY", default_value = "refuse")]
    pub journal_earlier: EarlierPolicy,
    /// Address of this host: logging channel (TCP) and heartbeats (UDP).
    #[arg(long, value_name = "IP:PORT", required_unless_present = "alone")]
    pub listen: Option<SocketAddr>,
    /// The other host's --listen.
    #[arg(long, value_name = "IP:PORT", required_unless_present = "alone")]
    pub peer: Option<SocketAddr>,
    /// This host's certificate (PEM): the logging channel speaks mutual TLS 1.3, heartbeats are authenticated.
    #[arg(long, value_name = "PEM", requires_all = ["tls_key", "tls_peer"])]
    pub tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert (PEM).
    #[arg(long, value_name = "PEM", requires_all = ["tls_cert", "tls_peer"])]
    pub tls_key: Option<PathBuf>,
    /// The peer's certificate (PEM; several where it is about to change). Exactly these are taken.
    #[arg(long, value_name = "PEM", requires_all = ["tls_cert", "tls_key"])]
    pub tls_peer: Option<PathBuf>,
    /// Without TLS between two hosts: everybody on that network can read and change what the guest sees.
    #[arg(long, conflicts_with = "tls_cert")]
    pub plaintext: bool,
    /// Run without a backup: live from the start, outputs are not held.
    #[arg(long)]
    pub alone: bool,
    /// Be the new backup of a VM that is live on the peer: its disks are brought up while it runs (engine 'device').
    #[arg(long, conflicts_with = "alone")]
    pub resync: bool,
    /// Name of this host in claims and logs [default: the system's].
    #[arg(long, value_name = "NAME")]
    pub host_name: Option<String>,
    /// Time between two heartbeats.
    #[arg(long, value_name = "MS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub heartbeat_interval_ms: u64,
    /// Missed heartbeats after which the peer is suspected.
    #[arg(long, value_name = "COUNT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    pub heartbeat_misses: u32,
    /// What the backup must say of an entry before the outputs it marks leave (given to the primary).
    #[arg(long, value_name = "STRENGTH", default_value = "received")]
    pub ack: Ack,
    /// How long the logging channel may be away, or stand still, while heartbeats go on [default: 1000, or 4 heartbeats].
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub channel_timeout_ms: Option<u64>,
    /// How long the backup's replay may apply nothing although entries are there: then this backup is over, and the primary goes on alone.
    #[arg(long, value_name = "MS", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    pub replay_timeout_ms: u64,
    /// Lag of the backup's replay from which on the primary is slowed.
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub lag_target_ms: u64,
    /// Lag of the backup's replay at which the primary stands still.
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub lag_limit_ms: u64,
    /// Append events to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,
    /// Unix socket for status and orders (ft-log status, rotate, stop ...).
    #[arg(long, value_name = "SOCK")]
    pub control: Option<PathBuf>,
    /// Serve metrics for Prometheus there: a loopback address, or unix:PATH.
    #[arg(long, value_name = "IP:PORT|unix:PATH")]
    pub metrics: Option<MetricsAddress>,
    /// Times and limits.
    #[command(flatten)]
    pub timers: Timers,
    /// Device daemons of the VM, comma separated; both hosts name them in the same order.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "blk0,net0", value_parser = file_name)]
    pub devices: Vec<String>,
}

/// What one process does: its VMs, in the order of their names, and the one management plane that they share.
#[derive(Clone, Debug)]
pub struct Process {
    /// One each.
    pub vms: Vec<Config>,
}

impl Process {
    /// The control socket.
    #[must_use]
    pub fn control(&self) -> Option<&PathBuf> {
        self.vms.first()?.control.as_ref()
    }

    /// Where metrics are served.
    #[must_use]
    pub fn metrics(&self) -> Option<&MetricsAddress> {
        self.vms.first()?.metrics.as_ref()
    }

    /// What one VM's configuration cannot see: two that want the same.
    ///
    /// # Errors
    /// The tables and the key that it is about.
    pub fn check(&self) -> Result<(), String> {
        for (at, vm) in self.vms.iter().enumerate() {
            for other in &self.vms[..at] {
                let (a, b) = (&other.vm, &vm.vm);
                if vm.socket_path == other.socket_path {
                    let path = vm.socket_path.display();
                    return Err(format!(
                        "[vm.{b}] socket-path = {path}: [vm.{a}] has it too; each VM has a socket of its own"
                    ));
                }
                let listens = |config: &Config| config.listen.filter(|_| !config.alone);
                if let (Some(address), true) = (listens(vm), listens(vm) == listens(other)) {
                    return Err(format!(
                        "[vm.{b}] listen = {address}: [vm.{a}] has it too; each VM has an address of its own"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// A name that is also used as part of a file name.
fn file_name(name: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.len() > VM_NAME_BYTES_MAX {
        return Err(format!("a name has 1 to {VM_NAME_BYTES_MAX} characters"));
    }
    if name.starts_with('.') || !name.bytes().all(allowed) {
        return Err("a name consists of A-Z a-z 0-9 . _ - and does not begin with a dot".into());
    }
    Ok(name.into())
}

impl Config {
    /// What single options cannot see.
    ///
    /// # Errors
    /// What is wrong, with the options it is about.
    pub fn check(&self) -> Result<(), String> {
        if self.alone && self.role == Side::Backup {
            return Err("--alone is for --role primary: a backup alone has nothing to replay".into());
        }
        if self.resync && self.role == Side::Primary {
            return Err("--resync is for --role backup: the side that is live has the VM's state".into());
        }
        if self.devices.len() > DEVICES_MAX {
            return Err(format!("--devices: at most {DEVICES_MAX}"));
        }
        if let Some(twice) = (1..self.devices.len()).find(|at| self.devices[..*at].contains(&self.devices[*at])) {
            return Err(format!("--devices: '{}' is there twice", self.devices[twice]));
        }
        self.timing().check()?;
        if let (Some(listen), Some(peer)) = (self.listen, self.peer) {
            let is_one_host = listen.ip().is_loopback() && peer.ip().is_loopback();
            if self.tls_cert.is_none() && !self.plaintext && !self.alone && !is_one_host {
                return Err(
                    "the logging channel is not on loopback: give --tls-cert, --tls-key and --tls-peer, or --plaintext on a network of its own".into(),
                );
            }
            if listen == peer {
                return Err("--listen and --peer are the same address: --peer is the other host's".into());
            }
            if listen.is_ipv4() != peer.is_ipv4() {
                return Err("--listen and --peer must both be IPv4 or both be IPv6".into());
            }
        }
        Ok(())
    }

    /// Name of this host.
    #[must_use]
    pub fn host(&self) -> String {
        let system = || {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            name.trim().to_owned()
        };
        self.host_name.clone().unwrap_or_else(system)
    }

    /// What the journal's writer wants to know.
    #[must_use]
    pub fn journal_settings(&self) -> JournalSettings {
        JournalSettings {
            directory: self.journal.clone(),
            segment_bytes: self.journal_segment_kib * 1024,
            keep_segments: self.journal_keep_segments,
            write_delay_ns: ns(self.timers.journal_write_delay_ms),
            backlog_bytes: (self.timers.journal_backlog_mib as usize) << 20,
        }
    }

    /// How long the channel may be away.
    #[must_use]
    pub fn channel_timeout_ms(&self) -> u64 {
        let least = HEARTBEATS_PER_CHANNEL_TIMEOUT * self.heartbeat_interval_ms;
        self.channel_timeout_ms.unwrap_or(least.max(CHANNEL_TIMEOUT_MS))
    }

    /// The times that a pair begins with where this side is the primary.
    #[must_use]
    pub fn timing(&self) -> Timing {
        Timing {
            heartbeat_interval_ns: ns(self.heartbeat_interval_ms),
            heartbeat_misses: self.heartbeat_misses,
            channel_timeout_ns: ns(self.channel_timeout_ms()),
            replay_timeout_ns: ns(self.replay_timeout_ms),
            lag_target_ns: ns(self.lag_target_ms),
            lag_limit_ns: ns(self.lag_limit_ms),
        }
    }

    /// What the protocol core wants to know; `instance` is a random number.
    #[must_use]
    pub fn replica(&self, instance: u64) -> replica::Config {
        replica::Config {
            vm: self.vm.clone(),
            versions: Versions::SPOKEN,
            primary: self.role == Side::Primary,
            alone: self.alone,
            joins: self.resync,
            takes_joiners: !self.alone,
            timing: self.timing(),
            ack: match self.ack {
                Ack::Received => Strength::Received,
                Ack::Durable => Strength::Durable,
                Ack::Replayed => Strength::Replayed,
            },
            keeps_journal: self.journal.is_some(),
            instance,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USUAL: &[&str] = &[
        "ft-log",
        "--vm",
        "v",
        "--role",
        "primary",
        "--socket-path",
        "s",
        "--arbiter",
        "a",
    ];

    fn parse(more: &[&str]) -> Result<Config, String> {
        let config = Config::try_parse_from(USUAL.iter().chain(more)).map_err(|error| error.to_string())?;
        config.check().map(|()| config)
    }

    #[test]
    fn names_become_file_names_and_must_be_safe() {
        for name in ["ledger", "a.b-c_D9", &"x".repeat(64)] {
            assert!(file_name(name).is_ok(), "{name}");
        }
        for name in ["", ".hidden", "..", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(file_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn usage_that_cannot_work_is_refused() {
        let pair = ["--listen", "127.0.0.1:1", "--peer", "127.0.0.1:2"];
        assert_eq!(parse(&pair).unwrap().devices, ["blk0", "net0"]);
        assert!(parse(&["--alone"]).is_ok());
        assert!(parse(&[]).unwrap_err().contains("--listen"));
        assert!(parse(&["--listen", "127.0.0.1:1", "--peer", "127.0.0.1:1"]).is_err());
        assert!(parse(&["--listen", "127.0.0.1:1", "--peer", "[::1]:1"]).is_err());
        assert!(parse(&["--alone", "--devices", "a,b,a"]).unwrap_err().contains("'a'"));
        assert!(parse(&["--alone", "--devices", "1,2,3,4,5,6,7,8,9"]).is_err());
        assert!(parse(&["--alone", "--heartbeat-interval-ms", "0"]).is_err());
        assert!(parse(&["--alone", "--lag-target-ms", "20", "--lag-limit-ms", "10"]).is_err());
        let short = ["--alone", "--channel-timeout-ms", "79"];
        assert!(parse(&short).unwrap_err().contains("--channel-timeout-ms"));
        let slow = parse(&["--alone", "--heartbeat-interval-ms", "5000"]).unwrap();
        assert_eq!((slow.channel_timeout_ms(), slow.ack), (20_000, Ack::Received));
    }
}
