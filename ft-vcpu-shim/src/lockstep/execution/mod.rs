//! One vCPU, run from stop point to stop point. The same code records and replays.
//!
//! ```text
//!   ┌─► to the next stop (advance) ─► count, digest ─► the access itself (access) ─┐
//!   │                                                                              ▼
//!   └── interrupt, if one is pending and can enter ◄── what happens at this stop (deliver, time), until nothing more
//! ```

mod access;
mod advance;
mod asleep;

use std::time::Duration;

use ft_client::{crash, gate::Request};
use ft_protocol::{Generation, Position, Stop};

pub use self::asleep::OnAsleep;
use self::{
    advance::{Advance, Impatience},
    asleep::Sleep,
};
use super::{
    digest::Digests,
    history::{Access, AccessKind, Event, History},
    position::PositionClock,
    timeline::{Answered, Happening, Promotion, Timeline, Waiting},
};
use crate::{
    device::Port,
    error::Error,
    machine::vcpu::{Exit, Vcpu},
    platform::Board,
};

/// How an execution ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// An offline replay came to the end of its log.
    LogEnd,
}

/// How far [`Execution::step`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// To a stop, and everything at it has happened.
    Stop,
    /// To where a debugger wanted the guest to stand still, which is no stop.
    Trap,
    /// To the end.
    End(End),
}

/// Told when the execution goes live.
pub type OnLive = Box<dyn FnMut(Generation, &Position)>;

const TIMELINE: &str = "only taken while going live";

/// A running machine.
pub struct Execution {
    vcpu: Vcpu,
    board: Board,
    ports: Vec<Box<dyn Port>>,
    timeline: Option<Box<dyn Timeline>>,
    on_live: OnLive,
    on_asleep: Option<OnAsleep>,
    exits: u64,
    position: Position,
    digests: Digests,
    history: History,
    delivered: Vec<u64>,
    windows: bool,
    patience: Duration,
    /// Names places between stops, where this host can.
    clock: Option<Box<dyn PositionClock>>,
    /// While this side records.
    impatience: Option<Impatience>,
}

/// How long a guest may go without a stop when something waits for it, if nobody says otherwise.
pub const PATIENCE: Duration = Duration::from_millis(5);

impl Execution {
    /// A machine at power-on. `windows`: interrupt windows count as stops, on both sides.
    #[must_use]
    pub fn new(
        vcpu: Vcpu,
        windows: bool,
        board: Board,
        ports: Vec<Box<dyn Port>>,
        timeline: Box<dyn Timeline>,
        on_live: OnLive,
    ) -> Self {
        let delivered = vec![0; ports.len()];
        Self {
            vcpu,
            board,
            ports,
            timeline: Some(timeline),
            on_live,
            on_asleep: None,
            exits: 0,
            position: Position::default(),
            digests: Digests::default(),
            history: History::default(),
            delivered,
            windows,
            patience: PATIENCE,
            clock: None,
            impatience: None,
        }
    }

    /// How long a guest may go without a stop when something waits for it. Before [`Execution::start`].
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Names places between stops by `clock`, instead of by state deltas. Before [`Execution::start`], and on both sides.
    pub fn set_clock(&mut self, clock: Box<dyn PositionClock>) {
        self.clock = Some(clock);
    }

    /// Where the guest is.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// Digests of everything so far.
    #[must_use]
    pub fn digests(&self) -> Digests {
        self.digests
    }

    /// The last stops.
    #[must_use]
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The vCPU, between two stops.
    #[must_use]
    pub fn vcpu(&self) -> &Vcpu {
        &self.vcpu
    }

    /// The vCPU, for a debugger. Whoever changes the guest's state has another execution.
    pub fn vcpu_mut(&mut self) -> &mut Vcpu {
        &mut self.vcpu
    }

    fn timeline(&mut self) -> &mut dyn Timeline {
        self.timeline.as_deref_mut().expect(TIMELINE)
    }

    fn stop(&self) -> Stop {
        Stop {
            position: self.position,
            digest: self.digests.combined(),
        }
    }

    /// Runs until the guest ends or this replica does.
    ///
    /// # Errors
    /// Divergence, a guest that cannot go on, or the end of the replica.
    pub fn run(&mut self) -> Result<End, Error> {
        self.start()?;
        loop {
            if let Step::End(end) = self.step()? {
                return Ok(end);
            }
        }
    }

    /// Tells the devices that the machine starts. Once, before the first [`Execution::step`].
    ///
    /// # Errors
    /// The end of the replica.
    pub fn start(&mut self) -> Result<(), Error> {
        let live = self.timeline().is_live();
        for port in &mut self.ports {
            port.call(&Request::Start { live })?;
        }
        if live {
            self.begin_recording()?;
        }
        Ok(())
    }

    /// Runs to the next stop and lets everything happen there.
    ///
    /// # Errors
    /// See [`Execution::run`].
    pub fn step(&mut self) -> Result<Step, Error> {
        let advance = self.advance()?;
        let access = match &advance {
            Advance::Trap => return Ok(Step::Trap),
            Advance::Exit(exit) => Access::of(exit, self.vcpu.data()),
            Advance::Halted(_) => Access::none(AccessKind::Forced),
            Advance::Named => Access::none(AccessKind::Named),
        };
        let offset = self.count(&advance)?;
        let registers = self.vcpu.registers();
        self.position = Position {
            exits: self.exits,
            offset,
            rip: registers.rip,
            rcx: registers.rcx,
        };
        let entry = self.timeline().last_entry();
        match advance {
            Advance::Named => self.digests.named(offset, &registers),
            _ => self.digests.registers(&registers),
        }
        self.history
            .begin(self.position, access, registers, self.digests.combined(), entry);
        let end = self.arrived(advance)?;
        // An offline replay has no timeline left at the end of its log: then nothing was applied here.
        let entry = self.timeline.as_deref().map_or(entry, Timeline::last_entry);
        self.history.settled(self.digests.combined(), entry);
        Ok(end.map_or(Step::Stop, Step::End))
    }

    fn arrived(&mut self, advance: Advance) -> Result<Option<End>, Error> {
        let exit = match advance {
            Advance::Exit(exit) => exit,
            Advance::Halted(halted) => {
                self.log_state(halted)?;
                return self.settle(false);
            }
            Advance::Named => {
                self.log_position()?;
                return self.settle(false);
            }
            Advance::Trap => return Ok(None),
        };
        match self.access(&exit)? {
            Some(end) => Ok(Some(end)),
            None => self.settle(exit == Exit::Halt),
        }
    }

    /// Lets everything happen that happens at this stop, then lets an interrupt in. A halted guest stays here until one can enter.
    fn settle(&mut self, halted: bool) -> Result<Option<End>, Error> {
        let mut sleep = Sleep::default();
        loop {
            let can_interrupt = self.vcpu.can_interrupt();
            let idle = halted && !(can_interrupt && self.board.pic.is_pending());
            if idle {
                self.sleeps(&mut sleep, can_interrupt);
            }
            let waiting = Waiting {
                idle,
                alarm_ns: self.board.deadline_ns(),
            };
            let stop = self.stop();
            let Some(happening) = self.happening(&stop, waiting)? else {
                return Ok(Some(End::LogEnd));
            };
            match happening {
                Happening::Nothing => break,
                Happening::Time(_) => sleep.timer(),
                _ => {}
            }
            self.apply(happening)?;
        }
        if self.board.pic.is_pending()
            && self.vcpu.can_interrupt_behind_access()?
            && let Some(vector) = self.board.pic.acknowledge()
        {
            self.digests.interrupt(vector);
            self.history.event(Event::Interrupt { vector });
            self.vcpu.interrupt(vector)?;
        }
        Ok(None)
    }

    fn happening(&mut self, stop: &Stop, waiting: Waiting) -> Result<Option<Happening>, Error> {
        loop {
            let ports = &self.ports;
            let timeline = self.timeline.as_deref_mut().expect(TIMELINE);
            match timeline.next(stop, &|device| ports[device].inputs(), waiting)? {
                Answered::Value(happening) => return Ok(Some(happening)),
                Answered::EndOfLog(generation) => {
                    if !self.go_live(generation)? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    fn apply(&mut self, happening: Happening) -> Result<(), Error> {
        match happening {
            Happening::Nothing => {}
            Happening::Time(now_ns) => {
                self.history.event(Event::Time(now_ns));
                self.board.advance_time(now_ns);
            }
            Happening::Deliver { device, through } => {
                let answer = self.ports[device].call(&Request::Deliver { through })?;
                self.delivered_inputs(device, through);
                self.interrupt_line(device, answer);
                crash::point("shim.deliver.after");
            }
            Happening::DeliverLogged { device, inputs } => {
                for input in inputs {
                    let request = Request::DeliverLogged {
                        sequence: input.sequence,
                        queue: input.queue,
                        payload: &input.payload,
                    };
                    let answer = self.ports[device].call(&request)?;
                    self.delivered_inputs(device, input.sequence);
                    self.interrupt_line(device, answer);
                }
            }
        }
        Ok(())
    }

    fn delivered_inputs(&mut self, device: usize, through: u64) {
        self.delivered[device] = through;
        self.history.event(Event::Deliver {
            device: device as u8,
            through,
        });
    }

    /// Asks the timeline; if its log is over, goes live and asks the successor. `None`: there is none.
    fn ask<T>(
        &mut self,
        question: impl Fn(&mut dyn Timeline) -> Result<Answered<T>, Error>,
    ) -> Result<Option<T>, Error> {
        loop {
            match question(self.timeline())? {
                Answered::Value(value) => return Ok(Some(value)),
                Answered::EndOfLog(generation) => {
                    if !self.go_live(generation)? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// The replay is over: what was logged and not delivered is delivered now, then the devices reach the outside world.
    fn go_live(&mut self, generation: Generation) -> Result<bool, Error> {
        let replay = self.timeline.take().expect("only taken here");
        let Some(Promotion { undelivered, timeline }) = replay.go_live(&self.delivered) else {
            return Ok(false);
        };
        self.timeline = Some(timeline);
        for (device, inputs) in undelivered.into_iter().enumerate() {
            self.apply(Happening::DeliverLogged { device, inputs })?;
        }
        for (port, delivered) in self.ports.iter_mut().zip(&self.delivered) {
            port.call(&Request::GoLive {
                inputs: *delivered,
                generation,
            })?;
        }
        self.begin_recording()?;
        self.history.event(Event::Live { generation });
        (self.on_live)(generation, &self.position);
        Ok(true)
    }
}
