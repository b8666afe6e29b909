//! The model guest: a ledger whose whole state is a chain of hashes, so that a fork or a rollback of any kind shows.
//!
//! It is deterministic in the entries it applies. Recording and replaying call the same [`Guest::apply`]; what a recording
//! guest saw of the world is in the entries and nowhere else. Every stop carries the digest of everything before it.
//!
//! ```text
//!  Input ──► waiting ──Deliver──► ledger ──► ready ──Kick──► outputs (marked by the kick)
//! ```

use std::collections::VecDeque;

use ft_protocol::{Body, Position, Stop};

/// Clients a guest keeps apart.
pub const CLIENTS_MAX: usize = 3;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Append a record.
    Append {
        /// Its content.
        value: u32,
    },
    /// How many records there are, and the chain up to there.
    Read,
    /// Answer, then power off.
    PowerOff,
}

/// A numbered request; the same number asked again gets the same answer again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who asks.
    pub client: u8,
    /// The client's number for it, from 1.
    pub id: u32,
    /// What is asked.
    pub operation: Operation,
}

impl Request {
    /// The frame a client sends.
    #[must_use]
    pub fn encode(&self) -> [u8; 10] {
        let (kind, value) = match self.operation {
            Operation::Append { value } => (1, value),
            Operation::Read => (2, 0),
            Operation::PowerOff => (3, 0),
        };
        let mut bytes = [0; 10];
        bytes[0] = self.client;
        bytes[1] = kind;
        bytes[2..6].copy_from_slice(&self.id.to_le_bytes());
        bytes[6..].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    /// Reads what [`Request::encode`] wrote; `None` for anything else.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 10] = bytes.try_into().ok()?;
        let id = u32::from_le_bytes([bytes[2], bytes[3], bytes[4], bytes[5]]);
        let value = u32::from_le_bytes([bytes[6], bytes[7], bytes[8], bytes[9]]);
        let operation = match bytes[1] {
            1 => Operation::Append { value },
            2 => Operation::Read,
            3 => Operation::PowerOff,
            _ => return None,
        };
        (usize::from(bytes[0]) < CLIENTS_MAX).then_some(Self {
            client: bytes[0],
            id,
            operation,
        })
    }
}

/// The guest's answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// To whom.
    pub client: u8,
    /// To which request.
    pub id: u32,
    /// Records in the ledger when the request was served, its own included.
    pub order: u32,
    /// The chain at that record.
    pub chain: u64,
}

/// A frame the guest transmits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// Number of this output among all of the guest, from 0.
    pub index: u32,
    /// Digest of the guest's execution up to the kick that sends it.
    pub history: u64,
    /// What it says.
    pub answer: Answer,
}

/// The entry does not belong to this execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diverged(pub String);

/// The guest, its devices' bounce buffers included.
#[derive(Clone, Debug, Default)]
pub struct Guest {
    exits: u64,
    digest: u64,
    now_ns: u64,
    booted: bool,
    off: bool,
    power_off_wanted: bool,
    inputs: u64,
    waiting: VecDeque<Request>,
    ready: Vec<Answer>,
    outputs: u32,
    ledger: Vec<u64>,
    last_answers: [Option<Answer>; CLIENTS_MAX],
}

pub(crate) fn mix(hash: u64, value: u64) -> u64 {
    let mut z = (hash.rotate_left(23) ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Guest {
    /// The stop at which the next entry is written.
    #[must_use]
    pub fn stop(&self) -> Stop {
        Stop {
            position: Position {
                exits: self.exits,
                offset: 0,
                rip: mix(self.digest, 1),
                rcx: self.exits % 7,
            },
            digest: self.digest,
        }
    }

    /// Whether power-on is behind it.
    #[must_use]
    pub fn is_booted(&self) -> bool {
        self.booted
    }

    /// Whether it powered off.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.off
    }

    /// Whether power-off is the next thing it does.
    #[must_use]
    pub fn wants_power_off(&self) -> bool {
        self.power_off_wanted && self.ready.is_empty() && !self.off
    }

    /// Number of the last input the network device logged.
    #[must_use]
    pub fn inputs(&self) -> u64 {
        self.inputs
    }

    /// Whether inputs wait in the bounce buffer for their delivery.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether frames wait for a kick.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Virtual time, ns.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// The chain at each record.
    #[must_use]
    pub fn ledger(&self) -> &[u64] {
        &self.ledger
    }

    /// Applies one entry; gives the frames that leave at it.
    ///
    /// # Errors
    /// [`Diverged`] if the entry was not written by an execution equal to this one.
    pub fn apply(&mut self, body: &Body<'_>) -> Result<Vec<Output>, Diverged> {
        if matches!(body, Body::Synced { .. } | Body::Configuration(_)) {
            // They are about the pair, and no part of the execution.
            return Ok(Vec::new());
        }
        if self.off {
            // Devices may log inputs behind the power-off; nobody is there to see them.
            return match body {
                Body::Input { .. } => Ok(Vec::new()),
                _ => Err(Diverged(format!("a {} after the power-off", body.name()))),
            };
        }
        if let Some(stop) = body.stop() {
            let own = self.stop();
            if !self.booted || stop != own {
                return Err(Diverged(format!(
                    "{} at exit {} digest {:016x}, the entry says exit {} digest {:016x}",
                    body.name(),
                    own.position.exits,
                    own.digest,
                    stop.position.exits,
                    stop.digest
                )));
            }
            self.exits += 1;
            self.digest = mix(self.digest, self.exits);
        }
        let mut outputs = Vec::new();
        match *body {
            Body::Boot { wall_ns, .. } => {
                if self.booted {
                    return Err(Diverged("a second power-on".into()));
                }
                self.booted = true;
                self.digest = mix(self.digest, wall_ns);
            }
            Body::Input { sequence, payload } => self.input(sequence, payload)?,
            Body::Deliver { through, .. } => self.deliver(through)?,
            Body::Time { now_ns, .. } => {
                self.now_ns = now_ns;
                self.digest = mix(self.digest, now_ns);
            }
            Body::Kick(_) => outputs = self.kick(),
            Body::Console { .. } | Body::Sync(_) => {}
            Body::PowerOff { .. } => self.off = true,
            Body::Pages { .. }
            | Body::State { .. }
            | Body::Write { .. }
            | Body::Zeroes { .. }
            | Body::Flush
            | Body::Synced { .. }
            | Body::Compare { .. }
            | Body::Transferred
            | Body::Configuration(_) => {
                return Err(Diverged(format!("this guest makes no {} entry", body.name())));
            }
        }
        Ok(outputs)
    }

    fn input(&mut self, sequence: u64, payload: &[u8]) -> Result<(), Diverged> {
        if sequence != self.inputs + 1 {
            return Err(Diverged(format!("input {sequence} after input {}", self.inputs)));
        }
        let request = Request::decode(payload).ok_or_else(|| Diverged("an input that no client sent".into()))?;
        self.inputs = sequence;
        self.waiting.push_back(request);
        Ok(())
    }

    fn deliver(&mut self, through: u64) -> Result<(), Diverged> {
        if through != self.inputs {
            return Err(Diverged(format!(
                "delivery through input {through}, the last is {}",
                self.inputs
            )));
        }
        for request in std::mem::take(&mut self.waiting) {
            self.serve(&request);
        }
        Ok(())
    }

    fn serve(&mut self, request: &Request) {
        let slot = usize::from(request.client);
        if let Some(last) = self.last_answers[slot] {
            if request.id == last.id {
                self.ready.push(last);
            }
            if request.id <= last.id {
                return;
            }
        }
        let head = self.ledger.last().copied().unwrap_or(0);
        match request.operation {
            Operation::Append { value } => {
                let what = u64::from(value) << 32 | u64::from(request.id) << 8 | u64::from(request.client);
                self.ledger.push(mix(mix(head, what), self.digest));
            }
            Operation::Read => {}
            Operation::PowerOff => self.power_off_wanted = true,
        }
        let answer = Answer {
            client: request.client,
            id: request.id,
            order: self.ledger.len() as u32,
            chain: self.ledger.last().copied().unwrap_or(0),
        };
        self.digest = mix(self.digest, answer.chain);
        self.last_answers[slot] = Some(answer);
        self.ready.push(answer);
    }

    fn kick(&mut self) -> Vec<Output> {
        let history = self.digest;
        let first = self.outputs;
        self.outputs += self.ready.len() as u32;
        let numbered = std::mem::take(&mut self.ready).into_iter().zip(first..);
        numbered
            .map(|(answer, index)| Output { index, history, answer })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot() -> Guest {
        let mut guest = Guest::default();
        guest
            .apply(&Body::Boot {
                fingerprint: [0; 32],
                wall_ns: 5,
                devices: b"net0",
            })
            .unwrap();
        guest
    }

    fn serve(guest: &mut Guest, request: Request, now_ns: u64) -> Vec<Output> {
        let payload = request.encode();
        let sequence = guest.inputs() + 1;
        let stop = guest.stop();
        guest.apply(&Body::Time { stop, now_ns }).unwrap();
        guest
            .apply(&Body::Input {
                sequence,
                payload: &payload,
            })
            .unwrap();
        let (stop, through) = (guest.stop(), sequence);
        guest.apply(&Body::Deliver { stop, through }).unwrap();
        guest.apply(&Body::Kick(guest.stop())).unwrap()
    }

    fn append(id: u32, value: u32) -> Request {
        Request {
            client: 1,
            id,
            operation: Operation::Append { value },
        }
    }

    #[test]
    fn requests_read_back() {
        for operation in [Operation::Append { value: 9 }, Operation::Read, Operation::PowerOff] {
            let request = Request {
                client: 2,
                id: 77,
                operation,
            };
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
        assert_eq!(Request::decode(&[9; 10]), None);
        assert_eq!(Request::decode(&[0; 9]), None);
    }

    #[test]
    fn equal_entries_make_equal_guests_and_a_repeat_gets_the_first_answer() {
        let (mut one, mut two) = (boot(), boot());
        for id in 1..5 {
            assert_eq!(
                serve(&mut one, append(id, id * 3), 100),
                serve(&mut two, append(id, id * 3), 100)
            );
        }
        assert_eq!(one.stop(), two.stop());
        let first = serve(&mut one, append(5, 1), 200)[0];
        let again = serve(&mut one, append(5, 1), 300)[0];
        assert_eq!((first.answer, first.index + 1), (again.answer, again.index));
        assert_eq!(one.ledger().len(), 5);
    }

    #[test]
    fn a_different_time_is_another_execution() {
        let (mut one, mut two) = (boot(), boot());
        let mine = serve(&mut one, append(1, 1), 100)[0];
        let other = serve(&mut two, append(1, 1), 101)[0];
        assert_ne!(mine.answer.chain, other.answer.chain);
        assert!(two.apply(&Body::Sync(one.stop())).is_err());
    }

    #[test]
    fn an_entry_that_comes_twice_or_not_at_all_is_seen() {
        let mut guest = boot();
        let stop = guest.stop();
        guest.apply(&Body::Sync(stop)).unwrap();
        assert!(guest.apply(&Body::Sync(stop)).is_err());
        let payload = append(1, 1).encode();
        let skipped = Body::Input {
            sequence: 2,
            payload: &payload,
        };
        assert!(guest.apply(&skipped).is_err());
    }
}
