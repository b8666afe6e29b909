//! The instructions around an address, for people.

use std::fmt::Write as _;

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};

use super::registers::Memory;

/// Bytes before the address that are tried: enough for [`BEFORE`] of the longest instructions.
const BYTES_BEFORE: u64 = 64;
/// Bytes from the address on.
const BYTES_FROM: usize = 64;
/// Instructions shown before the address.
const BEFORE: usize = 4;
/// Instructions shown from the address on.
const FROM: usize = 5;

/// The instructions around `rip`, one a line, the one at `rip` marked by an arrow. Those before it are the decoding that arrives
/// at `rip` and starts earliest: instructions have no marks, so it is a guess, if nearly always the right one.
#[must_use]
pub fn around(memory: &Memory<'_>, rip: u64) -> String {
    let mut code = [0; BYTES_FROM];
    let Ok(count) = memory.read(rip, &mut code) else {
        return format!("  {rip:#018x} is not mapped\n");
    };
    let mut before = [0; BYTES_BEFORE as usize];
    let start = rip.wrapping_sub(BYTES_BEFORE);
    let known = matches!(memory.read(start, &mut before), Ok(count) if count == before.len());
    let mut lines = if known { leading(&before, start) } else { Vec::new() };
    lines.extend(decode(&code[..count], rip).take(FROM));
    let mut text = String::new();
    let mut formatter = IntelFormatter::new();
    for instruction in &lines {
        let mut operation = String::new();
        formatter.format(instruction, &mut operation);
        let arrow = if instruction.ip() == rip { "=>" } else { "  " };
        let _ = writeln!(text, "{arrow} {:#018x}  {operation}", instruction.ip());
    }
    text
}

fn decode(bytes: &[u8], start: u64) -> impl Iterator<Item = Instruction> {
    Decoder::with_ip(64, bytes, start, DecoderOptions::NONE)
        .into_iter()
        .collect::<Vec<_>>()
        .into_iter()
}

/// The last instructions of `bytes`, decoded so that one ends where they end.
fn leading(bytes: &[u8], start: u64) -> Vec<Instruction> {
    for skipped in 0..bytes.len() {
        let instructions: Vec<_> = decode(&bytes[skipped..], start.wrapping_add(skipped as u64)).collect();
        if instructions.iter().all(|instruction| !instruction.is_invalid()) {
            return instructions[instructions.len().saturating_sub(BEFORE)..].to_vec();
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_sregs;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::machine::memory::Ram;

    #[test]
    fn the_instruction_is_marked_and_those_before_it_are_shown() {
        let ram = Ram::new(4).unwrap();
        let code = [&[0x90; 64][..], &[0xf4, 0x0f, 0x0b]].concat();
        ram.memory().write_slice(&code, GuestAddress(0x2000)).unwrap();
        let flat = kvm_sregs::default();
        let text = around(&Memory::new(&ram, &flat), 0x2040);
        assert!(
            text.contains("=> 0x0000000000002040  hlt\n   0x0000000000002041  ud2\n"),
            "{text}"
        );
        assert_eq!(text.matches("nop").count(), BEFORE, "{text}");
        let text = around(&Memory::new(&ram, &flat), 0x40_0000);
        assert!(text.contains("not mapped"), "{text}");
    }
}
