//! Where the instruction at RIP can lead: how a guest is moved by one instruction without the trap flag.
//!
//! The trap flag changes what the guest computes: PUSHF, SYSCALL, exceptions and interrupts save it with the other flags, and it comes
//! back after the debugger has gone. Breakpoints in the debug registers leave no trace, so a step is a breakpoint at every address the
//! instruction can lead to, two at most. An exception in between is run through, as a debugger's user expects.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::kvm_regs;

use super::registers::Memory;
use crate::machine::vcpu::CpuState;

/// Vector of an invalid opcode, which `ud2` raises on purpose.
const INVALID_OPCODE: u8 = 6;
/// Longest instruction.
const INSTRUCTION_BYTES_MAX: usize = 15;

/// The addresses the instruction at RIP can lead to; empty if that cannot be told: SYSCALL, SYSENTER, what is not
/// mapped, what is no instruction.
#[must_use]
pub fn of(memory: &Memory<'_>, state: &CpuState) -> Vec<u64> {
    let mut code = [0; INSTRUCTION_BYTES_MAX];
    let Ok(count) = memory.read(state.regs.rip, &mut code) else {
        return Vec::new();
    };
    let bits = if state.sregs.cs.l == 1 { 64 } else { 32 };
    let instruction = Decoder::with_ip(bits, &code[..count], state.regs.rip, DecoderOptions::NONE).decode();
    if instruction.is_invalid() {
        return Vec::new();
    }
    let next = instruction.next_ip();
    match instruction.flow_control() {
        FlowControl::Next => vec![next],
        FlowControl::UnconditionalBranch => near(&instruction).into_iter().collect(),
        FlowControl::ConditionalBranch => near(&instruction).into_iter().chain([next]).collect(),
        FlowControl::Call if instruction.mnemonic() == Mnemonic::Call => near(&instruction).into_iter().collect(),
        FlowControl::IndirectBranch | FlowControl::IndirectCall => {
            indirect(&instruction, memory, state).into_iter().collect()
        }
        FlowControl::Return => returned(&instruction, memory, &state.regs).into_iter().collect(),
        FlowControl::Interrupt => {
            let vector = match instruction.mnemonic() {
                Mnemonic::Int3 => 3,
                Mnemonic::Int1 => 1,
                _ => instruction.immediate8(),
            };
            handler(memory, state, vector).into_iter().collect()
        }
        FlowControl::Exception => handler(memory, state, INVALID_OPCODE).into_iter().collect(),
        FlowControl::Call | FlowControl::XbeginXabortXend => Vec::new(),
    }
}

/// The handler that an interrupt enters, from the guest's table of them (64-bit gates).
#[must_use]
pub fn handler(memory: &Memory<'_>, state: &CpuState, vector: u8) -> Option<u64> {
    let mut gate = [0; 16];
    let read = memory.read(state.sregs.idt.base.checked_add(16 * u64::from(vector))?, &mut gate);
    if read != Ok(gate.len()) {
        return None;
    }
    let half = |at: usize| u64::from(u16::from_le_bytes([gate[at], gate[at + 1]]));
    Some(half(0) | half(6) << 16 | half(8) << 32 | half(10) << 48)
}

fn near(instruction: &Instruction) -> Option<u64> {
    matches!(instruction.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32)
        .then(|| instruction.near_branch_target())
}

fn indirect(instruction: &Instruction, memory: &Memory<'_>, state: &CpuState) -> Option<u64> {
    match instruction.op0_kind() {
        OpKind::Register => register(instruction.op0_register(), state),
        OpKind::Memory if instruction.is_jmp_near_indirect() || instruction.is_call_near_indirect() => {
            let address = instruction.virtual_address(0, 0, |name, _, _| register(name, state))?;
            word(memory, address)
        }
        _ => None,
    }
}

fn returned(instruction: &Instruction, memory: &Memory<'_>, regs: &kvm_regs) -> Option<u64> {
    match instruction.mnemonic() {
        Mnemonic::Ret | Mnemonic::Retf | Mnemonic::Iretq => word(memory, regs.rsp),
        Mnemonic::Sysretq => Some(regs.rcx),
        _ => None,
    }
}

fn word(memory: &Memory<'_>, address: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    (memory.read(address, &mut bytes) == Ok(bytes.len())).then(|| u64::from_le_bytes(bytes))
}

fn register(name: Register, state: &CpuState) -> Option<u64> {
    let regs = &state.regs;
    let value = match name.full_register() {
        Register::RAX => regs.rax,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RBX => regs.rbx,
        Register::RSP => regs.rsp,
        Register::RBP => regs.rbp,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        Register::FS => state.sregs.fs.base,
        Register::GS => state.sregs.gs.base,
        // The bases of the others are 0 in 64-bit mode.
        Register::CS | Register::DS | Register::ES | Register::SS => 0,
        _ => return None,
    };
    Some(if name.is_gpr32() { value & 0xffff_ffff } else { value })
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_fpu, kvm_sregs};
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::machine::memory::Ram;

    const AT: u64 = 0x1000;

    /// What `code` leads to, with RAX and RSP at 0x2000, where 0x3000 is, and a gate for #UD that leads to 0x4000.
    fn successors(code: &[u8]) -> Vec<u64> {
        let ram = Ram::new(2).unwrap();
        ram.memory().write_slice(code, GuestAddress(AT)).unwrap();
        ram.memory().write_obj(0x3000u64, GuestAddress(0x2000)).unwrap();
        ram.memory()
            .write_obj(0x4000u16, GuestAddress(0x8000 + 6 * 16))
            .unwrap();
        let mut sregs = kvm_sregs::default();
        sregs.cs.l = 1;
        sregs.idt.base = 0x8000;
        let regs = kvm_regs {
            rip: AT,
            rax: 0x2000,
            rsp: 0x2000,
            rcx: 0x5000,
            ..Default::default()
        };
        let fpu = kvm_fpu::default();
        let state = CpuState { regs, sregs, fpu };
        of(&Memory::new(&ram, &state.sregs), &state)
    }

    #[test]
    fn every_kind_of_instruction_leads_where_it_should() {
        let table: [(&str, &[u8], &[u64]); 14] = [
            ("nop", &[0x90], &[AT + 1]),
            ("pushf", &[0x9c], &[AT + 1]),
            ("jmp +5", &[0xeb, 5], &[AT + 7]),
            ("jz +5", &[0x74, 5], &[AT + 7, AT + 2]),
            ("loop -2", &[0xe2, 0xfe], &[AT, AT + 2]),
            ("call +0", &[0xe8, 0, 0, 0, 0], &[AT + 5]),
            ("jmp rax", &[0xff, 0xe0], &[0x2000]),
            ("call [rax]", &[0xff, 0x10], &[0x3000]),
            ("ret", &[0xc3], &[0x3000]),
            ("iretq", &[0x48, 0xcf], &[0x3000]),
            ("sysretq", &[0x48, 0x0f, 0x07], &[0x5000]),
            ("ud2", &[0x0f, 0x0b], &[0x4000]),
            ("syscall", &[0x0f, 0x05], &[]),
            ("rep movsb", &[0xf3, 0xa4], &[AT + 2]),
        ];
        for (name, code, expected) in table {
            assert_eq!(successors(code), expected, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_instruction_leads_to_more_than_two_places(code in proptest::array::uniform15(any::<u8>())) {
            prop_assert!(successors(&code).len() <= 2);
        }
    }
}
