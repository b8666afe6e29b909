//! The fixed registers of ACPI's power management: PM1 status, enable and control, and the PM timer (ACPI 6.5 §4.8.3).
//!
//! The machine is in ACPI mode from the start. The timer holds no clock: it is a view of virtual time.

/// PM1 event block: status, then enable.
pub const EVENT_PORT: u16 = 0x600;
/// PM1 control block.
pub const CONTROL_PORT: u16 = 0x604;
/// The PM timer.
pub const TIMER_PORT: u16 = 0x608;
/// SLP_TYP of S5, as the tables declare it.
pub const SLEEP_TYPE_OFF: u8 = 5;

const LAST: u16 = TIMER_PORT + 3;
const TICKS_PER_SECOND: u128 = 3_579_545;
const NS_PER_SECOND: u128 = 1_000_000_000;
/// The status bit is set whenever the highest bit of the 32-bit counter changes.
const CARRY_SHIFT: u32 = 31;

const STATUS: usize = 0;
const ENABLE: usize = 2;
const CONTROL: usize = 4;
const TIMER: usize = 8;
const BYTES: usize = 12;

const TIMER_EVENT: u16 = 1;
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;

/// Whether `port` belongs to these registers.
#[must_use]
pub fn claims(port: u16) -> bool {
    (EVENT_PORT..=LAST).contains(&port)
}

fn ticks(now_ns: u64) -> u64 {
    (u128::from(now_ns) * TICKS_PER_SECOND / NS_PER_SECOND) as u64
}

/// The registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Power {
    status: u16,
    enable: u16,
    control: u16,
    carries: u64,
}

impl Power {
    /// Whether reading `bytes` bytes at `port` shows the current time.
    #[must_use]
    pub fn read_shows_time(port: u16, bytes: usize) -> bool {
        port <= LAST && usize::from(port) + bytes > usize::from(TIMER_PORT)
    }

    /// The guest reads, in any width, at virtual time `now_ns`.
    pub fn read(&self, port: u16, now_ns: u64, out: &mut [u8]) {
        let mut bytes = [0; BYTES];
        bytes[STATUS..ENABLE].copy_from_slice(&self.status.to_le_bytes());
        bytes[ENABLE..CONTROL].copy_from_slice(&self.enable.to_le_bytes());
        bytes[CONTROL..CONTROL + 2].copy_from_slice(&(self.control | SCI_ENABLED).to_le_bytes());
        bytes[TIMER..].copy_from_slice(&(ticks(now_ns) as u32).to_le_bytes());
        out.fill(0);
        let from = bytes.get(usize::from(port - EVENT_PORT)..).unwrap_or(&[]);
        let count = from.len().min(out.len());
        out[..count].copy_from_slice(&from[..count]);
    }

    /// The guest writes; whether it switches itself off.
    pub fn write(&mut self, port: u16, data: &[u8]) -> bool {
        let mut off = false;
        for (register, value) in (usize::from(port - EVENT_PORT)..).zip(data) {
            let shift = 8 * (register % 2);
            let value = u16::from(*value) << shift;
            let kept = !(0xff << shift);
            match register & !1 {
                STATUS => self.status &= !value,
                ENABLE => self.enable = self.enable & kept | value,
                CONTROL => {
                    // SLP_EN is a command and reads as zero.
                    self.control = (self.control & kept | value) & !SLEEP_ENABLE;
                    let sleep_type = self.control >> 10 & 7;
                    off |= value & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_OFF);
                }
                _ => {}
            }
        }
        off
    }

    /// When the timer's interrupt is due; a guest that does not enable it gets none.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        if self.enable & TIMER_EVENT == 0 {
            return None;
        }
        let tick = u128::from(self.carries + 1) << CARRY_SHIFT;
        u64::try_from((tick * NS_PER_SECOND).div_ceil(TICKS_PER_SECOND)).ok()
    }

    /// Virtual time is `now_ns`.
    pub fn advance(&mut self, now_ns: u64) {
        let carries = ticks(now_ns) >> CARRY_SHIFT;
        if carries > self.carries {
            self.carries = carries;
            self.status |= TIMER_EVENT;
        }
    }

    /// Level of the SCI.
    #[must_use]
    pub fn line(&self) -> bool {
        self.status & self.enable != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer(power: &Power, now_ns: u64) -> u32 {
        let mut out = [0; 4];
        power.read(TIMER_PORT, now_ns, &mut out);
        u32::from_le_bytes(out)
    }

    #[test]
    fn the_timer_counts_virtual_time_at_its_rate_and_wraps() {
        let power = Power::default();
        assert_eq!(timer(&power, 0), 0);
        assert_eq!(timer(&power, 1_000_000_000), 3_579_545);
        let wrap_ns = ((1u128 << 32) * NS_PER_SECOND).div_ceil(TICKS_PER_SECOND) as u64;
        assert_eq!((timer(&power, wrap_ns - 1), timer(&power, wrap_ns)), (u32::MAX, 0));
    }

    #[test]
    fn only_the_timer_shows_time() {
        for (port, bytes, shows) in [
            (0x608, 4, true),
            (0x60b, 1, true),
            (0x604, 4, false),
            (0x604, 2, false),
            (0x606, 4, true),
        ] {
            assert_eq!(Power::read_shows_time(port, bytes), shows, "{port:#x}, {bytes} bytes");
        }
    }

    #[test]
    fn s5_switches_off_and_no_other_state_does() {
        let mut power = Power::default();
        assert!(!power.write(CONTROL_PORT, &0x1400u16.to_le_bytes()));
        assert!(!power.write(CONTROL_PORT, &0x2400u16.to_le_bytes()), "S1");
        let mut control = [0; 2];
        power.read(CONTROL_PORT, 0, &mut control);
        assert_eq!(
            u16::from_le_bytes(control),
            0x0401,
            "SLP_EN reads as zero, SCI_EN as one"
        );
        assert!(power.write(CONTROL_PORT, &0x3400u16.to_le_bytes()));
        assert!(power.write(CONTROL_PORT + 1, &[0x34]), "a byte access");
    }

    #[test]
    fn the_timers_carry_is_an_event_that_can_interrupt() {
        let mut power = Power::default();
        assert_eq!(power.deadline_ns(), None);
        power.write(EVENT_PORT + 2, &[1, 0]);
        let deadline = power.deadline_ns().unwrap();
        power.advance(deadline - 1);
        assert!(!power.line());
        power.advance(deadline);
        assert!(power.line());
        power.write(EVENT_PORT, &[1, 0]);
        assert!(!power.line());
        assert!(power.deadline_ns().unwrap() > deadline);
    }
}
