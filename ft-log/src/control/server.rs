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
use serde_json::json;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio_uring::net::{TcpStream, UnixStream};
use tracing::warn;

use super::{
    archive,
    metrics::{self, MetricsAddress},
    protocol::{Answer, REQUEST_BYTES_MAX, Request},
    shared::{Shared, role_name},
};

/// Connections at a time, of either kind.
const CONNECTIONS_MAX: usize = 16;
/// A connection that says nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(60);
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

    /// Listens, and starts the threads.
    ///
    /// # Errors
    /// What it cannot listen on.
    pub fn start(self, shared: Arc<Shared>) -> Result<(), ListenError> {
        if self.socket.is_none() && self.metrics.is_none() {
            return Ok(());
        }
        let (accepted, connections) = channel(CONNECTIONS_MAX);
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
        thread("ft-log-control", move || {
            tokio_uring::builder().entries(64).start(serve(connections, shared));
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
    fn take(taken: &Rc<Cell<usize>>) -> Option<Self> {
        let count = taken.get();
        (count < CONNECTIONS_MAX).then(|| {
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

async fn serve(mut connections: Receiver<Connection>, shared: Arc<Shared>) {
    let taken = Rc::new(Cell::new(0));
    let registry = Rc::new(metrics::registry(Arc::clone(&shared)));
    while let Some(connection) = connections.recv().await {
        let is_orders = matches!(connection, Connection::Orders(_));
        let stream = match connection {
            Connection::Orders(stream) | Connection::UnixMetrics(stream) => Stream::Unix(UnixStream::from_std(stream)),
            Connection::TcpMetrics(stream) => Stream::Tcp(TcpStream::from_std(stream)),
        };
        let (seat, shared, registry) = (Seat::take(&taken), Arc::clone(&shared), Rc::clone(&registry));
        tokio_uring::spawn(async move {
            match seat {
                None => drop(stream.write(line(&Answer::Error("too many connections".into()))).await),
                Some(seat) if is_orders => serve_orders(&stream, &shared, seat).await,
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

async fn serve_orders(stream: &Stream, shared: &Shared, _seat: Seat) {
    let mut bytes = Vec::new();
    loop {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let answer = match serde_json::from_slice(&bytes[..end]) {
                Ok(request) => answer(request, shared).await,
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

async fn answer(request: Request, shared: &Shared) -> Answer {
    let identity = &shared.identity;
    let journal = || {
        identity
            .journal
            .as_deref()
            .ok_or("this side keeps no journal (--journal)".to_owned())
    };
    let answered = match request {
        Request::Status {} => Ok(shared.status()),
        Request::List {} => {
            let now = shared.figures();
            Ok(json!([{ "vm": identity.vm, "role": role_name(now.role), "generation": now.generation }]))
        }
        Request::Rotate {} => journal().map(|_| {
            shared.order_rotate();
            json!("a new segment begins with the next entry")
        }),
        Request::Stop {} => {
            shared.order_stop();
            Ok(json!("stopping"))
        }
        Request::Segments {} => journal().and_then(|directory| archive::segments(directory, &identity.vm)),
        Request::Entries {
            generation,
            segment,
            from,
            limit,
        } => match journal() {
            Ok(directory) => {
                archive::entries(directory, &identity.vm, Generation(generation), segment, from, limit).await
            }
            Err(reason) => Err(reason),
        },
    };
    match answered {
        Ok(value) => Answer::Ok(value),
        Err(reason) => Answer::Error(reason),
    }
}
