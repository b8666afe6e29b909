//! Replaying: the log decides, and every stop is compared with the recorded one.

use std::{collections::VecDeque, fs::File, io::Write};

use ft_client::events::monotonic_ns;
use ft_protocol::{Body, Generation, Lsn, Stop, entry::Entry, limits::DEVICES_MAX};

use super::{
    delta::{self, Delta},
    divergence::{Divergence, difference},
    record::Recorder,
    source::{Online, Source},
    timeline::{Ahead, Answered, Happening, LoggedInput, Promotion, Timeline, Waiting},
};
use crate::error::Error;

/// An entry that waits for its stop; inputs are set aside before.
#[derive(Clone, Copy, Debug)]
struct Upcoming {
    lsn: Lsn,
    generation: Generation,
    device: usize,
    queue: u16,
    stop: Stop,
    kind: &'static str,
    action: Action,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kick,
    Deliver(u64),
    Time(u64),
    Console,
    Sync,
    PowerOff,
    State,
}

/// The replaying side's timeline.
#[derive(Debug)]
pub struct Replayer<S> {
    source: S,
    frame: Vec<u8>,
    upcoming: Option<Upcoming>,
    inputs: Vec<VecDeque<LoggedInput>>,
    /// The pages read so far of a delta whose state did not come yet; with the state once it is upcoming.
    delta: Delta,
    delta_pages: usize,
    /// The last entry that was read.
    last: Lsn,
    /// The last entry that was applied; inputs are, with the entry after them.
    applied: Lsn,
    console: Option<File>,
    now_ns: u64,
    /// Largest difference seen of virtual time to this host's clock: the best estimate of the primary's "now".
    offset_ns: i128,
}

impl<S: Source> Replayer<S> {
    /// Replays from `source`. Console lines, which the log already contains, go to `console` as they are reproduced.
    #[must_use]
    pub fn new(source: S, console: Option<File>) -> Self {
        Self {
            source,
            frame: Vec::new(),
            upcoming: None,
            inputs: vec![VecDeque::new(); DEVICES_MAX],
            delta: Delta::default(),
            delta_pages: 0,
            last: Lsn::ZERO,
            applied: Lsn::ZERO,
            console,
            now_ns: 0,
            offset_ns: i128::MIN,
        }
    }

    /// Reads entries until one waits for a stop. `Some` generation: the log is over.
    fn fetch(&mut self) -> Result<Option<Generation>, Error> {
        while self.upcoming.is_none() {
            if let Some(generation) = self.source.next(&mut self.frame)? {
                return Ok(Some(generation));
            }
            let entry = Entry::decode(&self.frame).map_err(|source| Error::Log {
                after: self.last,
                source,
            })?;
            if entry.lsn != self.last.next() {
                return Err(Error::LogEnds(format!(
                    "entry {} follows entry {}: the log has a gap",
                    entry.lsn, self.last
                )));
            }
            self.last = entry.lsn;
            let device = usize::from(entry.device.0);
            let action = match entry.body {
                Body::Input { sequence, payload } => {
                    let inputs = self.inputs.get_mut(device).ok_or_else(|| {
                        Error::LogEnds(format!("entry {} is for an unknown device {device}", entry.lsn))
                    })?;
                    inputs.push_back(LoggedInput {
                        sequence,
                        queue: entry.queue,
                        payload: payload.to_vec(),
                    });
                    continue;
                }
                // They are about the pair, and no part of the execution.
                Body::Synced { .. } | Body::Configuration(_) => continue,
                Body::Boot { .. } => return Err(Error::LogEnds(format!("entry {} is a second power-on", entry.lsn))),
                Body::Write { .. } | Body::Zeroes { .. } | Body::Flush | Body::Compare { .. } | Body::Transferred => {
                    return Err(Error::LogEnds(format!(
                        "entry {} is of the device engine: there is no execution to replay",
                        entry.lsn
                    )));
                }
                Body::Kick(_) => Action::Kick,
                Body::Deliver { through, .. } => Action::Deliver(through),
                Body::Time { now_ns, .. } => Action::Time(now_ns),
                Body::Console { .. } => Action::Console,
                Body::Sync(_) => Action::Sync,
                Body::PowerOff { .. } => Action::PowerOff,
                Body::Pages { payload } => {
                    self.delta_pages += delta::page_count(payload).unwrap_or(usize::MAX / 2);
                    if self.delta_pages > delta::PAGES_MAX {
                        return Err(Error::LogEnds(format!(
                            "entry {} has pages that no machine has",
                            entry.lsn
                        )));
                    }
                    self.delta.pages.push(payload.to_vec());
                    continue;
                }
                Body::State { payload, .. } => {
                    self.delta.state = payload.to_vec();
                    Action::State
                }
            };
            self.upcoming = Some(Upcoming {
                lsn: entry.lsn,
                generation: entry.generation,
                device,
                queue: entry.queue,
                stop: entry.body.stop().expect("entries without a stop were handled above"),
                kind: entry.body.name(),
                action,
            });
        }
        Ok(None)
    }

    fn diverged(upcoming: &Upcoming, stop: &Stop, what: impl Into<String>) -> Error {
        Error::Diverged(Box::new(Divergence {
            entry: upcoming.lsn,
            kind: upcoming.kind,
            recorded: upcoming.stop,
            replayed: *stop,
            what: what.into(),
        }))
    }

    /// The entry that must apply at `stop`, because the guest just did something that was logged.
    fn expect(&mut self, stop: &Stop, did: &str) -> Result<Answered<Upcoming>, Error> {
        if let Some(generation) = self.fetch()? {
            return Ok(Answered::EndOfLog(generation));
        }
        let upcoming = self.upcoming.take().expect("fetch leaves one");
        if let Some(what) = difference(&upcoming.stop, stop) {
            return Err(Self::diverged(
                &upcoming,
                stop,
                format!("{what}, while the guest {did}"),
            ));
        }
        self.applied = upcoming.lsn;
        Ok(Answered::Value(upcoming))
    }

    fn set_time(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        self.offset_ns = self.offset_ns.max(i128::from(now_ns) - i128::from(monotonic_ns()));
    }

    fn take_inputs(&mut self, device: usize, through: u64) -> Vec<LoggedInput> {
        let waiting = self.inputs.get_mut(device).map(std::mem::take).unwrap_or_default();
        let (now, later) = waiting
            .into_iter()
            .partition::<VecDeque<_>, _>(|input| input.sequence <= through);
        if let Some(inputs) = self.inputs.get_mut(device) {
            *inputs = later;
        }
        now.into()
    }
}

/// What of a stop orders it among others.
fn place(stop: &Stop) -> (u64, u32) {
    (stop.position.exits, stop.position.offset)
}

/// What a replay does once its log is over.
pub trait Successor: Source + Sized {
    /// The timeline that goes on; `None` where nothing can.
    fn succeed(self, console: Option<File>, delivered: Vec<u64>, now_ns: u64) -> Option<Box<dyn Timeline>>;
}

impl Successor for Online {
    fn succeed(self, console: Option<File>, delivered: Vec<u64>, now_ns: u64) -> Option<Box<dyn Timeline>> {
        let (log, region) = self.into_parts();
        Some(Box::new(Recorder::new(log, region, console?, delivered, now_ns)))
    }
}

impl<S: Successor + 'static> Timeline for Replayer<S> {
    fn is_live(&self) -> bool {
        false
    }

    fn last_entry(&self) -> Lsn {
        self.applied
    }

    fn boot(&mut self, fingerprint: &[u8; 32], devices: &[u8]) -> Result<u64, Error> {
        if self.source.next(&mut self.frame)?.is_some() {
            return Err(Error::LogEnds("the log ended before the machine was powered on".into()));
        }
        let entry = Entry::decode(&self.frame).map_err(|source| Error::Log {
            after: Lsn::ZERO,
            source,
        })?;
        match entry.body {
            Body::Boot {
                fingerprint: recorded,
                wall_ns,
                devices: described,
            } if recorded == *fingerprint => {
                if described != devices {
                    return Err(Error::LogEnds(
                        "the log was recorded with other devices: disk size, MAC address and release must be identical"
                            .into(),
                    ));
                }
                (self.last, self.applied) = (entry.lsn, entry.lsn);
                Ok(wall_ns)
            }
            Body::Boot { .. } => Err(Error::LogEnds(
                "the log was recorded on a different machine: kernel, command line, memory and CPUID must be identical"
                    .into(),
            )),
            _ => Err(Error::LogEnds("the log does not begin with a power-on".into())),
        }
    }

    fn now(&mut self, stop: &Stop) -> Result<Answered<u64>, Error> {
        let upcoming = match self.expect(stop, "read the time")? {
            Answered::Value(upcoming) => upcoming,
            Answered::EndOfLog(generation) => return Ok(Answered::EndOfLog(generation)),
        };
        let Action::Time(now_ns) = upcoming.action else {
            return Err(Self::diverged(&upcoming, stop, "the guest read the time instead"));
        };
        self.set_time(now_ns);
        Ok(Answered::Value(now_ns))
    }

    fn kick(
        &mut self,
        stop: &Stop,
        device: usize,
        queue: u16,
        _output: bool,
    ) -> Result<Answered<(Lsn, Generation)>, Error> {
        let upcoming = match self.expect(stop, "notified a queue")? {
            Answered::Value(upcoming) => upcoming,
            Answered::EndOfLog(generation) => return Ok(Answered::EndOfLog(generation)),
        };
        if !matches!(upcoming.action, Action::Kick) || (upcoming.device, upcoming.queue) != (device, queue) {
            return Err(Self::diverged(
                &upcoming,
                stop,
                format!("the guest notified device {device} queue {queue} instead"),
            ));
        }
        Ok(Answered::Value((upcoming.lsn, upcoming.generation)))
    }

    fn console(&mut self, stop: &Stop, line: &[u8]) -> Result<Answered<()>, Error> {
        let upcoming = match self.expect(stop, "wrote to its console")? {
            Answered::Value(upcoming) => upcoming,
            Answered::EndOfLog(generation) => return Ok(Answered::EndOfLog(generation)),
        };
        if !matches!(upcoming.action, Action::Console) {
            return Err(Self::diverged(
                &upcoming,
                stop,
                "the guest wrote to its console instead",
            ));
        }
        if let Some(Err(error)) = self.console.as_mut().map(|console| console.write_all(line)) {
            tracing::warn!("the console file cannot be written: {error}");
        }
        Ok(Answered::Value(()))
    }

    fn power_off(&mut self, stop: &Stop, _reset: bool) -> Result<Answered<()>, Error> {
        let upcoming = match self.expect(stop, "powered itself off")? {
            Answered::Value(upcoming) => upcoming,
            Answered::EndOfLog(generation) => return Ok(Answered::EndOfLog(generation)),
        };
        if !matches!(upcoming.action, Action::PowerOff) {
            return Err(Self::diverged(&upcoming, stop, "the guest powered itself off instead"));
        }
        self.source.finish()?;
        Ok(Answered::Value(()))
    }

    fn next(
        &mut self,
        stop: &Stop,
        _inputs_ready: &dyn Fn(usize) -> u64,
        waiting: Waiting,
    ) -> Result<Answered<Happening>, Error> {
        loop {
            if let Some(generation) = self.fetch()? {
                return Ok(Answered::EndOfLog(generation));
            }
            let upcoming = self.upcoming.expect("fetch leaves one");
            if place(&upcoming.stop) > place(stop) {
                if waiting.idle {
                    return Err(Self::diverged(
                        &upcoming,
                        stop,
                        "the guest halts and nothing in the log wakes it",
                    ));
                }
                return Ok(Answered::Value(Happening::Nothing));
            }
            self.upcoming = None;
            if let Some(what) = difference(&upcoming.stop, stop) {
                return Err(Self::diverged(&upcoming, stop, what));
            }
            self.applied = upcoming.lsn;
            let device = upcoming.device;
            return Ok(Answered::Value(match upcoming.action {
                Action::Sync => continue,
                Action::Deliver(through) => Happening::DeliverLogged {
                    device,
                    inputs: self.take_inputs(device, through),
                },
                Action::Time(now_ns) => {
                    self.set_time(now_ns);
                    Happening::Time(now_ns)
                }
                Action::Kick | Action::Console | Action::PowerOff | Action::State => {
                    return Err(Self::diverged(&upcoming, stop, "the guest did not do this here"));
                }
            }));
        }
    }

    fn ahead(&mut self, stop: &Stop) -> Result<Ahead, Error> {
        Ok(match &self.upcoming {
            Some(upcoming)
                if upcoming.action == Action::State && upcoming.stop.position.exits == stop.position.exits + 1 =>
            {
                self.delta_pages = 0;
                Ahead::Adopt(std::mem::take(&mut self.delta))
            }
            Some(upcoming)
                if upcoming.stop.position.exits == stop.position.exits && place(&upcoming.stop) > place(stop) =>
            {
                Ahead::RunTo(upcoming.stop)
            }
            _ => Ahead::Run,
        })
    }

    fn is_waiting(&mut self, _inputs_ready: &dyn Fn(usize) -> u64, _alarm_ns: Option<u64>) -> bool {
        false
    }

    fn halted(&mut self, stop: &Stop, _state: &[u8], _pages: &mut dyn Iterator<Item = Vec<u8>>) -> Result<(), Error> {
        let upcoming = self.upcoming.take().expect("what was adopted came from it");
        if let Some(what) = difference(&upcoming.stop, stop) {
            return Err(Self::diverged(&upcoming, stop, what));
        }
        self.applied = upcoming.lsn;
        Ok(())
    }

    fn named(&mut self, _stop: &Stop) -> Result<(), Error> {
        // The entry that named it is compared when it is applied.
        Ok(())
    }

    fn go_live(mut self: Box<Self>, delivered: &[u64]) -> Option<Promotion> {
        let undelivered: Vec<Vec<LoggedInput>> = (0..delivered.len())
            .map(|device| self.take_inputs(device, u64::MAX))
            .collect();
        let counts = delivered.iter().zip(&undelivered);
        let counts = counts
            .map(|(count, inputs)| inputs.last().map_or(*count, |input| input.sequence))
            .collect();
        let estimate = i128::from(monotonic_ns()).saturating_add(self.offset_ns);
        let now_ns = u64::try_from(estimate).unwrap_or(0).max(self.now_ns);
        let timeline = self.source.succeed(self.console, counts, now_ns)?;
        Some(Promotion { undelivered, timeline })
    }
}
