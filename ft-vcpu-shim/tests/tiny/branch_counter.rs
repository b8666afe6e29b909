//! A counter of conditional branches that executes instruction by instruction, by breakpoints: its overflows are as late as a seed wants, and
//! it miscounts if it is told to.

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

#[derive(Debug)]
pub struct FakeCounter {
    count: u64,
    overflow: Option<u64>,
    random: Random,
    /// An overflow is late by less than this.
    skid: u32,
    /// One of so many branches is counted twice; 0 for none.
    miscounts: u64,
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
        }
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

    fn run(&mut self, vcpu: &mut Vcpu, until: Until, mut entering: Option<u8>) -> Result<Exit, Error> {
        loop {
            if self.overflow.is_some_and(|overflow| self.count >= overflow) {
                vcpu.debug(&[])?;
                return Ok(Exit::Interrupted);
            }
            if until != Until::Breakpoint {
                vcpu.debug(&leads_to_at_most(vcpu, entering)?)?;
            }
            let is_branch = entering.is_none() && is_at_branch(vcpu)?;
            let before = vcpu.registers().rip;
            let exit = vcpu.run()?;
            // A signal can come where the breakpoint is: then the instruction was executed all the same.
            let stepped = exit == Exit::Trap || (exit == Exit::Interrupted && vcpu.registers().rip != before);
            if stepped {
                entering = None;
                if is_branch {
                    self.branch();
                }
            }
            if exit != Exit::Trap || until == Until::Breakpoint {
                return Ok(exit);
            }
        }
    }
}
