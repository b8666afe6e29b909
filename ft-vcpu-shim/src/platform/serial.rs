//! COM1, a 16550A that only transmits: console bytes are output, and are held like every other.
//!
//! The transmitter is always empty, so its interrupt, where a driver enables it, comes with the byte written.

use std::{cell::Cell, convert::Infallible};

use vm_superio::{Trigger, serial::NoEvents};

const FIRST: u16 = 0x3f8;
const LAST: u16 = 0x3ff;
/// A line longer than this is flushed in parts.
const LINE_BYTES_MAX: usize = 256;

/// Whether `port` belongs to COM1.
#[must_use]
pub fn claims(port: u16) -> bool {
    (FIRST..=LAST).contains(&port)
}

/// The interrupt output: edges since the last look.
#[derive(Debug, Default)]
struct Edge(Cell<bool>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}

/// The device.
#[derive(Debug)]
pub struct Serial {
    uart: vm_superio::Serial<Edge, NoEvents, Vec<u8>>,
}

impl Default for Serial {
    fn default() -> Self {
        Self {
            uart: vm_superio::Serial::new(Edge::default(), Vec::new()),
        }
    }
}

impl Serial {
    /// The guest writes; a full line is ready afterwards if this says so.
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        let before = self.uart.writer().len();
        // Neither a vector nor the trigger fails; a full receive buffer in loopback mode loses the byte, as the chip does.
        let _ = self.uart.write((port - FIRST) as u8, value);
        let line = self.uart.writer();
        line.len() > before && (value == b'\n' || line.len() >= LINE_BYTES_MAX)
    }

    /// The guest reads.
    pub fn read(&mut self, port: u16) -> u8 {
        self.uart.read((port - FIRST) as u8)
    }

    /// Whether the interrupt line rose since the last call.
    pub fn take_interrupt(&mut self) -> bool {
        self.uart.interrupt_evt().0.take()
    }

    /// Takes what was written since the last time.
    pub fn take_line(&mut self) -> Vec<u8> {
        std::mem::take(self.uart.writer_mut())
    }

    /// Whether there is something to take.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.uart.writer().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRANSMITTER_EMPTY: u8 = 0x60;

    #[test]
    fn lines_come_out_whole_and_the_divisor_is_not_text() {
        let mut serial = Serial::default();
        serial.write(0x3fb, 0x80);
        serial.write(0x3f8, 1);
        serial.write(0x3fb, 0x03);
        assert!(!serial.write(0x3f8, b'o'));
        assert!(serial.write(0x3f8, b'\n'));
        assert_eq!(serial.take_line(), b"o\n");
        assert!(serial.is_empty());
        assert_eq!(serial.read(0x3fd), TRANSMITTER_EMPTY);
        assert!(!serial.take_interrupt(), "no interrupt was enabled");
    }

    #[test]
    fn a_driver_that_enables_the_transmitters_interrupt_gets_it_with_every_batch() {
        let mut serial = Serial::default();
        serial.write(0x3f9, 2);
        assert!(serial.take_interrupt());
        assert_eq!(serial.read(0x3fa) & 0xf, 2, "transmitter empty");
        serial.write(0x3f8, b'x');
        assert!(serial.take_interrupt());
        serial.write(0x3f8, b'y');
        assert!(!serial.take_interrupt(), "the cause has not been read");
    }

    #[test]
    fn the_loopback_test_of_linux_passes() {
        let mut serial = Serial::default();
        serial.write(0x3fc, 0x1a);
        assert_eq!(serial.read(0x3fe) & 0xf0, 0x90);
        serial.write(0x3f8, b'z');
        assert!(serial.is_empty());
    }
}
