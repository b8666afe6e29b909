//! Loading a guest: ELF segments, boot GDT and page tables, boot info, entry state (docs/interfaces.md §1).

use elf::{ElfBytes, abi, endian::LittleEndian};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::memory::Ram;
use crate::error::Error;

const GDT: u64 = 0x500;
const BOOT_INFO: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x7100;
const COMMAND_LINE_BYTES_MAX: usize = 0xe00;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
const LOAD_FROM: u64 = 0x10_0000;
const BOOT_INFO_MAGIC: u64 = 0x4F46_4E49_5446_4F42;

const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x80;
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

fn bad_kernel(reason: impl std::fmt::Display) -> Error {
    Error::environment(format!(
        "the guest image is not a 64-bit x86 ELF that can be loaded: {reason}. Check --kernel"
    ))
}

/// Puts the guest into RAM and gives its entry point.
///
/// # Errors
/// An image that is not a static ELF64 for x86-64 or does not fit, or a command line that is too long.
pub fn load(ram: &Ram, kernel: &[u8], command_line: &str) -> Result<u64, Error> {
    let entry = load_elf(ram, kernel)?;
    let memory = ram.memory();
    write_tables(memory);
    if command_line.len() > COMMAND_LINE_BYTES_MAX {
        return Err(Error::environment(format!(
            "--cmdline has {} bytes, at most {COMMAND_LINE_BYTES_MAX} fit",
            command_line.len()
        )));
    }
    put(memory, COMMAND_LINE, command_line.as_bytes());
    let info = [BOOT_INFO_MAGIC, ram.bytes(), COMMAND_LINE, command_line.len() as u64];
    put_words(memory, BOOT_INFO, &info);
    Ok(entry)
}

fn load_elf(ram: &Ram, kernel: &[u8]) -> Result<u64, Error> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(kernel).map_err(bad_kernel)?;
    if file.ehdr.e_machine != abi::EM_X86_64 || file.ehdr.class != elf::file::Class::ELF64 {
        return Err(bad_kernel("it is for another machine"));
    }
    let segments = file.segments().ok_or_else(|| bad_kernel("it has no program headers"))?;
    let mut loaded = false;
    for segment in segments
        .iter()
        .filter(|segment| segment.p_type == abi::PT_LOAD && segment.p_memsz > 0)
    {
        let end = segment
            .p_paddr
            .checked_add(segment.p_memsz)
            .ok_or_else(|| bad_kernel("a segment wraps round"))?;
        if segment.p_paddr < LOAD_FROM || end > ram.bytes() || segment.p_filesz > segment.p_memsz {
            return Err(bad_kernel(format!(
                "segment {:#x}..{end:#x} is outside RAM ({LOAD_FROM:#x}..{:#x})",
                segment.p_paddr,
                ram.bytes()
            )));
        }
        let bytes = file.segment_data(&segment).map_err(bad_kernel)?;
        put(ram.memory(), segment.p_paddr, bytes);
        loaded = true;
    }
    if !loaded {
        return Err(bad_kernel("it has nothing to load"));
    }
    Ok(file.ehdr.e_entry)
}

fn put(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) {
    memory
        .write_slice(bytes, GuestAddress(address))
        .expect("checked to be inside RAM");
}

fn put_words(memory: &GuestMemoryMmap, address: u64, words: &[u64]) {
    for (index, word) in (0..).zip(words) {
        put(memory, address + 8 * index, &word.to_le_bytes());
    }
}

fn write_tables(memory: &GuestMemoryMmap) {
    put_words(memory, GDT, &GDT_ENTRIES);
    put_words(memory, PML4, &[PDPT | PRESENT_WRITABLE]);
    for gib in 0..4 {
        let directory = PAGE_DIRECTORIES + 0x1000 * gib;
        put_words(memory, PDPT + 8 * gib, &[directory | PRESENT_WRITABLE]);
        for index in 0..512 {
            let page = (gib << 30) + (index << 21);
            put_words(memory, directory + 8 * index, &[page | PRESENT_WRITABLE | LARGE_PAGE]);
        }
    }
}

fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

/// General registers at entry.
#[must_use]
pub fn entry_regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsp: BOOT_INFO,
        rsi: BOOT_INFO,
        rflags: 2,
        ..Default::default()
    }
}

/// System registers at entry: 64-bit mode on the boot tables. `sregs` is the vCPU's state after reset.
#[must_use]
pub fn entry_sregs(mut sregs: kvm_sregs) -> kvm_sregs {
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(CODE_SELECTOR, true);
    let data = segment(DATA_SELECTOR, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_not_a_guest_is_refused_with_a_reason() {
        let ram = Ram::new(4).unwrap();
        let error = load(&ram, b"#!/bin/sh", "").unwrap_err();
        assert!(error.to_string().contains("--kernel"), "{error}");
    }

    proptest! {
        #[test]
        fn a_hostile_image_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 64..400)) {
            let ram = Ram::new(2).unwrap();
            bytes[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
            let _ = load(&ram, &bytes, "");
        }
    }
}
