//! What the guest does: it sends as fast as it can, or it answers one request after the other.

use std::{
    net::UdpSocket,
    path::Path,
    time::{Duration, Instant},
};

use super::{
    backend::{Backend, GUEST_MAC},
    testpmd::Testpmd,
};
use crate::error::{HarnessError, IoContext};

/// The host's address on the TAP.
pub(super) const HOST: &str = "10.77.0.1";
/// The guest's.
pub(super) const GUEST: &str = "10.77.0.10";
/// Bytes of a request's payload.
pub(super) const REQUEST_BYTES: usize = 64;
/// Requests of a round.
pub(super) const REQUESTS: usize = 3000;
const WARM_UP: Duration = Duration::from_millis(300);
const MEASURED: Duration = Duration::from_secs(1);
/// How long the guest's first frame may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a request may take before the guest is known to answer.
const FIRST_ANSWER: Duration = Duration::from_millis(100);
/// And afterwards.
const ANSWER: Duration = Duration::from_secs(5);

fn guest(backend: &Backend, directory: &Path, arguments: &[&str]) -> Result<Testpmd, HarnessError> {
    let port = format!(
        "net_virtio_user0,path={},queues=1,mac={GUEST_MAC}",
        backend.socket().display()
    );
    Testpmd::start("guest", directory, 1, &[port], arguments)
}

/// Frames of `bytes` bytes a second that the TAP takes from a guest that sends as fast as it can.
pub(super) fn transmit(backend: &mut Backend, directory: &Path, bytes: usize) -> Result<f64, HarnessError> {
    let size = format!("--txpkts={bytes}");
    let before = backend.frames()?;
    let mut guest = guest(backend, directory, &["--forward-mode=txonly", &size])?;
    let deadline = Instant::now() + PATIENCE;
    // A few are not the guest's: the kernel's own.
    while backend.frames()? < before + 1000 {
        guest.check()?;
        backend.check()?;
        if Instant::now() > deadline {
            return Err(HarnessError::Deadline {
                awaited: "frames of the guest".to_owned(),
                context: String::new(),
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(WARM_UP);
    let (start, first) = (Instant::now(), backend.frames()?);
    std::thread::sleep(MEASURED);
    let (took, last) = (start.elapsed(), backend.frames()?);
    guest.check()?;
    backend.check()?;
    Ok((last - first) as f64 / took.as_secs_f64())
}

/// Times requests, one after the other, in microseconds: from the host's call to the guest's answer. Gives the guest too, which polls on.
pub(super) fn requests_us(backend: &mut Backend, directory: &Path) -> Result<(Vec<f64>, Testpmd), HarnessError> {
    let mut guest = guest(backend, directory, &["--forward-mode=5tswap"])?;
    let action = || "send requests to the guest".to_owned();
    let socket = UdpSocket::bind((HOST, 0)).context(action)?;
    socket.connect((GUEST, 7)).context(action)?;
    socket.set_read_timeout(Some(FIRST_ANSWER)).context(action)?;
    let mut number: u64 = 0;
    let mut ask = || {
        number += 1;
        let mut request = [0x5a; REQUEST_BYTES];
        request[..8].copy_from_slice(&number.to_le_bytes());
        let mut answer = [0; REQUEST_BYTES];
        let start = Instant::now();
        socket.send(&request)?;
        // A late answer to an earlier request is none to this one.
        while answer != request {
            socket.recv(&mut answer)?;
        }
        Ok::<_, std::io::Error>(start.elapsed().as_secs_f64() * 1e6)
    };
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = ask() {
        guest.check()?;
        backend.check()?;
        if Instant::now() > deadline {
            return Err(error).context(action);
        }
    }
    socket.set_read_timeout(Some(ANSWER)).context(action)?;
    let times = (0..REQUESTS / 10 + REQUESTS)
        .map(|_| ask())
        .collect::<Result<Vec<_>, _>>()
        .context(action)?;
    guest.check()?;
    backend.check()?;
    // The first tenth warms up.
    Ok((times[REQUESTS / 10..].to_vec(), guest))
}
