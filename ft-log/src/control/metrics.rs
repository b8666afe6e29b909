//! `GET /metrics` in Prometheus' text format (OpenMetrics), from the shared figures.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, sync::Arc};

use ft_protocol::Role;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::shared::{ROLES, Shared, lag};

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

#[derive(Debug)]
struct Source(Arc<Shared>);

impl Collector for Source {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let now = self.0.figures();
        let is_follower = matches!(now.role, Role::Replaying | Role::GoingLive);
        let mut roles =
            encoder.encode_descriptor("role", "1 for the role that this side has", None, MetricType::Gauge)?;
        for (role, name) in ROLES {
            let metric = ConstGauge::new(i64::from(role == now.role));
            metric.encode(roles.encode_family(&[("role", name)])?)?;
        }
        for (name, help, value) in [
            (
                "generation",
                "Generation of the pair, 0 before pairing",
                now.generation.into(),
            ),
            ("last_lsn", "Last entry appended or received", now.last),
            (
                "committed_lsn",
                "Last entry whose outputs may leave, at most last_lsn",
                now.committed.min(now.last),
            ),
            (
                "replayed_lsn",
                "Last entry that the local shim has replayed",
                now.consumed,
            ),
            (
                "lag_entries",
                "Entries not committed (primary) or not replayed (backup)",
                lag(&now, is_follower),
            ),
            (
                "channel_up",
                "1 while the logging channel is connected",
                now.channel_up.into(),
            ),
            (
                "arbiter_unreachable",
                "1 if the arbiter did not answer when it was last asked",
                now.arbiter_unreachable.into(),
            ),
            (
                "journal_failed",
                "1 if the journal broke before its generation was over",
                (now.journal == super::shared::JournalState::Failed).into(),
            ),
            ("journal_segment", "Number of the current segment", now.segment),
            (
                "journal_segment_bytes",
                "Bytes of the current segment",
                now.segment_bytes,
            ),
            (
                "journal_waiting_bytes",
                "Bytes that wait for the disk",
                now.journal_waiting_bytes,
            ),
        ] {
            let metric = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            metric.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        for (name, help, value) in [
            ("entries", "Log entries since the start", now.entries),
            ("bytes", "Bytes of log entries since the start", now.bytes),
            (
                "datagrams_ignored",
                "Datagrams that were no heartbeats of the peer",
                now.datagrams_ignored,
            ),
        ] {
            let metric = ConstCounter::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        Ok(())
    }
}

/// What is served.
pub(super) fn registry(shared: Arc<Shared>) -> Registry {
    let vm = shared.identity.vm.clone();
    let labels = [("vm".into(), vm.into())].into_iter();
    let mut registry = Registry::with_prefix_and_labels("ft_log", labels);
    registry.register_collector(Box::new(Source(shared)));
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
