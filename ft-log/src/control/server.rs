//! The threads that accept and answer. Connections, their memory and their time are bounded; one that asks for too much is told so and closed.

use std::{
    cell::Cell,
    io,
    net::TcpListener,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use ft_protocol::Generation;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio_uring::net::{TcpStream, UnixStream};
use tracing::warn;

use super::{
    archive, configure,
    metrics::{self, MetricsAddress},
    protocol::{Answer, REQUEST_BYTES_MAX, Request},
    shared::{Shared, StoppedBy, role_name},
};

/// Connections to the control socket at a time.
const ORDERS_MAX: usize = 16;
/// Connections for metrics at a time: a crowd of them keeps no operator out.
const SCRAPES_MAX: usize = 8;
/// Submission queue entries of the management plane.
const RING_ENTRIES: u32 = 64;
/// A connection that says nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(60);
/// How long an order to change the times may wait for its place in the log.
const CONFIGURE: Duration = Duration::from_secs(5);
/// After an error of accept that may go away by itself, such as too many open files.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Where the management plane listens.
#[derive(Clone, Debug, Default)]
pub struct Control {
    /// JSON over a unix socket.
    pub socket: Option<PathBuf>,
    /// Metrics.
    pub metrics: Option<MetricsAddress>,
}

/// Why it does not listen.
#[derive(Debug)]
pub struct ListenError {
    /// Which address.
    pub address: String,
    /// Why not.
    pub source: io::Error,
}

impl Control {
    /// The socket files it makes.
    pub fn socket_files(&self) -> impl Iterator<Item = &Path> {
        let metrics = self.metrics.as_ref().and_then(|address| match address {
            MetricsAddress::Unix(path) => Some(path.as_path()),
            MetricsAddress::Loopback(_) => None,
        });
        self.socket.as_deref().into_iter().chain(metrics)
    }

    /// Listens for all of `vms`, and starts the threads.
    ///
    /// # Errors
    /// What it cannot listen on.
    pub fn start(self, vms: Vec<Arc<Shared>>) -> Result<(), ListenError> {
        if self.socket.is_none() && self.metrics.is_none() {
            return Ok(());
        }
        let (accepted, connections) = channel(ORDERS_MAX + SCRAPES_MAX);
        if let Some(path) = &self.socket {
            let listener = private_socket(path)?;
            let accept = move || listener.accept().map(|(stream, _)| Connection::Orders(stream));
            accept_on(accept, accepted.clone())?;
        }
        match self.metrics {
            None => {}
            Some(MetricsAddress::Unix(path)) => {
                let listener = private_socket(&path)?;
                let accept = move || listener.accept().map(|(stream, _)| Connection::UnixMetrics(stream));
                accept_on(accept, accepted)?;
            }
            Some(MetricsAddress::Loopback(address)) => {
                let listener = TcpListener::bind(address).map_err(|source| ListenError {
                    address: address.to_string(),
                    source,
                })?;
                let accept = move || listener.accept().map(|(stream, _)| Connection::TcpMetrics(stream));
                accept_on(accept, accepted)?;
            }
        }
        // The runtime belongs to its thread, and what it needs of the kernel may be missing.
        let (started, is_started) = std::sync::mpsc::sync_channel(1);
        thread("ft-log-control", move || {
            match tokio_uring::Runtime::new(tokio_uring::builder().entries(RING_ENTRIES)) {
                Ok(runtime) => {
                    let _ = started.send(Ok(()));
                    runtime.block_on(serve(connections, vms));
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
        let gone = |_| Err(io::Error::other("its thread ended"));
        is_started.recv().unwrap_or_else(gone).map_err(|source| ListenError {
            address: "the management plane's io_uring".into(),
            source,
        })
    }
}

/// A new connection, and what it is for.
enum Connection {
    Orders(std::os::unix::net::UnixStream),
    UnixMetrics(std::os::unix::net::UnixStream),
    TcpMetrics(std::net::TcpStream),
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), ListenError> {
    let spawned = std::thread::Builder::new().name(name.into()).spawn(body);
    spawned.map(drop).map_err(|source| ListenError {
        address: "a thread of the management plane".into(),
        source,
    })
}

/// Accepts in a thread that does nothing else: tokio-uring 0.5 cannot listen on a unix socket where the kernel refuses SO_REUSEPORT for
/// it, as 6.12 does.
fn accept_on(
    accept: impl Fn() -> io::Result<Connection> + Send + 'static,
    accepted: Sender<Connection>,
) -> Result<(), ListenError> {
    thread("ft-log-accept", move || {
        loop {
            match accept() {
                Ok(connection) => {
                    if accepted.blocking_send(connection).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    warn!("accepting a connection of the management plane: {error}");
                    std::thread::sleep(ACCEPT_RETRY);
                }
            }
        }
    })
}

/// Only this user may give orders.
fn private_socket(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError {
        address: path.display().to_string(),
        source,
    };
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// A connection of either kind.
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    /// Reads on behind what is in `bytes`; `false` at the end, after an error, and after a long silence.
    async fn read(&self, bytes: &mut Vec<u8>) -> bool {
        let piece = Vec::with_capacity(REQUEST_BYTES_MAX);
        let read = async {
            match self {
                Self::Unix(stream) => stream.read(piece).await,
                Self::Tcp(stream) => stream.read(piece).await,
            }
        };
        match tokio::time::timeout(IDLE, read).await {
            Ok((Ok(count), piece)) if count > 0 => {
                bytes.extend_from_slice(&piece[..count]);
                true
            }
            _ => false,
        }
    }

    /// Writes; `false` if the other end is gone or does not read.
    async fn write(&self, text: String) -> bool {
        let bytes = text.into_bytes();
        let write = async {
            match self {
                Self::Unix(stream) => stream.write_all(bytes).await,
                Self::Tcp(stream) => stream.write_all(bytes).await,
            }
        };
        matches!(tokio::time::timeout(IDLE, write).await, Ok((Ok(()), _)))
    }
}

/// One of the connections there may be; free again when it is dropped.
struct Seat(Rc<Cell<usize>>);

impl Seat {
    fn take(taken: &Rc<Cell<usize>>, most: usize) -> Option<Self> {
        let count = taken.get();
        (count < most).then(|| {
            taken.set(count + 1);
            Self(Rc::clone(taken))
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

async fn serve(mut connections: Receiver<Connection>, vms: Vec<Arc<Shared>>) {
    let (orders, scrapes) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let registry = Rc::new(metrics::registry(vms.clone()));
    let vms: Rc<[_]> = vms.into();
    while let Some(connection) = connections.recv().await {
        let is_orders = matches!(connection, Connection::Orders(_));
        let stream = match connection {
            Connection::Orders(stream) | Connection::UnixMetrics(stream) => Stream::Unix(UnixStream::from_std(stream)),
            Connection::TcpMetrics(stream) => Stream::Tcp(TcpStream::from_std(stream)),
        };
        let seat = match is_orders {
            true => Seat::take(&orders, ORDERS_MAX),
            false => Seat::take(&scrapes, SCRAPES_MAX),
        };
        let (vms, registry) = (Rc::clone(&vms), Rc::clone(&registry));
        tokio_uring::spawn(async move {
            match seat {
                None => drop(stream.write(line(&Answer::Error("too many connections".into()))).await),
                Some(seat) if is_orders => serve_orders(&stream, &vms, seat).await,
                Some(seat) => serve_metrics(&stream, &registry, seat).await,
            }
        });
    }
}

async fn serve_metrics(stream: &Stream, registry: &Registry, _seat: Seat) {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() > REQUEST_BYTES_MAX || !stream.read(&mut request).await {
            return;
        }
    }
    stream.write(metrics::respond(&request, registry)).await;
}

async fn serve_orders(stream: &Stream, vms: &[Arc<Shared>], _seat: Seat) {
    let mut bytes = Vec::new();
    loop {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let answer = match serde_json::from_slice(&bytes[..end]) {
                Ok(request) => answer(request, vms).await.map_or_else(Answer::Error, Answer::Ok),
                Err(error) => Answer::Error(format!("this is no request: {error}")),
            };
            bytes.drain(..=end);
            if !stream.write(line(&answer)).await {
                return;
            }
        }
        if bytes.len() > REQUEST_BYTES_MAX {
            let reason = format!("a request has at most {REQUEST_BYTES_MAX} bytes");
            stream.write(line(&Answer::Error(reason))).await;
            return;
        }
        if !stream.read(&mut bytes).await {
            return;
        }
    }
}

fn line(answer: &Answer) -> String {
    let mut line = serde_json::to_string(answer).unwrap_or_default();
    line.push('\n');
    line
}

/// The VM that is meant.
fn named<'a>(vms: &'a [Arc<Shared>], vm: Option<&str>) -> Result<&'a Shared, String> {
    let names = || {
        let names: Vec<_> = vms.iter().map(|vm| vm.identity.vm.as_str()).collect();
        names.join(", ")
    };
    match (vm, vms) {
        (None, [only]) => Ok(only),
        (None, _) => Err(format!("say which VM (--vm); there are: {}", names())),
        (Some(name), _) => {
            let found = vms.iter().find(|vm| vm.identity.vm == name);
            let found = found.map(Arc::as_ref);
            found.ok_or_else(|| format!("there is no VM '{name}' here; there are: {}", names()))
        }
    }
}

fn journal_of(vm: &Shared) -> Result<&Path, String> {
    let journal = vm.identity.journal.as_deref();
    journal.ok_or_else(|| "this side keeps no journal (--journal)".into())
}

async fn answer(request: Request, vms: &[Arc<Shared>]) -> Result<Value, String> {
    match request {
        Request::Status { vm: None } if vms.len() > 1 => Ok(vms.iter().map(|vm| vm.status()).collect()),
        Request::Status { vm } => Ok(named(vms, vm.as_deref())?.status()),
        Request::List {} => {
            let show = |vm: &Arc<Shared>| {
                let now = vm.figures();
                json!({ "vm": vm.identity.vm, "role": role_name(now.role), "generation": now.generation })
            };
            Ok(vms.iter().map(show).collect())
        }
        Request::Rotate { vm } => {
            let vm = named(vms, vm.as_deref())?;
            journal_of(vm)?;
            vm.order_rotate()?;
            Ok(json!("a new segment begins with the next entry"))
        }
        Request::Configure { vm, change } => {
            let vm = named(vms, vm.as_deref())?;
            let answered = vm.order_configure(change)?;
            match tokio::time::timeout(CONFIGURE, answered).await {
                Ok(Ok(answer)) => answer.map(|(lsn, timing)| json!({ "lsn": lsn.0, "timing": configure::show(&timing) })),
                Ok(Err(_)) => Err("this side ended before it had written the change down".into()),
                Err(_) => Err(
                    "the log is at a standstill and has not taken the change yet; it will when it moves again (ft-log status shows the times in force)".into(),
                ),
            }
        }
        Request::Stop { vm: None } => {
            vms.iter().for_each(|vm| vm.order_stop(StoppedBy::Control));
            Ok(json!("stopping"))
        }
        Request::Stop { vm } => {
            let vm = named(vms, vm.as_deref())?;
            if let Some(ended) = vm.ended() {
                return Err(format!("VM '{}' is over already: {}", vm.identity.vm, ended.reason));
            }
            vm.order_stop(StoppedBy::Control);
            Ok(json!("stopping"))
        }
        Request::Segments { vm } => {
            let vm = named(vms, vm.as_deref())?;
            archive::segments(journal_of(vm)?, &vm.identity.vm)
        }
        Request::Entries {
            vm,
            generation,
            segment,
            from,
            limit,
        } => {
            let vm = named(vms, vm.as_deref())?;
            let directory = journal_of(vm)?;
            archive::entries(directory, &vm.identity.vm, Generation(generation), segment, from, limit).await
        }
    }
}
