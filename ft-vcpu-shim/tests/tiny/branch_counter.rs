//! A counter of conditional branches that executes instruction by instruction, by breakpoints: its overflows are as late as a seed wants, and
//! it miscounts if it is told to.

use std::time::Duration;

use iced_x86::{Decoder, DecoderOptions, FlowControl};

use ft_vcpu_shim::{
    debug::registers::memory_of,
    error::Error,
    lockstep::{
        branches::BranchCounter,
        position::{Until, leads_to_at_most},
    },
    machine::vcpu::{Exit, Vcpu},
};

use super::step_clock::Random;

/// Counts from which a starving host has nothing else to do any more; a counter of seed 0 begins at 0.
const STARVES_UNTIL: u64 = 40;

#[derive(Debug)]
pub struct FakeCounter {
    count: u64,
    overflow: Option<u64>,
    random: Random,
    /// An overflow is late by less than this.
    skid: u32,
    /// One of so many branches is counted twice; 0 for none.
    miscounts: u64,
    /// It was decided whether a signal comes before the interrupt that is to enter; one does before half of them.
    is_signalled: bool,
    /// The host has something else to do for so long, once at each count.
    starves: Duration,
    starved_at: Option<u64>,
}

impl FakeCounter {
    pub fn new(seed: u64, skid: u32, miscounts: u64) -> Self {
        Self {
            // A counter begins anywhere.
            count: seed << 20,
            overflow: None,
            random: Random::new(seed),
            skid,
            miscounts,
            is_signalled: false,
            starves: Duration::ZERO,
            starved_at: None,
        }
    }

    /// One whose host is busy for so long before it runs on from a count.
    pub fn starving(self, starves: Duration) -> Self {
        Self { starves, ..self }
    }

    fn branch(&mut self) {
        self.count += 1;
        if self.miscounts > 0 && self.random.below(self.miscounts) == 0 {
            self.count += 1;
        }
    }
}

/// Whether the instruction at RIP is one that the counter counts.
fn is_at_branch(vcpu: &Vcpu) -> Result<bool, Error> {
    let state = vcpu.state()?;
    let mut code = [0; 15];
    let count = memory_of(vcpu, &state).read(state.regs.rip, &mut code).unwrap();
    let mut decoder = Decoder::with_ip(64, &code[..count], state.regs.rip, DecoderOptions::NONE);
    Ok(decoder.decode().flow_control() == FlowControl::ConditionalBranch)
}

impl BranchCounter for FakeCounter {
    fn count(&mut self, _vcpu: &Vcpu) -> Result<u64, Error> {
        Ok(self.count)
    }

    fn overflow(&mut self, after: Option<u32>) -> Result<(), Error> {
        let skid = self.random.below(u64::from(self.skid));
        self.overflow = after.map(|after| self.count + u64::from(after) + skid);
        Ok(())
    }

    fn run(&mut self, vcpu: &mut Vcpu, until: Until) -> Result<Exit, Error> {
        if until == Until::Exit && self.starved_at.replace(self.count) != Some(self.count) && self.count < STARVES_UNTIL
        {
            std::thread::sleep(self.starves);
        }
        let enters = vcpu.to_enter()?.is_some();
        if enters && !std::mem::replace(&mut self.is_signalled, enters) && self.random.below(2) == 0 {
            return Ok(Exit::Interrupted);
        }
        self.is_signalled = enters;
        loop {
            if self.overflow.is_some_and(|overflow| self.count >= overflow) {
                vcpu.debug(&[])?;
                return Ok(Exit::Interrupted);
            }
            if until != Until::Breakpoint {
                vcpu.debug(&leads_to_at_most(vcpu)?)?;
            }
            let is_branch = vcpu.to_enter()?.is_none() && is_at_branch(vcpu)?;
            let before = vcpu.registers().rip;
            let exit = vcpu.run()?;
            // A signal can come where the breakpoint is: then the instruction was executed all the same.
            let stepped = exit == Exit::Trap || (exit == Exit::Interrupted && vcpu.registers().rip != before);
            if stepped && is_branch {
                self.branch();
            }
            if exit != Exit::Trap || until == Until::Breakpoint {
                return Ok(exit);
            }
        }
    }
}
