//! One client: requests are taken from the receive buffer in order, begun as soon as the ledger takes them, and answered in
//! order.
//!
//! ```text
//! receive buffer ──begin──► pending (in the group / being read / answered) ──front first──► transmit buffer
//! ```
//!
//! A request is begun only if its answer is sure to find room, so a client that does not read holds up nobody but itself.
//! What is not begun stays in the receive buffer, and TCP's window slows the client.

use crate::ledger::{Begun, BlockDevice, Ledger, ReadSlot};
use crate::limits::SESSION_PENDING_MAX;
use crate::protocol::{ANSWER_BYTES_MAX, Answer, Operation, Parsed, REQUEST_BYTES_MAX, Status, parse};

/// A connection: what has arrived and is not taken yet, and room for what is to go.
pub trait Stream {
    /// Copies the front of what has arrived; returns how much, which is all of it or `buffer` full.
    fn peek(&mut self, buffer: &mut [u8]) -> usize;

    /// Takes so many bytes from the front, or all there are.
    fn consume(&mut self, bytes: usize);

    /// How many bytes `send` takes now.
    fn room(&self) -> usize;

    /// Sends bytes for which there is room. A connection that is going down may drop them.
    fn send(&mut self, bytes: &[u8]);

    /// The client will send no more than what has arrived.
    fn is_half_closed(&self) -> bool;

    /// Closes our direction once everything is sent. May be called again.
    fn close(&mut self);
}

#[derive(Clone, Copy)]
enum Pending {
    Appending(u64),
    Reading(ReadSlot),
    Answered(Answer),
}

/// What all sessions share in a round.
pub struct Round<'a, 'b, D> {
    /// Whose turn it is.
    pub session: usize,
    /// Virtual time.
    pub now_ns: u64,
    /// The ledger.
    pub ledger: &'a mut Ledger<'b>,
    /// Its disk.
    pub disk: &'a mut D,
    /// The session that asked for power off, if one did: no other begins anything.
    pub powering_off: &'a mut Option<usize>,
}

/// A session.
pub struct Session {
    pending: [Pending; SESSION_PENDING_MAX],
    first: usize,
    count: usize,
    /// No more requests; close once everything is answered.
    closing: bool,
    /// Whether there is a client.
    connected: bool,
    active_ns: u64,
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A session without a client.
    pub const fn new() -> Self {
        let none = Pending::Answered(Answer::refusal(Status::BadRequest, 0));
        Session {
            pending: [none; SESSION_PENDING_MAX],
            first: 0,
            count: 0,
            closing: false,
            connected: false,
            active_ns: 0,
        }
    }

    /// Time of the last request, or of the connection.
    pub fn active_ns(&self) -> u64 {
        self.active_ns
    }

    /// Whether nothing waits for an answer.
    pub fn is_answered(&self) -> bool {
        self.count == 0
    }

    /// The client is gone.
    pub fn reset(&mut self, now_ns: u64, ledger: &mut Ledger<'_>) {
        while let Some(pending) = self.front() {
            if let Pending::Reading(slot) = pending {
                ledger.release(slot);
            }
            self.pop();
        }
        self.closing = false;
        self.connected = false;
        self.active_ns = now_ns;
    }

    /// The group is over: every append of this session was in it.
    pub fn settle(&mut self, answer: impl Fn(u64) -> Answer) {
        for offset in 0..self.count {
            let pending = &mut self.pending[(self.first + offset) % SESSION_PENDING_MAX];
            if let Pending::Appending(n) = *pending {
                *pending = Pending::Answered(answer(n));
            }
        }
    }

    /// Begins and answers as much as can be. True if anything was answered: that may have made room which another session waits for.
    pub fn step(&mut self, stream: &mut impl Stream, round: &mut Round<'_, '_, impl BlockDevice>) -> bool {
        if !self.connected {
            self.connected = true;
            self.active_ns = round.now_ns;
        }
        let mut answered_any = false;
        loop {
            let waits = self.begin(stream, round);
            let answered = self.answer(stream, round);
            answered_any |= answered;
            if !(waits && answered) {
                break;
            }
        }
        if self.closing {
            // What still comes is not for us, but the FIN behind it is.
            stream.consume(usize::MAX);
        }
        if self.count == 0 && (self.closing || is_half_closed(stream)) {
            stream.close();
        }
        answered_any
    }

    /// True if it stopped for want of something that answering may give back: a place in `pending` or in the transmit buffer, a read slot.
    fn begin(&mut self, stream: &mut impl Stream, round: &mut Round<'_, '_, impl BlockDevice>) -> bool {
        while !self.closing && round.powering_off.is_none_or(|session| session == round.session) {
            if self.count == SESSION_PENDING_MAX || stream.room() < (self.count + 1) * ANSWER_BYTES_MAX {
                return true;
            }
            let mut bytes = [0; REQUEST_BYTES_MAX];
            let length = stream.peek(&mut bytes);
            if length == 0 {
                return false;
            }
            let request = match parse(&bytes[..length]) {
                Parsed::Incomplete => return false,
                Parsed::Malformed => {
                    self.push(Pending::Answered(Answer::refusal(Status::BadRequest, 0)));
                    self.closing = true;
                    return false;
                }
                Parsed::Request(request) => request,
            };
            if request.operation == Operation::PowerOff {
                *round.powering_off = Some(round.session);
            }
            self.active_ns = round.now_ns;
            let own_appends = self.has_appends();
            let pending = match round.ledger.begin(&request, own_appends, round.now_ns, round.disk) {
                Begun::Wait => return true,
                Begun::Answered(answer) => Pending::Answered(answer),
                Begun::Appending(n) => Pending::Appending(n),
                Begun::Reading(slot) => Pending::Reading(slot),
            };
            self.push(pending);
            self.closing = request.operation == Operation::PowerOff;
            stream.consume(request.bytes);
        }
        false
    }

    /// Sends the answers that are ready, front first. True if it sent any.
    fn answer(&mut self, stream: &mut impl Stream, round: &mut Round<'_, '_, impl BlockDevice>) -> bool {
        let mut answered = false;
        let mut buffer = [0; ANSWER_BYTES_MAX];
        while let Some(pending) = self.front() {
            let length = match pending {
                Pending::Appending(_) => break,
                Pending::Answered(answer) => answer.write(round.now_ns, &[], &mut buffer),
                Pending::Reading(slot) => {
                    let Some((answer, payload)) = round.ledger.read_answer(slot) else {
                        break;
                    };
                    let length = answer.write(round.now_ns, payload, &mut buffer);
                    round.ledger.release(slot);
                    length
                }
            };
            // `begin` kept the room.
            stream.send(&buffer[..length]);
            self.pop();
            answered = true;
        }
        answered
    }

    fn has_appends(&self) -> bool {
        (0..self.count).any(|offset| {
            matches!(
                self.pending[(self.first + offset) % SESSION_PENDING_MAX],
                Pending::Appending(_)
            )
        })
    }

    fn front(&self) -> Option<Pending> {
        (self.count > 0).then(|| self.pending[self.first])
    }

    fn push(&mut self, pending: Pending) {
        self.pending[(self.first + self.count) % SESSION_PENDING_MAX] = pending;
        self.count += 1;
    }

    fn pop(&mut self) {
        self.first = (self.first + 1) % SESSION_PENDING_MAX;
        self.count -= 1;
    }
}

/// The client will send no more, and what it sent holds no whole request.
fn is_half_closed(stream: &mut impl Stream) -> bool {
    let mut bytes = [0; REQUEST_BYTES_MAX];
    stream.is_half_closed() && {
        let length = stream.peek(&mut bytes);
        parse(&bytes[..length]) == Parsed::Incomplete
    }
}
