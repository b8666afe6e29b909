//! The MC146818 real-time clock with its CMOS memory, at ports 0x70 and 0x71 (Motorola MC146818A data sheet).
//!
//! It holds no clock: date and time are virtual time plus the wall clock of power-on, which is in the log. The guest may set it.

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;
const CMOS_BYTES: usize = 128;
const NS_PER_SECOND: u64 = 1_000_000_000;
const SECONDS_PER_DAY: i64 = 86_400;
/// An update is announced so long before it.
const UPDATE_NS: u64 = 244_000;

const SECONDS: usize = 0;
const SECONDS_ALARM: usize = 1;
const MINUTES: usize = 2;
const MINUTES_ALARM: usize = 3;
const HOURS: usize = 4;
const HOURS_ALARM: usize = 5;
const DAY_OF_WEEK: usize = 6;
const DAY: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const STATUS_A: usize = 10;
const STATUS_B: usize = 11;
const STATUS_C: usize = 12;
const STATUS_D: usize = 13;
/// Where the ACPI tables say that the century is.
pub const CENTURY: usize = 0x32;

const A_UPDATE_IN_PROGRESS: u8 = 0x80;
/// The 32 kHz time base, and 1024 Hz for the periodic interrupt, as firmware leaves them.
const A_RESET: u8 = 0x26;
const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE: u8 = 0x10;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
const C_INTERRUPT: u8 = 0x80;
const D_VALID: u8 = 0x80;
const PM: u8 = 0x80;
/// An alarm register at or above this matches everything.
const ALARM_ANY: u8 = 0xc0;

/// Whether `port` belongs to the clock.
#[must_use]
pub fn claims(port: u16) -> bool {
    matches!(port, INDEX | DATA)
}

/// A date of the Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    year: i64,
    /// 1 to 12.
    month: i64,
    /// 1 to 31.
    day: i64,
    second_of_day: i64,
}

/// Days since 1970-01-01 of a date. Years begin in March here, so that a leap day is a year's last day.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

impl Date {
    fn of_seconds(seconds: i64) -> Self {
        let shifted = seconds.div_euclid(SECONDS_PER_DAY) + 719_468;
        let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        Self {
            year: era * 400 + year + i64::from(month >= 10),
            month: if month < 10 { month + 3 } else { month - 9 },
            day: of_year - (153 * month + 2) / 5 + 1,
            second_of_day: seconds.rem_euclid(SECONDS_PER_DAY),
        }
    }

    fn seconds(&self) -> i64 {
        days(self.year, self.month, self.day) * SECONDS_PER_DAY + self.second_of_day
    }
}

/// The device.
#[derive(Clone, Debug)]
pub struct Rtc {
    cmos: [u8; CMOS_BYTES],
    index: usize,
    /// Date and time minus virtual time.
    offset_ns: i128,
    /// While the guest sets the clock it stands still.
    set: Option<Date>,
    flags: u8,
    deadline_ns: Option<u64>,
    last_ns: u64,
}

impl Rtc {
    /// A clock that reads `wall_at_zero_ns` (since 1970) at virtual time 0.
    #[must_use]
    pub fn new(wall_at_zero_ns: u64) -> Self {
        let mut cmos = [0; CMOS_BYTES];
        cmos[STATUS_A] = A_RESET;
        cmos[STATUS_B] = B_24_HOURS;
        Self {
            cmos,
            index: 0,
            offset_ns: i128::from(wall_at_zero_ns),
            set: None,
            flags: 0,
            deadline_ns: None,
            last_ns: 0,
        }
    }

    /// Whether reading `port` needs the current time: the seconds, which software reads first, and the announcement of an update. The rest of
    /// the date is as of the last time the guest was shown, so that it fits the seconds.
    #[must_use]
    pub fn read_shows_time(&self, port: u16) -> bool {
        port == DATA && matches!(self.index, SECONDS | STATUS_A) && self.set.is_none()
    }

    /// Whether writing needs the current time: setting the clock.
    #[must_use]
    pub fn write_needs_time(&self, port: u16, value: u8) -> bool {
        port == DATA
            && match self.index {
                STATUS_B => (value ^ self.cmos[STATUS_B]) & (B_SET | B_ALARM | B_UPDATE | B_PERIODIC) != 0,
                index => is_date(index) && self.set.is_none(),
            }
    }

    fn wall_ns(&self, now_ns: u64) -> i128 {
        i128::from(now_ns) + self.offset_ns
    }

    fn date(&self, now_ns: u64) -> Date {
        self.set
            .unwrap_or_else(|| Date::of_seconds(self.wall_ns(now_ns).div_euclid(i128::from(NS_PER_SECOND)) as i64))
    }

    fn of_second_ns(&self, now_ns: u64) -> u64 {
        self.wall_ns(now_ns).rem_euclid(i128::from(NS_PER_SECOND)) as u64
    }

    fn is_binary(&self) -> bool {
        self.cmos[STATUS_B] & B_BINARY != 0
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value as u8;
        if self.is_binary() {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> i64 {
        i64::from(if self.is_binary() {
            value
        } else {
            (value >> 4) * 10 + (value & 0xf)
        })
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.cmos[STATUS_B] & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.cmos[STATUS_B] & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let pm = if value & PM != 0 { 12 } else { 0 };
        self.decode(value & !PM) % 12 + pm
    }

    fn date_register(&self, index: usize, now_ns: u64) -> u8 {
        let date = self.date(now_ns);
        match index {
            SECONDS => self.encode(date.second_of_day % 60),
            MINUTES => self.encode(date.second_of_day / 60 % 60),
            HOURS => self.encode_hour(date.second_of_day / 3600),
            // 1970-01-01 was a Thursday; Sunday is 1.
            DAY_OF_WEEK => self.encode((date.seconds().div_euclid(SECONDS_PER_DAY) + 4).rem_euclid(7) + 1),
            DAY => self.encode(date.day),
            MONTH => self.encode(date.month),
            YEAR => self.encode(date.year.rem_euclid(100)),
            _ => self.encode(date.year.div_euclid(100).rem_euclid(100)),
        }
    }

    /// The guest reads at virtual time `now_ns`.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        if port != DATA {
            return 0xff;
        }
        match self.index {
            index if is_date(index) => self.date_register(index, now_ns),
            STATUS_A => {
                let updating = self.set.is_none() && self.of_second_ns(now_ns) >= NS_PER_SECOND - UPDATE_NS;
                self.cmos[STATUS_A] | if updating { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            STATUS_C => {
                let raised = if self.line() { C_INTERRUPT } else { 0 };
                std::mem::take(&mut self.flags) | raised
            }
            STATUS_D => D_VALID,
            index => self.cmos[index],
        }
    }

    /// The guest writes at virtual time `now_ns`.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        if port == INDEX {
            self.index = usize::from(value) % CMOS_BYTES;
            return;
        }
        match self.index {
            index if is_date(index) => {
                let mut date = self.date(now_ns);
                self.set_date_register(&mut date, index, value);
                match &mut self.set {
                    Some(set) => *set = date,
                    None => self.set_clock(&date, now_ns),
                }
            }
            STATUS_A => self.cmos[STATUS_A] = value & !A_UPDATE_IN_PROGRESS,
            STATUS_B => {
                self.cmos[STATUS_B] = value;
                match (value & B_SET != 0, self.set) {
                    (true, None) => self.set = Some(self.date(now_ns)),
                    (false, Some(date)) => {
                        self.set = None;
                        self.set_clock(&date, now_ns);
                    }
                    _ => {}
                }
            }
            STATUS_C | STATUS_D => {}
            index => self.cmos[index] = value,
        }
        self.deadline_ns = self.next_deadline(now_ns);
    }

    fn set_clock(&mut self, date: &Date, now_ns: u64) {
        self.offset_ns = i128::from(date.seconds()) * i128::from(NS_PER_SECOND) - i128::from(now_ns);
    }

    /// What a guest writes out of range is taken into it, so that a date is a date.
    fn set_date_register(&self, date: &mut Date, index: usize, value: u8) {
        let (hour, minute, second) = (
            date.second_of_day / 3600,
            date.second_of_day / 60 % 60,
            date.second_of_day % 60,
        );
        let number = self.decode(value);
        date.second_of_day = match index {
            SECONDS => hour * 3600 + minute * 60 + number.min(59),
            MINUTES => hour * 3600 + number.min(59) * 60 + second,
            HOURS => self.decode_hour(value).min(23) * 3600 + minute * 60 + second,
            _ => date.second_of_day,
        };
        match index {
            DAY => date.day = number.clamp(1, 31),
            MONTH => date.month = number.clamp(1, 12),
            YEAR => date.year = date.year.div_euclid(100) * 100 + number.min(99),
            CENTURY => date.year = number.min(99) * 100 + date.year.rem_euclid(100),
            _ => {}
        }
    }

    fn alarm_matches(&self, second_of_day: i64) -> bool {
        let matches = |register: usize, value: u8| self.cmos[register] >= ALARM_ANY || self.cmos[register] == value;
        matches(SECONDS_ALARM, self.encode(second_of_day % 60))
            && matches(MINUTES_ALARM, self.encode(second_of_day / 60 % 60))
            && (self.cmos[HOURS_ALARM] >= ALARM_ANY && self.cmos[STATUS_B] & B_24_HOURS != 0
                || self.cmos[HOURS_ALARM] == self.encode_hour(second_of_day / 3600))
    }

    /// Period of the periodic interrupt.
    fn period_ns(&self) -> Option<u64> {
        let rate = match self.cmos[STATUS_A] & 0xf {
            0 => return None,
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        Some((NS_PER_SECOND << (rate - 1)) / 32_768)
    }

    fn next_deadline(&self, now_ns: u64) -> Option<u64> {
        let enabled = self.cmos[STATUS_B];
        let periodic = self.period_ns().filter(|_| enabled & B_PERIODIC != 0);
        let periodic = periodic.map(|period| (now_ns / period + 1) * period);
        let to_second = NS_PER_SECOND - self.of_second_ns(now_ns);
        let seconds = if self.set.is_some() {
            None
        } else if enabled & B_UPDATE != 0 {
            Some(0)
        } else if enabled & B_ALARM != 0 {
            let now = self.date(now_ns).second_of_day;
            (0..SECONDS_PER_DAY).find(|ahead| self.alarm_matches((now + 1 + ahead) % SECONDS_PER_DAY))
        } else {
            None
        };
        let seconds = seconds.map(|ahead| now_ns + to_second + ahead as u64 * NS_PER_SECOND);
        [periodic, seconds].into_iter().flatten().min()
    }

    /// When the next interrupt is due.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        self.deadline_ns
    }

    /// Virtual time is `now_ns`.
    pub fn advance(&mut self, now_ns: u64) {
        let last_ns = std::mem::replace(&mut self.last_ns, now_ns);
        if self.deadline_ns.is_none_or(|deadline| now_ns < deadline) {
            return;
        }
        if self
            .period_ns()
            .is_some_and(|period| now_ns / period > last_ns / period)
        {
            self.flags |= B_PERIODIC;
        }
        let (before, now) = (self.date(last_ns).seconds(), self.date(now_ns).seconds());
        if now > before && self.set.is_none() {
            self.flags |= B_UPDATE;
            let first = (before + 1).max(now - SECONDS_PER_DAY + 1);
            if (first..=now).any(|second| self.alarm_matches(second.rem_euclid(SECONDS_PER_DAY))) {
                self.flags |= B_ALARM;
            }
        }
        self.deadline_ns = self.next_deadline(now_ns);
    }

    /// Level of the interrupt line.
    #[must_use]
    pub fn line(&self) -> bool {
        self.flags & self.cmos[STATUS_B] & (B_PERIODIC | B_ALARM | B_UPDATE) != 0
    }
}

fn is_date(index: usize) -> bool {
    matches!(index, SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const LEAP_DAY: u64 = 1_709_251_198 * NS_PER_SECOND;

    fn read(rtc: &mut Rtc, index: usize, now_ns: u64) -> u8 {
        rtc.write(INDEX, index as u8, now_ns);
        rtc.read(DATA, now_ns)
    }

    fn write(rtc: &mut Rtc, index: usize, value: u8, now_ns: u64) {
        rtc.write(INDEX, index as u8, now_ns);
        rtc.write(DATA, value, now_ns);
    }

    /// Century, year, month, day, weekday, hour, minute, second.
    fn date(rtc: &mut Rtc, now_ns: u64) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, DAY_OF_WEEK, HOURS, MINUTES, SECONDS].map(|index| read(rtc, index, now_ns))
    }

    #[test]
    fn the_date_is_virtual_time_after_power_on() {
        let mut rtc = Rtc::new(LEAP_DAY);
        assert_eq!(date(&mut rtc, 0), [0x20, 0x24, 2, 0x29, 5, 0x23, 0x59, 0x58]);
        assert_eq!(date(&mut rtc, 2 * NS_PER_SECOND), [0x20, 0x24, 3, 1, 6, 0, 0, 0]);
        write(&mut rtc, STATUS_B, B_BINARY, 0);
        assert_eq!(
            date(&mut rtc, 0),
            [20, 24, 2, 29, 5, 11 | PM, 59, 58],
            "12 hours, binary"
        );
    }

    #[test]
    fn only_what_shows_a_new_moment_needs_a_sample() {
        let mut rtc = Rtc::new(LEAP_DAY);
        for (index, shows) in [
            (SECONDS, true),
            (STATUS_A, true),
            (MINUTES, false),
            (STATUS_C, false),
            (0x40, false),
        ] {
            rtc.write(INDEX, index as u8, 0);
            assert_eq!(rtc.read_shows_time(DATA), shows, "register {index}");
        }
        assert!(!rtc.read_shows_time(INDEX));
    }

    #[test]
    fn an_update_is_announced() {
        let mut rtc = Rtc::new(LEAP_DAY);
        assert_eq!(read(&mut rtc, STATUS_A, NS_PER_SECOND - UPDATE_NS - 1), A_RESET);
        assert_eq!(
            read(&mut rtc, STATUS_A, NS_PER_SECOND - UPDATE_NS),
            A_RESET | A_UPDATE_IN_PROGRESS
        );
    }

    #[test]
    fn a_guest_can_set_it() {
        let mut rtc = Rtc::new(LEAP_DAY);
        write(&mut rtc, STATUS_B, B_SET | B_24_HOURS, 0);
        for (index, value) in [
            (CENTURY, 0x19),
            (YEAR, 0x99),
            (MONTH, 0x12),
            (DAY, 0x31),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x59),
        ] {
            write(&mut rtc, index, value, 0);
        }
        assert_eq!(
            read(&mut rtc, SECONDS, 5 * NS_PER_SECOND),
            0x59,
            "it stands still while it is set"
        );
        rtc.write(INDEX, STATUS_B as u8, 0);
        assert!(rtc.write_needs_time(DATA, B_24_HOURS));
        write(&mut rtc, STATUS_B, B_24_HOURS, 5 * NS_PER_SECOND);
        assert_eq!(date(&mut rtc, 6 * NS_PER_SECOND), [0x20, 0x00, 1, 1, 7, 0, 0, 0]);
    }

    #[test]
    fn an_alarm_interrupts_once_and_reading_the_cause_lowers_the_line() {
        let mut rtc = Rtc::new(LEAP_DAY);
        for (index, value) in [
            (HOURS_ALARM, 0),
            (MINUTES_ALARM, 1),
            (SECONDS_ALARM, 0x30),
            (STATUS_B, B_ALARM | B_24_HOURS),
        ] {
            write(&mut rtc, index, value, 0);
        }
        let deadline = (2 + 90) * NS_PER_SECOND;
        assert_eq!(rtc.deadline_ns(), Some(deadline));
        rtc.advance(deadline - 1);
        assert!(!rtc.line());
        rtc.advance(deadline);
        assert!(rtc.line());
        assert_eq!(read(&mut rtc, STATUS_C, deadline), C_INTERRUPT | B_ALARM | B_UPDATE);
        assert!(!rtc.line());
        assert_eq!(
            rtc.deadline_ns(),
            Some(deadline + SECONDS_PER_DAY as u64 * NS_PER_SECOND)
        );
    }

    #[test]
    fn update_and_periodic_interrupts_come_at_their_rates() {
        let mut rtc = Rtc::new(LEAP_DAY);
        write(&mut rtc, STATUS_B, B_UPDATE | B_24_HOURS, 10);
        assert_eq!(rtc.deadline_ns(), Some(NS_PER_SECOND));
        write(&mut rtc, STATUS_B, B_PERIODIC | B_24_HOURS, 10);
        let period = NS_PER_SECOND / 1024;
        assert_eq!(rtc.deadline_ns(), Some(period));
        rtc.advance(period);
        assert_eq!(read(&mut rtc, STATUS_C, period), C_INTERRUPT | B_PERIODIC);
    }

    proptest! {
        #[test]
        fn dates_and_seconds_are_each_others_inverse(seconds in -60_000_000_000i64..60_000_000_000) {
            let date = Date::of_seconds(seconds);
            prop_assert_eq!(date.seconds(), seconds);
            prop_assert!((1..=12).contains(&date.month) && (1..=31).contains(&date.day));
        }

        #[test]
        fn any_sequence_of_accesses_is_harmless_and_deadlines_move_on(
            accesses in proptest::collection::vec((0u8..0x40, any::<u8>(), any::<bool>(), 0u64..100_000_000_000), 0..100)
        ) {
            let mut rtc = Rtc::new(LEAP_DAY);
            let mut now_ns = 0u64;
            for (index, value, writes, step) in accesses {
                if writes { write(&mut rtc, usize::from(index), value, now_ns) } else { read(&mut rtc, usize::from(index), now_ns); }
                now_ns += step;
                rtc.advance(now_ns);
                prop_assert!(rtc.deadline_ns().is_none_or(|deadline| deadline > now_ns));
            }
        }
    }
}
