//! What a stock Linux is told at boot: the zero page of the 64-bit boot protocol (Linux' Documentation/arch/x86/boot.rst), its command
//! line, its initrd, the memory map, the ACPI tables.
//!
//! ```text
//!  0x7000 zero page    0x2_0000 command line    0xe_0000 ACPI tables    1 MiB.. RAM: kernel at its linked address .. initrd at the end
//! ```

use std::mem::offset_of;

use linux_loader::bootparam::{boot_e820_entry, boot_params};

use super::{BOOT_PAGE, check_command_line, put};
use crate::{error::Error, machine::memory::Ram, platform::acpi};

const COMMAND_LINE: u64 = 0x2_0000;
/// COMMAND_LINE_SIZE of Linux on x86, without the terminating zero.
const COMMAND_LINE_BYTES_MAX: usize = 2047;
const LOW_MEMORY_END: u64 = 0x9_fc00;
const ACPI_TABLES: u64 = 0xe_0000;
const HIGH_MEMORY: u64 = 0x10_0000;
const PAGE: u64 = 0x1000;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

const BOOT_FLAG: u16 = 0xaa55;
const PROTOCOL: u16 = 0x20f;
/// Not one of the registered boot loaders.
const LOADER_UNDEFINED: u8 = 0xff;
/// The kernel is at or above 1 MiB. KASLR_FLAG is not set: the memory map is where the kernel puts it without chance.
const LOADED_HIGH: u8 = 1;
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

/// A kernel that ends at `kernel_end` is in RAM: puts the rest round it.
///
/// # Errors
/// A command line that is too long, or too little RAM for the initrd.
pub(super) fn prepare(ram: &Ram, kernel_end: u64, command_line: &str, initrd: &[u8]) -> Result<(), Error> {
    check_command_line(command_line, COMMAND_LINE_BYTES_MAX)?;
    let too_little = || {
        Error::environment(format!(
            "the kernel ends at {kernel_end:#x}, and an initrd of {} bytes does not fit behind it in {:#x} bytes of memory. Raise --ram-mib",
            initrd.len(),
            ram.bytes()
        ))
    };
    let initrd_at = ram.bytes().checked_sub(initrd.len() as u64).ok_or_else(too_little)? & !(PAGE - 1);
    if initrd_at < kernel_end {
        return Err(too_little());
    }
    let memory = ram.memory();
    put(memory, initrd_at, initrd);
    put(memory, COMMAND_LINE, command_line.as_bytes());
    put(memory, ACPI_TABLES, &acpi::tables(ACPI_TABLES));

    let field = |offset: usize, bytes: &[u8]| put(memory, BOOT_PAGE + offset as u64, bytes);
    field(offset_of!(boot_params, hdr.boot_flag), &BOOT_FLAG.to_le_bytes());
    field(offset_of!(boot_params, hdr.header), b"HdrS");
    field(offset_of!(boot_params, hdr.version), &PROTOCOL.to_le_bytes());
    field(offset_of!(boot_params, hdr.type_of_loader), &[LOADER_UNDEFINED]);
    field(offset_of!(boot_params, hdr.loadflags), &[LOADED_HIGH]);
    field(
        offset_of!(boot_params, hdr.kernel_alignment),
        &KERNEL_ALIGNMENT.to_le_bytes(),
    );
    field(
        offset_of!(boot_params, hdr.cmd_line_ptr),
        &(COMMAND_LINE as u32).to_le_bytes(),
    );
    field(
        offset_of!(boot_params, hdr.cmdline_size),
        &(COMMAND_LINE_BYTES_MAX as u32).to_le_bytes(),
    );
    if !initrd.is_empty() {
        field(
            offset_of!(boot_params, hdr.ramdisk_image),
            &(initrd_at as u32).to_le_bytes(),
        );
        field(
            offset_of!(boot_params, hdr.ramdisk_size),
            &(initrd.len() as u32).to_le_bytes(),
        );
    }
    field(offset_of!(boot_params, acpi_rsdp_addr), &ACPI_TABLES.to_le_bytes());
    let map = memory_map(ram.bytes());
    field(offset_of!(boot_params, e820_entries), &[map.len() as u8]);
    for (index, (start, end, kind)) in map.into_iter().enumerate() {
        let entry = offset_of!(boot_params, e820_table) + index * size_of::<boot_e820_entry>();
        field(entry + offset_of!(boot_e820_entry, addr), &start.to_le_bytes());
        field(entry + offset_of!(boot_e820_entry, size), &(end - start).to_le_bytes());
        field(entry + offset_of!(boot_e820_entry, r#type), &kind.to_le_bytes());
    }
    Ok(())
}

/// Start, end, type.
fn memory_map(ram_bytes: u64) -> [(u64, u64, u32); 4] {
    [
        (0, LOW_MEMORY_END, E820_RAM),
        (LOW_MEMORY_END, 0xa_0000, E820_RESERVED),
        (ACPI_TABLES, HIGH_MEMORY, E820_RESERVED),
        (HIGH_MEMORY, ram_bytes, E820_RAM),
    ]
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::machine::boot::{Image, elf, initrd::test_newc};

    fn read<const BYTES: usize>(ram: &Ram, address: u64) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn number(ram: &Ram, offset: usize) -> u64 {
        u64::from(u32::from_le_bytes(read(ram, BOOT_PAGE + offset as u64)))
    }

    #[test]
    fn a_kernel_finds_its_command_line_initrd_memory_and_tables() {
        let ram = Ram::new(4).unwrap();
        let image = Image::open(elf::tests::image(b"Linux\0", 0x20_0000, b"kernel")).unwrap();
        let initrd = test_newc(&[("init", b"#!/bin/sh")]);
        assert_eq!(image.load(&ram, "quiet", Some(&initrd)).unwrap(), 0x20_0000);
        assert_eq!(
            read(&ram, number(&ram, offset_of!(boot_params, hdr.cmd_line_ptr))),
            *b"quiet\0"
        );
        let initrd_at = number(&ram, offset_of!(boot_params, hdr.ramdisk_image));
        assert_eq!((initrd_at % PAGE, read(&ram, initrd_at)), (0, *b"070701"));
        assert_eq!(
            number(&ram, offset_of!(boot_params, hdr.ramdisk_size)),
            initrd.len() as u64
        );
        assert_eq!(
            read(&ram, number(&ram, offset_of!(boot_params, acpi_rsdp_addr))),
            *b"RSD PTR "
        );
        let flags = read::<1>(&ram, BOOT_PAGE + offset_of!(boot_params, hdr.loadflags) as u64);
        assert_eq!(flags[0] & 2, 0, "KASLR_FLAG");
        let map = memory_map(ram.bytes());
        assert!(map.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{map:x?}");
        assert_eq!(map.last().unwrap().1, ram.bytes());
    }

    #[test]
    fn its_time_stamp_instructions_become_exits_and_those_of_a_bundled_guest_stay() {
        for (owner, text) in [(&b"Linux\0"[..], [0xe5, 0xe4, 0xc3]), (b"GNU\0", [0x0f, 0x31, 0xc3])] {
            let ram = Ram::new(4).unwrap();
            let image = Image::open(elf::tests::image(owner, 0x20_0000, &[0x0f, 0x31, 0xc3])).unwrap();
            image.load(&ram, "", None).unwrap();
            assert_eq!(read(&ram, 0x20_0000), text);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_to_change() {
        let ram = Ram::new(4).unwrap();
        let image = Image::open(elf::tests::image(b"Linux\0", 0x20_0000, b"kernel")).unwrap();
        let error = image.load(&ram, "", Some(&vec![0; 2 << 20])).unwrap_err();
        assert!(error.to_string().contains("--ram-mib"), "{error}");
        let error = image.load(&ram, &"x".repeat(2048), None).unwrap_err();
        assert!(error.to_string().contains("--cmdline"), "{error}");
        let bundled = Image::open(elf::tests::image(b"GNU\0", 0x20_0000, b"guest")).unwrap();
        let error = bundled.load(&ram, "", Some(b"initrd")).unwrap_err();
        assert!(error.to_string().contains("--initrd"), "{error}");
    }
}
