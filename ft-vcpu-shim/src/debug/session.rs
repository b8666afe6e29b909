//! A recorded execution under a debugger: forwards by replaying on, backwards by replaying anew.
//!
//! ```text
//!   power-on ──► stop 1 ──► stop 2 ──►  · · trap · ·  ──► stop 3 ──► ... ──► end of the log
//!                             ▲                 │
//!                             └── reverse-step ─┘   a fresh replay that is told how far to go
//! ```
//! Between two stops a place is named by the exit count and all registers, and by how many steps or breakpoints lead to it. Both
//! take a KVM with breakpoints ([`super::support`]); elsewhere the stops are all the places there are.

use ft_protocol::Position;
use kvm_bindings::kvm_regs;

use super::{
    report::Report,
    target::{Reached, Target},
};
use crate::{
    error::Error,
    lockstep::{
        execution::{Execution, Step},
        journal::{Recording, with_position},
        position,
    },
    machine::vcpu::BREAKPOINTS_MAX,
};

/// Why the guest stands still again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Halt {
    /// It came where it was to come.
    There,
    /// It is about to execute the instruction at a breakpoint.
    Breakpoint,
    /// The operator interrupted it.
    Interrupted,
    /// It is at power-on: there is nothing before.
    Begin,
    /// The recorded execution ends here, in this way.
    End(String),
}

/// A place between two stops, or at one.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Place {
    exits: u64,
    at_stop: bool,
    registers: kvm_regs,
}

/// The execution, where it is, and what is to stop it.
pub struct Session {
    recording: Recording,
    execution: Execution,
    support: Result<(), String>,
    breakpoints: Vec<u64>,
    at_stop: bool,
    end: Option<String>,
}

impl Session {
    /// The recording at power-on. `support` says whether this host's KVM has breakpoints ([`super::support::probe`]).
    ///
    /// # Errors
    /// See [`Recording::power_on`].
    pub fn new(recording: Recording, support: Result<(), String>) -> Result<Self, Error> {
        let execution = recording.power_on()?;
        Ok(Self {
            recording,
            execution,
            support,
            breakpoints: Vec::new(),
            at_stop: true,
            end: None,
        })
    }

    /// The execution.
    #[must_use]
    pub fn execution(&self) -> &Execution {
        &self.execution
    }

    /// Whether this host's KVM has breakpoints, and so single steps; otherwise why not.
    pub fn support(&self) -> &Result<(), String> {
        &self.support
    }

    /// How the recorded execution ended; `None` before its end.
    #[must_use]
    pub fn end(&self) -> Option<&str> {
        self.end.as_deref()
    }

    /// Whether the guest is at a stop, or at power-on; otherwise it is somewhere after the last one.
    #[must_use]
    pub fn is_at_stop(&self) -> bool {
        self.at_stop
    }

    /// Where the guest is: the last stop, or a place after it.
    #[must_use]
    pub fn position(&self) -> Position {
        self.execution.position()
    }

    /// Sets a breakpoint before the instruction at a guest-virtual address.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn add_breakpoint(&mut self, address: u64) -> Result<(), String> {
        if let Err(reason) = &self.support {
            return Err(format!(
                "this host's KVM has no breakpoints: {reason}. Move with `monitor next-stop` and `monitor goto`"
            ));
        }
        if self.breakpoints.len() == BREAKPOINTS_MAX {
            return Err(format!("a CPU has {BREAKPOINTS_MAX} breakpoints, and all are set"));
        }
        self.breakpoints.push(address);
        Ok(())
    }

    /// Removes a breakpoint; whether there was one.
    pub fn remove_breakpoint(&mut self, address: u64) -> bool {
        let place = self.breakpoints.iter().position(|breakpoint| *breakpoint == address);
        place.map(|index| self.breakpoints.remove(index)).is_some()
    }

    fn place(&self) -> Result<Place, Error> {
        Ok(Place {
            exits: self.position().exits,
            at_stop: self.at_stop,
            registers: self.execution.vcpu().state()?.regs,
        })
    }

    /// Back to power-on.
    fn restart(&mut self) -> Result<(), Error> {
        self.execution = self.recording.power_on()?;
        self.at_stop = true;
        self.end = None;
        Ok(())
    }

    /// One move, to the next stop or to one of `breakpoints`. `None`: the execution ended, or had ended.
    fn advance(&mut self, breakpoints: &[u64]) -> Result<Option<Step>, Error> {
        if self.end.is_some() {
            return Ok(None);
        }
        if self.support.is_ok() {
            self.execution.vcpu_mut().debug(breakpoints)?;
        }
        match self.execution.step() {
            Ok(Step::End(end)) => {
                (self.at_stop, self.end) = (true, Some(format!("{end:?}")));
                Ok(None)
            }
            Ok(step) => {
                self.at_stop = step == Step::Stop;
                Ok(Some(step))
            }
            Err(Error::Diverged(divergence)) => {
                (self.at_stop, self.end) = (true, Some(Report::new(&divergence, &self.execution).text()));
                Ok(None)
            }
            Err(error) => Err(with_position(error, &self.execution)),
        }
    }

    fn ended(&self) -> Halt {
        Halt::End(self.end.clone().unwrap_or_default())
    }

    /// One instruction on, or to the next stop if that comes first, or if it cannot be told where the instruction leads.
    fn advance_instruction(&mut self) -> Result<Option<Step>, Error> {
        let leads_to = if self.support.is_ok() {
            position::leads_to(self.execution.vcpu())?
        } else {
            Vec::new()
        };
        self.advance(&leads_to)
    }

    /// One instruction where the KVM can, otherwise to the next stop.
    ///
    /// # Errors
    /// A replay that cannot go on.
    pub fn step(&mut self) -> Result<Halt, Error> {
        Ok(self
            .advance_instruction()?
            .map_or_else(|| self.ended(), |_| Halt::There))
    }

    /// To the next stop.
    ///
    /// # Errors
    /// A replay that cannot go on.
    pub fn next_stop(&mut self) -> Result<Halt, Error> {
        Ok(self.advance(&[])?.map_or_else(|| self.ended(), |_| Halt::There))
    }

    /// On to a breakpoint or the end. `interrupted` is asked at every stop.
    ///
    /// # Errors
    /// A replay that cannot go on.
    pub fn resume(&mut self, mut interrupted: impl FnMut() -> bool) -> Result<Halt, Error> {
        let breakpoints = self.breakpoints.clone();
        loop {
            match self.advance(&breakpoints)? {
                None => return Ok(self.ended()),
                Some(Step::Trap) => return Ok(Halt::Breakpoint),
                Some(_) if interrupted() => return Ok(Halt::Interrupted),
                Some(_) => {}
            }
        }
    }

    /// To a stop, forwards or backwards.
    ///
    /// # Errors
    /// A replay that cannot go on.
    pub fn goto(&mut self, target: Target) -> Result<Halt, Error> {
        let reached = |session: &Self| {
            let last = session.execution.history().last();
            last.map_or(Reached::NotYet, |record| target.reached(record))
        };
        // From a place behind it, or between stops: anew.
        if !self.at_stop || reached(self) != Reached::NotYet {
            self.restart()?;
        }
        while reached(self) == Reached::NotYet {
            if self.next_stop()? != Halt::There {
                return Ok(self.ended());
            }
        }
        Ok(Halt::There)
    }

    /// Anew, to the stop before which `exits` others were; power-on is 0.
    fn goto_exits(&mut self, exits: u64) -> Result<(), Error> {
        self.restart()?;
        while self.position().exits < exits && self.advance(&[])?.is_some() {}
        Ok(())
    }

    /// Back by one instruction where the KVM can single-step, otherwise to the stop before.
    ///
    /// # Errors
    /// A replay that cannot go on.
    pub fn reverse_step(&mut self) -> Result<Halt, Error> {
        let here = self.place()?;
        let Some(before) = here.exits.checked_sub(u64::from(here.at_stop)) else {
            return Ok(Halt::Begin);
        };
        self.goto_exits(before)?;
        if self.support.is_ok() {
            let mut steps = 0u64;
            while !self.is_at(&here)? && self.advance_instruction()?.is_some() {
                steps += 1;
            }
            // Steps run through exceptions. A place inside one is not met, and the stop before it is as far back as can be told.
            let met = self.place()? == here;
            self.goto_exits(before)?;
            for _ in 1..if met { steps } else { 0 } {
                self.advance_instruction()?;
            }
        }
        Ok(if before == 0 && self.at_stop {
            Halt::Begin
        } else {
            Halt::There
        })
    }

    fn is_at(&self, place: &Place) -> Result<bool, Error> {
        let here = self.place()?;
        Ok(here == *place || here.exits > place.exits)
    }

    /// Back to the last breakpoint before here, or to power-on.
    ///
    /// # Errors
    /// A replay that cannot go on.
    pub fn reverse_continue(&mut self) -> Result<Halt, Error> {
        let here = self.place()?;
        self.restart()?;
        if self.breakpoints.is_empty() {
            return Ok(Halt::Begin);
        }
        let mut hits = 0u64;
        while self.run_to_breakpoint(here.exits)? && !self.is_at(&here)? {
            hits += 1;
        }
        self.restart()?;
        if hits == 0 {
            return Ok(Halt::Begin);
        }
        for _ in 0..hits {
            self.run_to_breakpoint(here.exits)?;
        }
        Ok(Halt::Breakpoint)
    }

    /// On to the next breakpoint, over one that is here; `false` if none comes up to the stop after `exits` others.
    fn run_to_breakpoint(&mut self, exits: u64) -> Result<bool, Error> {
        let rip = self.execution.vcpu().state()?.regs.rip;
        if !self.at_stop && self.breakpoints.contains(&rip) {
            self.advance_instruction()?;
            let rip = self.execution.vcpu().state()?.regs.rip;
            if !self.at_stop && self.breakpoints.contains(&rip) {
                return Ok(true);
            }
        }
        let breakpoints = self.breakpoints.clone();
        while self.position().exits <= exits {
            match self.advance(&breakpoints)? {
                Some(Step::Trap) => return Ok(true),
                Some(_) => {}
                None => return Ok(false),
            }
        }
        Ok(false)
    }
}
