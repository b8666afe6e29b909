//! The model clients: each asks one request at a time, and asks it again until it is answered.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::{
    faults::Setting,
    guest::{Answer, Operation, Request},
};

/// One client.
#[derive(Debug)]
pub struct Client {
    number: u8,
    asked: u32,
    requests: u32,
    powers_off: bool,
    open: Option<Request>,
}

impl Client {
    /// A client that has asked nothing yet.
    #[must_use]
    pub fn new(number: u8, setting: &Setting) -> Self {
        Self {
            number,
            asked: 0,
            requests: setting.requests,
            powers_off: setting.power_off && number == 0,
            open: None,
        }
    }

    /// What it sends now: the open request again, or the next one (`true`), or nothing more.
    pub fn wake(&mut self, rng: &mut ChaCha8Rng) -> Option<(Request, bool)> {
        if let Some(open) = self.open {
            return Some((open, false));
        }
        if self.asked == self.requests {
            return None;
        }
        self.asked += 1;
        let operation = if self.powers_off && self.asked == self.requests {
            Operation::PowerOff
        } else if rng.random_range(0..4) == 0 {
            Operation::Read
        } else {
            Operation::Append { value: rng.random() }
        };
        let request = Request {
            client: self.number,
            id: self.asked,
            operation,
        };
        self.open = Some(request);
        Some((request, true))
    }

    /// An answer arrived; gives the request it closes, if it is the open one's.
    pub fn answered(&mut self, answer: &Answer) -> Option<Request> {
        self.open.take_if(|open| open.id == answer.id)
    }

    /// Whether every request is answered.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.open.is_none() && self.asked == self.requests
    }
}
