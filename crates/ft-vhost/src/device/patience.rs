//! How long to look for more work before sleeping.
//!
//! A wake-up costs some microseconds, on the side that wakes and on the side that slept. Where work comes again sooner than that,
//! looking for it is cheaper; where it does not, looking is wasted. So the window follows what the last waits would have needed: it
//! grows to twice a wait that ended within the bound, and is halved by one that did not. A sleep takes longer than what was waited for,
//! on a busy machine much longer: so now and then the whole bound is tried, or a window once lost would never come back.

/// First window, once a wait ended soon.
const FIRST_NS: u64 = 4_000;
/// Of so many waits beyond the bound in a row, one is tried with the whole bound.
const TRIED: u32 = 32;

/// The window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    bound_ns: u64,
    window_ns: u64,
    /// Waits in a row that were longer than the bound.
    missed: u32,
    /// When there was nothing to do for the first time since there was something.
    idle_since_ns: Option<u64>,
}

impl Patience {
    /// Never longer than `bound_ns`; not at all if that is 0.
    pub(super) fn new(bound_ns: u64) -> Self {
        Self {
            bound_ns,
            window_ns: 0,
            missed: 0,
            idle_since_ns: None,
        }
    }

    /// There is nothing to do; `true` to look again, `false` to sleep.
    pub(super) fn looks_again(&mut self, now_ns: u64) -> bool {
        let since = *self.idle_since_ns.get_or_insert(now_ns);
        let tries = self.missed % TRIED == TRIED - 1;
        now_ns - since < if tries { self.bound_ns } else { self.window_ns }
    }

    /// There is something to do.
    pub(super) fn busy(&mut self, now_ns: u64) {
        let Some(since) = self.idle_since_ns.take() else {
            return;
        };
        let waited = now_ns - since;
        if waited > self.bound_ns {
            self.window_ns /= 2;
            self.missed = self.missed.wrapping_add(1);
        } else {
            self.window_ns = self.window_ns.max(FIRST_NS).max(2 * waited).min(self.bound_ns);
            self.missed = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits that long; gives how long it would look for work.
    fn wait(patience: &mut Patience, now: &mut u64, wait_ns: u64) -> u64 {
        assert_eq!(patience.looks_again(*now), patience.window_ns != 0);
        *now += wait_ns;
        patience.busy(*now);
        patience.window_ns
    }

    #[test]
    fn the_window_follows_the_waits_within_its_bound() {
        let (mut patience, mut now) = (Patience::new(32_000), 1_000_000);
        let windows: Vec<u64> = [1_000, 3_000, 20_000, 5_000]
            .map(|ns| wait(&mut patience, &mut now, ns))
            .to_vec();
        assert_eq!(windows, [4_000, 6_000, 32_000, 32_000]);
        assert!(patience.looks_again(now) && patience.looks_again(now + 31_999));
        assert!(!patience.looks_again(now + 32_000));
        patience.busy(now + 20_000);
        now += 20_000;
        let windows: Vec<u64> = (0..3).map(|_| wait(&mut patience, &mut now, 90_000)).collect();
        assert_eq!(windows, [16_000, 8_000, 4_000]);
    }

    #[test]
    fn a_window_that_was_lost_is_found_again() {
        let (mut patience, mut now) = (Patience::new(32_000), 1_000_000);
        let mut tries = 0;
        for _ in 0..10 * TRIED {
            tries += u32::from(patience.looks_again(now));
            now += 90_000;
            patience.busy(now);
        }
        assert_eq!((tries, patience.window_ns), (10, 0));
        // The next try finds that work comes within the bound, if one does not sleep meanwhile.
        while !patience.looks_again(now) {
            now += 90_000;
            patience.busy(now);
        }
        patience.busy(now + 10_000);
        assert_eq!(patience.window_ns, 20_000);
    }

    #[test]
    fn a_bound_of_nothing_is_sleep() {
        let (mut patience, mut now) = (Patience::new(0), 7);
        for _ in 0..3 * TRIED {
            assert_eq!(wait(&mut patience, &mut now, 100), 0);
        }
    }
}
