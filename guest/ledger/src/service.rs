//! The TCP service: a fixed number of sessions on one port, one ledger, one round at a time.

use crate::disk::Disk;
use crate::machine::static_cell::StaticCell;
use crate::stream::Tcp;
use ledger::limits::{ACK_DELAY_MS, LISTENERS_MIN};
use ledger_core::chain::Head;
use ledger_core::ledger::{Buffers, Ledger};
use ledger_core::limits::{
    POWER_OFF_GRACE_NS, SESSION_IDLE_NS, SESSIONS_MAX, SOCKET_RECEIVE_BYTES, SOCKET_TRANSMIT_BYTES,
};
use ledger_core::session::{Round, Session};
use smoltcp::iface::{SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Duration;

struct SocketMemory {
    receive: [u8; SOCKET_RECEIVE_BYTES],
    transmit: [u8; SOCKET_TRANSMIT_BYTES],
}

static SOCKETS: StaticCell<[SocketStorage<'static>; SESSIONS_MAX]> =
    StaticCell::new([SocketStorage::EMPTY; SESSIONS_MAX]);
static SOCKET_MEMORY: StaticCell<[SocketMemory; SESSIONS_MAX]> = StaticCell::new(
    [const {
        SocketMemory {
            receive: [0; SOCKET_RECEIVE_BYTES],
            transmit: [0; SOCKET_TRANSMIT_BYTES],
        }
    }; SESSIONS_MAX],
);

static SESSIONS: StaticCell<[Session; SESSIONS_MAX]> = StaticCell::new([const { Session::new() }; SESSIONS_MAX]);

/// The service.
pub(crate) struct Service {
    port: u16,
    ledger: Ledger<'static>,
    sockets: SocketSet<'static>,
    handles: [SocketHandle; SESSIONS_MAX],
    sessions: &'static mut [Session; SESSIONS_MAX],
    /// Who begins first: each in turn.
    turn: usize,
    powering_off: Option<usize>,
    /// When the machine goes down, acknowledged or not.
    power_off_ns: Option<u64>,
}

impl Service {
    /// A service that goes on from `head`, listening on `port`.
    pub(crate) fn new(buffers: &'static mut Buffers, head: Head, capacity: u64, port: u16) -> Self {
        let mut sockets = SocketSet::new(&mut SOCKETS.take()[..]);
        let mut memory = SOCKET_MEMORY.take().iter_mut();
        let handles = core::array::from_fn(|_| {
            let memory = memory.next().expect("there is memory for every session");
            let receive = SocketBuffer::new(&mut memory.receive[..]);
            let mut socket = Socket::new(receive, SocketBuffer::new(&mut memory.transmit[..]));
            socket.set_nagle_enabled(false);
            socket.set_ack_delay(Some(Duration::from_millis(ACK_DELAY_MS)));
            sockets.add(socket)
        });
        let mut service = Service {
            port,
            ledger: Ledger::new(buffers, head, capacity),
            sockets,
            handles,
            sessions: SESSIONS.take(),
            turn: 0,
            powering_off: None,
            power_off_ns: None,
        };
        service.listen(0);
        service
    }

    /// The sockets, for smoltcp.
    pub(crate) fn sockets(&mut self) -> &mut SocketSet<'static> {
        &mut self.sockets
    }

    /// Everything that can be done now: completions, requests, answers, one group to the disk.
    pub(crate) fn step(&mut self, disk: &mut Disk, now_ns: u64) {
        while let Some(completion) = disk.poll() {
            let first = self.ledger.committed().n + 1;
            if let Some(settled) = self.ledger.complete(completion, disk) {
                for session in self.sessions.iter_mut() {
                    session.settle(|n| self.ledger.append_answer(n, first, settled));
                }
            }
        }
        self.listen(now_ns);
        for offset in 0..SESSIONS_MAX {
            let index = (self.turn + offset) % SESSIONS_MAX;
            let socket = self.sockets.get_mut::<Socket<'_>>(self.handles[index]);
            if socket.may_send() || socket.may_recv() {
                let mut round = Round {
                    session: index,
                    now_ns,
                    ledger: &mut self.ledger,
                    disk,
                    powering_off: &mut self.powering_off,
                };
                self.sessions[index].step(&mut Tcp(socket), &mut round);
            }
        }
        self.turn = (self.turn + 1) % SESSIONS_MAX;
        self.ledger.submit(disk);
    }

    /// Sessions whose client is gone listen again.
    fn listen(&mut self, now_ns: u64) {
        let mut listening = self.count(State::Listen);
        for (handle, session) in self.handles.iter().zip(self.sessions.iter_mut()) {
            let socket = self.sockets.get_mut::<Socket<'_>>(*handle);
            let free = match socket.state() {
                // A socket that was aborted keeps the endpoint until its RST is out.
                State::Closed => socket.remote_endpoint().is_none(),
                State::TimeWait => listening < LISTENERS_MIN,
                _ => false,
            };
            if free {
                socket.abort();
                socket
                    .listen(self.port)
                    .expect("the port is not 0 and the socket is closed");
                session.reset(now_ns, &mut self.ledger);
                listening += 1;
            }
        }
    }

    fn count(&self, state: State) -> usize {
        self.handles
            .iter()
            .filter(|handle| self.sockets.get::<Socket<'_>>(**handle).state() == state)
            .count()
    }

    /// If every session is taken, the one that has been idle longest, and for long enough, makes room. Returns when to look
    /// again.
    pub(crate) fn make_room(&mut self, now_ns: u64) -> Option<u64> {
        if self.count(State::Listen) > 0 {
            return None;
        }
        let mut oldest: Option<usize> = None;
        for (index, session) in self.sessions.iter().enumerate() {
            if session.is_answered()
                && oldest.is_none_or(|other| session.active_ns() < self.sessions[other].active_ns())
            {
                oldest = Some(index);
            }
        }
        let oldest = oldest?;
        let deadline_ns = self.sessions[oldest].active_ns() + SESSION_IDLE_NS;
        if now_ns < deadline_ns {
            return Some(deadline_ns);
        }
        self.sockets.get_mut::<Socket<'_>>(self.handles[oldest]).abort();
        // The RST goes out with the next frames, then the socket listens.
        Some(now_ns)
    }

    /// Whether a client asked for power off and has its answer, or will not take it. Else, when to look again.
    pub(crate) fn power_off(&mut self, now_ns: u64) -> Result<(), Option<u64>> {
        let Some(index) = self.powering_off else {
            return Err(None);
        };
        let deadline_ns = *self.power_off_ns.get_or_insert(now_ns + POWER_OFF_GRACE_NS);
        let socket = self.sockets.get::<Socket<'_>>(self.handles[index]);
        let delivered = self.sessions[index].is_answered() && socket.send_queue() == 0;
        if self.ledger.is_settled() && (delivered || now_ns >= deadline_ns) {
            Ok(())
        } else {
            Err(Some(deadline_ns))
        }
    }
}
