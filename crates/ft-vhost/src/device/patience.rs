//! How long to look for more work before sleeping.
//!
//! A wake-up costs some microseconds, on the side that wakes and on the side that slept. Where work comes again within the bound, looking
//! for it is cheaper; where it does not, looking is wasted. So a wait that ended within the bound pays for looking through a few that did
//! not, and without credit there is no looking. A sleep takes longer than what was waited for, on a busy machine much longer, and thus
//! says little: now and then the bound is tried all the same, or looking once lost would never come back.

/// Waits beyond the bound for which one within it pays.
const WORTH: u32 = 4;
/// Most credit.
const CREDIT_MAX: u32 = 16;
/// Without credit, one of so many waits is looked through.
const TRIED: u32 = 32;

/// What was learned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    bound_ns: u64,
    /// Waits that are looked through.
    credit: u32,
    /// Waits since the last one within the bound.
    missed: u32,
    /// When there was nothing to do for the first time since there was something.
    idle_since_ns: Option<u64>,
}

impl Patience {
    /// Looks no longer than `bound_ns`; not at all if that is 0.
    pub(super) fn new(bound_ns: u64) -> Self {
        Self {
            bound_ns,
            credit: 0,
            missed: 0,
            idle_since_ns: None,
        }
    }

    fn looks(&self) -> bool {
        self.credit != 0 || self.missed % TRIED == TRIED - 1
    }

    /// There is nothing to do; `true` to look again, `false` to sleep.
    pub(super) fn looks_again(&mut self, now_ns: u64) -> bool {
        let since = *self.idle_since_ns.get_or_insert(now_ns);
        self.looks() && now_ns - since < self.bound_ns
    }

    /// There is something to do.
    pub(super) fn busy(&mut self, now_ns: u64) {
        let Some(since) = self.idle_since_ns.take() else {
            return;
        };
        if now_ns - since <= self.bound_ns {
            self.credit = (self.credit + WORTH).min(CREDIT_MAX);
            self.missed = 0;
        } else {
            self.credit = self.credit.saturating_sub(1);
            self.missed = self.missed.wrapping_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: u64 = 32_000;

    /// Waits that long; gives whether it would look for work.
    fn wait(patience: &mut Patience, now: &mut u64, wait_ns: u64) -> bool {
        let looks = patience.looks_again(*now);
        assert!(!patience.looks_again(*now + patience.bound_ns));
        *now += wait_ns;
        patience.busy(*now);
        looks
    }

    #[test]
    fn a_short_wait_pays_for_some_long_ones_and_not_for_ever() {
        let (mut patience, mut now) = (Patience::new(BOUND), 1_000_000);
        assert!(!wait(&mut patience, &mut now, 90_000));
        assert!(!wait(&mut patience, &mut now, 20_000));
        let looked: u32 = (0..20).map(|_| u32::from(wait(&mut patience, &mut now, 90_000))).sum();
        assert_eq!(looked, WORTH);
        // One long wait among short ones changes nothing.
        for turn in 0..20 {
            let ns = if turn % 4 == 3 { 3_000_000 } else { 2_000 };
            assert_eq!(wait(&mut patience, &mut now, ns), turn != 0);
        }
    }

    #[test]
    fn looking_that_was_lost_is_tried_again() {
        let (mut patience, mut now) = (Patience::new(BOUND), 1_000_000);
        let tries: u32 = (0..10 * TRIED)
            .map(|_| u32::from(wait(&mut patience, &mut now, 90_000)))
            .sum();
        assert_eq!(tries, 10);
        // A sleep takes long whatever comes; a try finds that work comes soon.
        while !patience.looks_again(now) {
            now += 90_000;
            patience.busy(now);
        }
        now += 10_000;
        patience.busy(now);
        assert!(wait(&mut patience, &mut now, 10_000));
    }

    #[test]
    fn a_bound_of_nothing_is_sleep() {
        let (mut patience, mut now) = (Patience::new(0), 7);
        for _ in 0..3 * TRIED {
            assert!(!wait(&mut patience, &mut now, 100));
        }
    }
}
