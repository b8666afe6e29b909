//! Loading a guest: what --kernel is, its segments, boot GDT and page tables, what it is told, entry state (docs/interfaces.md §1).
//!
//! ```text
//!  file ─► bzImage? take the payload out ─► ELF ─► a Linux note in it? ─┬─ no: the bundled guest, boot info
//!                                                                       └─ yes: text rewritten, zero page, initrd, ACPI tables
//! ```
//! Both kinds are entered in 64-bit mode on the same tables: the protocol of the bundled guest is Linux' 64-bit boot protocol with another
//! page at RSI.

mod bundled;
mod bzimage;
mod elf;
mod initrd;
mod linux;

use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use std::io::Read;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::memory::Ram;
use crate::{
    error::Error,
    platform::Guest,
    rewrite::{self, Kind},
};

const GDT: u64 = 0x500;
/// Boot info or zero page.
const BOOT_PAGE: u64 = 0x7000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;

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
        "the guest image is neither a bzImage nor a 64-bit x86 ELF that can be loaded: {reason}. Check --kernel"
    ))
}

/// A guest image, ready to be put into RAM.
#[derive(Clone, Debug)]
pub struct Image {
    guest: Guest,
    elf: Vec<u8>,
    rewrite: bool,
}

impl Image {
    /// Finds out what `file` is. A bzImage is decompressed here and not by its own stub: so the kernel's text is known before the guest
    /// runs, and the kernel runs where it was linked, because it is the stub that would move it (KASLR). RDTSC, RDTSCP and
    /// PAUSE in Linux' text become exits.
    ///
    /// # Errors
    /// A file that is neither a bzImage nor an ELF64 for x86-64, or a kernel that cannot be rewritten.
    pub fn open(file: Vec<u8>) -> Result<Self, Error> {
        let mut image = Self::unmodified(file)?;
        image.rewrite = image.guest == Guest::Linux;
        if image.rewrite {
            let report =
                rewrite::image::rewrite(&mut image.elf).map_err(|error| Error::environment(error.to_string()))?;
            tracing::info!(
                "{} RDTSC, {} RDTSCP and {} PAUSE of the kernel rewritten",
                report.count(Kind::Rdtsc),
                report.count(Kind::Rdtscp),
                report.count(Kind::Pause)
            );
        }
        Ok(image)
    }

    /// [`Image::open`], with all instructions as they are: for a guest that is not recorded.
    ///
    /// # Errors
    /// A file that is neither a bzImage nor an ELF64 for x86-64.
    pub fn unmodified(file: Vec<u8>) -> Result<Self, Error> {
        let elf = match bzimage::payload(&file)? {
            Some(payload) => bzimage::decompress(payload)?,
            None => file,
        };
        let guest = if elf::is_linux(&elf)? {
            Guest::Linux
        } else {
            Guest::Bundled
        };
        Ok(Self {
            guest,
            elf,
            rewrite: false,
        })
    }

    /// Which kind of guest it is.
    #[must_use]
    pub fn guest(&self) -> Guest {
        self.guest
    }

    /// Puts the guest into RAM, with what it is told at boot, and gives its entry point.
    ///
    /// # Errors
    /// Segments, initrd or command line that do not fit, or an initrd for a guest that knows none.
    pub fn load(&self, ram: &Ram, command_line: &str, initrd: Option<&[u8]>) -> Result<u64, Error> {
        let loaded = elf::load(ram, &self.elf)?;
        write_tables(ram.memory());
        match self.guest {
            Guest::Bundled => bundled::prepare(ram, command_line, initrd)?,
            Guest::Linux => {
                let initrd = initrd.unwrap_or_default();
                let initrd = match self.rewrite {
                    true => initrd::rewrite(initrd, ram.bytes())?,
                    false => initrd.into(),
                };
                linux::prepare(ram, loaded.end, command_line, &initrd)?;
            }
        }
        Ok(loaded.entry)
    }
}

/// One Zstandard frame, decompressed to at most `bytes_max` bytes.
fn zstandard(compressed: &[u8], bytes_max: u64) -> Result<Vec<u8>, String> {
    let decoder = ruzstd::decoding::StreamingDecoder::new(compressed).map_err(|error| error.to_string())?;
    let mut content = Vec::new();
    decoder
        .take(bytes_max + 1)
        .read_to_end(&mut content)
        .map_err(|error| error.to_string())?;
    if content.len() as u64 > bytes_max {
        return Err(format!("it has more than {bytes_max} bytes decompressed"));
    }
    Ok(content)
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

/// Refuses a command line of more than `bytes_max` bytes.
fn check_command_line(command_line: &str, bytes_max: usize) -> Result<(), Error> {
    if command_line.len() <= bytes_max {
        return Ok(());
    }
    Err(Error::environment(format!(
        "--cmdline has {} bytes, at most {bytes_max} fit",
        command_line.len()
    )))
}

/// GDT and page tables of the entry state.
pub(crate) fn write_tables(memory: &GuestMemoryMmap) {
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
        rsp: BOOT_PAGE,
        rsi: BOOT_PAGE,
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
        let error = Image::open(b"#!/bin/sh".to_vec()).unwrap_err();
        assert!(error.to_string().contains("--kernel"), "{error}");
    }

    proptest! {
        #[test]
        fn a_hostile_image_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 64..400), pages in 1u8..4) {
            bytes[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
            let ram = Ram::new(u32::from(pages)).unwrap();
            if let Ok(image) = Image::open(bytes) {
                let _ = image.load(&ram, "", None);
            }
        }
    }
}
