//! Console lines and the end of the machine. A line is formatted first and written at once.

use super::traps::{power_off, write_console};
use core::fmt::{self, Write};

const LINE_BYTES: usize = 256;

struct Line {
    bytes: [u8; LINE_BYTES],
    length: usize,
}

impl Write for Line {
    /// Cuts what is too long; one byte is kept for the newline.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = LINE_BYTES - 1 - self.length;
        let taken = text.len().min(room);
        self.bytes[self.length..self.length + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.length += taken;
        Ok(())
    }
}

/// Writes `ledger: ...` and a newline.
pub(crate) fn print(text: fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [b'\n'; LINE_BYTES],
        length: 0,
    };
    // Line::write_str does not fail, and a Display that does leaves a shorter line.
    let _ = write!(line, "ledger: {text}");
    write_console(&line.bytes[..line.length + 1]);
}

/// Says why, and powers off.
pub(crate) fn fatal(reason: fmt::Arguments<'_>) -> ! {
    print(format_args!("fatal: {reason}"));
    power_off()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => fatal(format_args!("{} ({}:{})", info.message(), at.file(), at.line())),
        None => fatal(format_args!("{}", info.message())),
    }
}
