//! Names for places between two stops: how far the guest came since the exit before, counted by a *position clock*.
//!
//! ```text
//!   exit E ──────────── 4711 branches ───────────►│ stopped by a signal: position (E, 4711, RIP, RCX)
//!   a replay:  run, overflow ─ margin early ─►│··►│ then instruction by instruction, until everything fits
//! ```
//! The clock is the host's counter of retired branches ([`super::branches`]), or that of the tests, which counts instructions by breakpoints.
//! Without one, [`super::delta`] does the same with pages and registers.
//!
//! An overflow comes late by some branches (skid), so a replay has it come early and walks the rest. Between two counts the instruction
//! pointer tells places apart; where it does not (a function called twice without a branch), the registers' digest does.
//!
//! A place needs a count of its own: one that equals the count of the stop before names that stop. A guest that comes to no branch is
//! therefore not stopped, however long it takes; a loop of unconditional jumps alone has no place.

use std::fmt::Debug;

use kvm_bindings::kvm_regs;

use crate::{
    debug::{registers::memory_of, successors},
    error::Error,
    machine::vcpu::{Exit, Vcpu},
};

const PAGE_FAULT: u8 = 14;
const GENERAL_PROTECTION: u8 = 13;

/// What ends [`PositionClock::run`] besides an exit of the guest, or a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Nothing else.
    Exit,
    /// This progress, with [`Exit::Interrupted`]: not earlier, and late by less than [`PositionClock::margin`].
    Progress(u32),
    /// A breakpoint that is set in the vCPU, with [`Exit::Trap`].
    Breakpoint,
}

/// Counts the progress of a guest. The same instructions give the same count, on every host that counts in the same way.
pub trait PositionClock: Debug {
    /// The guest is at an exit: its progress is 0 from here.
    ///
    /// # Errors
    /// A counter that cannot be read or set; so for all that follow.
    fn restart(&mut self, vcpu: &Vcpu) -> Result<(), Error>;

    /// Progress since the last exit. The guest stands still.
    ///
    /// # Errors
    /// See [`PositionClock::restart`].
    fn progress(&mut self, vcpu: &Vcpu) -> Result<u32, Error>;

    /// Whether its counts are names that a replay looks for.
    fn names(&self) -> bool {
        true
    }

    /// More than an overflow is ever late.
    fn margin(&self) -> u32;

    /// Runs the guest. An interrupt that was let in ([`Vcpu::to_enter`]) enters first.
    ///
    /// # Errors
    /// See [`PositionClock::restart`], and what [`Vcpu::run`] gives.
    fn run(&mut self, vcpu: &mut Vcpu, until: Until) -> Result<Exit, Error>;
}

/// The clock of a guest that is not recorded: it names no places, and nobody looks for one.
#[derive(Clone, Copy, Debug)]
pub struct Unrecorded;

impl PositionClock for Unrecorded {
    fn restart(&mut self, _vcpu: &Vcpu) -> Result<(), Error> {
        Ok(())
    }

    fn progress(&mut self, _vcpu: &Vcpu) -> Result<u32, Error> {
        Ok(0)
    }

    fn names(&self) -> bool {
        false
    }

    fn margin(&self) -> u32 {
        0
    }

    fn run(&mut self, vcpu: &mut Vcpu, _until: Until) -> Result<Exit, Error> {
        vcpu.run()
    }
}

/// Runs the guest to progress `target`, at which `is_there` knows the place by its registers. `Some`: it came to an exit before, or past the
/// place ([`Exit::Interrupted`]), so it is not the recorded execution.
///
/// # Errors
/// See [`PositionClock::run`].
pub(super) fn run_to(
    clock: &mut dyn PositionClock,
    vcpu: &mut Vcpu,
    target: u32,
    is_there: impl Fn(&kvm_regs) -> bool,
) -> Result<Option<Exit>, Error> {
    let early = target.saturating_sub(clock.margin());
    while clock.progress(vcpu)? < early {
        let exit = clock.run(vcpu, Until::Progress(early))?;
        if exit != Exit::Interrupted {
            return Ok(Some(exit));
        }
    }
    let outcome = loop {
        let progress = clock.progress(vcpu)?;
        if progress > target {
            break Some(Exit::Interrupted);
        }
        if progress == target && vcpu.to_enter()?.is_none() && is_there(&vcpu.registers()) {
            break None;
        }
        vcpu.debug(&leads_to_at_most(vcpu)?)?;
        match clock.run(vcpu, Until::Breakpoint)? {
            Exit::Trap | Exit::Interrupted => {}
            exit => break Some(exit),
        }
    };
    vcpu.debug(&[])?;
    Ok(outcome)
}

/// Where the next instruction, or the interrupt that enters before it, leads to; exceptions are not thought of.
///
/// # Errors
/// What KVM refuses.
pub fn leads_to(vcpu: &Vcpu) -> Result<Vec<u64>, Error> {
    successors_of(vcpu, &[])
}

/// [`leads_to`], and the exceptions that an instruction raises in the middle of a program.
///
/// # Errors
/// What KVM refuses.
pub fn leads_to_at_most(vcpu: &Vcpu) -> Result<Vec<u64>, Error> {
    successors_of(vcpu, &[PAGE_FAULT, GENERAL_PROTECTION])
}

fn successors_of(vcpu: &Vcpu, exceptions: &[u8]) -> Result<Vec<u64>, Error> {
    let entering = vcpu.to_enter()?;
    let state = vcpu.state()?;
    let memory = memory_of(vcpu, &state);
    let handler = |vector: &u8| successors::handler(&memory, &state, *vector);
    let mut leads_to = match entering {
        Some(vector) => handler(&vector).into_iter().collect(),
        None => successors::of(&memory, &state),
    };
    if leads_to.is_empty() && entering.is_none() {
        // SYSCALL is the one that a guest of ours has there.
        leads_to.extend(vcpu.system_call_entry()?);
    }
    // A breakpoint here would keep an instruction that leads to itself from being executed at all.
    leads_to.retain(|address| *address != state.regs.rip);
    leads_to.extend(exceptions.iter().filter_map(handler));
    Ok(leads_to)
}
