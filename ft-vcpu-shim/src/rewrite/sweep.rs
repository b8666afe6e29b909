//! Linear disassembly of one section: where its instructions start, and which of them read what must not be read.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};

use super::{Kind, Report, RewriteError, Site};

/// Bytes of valid instructions after something invalid before the disassembly is believed again: x86 code falls into step within a
/// few instructions, and no instruction is longer than 15 bytes.
const BELIEVED_AFTER_BYTES: usize = 32;

/// Finds every site in `bytes`, which start at `address`.
pub(super) fn sweep(address: u64, bytes: &[u8]) -> Result<Report, RewriteError> {
    let mut report = Report::default();
    let mut patterns = Patterns::new(bytes);
    let mut decoder = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut doubted_until = 0;
    while decoder.can_decode() {
        let start = decoder.position();
        decoder.decode_out(&mut instruction);
        let mut end = start + instruction.len();
        if instruction.is_invalid() {
            end = start + 1;
            doubted_until = end + BELIEVED_AFTER_BYTES;
            decoder.set_position(end).expect("inside the section");
            decoder.set_ip(address + end as u64);
        }
        let kind = kind(&instruction);
        for pattern in patterns.starting_before(end) {
            let site = address + pattern as u64;
            if pattern < doubted_until {
                return Err(RewriteError::Unsure { address: site });
            }
            match kind {
                Some(kind @ (Kind::Rdtsc | Kind::Rdtscp)) if pattern == start => {
                    report.rewritten.push(Site { address: site, kind });
                }
                Some(Kind::Rdtsc | Kind::Rdtscp) => {
                    return Err(RewriteError::Prefixed {
                        address: address + start as u64,
                        bytes: end - start,
                    });
                }
                _ => report.operands.push(site),
            }
        }
        // PAUSE with more prefixes, or where the disassembly is in doubt, stays: a stop point less and no difference.
        if kind == Some(Kind::Pause) && instruction.len() == 2 && start >= doubted_until {
            report.rewritten.push(Site {
                address: address + start as u64,
                kind: Kind::Pause,
            });
        }
        if let Some(kind @ (Kind::Rdrand | Kind::Rdseed | Kind::Rdpid | Kind::Rdpmc)) = kind {
            report.hidden.push(Site {
                address: address + start as u64,
                kind,
            });
        }
    }
    Ok(report)
}

fn kind(instruction: &Instruction) -> Option<Kind> {
    match instruction.mnemonic() {
        Mnemonic::Rdtsc => Some(Kind::Rdtsc),
        Mnemonic::Rdtscp => Some(Kind::Rdtscp),
        Mnemonic::Pause => Some(Kind::Pause),
        Mnemonic::Rdrand => Some(Kind::Rdrand),
        Mnemonic::Rdseed => Some(Kind::Rdseed),
        Mnemonic::Rdpid => Some(Kind::Rdpid),
        Mnemonic::Rdpmc => Some(Kind::Rdpmc),
        _ => None,
    }
}

/// Offsets of the byte patterns of RDTSC and RDTSCP, in order.
struct Patterns<'a> {
    bytes: &'a [u8],
    next: usize,
}

impl<'a> Patterns<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, next: 0 }
    }

    fn starting_before(&mut self, end: usize) -> Vec<usize> {
        let from = self.next;
        self.next = end.max(from);
        let is_pattern = |offset: &usize| {
            let rest = &self.bytes[*offset..];
            rest.starts_with(&[0x0f, 0x31]) || rest.starts_with(&[0x0f, 0x01, 0xf9])
        };
        (from..self.next).filter(is_pattern).collect()
    }
}
