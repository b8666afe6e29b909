//! A position clock that counts instructions by breakpoints: every instruction is a place, and an overflow is as late as a seed wants.

use ft_vcpu_shim::{
    error::Error,
    lockstep::position::{PositionClock, Until, leads_to_at_most},
    machine::vcpu::{Exit, Vcpu},
};

const MARGIN: u32 = 24;

#[derive(Debug)]
pub struct StepClock {
    progress: u32,
    random: Random,
}

impl StepClock {
    pub fn new(seed: u64) -> Self {
        Self {
            progress: 0,
            random: Random::new(seed),
        }
    }
}

/// xorshift64 (Marsaglia 2003).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

impl PositionClock for StepClock {
    fn restart(&mut self, _vcpu: &Vcpu) -> Result<(), Error> {
        self.progress = 0;
        Ok(())
    }

    fn progress(&mut self, _vcpu: &Vcpu) -> Result<u32, Error> {
        Ok(self.progress)
    }

    fn margin(&self) -> u32 {
        MARGIN
    }

    fn run(&mut self, vcpu: &mut Vcpu, until: Until) -> Result<Exit, Error> {
        let overflow = match until {
            Until::Progress(progress) => progress + self.random.below(u64::from(MARGIN)) as u32,
            Until::Exit | Until::Breakpoint => u32::MAX,
        };
        loop {
            if self.progress >= overflow {
                vcpu.debug(&[])?;
                return Ok(Exit::Interrupted);
            }
            if until != Until::Breakpoint {
                vcpu.debug(&leads_to_at_most(vcpu)?)?;
            }
            let before = (vcpu.registers().rip, vcpu.to_enter()?);
            let exit = vcpu.run()?;
            // A signal can come where the breakpoint is: then the instruction was executed, or the interrupt has entered, all the same.
            let moved = || Ok::<_, Error>((vcpu.registers().rip, vcpu.to_enter()?) != before);
            if exit == Exit::Trap || (exit == Exit::Interrupted && moved()?) {
                self.progress += 1;
            }
            if exit != Exit::Trap || until == Until::Breakpoint {
                return Ok(exit);
            }
        }
    }
}
