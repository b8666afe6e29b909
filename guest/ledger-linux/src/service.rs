//! The service: a fixed number of clients, one ledger, one round at a time.

use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::time::Duration;

use ledger_core::chain::Head;
use ledger_core::ledger::{Buffers, Ledger};
use ledger_core::limits::{POWER_OFF_GRACE_NS, SESSION_IDLE_NS, SESSIONS_MAX};
use ledger_core::session::{Round, Session};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};

use crate::client::Client;
use crate::disk::Disk;

/// How often it is looked whether the answer to a POWEROFF has arrived: nothing announces that.
const DELIVERY_POLL: Duration = Duration::from_millis(20);

/// A place for a client.
#[derive(Default)]
struct Place {
    client: Option<Client>,
    session: Session,
}

/// The service.
pub struct Service<'b> {
    listener: TcpListener,
    disk: Disk,
    ledger: Ledger<'b>,
    places: Vec<Place>,
    /// Who begins first: each in turn.
    turn: usize,
    powering_off: Option<usize>,
    /// When it ends, acknowledged or not.
    power_off_ns: Option<u64>,
}

impl<'b> Service<'b> {
    /// A service that goes on from `head`, the end of the chain on `disk`.
    ///
    /// # Errors
    /// When the listener refuses to be non-blocking.
    pub fn new(listener: TcpListener, disk: Disk, buffers: &'b mut Buffers, head: Head) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let ledger = Ledger::new(buffers, head, disk.sectors());
        Ok(Self {
            listener,
            disk,
            ledger,
            places: (0..SESSIONS_MAX).map(|_| Place::default()).collect(),
            turn: 0,
            powering_off: None,
            power_off_ns: None,
        })
    }

    /// Serves until a client asks for power off and has its answer, or will not take it.
    ///
    /// # Errors
    /// When waiting or accepting fails.
    pub fn run(&mut self) -> io::Result<()> {
        let mut timeout = None;
        loop {
            self.wait(timeout)?;
            let now_ns = uptime_ns();
            self.accept(now_ns)?;
            self.transfer(now_ns, Client::fill);
            self.answer(now_ns);
            let power_off = match self.power_off(now_ns) {
                Ok(()) => return Ok(()),
                Err(again) => again,
            };
            timeout = [power_off, self.make_room(now_ns)].into_iter().flatten().min();
        }
    }

    /// Until a socket is ready or the time is over.
    fn wait(&self, timeout: Option<Duration>) -> io::Result<()> {
        let mut interests: Vec<PollFd<'_>> = self
            .places
            .iter()
            .filter_map(|place| place.client.as_ref())
            .map(|client| PollFd::new(client.as_fd(), client.interest()))
            .collect();
        if interests.len() < SESSIONS_MAX {
            interests.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
        }
        // Rounded up: one that is over too early would go round for nothing.
        let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
            PollTimeout::try_from(timeout.as_millis() + 1).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut interests, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn accept(&mut self, now_ns: u64) -> io::Result<()> {
        while let Some(place) = self.places.iter_mut().find(|place| place.client.is_none()) {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    // A connection that is gone already refuses its options.
                    place.client = Client::new(socket).ok();
                    place.session.reset(now_ns, &mut self.ledger);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Moves bytes of every client; a connection that is over or no more makes room.
    fn transfer(&mut self, now_ns: u64, mut work: impl FnMut(&mut Client) -> io::Result<()>) {
        for place in &mut self.places {
            let Some(client) = &mut place.client else { continue };
            if work(client).is_err() || client.is_over() {
                place.client = None;
                place.session.reset(now_ns, &mut self.ledger);
            }
        }
    }

    /// Answers and sends. Room that sending made is room for answers to requests that are here already, and no socket tells of those.
    fn answer(&mut self, now_ns: u64) {
        loop {
            self.step(now_ns);
            let unsent = self.unsent_bytes();
            self.transfer(now_ns, Client::drain);
            if self.unsent_bytes() >= unsent {
                return;
            }
        }
    }

    fn unsent_bytes(&self) -> usize {
        let clients = self.places.iter().filter_map(|place| place.client.as_ref());
        clients.map(Client::unsent_bytes).sum()
    }

    /// Everything that can be done now. The disk finishes what it is given at once, so this goes on until
    /// nobody waits for it, or for room that an answer made.
    fn step(&mut self, now_ns: u64) {
        loop {
            let mut answered = false;
            for offset in 0..SESSIONS_MAX {
                let index = (self.turn + offset) % SESSIONS_MAX;
                let place = &mut self.places[index];
                let Some(client) = &mut place.client else { continue };
                let mut round = Round {
                    session: index,
                    now_ns,
                    ledger: &mut self.ledger,
                    disk: &mut self.disk,
                    powering_off: &mut self.powering_off,
                };
                answered |= place.session.step(client, &mut round);
            }
            self.turn = (self.turn + 1) % SESSIONS_MAX;
            self.ledger.submit(&mut self.disk);
            if !self.complete() && !answered {
                return;
            }
        }
    }

    /// Whether anything was complete.
    fn complete(&mut self) -> bool {
        let mut any = false;
        while let Some(completion) = self.disk.poll() {
            any = true;
            let first = self.ledger.committed().n + 1;
            if let Some(settled) = self.ledger.complete(completion, &mut self.disk) {
                for place in &mut self.places {
                    place.session.settle(|n| self.ledger.append_answer(n, first, settled));
                }
            }
        }
        any
    }

    /// If every place is taken, the client that has been idle longest, and for long enough, makes room. Returns when to look
    /// again.
    fn make_room(&mut self, now_ns: u64) -> Option<Duration> {
        if self.places.iter().any(|place| place.client.is_none()) {
            return None;
        }
        let oldest = self
            .places
            .iter_mut()
            .filter(|place| place.session.is_answered())
            .min_by_key(|place| place.session.active_ns())?;
        let left_ns = (oldest.session.active_ns() + SESSION_IDLE_NS).saturating_sub(now_ns);
        if left_ns == 0 {
            oldest.client = None;
            oldest.session.reset(now_ns, &mut self.ledger);
        }
        Some(Duration::from_nanos(left_ns))
    }

    /// Whether a client asked for power off and has its answer, or will not take it. Else, how soon to look again.
    fn power_off(&mut self, now_ns: u64) -> Result<(), Option<Duration>> {
        let Some(index) = self.powering_off else {
            return Err(None);
        };
        let deadline_ns = *self.power_off_ns.get_or_insert(now_ns + POWER_OFF_GRACE_NS);
        let place = &self.places[index];
        let delivered = place.client.as_ref().is_none_or(Client::is_delivered) && place.session.is_answered();
        if delivered || now_ns >= deadline_ns {
            Ok(())
        } else {
            Err(Some(DELIVERY_POLL))
        }
    }
}

/// Time since the machine's power-on.
fn uptime_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists on every Linux");
    let part = |value: i64| u64::try_from(value).expect("monotonic time is not negative");
    part(now.tv_sec()) * 1_000_000_000 + part(now.tv_nsec())
}
