//! A file fetched over HTTP on one connection, slowly enough to be still under way when something happens to the machine.
//!
//! The file is known beforehand: lines of eight bytes that count from 1. Whatever is lost, repeated or put in another order shows, and where.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt::RcvBuf};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::error::{HarnessError, IoContext};
use crate::netns::Namespace;

/// The file's name on the server.
pub const PATH: &str = "/numbers";
/// Bytes of a line.
const LINE: u64 = 8;
/// Longest header of an answer.
const HEADER_MAX: usize = 4096;
/// What the client's kernel may hold: little, so that the server cannot be done long before the client.
const RECEIVE_BUFFER: usize = 32 * 1024;
/// Bytes taken at a time.
const PIECE: usize = 4096;

/// How it went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Download {
    /// What the server said it would send.
    pub bytes: u64,
    /// What came.
    pub received: u64,
    /// Of that, what had come when the fault struck.
    pub received_at_fault: Option<u64>,
    /// SHA-256 of what came.
    pub sha256: String,
    /// Everything that is not as it must be.
    pub problems: Vec<String>,
}

#[derive(Debug, Default)]
struct Progress {
    received: u64,
    finished: bool,
}

#[derive(Debug, Default)]
struct Shared {
    progress: Mutex<Progress>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().expect("no holder of this lock panics")
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock());
        self.news.notify_all();
    }

    fn wait_until(&self, reached: impl Fn(&Progress) -> bool) {
        let mut progress = self.lock();
        while !reached(&progress) && !progress.finished {
            progress = self.news.wait(progress).expect("no holder of this lock panics");
        }
    }
}

/// A download under way on its own thread.
#[derive(Debug)]
pub struct Downloading {
    shared: Arc<Shared>,
    /// A second handle of the socket, to ask what the kernel holds.
    socket: TcpStream,
    received_at_fault: Option<u64>,
    thread: JoinHandle<Download>,
}

nix::ioctl_read_bad!(
    /// Bytes that have arrived and are not read yet.
    unread_bytes,
    libc::FIONREAD,
    libc::c_int
);

impl Downloading {
    /// Connects from `namespace` and asks for the file. It is taken at such a pace that it lasts `duration`. Returns when its first byte is here.
    ///
    /// # Errors
    /// When nobody answers in time.
    pub fn start(
        namespace: &Namespace,
        server: SocketAddr,
        duration: Duration,
        patience: Duration,
    ) -> Result<Self, HarnessError> {
        let stream = namespace
            .run(|| TcpStream::connect_timeout(&server, patience))
            .context(|| format!("connect to the guest's HTTP server at {server}"))?;
        let configured = setsockopt(&stream, RcvBuf, &RECEIVE_BUFFER)
            .map_err(io::Error::from)
            .and_then(|()| stream.set_read_timeout(Some(patience)))
            .and_then(|()| stream.try_clone());
        let socket = configured.context(|| "configure the download's socket".to_owned())?;
        let shared = Arc::new(Shared::default());
        let observer = shared.clone();
        let thread = thread::Builder::new()
            .name("download".to_owned())
            .spawn(move || {
                let download = fetch(stream, duration, &observer);
                observer.update(|progress| progress.finished = true);
                download
            })
            .context(|| "start the download's thread".to_owned())?;
        shared.wait_until(|progress| progress.received > 0);
        Ok(Self {
            shared,
            socket,
            received_at_fault: None,
            thread,
        })
    }

    /// Notes how far it is, kernel's buffer included: called just before the fault.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn note_fault(&mut self) -> Result<(), HarnessError> {
        let mut unread: libc::c_int = 0;
        // SAFETY: FIONREAD writes one int, into one that outlives the call.
        unsafe { unread_bytes(self.socket.as_raw_fd(), &raw mut unread) }
            .context(|| "ask for the unread bytes".to_owned())?;
        let unread = u64::try_from(unread).expect("a count");
        self.received_at_fault = Some(self.shared.lock().received + unread);
        Ok(())
    }

    /// A function that waits for its end.
    pub fn end(&self) -> impl FnOnce() + Send + use<> {
        let shared = self.shared.clone();
        move || shared.wait_until(|progress| progress.finished)
    }

    /// Waits for its end and judges it.
    #[must_use]
    pub fn finish(self) -> Download {
        let mut download = self
            .thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        download.received_at_fault = self.received_at_fault;
        if download
            .received_at_fault
            .is_some_and(|received| received >= download.bytes)
        {
            download
                .problems
                .push("the download was over before the fault: nothing was shown".to_owned());
        }
        download
    }
}

/// Reads the whole answer, until the server closes.
fn fetch(mut stream: TcpStream, duration: Duration, shared: &Shared) -> Download {
    let mut download = Download::default();
    let mut digest = Sha256::new();
    let read = read_answer(&mut stream, duration, shared, &mut download, &mut digest);
    download.sha256 = hex(digest.finalize());
    if let Err(error) = read {
        download
            .problems
            .push(format!("the download broke after {} bytes: {error}", download.received));
    } else if download.received != download.bytes {
        download.problems.push(format!(
            "the download ended after {} of {} bytes",
            download.received, download.bytes
        ));
    } else if download.sha256 != hex(expected_digest(download.bytes)) {
        download
            .problems
            .push("the download's SHA-256 is not that of the file".to_owned());
    }
    download
}

fn read_answer(
    stream: &mut TcpStream,
    duration: Duration,
    shared: &Shared,
    download: &mut Download,
    digest: &mut Sha256,
) -> io::Result<()> {
    stream.write_all(format!("GET {PATH} HTTP/1.0\r\n\r\n").as_bytes())?;
    let (bytes, mut piece) = read_header(stream)?;
    download.bytes = bytes;
    let started = Instant::now();
    let mut wrong = false;
    loop {
        if !piece.is_empty() {
            if !wrong && let Some(at) = first_difference(download.received, &piece) {
                wrong = true;
                download
                    .problems
                    .push(format!("the download differs from the file at byte {at}"));
            }
            digest.update(&piece);
            download.received += piece.len() as u64;
            shared.update(|progress| progress.received = download.received);
        }
        // Not waiting for anything: this is the pace.
        let due = duration.mul_f64(ratio(download.received, bytes));
        thread::sleep((started + due).saturating_duration_since(Instant::now()));
        piece.resize(PIECE, 0);
        match stream.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(count) => piece.truncate(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => piece.clear(),
            Err(error) => return Err(error),
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "files are far smaller than 2^53 bytes")]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        1.0
    } else {
        (part as f64 / whole as f64).min(1.0)
    }
}

/// The promised length, and what of the body came with the header.
fn read_header(stream: &mut TcpStream) -> io::Result<(u64, Vec<u8>)> {
    let nonsense = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut header = Vec::new();
    loop {
        let mut piece = [0; 512];
        let count = stream.read(&mut piece)?;
        header.extend_from_slice(&piece[..count]);
        if let Some(end) = header.windows(4).position(|window| window == b"\r\n\r\n") {
            let text = String::from_utf8_lossy(&header[..end]).into_owned();
            if !text.lines().next().is_some_and(|status| status.contains(" 200 ")) {
                return Err(nonsense(&format!("the server answered: {text}")));
            }
            let length = text.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length")
                    .then(|| value.trim().parse().ok())?
            });
            let length = length.ok_or_else(|| nonsense("the server's answer has no Content-Length"))?;
            return Ok((length, header.split_off(end + 4)));
        }
        if count == 0 || header.len() > HEADER_MAX {
            return Err(nonsense("the server's answer has no header"));
        }
    }
}

/// The line in which byte `offset` lies.
fn line(offset: u64) -> [u8; LINE as usize] {
    let text = format!("{:07}\n", offset / LINE + 1);
    text.as_bytes()
        .try_into()
        .expect("the file is shorter than ten million lines")
}

/// Where `piece`, which begins at `offset` of the file, is not the file.
fn first_difference(offset: u64, piece: &[u8]) -> Option<u64> {
    (offset..)
        .zip(piece)
        .find(|(at, byte)| line(*at)[usize::try_from(at % LINE).expect("below 8")] != **byte)
        .map(|(at, _)| at)
}

fn expected_digest(bytes: u64) -> impl AsRef<[u8]> {
    let mut digest = Sha256::new();
    let mut offset = 0;
    while offset < bytes {
        let left = usize::try_from((bytes - offset).min(LINE)).expect("at most 8");
        digest.update(&line(offset)[..left]);
        offset += LINE;
    }
    digest.finalize()
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn file(bytes: u64) -> Vec<u8> {
        (0..bytes)
            .map(|at| line(at)[usize::try_from(at % LINE).expect("small")])
            .collect()
    }

    /// What becomes of an answer with this body, which was promised to be so long.
    fn fetched(promised: u64, body: Vec<u8>) -> Download {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut request = [0; 256];
            let count = stream.read(&mut request).expect("a request");
            assert!(request[..count].starts_with(b"GET /numbers HTTP/1.0\r\n"));
            let header = format!("HTTP/1.0 200 OK\r\ncontent-length: {promised}\r\n\r\n");
            stream.write_all(header.as_bytes()).expect("sent");
            stream.write_all(&body).expect("sent");
        });
        let stream = TcpStream::connect(address).expect("a connection");
        let download = fetch(stream, Duration::ZERO, &Shared::default());
        server.join().expect("the server is done");
        download
    }

    #[test]
    fn the_whole_file_is_content() {
        let download = fetched(20_000, file(20_000));
        assert_eq!(download.problems, Vec::<String>::new());
        assert_eq!((download.bytes, download.received), (20_000, 20_000));
        assert_eq!(&file(20)[..], b"0000001\n0000002\n0000");
    }

    #[test]
    fn what_is_lost_repeated_or_cut_shows() {
        let mut lost = file(20_000);
        lost.drain(8000..8008);
        assert_eq!(
            fetched(19_992, lost).problems[0],
            "the download differs from the file at byte 8006"
        );
        let mut repeated = file(16_000);
        repeated.extend(&file(16_000)[8000..]);
        assert!(fetched(24_000, repeated).problems[0].contains("differs from the file at byte 160"));
        assert_eq!(
            fetched(20_000, file(777)).problems,
            ["the download ended after 777 of 20000 bytes"]
        );
    }

    #[test]
    fn an_answer_that_is_none_is_a_problem() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut request = [0; 256];
            let count = stream.read(&mut request).expect("a request");
            assert!(request[..count].starts_with(b"GET "));
            stream.write_all(b"HTTP/1.0 404 Not Found\r\n\r\n").expect("sent");
        });
        let stream = TcpStream::connect(address).expect("a connection");
        let download = fetch(stream, Duration::ZERO, &Shared::default());
        server.join().expect("the server is done");
        assert!(download.problems[0].contains("404"), "{:?}", download.problems);
    }
}
