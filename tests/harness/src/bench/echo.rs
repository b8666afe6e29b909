//! The round trip of the logging channel, as any two programs would see it: a TCP echo over the same wire.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{HarnessError, IoContext};
use crate::topology::{HostId, Topology};

/// How long an echo may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// An echo server on host B and a connection to it from host A.
#[derive(Debug)]
pub struct Echo {
    stream: TcpStream,
    server: Option<JoinHandle<()>>,
}

impl Echo {
    /// Starts the server and connects.
    ///
    /// # Errors
    /// When the network of the two hosts refuses.
    pub fn start(topology: &Topology) -> Result<Self, HarnessError> {
        let action = || "set an echo up between the hosts".to_owned();
        let address = SocketAddr::new((*HostId::B.log_address().ip()).into(), 0);
        let listener = topology
            .host(HostId::B)
            .run(|| TcpListener::bind(address))
            .context(action)?;
        let address = listener.local_addr().context(action)?;
        let server = thread::Builder::new()
            .name("echo".to_owned())
            // Ends when the client's end is closed; an error is one at the client's end too.
            .spawn(move || {
                let _ = serve(&listener);
            })
            .context(action)?;
        let stream = topology
            .host(HostId::A)
            .run(|| TcpStream::connect_timeout(&address, PATIENCE))
            .context(action)?;
        stream
            .set_nodelay(true)
            .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
            .context(action)?;
        Ok(Self {
            stream,
            server: Some(server),
        })
    }

    /// Times `count` round trips of `bytes` bytes, one after the other, in microseconds.
    ///
    /// # Errors
    /// A broken connection.
    pub fn round_trips_us(&mut self, count: usize, bytes: usize) -> Result<Vec<f64>, HarnessError> {
        let mut message = vec![0x5a; bytes];
        let one = |_| {
            let start = Instant::now();
            self.stream.write_all(&message)?;
            self.stream.read_exact(&mut message)?;
            Ok(start.elapsed().as_secs_f64() * 1e6)
        };
        (0..count)
            .map(one)
            .collect::<io::Result<_>>()
            .context(|| "echo over the logging wire".to_owned())
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // Broken already: the server has seen it too.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn serve(listener: &TcpListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut bytes = [0; 4096];
    loop {
        let count = stream.read(&mut bytes)?;
        if count == 0 {
            return Ok(());
        }
        stream.write_all(&bytes[..count])?;
    }
}

#[cfg(all(test, feature = "real-hosts"))]
mod tests {
    use super::*;

    #[test]
    fn every_byte_comes_back() {
        let topology = Topology::new().expect("namespaces");
        let mut echo = Echo::start(&topology).expect("an echo");
        assert_eq!(echo.round_trips_us(20, 5000).expect("round trips").len(), 20);
    }
}
