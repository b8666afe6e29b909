//! Links the assembly (ring 0 in `boot.S`, memory functions in `memory.S`) and reads what it kept of the boot information.

use super::console::fatal;

core::arch::global_asm!(include_str!("boot.S"));
core::arch::global_asm!(include_str!("memory.S"));

const BOOT_MAGIC: u64 = 0x4F46_4E49_5446_4F42;
const COMMAND_LINE_BYTES: usize = 512;

/// As the loader left it at 0x7000.
#[repr(C)]
struct BootInformation {
    magic: u64,
    ram_bytes: u64,
    command_line_address: u64,
    command_line_length: u64,
}

unsafe extern "C" {
    safe static boot_information: BootInformation;
    safe static boot_command_line: [u8; COMMAND_LINE_BYTES];
    safe static __image_end: u8;
}

/// The command line. Stops the machine if the loader is not one of ours or the memory does not suffice.
pub(crate) fn command_line() -> &'static str {
    if boot_information.magic != BOOT_MAGIC {
        fatal(format_args!(
            "no boot information: the loader must pass its address in RSI"
        ));
    }
    let needed = (&raw const __image_end).addr() as u64;
    if boot_information.ram_bytes < needed {
        fatal(format_args!(
            "{} bytes of RAM are too few, {needed} are needed",
            boot_information.ram_bytes
        ));
    }
    let length = boot_information.command_line_length as usize;
    let Some(line) = boot_command_line.get(..length) else {
        fatal(format_args!(
            "the command line is longer than {COMMAND_LINE_BYTES} bytes"
        ));
    };
    let line = line.split(|byte| *byte == 0).next().unwrap_or(line);
    core::str::from_utf8(line).unwrap_or_else(|_| fatal(format_args!("the command line is not UTF-8")))
}
