//! `GET /metrics` in Prometheus' text format (OpenMetrics), from the shared figures of every VM.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::{
    devices,
    shared::{Figures, JournalState, ROLES, Shared},
};

/// Where metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// A TCP port of this host only: there is neither secrecy nor a check of who asks.
    Loopback(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let address: SocketAddr = text
            .parse()
            .map_err(|_| "unix:PATH or a loopback address 127.0.0.1:PORT, [::1]:PORT is allowed")?;
        match address.ip().is_loopback() {
            true => Ok(Self::Loopback(address)),
            false => Err("only a loopback address (127.0.0.1, [::1]) or unix:PATH is allowed: metrics are neither secret nor protected".into()),
        }
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A figure of one VM.
type Figure = fn(&Shared, &Figures) -> u64;

/// What goes up and down.
const GAUGES: [(&str, &str, Figure); 13] = [
    ("generation", "Generation of the pair, 0 before pairing", |_, now| {
        now.generation.into()
    }),
    ("last_lsn", "Last entry appended or received", |_, now| now.last),
    (
        "committed_lsn",
        "Last entry whose outputs may leave, at most last_lsn",
        |_, now| now.committed.min(now.last),
    ),
    (
        "replayed_lsn",
        "Last entry that the local shim has replayed",
        |_, now| now.consumed,
    ),
    (
        "lag_entries",
        "Entries not committed (primary) or not replayed (backup)",
        |vm, now| now.lag(vm.identity.side),
    ),
    (
        "channel_up",
        "1 while the logging channel is in use: connected, and both sides said hello",
        |_, now| now.channel_up.into(),
    ),
    (
        "arbiter_unreachable",
        "1 if the arbiter did not answer when it was last asked",
        |_, now| now.arbiter_unreachable.into(),
    ),
    (
        "journal_failed",
        "1 if the journal broke before its generation was over",
        |_, now| (now.journal == JournalState::Failed).into(),
    ),
    ("journal_segment", "Number of the current segment", |_, now| now.segment),
    ("journal_segment_bytes", "Bytes of the current segment", |_, now| {
        now.segment_bytes
    }),
    ("journal_waiting_bytes", "Bytes that wait for the disk", |_, now| {
        now.journal_waiting_bytes
    }),
    (
        "ended",
        "1 if this side of the VM is over while the process goes on",
        |vm, _| vm.ended().is_some().into(),
    ),
    (
        "exit_status",
        "Status that this side of the VM ended with, 0 while it has not",
        |vm, _| vm.ended().map_or(0, |ended| ended.exit as u64),
    ),
];

/// What only grows.
const COUNTERS: [(&str, &str, Figure); 3] = [
    ("entries", "Log entries since the start", |_, now| now.entries),
    ("bytes", "Bytes of log entries since the start", |_, now| now.bytes),
    (
        "datagrams_ignored",
        "Datagrams that were no heartbeats of the peer",
        |_, now| now.datagrams_ignored,
    ),
];

#[derive(Debug)]
struct Source(Vec<Arc<Shared>>);

impl Collector for Source {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let all: Vec<_> = self.0.iter().map(|vm| (vm.as_ref(), vm.figures())).collect();
        let name = |vm: &Shared| vm.identity.vm.clone();
        let mut roles =
            encoder.encode_descriptor("role", "1 for the role that this side has", None, MetricType::Gauge)?;
        for (vm, now) in &all {
            for (role, role_name) in ROLES {
                let metric = ConstGauge::new(i64::from(role == now.role));
                let labels = [("vm", name(vm)), ("role", role_name.to_owned())];
                metric.encode(roles.encode_family(&labels)?)?;
            }
        }
        for (figure, help, value) in GAUGES {
            let mut family = encoder.encode_descriptor(figure, help, None, MetricType::Gauge)?;
            for (vm, now) in &all {
                let metric = ConstGauge::new(i64::try_from(value(vm, now)).unwrap_or(i64::MAX));
                metric.encode(family.encode_family(&[("vm", name(vm))])?)?;
            }
        }
        for (figure, help, value) in COUNTERS {
            let mut family = encoder.encode_descriptor(figure, help, None, MetricType::Counter)?;
            for (vm, now) in &all {
                let metric = ConstCounter::new(value(vm, now));
                metric.encode(family.encode_family(&[("vm", name(vm))])?)?;
            }
        }
        devices::encode(&self.0, &mut encoder)
    }
}

/// What is served.
pub(super) fn registry(vms: Vec<Arc<Shared>>) -> Registry {
    let mut registry = Registry::with_prefix("ft_log");
    registry.register_collector(Box::new(Source(vms)));
    registry
}

/// The answer to an HTTP request.
pub(super) fn respond(request: &[u8], registry: &Registry) -> String {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let (status, kind, body) = match line.split(|byte| *byte == b' ').collect::<Vec<_>>()[..] {
        [b"GET", b"/metrics", ..] => {
            let mut body = String::new();
            match text::encode(&mut body, registry) {
                Ok(()) => (
                    "200 OK",
                    "application/openmetrics-text; version=1.0.0; charset=utf-8",
                    body,
                ),
                Err(fmt::Error) => ("500 Internal Server Error", "text/plain", String::new()),
            }
        }
        [b"GET", ..] => ("404 Not Found", "text/plain", "metrics are at /metrics\n".into()),
        _ => ("405 Method Not Allowed", "text/plain", "only GET\n".into()),
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_served() {
        for good in ["127.0.0.1:9100", "[::1]:9100", "unix:/run/x.sock"] {
            assert_eq!(good.parse::<MetricsAddress>().unwrap().to_string(), good);
        }
        for bad in ["0.0.0.0:9100", "10.0.0.1:9100", "unix:", "9100"] {
            assert!(
                bad.parse::<MetricsAddress>().unwrap_err().contains("unix:PATH"),
                "{bad}"
            );
        }
    }
}
