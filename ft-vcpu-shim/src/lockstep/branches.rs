//! A position clock made of a counter of retired conditional branches, and the test that such a counter must pass before it is one.
//!
//! ```text
//!   exit ─────────── target - margin ──►│ overflow wanted here
//!                                       │──► it comes, late by less than the margin
//!                                            └─► instruction by instruction (super::position), to the target
//! ```
//! A counter that once counts another number for the same instructions would name another place, and every replay would diverge: so a tiny
//! guest makes a known number of branches again and again, with and without overflows on its way, before anybody relies on it.

use std::{fmt::Debug, sync::Arc};

use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use super::position::{PositionClock, Until};
use crate::{
    error::Error,
    machine::{
        boot,
        memory::Ram,
        vcpu::{Exit, Vcpu, guest_cpuid},
    },
};

/// Counts the conditional branches that a guest retires.
pub trait BranchCounter: Debug {
    /// All so far. The guest stands still.
    ///
    /// # Errors
    /// A counter that cannot be read or set; so for all that follow.
    fn count(&mut self, vcpu: &Vcpu) -> Result<u64, Error>;

    /// Ends [`BranchCounter::run`], with [`Exit::Interrupted`], so many branches from here or somewhat later; or no more.
    ///
    /// # Errors
    /// See [`BranchCounter::count`].
    fn overflow(&mut self, after: Option<u32>) -> Result<(), Error>;

    /// Runs the guest to an exit, a signal, an overflow, or to what `until` names if that is a breakpoint.
    ///
    /// # Errors
    /// See [`BranchCounter::count`], and what [`Vcpu::run`] gives.
    fn run(&mut self, vcpu: &mut Vcpu, until: Until) -> Result<Exit, Error>;
}

/// Progress is the number of branches since the last exit.
#[derive(Debug)]
pub struct BranchClock<C> {
    counter: C,
    margin: u32,
    /// The count at the last exit.
    base: u64,
}

impl<C: BranchCounter> BranchClock<C> {
    /// A clock of `counter`, whose overflows come late by less than `margin` branches.
    pub fn new(counter: C, margin: u32) -> Self {
        Self {
            counter,
            margin,
            base: 0,
        }
    }
}

impl<C: BranchCounter> PositionClock for BranchClock<C> {
    fn restart(&mut self, vcpu: &Vcpu) -> Result<(), Error> {
        self.base = self.counter.count(vcpu)?;
        Ok(())
    }

    fn progress(&mut self, vcpu: &Vcpu) -> Result<u32, Error> {
        let count = self.counter.count(vcpu)?;
        let progress = count.checked_sub(self.base).map(u32::try_from);
        progress.and_then(Result::ok).ok_or_else(|| {
            Error::environment(format!(
                "the counter of branches went from {} to {count} without an exit of the guest: it cannot name places. Use --positions deltas",
                self.base
            ))
        })
    }

    fn margin(&self) -> u32 {
        self.margin
    }

    fn run(&mut self, vcpu: &mut Vcpu, until: Until) -> Result<Exit, Error> {
        let Until::Progress(target) = until else {
            return self.counter.run(vcpu, until);
        };
        let left = target.saturating_sub(self.progress(vcpu)?);
        if left == 0 {
            return Ok(Exit::Interrupted);
        }
        self.counter.overflow(Some(left))?;
        let exit = loop {
            let exit = self.counter.run(vcpu, until)?;
            // Any other signal ends the run as an overflow does.
            if exit != Exit::Interrupted || self.progress(vcpu)? >= target {
                break exit;
            }
        };
        self.counter.overflow(None)?;
        Ok(exit)
    }
}

const CODE: u64 = 0x10_0000;
const BEGINS: u16 = 0xe0;
const ENDS: u16 = 0xe1;
/// Two conditional branches a turn, one of them taken every second time; a locked access, since some CPUs count wrongly beside those.
const INSTRUCTIONS: [u8; 26] = [
    0xe6, 0xe0, // out 0xe0, al
    0x89, 0xf1, // mov ecx, esi
    0xf0, 0xff, 0x04, 0x25, 0x00, 0x80, 0x10, 0x00, // lock inc dword ptr [0x108000]
    0xf6, 0xc1, 0x01, // test cl, 1
    0x74, 0x01, // jz 1f
    0x90, // nop
    0xff, 0xc9, // 1: dec ecx
    0x75, 0xee, // jnz, to the lock
    0xe6, 0xe1, // out 0xe1, al
    0xeb, 0xe6, // jmp, to the beginning
];
const BRANCHES_PER_TURN: u32 = 2;
const ROUNDS: u32 = 16;
/// Branches of a round beyond the margin, so that an overflow has somewhere to come.
const BRANCHES_BEYOND: u32 = 200;

/// Runs a tiny guest on `kvm`: `clock` must count its branches the same each time, and its overflows must come in time. The inner error says
/// what it did instead.
///
/// # Errors
/// When not even the tiny guest can be made, or the counter cannot be read.
pub fn self_test(kvm: &Kvm, clock: &mut dyn PositionClock) -> Result<Result<(), String>, Error> {
    let ram = Arc::new(Ram::new(4)?);
    boot::write_tables(ram.memory());
    ram.memory()
        .write_slice(&INSTRUCTIONS, GuestAddress(CODE))
        .expect("inside RAM");
    let mut vcpu = Vcpu::new(kvm, ram, &guest_cpuid(kvm)?, CODE)?;
    vcpu.listen()?;
    let turns = (clock.margin() + BRANCHES_BEYOND).div_ceil(BRANCHES_PER_TURN);
    let mut registers = vcpu.state()?.regs;
    registers.rsi = u64::from(turns);
    let sregs = vcpu.state()?.sregs;
    vcpu.enter(&registers, &sregs)?;
    let branches = turns * BRANCHES_PER_TURN;
    for round in 0..ROUNDS {
        if let Err(what) = runs_to(clock, &mut vcpu, BEGINS)? {
            return Ok(Err(what));
        }
        clock.restart(&vcpu)?;
        // Every second round on its own, the others stopped on their way, elsewhere each time.
        if round % 2 == 1 {
            let target = 1 + round * (BRANCHES_BEYOND - 2) / ROUNDS;
            let exit = clock.run(&mut vcpu, Until::Progress(target))?;
            let progress = clock.progress(&vcpu)?;
            let late = progress.checked_sub(target);
            if exit != Exit::Interrupted || late.is_none_or(|late| late >= clock.margin()) {
                return Ok(Err(format!(
                    "an overflow wanted after {target} branches of a tiny guest came after {progress} ({exit:?}); late by {} would be too much",
                    clock.margin()
                )));
            }
        }
        if let Err(what) = runs_to(clock, &mut vcpu, ENDS)? {
            return Ok(Err(what));
        }
        let counted = clock.progress(&vcpu)?;
        if counted != branches {
            return Ok(Err(format!(
                "a tiny guest made {branches} branches, and in round {} of {ROUNDS} {counted} were counted",
                round + 1
            )));
        }
    }
    Ok(Ok(()))
}

/// Runs the tiny guest to its write to `port`.
fn runs_to(clock: &mut dyn PositionClock, vcpu: &mut Vcpu, port: u16) -> Result<Result<(), String>, Error> {
    loop {
        match clock.run(vcpu, Until::Exit)? {
            Exit::Interrupted => {}
            Exit::PortWrite { port: at, .. } if at == port => return Ok(Ok(())),
            exit => {
                return Ok(Err(format!(
                    "a tiny guest did not come to its write to port {port:#x}: {exit:?}"
                )));
            }
        }
    }
}
