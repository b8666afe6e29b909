//! Virtual time and the alarm, with as few register accesses as can be: the time comes with every wake-up, and the alarm
//! is set only when it would go off too late. One that goes off too early costs a wake-up and is set anew.

use super::traps::{Alarm, Doorbells, Pending, wait};

const REGISTER_WALL_CLOCK: *const u64 = 0xD000_F010 as *const u64;

/// The clock.
pub(crate) struct Clock {
    now_ns: u64,
    armed_ns: Option<u64>,
}

impl Clock {
    /// Reads the time for the first time.
    pub(crate) fn new() -> Self {
        let (now_ns, _) = wait(Doorbells::empty(), Alarm::Keep, false);
        Clock { now_ns, armed_ns: None }
    }

    /// Virtual time of the last wake-up.
    pub(crate) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Rings the doorbells and, if it may, sleeps until an interrupt, at the latest until the deadline.
    pub(crate) fn wait(&mut self, doorbells: Doorbells, deadline_ns: Option<u64>, may_sleep: bool) {
        let mut alarm = Alarm::Keep;
        if let Some(deadline_ns) = deadline_ns
            && may_sleep
            && self.armed_ns.is_none_or(|armed_ns| armed_ns > deadline_ns)
        {
            // 0 would switch the alarm off.
            let deadline_ns = deadline_ns.max(1);
            alarm = Alarm::At { deadline_ns };
            self.armed_ns = Some(deadline_ns);
        }
        let (now_ns, pending) = wait(doorbells, alarm, may_sleep);
        self.now_ns = now_ns;
        if pending.contains(Pending::CLOCK) {
            self.armed_ns = None;
        }
    }
}

/// Wall clock in ns since 1970.
pub(crate) fn wall_clock_ns() -> u64 {
    // SAFETY: a register of the ft-clock, mapped by boot.S; reading it has no effect.
    unsafe { REGISTER_WALL_CLOCK.read_volatile() }
}
