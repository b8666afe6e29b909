//! A pair of 8259A interrupt controllers, cascaded on IRQ 2 (Intel 8259A data sheet, 231468).
//!
//! Deterministic by construction: its state is a function of the guest's port accesses and of the lines, and both change at
//! stop points only.

/// I/O ports: command and data of the master and the slave, and the edge/level registers.
const MASTER_COMMAND: u16 = 0x20;
const MASTER_DATA: u16 = 0x21;
const SLAVE_COMMAND: u16 = 0xa0;
const SLAVE_DATA: u16 = 0xa1;
const MASTER_LEVEL: u16 = 0x4d0;
const SLAVE_LEVEL: u16 = 0x4d1;

const CASCADE: u8 = 2;
const SPURIOUS: u8 = 7;

/// Whether `port` belongs to the pair.
#[must_use]
pub fn claims(port: u16) -> bool {
    matches!(
        port,
        MASTER_COMMAND | MASTER_DATA | SLAVE_COMMAND | SLAVE_DATA | MASTER_LEVEL | SLAVE_LEVEL
    )
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Init {
    #[default]
    Done,
    Word2,
    Word3,
    Word4,
}

#[derive(Clone, Copy, Debug, Default)]
struct Chip {
    requested: u8,
    in_service: u8,
    masked: u8,
    lines: u8,
    level: u8,
    vector_base: u8,
    lowest_priority: u8,
    init: Init,
    needs_word4: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    read_in_service: bool,
    poll: bool,
}

impl Chip {
    fn set_line(&mut self, line: u8, high: bool) {
        let bit = 1 << line;
        if high {
            if self.level & bit != 0 || self.lines & bit == 0 {
                self.requested |= bit;
            }
            self.lines |= bit;
        } else {
            if self.level & bit != 0 {
                self.requested &= !bit;
            }
            self.lines &= !bit;
        }
    }

    /// 0 is the highest priority.
    fn priority(&self, lines: u8) -> Option<u8> {
        let first = self.lowest_priority.wrapping_add(1);
        (0..8u8).find(|rank| lines & (1 << ((first + rank) & 7)) != 0)
    }

    fn pending(&self) -> Option<u8> {
        let candidates = self.requested & !self.masked;
        let rank = self.priority(candidates)?;
        let serving = if self.special_mask {
            self.in_service & !self.masked
        } else {
            self.in_service
        };
        if self.priority(serving).is_some_and(|served| rank >= served) {
            return None;
        }
        Some((self.lowest_priority + 1 + rank) & 7)
    }

    fn acknowledge(&mut self, line: u8) {
        let bit = 1 << line;
        if self.level & bit == 0 {
            self.requested &= !bit;
        }
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest_priority = line;
        }
    }

    fn end_of_interrupt(&mut self, line: Option<u8>, rotate: bool) {
        let line = line.or_else(|| {
            self.priority(self.in_service)
                .map(|rank| (self.lowest_priority + 1 + rank) & 7)
        });
        if let Some(line) = line {
            self.in_service &= !(1 << line);
            if rotate {
                self.lowest_priority = line;
            }
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1 clears everything but the wiring.
            *self = Self {
                lines: self.lines,
                level: self.level,
                requested: self.lines & self.level,
                lowest_priority: 7,
                init: Init::Word2,
                needs_word4: value & 1 != 0,
                single: value & 2 != 0,
                ..Self::default()
            };
        } else if value & 0x08 != 0 {
            // OCW3
            if value & 0x02 != 0 {
                self.read_in_service = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
            self.poll = value & 0x04 != 0;
        } else {
            // OCW2
            let line = value & 7;
            match value >> 5 {
                0b000 => self.rotate_on_auto_eoi = false,
                0b100 => self.rotate_on_auto_eoi = true,
                0b001 => self.end_of_interrupt(None, false),
                0b101 => self.end_of_interrupt(None, true),
                0b011 => self.end_of_interrupt(Some(line), false),
                0b111 => self.end_of_interrupt(Some(line), true),
                0b110 => self.lowest_priority = line,
                _ => {}
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        self.init = match self.init {
            Init::Done => {
                self.masked = value;
                Init::Done
            }
            Init::Word2 => {
                self.vector_base = value & 0xf8;
                match (self.single, self.needs_word4) {
                    (false, _) => Init::Word3,
                    (true, true) => Init::Word4,
                    (true, false) => Init::Done,
                }
            }
            Init::Word3 if self.needs_word4 => Init::Word4,
            Init::Word3 => Init::Done,
            Init::Word4 => {
                self.auto_eoi = value & 2 != 0;
                Init::Done
            }
        };
    }

    fn read_command(&mut self) -> u8 {
        if std::mem::take(&mut self.poll) {
            return self.pending().map_or(0, |line| {
                self.acknowledge(line);
                0x80 | line
            });
        }
        if self.read_in_service {
            self.in_service
        } else {
            self.requested
        }
    }
}

/// The pair, with IRQ lines 0..=15.
#[derive(Clone, Debug)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

impl Pic {
    /// Both chips uninitialised and masked; `level` has a bit for each level-triggered IRQ.
    #[must_use]
    pub fn new(level: u16) -> Self {
        let chip = |level: u8| Chip {
            level,
            masked: 0xff,
            lowest_priority: 7,
            ..Chip::default()
        };
        Self {
            master: chip(level as u8),
            slave: chip((level >> 8) as u8),
        }
    }

    fn cascade(&mut self) {
        let raised = self.slave.pending().is_some();
        // The slave's output is a level, whatever the master's edge/level register says of its other lines.
        if raised {
            self.master.requested |= 1 << CASCADE;
        } else {
            self.master.requested &= !(1 << CASCADE);
        }
    }

    /// Drives an IRQ line.
    pub fn set_line(&mut self, irq: u8, high: bool) {
        if irq < 8 {
            self.master.set_line(irq, high);
        } else {
            self.slave.set_line(irq - 8, high);
            self.cascade();
        }
    }

    /// A rising edge on an edge-triggered line that does not stay high.
    pub fn pulse(&mut self, irq: u8) {
        self.set_line(irq, true);
        self.set_line(irq, false);
    }

    /// Whether INTR to the CPU is high.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.master.pending().is_some()
    }

    /// What keeps interrupts out, for people.
    #[must_use]
    pub fn summary(&self) -> String {
        let chip = |chip: &Chip| {
            let Chip {
                requested,
                in_service,
                masked,
                ..
            } = chip;
            format!("requested {requested:#04x}, in service {in_service:#04x}, masked {masked:#04x}")
        };
        format!("master: {}; slave: {}", chip(&self.master), chip(&self.slave))
    }

    /// INTA: the vector of the interrupt that enters now; `None` if there is none.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let line = self.master.pending()?;
        self.master.acknowledge(line);
        if line != CASCADE {
            return Some(self.master.vector_base | line);
        }
        let slave_line = self.slave.pending();
        if let Some(line) = slave_line {
            self.slave.acknowledge(line);
        }
        self.cascade();
        Some(self.slave.vector_base | slave_line.unwrap_or(SPURIOUS))
    }

    /// The guest writes `value` to one of [the pair's ports](claims).
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            MASTER_COMMAND => self.master.write_command(value),
            MASTER_DATA => self.master.write_data(value),
            SLAVE_COMMAND => self.slave.write_command(value),
            SLAVE_DATA => self.slave.write_data(value),
            // IRQ 0, 1, 2, 8 and 13 are edge triggered by definition.
            MASTER_LEVEL => self.master.level = value & 0xf8,
            SLAVE_LEVEL => self.slave.level = value & 0xde,
            _ => {}
        }
        self.cascade();
    }

    /// The guest reads from one of [the pair's ports](claims).
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            MASTER_COMMAND => self.master.read_command(),
            MASTER_DATA => self.master.masked,
            SLAVE_COMMAND => self.slave.read_command(),
            SLAVE_DATA => self.slave.masked,
            MASTER_LEVEL => self.master.level,
            SLAVE_LEVEL => self.slave.level,
            _ => 0xff,
        };
        self.cascade();
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn initialised(auto_eoi: bool) -> Pic {
        let mut pic = Pic::new(0x0e00);
        let word4 = if auto_eoi { 3 } else { 1 };
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, word4),
            (0x21, 0),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 2),
            (0xa1, word4),
            (0xa1, 0),
        ] {
            pic.write(port, value);
        }
        pic
    }

    #[test]
    fn a_level_line_interrupts_until_it_is_lowered() {
        let mut pic = initialised(true);
        pic.set_line(10, true);
        assert_eq!((pic.acknowledge(), pic.acknowledge()), (Some(0x2a), Some(0x2a)));
        pic.set_line(10, false);
        assert_eq!(pic.acknowledge(), None);
    }

    #[test]
    fn an_edge_is_taken_once() {
        let mut pic = initialised(true);
        pic.set_line(4, true);
        assert_eq!((pic.acknowledge(), pic.acknowledge()), (Some(0x24), None));
        pic.set_line(4, false);
        pic.set_line(4, true);
        assert_eq!(pic.acknowledge(), Some(0x24));
    }

    #[test]
    fn without_automatic_eoi_lower_priorities_wait_for_the_eoi() {
        let mut pic = initialised(false);
        pic.set_line(10, true);
        pic.set_line(4, true);
        assert_eq!(pic.acknowledge(), Some(0x2a), "IRQ 8..15 come in at priority 2");
        assert!(!pic.is_pending());
        pic.set_line(10, false);
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), Some(0x24));
    }

    #[test]
    fn masks_hold_interrupts_back_and_both_ends_read_back() {
        let mut pic = initialised(true);
        pic.write(0xa1, 0x04);
        pic.set_line(10, true);
        assert!(!pic.is_pending());
        assert_eq!((pic.read(0xa1), pic.read(0xa0)), (0x04, 0x04));
        pic.write(0xa1, 0);
        assert!(pic.is_pending());
    }
}
