//! One vCPU, run from stop point to stop point. The same code records and replays.
//!
//! ```text
//!   ┌─► KVM_RUN ─► exit: count, digest ─► the access itself (board, kick, time) ─┐
//!   │                                                                            ▼
//!   └── interrupt, if one is pending and can enter ◄── what happens at this stop (deliver, time), until nothing more
//! ```
//! An exit by a signal is no stop: nothing happened in the guest.

use ft_client::{
    crash,
    gate::{Answer, Request},
};
use ft_protocol::{Generation, Position, Stop};

use super::{
    digest::Digests,
    history::{Access, Event, History},
    timeline::{Answered, Happening, Promotion, Timeline, Waiting},
};
use crate::{
    device::Port,
    error::Error,
    machine::vcpu::{Exit, Vcpu},
    platform::{Board, Effect, virtio_mmio},
    rewrite::Kind,
};

const KIND_PORT_WRITE: u8 = 1;
const KIND_PORT_READ: u8 = 2;
const KIND_MMIO_WRITE: u8 = 3;
const KIND_MMIO_READ: u8 = 4;
const KIND_HALT: u8 = 5;

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

/// A running machine.
pub struct Execution {
    vcpu: Vcpu,
    board: Board,
    ports: Vec<Box<dyn Port>>,
    timeline: Option<Box<dyn Timeline>>,
    on_live: OnLive,
    exits: u64,
    position: Position,
    digests: Digests,
    history: History,
    delivered: Vec<u64>,
}

impl Execution {
    /// A machine at power-on.
    #[must_use]
    pub fn new(
        vcpu: Vcpu,
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
            exits: 0,
            position: Position::default(),
            digests: Digests::default(),
            history: History::default(),
            delivered,
        }
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
        self.timeline.as_deref_mut().expect("only taken while going live")
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
        Ok(())
    }

    /// Runs to the next stop and lets everything happen there.
    ///
    /// # Errors
    /// See [`Execution::run`].
    pub fn step(&mut self) -> Result<Step, Error> {
        let exit = loop {
            match self.vcpu.run()? {
                Exit::Interrupted => {}
                Exit::Trap => return Ok(Step::Trap),
                exit => break exit,
            }
        };
        self.exits += 1;
        let registers = self.vcpu.registers();
        self.position = Position {
            exits: self.exits,
            offset: 0,
            rip: registers.rip,
            rcx: registers.rcx,
        };
        let entry = self.timeline().last_entry();
        let access = Access::of(&exit, self.vcpu.data());
        self.digests.registers(&registers);
        self.history
            .begin(self.position, access, registers, self.digests.combined(), entry);
        let end = self.handle(exit)?;
        // An offline replay has no timeline left at the end of its log: then nothing was applied here.
        let entry = self.timeline.as_deref().map_or(entry, Timeline::last_entry);
        self.history.settled(self.digests.combined(), entry);
        Ok(end.map_or(Step::Stop, Step::End))
    }

    fn handle(&mut self, exit: Exit) -> Result<Option<End>, Error> {
        let mut idle = false;
        let end = match exit {
            Exit::PortWrite { port, size } => self.port_write(port, size)?,
            Exit::PortRead { port, size } => self.port_read(port, size)?,
            Exit::MmioWrite { address } => self.mmio_write(address)?,
            Exit::MmioRead { address } => self.mmio_read(address)?,
            Exit::Halt => {
                self.digests.exit(KIND_HALT, 0, &[]);
                idle = true;
                None
            }
            Exit::Shutdown => return Err(self.guest("triple fault")),
            Exit::Unexpected(what) => return Err(self.guest(&format!("KVM exit {what}"))),
            Exit::Interrupted | Exit::Trap => None,
        };
        match end {
            Some(end) => Ok(Some(end)),
            None => self.settle(idle),
        }
    }

    fn guest(&self, reason: &str) -> Error {
        Error::Guest {
            position: self.position,
            reason: reason.into(),
        }
    }

    fn port_write(&mut self, port: u16, size: usize) -> Result<Option<End>, Error> {
        self.digests.exit(KIND_PORT_WRITE, u64::from(port), self.vcpu.data());
        let units = self.vcpu.data().len() / size;
        for unit in 0..units {
            let bytes = unit * size..(unit + 1) * size;
            if self.board.port_write_needs_time(port, &self.vcpu.data()[bytes.clone()])
                && let Some(end) = self.sample_time()?
            {
                return Ok(Some(end));
            }
            let effect = self.board.port_write(port, &self.vcpu.data()[bytes]);
            if let Some(end) = self.take_effect(effect)? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    fn port_read(&mut self, port: u16, size: usize) -> Result<Option<End>, Error> {
        self.digests.exit(KIND_PORT_READ, u64::from(port), &[]);
        if let Some(instruction) = self.board.time_stamp(port, self.vcpu.answer().len()) {
            return self.read_time_stamp(instruction);
        }
        if self.board.port_read_shows_time(port, size)
            && let Some(end) = self.sample_time()?
        {
            return Ok(Some(end));
        }
        for unit in self.vcpu.answer().chunks_mut(size) {
            self.board.port_read(port, unit);
        }
        self.history.answered(self.vcpu.answer());
        Ok(None)
    }

    /// A rewritten RDTSC or RDTSCP: the counter is virtual time, one count a nanosecond.
    fn read_time_stamp(&mut self, instruction: Kind) -> Result<Option<End>, Error> {
        if let Some(end) = self.sample_time()? {
            return Ok(Some(end));
        }
        let [low, high] = [self.board.now_ns() as u32, (self.board.now_ns() >> 32) as u32];
        self.vcpu.answer().copy_from_slice(&low.to_le_bytes());
        self.history.answered(self.vcpu.answer());
        let mut registers = self.vcpu.registers();
        registers.rdx = u64::from(high);
        if instruction == Kind::Rdtscp {
            // IA32_TSC_AUX, which Linux sets to CPU and node.
            registers.rcx = 0;
        }
        self.vcpu.set_registers(registers);
        Ok(None)
    }

    /// The access at this stop shows the guest the time, or needs it.
    fn sample_time(&mut self) -> Result<Option<End>, Error> {
        let stop = self.stop();
        let Some(now_ns) = self.ask(|timeline| timeline.now(&stop))? else {
            return Ok(Some(End::LogEnd));
        };
        self.history.event(Event::Time(now_ns));
        self.board.advance_time(now_ns);
        Ok(None)
    }

    fn mmio_write(&mut self, address: u64) -> Result<Option<End>, Error> {
        self.digests.exit(KIND_MMIO_WRITE, address, self.vcpu.data());
        let effect = self.board.mmio_write(address, self.vcpu.data());
        self.take_effect(effect)
    }

    fn mmio_read(&mut self, address: u64) -> Result<Option<End>, Error> {
        self.digests.exit(KIND_MMIO_READ, address, &[]);
        if self.board.load_shows_time(address)
            && let Some(end) = self.sample_time()?
        {
            return Ok(Some(end));
        }
        self.board.mmio_read(address, self.vcpu.answer());
        self.history.answered(self.vcpu.answer());
        Ok(None)
    }

    fn take_effect(&mut self, effect: Effect) -> Result<Option<End>, Error> {
        match effect {
            Effect::None => Ok(None),
            Effect::ConsoleLine => self.console(),
            Effect::PowerOff { reset } => self.power_off(reset),
            Effect::Virtio(device, effect) => self.virtio(device, effect),
        }
    }

    fn console(&mut self) -> Result<Option<End>, Error> {
        let line = self.board.serial.take_line();
        let stop = self.stop();
        let answered = self.ask(|timeline| timeline.console(&stop, &line))?;
        self.digests.output(xxhash_rust::xxh3::xxh3_64(&line));
        self.history.event(Event::Console {
            bytes: line.len() as u32,
        });
        Ok(answered.map_or(Some(End::LogEnd), |()| None))
    }

    fn power_off(&mut self, reset: bool) -> Result<Option<End>, Error> {
        if !self.board.serial.is_empty()
            && let Some(end) = self.console()?
        {
            return Ok(Some(end));
        }
        let stop = self.stop();
        let answered = self.ask(|timeline| timeline.power_off(&stop, reset))?;
        self.history.event(Event::PowerOff { reset });
        let end = if reset { End::Reset } else { End::PowerOff };
        Ok(Some(answered.map_or(End::LogEnd, |()| end)))
    }

    fn virtio(&mut self, device: usize, effect: virtio_mmio::Effect) -> Result<Option<End>, Error> {
        match effect {
            virtio_mmio::Effect::None => {}
            virtio_mmio::Effect::Activate => {
                let transport = &self.board.virtio[device];
                self.ports[device].activate(transport.driver_features(), transport.queues())?;
            }
            virtio_mmio::Effect::Reset => self.ports[device].reset()?,
            virtio_mmio::Effect::Kick(queue) => return self.kick(device, queue),
        }
        Ok(None)
    }

    fn kick(&mut self, device: usize, queue: u16) -> Result<Option<End>, Error> {
        let stop = self.stop();
        let output = self.ports[device].marks_output(queue);
        let Some((marker, generation)) = self.ask(|timeline| timeline.kick(&stop, device, queue, output))? else {
            return Ok(Some(End::LogEnd));
        };
        let answer = self.ports[device].call(&Request::Kick {
            queue,
            marker,
            generation,
        })?;
        self.digests.output(answer.digest);
        self.history.event(Event::Kick {
            device: device as u8,
            queue,
        });
        self.interrupt_line(device, answer);
        crash::point("shim.kick.after");
        Ok(None)
    }

    fn interrupt_line(&mut self, device: usize, answer: Answer) {
        if answer.interrupt {
            self.board.raise(device);
        }
    }

    /// Lets everything happen that happens at this stop, then lets an interrupt in. A halted guest stays here until one can enter.
    fn settle(&mut self, idle: bool) -> Result<Option<End>, Error> {
        loop {
            let can_interrupt = self.vcpu.can_interrupt();
            let waiting = Waiting {
                idle: idle && !(can_interrupt && self.board.pic.is_pending()),
                alarm_ns: self.board.deadline_ns(),
            };
            let stop = self.stop();
            let Some(happening) = self.happening(&stop, waiting)? else {
                return Ok(Some(End::LogEnd));
            };
            if happening == Happening::Nothing {
                break;
            }
            self.apply(happening)?;
        }
        if self.vcpu.can_interrupt()
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
            let timeline = self.timeline.as_deref_mut().expect("only taken while going live");
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
        self.history.event(Event::Live { generation });
        (self.on_live)(generation, &self.position);
        Ok(true)
    }
}
