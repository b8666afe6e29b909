//! The devices on the board: everything the guest reaches by port and memory-mapped I/O (docs/interfaces.md §1).
//!
//! ```text
//!  exit ──► Board::port_write, mmio_write ... ──► Effect: what must be ordered with the outside world
//!
//!  every board: 8259A pair, COM1, virtio-mmio     Bundled: ft-clock     Pc: 8254, MC146818, ACPI registers
//! ```
//! The board itself is deterministic: its state changes only by the guest's accesses and by what [`crate::lockstep`] tells it
//! at stop points. Of time it knows what it was told last; an access whose effect needs the present says so beforehand.

pub mod acpi;
pub mod clock;
pub mod pc;
pub mod pic;
pub mod pit;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod virtio_mmio;

use clock::Clock;
use pc::Pc;
use pic::Pic;
use serial::Serial;
use virtio_mmio::{Transport, WINDOW_BYTES};

use crate::rewrite::{Kind, TSC_PORT, TSCP_PORT};

const VIRTIO_BASE: u64 = 0xd000_0000;
const CLOCK_BASE: u64 = 0xd000_f000;
const FIRST_VIRTIO_IRQ: u8 = 10;
const CLOCK_IRQ: u8 = 9;
const TIMER_IRQ: u8 = 0;
const SERIAL_IRQ: u8 = 4;
const RTC_IRQ: u8 = 8;
const SCI_IRQ: u8 = 9;
const LEVEL_IRQS: u16 = 1 << 9 | 1 << 10 | 1 << 11;
const POWER_OFF_PORT: u16 = 0x604;
const POWER_OFF_VALUE: u16 = 0x2000;
const RESET_PORT: u16 = 0x64;
const RESET_VALUE: u8 = 0xfe;
/// virtio devices that have a window and an IRQ.
pub const VIRTIO_DEVICES_MAX: usize = 2;

/// What a guest access means outside the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// A console line is complete.
    ConsoleLine,
    /// A virtio device: see [`virtio_mmio::Effect`].
    Virtio(usize, virtio_mmio::Effect),
    /// The guest powers itself off, or resets itself.
    PowerOff {
        /// A reset.
        reset: bool,
    },
}

/// Which guest the board is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// A freestanding guest that knows this machine.
    Bundled,
    /// A stock Linux kernel, which expects a PC.
    Linux,
}

/// Where the guest's time comes from, and how it switches itself off.
#[derive(Debug)]
enum Timers {
    Bundled(Clock),
    Pc(Box<Pc>),
}

/// The board.
#[derive(Debug)]
pub struct Board {
    /// Interrupt controllers.
    pub pic: Pic,
    /// Console.
    pub serial: Serial,
    /// virtio transports, in device order.
    pub virtio: Vec<Transport>,
    timers: Timers,
    now_ns: u64,
}

impl Board {
    /// A board for `guest` with these virtio devices.
    ///
    /// # Panics
    /// With more than [`VIRTIO_DEVICES_MAX`] devices.
    #[must_use]
    pub fn new(guest: Guest, wall_at_zero_ns: u64, virtio: Vec<Transport>) -> Self {
        assert!(virtio.len() <= VIRTIO_DEVICES_MAX);
        Self {
            pic: Pic::new(LEVEL_IRQS),
            serial: Serial::default(),
            virtio,
            timers: match guest {
                Guest::Bundled => Timers::Bundled(Clock::new(wall_at_zero_ns)),
                Guest::Linux => Timers::Pc(Box::new(Pc::new(wall_at_zero_ns))),
            },
            now_ns: 0,
        }
    }

    fn window(&self, address: u64) -> Option<(usize, u64)> {
        let offset = address.checked_sub(VIRTIO_BASE)?;
        let device = usize::try_from(offset / WINDOW_BYTES).ok()?;
        (device < self.virtio.len()).then_some((device, offset % WINDOW_BYTES))
    }

    /// The offset of `address` in ft-clock's window, if this board has one.
    fn clock_offset(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(CLOCK_BASE)?;
        (matches!(self.timers, Timers::Bundled(_)) && offset < WINDOW_BYTES).then_some(offset)
    }

    /// Whether what an `out` of one unit does depends on the current time, so that it must be sampled and logged.
    #[must_use]
    pub fn port_write_needs_time(&self, port: u16, data: &[u8]) -> bool {
        match &self.timers {
            Timers::Bundled(_) => false,
            Timers::Pc(pc) => pc.write_needs_time(port, data),
        }
    }

    /// `out` of one unit.
    pub fn port_write(&mut self, port: u16, data: &[u8]) -> Effect {
        match data {
            [value] if pic::claims(port) => {
                self.pic.write(port, *value);
                Effect::None
            }
            [value] if serial::claims(port) => {
                let complete = self.serial.write(port, *value);
                self.update_lines();
                if complete { Effect::ConsoleLine } else { Effect::None }
            }
            _ => {
                let effect = match &mut self.timers {
                    Timers::Bundled(_) => bundled_port_write(port, data),
                    Timers::Pc(pc) => pc.write(port, data, self.now_ns),
                };
                self.update_lines();
                effect
            }
        }
    }

    /// The time-stamp instruction that an `in` of `bytes` bytes at `port` stands for: [`crate::rewrite`] put it into Linux' text.
    #[must_use]
    pub fn time_stamp(&self, port: u16, bytes: usize) -> Option<Kind> {
        let linux = matches!(self.timers, Timers::Pc(_));
        match u8::try_from(port) {
            Ok(TSC_PORT) if linux && bytes == 4 => Some(Kind::Rdtsc),
            Ok(TSCP_PORT) if linux && bytes == 4 => Some(Kind::Rdtscp),
            _ => None,
        }
    }

    /// The virtual time that the board was told last.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Whether an `in` of one unit of `bytes` bytes shows the current time.
    #[must_use]
    pub fn port_read_shows_time(&self, port: u16, bytes: usize) -> bool {
        match &self.timers {
            Timers::Bundled(_) => false,
            Timers::Pc(pc) => pc.read_shows_time(port, bytes),
        }
    }

    /// `in` of one unit; a port where nothing is reads as ones.
    pub fn port_read(&mut self, port: u16, out: &mut [u8]) {
        match out {
            [value] if pic::claims(port) => *value = self.pic.read(port),
            [value] if serial::claims(port) => *value = self.serial.read(port),
            _ => {
                let there = match &mut self.timers {
                    Timers::Bundled(_) => false,
                    Timers::Pc(pc) => pc.read(port, self.now_ns, out),
                };
                if !there {
                    out.fill(0xff);
                }
                self.update_lines();
            }
        }
    }

    /// Whether a load from `address` shows the current time, so that it must be sampled and logged.
    #[must_use]
    pub fn load_shows_time(&self, address: u64) -> bool {
        self.clock_offset(address).is_some_and(Clock::reads_time)
    }

    /// A load; where nothing is, it gives ones.
    pub fn mmio_read(&mut self, address: u64, out: &mut [u8]) {
        out.fill(0xff);
        if let Some((device, offset)) = self.window(address) {
            self.virtio[device].read(offset, out);
        } else if let Some(offset) = self.clock_offset(address)
            && let Timers::Bundled(clock) = &self.timers
        {
            let value = clock.read(offset, self.now_ns).to_le_bytes();
            let count = out.len().min(8);
            out[..count].copy_from_slice(&value[..count]);
        }
    }

    /// A store.
    pub fn mmio_write(&mut self, address: u64, data: &[u8]) -> Effect {
        if let Some((device, offset)) = self.window(address) {
            let effect = self.virtio[device].write(offset, data);
            self.update_lines();
            return Effect::Virtio(device, effect);
        }
        if let Some(offset) = self.clock_offset(address)
            && let Ok(value) = <[u8; 8]>::try_from(data)
            && let Timers::Bundled(clock) = &mut self.timers
        {
            clock.write(offset, u64::from_le_bytes(value));
            self.update_lines();
        }
        Effect::None
    }

    /// When the guest's next timer is due.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        match &self.timers {
            Timers::Bundled(clock) => clock.deadline_ns(),
            Timers::Pc(pc) => pc.deadline_ns(),
        }
    }

    /// Virtual time is `now_ns` at this stop.
    pub fn advance_time(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        match &mut self.timers {
            Timers::Bundled(clock) => clock.advance(now_ns),
            Timers::Pc(pc) => pc.advance(now_ns, &mut self.pic),
        }
        self.update_lines();
    }

    /// A device has news in a used ring.
    pub fn raise(&mut self, device: usize) {
        self.virtio[device].raise();
        self.update_lines();
    }

    fn update_lines(&mut self) {
        match &self.timers {
            Timers::Bundled(clock) => self.pic.set_line(CLOCK_IRQ, clock.line()),
            Timers::Pc(pc) => pc.update_lines(&mut self.pic),
        }
        if self.serial.take_interrupt() {
            self.pic.pulse(SERIAL_IRQ);
        }
        for (irq, transport) in (FIRST_VIRTIO_IRQ..).zip(&self.virtio) {
            self.pic.set_line(irq, transport.line());
        }
    }
}

fn bundled_port_write(port: u16, data: &[u8]) -> Effect {
    match (port, data) {
        (POWER_OFF_PORT, [low, high]) if u16::from_le_bytes([*low, *high]) & POWER_OFF_VALUE != 0 => {
            Effect::PowerOff { reset: false }
        }
        (RESET_PORT, [RESET_VALUE]) => Effect::PowerOff { reset: true },
        _ => Effect::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_off_reset_and_console_are_effects() {
        let mut board = Board::new(Guest::Bundled, 0, Vec::new());
        assert_eq!(
            board.port_write(0x604, &[0x00, 0x20]),
            Effect::PowerOff { reset: false }
        );
        assert_eq!(board.port_write(0x64, &[0xfe]), Effect::PowerOff { reset: true });
        assert_eq!(board.port_write(0x3f8, b"x"), Effect::None);
        assert_eq!(board.port_write(0x3f8, b"\n"), Effect::ConsoleLine);
    }

    /// Both interrupt controllers unmasked, vectors from 0x20, automatic EOI.
    fn with_interrupts(guest: Guest) -> Board {
        let mut board = Board::new(guest, 0, Vec::new());
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, 3),
            (0x21, 0),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 2),
            (0xa1, 3),
            (0xa1, 0),
        ] {
            board.port_write(port, &[value]);
        }
        board
    }

    #[test]
    fn the_alarm_reaches_the_interrupt_controller() {
        let mut board = with_interrupts(Guest::Bundled);
        board.mmio_write(0xd000_f008, &77u64.to_le_bytes());
        board.advance_time(76);
        assert!(!board.pic.is_pending());
        board.advance_time(77);
        assert_eq!(board.pic.acknowledge(), Some(0x29));
    }

    #[test]
    fn nothing_there_reads_as_ones() {
        let mut board = Board::new(Guest::Bundled, 0, Vec::new());
        let mut bytes = [0; 4];
        board.mmio_read(0xd000_0000, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
        board.port_read(0x1234, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
    }

    #[test]
    fn the_timers_of_a_pc_reach_the_interrupt_controller() {
        let mut board = with_interrupts(Guest::Linux);
        for (port, value) in [(0x43, 0x34), (0x40, 0xa5), (0x40, 0x12)] {
            assert!(!board.port_write_needs_time(port, &[value]));
            board.port_write(port, &[value]);
        }
        let deadline = board.deadline_ns().unwrap();
        board.advance_time(deadline - 1);
        assert!(!board.pic.is_pending());
        board.advance_time(deadline);
        assert_eq!(board.pic.acknowledge(), Some(0x20));
        // Once a second: the update interrupt of the real-time clock.
        for (port, value) in [(0x70, 0x0b), (0x71, 0x12)] {
            board.port_write(port, &[value]);
        }
        board.advance_time(1_000_000_000);
        assert_eq!(
            (board.pic.acknowledge(), board.pic.acknowledge()),
            (Some(0x20), Some(0x28))
        );
    }

    #[test]
    fn the_console_of_a_pc_interrupts() {
        let mut board = with_interrupts(Guest::Linux);
        board.port_write(0x3f9, &[2]);
        assert_eq!(board.pic.acknowledge(), Some(0x24));
        assert_eq!(board.pic.acknowledge(), None);
    }

    #[test]
    fn a_pc_shows_time_where_it_says_so() {
        let mut board = Board::new(Guest::Linux, 0, Vec::new());
        for (port, bytes, shows) in [
            (0x608, 4, true),
            (0x40, 1, true),
            (0x61, 1, true),
            (0x71, 1, true),
            (0x604, 2, false),
            (0x3fd, 1, false),
            (0xcfc, 4, false),
        ] {
            assert_eq!(board.port_read_shows_time(port, bytes), shows, "port {port:#x}");
        }
        board.advance_time(1_000_000_000);
        let mut timer = [0; 4];
        board.port_read(0x608, &mut timer);
        assert_eq!(u32::from_le_bytes(timer), 3_579_545);
    }

    #[test]
    fn a_rewritten_time_stamp_instruction_is_one_of_linux_only() {
        let board = Board::new(Guest::Linux, 0, Vec::new());
        assert_eq!(board.time_stamp(0xe4, 4), Some(Kind::Rdtsc));
        assert_eq!(board.time_stamp(0xe8, 4), Some(Kind::Rdtscp));
        assert_eq!((board.time_stamp(0xe4, 1), board.time_stamp(0xe5, 4)), (None, None));
        assert_eq!(Board::new(Guest::Bundled, 0, Vec::new()).time_stamp(0xe4, 4), None);
    }

    #[test]
    fn a_pc_has_no_pci_no_ft_clock_and_powers_off_through_acpi() {
        let mut board = Board::new(Guest::Linux, 0, Vec::new());
        let mut bytes = [0; 4];
        board.port_write(0xcf8, &0x8000_0000u32.to_le_bytes());
        board.port_read(0xcfc, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
        assert!(!board.load_shows_time(0xd000_f000));
        assert_eq!(board.port_write(0x604, &[0, 0x20]), Effect::None, "S0 is no power-off");
        assert_eq!(board.port_write(0x604, &[0, 0x34]), Effect::PowerOff { reset: false });
        assert_eq!(board.port_write(0x64, &[0xfe]), Effect::PowerOff { reset: true });
    }
}
