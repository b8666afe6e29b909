//! Recording: the world decides, and every decision is logged before it takes effect.

use std::{collections::VecDeque, fs::File, io::Write, sync::Arc, time::Duration};

use ft_client::{
    LogWriter, Region, crash,
    events::{monotonic_ns, wall_ns},
    log::Urgency,
};
use ft_protocol::{Body, DeviceId, Generation, Held, Lsn, Stop, replica::Role};

use super::{
    pace::Pace,
    timeline::{Ahead, Answered, Happening, Promotion, Timeline, Waiting},
    virtual_clock::VirtualClock,
};
use crate::error::Error;

/// A backup may replay up to the last entry only: without any for this many exits, one is made for it.
const SYNC_EXITS: u64 = 4096;
/// How often an idle shim looks for commits of held console lines; there is no other wake-up for them.
const CONSOLE_CHECK: Duration = Duration::from_millis(5);
/// A guest that has been idle for so long lets the backup have what was appended quietly.
const IDLE_FLUSH: Duration = Duration::from_millis(2);
/// How long a shim sleeps at most, so that a replica that ended without waking it is noticed.
const ALIVE_CHECK: Duration = Duration::from_millis(500);

/// The recording side's timeline.
#[derive(Debug)]
pub struct Recorder {
    log: LogWriter,
    region: Arc<Region>,
    console: File,
    held_lines: VecDeque<Held<Vec<u8>>>,
    delivered: Vec<u64>,
    clock: VirtualClock,
    last_logged_exit: u64,
    last_entry: Lsn,
    pace: Pace,
    records: bool,
}

impl Recorder {
    /// Starts recording with virtual time `now_ns` and `delivered` inputs by device.
    #[must_use]
    pub fn new(log: LogWriter, region: Arc<Region>, console: File, delivered: Vec<u64>, now_ns: u64) -> Self {
        Self {
            log,
            region,
            console,
            held_lines: VecDeque::new(),
            delivered,
            clock: VirtualClock::new(now_ns, monotonic_ns()),
            last_logged_exit: 0,
            last_entry: Lsn::ZERO,
            pace: Pace::default(),
            records: true,
        }
    }

    /// From now on only what the devices and ft-log need is logged, which nobody can replay: what recording costs is the difference.
    #[must_use]
    pub fn unrecorded(self) -> Self {
        Self { records: false, ..self }
    }

    fn virtual_ns(&mut self) -> u64 {
        self.clock.read(monotonic_ns())
    }

    fn append(
        &mut self,
        stop: &Stop,
        device: DeviceId,
        queue: u16,
        body: &Body<'_>,
        urgency: Urgency,
    ) -> Result<Lsn, Error> {
        self.last_logged_exit = stop.position.exits;
        if !self.records && !matches!(body, Body::Kick(_) | Body::PowerOff { .. }) {
            return Ok(self.last_entry);
        }
        self.last_entry = self.log.append(device, queue, body, urgency)?;
        Ok(self.last_entry)
    }

    /// How much an output hurries: nobody acknowledges the entries of a side that is alone.
    fn output_urgency(&self) -> Urgency {
        match self.region.role() {
            Role::Live => Urgency::Later,
            _ => Urgency::Now,
        }
    }

    fn check_role(&self) -> Result<(), Error> {
        match self.region.role() {
            role @ (Role::Halted | Role::Off) => Err(ft_client::log::Ended { role }.into()),
            _ => Ok(()),
        }
    }

    /// Pauses as much as the backup's lag asks for. What was appended quietly is announced: the backup needs it to catch up.
    fn keep_pace(&mut self) -> Result<(), Error> {
        loop {
            let ticket = self.region.shim_ticket();
            let permille = self.region.throttle();
            if permille == 0 {
                return Ok(());
            }
            let pause_ns = self.pace.pause_ns(monotonic_ns(), permille);
            if pause_ns == 0 {
                return Ok(());
            }
            self.check_role()?;
            self.release_console();
            self.log.flush();
            let pause = Duration::from_nanos(pause_ns).min(ALIVE_CHECK);
            self.region.sleep_shim(ticket, Some(pause));
        }
    }

    fn release_console(&mut self) {
        let committed = self.region.committed();
        while self.held_lines.front().is_some_and(|line| line.is_committed(committed)) {
            let Some(Ok(line)) = self.held_lines.pop_front().map(|line| line.release(committed)) else {
                return;
            };
            // A console that cannot be written to must not stop the VM.
            if let Err(error) = self.console.write_all(&line) {
                tracing::warn!("the console file cannot be written: {error}");
            }
        }
    }

    /// Sleeps until something happens for a guest that has nothing else to do.
    fn sleep(&mut self, ticket: u32, alarm_ns: Option<u64>) {
        let mut timeout = ALIVE_CHECK;
        let slept_from = monotonic_ns();
        if !self.held_lines.is_empty() {
            timeout = CONSOLE_CHECK;
        }
        if let Some(alarm) = alarm_ns {
            timeout = timeout.min(Duration::from_nanos(alarm.saturating_sub(self.clock.read(slept_from))));
        }
        if self.log.is_quiet() {
            timeout = timeout.min(IDLE_FLUSH);
        }
        self.region.sleep_shim(ticket, Some(timeout));
        self.clock.slept(slept_from, monotonic_ns(), alarm_ns);
        if self.region.shim_ticket() == ticket {
            self.log.flush();
        }
    }

    fn happening(
        &mut self,
        stop: &Stop,
        inputs_ready: &dyn Fn(usize) -> u64,
        alarm_ns: Option<u64>,
    ) -> Result<Option<Happening>, Error> {
        for device in 0..self.delivered.len() {
            let through = inputs_ready(device);
            if through > self.delivered[device] {
                crash::point("shim.deliver.before");
                self.append(
                    stop,
                    DeviceId(device as u8),
                    0,
                    &Body::Deliver { stop: *stop, through },
                    Urgency::Later,
                )?;
                self.delivered[device] = through;
                return Ok(Some(Happening::Deliver { device, through }));
            }
        }
        if let Some(alarm) = alarm_ns {
            let now_ns = self.virtual_ns();
            if now_ns >= alarm {
                self.append(
                    stop,
                    DeviceId::SHIM,
                    0,
                    &Body::Time { stop: *stop, now_ns },
                    Urgency::Later,
                )?;
                return Ok(Some(Happening::Time(now_ns)));
            }
        }
        Ok(None)
    }
}

impl Timeline for Recorder {
    fn is_live(&self) -> bool {
        true
    }

    fn last_entry(&self) -> Lsn {
        self.last_entry
    }

    fn boot(&mut self, fingerprint: &[u8; 32], devices: &[u8]) -> Result<u64, Error> {
        let wall_ns = wall_ns();
        self.last_entry = self.log.append(
            DeviceId::SHIM,
            0,
            &Body::Boot {
                fingerprint: *fingerprint,
                wall_ns,
                devices,
            },
            Urgency::Now,
        )?;
        Ok(wall_ns)
    }

    fn now(&mut self, stop: &Stop) -> Result<Answered<u64>, Error> {
        let now_ns = self.virtual_ns();
        self.append(
            stop,
            DeviceId::SHIM,
            0,
            &Body::Time { stop: *stop, now_ns },
            Urgency::Later,
        )?;
        Ok(Answered::Value(now_ns))
    }

    fn kick(
        &mut self,
        stop: &Stop,
        device: usize,
        queue: u16,
        output: bool,
    ) -> Result<Answered<(Lsn, Generation)>, Error> {
        crash::point("shim.kick.before");
        let urgency = if output { self.output_urgency() } else { Urgency::Later };
        let lsn = self.append(stop, DeviceId(device as u8), queue, &Body::Kick(*stop), urgency)?;
        Ok(Answered::Value((lsn, self.region.generation())))
    }

    fn console(&mut self, stop: &Stop, line: &[u8]) -> Result<Answered<()>, Error> {
        let bytes = line.len() as u32;
        let lsn = self.append(
            stop,
            DeviceId::SHIM,
            0,
            &Body::Console { stop: *stop, bytes },
            self.output_urgency(),
        )?;
        self.held_lines.push_back(Held::new(lsn, line.to_vec()));
        self.release_console();
        Ok(Answered::Value(()))
    }

    fn power_off(&mut self, stop: &Stop, reset: bool) -> Result<Answered<()>, Error> {
        self.append(
            stop,
            DeviceId::SHIM,
            0,
            &Body::PowerOff { stop: *stop, reset },
            Urgency::Now,
        )?;
        loop {
            let ticket = self.region.shim_ticket();
            self.release_console();
            match self.region.role() {
                Role::Off => return Ok(Answered::Value(())),
                role @ Role::Halted => return Err(ft_client::log::Ended { role }.into()),
                _ => self.sleep(ticket, None),
            }
        }
    }

    fn next(
        &mut self,
        stop: &Stop,
        inputs_ready: &dyn Fn(usize) -> u64,
        waiting: Waiting,
    ) -> Result<Answered<Happening>, Error> {
        self.keep_pace()?;
        loop {
            let ticket = self.region.shim_ticket();
            self.check_role()?;
            self.release_console();
            if let Some(happening) = self.happening(stop, inputs_ready, waiting.alarm_ns)? {
                return Ok(Answered::Value(happening));
            }
            if !waiting.idle {
                if stop.position.exits - self.last_logged_exit.min(stop.position.exits) >= SYNC_EXITS {
                    self.append(stop, DeviceId::SHIM, 0, &Body::Sync(*stop), Urgency::Now)?;
                }
                return Ok(Answered::Value(Happening::Nothing));
            }
            self.sleep(ticket, waiting.alarm_ns);
        }
    }

    fn ahead(&mut self, _stop: &Stop) -> Result<Ahead, Error> {
        self.clock.resumes(monotonic_ns());
        Ok(Ahead::Run)
    }

    fn stopped(&mut self) {
        self.clock.stops(monotonic_ns());
    }

    fn is_waiting(&mut self, inputs_ready: &dyn Fn(usize) -> u64, alarm_ns: Option<u64>) -> bool {
        let input = (0..self.delivered.len()).any(|device| inputs_ready(device) > self.delivered[device]);
        input || alarm_ns.is_some_and(|alarm| self.virtual_ns() >= alarm)
    }

    fn halted(&mut self, stop: &Stop, state: &[u8], pages: &mut dyn Iterator<Item = Vec<u8>>) -> Result<(), Error> {
        for payload in pages {
            let body = Body::Pages { payload: &payload };
            self.append(stop, DeviceId::SHIM, 0, &body, Urgency::Later)?;
        }
        // It may be long until the next output: the backup is to follow a guest that only computes, too.
        let urgency = self.output_urgency();
        let payload = state;
        self.append(stop, DeviceId::SHIM, 0, &Body::State { stop: *stop, payload }, urgency)?;
        Ok(())
    }

    fn named(&mut self, stop: &Stop) -> Result<(), Error> {
        let urgency = self.output_urgency();
        self.append(stop, DeviceId::SHIM, 0, &Body::Sync(*stop), urgency)?;
        Ok(())
    }

    fn go_live(self: Box<Self>, _delivered: &[u64]) -> Option<Promotion> {
        None
    }
}
