//! What a stock Linux expects of a PC beside what every board has: interval timer, real-time clock, ACPI registers, reset.
//!
//! ```text
//!  port ─► Pit ── IRQ 0 (edges)    Rtc ── IRQ 8 (edge)    Power ── IRQ 9, the SCI (level)
//! ```
//! All of it is a function of the guest's accesses and of virtual time.

use super::{Effect, RESET_PORT, RESET_VALUE, RTC_IRQ, SCI_IRQ, TIMER_IRQ, pic::Pic, pit::Pit, power::Power, rtc::Rtc};
use super::{pit, power, rtc};

/// The devices.
#[derive(Clone, Debug)]
pub struct Pc {
    pit: Pit,
    rtc: Rtc,
    power: Power,
}

impl Pc {
    /// At power-on, when the wall clock reads `wall_at_zero_ns` (since 1970).
    #[must_use]
    pub fn new(wall_at_zero_ns: u64) -> Self {
        Self {
            pit: Pit::default(),
            rtc: Rtc::new(wall_at_zero_ns),
            power: Power::default(),
        }
    }

    /// Whether reading `bytes` bytes at `port` shows the current time.
    #[must_use]
    pub fn read_shows_time(&self, port: u16, bytes: usize) -> bool {
        (pit::claims(port) && self.pit.read_shows_time(port))
            || (rtc::claims(port) && self.rtc.read_shows_time(port))
            || (power::claims(port) && Power::read_shows_time(port, bytes))
    }

    /// Whether what writing `data` to `port` does depends on the current time.
    #[must_use]
    pub fn write_needs_time(&self, port: u16, data: &[u8]) -> bool {
        let [value] = data else {
            return false;
        };
        (pit::claims(port) && Pit::write_needs_time(port, *value))
            || (rtc::claims(port) && self.rtc.write_needs_time(port, *value))
    }

    /// `in`; false if nothing is there.
    pub fn read(&mut self, port: u16, now_ns: u64, out: &mut [u8]) -> bool {
        match out {
            out if power::claims(port) => self.power.read(port, now_ns, out),
            [value] if pit::claims(port) => *value = self.pit.read(port, now_ns),
            [value] if rtc::claims(port) => *value = self.rtc.read(port, now_ns),
            // The 8042's status: nothing to read, ready for a command.
            [value] if port == RESET_PORT => *value = 0,
            _ => return false,
        }
        true
    }

    /// `out`.
    pub fn write(&mut self, port: u16, data: &[u8], now_ns: u64) -> Effect {
        match data {
            data if power::claims(port) && self.power.write(port, data) => return Effect::PowerOff { reset: false },
            [RESET_VALUE] if port == RESET_PORT => return Effect::PowerOff { reset: true },
            [value] if pit::claims(port) => self.pit.write(port, *value, now_ns),
            [value] if rtc::claims(port) => self.rtc.write(port, *value, now_ns),
            _ => {}
        }
        Effect::None
    }

    /// When the first of the timers is due.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        [self.pit.deadline_ns(), self.rtc.deadline_ns(), self.power.deadline_ns()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Virtual time is `now_ns`.
    pub fn advance(&mut self, now_ns: u64, pic: &mut Pic) {
        if self.pit.advance(now_ns) {
            pic.pulse(TIMER_IRQ);
        }
        self.rtc.advance(now_ns);
        self.power.advance(now_ns);
    }

    /// Puts the lines that are levels on the interrupt controllers.
    pub fn update_lines(&self, pic: &mut Pic) {
        pic.set_line(RTC_IRQ, self.rtc.line());
        pic.set_line(SCI_IRQ, self.power.line());
    }
}
