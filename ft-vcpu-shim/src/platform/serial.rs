//! The transmit half of a 16550A at COM1: console bytes are output, and are held like every other.
//!
//! No interrupts and nothing to receive, so no state of the line: the transmitter is always empty.

const FIRST: u16 = 0x3f8;
const LAST: u16 = 0x3ff;
const LINE_CONTROL_DLAB: u8 = 0x80;
const TRANSMITTER_EMPTY: u8 = 0x60;
const MODEM_READY: u8 = 0xb0;
const NO_INTERRUPT: u8 = 0x01;
/// A line longer than this is flushed in parts.
const LINE_BYTES_MAX: usize = 256;

/// Whether `port` belongs to COM1.
#[must_use]
pub fn claims(port: u16) -> bool {
    (FIRST..=LAST).contains(&port)
}

/// The device.
#[derive(Clone, Debug, Default)]
pub struct Serial {
    registers: [u8; 8],
    divisor: [u8; 2],
    line: Vec<u8>,
}

impl Serial {
    fn divisor_latch(&self) -> bool {
        self.registers[3] & LINE_CONTROL_DLAB != 0
    }

    /// The guest writes; a full line is ready afterwards if this says so.
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        let register = usize::from(port - FIRST);
        match register {
            0 | 1 if self.divisor_latch() => self.divisor[register] = value,
            0 => {
                self.line.push(value);
                return value == b'\n' || self.line.len() >= LINE_BYTES_MAX;
            }
            2 | 5 | 6 => {}
            _ => self.registers[register] = value,
        }
        false
    }

    /// The guest reads.
    #[must_use]
    pub fn read(&self, port: u16) -> u8 {
        let register = usize::from(port - FIRST);
        match register {
            0 | 1 if self.divisor_latch() => self.divisor[register],
            0 => 0,
            2 => NO_INTERRUPT,
            5 => TRANSMITTER_EMPTY,
            6 => MODEM_READY,
            _ => self.registers[register],
        }
    }

    /// Takes what was written since the last time.
    pub fn take_line(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.line)
    }

    /// Whether there is something to take.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.line.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    }
}
