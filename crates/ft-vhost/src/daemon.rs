//! Conventions of a daemon: the log goes to stderr, SIGTERM and SIGINT end it in order.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    process::ExitCode,
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use tracing::{error, info};

use crate::exit::{End, Status};

/// Readable once the daemon is asked to end.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Takes SIGTERM and SIGINT over. Call it before any thread starts.
    ///
    /// # Errors
    /// As signalfd(2).
    pub fn take() -> io::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(
            &set,
            SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
        )?))
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Sets up the log, runs the daemon and says how it ended.
pub fn main(run: impl FnOnce() -> Result<(), End>) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    match run() {
        Ok(()) => {
            info!("ended in order");
            Status::Ordinary.into()
        }
        Err(end) => {
            error!("{end}");
            end.status().into()
        }
    }
}
