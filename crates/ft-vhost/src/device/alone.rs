//! Life under any vhost-user frontend: the guest's notifications come by eventfd, what arrives is delivered at once. Without ft-log,
//! or (engine `device`) with a [`Link`] to it.

use std::{os::fd::AsRawFd, sync::Arc};

use ft_client::events::{Events, monotonic_ns};
use ft_protocol::Lsn;
use tracing::{error, info};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Completion, Device, Input, LOOP_TOKENS, Life, Part, Uring, earliest,
    mirror::{Link, Standing},
    patience::Patience,
    until,
    uring::PollHandle,
};
use crate::{
    daemon::Signals,
    exit::End,
    guest_side::{Outcome, RingError, dirty::GuestMemoryMmap},
    service::Service,
    session::{Answer, Command, CommandReceiver, QueueCommand, Reply, SharedCommand},
};

const TOKEN_COMMANDS: u64 = LOOP_TOKENS;
const TOKEN_SIGNALS: u64 = LOOP_TOKENS + 1;
const TOKEN_FAILED: u64 = LOOP_TOKENS + 2;
const TOKEN_COMMIT: u64 = LOOP_TOKENS + 3;
const TOKEN_LOG: u64 = LOOP_TOKENS + 4;
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
    signals: Arc<Signals>,
    /// Readable when another thread of the device failed.
    failed: EventFd,
    events: Events,
    service: Service,
    lines: Vec<Line>,
    waiting: Option<(Waits, Reply)>,
    sequence: u64,
    ending: bool,
    link: Option<Link>,
    /// Engine `device`: the last entry is written, and the end of the VM is waited for.
    said_last: bool,
}

impl<D: Device> Alone<D> {
    /// A loop that has not started yet.
    ///
    /// # Errors
    /// Without io_uring.
    pub fn new(
        mut device: D,
        commands: CommandReceiver,
        signals: Arc<Signals>,
        failed: EventFd,
        events: Events,
        service: Service,
    ) -> Result<Self, End> {
        let lines = (0..device.guest().queue_count()).map(|_| Line::default()).collect();
        Ok(Self {
            device,
            io: Uring::new().map_err(End::environment)?,
            commands,
            signals,
            failed,
            events,
            service,
            lines,
            waiting: None,
            sequence: 0,
            ending: false,
            link: None,
            said_last: false,
        })
    }

    /// The same for a device that has its mirror already.
    #[must_use]
    pub(crate) fn linked(self, link: Link) -> Self {
        Self {
            link: Some(link),
            ..self
        }
    }

    /// Serves until SIGTERM, or until the replica is over.
    ///
    /// # Errors
    /// [`End`]. ft-log has been told where this side is the cause.
    pub fn run(mut self) -> Result<(), End> {
        let result = self.serve();
        if let (Err(end @ (End::Ring(_) | End::Replica(_) | End::Environment(_))), Some(link)) =
            (&result, &mut self.link)
        {
            link.report(end);
        }
        self.device.ended(&mut self.events);
        result
    }

    fn serve(&mut self) -> Result<(), End> {
        if let Some(link) = &self.link {
            self.io.poll(link.commit_event.as_raw_fd(), TOKEN_COMMIT);
            self.io.poll(link.stream.as_raw_fd(), TOKEN_LOG);
        }
        self.io.poll(self.commands.bell(), TOKEN_COMMANDS);
        self.io.poll(self.signals.as_raw_fd(), TOKEN_SIGNALS);
        self.io.poll(self.failed.as_raw_fd(), TOKEN_FAILED);
        self.device.start(Life::Alone, &mut self.io)?;
        // Waits for the image take as long as it takes; waits for the driver are another matter. Each is learned by itself.
        let mut patience = [Patience::new(self.device.poll_ns_max()); 2];
        // Whether the rings are looked at without being told; the drivers are asked to tell before this thread sleeps.
        let mut looking = false;
        loop {
            let mut worked = false;
            while let Some(completion) = self.io.next_completion() {
                self.dispatch(completion)?;
                worked = true;
            }
            worked |= if looking { self.look()? } else { self.drain_kicked()? };
            let marker = match self.release()? {
                Some(marker) => marker,
                None => return Ok(()),
            };
            worked |= self.deliver()?;
            self.answer_idle()?;
            if self.ending && self.device.is_idle() && self.may_end() {
                info!("drained; the end");
                return Ok(());
            }
            let now = monotonic_ns();
            let deadline = earliest(
                self.device.tick(now, &mut self.io, &mut self.events)?,
                self.service.tick(now),
            );
            let more = self.lines.iter().any(|line| line.kicked && line.serves) && self.device.has_room();
            if worked || more {
                patience.iter_mut().for_each(|patience| patience.busy(now));
                self.io.submit();
            } else if patience[usize::from(self.device.is_idle())].looks_again(now) {
                looking = true;
                self.io.submit();
                std::hint::spin_loop();
            } else if looking {
                // Asks to be told, and finds what came before that.
                self.lines.iter_mut().for_each(|line| line.kicked = true);
                looking = false;
            } else if self.link.as_ref().is_none_or(|link| link.sleeps_until(marker)) {
                self.io.wait(until(deadline, now));
            }
        }
    }

    /// Engine `device`: completes what is committed, and gives what is waited for first; `None` when the VM is over.
    fn release(&mut self) -> Result<Option<Option<Lsn>>, End> {
        let Some(link) = &mut self.link else {
            return Ok(Some(None));
        };
        match link.stand(&mut self.events)? {
            Standing::Serves => {}
            Standing::Unprotected => self.device.take_part(Part::Last)?,
            Standing::Over => {
                self.device.take_part(Part::Last)?;
                return Ok(None);
            }
        }
        let number = link.synchronisation();
        self.device.synchronise(number);
        if number.is_some() {
            while let Some((sector, digests)) = link.next_digests()? {
                self.device.compare(sector, &digests);
            }
        }
        if let Some(holds) = link.fall() {
            // The other image may be the one that counts from here on.
            self.device.take_part(Part::Joins)?;
            link.obey(holds);
        }
        let awaits = link.awaits();
        let marker = self.device.committed(link.committed(), &mut self.io)?;
        Ok(Some(marker.or(awaits)))
    }

    /// Whether a drained daemon is done. Engine `device`: with a frontend that is still there the other host takes over, without one the
    /// VM is over on both.
    fn may_end(&mut self) -> bool {
        if self.link.is_none() || self.lines.iter().any(|line| line.started) {
            return true;
        }
        if !std::mem::replace(&mut self.said_last, true) {
            self.device.power_off();
        }
        false
    }

    /// ft-log says nothing after the welcome: its socket is readable when it is gone.
    fn log_spoke(&mut self) -> Result<(), End> {
        match &mut self.link {
            Some(link) => match link.stand(&mut self.events)? {
                // Seen again where the loop ends in order.
                Standing::Over => Ok(()),
                Standing::Serves | Standing::Unprotected => Err(End::LogGone),
            },
            None => Ok(()),
        }
    }

    /// Takes what is in the rings. Nobody is asked to tell of more.
    fn look(&mut self) -> Result<bool, End> {
        let mut some = false;
        for queue in 0..self.lines.len() {
            if !self.lines[queue].serves || !self.device.has_room() {
                continue;
            }
            self.lines[queue].kicked = false;
            let found = self.device.guest().poll(queue as u16);
            some |= found != Ok(false);
            self.device.perform(None, &mut self.io)?;
            if let Err(reason) = found {
                self.settle(queue, Err(reason));
            }
        }
        Ok(some)
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
            TOKEN_FAILED => self.end(),
            TOKEN_COMMIT => {
                if let Some(link) = &self.link {
                    let _ = link.commit_event.read();
                    self.io.poll(link.commit_event.as_raw_fd(), TOKEN_COMMIT);
                }
            }
            TOKEN_LOG => self.log_spoke()?,
            token if token >= TOKEN_KICK => {
                let queue = (token & 0xffff) as usize;
                let line = &mut self.lines[queue];
                if token == line.token(queue) {
                    if completion.result >= 0 {
                        line.kicked = true;
                        self.device.kicked(queue as u16);
                    }
                    if !completion.more {
                        self.listen_on(queue, completion.result);
                    }
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
            SharedCommand::Inflight(_) | SharedCommand::Config { .. } if self.link.is_some() => {
                return Err("a protected disk is not taken up by another daemon, and its cache mode is fixed".into());
            }
            SharedCommand::Resize(_) if self.link.is_some() => {
                return Err("the disk of a protected VM keeps its size".into());
            }
            SharedCommand::Inflight(region) => self.device.guest().set_inflight(Some(region)),
            SharedCommand::Config { offset, bytes } => self.device.set_config(offset, &bytes)?,
            SharedCommand::Resume => {
                self.device.resume();
                return Ok(Answer::Config(self.device.config()));
            }
            SharedCommand::Resize(bytes) => return self.device.resize(bytes).map(Answer::Config),
            SharedCommand::Announce(mac) => self.device.announce(mac),
            SharedCommand::Mtu(mtu) => self.device.set_mtu(mtu)?,
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
        line.poll = kick.as_ref().map(|kick| self.io.poll_always(kick.as_raw_fd(), token));
        (line.kick, line.call, line.error) = (kick, call, error);
        line.serves = !self.ending;
        // The driver may have filled the ring before anybody listened.
        line.kicked = true;
    }

    /// The poll of a queue's kicks ended by itself: for want of room it only pauses, anything else is the end of the queue.
    fn listen_on(&mut self, queue: usize, result: i32) {
        let line = &mut self.lines[queue];
        let token = line.token(queue);
        line.poll = None;
        if let (0.., Some(kick)) = (result, &line.kick) {
            line.poll = Some(self.io.poll_always(kick.as_raw_fd(), token));
            return;
        }
        let reason = std::io::Error::from_raw_os_error(-result);
        error!(queue, %reason, "the kicks of this queue cannot be heard: it is stopped");
        self.break_queue(queue);
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

    fn drain_kicked(&mut self) -> Result<bool, End> {
        let mut some = false;
        for queue in 0..self.lines.len() {
            let line = &mut self.lines[queue];
            if !line.serves || !line.kicked || !self.device.has_room() {
                continue;
            }
            line.kicked = false;
            let outcome = self.device.guest().kick(queue as u16);
            some |= outcome.as_ref().is_ok_and(|outcome| outcome.found);
            // What was drained before an error is performed all the same.
            self.device.perform(None, &mut self.io)?;
            self.settle(queue, outcome);
        }
        Ok(some)
    }

    fn deliver(&mut self) -> Result<bool, End> {
        let before = self.sequence;
        while let Some(Input { queue, payload }) = self.device.take_input(&mut self.io)? {
            if self.device.guest().is_configured(queue) {
                self.sequence += 1;
                let outcome = self.device.guest().deliver(self.sequence, queue, &payload);
                self.settle(queue.into(), outcome);
            }
            self.device.recycle(payload);
        }
        Ok(self.sequence != before)
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
                self.break_queue(queue);
            }
        }
    }

    fn break_queue(&mut self, queue: usize) {
        let line = &mut self.lines[queue];
        if let Some(error) = &line.error {
            let _ = error.write(1);
        }
        line.serves = false;
        self.device.guest().stop_queue(queue as u16);
    }

    /// Answers what waits for the device to be idle.
    fn answer_idle(&mut self) -> Result<(), End> {
        if self.waiting.is_some() || self.ending {
            self.device.give_up(&mut self.io)?;
            self.deliver()?;
        }
        if !self.device.is_idle() {
            return Ok(());
        }
        let Some((waits, reply)) = self.waiting.take() else {
            return Ok(());
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
        Ok(())
    }
}

#[cfg(test)]
mod tests;
