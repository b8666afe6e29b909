//! From one stop to the next: the guest runs there, is stopped where it has none, or becomes what the log says.
//!
//! ```text
//!                      ┌─ Run ──► KVM_RUN ──► exit, or an interrupt window that was wanted ────► stop
//!   ahead? (timeline) ─┤             └─ nothing for a while, and something waits ─► state is taken ─► stop
//!                      └─ Adopt (replay) ──► pages into RAM, state into the vCPU ────────────────► stop
//! ```
//! A guest that computes makes no exits. Whoever records waits for a stop of its own first (*patience*, DESIGN part 4); only then
//! the vCPU is stopped anywhere, with a state delta in the log in the place of a position.

use std::time::Duration;

use super::{Execution, TIMELINE};
use crate::{
    error::Error,
    lockstep::{
        delta::{self, Delta},
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
/// After so many expired timers, about a second of running, the pages written so far are forgotten at the next stop: what a delta
/// carries stays small, and a guest that stops by itself pays for the tracking once a second.
const EXPIRED_PER_BASE: u32 = 200;

/// How the guest came to stand still.
#[derive(Debug)]
pub(super) enum Advance {
    /// By an exit.
    Exit(Exit),
    /// By being stopped, or by becoming what the log says.
    Halted(Halted),
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
    patience: Duration,
    /// Stops when the timer was set.
    set_at: u64,
    retries: u32,
    expired: u32,
}

impl Impatience {
    fn new(vcpu: &mut Vcpu, patience: Duration) -> Result<Self, Error> {
        vcpu.track_writes()?;
        Ok(Self {
            kick: vcpu.kick()?,
            patience,
            set_at: 0,
            retries: 0,
            expired: 0,
        })
    }

    /// Called before the guest runs on from its `stops`th stop.
    fn prepare(&mut self, vcpu: &mut Vcpu, stops: u64) -> Result<(), Error> {
        self.retries = 0;
        if self.expired >= EXPIRED_PER_BASE {
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
        self.impatience = Some(Impatience::new(&mut self.vcpu, self.patience)?);
        Ok(())
    }

    pub(super) fn advance(&mut self) -> Result<Advance, Error> {
        let stop = self.stop();
        if let Ahead::Adopt(delta) = self.timeline().ahead(&stop)? {
            return self.adopt(delta).map(Advance::Halted);
        }
        self.vcpu.want_window(self.windows && self.board.pic.is_pending());
        if let Some(impatience) = &mut self.impatience {
            impatience.prepare(&mut self.vcpu, self.exits)?;
        }
        loop {
            match self.vcpu.run()? {
                Exit::Interrupted if self.must_stop()? => return self.halt().map(Advance::Halted),
                Exit::Interrupted => {}
                Exit::Trap => return Ok(Advance::Trap),
                exit => return Ok(Advance::Exit(exit)),
            }
        }
    }

    /// KVM_RUN was interrupted: whether the guest is to stop right there.
    fn must_stop(&mut self) -> Result<bool, Error> {
        let Some(impatience) = &mut self.impatience else {
            return Ok(false);
        };
        if !impatience.is_over(self.exits)? {
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
        Ok(can_interrupt || self.windows || !impatience.retry()?)
    }

    fn halt(&mut self) -> Result<Halted, Error> {
        if let Some(impatience) = &mut self.impatience {
            impatience.expired = 0;
        }
        Ok(Halted {
            state: self.vcpu.capture()?.encode(),
            written: self.vcpu.take_written()?,
        })
    }

    fn adopt(&mut self, delta: Delta) -> Result<Halted, Error> {
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
