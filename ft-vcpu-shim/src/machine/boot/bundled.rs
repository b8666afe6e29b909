//! What the bundled guest is told at boot (docs/interfaces.md §1).

use super::{BOOT_PAGE, check_command_line, put, put_words};
use crate::{error::Error, machine::memory::Ram};

const COMMAND_LINE: u64 = 0x7100;
const COMMAND_LINE_BYTES_MAX: usize = 0xe00;
const BOOT_INFO_MAGIC: u64 = 0x4F46_4E49_5446_4F42;

/// Writes the boot info.
///
/// # Errors
/// A command line that is too long, or an initrd.
pub(super) fn prepare(ram: &Ram, command_line: &str, initrd: Option<&[u8]>) -> Result<(), Error> {
    if initrd.is_some() {
        return Err(Error::environment(
            "--initrd is for Linux, and the guest image is none: leave it out or check --kernel",
        ));
    }
    check_command_line(command_line, COMMAND_LINE_BYTES_MAX)?;
    put(ram.memory(), COMMAND_LINE, command_line.as_bytes());
    let info = [BOOT_INFO_MAGIC, ram.bytes(), COMMAND_LINE, command_line.len() as u64];
    put_words(ram.memory(), BOOT_PAGE, &info);
    Ok(())
}
