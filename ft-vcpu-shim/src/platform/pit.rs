//! The 8254 programmable interval timer, and port 0x61, which gates its channel 2 (Intel 8254 data sheet, 231164).
//!
//! ```text
//!  channel 0 ─► IRQ 0, at every rising edge of OUT     channel 2 ─► OUT in bit 5 of port 0x61; gated by bit 0
//! ```
//! It holds no clock: counts follow from virtual time, which is told to it. Nothing ticks; the next edge is computed.

/// Input clock.
const TICKS_PER_SECOND: u128 = 1_193_182;
const NS_PER_SECOND: u128 = 1_000_000_000;

const CHANNEL_0: u16 = 0x40;
const CHANNEL_2: u16 = 0x42;
const CONTROL: u16 = 0x43;
const SYSTEM: u16 = 0x61;

const SYSTEM_GATE: u8 = 1;
const SYSTEM_SPEAKER: u8 = 2;
const SYSTEM_REFRESH: u8 = 1 << 4;
const SYSTEM_OUT: u8 = 1 << 5;
/// The refresh bit toggles every 18 ticks, about 15 µs.
const REFRESH_TICKS: u64 = 18;

/// Whether `port` belongs to the timer.
#[must_use]
pub fn claims(port: u16) -> bool {
    matches!(port, CHANNEL_0..=CONTROL | SYSTEM)
}

fn ticks(now_ns: u64) -> u64 {
    (u128::from(now_ns) * TICKS_PER_SECOND / NS_PER_SECOND) as u64
}

/// The first nanosecond of a tick.
fn tick_ns(tick: u64) -> u64 {
    u64::try_from((u128::from(tick) * NS_PER_SECOND).div_ceil(TICKS_PER_SECOND)).unwrap_or(u64::MAX)
}

/// Which bytes of a count travel through the channel's port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Access {
    Low = 1,
    High = 2,
    #[default]
    Both = 3,
}

/// Where a channel's counting stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Counting {
    /// A control word came, and no count (or no trigger) since.
    #[default]
    Waiting,
    /// Counts since this tick.
    Since(u64),
    /// The gate is low; so many ticks had been counted.
    Paused(u64),
}

#[derive(Clone, Copy, Debug)]
struct Channel {
    mode: u8,
    access: Access,
    decimal: bool,
    /// 1 to 65536.
    count: u32,
    counting: Counting,
    gate: bool,
    /// The low byte of a count whose high byte is still to come.
    low: Option<u8>,
    /// The next byte read of a two-byte count is the high one.
    high_next: bool,
    latched: Option<u16>,
    status: Option<u8>,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            access: Access::default(),
            decimal: false,
            count: 0x1_0000,
            counting: Counting::Waiting,
            gate,
            low: None,
            high_next: false,
            latched: None,
            status: None,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn elapsed(&self, now: u64) -> Option<u64> {
        match self.counting {
            Counting::Waiting => None,
            Counting::Since(tick) => Some(now.saturating_sub(tick)),
            Counting::Paused(elapsed) => Some(elapsed),
        }
    }

    fn control(&mut self, value: u8, access: Access) {
        *self = Self {
            mode: match (value >> 1) & 7 {
                mode @ 0..=5 => mode,
                alias => alias - 4,
            },
            access,
            decimal: value & 1 != 0,
            ..Self::new(self.gate)
        };
    }

    fn write(&mut self, value: u8, now: u64) {
        let count = match (self.access, self.low) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, None) => {
                self.low = Some(value);
                return;
            }
            (Access::Both, Some(low)) => u16::from_le_bytes([low, value]),
        };
        self.low = None;
        self.count = match (count, self.decimal) {
            (0, true) => 10_000,
            (0, false) => 0x1_0000,
            (count, true) => from_decimal(count),
            (count, false) => u32::from(count),
        };
        self.counting = match (self.mode, self.gate) {
            // These wait for a rising gate.
            (1 | 5, _) => Counting::Waiting,
            (_, true) => Counting::Since(now),
            (_, false) => Counting::Paused(0),
        };
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        self.counting = match (self.mode, self.counting) {
            (1 | 5, _) if rises => Counting::Since(now),
            (2 | 3, Counting::Paused(_)) if rises => Counting::Since(now),
            (_, Counting::Paused(elapsed)) if rises => Counting::Since(now.saturating_sub(elapsed)),
            (0 | 2 | 3 | 4, Counting::Since(tick)) if falls => Counting::Paused(now.saturating_sub(tick)),
            (_, counting) => counting,
        };
    }

    /// Level of OUT.
    fn out(&self, now: u64) -> bool {
        let count = u64::from(self.count);
        let Some(elapsed) = self.elapsed(now) else {
            return self.mode != 0;
        };
        match self.mode {
            0 | 1 => elapsed >= count,
            2 => !self.gate || elapsed % count != count - 1,
            3 => !self.gate || elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// What the counting element holds.
    fn value(&self, now: u64) -> u16 {
        let elapsed = self.elapsed(now).unwrap_or(0);
        let (count, modulus) = (u64::from(self.count), if self.decimal { 10_000 } else { 0x1_0000 });
        let value = match self.mode {
            2 => count - elapsed % count,
            3 => count - 2 * elapsed % count,
            _ => (count + modulus - elapsed % modulus) % modulus,
        };
        if self.decimal { to_decimal(value) } else { value as u16 }
    }

    fn latch_status(&mut self, now: u64) {
        let waiting = u8::from(self.counting == Counting::Waiting);
        let status = u8::from(self.out(now)) << 7 | waiting << 6 | (self.access as u8) << 4 | self.mode << 1;
        self.status.get_or_insert(status | u8::from(self.decimal));
    }

    fn latch_count(&mut self, now: u64) {
        let value = self.value(now);
        self.latched.get_or_insert(value);
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self.latched.unwrap_or_else(|| self.value(now)).to_le_bytes();
        let last = match self.access {
            Access::Both => {
                self.high_next = !self.high_next;
                !self.high_next
            }
            Access::Low | Access::High => true,
        };
        if last {
            self.latched = None;
        }
        match self.access {
            Access::Low => low,
            Access::High => high,
            Access::Both if last => high,
            Access::Both => low,
        }
    }

    /// The tick of the first rising edge of OUT after a load; the interrupt of channel 0.
    fn first_edge(&self) -> Option<u64> {
        let Counting::Since(tick) = self.counting else {
            return None;
        };
        let edge = tick.saturating_add(u64::from(self.count));
        match self.mode {
            0 | 2 | 3 => Some(edge),
            4 => Some(edge.saturating_add(1)),
            _ => None,
        }
    }
}

fn from_decimal(value: u16) -> u32 {
    (0..4)
        .rev()
        .fold(0, |sum, digit| sum * 10 + u32::from(value >> (4 * digit) & 0xf))
        .max(1)
}

fn to_decimal(value: u64) -> u16 {
    let mut rest = value % 10_000;
    (0..4).fold(0, |digits, digit| {
        let nibble = (rest % 10) as u16;
        rest /= 10;
        digits | nibble << (4 * digit)
    })
}

/// The device.
#[derive(Clone, Copy, Debug)]
pub struct Pit {
    channels: [Channel; 3],
    /// The tick of channel 0's next rising edge.
    next_edge: Option<u64>,
    speaker: bool,
}

impl Default for Pit {
    /// As firmware leaves it: channel 0 counts 65536 at a time (Linux reads that counter for early randomness, and waits until it
    /// counts), and its interrupt is masked, so that no edge of it is due before the guest programs it.
    fn default() -> Self {
        let running = Channel {
            mode: 3,
            counting: Counting::Since(0),
            ..Channel::new(true)
        };
        Self {
            channels: [running, Channel::new(true), Channel::new(false)],
            next_edge: None,
            speaker: false,
        }
    }
}

impl Pit {
    /// Whether reading `port` shows the current time. A latched count does not: its time was taken by the latch command.
    #[must_use]
    pub fn read_shows_time(&self, port: u16) -> bool {
        match port {
            SYSTEM => true,
            CHANNEL_0..=CHANNEL_2 => {
                let channel = &self.channels[usize::from(port - CHANNEL_0)];
                channel.status.is_none() && channel.latched.is_none()
            }
            _ => false,
        }
    }

    /// Whether writing needs the current time: latch commands, and everything on channel 2, which measures.
    ///
    /// A count for channel 0 does not: it starts at the last time the guest was shown or woken by. A guest that programs a single shot has
    /// just read the time to know how far away its event is, so a sample of its own would only be a second log entry for the same moment.
    #[must_use]
    pub fn write_needs_time(port: u16, value: u8) -> bool {
        match port {
            CONTROL => value >> 6 == 3 || value & 0x30 == 0,
            CHANNEL_0 => false,
            _ => true,
        }
    }

    /// The guest writes at virtual time `now_ns`.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        let now = ticks(now_ns);
        match port {
            SYSTEM => {
                self.speaker = value & SYSTEM_SPEAKER != 0;
                self.channels[2].set_gate(value & SYSTEM_GATE != 0, now);
            }
            CONTROL => self.control(value, now),
            CHANNEL_0..=CHANNEL_2 => {
                let index = usize::from(port - CHANNEL_0);
                self.channels[index].write(value, now);
                if index == 0 && self.channels[0].low.is_none() {
                    self.next_edge = self.channels[0].first_edge();
                }
            }
            _ => {}
        }
    }

    fn control(&mut self, value: u8, now: u64) {
        let select = usize::from(value >> 6);
        if select == 3 {
            for (index, channel) in self.channels.iter_mut().enumerate() {
                if value & (2 << index) == 0 {
                    continue;
                }
                if value & 0x20 == 0 {
                    channel.latch_count(now);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(now);
                }
            }
            return;
        }
        let access = match value >> 4 & 3 {
            0 => return self.channels[select].latch_count(now),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        self.channels[select].control(value, access);
        if select == 0 {
            self.next_edge = None;
        }
    }

    /// The guest reads at virtual time `now_ns`.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        let now = ticks(now_ns);
        match port {
            SYSTEM => {
                let refresh = now / REFRESH_TICKS % 2 == 1;
                let bits = [
                    (self.channels[2].gate, SYSTEM_GATE),
                    (self.speaker, SYSTEM_SPEAKER),
                    (refresh, SYSTEM_REFRESH),
                    (self.channels[2].out(now), SYSTEM_OUT),
                ];
                bits.iter().filter(|(set, _)| *set).fold(0, |byte, (_, bit)| byte | bit)
            }
            CHANNEL_0..=CHANNEL_2 => self.channels[usize::from(port - CHANNEL_0)].read(now),
            _ => 0xff,
        }
    }

    /// When IRQ 0 is due.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        self.next_edge.map(tick_ns)
    }

    /// Virtual time is `now_ns`: whether OUT of channel 0 rose since the last time. Several edges are one interrupt, as on a
    /// machine whose interrupts were off meanwhile.
    pub fn advance(&mut self, now_ns: u64) -> bool {
        let now = ticks(now_ns);
        let Some(edge) = self.next_edge.filter(|edge| now >= *edge) else {
            return false;
        };
        let channel = &self.channels[0];
        let period = u64::from(channel.count);
        self.next_edge = channel
            .is_periodic()
            .then(|| edge + ((now - edge) / period + 1) * period);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Programs channel 0.
    fn program(pit: &mut Pit, mode: u8, count: u16, now_ns: u64) {
        pit.write(CONTROL, 0x30 | mode << 1, now_ns);
        for byte in count.to_le_bytes() {
            pit.write(CHANNEL_0, byte, now_ns);
        }
    }

    #[test]
    fn a_periodic_channel_interrupts_at_every_period_and_merges_what_was_missed() {
        // Linux at 250 Hz: mode 2, 4773 ticks, 4.0002 ms.
        let mut pit = Pit::default();
        program(&mut pit, 2, 4773, 0);
        let first = pit.deadline_ns().unwrap();
        assert_eq!(first, tick_ns(4773));
        assert!(!pit.advance(first - 1));
        assert!(pit.advance(first));
        assert_eq!(pit.deadline_ns(), Some(tick_ns(2 * 4773)));
        assert!(pit.advance(tick_ns(5 * 4773 + 7)));
        assert_eq!(pit.deadline_ns(), Some(tick_ns(6 * 4773)));
    }

    #[test]
    fn single_shots_fire_once() {
        for (mode, ticks_until) in [(0, 100), (4, 101)] {
            let mut pit = Pit::default();
            program(&mut pit, mode, 100, 1_000_000);
            let deadline = pit.deadline_ns().unwrap();
            assert_eq!(deadline, tick_ns(ticks(1_000_000) + ticks_until), "mode {mode}");
            assert!(pit.advance(deadline));
            assert_eq!(pit.deadline_ns(), None);
            assert!(!pit.advance(deadline + 1_000_000_000));
        }
    }

    #[test]
    fn it_counts_before_it_is_programmed_and_interrupts_nobody() {
        let mut pit = Pit::default();
        let now_ns = 10_000_000;
        pit.write(CONTROL, 0xc2, now_ns);
        let bytes = [0; 3].map(|_: u8| pit.read(CHANNEL_0, now_ns));
        assert_eq!(bytes[0] & 0x40, 0, "the count is valid");
        assert_eq!(
            u16::from_le_bytes([bytes[1], bytes[2]]),
            (0x1_0000 - 2 * 11_931u32) as u16
        );
        assert_eq!(pit.deadline_ns(), None);
    }

    #[test]
    fn a_control_word_without_a_count_stops_the_channel() {
        let mut pit = Pit::default();
        program(&mut pit, 2, 4773, 0);
        pit.write(CONTROL, 0x30, 0);
        assert_eq!(pit.deadline_ns(), None);
        assert!(!pit.advance(1_000_000_000));
    }

    /// Mode, ticks after the load, what the counter reads, OUT. The count is 10.
    const COUNTS: [(u8, u64, u16, bool); 14] = [
        (0, 0, 10, false),
        (0, 9, 1, false),
        (0, 10, 0, true),
        (0, 11, 0xffff, true),
        (2, 0, 10, true),
        (2, 8, 2, true),
        (2, 9, 1, false),
        (2, 10, 10, true),
        (3, 4, 2, true),
        (3, 5, 10, false),
        (3, 10, 10, true),
        (4, 9, 1, true),
        (4, 10, 0, false),
        (4, 11, 0xffff, true),
    ];

    #[test]
    fn counts_and_outputs_are_those_of_the_data_sheet() {
        for (mode, after, value, out) in COUNTS {
            let mut pit = Pit::default();
            program(&mut pit, mode, 10, 0);
            let now_ns = tick_ns(after);
            // Read-back of count and status of channel 0.
            pit.write(CONTROL, 0xc2, now_ns);
            let status = pit.read(CHANNEL_0, 0);
            assert_eq!(
                status,
                u8::from(out) << 7 | 0x30 | mode << 1,
                "mode {mode} after {after}"
            );
            assert!(!pit.read_shows_time(CHANNEL_0), "a latched count has its time already");
            let bytes = [pit.read(CHANNEL_0, 0), pit.read(CHANNEL_0, 0)];
            assert_eq!(u16::from_le_bytes(bytes), value, "mode {mode} after {after}");
            assert!(pit.read_shows_time(CHANNEL_0));
        }
    }

    #[test]
    fn channel_2_measures_while_its_gate_is_open() {
        let mut pit = Pit::default();
        // Linux' calibration: gate on, speaker off, mode 0.
        pit.write(SYSTEM, SYSTEM_GATE, 0);
        pit.write(CONTROL, 0xb0, 0);
        for byte in 11_932u16.to_le_bytes() {
            pit.write(CHANNEL_2, byte, 0);
        }
        assert_eq!(pit.read(SYSTEM, 9_000_000) & SYSTEM_OUT, 0);
        // The gate closed for a second stops the count.
        pit.write(SYSTEM, 0, 9_000_000);
        pit.write(SYSTEM, SYSTEM_GATE, 1_009_000_000);
        assert_eq!(pit.read(SYSTEM, 1_009_500_000) & SYSTEM_OUT, 0);
        assert_eq!(pit.read(SYSTEM, 1_010_100_000) & SYSTEM_OUT, SYSTEM_OUT);
        assert_eq!(pit.deadline_ns(), None, "channel 2 has no interrupt");
    }

    #[test]
    fn decimal_counts_and_single_bytes() {
        let mut pit = Pit::default();
        pit.write(CONTROL, 0x31, 0);
        for byte in 0x1234u16.to_le_bytes() {
            pit.write(CHANNEL_0, byte, 0);
        }
        assert_eq!(pit.deadline_ns(), Some(tick_ns(1234)));
        assert_eq!(
            (pit.read(CHANNEL_0, tick_ns(1)), pit.read(CHANNEL_0, tick_ns(1))),
            (0x33, 0x12)
        );
        pit.write(CONTROL, 0x10, 0);
        pit.write(CHANNEL_0, 50, 0);
        assert_eq!(pit.read(CHANNEL_0, tick_ns(8)), 42);
    }

    proptest! {
        #[test]
        fn any_sequence_of_accesses_is_harmless_and_deadlines_move_on(
            accesses in proptest::collection::vec((0usize..5, any::<u8>(), any::<bool>(), 0u64..10_000_000_000), 0..200)
        ) {
            let mut pit = Pit::default();
            let mut now_ns = 0u64;
            for (port, value, write, step) in accesses {
                let port = [0x40, 0x41, 0x42, 0x43, 0x61][port];
                if write { pit.write(port, value, now_ns) } else { pit.read(port, now_ns); }
                now_ns += step;
                pit.advance(now_ns);
                prop_assert!(pit.deadline_ns().is_none_or(|deadline| deadline > now_ns));
            }
        }
    }
}
