//! What the guest did at a stop, and what it means: the board, a queue, the console, the time.

use ft_client::{
    crash,
    gate::{Answer, Request},
};

use super::{End, Execution};
use crate::{
    error::Error,
    lockstep::history::Event,
    machine::{msr::TIME_STAMP_COUNTER, vcpu::Exit},
    platform::{Effect, virtio_mmio},
    rewrite::Kind,
};

const KIND_PORT_WRITE: u8 = 1;
const KIND_PORT_READ: u8 = 2;
const KIND_MMIO_WRITE: u8 = 3;
const KIND_MMIO_READ: u8 = 4;
const KIND_HALT: u8 = 5;
const KIND_WINDOW: u8 = 6;
const KIND_MSR_READ: u8 = 8;
const KIND_MSR_WRITE: u8 = 9;

impl Execution {
    /// Does what the guest asked for. `Some`: the execution ended.
    pub(super) fn access(&mut self, exit: &Exit) -> Result<Option<End>, Error> {
        match *exit {
            Exit::PortWrite { port, size } => self.port_write(port, size),
            Exit::PortRead { port, size } => self.port_read(port, size),
            Exit::MmioWrite { address } => self.mmio_write(address),
            Exit::MmioRead { address } => self.mmio_read(address),
            Exit::MsrRead { index } => self.msr_read(index),
            Exit::MsrWrite { index } => {
                self.digests.exit(KIND_MSR_WRITE, u64::from(index), self.vcpu.data());
                self.vcpu.answer_msr(None);
                Ok(None)
            }
            Exit::Halt => {
                self.digests.exit(KIND_HALT, 0, &[]);
                Ok(None)
            }
            Exit::Window => {
                self.digests.exit(KIND_WINDOW, 0, &[]);
                Ok(None)
            }
            Exit::Shutdown => Err(self.guest("triple fault")),
            Exit::Unexpected(ref what) => Err(self.guest(&format!("KVM exit {what}"))),
            Exit::Interrupted | Exit::Trap => Ok(None),
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

    /// The guest reads an MSR of its host: the counter is virtual time, and it has no other.
    fn msr_read(&mut self, index: u32) -> Result<Option<End>, Error> {
        self.digests.exit(KIND_MSR_READ, u64::from(index), &[]);
        if index != TIME_STAMP_COUNTER {
            self.vcpu.answer_msr(None);
            return Ok(None);
        }
        if let Some(end) = self.sample_time()? {
            return Ok(Some(end));
        }
        let now_ns = self.board.now_ns();
        self.history.answered(&now_ns.to_le_bytes());
        self.vcpu.answer_msr(Some(now_ns));
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

    pub(super) fn interrupt_line(&mut self, device: usize, answer: Answer) {
        if answer.interrupt {
            self.board.raise(device);
        }
    }
}
