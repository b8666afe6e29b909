//! ft-clock: virtual time and one alarm, as registers (docs/interfaces.md §1).
//!
//! It holds no clock. Time is told to it at stop points, by the host's clock when recording and by the log when replaying.

const NOW: u64 = 0x00;
const ALARM: u64 = 0x08;
const WALL: u64 = 0x10;
const LINE: u64 = 0x18;

/// The device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    deadline_ns: u64,
    line: bool,
    wall_at_zero_ns: u64,
}

impl Clock {
    /// A clock whose wall clock reads `wall_at_zero_ns` (since 1970) at virtual time 0.
    #[must_use]
    pub fn new(wall_at_zero_ns: u64) -> Self {
        Self {
            wall_at_zero_ns,
            ..Self::default()
        }
    }

    /// Whether reading `offset` needs the current time.
    #[must_use]
    pub fn reads_time(offset: u64) -> bool {
        matches!(offset, NOW | WALL)
    }

    /// Reads a register at virtual time `now_ns`.
    #[must_use]
    pub fn read(&self, offset: u64, now_ns: u64) -> u64 {
        match offset {
            NOW => now_ns,
            ALARM => self.deadline_ns,
            WALL => self.wall_at_zero_ns.wrapping_add(now_ns),
            LINE => u64::from(self.line),
            _ => 0,
        }
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, value: u64) {
        if offset == ALARM {
            self.deadline_ns = value;
            self.line = false;
        }
    }

    /// When the alarm is due; `None` while it is off.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        (self.deadline_ns != 0).then_some(self.deadline_ns)
    }

    /// Virtual time is `now_ns` here: raises the line if the alarm is due.
    pub fn advance(&mut self, now_ns: u64) {
        if self.deadline_ns().is_some_and(|deadline| now_ns >= deadline) {
            self.deadline_ns = 0;
            self.line = true;
        }
    }

    /// Level of the interrupt line.
    #[must_use]
    pub fn line(&self) -> bool {
        self.line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alarm_fires_once_and_writing_it_lowers_the_line() {
        let mut clock = Clock::new(1000);
        clock.write(ALARM, 50);
        clock.advance(49);
        assert!(!clock.line());
        clock.advance(50);
        assert_eq!((clock.line(), clock.deadline_ns()), (true, None));
        clock.write(ALARM, 0);
        assert!(!clock.line());
        assert_eq!((clock.read(NOW, 7), clock.read(WALL, 7)), (7, 1007));
    }
}
