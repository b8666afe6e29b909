//! The registers of a vCPU and the memory it sees, for people and for programs.

use std::fmt::Write as _;

use kvm_bindings::{kvm_regs, kvm_sregs};
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use super::paging::{self, Paging, TranslateError};
use crate::machine::{
    memory::Ram,
    vcpu::{CpuState, Vcpu},
};

/// Names and values of the general registers, in the order of the instruction set.
#[must_use]
pub fn general(regs: &kvm_regs) -> [(&'static str, u64); 18] {
    [
        ("rax", regs.rax),
        ("rcx", regs.rcx),
        ("rdx", regs.rdx),
        ("rbx", regs.rbx),
        ("rsp", regs.rsp),
        ("rbp", regs.rbp),
        ("rsi", regs.rsi),
        ("rdi", regs.rdi),
        ("r8", regs.r8),
        ("r9", regs.r9),
        ("r10", regs.r10),
        ("r11", regs.r11),
        ("r12", regs.r12),
        ("r13", regs.r13),
        ("r14", regs.r14),
        ("r15", regs.r15),
        ("rip", regs.rip),
        ("rflags", regs.rflags),
    ]
}

fn system(sregs: &kvm_sregs) -> [(&'static str, u64); 14] {
    [
        ("cr0", sregs.cr0),
        ("cr2", sregs.cr2),
        ("cr3", sregs.cr3),
        ("cr4", sregs.cr4),
        ("efer", sregs.efer),
        ("cs", u64::from(sregs.cs.selector)),
        ("ss", u64::from(sregs.ss.selector)),
        ("ds", u64::from(sregs.ds.selector)),
        ("es", u64::from(sregs.es.selector)),
        ("fs_base", sregs.fs.base),
        ("gs_base", sregs.gs.base),
        ("gdt", sregs.gdt.base),
        ("idt", sregs.idt.base),
        ("tr", u64::from(sregs.tr.selector)),
    ]
}

/// General registers as a JSON object of hexadecimal strings.
#[must_use]
pub fn general_json(regs: &kvm_regs) -> Value {
    general(regs)
        .into_iter()
        .map(|(name, value)| (name.to_owned(), json!(format!("{value:#x}"))))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// General registers out of [`general_json`]; `None` if one is missing or malformed.
#[must_use]
pub fn general_from_json(value: &Value) -> Option<kvm_regs> {
    let field = |name: &str| u64::from_str_radix(value.get(name)?.as_str()?.strip_prefix("0x")?, 16).ok();
    Some(kvm_regs {
        rax: field("rax")?,
        rcx: field("rcx")?,
        rdx: field("rdx")?,
        rbx: field("rbx")?,
        rsp: field("rsp")?,
        rbp: field("rbp")?,
        rsi: field("rsi")?,
        rdi: field("rdi")?,
        r8: field("r8")?,
        r9: field("r9")?,
        r10: field("r10")?,
        r11: field("r11")?,
        r12: field("r12")?,
        r13: field("r13")?,
        r14: field("r14")?,
        r15: field("r15")?,
        rip: field("rip")?,
        rflags: field("rflags")?,
    })
}

/// A table of registers, four a line.
#[must_use]
pub fn table<const N: usize>(registers: &[(&str, u64); N]) -> String {
    let mut text = String::new();
    for line in registers.chunks(4) {
        for (name, value) in line {
            let _ = write!(text, "  {name:>7} {value:016x}");
        }
        text.push('\n');
    }
    text
}

/// General and system registers, four a line.
#[must_use]
pub fn state_table(state: &CpuState) -> String {
    table(&general(&state.regs)) + &table(&system(&state.sregs))
}

/// What two sides of a comparison have in their general registers; only lines that differ are marked.
#[must_use]
pub fn comparison(left: (&str, &kvm_regs), right: (&str, &kvm_regs)) -> String {
    let mut text = format!("  {:>7} {:>16} {:>16}\n", "", left.0, right.0);
    for ((name, one), (_, other)) in general(left.1).into_iter().zip(general(right.1)) {
        let mark = if one == other { "" } else { "  differs" };
        let _ = writeln!(text, "  {name:>7} {one:016x} {other:016x}{mark}");
    }
    text
}

/// Guest memory as the guest's own addresses reach it.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    ram: &'a Ram,
    paging: Paging,
}

impl<'a> Memory<'a> {
    /// Memory as seen with these system registers.
    #[must_use]
    pub fn new(ram: &'a Ram, sregs: &kvm_sregs) -> Self {
        Self {
            ram,
            paging: Paging {
                cr0: sregs.cr0,
                cr3: sregs.cr3,
                cr4: sregs.cr4,
                efer: sregs.efer,
            },
        }
    }

    /// Reads from `address` on, as far as it is mapped to RAM, and gives how many bytes that was.
    ///
    /// # Errors
    /// If the first byte is not there.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<usize, TranslateError> {
        let mut done = 0;
        while done < out.len() {
            let at = address.wrapping_add(done as u64);
            let count = (out.len() - done).min(0x1000 - (at & 0xfff) as usize);
            match self.read_in_page(at, &mut out[done..done + count]) {
                Ok(()) => done += count,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn read_in_page(&self, address: u64, out: &mut [u8]) -> Result<(), TranslateError> {
        let word = |at| self.ram.memory().read_obj::<u64>(GuestAddress(at)).ok();
        let physical = paging::translate(&self.paging, address, word)?;
        self.ram
            .memory()
            .read_slice(out, GuestAddress(physical))
            .map_err(|_| TranslateError::NotMapped { address })
    }
}

/// Memory as the vCPU sees it now.
#[must_use]
pub fn memory_of<'a>(vcpu: &'a Vcpu, state: &CpuState) -> Memory<'a> {
    Memory::new(vcpu.ram(), &state.sregs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn general_registers_read_back_and_a_difference_is_marked() {
        let regs = kvm_regs {
            rax: 1,
            r15: u64::MAX,
            rip: 0x10_0000,
            ..Default::default()
        };
        assert_eq!(general_from_json(&general_json(&regs)), Some(regs));
        assert_eq!(general_from_json(&json!({"rax": "0x1"})), None);
        let other = kvm_regs { rax: 2, ..regs };
        let text = comparison(("recorded", &regs), ("replayed", &other));
        let marked: Vec<&str> = text.lines().filter(|line| line.ends_with("differs")).collect();
        assert_eq!(marked.len(), 1);
        assert!(marked[0].contains("rax"), "{text}");
    }
}
