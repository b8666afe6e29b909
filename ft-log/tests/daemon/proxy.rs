//! A relay between the two daemons of a pair: connections of the logging channel can be cut, stalled and kept half open while
//! heartbeats go on.
//!
//! ```text
//!   A ──tcp──► PB ──from PA's address──► B          what A takes for B is PB, what B takes for A is PA
//!   A ◄─udp──► PB ◄──► PA ◄──udp──► B
//! ```

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    sync::{Arc, Condvar, Mutex},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};

use crate::world::World;

/// What happens to connections.
#[derive(Default)]
struct Rules {
    /// Connections up to this number pass nothing on.
    stalled_through: usize,
    /// New connections are taken, and nothing of theirs is passed on until this ends.
    mute: bool,
    /// New connections are closed at once.
    refuse: bool,
    connections: Vec<[TcpStream; 2]>,
    accepted: usize,
    ended: bool,
}

#[derive(Clone, Default)]
struct Shared(Arc<(Mutex<Rules>, Condvar)>);

impl Shared {
    fn change(&self, change: impl FnOnce(&mut Rules)) {
        change(&mut self.0.0.lock().unwrap());
        self.0.1.notify_all();
    }

    fn wait(&self, until: impl Fn(&Rules) -> bool) {
        let rules = self.0.0.lock().unwrap();
        drop(
            self.0
                .1
                .wait_while(rules, |rules| !rules.ended && !until(rules))
                .unwrap(),
        );
    }
}

pub(crate) struct Proxy {
    shared: Shared,
}

impl Proxy {
    /// Stands between the hosts of `world`, which have told their daemons the proxy's addresses.
    pub(crate) fn new(world: &World) -> Self {
        let shared = Shared::default();
        let [a, b, as_a, as_b] = world.proxied().map(|address| address.parse::<SocketAddr>().unwrap());
        let [from_a, from_b] = [as_b, as_a].map(|address| UdpSocket::bind(address).unwrap());
        for (from, to, peer) in [(&from_a, &from_b, b), (&from_b, &from_a, a)] {
            let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            std::thread::spawn(move || {
                let mut datagram = [0; 512];
                while let Ok(length) = from.recv(&mut datagram) {
                    // The receiver may be gone.
                    let _ = to.send_to(&datagram[..length], peer);
                }
            });
        }
        let listener = TcpListener::bind(as_b).unwrap();
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                accepted(&accepting, stream, as_a, b);
            }
        });
        Self { shared }
    }

    /// Cuts every connection there is.
    pub(crate) fn cut(&self) {
        self.shared.change(|rules| {
            for streams in std::mem::take(&mut rules.connections) {
                streams.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
            }
        });
    }

    /// Nothing arrives on the connections there are, and no end is told; later ones work.
    pub(crate) fn wedge(&self) {
        self.shared.change(|rules| rules.stalled_through = rules.accepted);
    }

    /// Nothing arrives on any connection.
    pub(crate) fn wedge_for_good(&self) {
        self.shared.change(|rules| rules.stalled_through = usize::MAX);
    }

    /// New connections are closed at once.
    pub(crate) fn refuse(&self) {
        self.shared.change(|rules| rules.refuse = true);
    }

    /// New connections are taken, and hear nothing.
    pub(crate) fn mute(&self, mute: bool) {
        self.shared.change(|rules| rules.mute = mute);
    }

    /// Waits until this many connections were accepted since the start.
    pub(crate) fn wait_accepted(&self, count: usize) {
        self.shared.wait(|rules| rules.accepted >= count);
    }

    pub(crate) fn accepted(&self) -> usize {
        self.shared.0.0.lock().unwrap().accepted
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
        self.shared.change(|rules| rules.ended = true);
    }
}

/// Connects to `to` from the address that it takes for its peer's.
fn connect_from(from: SocketAddr, to: SocketAddr) -> Option<TcpStream> {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).ok()?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(from.ip(), 0))).ok()?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to)).ok()?;
    Some(fd.into())
}

fn accepted(shared: &Shared, near: TcpStream, from: SocketAddr, to: SocketAddr) {
    let far = connect_from(from, to);
    let mut number = 0;
    let mut both = None;
    // Whoever sees that it was accepted can cut it.
    shared.change(|rules| {
        rules.accepted += 1;
        number = rules.accepted;
        if let Some(far) = far.filter(|_| !rules.refuse && !rules.ended) {
            both = Some([near.try_clone().unwrap(), far.try_clone().unwrap()]);
            rules.connections.push([near, far]);
        }
    });
    let Some(both) = both else { return };
    for (source, sink) in [(0, 1), (1, 0)] {
        let (mut source, mut sink) = (both[source].try_clone().unwrap(), both[sink].try_clone().unwrap());
        let shared = shared.clone();
        std::thread::spawn(move || {
            let mut bytes = vec![0; 64 * 1024];
            while let Ok(length @ 1..) = source.read(&mut bytes) {
                shared.wait(|rules| number > rules.stalled_through && !rules.mute);
                if sink.write_all(&bytes[..length]).is_err() {
                    break;
                }
            }
            shared.wait(|rules| number > rules.stalled_through);
            let _ = sink.shutdown(Shutdown::Both);
        });
    }
}
