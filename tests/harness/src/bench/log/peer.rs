//! What the log is compared with: plain TCP over the same wire, as any two programs would use it.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use super::identity::Identities;
use crate::netns::Namespace;

/// Bytes that a stream's sender hands to the kernel at a time.
const CHUNK_BYTES: usize = 64 * 1024;

/// Where a connection goes from and to.
#[derive(Debug, Clone, Copy)]
pub(in crate::bench) struct Wire<'a> {
    /// How it is called in rows.
    pub(in crate::bench) name: &'static str,
    /// The primary's side and its address.
    pub(in crate::bench) a: (&'a Namespace, Ipv4Addr),
    /// The backup's side and its address.
    pub(in crate::bench) b: (&'a Namespace, Ipv4Addr),
}

/// A stream's speed and price.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stream {
    /// From the first byte to the far end's word that it has the last.
    pub(super) seconds: f64,
    /// Processor time of both ends.
    pub(super) cpu_seconds: f64,
}

impl Wire<'_> {
    /// Runs `far` on a connection's far end and `near` on its near one.
    fn talk<N: Send, F: Send>(
        &self,
        near: impl FnOnce(TcpStream) -> io::Result<N> + Send,
        far: impl FnOnce(TcpStream) -> io::Result<F> + Send,
    ) -> io::Result<(N, F)> {
        let listener = self.b.0.run(|| TcpListener::bind((self.b.1, 0)))?;
        let address: SocketAddr = listener.local_addr()?;
        thread::scope(|scope| {
            let far = scope.spawn(move || {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                far(stream)
            });
            let near = self.a.0.run(|| {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                near(stream)
            })?;
            let far = far.join().map_err(|_| io::Error::other("the far end panicked"))??;
            Ok((near, far))
        })
    }

    /// Times `count` round trips of `bytes` bytes, one after the other, in microseconds.
    ///
    /// # Errors
    /// A broken connection.
    pub(in crate::bench) fn echo_us(&self, count: usize, bytes: usize) -> io::Result<Vec<f64>> {
        let near = |mut stream: TcpStream| {
            let mut message = vec![0x5a; bytes];
            let one = |_| {
                let start = Instant::now();
                stream.write_all(&message)?;
                stream.read_exact(&mut message)?;
                Ok(start.elapsed().as_secs_f64() * 1e6)
            };
            (0..count).map(one).collect::<io::Result<Vec<_>>>()
        };
        let far = |mut stream: TcpStream| {
            let mut message = vec![0; bytes];
            for _ in 0..count {
                stream.read_exact(&mut message)?;
                stream.write_all(&message)?;
            }
            Ok(())
        };
        self.talk(near, far).map(|(times, ())| times)
    }

    /// Sends `bytes` bytes one way, in a TLS session where identities are given.
    ///
    /// # Errors
    /// A broken connection.
    pub(super) fn stream(&self, bytes: usize, identities: Option<&Identities>) -> io::Result<Stream> {
        let near = |stream: TcpStream| match identities {
            Some(identities) => send(identities.connected(stream)?, bytes),
            None => send(stream, bytes),
        };
        let far = |stream: TcpStream| match identities {
            Some(identities) => receive(identities.accepted(stream)?, bytes),
            None => receive(stream, bytes),
        };
        let ((seconds, near_cpu), far_cpu) = self.talk(near, far)?;
        Ok(Stream {
            seconds,
            cpu_seconds: near_cpu + far_cpu,
        })
    }
}

/// The sending end of a stream: how long it took, after a byte each way (a session's handshake is no part of it), and what it cost.
fn send(mut stream: impl Read + Write, bytes: usize) -> io::Result<(f64, f64)> {
    let chunk = vec![0x5a; CHUNK_BYTES];
    stream.write_all(&[0])?;
    stream.flush()?;
    stream.read_exact(&mut [0])?;
    let (start, cpu_before) = (Instant::now(), thread_cpu_seconds()?);
    let mut left = bytes;
    while left > 0 {
        let piece = left.min(chunk.len());
        stream.write_all(&chunk[..piece])?;
        left -= piece;
    }
    stream.flush()?;
    stream.read_exact(&mut [0])?;
    Ok((start.elapsed().as_secs_f64(), thread_cpu_seconds()? - cpu_before))
}

/// The receiving end.
fn receive(mut stream: impl Read + Write, bytes: usize) -> io::Result<f64> {
    let mut chunk = vec![0; CHUNK_BYTES];
    stream.read_exact(&mut [0])?;
    stream.write_all(&[1])?;
    stream.flush()?;
    let cpu_before = thread_cpu_seconds()?;
    let mut left = bytes;
    while left > 0 {
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= count;
    }
    stream.write_all(&[1])?;
    stream.flush()?;
    Ok(thread_cpu_seconds()? - cpu_before)
}

/// Of a thread that was made for one thing.
fn thread_cpu_seconds() -> io::Result<f64> {
    let usage: Usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(microseconds as f64 / 1e6)
}
