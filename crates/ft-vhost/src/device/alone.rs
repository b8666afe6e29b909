//! Life without ft-log, under any vhost-user frontend: the guest's notifications come by eventfd, what arrives is delivered at once.

use std::os::fd::AsRawFd;

use ft_client::events::{Events, monotonic_ns};
use tracing::{error, info};
use vmm_sys_util::eventfd::EventFd;

use super::{Completion, Device, Input, LOOP_TOKENS, Life, Uring, earliest, until, uring::PollHandle};
use crate::{
    daemon::Signals,
    exit::End,
    guest_side::{Outcome, RingError, dirty::GuestMemoryMmap},
    service::Service,
    session::{Answer, Command, CommandReceiver, QueueCommand, Reply, SharedCommand},
};

const TOKEN_COMMANDS: u64 = LOOP_TOKENS;
const TOKEN_SIGNALS: u64 = LOOP_TOKENS + 1;
/// Token of a queue's kick: base, queue in the low 16 bits, number of its start above.
const TOKEN_KICK: u64 = LOOP_TOKENS + (1 << 62);

/// The eventfds of a queue.
#[derive(Debug, Default)]
struct Line {
    kick: Option<EventFd>,
    call: Option<EventFd>,
    error: Option<EventFd>,
    poll: Option<PollHandle>,
    /// Tells the kicks of this start of the queue from those of earlier ones.
    starts: u32,
    /// The guest wants it drained.
    kicked: bool,
    /// Started, and not stopped since.
    started: bool,
    /// Runs, and is not about to stop.
    serves: bool,
}

impl Line {
    fn token(&self, queue: usize) -> u64 {
        TOKEN_KICK + (u64::from(self.starts) << 16) + queue as u64
    }
}

/// What is answered once nothing is in flight.
#[derive(Clone, Copy, Debug)]
enum Waits {
    /// This queue stops.
    Queue(u16),
    /// The frontend left.
    Frontend,
}

/// The loop.
#[derive(Debug)]
pub struct Alone<D> {
    device: D,
    io: Uring,
    commands: CommandReceiver,
    signals: Signals,
    events: Events,
    service: Service,
    lines: Vec<Line>,
    waiting: Option<(Waits, Reply)>,
    sequence: u64,
    ending: bool,
}

impl<D: Device> Alone<D> {
    /// A loop that has not started yet.
    ///
    /// # Errors
    /// Without io_uring.
    pub fn new(
        mut device: D,
        commands: CommandReceiver,
        signals: Signals,
        events: Events,
        service: Service,
    ) -> Result<Self, End> {
        let lines = (0..device.guest().queue_count()).map(|_| Line::default()).collect();
        Ok(Self {
            device,
            io: Uring::new().map_err(End::environment)?,
            commands,
            signals,
            events,
            service,
            lines,
            waiting: None,
            sequence: 0,
            ending: false,
        })
    }

    /// Serves until SIGTERM.
    ///
    /// # Errors
    /// [`End`].
    pub fn run(mut self) -> Result<(), End> {
        self.io.poll(self.commands.bell(), TOKEN_COMMANDS);
        self.io.poll(self.signals.as_raw_fd(), TOKEN_SIGNALS);
        self.device.start(Life::Alone, &mut self.io)?;
        loop {
            while let Some(completion) = self.io.next_completion() {
                self.dispatch(completion)?;
            }
            self.drain_kicked()?;
            self.deliver()?;
            self.answer_idle();
            if self.ending && self.device.is_idle() {
                info!("drained; the end");
                return Ok(());
            }
            let now = monotonic_ns();
            let deadline = earliest(self.device.tick(now, &mut self.events)?, self.service.tick(now));
            if self.lines.iter().any(|line| line.kicked && line.serves) {
                self.io.submit();
            } else {
                self.io.wait(until(deadline, now));
            }
        }
    }

    fn dispatch(&mut self, completion: Completion) -> Result<(), End> {
        match completion.token {
            TOKEN_COMMANDS => {
                while let Some((command, reply)) = self.commands.take() {
                    self.command(command, reply);
                }
                self.io.poll(self.commands.bell(), TOKEN_COMMANDS);
            }
            TOKEN_SIGNALS => {
                info!("asked to end: draining");
                self.end();
            }
            token if token >= TOKEN_KICK => {
                let queue = (token & 0xffff) as usize;
                let line = &mut self.lines[queue];
                if token == line.token(queue) && completion.result >= 0 {
                    if let Some(kick) = &line.kick {
                        let _ = kick.read();
                        line.poll = Some(self.io.poll(kick.as_raw_fd(), token));
                    }
                    line.kicked = true;
                }
            }
            _ => self.device.complete(completion, &mut self.io)?,
        }
        Ok(())
    }

    fn end(&mut self) {
        self.service.stopping();
        self.ending = true;
        self.lines.iter_mut().for_each(|line| line.serves = false);
    }

    fn command(&mut self, command: Command, reply: Reply) {
        let answer = match command {
            Command::Queue(queue, QueueCommand::Stop) => {
                // What is in flight completes first: the frontend takes the ring away.
                self.quiet(queue.into());
                self.wait_idle(Waits::Queue(queue), reply);
                return;
            }
            Command::Shared(SharedCommand::Left) => {
                for queue in 0..self.lines.len() {
                    self.quiet(queue);
                    self.lines[queue].call = None;
                    self.lines[queue].error = None;
                }
                self.wait_idle(Waits::Frontend, reply);
                return;
            }
            Command::Queue(queue, command) => self.queue_command(queue, command),
            Command::Shared(command) => self.shared_command(command),
        };
        reply.answer(answer);
    }

    fn queue_command(&mut self, queue: u16, command: QueueCommand) -> Result<Answer, String> {
        match command {
            QueueCommand::Start {
                setup,
                kick,
                call,
                error,
            } => {
                if !self.lines.iter().any(|line| line.started) {
                    self.device.attach()?;
                }
                self.lines[usize::from(queue)].started = true;
                let configured = self.device.guest().configure_queue(queue, &setup);
                if let Err(error) = configured {
                    self.stopped(queue.into());
                    return Err(error.to_string());
                }
                self.listen(queue.into(), kick, call, error);
            }
            QueueCommand::Call(call) => self.lines[usize::from(queue)].call = call,
            QueueCommand::Stop => unreachable!("it waits until the device is idle"),
        }
        Ok(Answer::Done)
    }

    fn shared_command(&mut self, command: SharedCommand) -> Result<Answer, String> {
        match command {
            SharedCommand::Memory(memory) => self.device.guest().set_memory(memory),
            SharedCommand::Features(features) => self.device.set_features(features),
            SharedCommand::Inflight(region) => self.device.guest().set_inflight(Some(region)),
            SharedCommand::Config { offset, bytes } => self.device.set_config(offset, &bytes)?,
            SharedCommand::Resize(bytes) => return self.device.resize(bytes).map(Answer::Config),
            // Taken between two writes to guest memory, it is between them.
            SharedCommand::Barrier => {}
            SharedCommand::Close => {
                info!("no other frontend can come: draining");
                self.end();
            }
            SharedCommand::Left => unreachable!("it waits until the device is idle"),
        }
        Ok(Answer::Done)
    }

    /// Nothing of a queue is in flight, and nothing will be.
    fn stopped(&mut self, queue: usize) {
        let before = std::mem::take(&mut self.lines[queue].started);
        if before && !self.lines.iter().any(|line| line.started) {
            self.device.detach();
        }
    }

    fn wait_idle(&mut self, waits: Waits, reply: Reply) {
        let other = self.waiting.replace((waits, reply));
        assert!(other.is_none(), "the control thread waits for each answer");
    }

    fn listen(&mut self, queue: usize, kick: Option<EventFd>, call: Option<EventFd>, error: Option<EventFd>) {
        let line = &mut self.lines[queue];
        line.starts = line.starts.wrapping_add(1);
        let token = line.token(queue);
        line.poll = kick.as_ref().map(|kick| self.io.poll(kick.as_raw_fd(), token));
        (line.kick, line.call, line.error) = (kick, call, error);
        line.serves = !self.ending;
        // The driver may have filled the ring before anybody listened.
        line.kicked = true;
    }

    /// Stops listening to a queue.
    fn quiet(&mut self, queue: usize) {
        let line = &mut self.lines[queue];
        line.serves = false;
        line.kicked = false;
        line.kick = None;
        if let Some(poll) = line.poll.take() {
            self.io.cancel(poll);
            line.starts = line.starts.wrapping_add(1);
        }
    }

    fn drain_kicked(&mut self) -> Result<(), End> {
        for queue in 0..self.lines.len() {
            let line = &mut self.lines[queue];
            if !line.serves || !line.kicked || !self.device.has_room() {
                continue;
            }
            line.kicked = false;
            let outcome = self.device.guest().kick(queue as u16);
            // What was drained before an error is performed all the same.
            self.device.perform(None, &mut self.io)?;
            self.settle(queue, outcome);
        }
        Ok(())
    }

    fn deliver(&mut self) -> Result<(), End> {
        while let Some(Input { queue, payload }) = self.device.take_input(&mut self.io)? {
            if self.device.guest().is_configured(queue) {
                self.sequence += 1;
                let outcome = self.device.guest().deliver(self.sequence, queue, &payload);
                self.settle(queue.into(), outcome);
            }
            self.device.recycle(payload);
        }
        Ok(())
    }

    /// Interrupts the guest if it is due, and stops a queue that its driver broke; the others go on.
    fn settle(&mut self, queue: usize, outcome: Result<Outcome, RingError>) {
        let line = &mut self.lines[queue];
        match outcome {
            Ok(outcome) => {
                line.kicked |= outcome.more;
                if let (true, Some(call)) = (outcome.interrupt, &line.call) {
                    // A counter that cannot be raised is full: the interrupt is pending already.
                    let _ = call.write(1);
                }
            }
            Err(reason) => {
                error!(queue, %reason, "the guest's driver broke this queue: it is stopped");
                if let Some(error) = &line.error {
                    let _ = error.write(1);
                }
                line.serves = false;
                self.device.guest().stop_queue(queue as u16);
            }
        }
    }

    /// Answers what waits for the device to be idle.
    fn answer_idle(&mut self) {
        if !self.device.is_idle() {
            return;
        }
        let Some((waits, reply)) = self.waiting.take() else {
            return;
        };
        let guest = self.device.guest();
        let answer = match waits {
            Waits::Queue(queue) => {
                let next = guest.stop_queue(queue);
                self.stopped(queue.into());
                Answer::Index(next)
            }
            Waits::Frontend => {
                guest.reset();
                guest.set_inflight(None);
                // Holding on to the mapping would keep the memory of a VM that is gone.
                guest.set_memory(GuestMemoryMmap::new());
                (0..self.lines.len()).for_each(|queue| self.stopped(queue));
                Answer::Done
            }
        };
        reply.answer(Ok(answer));
    }
}
