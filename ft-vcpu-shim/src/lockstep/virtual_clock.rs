//! Virtual time while recording: it follows the host's clock for as long as the guest runs or sleeps, and hardly while the machine stands still.
//!
//! ```text
//!   host      ──────────────────────────────────────────────────►
//!   vCPU        runs ▕ stands still: full log, delta ... ▏ runs
//!   virtual   ───────┬── at most 100 ms ──┐              ┌───────►
//!                    stop                 └──────────────┘ resumes
//! ```
//! A guest copes with a timer that is late, but not with any lateness: the PM timer wraps every 4.69 s, and Linux 6.12 takes a step of more than half of
//! that for one backwards. Its clock can then stand still for good. So the guest is spared what it did not live through, as behind a pause; its wall
//! clock is what falls behind.

/// How much of a stop the guest sees.
pub const STANDSTILL_NS_MAX: u64 = 100_000_000;

/// The clock. It holds no clock of the host: `host_ns`, which never goes back, is told to it.
#[derive(Clone, Copy, Debug)]
pub struct VirtualClock {
    /// Virtual time minus the host's.
    offset_ns: i128,
    last_ns: u64,
    /// While the machine stands still: the time of the host since which it does.
    stopped_ns: Option<u64>,
}

impl VirtualClock {
    /// A clock that shows `now_ns` at the host's `host_ns`. The machine stands still.
    #[must_use]
    pub fn new(now_ns: u64, host_ns: u64) -> Self {
        Self {
            offset_ns: i128::from(now_ns) - i128::from(host_ns),
            last_ns: now_ns,
            stopped_ns: Some(host_ns),
        }
    }

    /// Virtual time, in nanoseconds.
    pub fn read(&mut self, host_ns: u64) -> u64 {
        if let Some(stopped_ns) = &mut self.stopped_ns {
            let excess = host_ns.saturating_sub(*stopped_ns).saturating_sub(STANDSTILL_NS_MAX);
            self.offset_ns -= i128::from(excess);
            *stopped_ns += excess;
        }
        let now = i128::from(host_ns) + self.offset_ns;
        self.last_ns = u64::try_from(now).unwrap_or(0).max(self.last_ns);
        self.last_ns
    }

    /// The vCPU stopped.
    pub fn stops(&mut self, host_ns: u64) {
        self.stopped_ns = Some(host_ns);
    }

    /// The vCPU goes on.
    pub fn resumes(&mut self, host_ns: u64) {
        self.read(host_ns);
        self.stopped_ns = None;
    }

    /// A guest that has nothing to do until `alarm_ns` slept from one time of the host to another: that was its own time, but for what was behind the alarm.
    pub fn slept(&mut self, from_host_ns: u64, to_host_ns: u64, alarm_ns: Option<u64>) {
        let from_ns = self.read(from_host_ns);
        let slept_ns = to_host_ns.saturating_sub(from_host_ns);
        let own_ns = alarm_ns.map_or(slept_ns, |alarm_ns| slept_ns.min(alarm_ns.saturating_sub(from_ns)));
        if let Some(stopped_ns) = &mut self.stopped_ns {
            *stopped_ns += own_ns;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// At virtual time 0, at 1000 ms of the host's.
    fn clock() -> VirtualClock {
        VirtualClock::new(0, 1000 * MS)
    }

    #[test]
    fn a_running_guest_has_the_hosts_time() {
        let mut clock = clock();
        clock.resumes(1000 * MS);
        assert_eq!(clock.read(1007 * MS), 7 * MS);
        assert_eq!(clock.read(9000 * MS), 8000 * MS);
        clock.stops(9000 * MS);
        assert_eq!(clock.read(9100 * MS), 8100 * MS);
    }

    #[test]
    fn a_long_stop_is_a_short_one_for_the_guest() {
        let mut clock = clock();
        clock.resumes(1000 * MS);
        clock.stops(1010 * MS);
        assert_eq!(clock.read(1050 * MS), 50 * MS);
        assert_eq!(clock.read(6000 * MS), 110 * MS);
        assert_eq!(clock.read(7000 * MS), 110 * MS, "the same stop");
        clock.resumes(8000 * MS);
        assert_eq!(clock.read(8001 * MS), 111 * MS);
        clock.stops(8001 * MS);
        clock.resumes(9001 * MS);
        assert_eq!(clock.read(9001 * MS), 211 * MS, "though nobody asked during the stop");
    }

    #[test]
    fn sleep_is_the_guests_own_time_until_its_alarm() {
        let mut clock = clock();
        clock.slept(1000 * MS, 6000 * MS, None);
        assert_eq!(clock.read(6000 * MS), 5000 * MS);
        clock.slept(6000 * MS, 8000 * MS, Some(7000 * MS));
        assert_eq!(clock.read(8000 * MS), 7000 * MS);
        clock.slept(8000 * MS, 60_000 * MS, Some(8000 * MS));
        assert_eq!(clock.read(60_000 * MS), 8100 * MS, "the host slept through the alarm");
        clock.slept(60_000 * MS, 61_000 * MS, Some(8000 * MS));
        assert_eq!(clock.read(61_000 * MS), 8100 * MS, "the alarm was due before");
    }

    #[test]
    fn it_never_goes_back() {
        let mut clock = VirtualClock::new(50 * MS, 1000 * MS);
        assert_eq!(clock.read(900 * MS), 50 * MS, "the host's clock of another moment");
        let mut last = 0;
        for step in 0..1000 {
            let host_ns = 1000 * MS + step * step % 977 * MS / 7 + step * 90 * MS;
            match step % 5 {
                0 => clock.stops(host_ns),
                1 => clock.slept(host_ns, host_ns + 40 * MS, Some(last + 20 * MS)),
                3 => clock.resumes(host_ns),
                _ => {}
            }
            let now = clock.read(host_ns);
            assert!(now >= last);
            last = now;
        }
    }
}
