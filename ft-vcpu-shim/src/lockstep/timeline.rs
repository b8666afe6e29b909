//! Where the nondeterminism of an execution comes from: the world (record) or the log (replay).
//!
//! [`crate::lockstep::execution`] asks the same questions of both and does the same with the answers.

use ft_protocol::{Generation, Lsn, Stop};

use super::delta::Delta;
use crate::error::Error;

/// An answer, or the end of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered<T> {
    /// The answer.
    Value(T),
    /// Every entry is consumed: go live with this generation and ask the successor again.
    EndOfLog(Generation),
}

/// An input that came out of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedInput {
    /// Its number among its device's inputs.
    pub sequence: u64,
    /// Queue of the entry.
    pub queue: u16,
    /// For the device's guest side.
    pub payload: Vec<u8>,
}

/// Something from outside that happens to the guest at a stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// The device's own inputs up to here reach guest memory.
    Deliver {
        /// Device.
        device: usize,
        /// Sequence number.
        through: u64,
    },
    /// Inputs from the log reach guest memory.
    DeliverLogged {
        /// Device.
        device: usize,
        /// In order.
        inputs: Vec<LoggedInput>,
    },
    /// Virtual time.
    Time(u64),
    /// Nothing (more) here.
    Nothing,
}

/// The state of the guest at a stop, as far as a timeline needs it.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// The guest does nothing until something happens.
    pub idle: bool,
    /// When its alarm is due.
    pub alarm_ns: Option<u64>,
}

/// How the guest gets from one stop to the next.
#[derive(Debug)]
pub enum Ahead {
    /// It runs there by itself.
    Run,
    /// It does not run, but becomes what the log says.
    Adopt(Delta),
    /// It runs, to a place between two stops that the log names.
    RunTo(Stop),
}

/// What is left of a replay when its log is over.
pub struct Promotion {
    /// Inputs that were logged and not delivered, by device: they are delivered first.
    pub undelivered: Vec<Vec<LoggedInput>>,
    /// What goes on.
    pub timeline: Box<dyn Timeline>,
}

/// The source of nondeterminism. Every method may log, or take from the log.
pub trait Timeline {
    /// Whether the devices reach the outside world.
    fn is_live(&self) -> bool;

    /// The last entry that was written, or applied: 0 before power-on.
    fn last_entry(&self) -> Lsn;

    /// Power-on: wall clock at virtual time 0, after checking that the log (if any) begins with this machine.
    ///
    /// # Errors
    /// The replica ended, or the log belongs to another machine.
    fn boot(&mut self, fingerprint: &[u8; 32], devices: &[u8]) -> Result<u64, Error>;

    /// The guest reads the time.
    ///
    /// # Errors
    /// Divergence, or the end of the replica; so for all that follow.
    fn now(&mut self, stop: &Stop) -> Result<Answered<u64>, Error>;

    /// The guest notifies a queue: the marker of what the device drains, which is `output` or stays inside.
    ///
    /// # Errors
    /// See [`Timeline::now`].
    fn kick(
        &mut self,
        stop: &Stop,
        device: usize,
        queue: u16,
        output: bool,
    ) -> Result<Answered<(Lsn, Generation)>, Error>;

    /// The guest wrote a console line.
    ///
    /// # Errors
    /// See [`Timeline::now`].
    fn console(&mut self, stop: &Stop, line: &[u8]) -> Result<Answered<()>, Error>;

    /// The guest powers itself off; returns when the log is complete on both sides.
    ///
    /// # Errors
    /// See [`Timeline::now`].
    fn power_off(&mut self, stop: &Stop, reset: bool) -> Result<Answered<()>, Error>;

    /// What happens next at this stop. With `waiting.idle` it waits until something does.
    ///
    /// # Errors
    /// See [`Timeline::now`].
    fn next(
        &mut self,
        stop: &Stop,
        inputs_ready: &dyn Fn(usize) -> u64,
        waiting: Waiting,
    ) -> Result<Answered<Happening>, Error>;

    /// How the guest gets from `stop`, where nothing more happens, to the next one.
    ///
    /// # Errors
    /// See [`Timeline::now`].
    fn ahead(&mut self, stop: &Stop) -> Result<Ahead, Error>;

    /// The guest, which ran since [`Timeline::ahead`], stands still.
    fn stopped(&mut self) {}

    /// Whether something waits for the guest to stop: an input, or an alarm.
    fn is_waiting(&mut self, inputs_ready: &dyn Fn(usize) -> u64, alarm_ns: Option<u64>) -> bool;

    /// The guest stands still at `stop`, where it has no stop of its own: `state` and `pages`, as [`Delta`] has them, are what a replay
    /// adopts, or has adopted.
    ///
    /// # Errors
    /// See [`Timeline::now`].
    fn halted(&mut self, stop: &Stop, state: &[u8], pages: &mut dyn Iterator<Item = Vec<u8>>) -> Result<(), Error>;

    /// The guest stands still at `stop`, a place between two stops that a position clock names.
    ///
    /// # Errors
    /// See [`Timeline::now`].
    fn named(&mut self, stop: &Stop) -> Result<(), Error>;

    /// After [`Answered::EndOfLog`]: the promotion of this side, which has delivered `delivered[device]` inputs so far. A timeline
    /// that cannot go on (an offline replay) gives `None`.
    #[must_use]
    fn go_live(self: Box<Self>, delivered: &[u64]) -> Option<Promotion>;
}
