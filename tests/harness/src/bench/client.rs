//! A client in a closed loop: so many records in flight, the next one goes when an answer comes. It checks every answer.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::error::{HarnessError, IoContext};
use crate::ledger::{Answer, GENESIS, Hash, Op, Request, Status, chain};
use crate::netns::Namespace;
use crate::scenario::RECORDS_MAX;
use crate::witness::Witness;

/// Bytes of every record: the middle of what the protocol allows.
pub const PAYLOAD: usize = 128;
/// Bytes of the request that carries it.
pub const REQUEST: usize = 16 + PAYLOAD;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What one round showed.
#[derive(Debug, Clone, Default)]
pub struct Round {
    /// From the hand-over of each request to its answer.
    pub latencies_us: Vec<f64>,
    /// From the first request to the last answer.
    pub elapsed: Duration,
}

impl Round {
    /// Answered records a second.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a round has far less than 2^53 records")]
    pub fn throughput(&self) -> f64 {
        self.latencies_us.len() as f64 / self.elapsed.as_secs_f64()
    }
}

/// A connection to the ledger.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    sent: u64,
    answered: u64,
    hash: Hash,
    incoming: Vec<u8>,
}

impl Client {
    /// Connects to a ledger without records.
    ///
    /// # Errors
    /// When nobody answers before the deadline.
    pub fn connect(namespace: &Namespace, server: SocketAddr, deadline: Instant) -> Result<Self, HarnessError> {
        let stream = Witness::connect(namespace, server, deadline)?;
        stream
            .set_nodelay(true)
            .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
            .context(|| "set options of the client's socket".to_owned())?;
        Ok(Self {
            stream,
            sent: 0,
            answered: 0,
            hash: GENESIS,
            incoming: Vec::new(),
        })
    }

    /// Keeps `in_flight` records in flight for this long, at most `records` of them, and takes all answers.
    ///
    /// # Errors
    /// A broken connection, silence, or an answer that is not the one to this request.
    pub fn round(&mut self, in_flight: u64, length: Duration, records: u64) -> Result<Round, HarnessError> {
        let mut round = Round::default();
        let mut handed_over = VecDeque::new();
        let start = Instant::now();
        let last = self.sent.saturating_add(records).min(RECORDS_MAX);
        loop {
            if start.elapsed() < length {
                let upper = last.min(self.answered + in_flight);
                self.send(upper, &mut handed_over)?;
            }
            if self.answered == self.sent {
                break;
            }
            let now = self.receive(&mut handed_over, &mut round)?;
            round.elapsed = now - start;
        }
        Ok(round)
    }

    /// Sends all records up to this one, in one write.
    fn send(&mut self, upper: u64, handed_over: &mut VecDeque<Instant>) -> Result<(), HarnessError> {
        let mut bytes = Vec::new();
        let now = Instant::now();
        while self.sent < upper {
            self.sent += 1;
            let request = Request {
                op: Op::Append,
                n: self.sent,
                payload: payload(self.sent),
            };
            request.encode(&mut bytes);
            handed_over.push_back(now);
        }
        self.stream
            .write_all(&bytes)
            .context(|| "send records to the guest".to_owned())
    }

    /// Waits for bytes and takes every answer that is complete.
    fn receive(&mut self, handed_over: &mut VecDeque<Instant>, round: &mut Round) -> Result<Instant, HarnessError> {
        let mut chunk = [0; 16384];
        let count = self
            .stream
            .read(&mut chunk)
            .and_then(|count| match count {
                0 => Err(io::ErrorKind::UnexpectedEof.into()),
                count => Ok(count),
            })
            .context(|| format!("receive the answer to record {}", self.answered + 1))?;
        let now = Instant::now();
        self.incoming.extend_from_slice(&chunk[..count]);
        let mut taken = 0;
        while let Some((answer, size)) =
            Answer::decode(&self.incoming[taken..]).map_err(|source| HarnessError::Ledger {
                what: "the guest's answer".to_owned(),
                source,
            })?
        {
            taken += size;
            self.check(&answer)?;
            let sent = handed_over.pop_front().expect("as many answers as requests");
            round.latencies_us.push((now - sent).as_secs_f64() * 1e6);
        }
        self.incoming.drain(..taken);
        Ok(now)
    }

    fn check(&mut self, answer: &Answer) -> Result<(), HarnessError> {
        let n = self.answered + 1;
        let hash = chain(&self.hash, n, &payload(n));
        if self.answered == self.sent || answer.status != Status::Ok || answer.n != n || answer.hash != hash {
            return Err(HarnessError::Unexpected {
                awaited: format!("the answer to record {n}"),
                happened: format!("the guest answered {:?} for record {}", answer.status, answer.n),
                context: String::new(),
            });
        }
        self.answered = n;
        self.hash = hash;
        Ok(())
    }
}

/// Record n.
fn payload(n: u64) -> Vec<u8> {
    n.to_le_bytes().into_iter().cycle().take(PAYLOAD).collect()
}
