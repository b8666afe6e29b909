//! What a service manager is told: sd_notify(3), and nothing where there is none.
//!
//! ```text
//!  READY=1 once frontends can connect ─► WATCHDOG=1 from the device thread, twice an interval ─► STOPPING=1 when it drains
//! ```
//! The watchdog is fed by the thread that does the work: one that hangs is restarted. That thread waits for no manager: one that is too busy
//! to read is told less often.

use std::{env, ffi::OsStr, io, os::unix::net::UnixDatagram};

use sd_notify::NotifyState;
use tracing::warn;

/// The service manager of this process, if it has one.
#[derive(Debug)]
pub struct Service {
    speaks: bool,
    watchdog_every_ns: Option<u64>,
    watchdog_due_ns: u64,
}

impl Service {
    /// As the environment says (`NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`).
    #[must_use]
    pub fn from_environment() -> Self {
        let interval = sd_notify::watchdog_enabled();
        Self::new(interval.map(|interval| interval.as_nanos() as u64 / 2))
    }

    /// No service manager: for the threads that leave it to another.
    #[must_use]
    pub fn silent() -> Self {
        Self {
            speaks: false,
            ..Self::new(None)
        }
    }

    fn new(watchdog_every_ns: Option<u64>) -> Self {
        Self {
            speaks: true,
            watchdog_every_ns,
            watchdog_due_ns: 0,
        }
    }

    /// Frontends can connect.
    pub fn ready(&self) {
        tell(NotifyState::Ready);
    }

    /// The daemon drains and ends.
    pub fn stopping(&self) {
        if self.speaks {
            tell(NotifyState::Stopping);
        }
    }

    /// Feeds the watchdog when it is due; gives when to be called again.
    pub fn tick(&mut self, now_ns: u64) -> Option<u64> {
        let every_ns = self.watchdog_every_ns?;
        if now_ns >= self.watchdog_due_ns {
            feed();
            self.watchdog_due_ns = now_ns + every_ns;
        }
        Some(self.watchdog_due_ns)
    }
}

fn tell(state: NotifyState<'_>) {
    told(sd_notify::notify(&[state]));
}

fn feed() {
    if let Some(manager) = env::var_os("NOTIFY_SOCKET") {
        told(send_now(&manager, NotifyState::Watchdog));
    }
}

/// Tells the manager at this path, unless it has not read what it was told before.
fn send_now(manager: &OsStr, state: NotifyState<'_>) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect(manager)?;
    match socket.send(format!("{state}\n").as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        sent => sent.map(|_| ()),
    }
}

fn told(result: io::Result<()>) {
    match result {
        Ok(()) => {}
        // Nobody asked to be told.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => warn!(%error, "the service manager cannot be told"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_fed_when_it_is_due_and_not_before() {
        let mut service = Service::new(Some(100));
        assert_eq!(service.tick(1000), Some(1100));
        assert_eq!(service.tick(1099), Some(1100));
        assert_eq!(service.tick(1100), Some(1200));
        assert_eq!(Service::new(None).tick(5), None);
    }

    #[test]
    fn a_manager_that_reads_nothing_stops_nobody() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        // Many times what a socket's queue holds.
        for _ in 0..2_000 {
            send_now(path.as_os_str(), NotifyState::Watchdog).unwrap();
        }
        let mut said = [0; 64];
        let length = manager.recv(&mut said).unwrap();
        assert_eq!(&said[..length], b"WATCHDOG=1\n");
    }
}
