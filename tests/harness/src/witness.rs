//! The witness: a client outside both hosts that drives the ledger on one TCP connection and notes everything.
//!
//! Open loop: record n is due at its time whatever became of the ones before it, as many in flight as that makes. It never
//! reconnects. When every record is answered it asks again for all of them, then for a power off. It only notes; it is
//! [`crate::judge`] that judges.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::clock::now_ns;
use crate::error::{HarnessError, IoContext};
use crate::judge::{Connection, Exchange, Transcript};
use crate::ledger::{Answer, Op, PAYLOAD_MAX, Request, Status};
use crate::netns::Namespace;

/// What the witness is to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Seeds the payloads.
    pub seed: u64,
    /// Records to append.
    pub records: u64,
    /// Records a second.
    pub rate: u32,
    /// How long it may hear nothing, with requests outstanding, until it gives up.
    pub patience: Duration,
}

/// How far the witness is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Appends handed to the kernel.
    pub sent: u64,
    /// Appends answered.
    pub answered: u64,
    /// The witness is done.
    pub finished: bool,
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
}

/// A witness at work on its own thread.
#[derive(Debug)]
pub struct Witness {
    shared: Arc<Shared>,
    thread: JoinHandle<Transcript>,
}

impl Witness {
    /// Connects from `namespace`.
    ///
    /// # Errors
    /// When nobody answers before the deadline.
    pub fn connect(namespace: &Namespace, server: SocketAddr, deadline: Instant) -> Result<TcpStream, HarnessError> {
        let patience = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        namespace
            .run(|| TcpStream::connect_timeout(&server, patience))
            .context(|| format!("connect to the guest at {server}"))
    }

    /// Starts the witness on a connection.
    ///
    /// # Errors
    /// When the socket refuses its options, or no thread is to be had.
    pub fn start(stream: TcpStream, plan: Plan) -> Result<Self, HarnessError> {
        Self::start_and_hold(stream, plan, || ())
    }

    /// The same, but `before_power_off` must have returned before the witness asks for the power off.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_and_hold(
        stream: TcpStream,
        plan: Plan,
        before_power_off: impl FnOnce() + Send + 'static,
    ) -> Result<Self, HarnessError> {
        stream.set_nodelay(true).context(|| "set TCP_NODELAY".to_owned())?;
        stream
            .set_nonblocking(true)
            .context(|| "make the witness' socket non-blocking".to_owned())?;
        let shared = Arc::new(Shared::default());
        let observer = shared.clone();
        let thread = thread::Builder::new()
            .name("witness".to_owned())
            .spawn(move || {
                let mut client = Client::new(stream, plan, observer.clone(), Box::new(before_power_off));
                client.run();
                observer.update(|progress| progress.finished = true);
                client.into_transcript()
            })
            .context(|| "start the witness' thread".to_owned())?;
        Ok(Self { shared, thread })
    }

    /// Waits until `reached` holds for the progress; false when the witness ended before.
    #[must_use]
    pub fn wait_until(&self, reached: impl Fn(&Progress) -> bool) -> bool {
        let mut progress = self.shared.lock();
        // This ends: the witness finishes, when its patience is over at the latest.
        loop {
            if reached(&progress) {
                return true;
            }
            if progress.finished {
                return false;
            }
            progress = self.shared.news.wait(progress).expect("no holder of this lock panics");
        }
    }

    /// How far it is now.
    #[must_use]
    pub fn progress(&self) -> Progress {
        *self.shared.lock()
    }

    /// Waits for the end and takes the transcript.
    #[must_use]
    pub fn finish(self) -> Transcript {
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// The payload of record `n` of a run.
#[must_use]
pub fn payload(seed: u64, n: u64) -> Vec<u8> {
    let mut chance = ChaCha8Rng::seed_from_u64(seed);
    chance.set_stream(n);
    let mut bytes = vec![0; chance.random_range(1..=PAYLOAD_MAX)];
    chance.fill_bytes(&mut bytes);
    bytes
}

/// What the client does now. Each stage begins when everything of the one before is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Append,
    Audit,
    PowerOff,
    Done,
}

struct Client {
    stream: TcpStream,
    plan: Plan,
    shared: Arc<Shared>,
    start_ns: u64,
    stage: Stage,
    exchanges: Vec<Exchange>,
    /// Index of the exchange the next answer belongs to.
    next_answer: usize,
    outgoing: VecDeque<u8>,
    /// For each exchange not yet wholly written: its index and the bytes still to go until its end.
    unwritten: VecDeque<(usize, usize)>,
    incoming: Vec<u8>,
    /// When the last answer came, or the first request after a pause went.
    heard: Instant,
    connection: Connection,
    before_power_off: Option<Box<dyn FnOnce() + Send>>,
}

impl Client {
    fn new(stream: TcpStream, plan: Plan, shared: Arc<Shared>, before_power_off: Box<dyn FnOnce() + Send>) -> Self {
        Self {
            stream,
            plan,
            shared,
            start_ns: now_ns(),
            stage: Stage::Append,
            exchanges: Vec::new(),
            next_answer: 0,
            outgoing: VecDeque::new(),
            unwritten: VecDeque::new(),
            incoming: Vec::new(),
            heard: Instant::now(),
            connection: Connection::Intact,
            before_power_off: Some(before_power_off),
        }
    }

    fn into_transcript(self) -> Transcript {
        Transcript {
            exchanges: self.exchanges,
            connection: self.connection,
        }
    }

    fn run(&mut self) {
        while self.stage != Stage::Done && self.connection == Connection::Intact {
            self.make_requests();
            if !self.all_answered() && self.left().is_zero() {
                self.connection = Connection::Silent;
                return;
            }
            let worked = self.write().and_then(|()| self.wait()).and_then(|()| self.read());
            if let Err(error) = worked {
                self.connection = Connection::Broken {
                    t_ns: now_ns(),
                    reason: error.to_string(),
                };
            }
        }
    }

    fn appended(&self) -> u64 {
        // Only appends are made before the audit.
        if self.stage == Stage::Append {
            self.exchanges.len() as u64
        } else {
            self.plan.records
        }
    }

    fn due_ns(&self, n: u64) -> u64 {
        self.start_ns + (n - 1) * 1_000_000_000 / u64::from(self.plan.rate)
    }

    fn make_requests(&mut self) {
        match self.stage {
            Stage::Append => {
                let now = now_ns();
                while self.appended() < self.plan.records && self.due_ns(self.appended() + 1) <= now {
                    let n = self.appended() + 1;
                    self.request(Op::Append, n, payload(self.plan.seed, n), self.due_ns(n));
                }
                if self.appended() == self.plan.records && self.all_answered() {
                    self.audit();
                }
            }
            Stage::Audit if self.all_answered() => {
                self.stage = Stage::PowerOff;
                if let Some(wait) = self.before_power_off.take() {
                    wait();
                }
                self.request(Op::PowerOff, 0, Vec::new(), now_ns());
            }
            Stage::PowerOff if self.all_answered() => self.stage = Stage::Done,
            Stage::Audit | Stage::PowerOff | Stage::Done => {}
        }
    }

    /// Asks again, all at once, for everything that was acknowledged.
    fn audit(&mut self) {
        self.stage = Stage::Audit;
        let acknowledged: Vec<u64> = self
            .exchanges
            .iter()
            .filter(|exchange| matches!(&exchange.answer, Some((answer, _)) if answer.status == Status::Ok))
            .map(|exchange| exchange.request.n)
            .collect();
        let now = now_ns();
        self.request(Op::Head, 0, Vec::new(), now);
        for n in acknowledged {
            self.request(Op::Read, n, Vec::new(), now);
        }
    }

    fn all_answered(&self) -> bool {
        self.next_answer == self.exchanges.len()
    }

    fn request(&mut self, op: Op, n: u64, payload: Vec<u8>, due_ns: u64) {
        if self.all_answered() {
            self.heard = Instant::now();
        }
        let request = Request { op, n, payload };
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        self.unwritten.push_back((self.exchanges.len(), bytes.len()));
        self.outgoing.extend(bytes);
        self.exchanges.push(Exchange {
            request,
            due_ns,
            sent_ns: None,
            answer: None,
        });
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.stream.write(self.outgoing.as_slices().0) {
                Ok(written) => {
                    self.outgoing.drain(..written);
                    self.note_written(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn note_written(&mut self, mut written: usize) {
        let now = now_ns();
        let mut appends = 0;
        while let Some((index, left)) = self.unwritten.front_mut() {
            if *left > written {
                *left -= written;
                break;
            }
            written -= *left;
            let exchange = &mut self.exchanges[*index];
            exchange.sent_ns = Some(now);
            appends += u64::from(exchange.request.op == Op::Append);
            self.unwritten.pop_front();
        }
        if appends > 0 {
            self.shared.update(|progress| progress.sent += appends);
        }
    }

    /// What is left of our patience.
    fn left(&self) -> Duration {
        (self.heard + self.plan.patience).saturating_duration_since(Instant::now())
    }

    /// Until the socket is ready, the next record is due, or our patience is over.
    fn wait(&mut self) -> io::Result<()> {
        if self.stage == Stage::Done {
            return Ok(());
        }
        let mut wake = self.left();
        if self.stage == Stage::Append && self.appended() < self.plan.records {
            let due = Duration::from_nanos(self.due_ns(self.appended() + 1).saturating_sub(now_ns()));
            wake = wake.min(due);
        }
        let mut interest = PollFlags::POLLIN;
        if !self.outgoing.is_empty() {
            interest |= PollFlags::POLLOUT;
        }
        match ppoll(
            &mut [PollFd::new(self.stream.as_fd(), interest)],
            Some(TimeSpec::from_duration(wake)),
            None,
        ) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn read(&mut self) -> io::Result<()> {
        let mut chunk = [0; 65536];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) if self.stage == Stage::Done => return Ok(()),
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the guest")),
                Ok(count) => {
                    self.incoming.extend_from_slice(&chunk[..count]);
                    self.take_answers()?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn take_answers(&mut self) -> io::Result<()> {
        let now = now_ns();
        self.heard = Instant::now();
        let nonsense = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut taken = 0;
        let mut appends = 0;
        while let Some((answer, size)) =
            Answer::decode(&self.incoming[taken..]).map_err(|error| nonsense(format!("not an answer: {error}")))?
        {
            taken += size;
            let exchange = self
                .exchanges
                .get_mut(self.next_answer)
                .ok_or_else(|| nonsense("more answers than requests".to_owned()))?;
            exchange.answer = Some((answer, now));
            appends += u64::from(exchange.request.op == Op::Append);
            self.next_answer += 1;
        }
        self.incoming.drain(..taken);
        if self.stage == Stage::PowerOff && self.all_answered() {
            self.stage = Stage::Done;
        }
        if appends > 0 {
            self.shared.update(|progress| progress.answered += appends);
        }
        Ok(())
    }
}
