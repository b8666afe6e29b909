//! From one stop to the next: the guest runs there, is stopped where it has none, or becomes what the log says.
//!
//! ```text
//!                      ┌─ Run ──► KVM_RUN ──► exit, or an interrupt window that was wanted ────► stop
//!                      │             └─ nothing for a while, and something waits ─► position, or state ─► stop
//!   ahead? (timeline) ─┼─ RunTo (replay) ──► KVM_RUN to that position ──────────────────────────► stop
//!                      └─ Adopt (replay) ──► pages into RAM, state into the vCPU ────────────────► stop
//! ```
//! A guest that computes makes no exits. Whoever records waits for a stop of its own first (*patience*, DESIGN part 4); only then
//! the vCPU is stopped anywhere. Where the host has a position clock the place has a name; elsewhere a state delta stands for it in the log.

use std::time::Duration;

use ft_protocol::Stop;
use kvm_bindings::kvm_regs;

use super::{Execution, TIMELINE};
use crate::{
    error::Error,
    lockstep::{
        delta::{self, Delta},
        position::{self, Until},
        timeline::Ahead,
    },
    machine::{
        kick::Kick,
        state::VcpuState,
        vcpu::{Exit, Vcpu},
    },
};

const KIND_STATE: u8 = 7;
/// Where interrupts cannot enter, and no window tells when they can, the guest is given this part of the patience more ...
const RETRY_DIVISOR: u32 = 8;
/// ... so often.
const RETRIES: u32 = 8;
/// After so many expired timers, a second of running with the default patience, the pages written so far are forgotten at the next stop: what a delta
/// carries stays small, and a guest that stops by itself pays for the tracking no more often.
const EXPIRED_PER_BASE: u32 = 200;

/// How the guest came to stand still.
#[derive(Debug)]
pub(super) enum Advance {
    /// By an exit.
    Exit(Exit),
    /// By being stopped, or by becoming what the log says.
    Halted(Halted),
    /// At a place between two exits that the position clock names.
    Named,
    /// For a debugger.
    Trap,
}

/// A guest without a stop of its own.
#[derive(Debug)]
pub(super) struct Halted {
    state: Vec<u8>,
    /// Pages written since the base, one bit each; empty where the delta comes from the log.
    written: Vec<u64>,
}

/// What gets a recorded guest to stop.
#[derive(Debug)]
pub(super) struct Impatience {
    kick: Kick,
    /// State deltas are needed: KVM notes written pages.
    tracks: bool,
    patience: Duration,
    /// Stops when the timer was set.
    set_at: u64,
    retries: u32,
    expired: u32,
}

impl Impatience {
    fn new(vcpu: &mut Vcpu, tracks: bool, patience: Duration) -> Result<Self, Error> {
        if tracks {
            vcpu.track_writes()?;
        }
        Ok(Self {
            kick: vcpu.kick()?,
            tracks,
            patience,
            set_at: 0,
            retries: 0,
            expired: 0,
        })
    }

    /// Called before the guest runs on from its `stops`th stop.
    fn prepare(&mut self, vcpu: &mut Vcpu, stops: u64) -> Result<(), Error> {
        self.retries = 0;
        if self.tracks && self.expired >= EXPIRED_PER_BASE {
            vcpu.take_written()?;
            self.expired = 0;
        }
        if self.kick.is_armed() {
            return Ok(());
        }
        self.set_at = stops;
        self.kick.arm(self.patience)
    }

    /// Called when KVM_RUN was interrupted after `stops` stops: whether the guest had its time without one.
    fn is_over(&mut self, stops: u64) -> Result<bool, Error> {
        if !self.kick.take() {
            return Ok(false);
        }
        self.expired = self.expired.saturating_add(1);
        let over = self.set_at == stops;
        self.set_at = stops;
        self.kick.arm(self.patience)?;
        Ok(over)
    }

    /// Whether the guest may have a little more time, to come to where an interrupt can enter.
    fn retry(&mut self) -> Result<bool, Error> {
        self.retries += 1;
        if self.retries > RETRIES {
            return Ok(false);
        }
        self.kick.arm(self.patience / RETRY_DIVISOR)?;
        Ok(true)
    }
}

impl Execution {
    /// This side records from now on.
    pub(super) fn begin_recording(&mut self) -> Result<(), Error> {
        self.impatience = Some(Impatience::new(&mut self.vcpu, self.clock.is_none(), self.patience)?);
        Ok(())
    }

    pub(super) fn advance(&mut self) -> Result<Advance, Error> {
        let stop = self.stop();
        self.vcpu.want_window(self.windows && self.board.pic.is_pending());
        match self.timeline().ahead(&stop)? {
            Ahead::Run => {}
            Ahead::Adopt(delta) => return self.adopt(delta).map(Advance::Halted),
            Ahead::RunTo(stop) => return self.run_to(&stop),
        }
        if let Some(impatience) = &mut self.impatience {
            impatience.prepare(&mut self.vcpu, self.exits)?;
        }
        loop {
            let exit = match &mut self.clock {
                Some(clock) => clock.run(&mut self.vcpu, Until::Exit)?,
                None => self.vcpu.run()?,
            };
            match exit {
                Exit::Interrupted if self.must_stop()? => {
                    self.timeline().stopped();
                    return self.halt();
                }
                Exit::Interrupted => {}
                Exit::Trap => return Ok(Advance::Trap),
                exit => {
                    self.timeline().stopped();
                    return Ok(Advance::Exit(exit));
                }
            }
        }
    }

    /// KVM_RUN was interrupted: whether the guest is to stop right there.
    fn must_stop(&mut self) -> Result<bool, Error> {
        let Some(impatience) = &mut self.impatience else {
            return Ok(false);
        };
        if !impatience.is_over(self.exits)? || !self.is_at_a_place()? {
            return Ok(false);
        }
        let can_interrupt = self.vcpu.can_interrupt();
        let ports = &self.ports;
        let timeline = self.timeline.as_deref_mut().expect(TIMELINE);
        let arrived = timeline.is_waiting(&|device| ports[device].inputs(), self.board.deadline_ns());
        let can_enter = can_interrupt && self.board.pic.is_pending();
        if !(arrived || can_enter) {
            return Ok(false);
        }
        let may_wait = |impatience: &mut Option<Impatience>| impatience.as_mut().map_or(Ok(false), Impatience::retry);
        Ok(can_interrupt || self.windows || !may_wait(&mut self.impatience)?)
    }

    /// Whether the clock, if there is one, has a name for where the guest stands: another one than for the stop before, or a replay would take
    /// the two for one; and no interrupt that was let in has still to enter.
    fn is_at_a_place(&mut self) -> Result<bool, Error> {
        let before = self.position.offset;
        Ok(match &mut self.clock {
            Some(clock) if clock.names() => clock.progress(&self.vcpu)? > before && self.vcpu.to_enter()?.is_none(),
            _ => true,
        })
    }

    fn halt(&mut self) -> Result<Advance, Error> {
        if self.clock.is_some() {
            return Ok(Advance::Named);
        }
        if let Some(impatience) = &mut self.impatience {
            impatience.expired = 0;
        }
        Ok(Advance::Halted(Halted {
            state: self.vcpu.capture()?.encode(),
            written: self.vcpu.take_written()?,
        }))
    }

    fn run_to(&mut self, stop: &Stop) -> Result<Advance, Error> {
        let clock = self.clock.as_deref_mut().ok_or_else(|| {
            Error::LogEnds("the log names places between exits, and this host has no counter for them".into())
        })?;
        let digests = self.digests;
        let is_there = |registers: &kvm_regs| {
            registers.rip == stop.position.rip && registers.rcx == stop.position.rcx && {
                let mut there = digests;
                there.named(stop.position.offset, registers);
                there.combined() == stop.digest
            }
        };
        let missed = position::run_to(clock, &mut self.vcpu, stop.position.offset, is_there)?;
        Ok(match missed {
            None | Some(Exit::Interrupted) => Advance::Named,
            Some(exit) => Advance::Exit(exit),
        })
    }

    /// Counts the stop, and gives its offset.
    pub(super) fn count(&mut self, advance: &Advance) -> Result<u32, Error> {
        match (&mut self.clock, advance) {
            (Some(clock), Advance::Named) => clock.progress(&self.vcpu),
            (Some(clock), _) => {
                self.exits += 1;
                clock.restart(&self.vcpu)?;
                Ok(0)
            }
            (None, _) => {
                self.exits += 1;
                Ok(0)
            }
        }
    }

    /// The stop at a place that the clock named.
    pub(super) fn log_position(&mut self) -> Result<(), Error> {
        let stop = self.stop();
        self.timeline().named(&stop)
    }

    fn adopt(&mut self, delta: Delta) -> Result<Halted, Error> {
        // First: what the access of this stop still writes is older than the pages.
        self.vcpu.finish_access()?;
        for payload in &delta.pages {
            delta::apply_pages(self.vcpu.ram(), payload)?;
        }
        let state = VcpuState::decode(&delta.state)
            .ok_or_else(|| Error::LogEnds("the log has the state of a vCPU that this release does not know".into()))?;
        self.vcpu.adopt(&state)?;
        Ok(Halted {
            state: delta.state,
            written: Vec::new(),
        })
    }

    /// The stop of a halted guest, as a recording logs it and a replay compares it.
    pub(super) fn log_state(&mut self, halted: Halted) -> Result<(), Error> {
        self.digests.exit(KIND_STATE, 0, &halted.state);
        let stop = self.stop();
        let timeline = self.timeline.as_deref_mut().expect(TIMELINE);
        let mut pages = delta::encode_pages(self.vcpu.ram(), &halted.written);
        timeline.halted(&stop, &halted.state, &mut pages)
    }
}
