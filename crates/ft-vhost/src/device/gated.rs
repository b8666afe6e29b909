//! Life under a gate: guest memory is touched only inside a request of the shim, while the vCPU is stopped.
//!
//! ```text
//!  joined ──Start{live}──► Live      kicks perform, what arrives is logged, waits in the bounce store, is delivered on request
//!     └────Start{follow}─► Follows   kicks are repeated, inputs come from the log ──GoLive──► Live
//!  any ── role Halted ─► nothing more is sent, end       Off ─► in order
//! ```

use std::{
    collections::VecDeque,
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::Arc,
};

use ft_client::{
    DeviceGate, LogWriter, Region,
    events::{Events, monotonic_ns},
    gate::{self, Request},
    handshake::{self, DeviceSession},
    log::Urgency,
};
use ft_protocol::{Body, DeviceId, Role};
use nix::sys::socket::{MsgFlags, recv};
use tracing::{debug, info};
use vmm_sys_util::eventfd::EventFd;

use super::{Completion, Device, Input, LOOP_TOKENS, Life, Uring, earliest, until};
use crate::{
    daemon::Signals,
    exit::End,
    guest_side::Outcome,
    service::Service,
    session::{Answer, Command, CommandReceiver, QueueCommand, SharedCommand},
};

const TOKEN_COMMANDS: u64 = LOOP_TOKENS;
const TOKEN_SIGNALS: u64 = LOOP_TOKENS + 1;
const TOKEN_DOORBELL: u64 = LOOP_TOKENS + 2;
const TOKEN_COMMIT: u64 = LOOP_TOKENS + 3;
const TOKEN_LOG: u64 = LOOP_TOKENS + 4;

/// How often to look for the shim's next request before sleeping: a few microseconds.
const SPINS: u32 = 200;
/// Inputs that wait for delivery; beyond it nothing more is taken from the outside.
const INPUTS_WAITING_MAX: usize = 256;
/// And their bytes.
const INPUT_BYTES_WAITING_MAX: usize = 8 << 20;

/// An input that is logged and not delivered yet: the bounce store.
#[derive(Debug)]
struct Waiting {
    sequence: u64,
    input: Input,
}

/// The loop.
#[derive(Debug)]
pub struct Gated<D> {
    device: D,
    io: Uring,
    commands: CommandReceiver,
    signals: Signals,
    events: Events,
    service: Service,
    stream: UnixStream,
    region: Arc<Region>,
    log: LogWriter,
    gate: DeviceGate,
    commit_event: EventFd,
    id: DeviceId,
    life: Option<Life>,
    /// Inputs logged or followed, ever.
    sequence: u64,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    /// An answer that waits until the device has room again.
    withheld: Option<gate::Answer>,
    ended: bool,
}

impl<D: Device> Gated<D> {
    /// A loop for a device that has joined.
    ///
    /// # Errors
    /// Without io_uring.
    pub fn new(
        mut device: D,
        session: DeviceSession,
        commands: CommandReceiver,
        signals: Signals,
        events: Events,
        service: Service,
    ) -> Result<Self, End> {
        let DeviceSession {
            stream,
            region,
            log,
            gate,
            commit_event,
            counters,
            device: id,
        } = session;
        device.count_in(counters);
        Ok(Self {
            device,
            io: Uring::new().map_err(End::environment)?,
            commands,
            signals,
            events,
            service,
            stream,
            region,
            log,
            gate,
            commit_event,
            id,
            life: None,
            sequence: 0,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            withheld: None,
            ended: false,
        })
    }

    /// Serves the shim until the replica ends.
    ///
    /// # Errors
    /// [`End`]. ft-log has been told where this side is the cause.
    pub fn run(mut self) -> Result<(), End> {
        let result = self.serve();
        if let Err(end @ (End::Ring(_) | End::Replica(_) | End::Environment(_))) = &result {
            if self.gate.is_pending() {
                self.gate.refuse();
            }
            handshake::report_failure(&mut self.stream, &end.to_string());
        }
        self.device.ended(&mut self.events);
        result
    }

    fn serve(&mut self) -> Result<(), End> {
        for (fd, token) in [
            (self.commands.bell(), TOKEN_COMMANDS),
            (self.signals.as_raw_fd(), TOKEN_SIGNALS),
            (self.gate.doorbell(), TOKEN_DOORBELL),
            (self.commit_event.as_raw_fd(), TOKEN_COMMIT),
            (self.stream.as_raw_fd(), TOKEN_LOG),
        ] {
            self.io.poll(fd, token);
        }
        info!(device = self.id.0, "joined; waiting for the shim");
        loop {
            self.serve_gate()?;
            while let Some(completion) = self.io.next_completion() {
                self.dispatch(completion)?;
            }
            self.log_inputs()?;
            self.release()?;
            self.answer_withheld();
            if self.is_over()? {
                return Ok(());
            }
            self.sleep()?;
        }
    }

    /// Sleeps until there is something to do. What was said before the sleep is looked at once more after announcing it.
    fn sleep(&mut self) -> Result<(), End> {
        let now = monotonic_ns();
        let deadline = earliest(
            self.device.tick(now, &mut self.io, &mut self.events)?,
            self.service.tick(now),
        );
        self.gate.set_sleeping(true);
        if self.gate.is_pending() && self.withheld.is_none() {
            self.io.submit();
        } else {
            self.io.wait(until(deadline, now));
        }
        self.gate.set_sleeping(false);
        Ok(())
    }

    /// Whether the replica is over; in order only once nothing is in flight.
    fn is_over(&mut self) -> Result<bool, End> {
        match self.region.role() {
            Role::Halted => Err(End::Halted),
            Role::Off => {
                self.ended = true;
                Ok(self.device.is_idle())
            }
            _ => Ok(self.ended && self.device.is_idle()),
        }
    }

    fn dispatch(&mut self, completion: Completion) -> Result<(), End> {
        match completion.token {
            TOKEN_COMMANDS => {
                while let Some((command, reply)) = self.commands.take() {
                    reply.answer(self.command(command));
                }
                self.io.poll(self.commands.bell(), TOKEN_COMMANDS);
            }
            TOKEN_SIGNALS => {
                info!("asked to end: this ends the replica");
                self.ended = true;
            }
            TOKEN_DOORBELL => {
                self.gate.silence_doorbell();
                self.io.poll(self.gate.doorbell(), TOKEN_DOORBELL);
            }
            TOKEN_COMMIT => {
                let _ = self.commit_event.read();
                self.io.poll(self.commit_event.as_raw_fd(), TOKEN_COMMIT);
            }
            TOKEN_LOG => self.log_spoke()?,
            _ => self.device.complete(completion, &mut self.io)?,
        }
        Ok(())
    }

    /// ft-log says nothing after the welcome: its socket is readable when it is gone.
    fn log_spoke(&mut self) -> Result<(), End> {
        let gone = match recv(self.stream.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_DONTWAIT) {
            Ok(bytes) => bytes == 0,
            Err(error) => error != nix::errno::Errno::EAGAIN,
        };
        if !gone {
            self.io.poll(self.stream.as_raw_fd(), TOKEN_LOG);
        } else if self.region.role() == Role::Off || self.ended {
            self.ended = true;
        } else if self.region.role() == Role::Halted {
            return Err(End::Halted);
        } else {
            return Err(End::LogGone);
        }
        Ok(())
    }

    /// What the frontend, which is the shim, changes: the vCPU is stopped while it waits for the answer.
    fn command(&mut self, command: Command) -> Result<Answer, String> {
        let guest = self.device.guest();
        match command {
            Command::Shared(SharedCommand::Memory(memory)) => guest.set_memory(memory),
            Command::Shared(SharedCommand::Features(features)) => self.device.set_features(features),
            Command::Shared(SharedCommand::Inflight(_)) => {
                return Err("a replica whose device dies is over: nothing is taken up".into());
            }
            // It would have to happen at a position.
            Command::Shared(SharedCommand::Config { .. }) => {
                return Err("the configuration space of a protected VM is read-only".into());
            }
            Command::Shared(SharedCommand::Resize(_)) => return Err("the disk of a protected VM keeps its size".into()),
            Command::Shared(SharedCommand::Announce(_) | SharedCommand::Mtu(_)) => {
                return Err("a protected VM's network is announced at go-live, and its guest is told no MTU".into());
            }
            Command::Shared(SharedCommand::Left | SharedCommand::Close) => debug!("the shim's connection ended"),
            // Kicks and interrupts go through the gate.
            Command::Queue(queue, QueueCommand::Start { setup, .. }) => guest
                .configure_queue(queue, &setup)
                .map_err(|error| error.to_string())?,
            Command::Queue(queue, QueueCommand::Stop) => return Ok(Answer::Index(guest.stop_queue(queue))),
            Command::Queue(_, QueueCommand::Call(_))
            | Command::Shared(SharedCommand::Barrier | SharedCommand::Resume) => {}
        }
        Ok(Answer::Done)
    }

    fn serve_gate(&mut self) -> Result<(), End> {
        if self.withheld.is_some() {
            return Ok(());
        }
        let mut spins = 0;
        loop {
            if let Some(outcome) = self.serve_request()? {
                let answer = gate::Answer {
                    interrupt: outcome.interrupt,
                    digest: outcome.digest,
                };
                if !self.device.has_room() {
                    self.withheld = Some(answer);
                    return Ok(());
                }
                // The vCPU goes on first; then the disk gets what it asked for.
                self.gate.answer(answer);
                self.io.submit();
                self.release()?;
                spins = 0;
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                return Ok(());
            }
        }
    }

    /// Does what the shim asks, if it asks.
    fn serve_request(&mut self) -> Result<Option<Outcome>, End> {
        let Some(request) = self.gate.take_request() else {
            return Ok(None);
        };
        let outcome = match request {
            Request::Start { live } => {
                let life = if live { Life::Live } else { Life::Follows };
                info!(live, "the vCPU starts");
                self.life = Some(life);
                self.device.start(life, &mut self.io)?;
                Outcome::default()
            }
            Request::Kick { queue, marker, .. } => {
                self.device.kicked(queue);
                let outcome = self.device.guest().kick(queue)?;
                self.device.perform(Some(marker), &mut self.io)?;
                outcome
            }
            Request::Deliver { through } => self.deliver_through(through)?,
            Request::DeliverLogged {
                sequence,
                queue,
                payload,
            } => {
                let outcome = self.device.guest().deliver(sequence, queue, payload)?;
                self.sequence = sequence;
                self.device.followed();
                outcome
            }
            Request::GoLive { inputs, generation } => {
                info!(inputs, %generation, "going live");
                self.sequence = inputs;
                self.life = Some(Life::Live);
                self.device.go_live(&mut self.io, &mut self.events)?;
                self.gate.set_inputs(inputs);
                Outcome::default()
            }
        };
        Ok(Some(outcome))
    }

    fn deliver_through(&mut self, through: u64) -> Result<Outcome, End> {
        let mut outcome = Outcome::default();
        while self.waiting.front().is_some_and(|waiting| waiting.sequence <= through) {
            let Some(Waiting { sequence, input }) = self.waiting.pop_front() else {
                break;
            };
            outcome = outcome.then(self.device.guest().deliver(sequence, input.queue, &input.payload)?);
            self.waiting_bytes -= input.payload.len();
            self.device.recycle(input.payload);
        }
        Ok(outcome)
    }

    /// Logs what arrived and tells the shim.
    fn log_inputs(&mut self) -> Result<(), End> {
        if self.life != Some(Life::Live) || self.ended {
            return Ok(());
        }
        let before = self.sequence;
        while self.waiting.len() < INPUTS_WAITING_MAX && self.waiting_bytes < INPUT_BYTES_WAITING_MAX {
            let Some(input) = self.device.take_input(&mut self.io)? else {
                break;
            };
            self.sequence += 1;
            let body = Body::Input {
                sequence: self.sequence,
                payload: &input.payload,
            };
            // Nobody outside waits for it: it travels with the next output.
            self.log.append(self.id, input.queue, &body, Urgency::Later)?;
            self.waiting_bytes += input.payload.len();
            self.waiting.push_back(Waiting {
                sequence: self.sequence,
                input,
            });
        }
        if self.sequence != before {
            self.gate.set_inputs(self.sequence);
        }
        Ok(())
    }

    /// Lets go what is committed, and asks to be told when the rest is.
    fn release(&mut self) -> Result<(), End> {
        loop {
            // From a halted side nothing more is sent.
            if self.life != Some(Life::Live) || self.region.role() == Role::Halted {
                return Ok(());
            }
            let Some(first) = self.device.release(self.region.committed())? else {
                return Ok(());
            };
            self.region.want_commit(self.id, first);
            // The commit may have come before the wish.
            if !self.region.committed().covers(first) {
                return Ok(());
            }
        }
    }

    fn answer_withheld(&mut self) {
        if self.device.has_room()
            && let Some(answer) = self.withheld.take()
        {
            self.gate.answer(answer);
        }
    }
}
