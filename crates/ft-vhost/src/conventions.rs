//! The part of a command line that both daemons share: QEMU's backend program conventions (docs/interop/vhost-user.rst), socket
//! activation, and the membership of a fault-tolerant VM.

use std::{os::fd::RawFd, path::PathBuf};

use serde_json::json;

use crate::{
    daemon::{Engine, Membership, Options},
    guest_side::QUEUE_SIZE_MAX,
    sandbox::{Confinement, Sandbox},
    session::Source,
};

/// The shared arguments.
#[derive(Debug, clap::Args)]
pub struct Conventions {
    /// Socket on which frontends connect. Without it and without --fd: the socket of the systemd unit that started this.
    #[arg(long, value_name = "VHOST_SOCK", conflicts_with = "fd")]
    socket_path: Option<PathBuf>,
    /// Inherited socket, listening or connected to the one frontend there will be.
    #[arg(long, value_name = "FD")]
    fd: Option<RawFd>,
    /// Print what this backend can do as JSON, and end.
    #[arg(long)]
    print_capabilities: bool,
    /// Socket of the ft-log of this host: the device is one of a fault-tolerant VM.
    #[arg(long, value_name = "SOCK", requires = "vm", requires = "device")]
    ft_log: Option<PathBuf>,
    /// Name of the VM.
    #[arg(long, value_name = "NAME", requires = "ft_log")]
    vm: Option<String>,
    /// Name of this device in the VM, as in ft-log's --devices.
    #[arg(long, value_name = "NAME", requires = "ft_log")]
    device: Option<String>,
    /// Largest queue that a driver may configure: a power of two up to 1024.
    #[arg(long, value_name = "N", default_value_t = QUEUE_SIZE_MAX, value_parser = queue_size)]
    queue_size: u16,
    /// Socket for the operator's commands while the daemon runs.
    #[arg(long, value_name = "SOCK")]
    control: Option<PathBuf>,
    /// Append one JSON object per event to this file.
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Confine the daemon to the system calls and files it needs (seccomp, Landlock) before a frontend can connect.
    #[arg(long, value_enum, value_name = "WHETHER", default_value = "on")]
    sandbox: Confinement,
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(size @ 1..=QUEUE_SIZE_MAX) if size.is_power_of_two() => Ok(size),
        _ => Err(format!("a power of two from 1 to {QUEUE_SIZE_MAX}")),
    }
}

impl Conventions {
    /// What `--print-capabilities` prints, if it was asked for: the device's type, and the options that QEMU's schema
    /// (docs/interop/vhost-user.json) knows of it.
    #[must_use]
    pub fn capabilities(&self, device_type: &str, features: &[&str]) -> Option<String> {
        let capabilities = match features {
            [] => json!({ "type": device_type }),
            features => json!({ "type": device_type, "features": features }),
        };
        self.print_capabilities.then(|| format!("{capabilities:#}"))
    }

    /// The VM it belongs to.
    #[must_use]
    pub fn membership(&self) -> Option<Membership> {
        let (ft_log, vm, device) = (self.ft_log.clone()?, self.vm.clone()?, self.device.clone()?);
        Some(Membership {
            ft_log,
            vm,
            device,
            engine: Engine::default(),
        })
    }

    /// What a daemon is told.
    #[must_use]
    pub fn options(&self) -> Options {
        let source = match (&self.socket_path, self.fd) {
            (Some(path), _) => Source::Path(path.clone()),
            (None, Some(fd)) => Source::Descriptor(fd),
            (None, None) => Source::Activation,
        };
        let mut sandbox = Sandbox::default();
        if let Source::Path(path) = &source {
            sandbox.binds(path);
        }
        if let Some(control) = &self.control {
            sandbox.binds(control);
        }
        if let Some(events) = &self.events {
            sandbox.appends(events);
        }
        Options {
            sandbox: (self.sandbox == Confinement::On).then_some(sandbox),
            source,
            membership: self.membership(),
            events: self.events.clone(),
            control: self.control.clone(),
            queue_size: self.queue_size,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Arguments {
        #[command(flatten)]
        conventions: Conventions,
    }

    fn parse(line: &str) -> Result<Conventions, clap::Error> {
        Arguments::try_parse_from(std::iter::once("daemon").chain(line.split_whitespace()))
            .map(|parsed| parsed.conventions)
    }

    #[test]
    fn the_socket_has_one_source() {
        let source = |line| parse(line).unwrap().options().source;
        assert_eq!(source("--socket-path s"), Source::Path("s".into()));
        assert_eq!(source("--fd 5"), Source::Descriptor(5));
        assert_eq!(source(""), Source::Activation);
        assert!(parse("--socket-path s --fd 5").is_err());
    }

    #[test]
    fn queue_sizes_are_powers_of_two_that_can_be() {
        let size = |line| parse(line).map(|parsed| parsed.options().queue_size).ok();
        assert_eq!(size(""), Some(1024));
        assert_eq!(size("--queue-size 128"), Some(128));
        for line in [
            "--queue-size 0",
            "--queue-size 100",
            "--queue-size 2048",
            "--queue-size many",
        ] {
            assert_eq!(size(line), None, "{line}");
        }
    }

    #[test]
    fn membership_is_whole_or_not_there() {
        assert!(parse("--ft-log l --vm v").is_err());
        assert!(parse("--vm v --device d").is_err());
        assert_eq!(parse("").unwrap().membership(), None);
        let whole = parse("--ft-log l --vm v --device d").unwrap().membership().unwrap();
        assert_eq!((whole.vm.as_str(), whole.device.as_str()), ("v", "d"));
    }

    #[test]
    fn capabilities_are_json_and_only_on_request() {
        let asked = parse("--print-capabilities").unwrap();
        let text = asked.capabilities("block", &["read-only"]).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value, json!({ "type": "block", "features": ["read-only"] }));
        assert_eq!(parse("").unwrap().capabilities("block", &[]), None);
    }
}
