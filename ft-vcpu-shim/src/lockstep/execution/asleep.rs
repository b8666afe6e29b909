//! A guest that has halted and that nothing wakes any more: said once, since nothing else would tell.
//!
//! ```text
//!   HLT ──► interrupts off? ─────────────────────────► nothing ever wakes it (there is no NMI on this board)
//!        └► timers expire, and none of them enters ──► masked, or an interrupt is still in service
//! ```
//! Both may be what the guest wants: `halt` without a power-off is the first, and a guest that waits for a device with its timer masked is the
//! second. So it is a notice to the operator and no end of the replica.

use super::Execution;
use crate::platform::pic::Pic;

/// So many timers in one sleep are not what a guest does that masks its timer for a moment: 4 s of Linux' tick.
const TIMERS_SLEPT_THROUGH: u32 = 1000;

/// Told when the guest sleeps and will not wake.
pub type OnAsleep = Box<dyn FnMut(&str)>;

/// One HLT.
#[derive(Debug, Default)]
pub(super) struct Sleep {
    timers: u32,
    told: bool,
}

impl Sleep {
    /// A timer expired.
    pub(super) fn timer(&mut self) {
        self.timers = self.timers.saturating_add(1);
    }

    /// Why it will not end; the first time that is so.
    fn is_for_good(&mut self, can_interrupt: bool, pic: &Pic) -> Option<String> {
        if self.told || (can_interrupt && self.timers < TIMERS_SLEPT_THROUGH) {
            return None;
        }
        self.told = true;
        Some(if can_interrupt {
            format!(
                "{} timers expired meanwhile, and its interrupt controllers let none of them in ({})",
                self.timers,
                pic.summary()
            )
        } else {
            "its interrupts are off, and nothing can wake it".to_owned()
        })
    }
}

impl Execution {
    /// Whom to tell, while this side records, about a guest that sleeps for good. Nobody if this is not called.
    pub fn set_on_asleep(&mut self, on_asleep: OnAsleep) {
        self.on_asleep = Some(on_asleep);
    }

    /// The guest is halted, and what happened so far does not wake it.
    pub(super) fn sleeps(&mut self, sleep: &mut Sleep, can_interrupt: bool) {
        if self.impatience.is_none() {
            return;
        }
        let (Some(why), Some(on_asleep)) = (sleep.is_for_good(can_interrupt, &self.board.pic), &mut self.on_asleep)
        else {
            return;
        };
        let (exits, rip) = (self.position.exits, self.position.rip);
        on_asleep(&format!(
            "the guest halted at exit {exits}, RIP {rip:#x}: {why}. If that is not what it was told to do, switch it off or restart it"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_that_only_a_timer_can_end_is_told_of_once_and_late() {
        let pic = Pic::new(0);
        let mut sleep = Sleep::default();
        for _ in 1..TIMERS_SLEPT_THROUGH {
            sleep.timer();
            assert_eq!(sleep.is_for_good(true, &pic), None);
        }
        sleep.timer();
        let why = sleep.is_for_good(true, &pic).unwrap();
        assert!(why.contains("1000 timers") && why.contains("masked 0xff"), "{why}");
        assert_eq!(sleep.is_for_good(true, &pic), None);
        assert!(
            Sleep::default()
                .is_for_good(false, &pic)
                .unwrap()
                .contains("interrupts are off")
        );
    }
}
