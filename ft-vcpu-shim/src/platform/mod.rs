//! The devices on the board: everything the guest reaches by port and memory-mapped I/O (docs/interfaces.md §1).
//!
//! ```text
//!  exit ──► Board::port_write, mmio_write ... ──► Effect: what must be ordered with the outside world
//! ```
//! The board itself is deterministic: its state changes only by the guest's accesses and by what [`crate::lockstep`] tells it
//! at stop points.

pub mod clock;
pub mod pic;
pub mod serial;
pub mod virtio_mmio;

use clock::Clock;
use pic::Pic;
use serial::Serial;
use virtio_mmio::{Transport, WINDOW_BYTES};

const VIRTIO_BASE: u64 = 0xd000_0000;
const CLOCK_BASE: u64 = 0xd000_f000;
const FIRST_VIRTIO_IRQ: u8 = 10;
const CLOCK_IRQ: u8 = 9;
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

/// The board.
#[derive(Debug)]
pub struct Board {
    /// Interrupt controllers.
    pub pic: Pic,
    /// Virtual time.
    pub clock: Clock,
    /// Console.
    pub serial: Serial,
    /// virtio transports, in device order.
    pub virtio: Vec<Transport>,
}

impl Board {
    /// A board with these virtio devices.
    ///
    /// # Panics
    /// With more than [`VIRTIO_DEVICES_MAX`] devices.
    #[must_use]
    pub fn new(wall_at_zero_ns: u64, virtio: Vec<Transport>) -> Self {
        assert!(virtio.len() <= VIRTIO_DEVICES_MAX);
        Self {
            pic: Pic::new(LEVEL_IRQS),
            clock: Clock::new(wall_at_zero_ns),
            serial: Serial::default(),
            virtio,
        }
    }

    fn window(&self, address: u64) -> Option<(usize, u64)> {
        let offset = address.checked_sub(VIRTIO_BASE)?;
        let device = usize::try_from(offset / WINDOW_BYTES).ok()?;
        (device < self.virtio.len()).then_some((device, offset % WINDOW_BYTES))
    }

    /// `out` of one unit.
    pub fn port_write(&mut self, port: u16, data: &[u8]) -> Effect {
        match (port, data) {
            (_, [value]) if pic::claims(port) => self.pic.write(port, *value),
            (_, [value]) if serial::claims(port) && self.serial.write(port, *value) => {
                return Effect::ConsoleLine;
            }
            (POWER_OFF_PORT, [low, high]) if u16::from_le_bytes([*low, *high]) & POWER_OFF_VALUE != 0 => {
                return Effect::PowerOff { reset: false };
            }
            (RESET_PORT, [RESET_VALUE]) => return Effect::PowerOff { reset: true },
            _ => {}
        }
        Effect::None
    }

    /// `in` of one unit; a port where nothing is reads as ones.
    pub fn port_read(&mut self, port: u16, out: &mut [u8]) {
        out.fill(0xff);
        if let [value] = out {
            if pic::claims(port) {
                *value = self.pic.read(port);
            } else if serial::claims(port) {
                *value = self.serial.read(port);
            }
        }
    }

    /// Whether a load from `address` shows the current time, so that it must be sampled and logged.
    #[must_use]
    pub fn load_shows_time(&self, address: u64) -> bool {
        (CLOCK_BASE..CLOCK_BASE + WINDOW_BYTES).contains(&address) && Clock::reads_time(address - CLOCK_BASE)
    }

    /// A load; `now_ns` matters where [`Board::load_shows_time`].
    pub fn mmio_read(&mut self, address: u64, now_ns: u64, out: &mut [u8]) {
        out.fill(0xff);
        if let Some((device, offset)) = self.window(address) {
            self.virtio[device].read(offset, out);
        } else if let Some(offset) = address.checked_sub(CLOCK_BASE).filter(|offset| *offset < WINDOW_BYTES) {
            let value = self.clock.read(offset, now_ns).to_le_bytes();
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
        if let Some(offset) = address.checked_sub(CLOCK_BASE).filter(|offset| *offset < WINDOW_BYTES)
            && let Ok(value) = <[u8; 8]>::try_from(data)
        {
            self.clock.write(offset, u64::from_le_bytes(value));
            self.update_lines();
        }
        Effect::None
    }

    /// Virtual time is `now_ns` at this stop.
    pub fn advance_time(&mut self, now_ns: u64) {
        self.clock.advance(now_ns);
        self.update_lines();
    }

    /// A device has news in a used ring.
    pub fn raise(&mut self, device: usize) {
        self.virtio[device].raise();
        self.update_lines();
    }

    fn update_lines(&mut self) {
        self.pic.set_line(CLOCK_IRQ, self.clock.line());
        for (irq, transport) in (FIRST_VIRTIO_IRQ..).zip(&self.virtio) {
            self.pic.set_line(irq, transport.line());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_off_reset_and_console_are_effects() {
        let mut board = Board::new(0, Vec::new());
        assert_eq!(
            board.port_write(0x604, &[0x00, 0x20]),
            Effect::PowerOff { reset: false }
        );
        assert_eq!(board.port_write(0x64, &[0xfe]), Effect::PowerOff { reset: true });
        assert_eq!(board.port_write(0x3f8, b"x"), Effect::None);
        assert_eq!(board.port_write(0x3f8, b"\n"), Effect::ConsoleLine);
    }

    #[test]
    fn the_alarm_reaches_the_interrupt_controller() {
        let mut board = Board::new(0, Vec::new());
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
        board.mmio_write(0xd000_f008, &77u64.to_le_bytes());
        board.advance_time(76);
        assert!(!board.pic.is_pending());
        board.advance_time(77);
        assert_eq!(board.pic.acknowledge(), Some(0x29));
    }

    #[test]
    fn nothing_there_reads_as_ones() {
        let mut board = Board::new(0, Vec::new());
        let mut bytes = [0; 4];
        board.mmio_read(0xd000_0000, 0, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
        board.port_read(0x1234, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
    }
}
