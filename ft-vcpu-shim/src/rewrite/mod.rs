//! RDTSC, RDTSCP and PAUSE in the text of a kernel and its modules become instructions that exit: KVM never exits to userspace for them.
//!
//! ```text
//!  0F 31      rdtsc    ──►  E5 E4      in eax, 0xE4        EDX:EAX from the log, not the host's
//!  0F 01 F9   rdtscp   ──►  E5 E8 90   in eax, 0xE8; nop   EDX:EAX from the log, ECX (TSC_AUX) zero
//!  F3 90      pause    ──►  E6 EC      out 0xEC, al        nothing: a stop point in every turn of a loop that waits
//! ```
//! A kernel that spins, on the only CPU there is, waits for an interrupt or for time to pass: Linux 6.12 spins for a lock that a sleeping reader
//! holds until a timer interrupt ends it. Both happen at stop points only, and a loop without one would never end.
//!
//! The replacement is as long as the original, so nothing moves, and it is position independent, so the kernel may copy it out of
//! `.altinstr_replacement` as it does the original. `in` reaches the shim from ring 0 only, as a stop point; kernel text runs there.
//!
//! Where an instruction starts is found by linear disassembly of every executable section. The bytes of an RDTSC that lie inside
//! another instruction (an address, a constant) are counted and left alone. A pattern that the disassembly is not sure of refuses
//! the kernel: a missed RDTSC is a divergence later, a rewritten constant is a broken guest.

pub mod image;
mod sweep;

use thiserror::Error;

/// Port whose 4-byte `in` is a rewritten RDTSC. Nothing decodes it on a PC.
pub const TSC_PORT: u8 = 0xe4;
/// The same for RDTSCP.
pub const TSCP_PORT: u8 = 0xe8;
/// Port whose 1-byte `out` is a rewritten PAUSE.
pub const PAUSE_PORT: u8 = 0xec;

const IN_EAX_IMM8: u8 = 0xe5;
const OUT_IMM8_AL: u8 = 0xe6;
const NOP: u8 = 0x90;

/// A range of executable bytes.
#[derive(Debug)]
pub struct Section<'a> {
    /// Address of its first byte, for messages: as linked, or as loaded.
    pub address: u64,
    /// The bytes, rewritten in place.
    pub bytes: &'a mut [u8],
}

/// Instructions whose result is not a function of the instructions before them, or that wait for something outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// RDTSC: rewritten.
    Rdtsc,
    /// RDTSCP: rewritten.
    Rdtscp,
    /// PAUSE: rewritten.
    Pause,
    /// RDRAND: hidden by CPUID.
    Rdrand,
    /// RDSEED: hidden by CPUID.
    Rdseed,
    /// RDPID: hidden by CPUID.
    Rdpid,
    /// RDPMC: hidden by CPUID (no performance monitoring unit).
    Rdpmc,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Where.
    pub address: u64,
    /// What.
    pub kind: Kind,
}

/// What was found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// RDTSC, RDTSCP and PAUSE: all rewritten.
    pub rewritten: Vec<Site>,
    /// What stays as it is and is reached only by code that CPUID turns off.
    pub hidden: Vec<Site>,
    /// Addresses of byte patterns of RDTSC and RDTSCP inside other instructions. Those of PAUSE are not worth a note: one that is missed
    /// costs a delay and no equality.
    pub operands: Vec<u64>,
}

impl Report {
    fn extend(&mut self, other: Self) {
        self.rewritten.extend(other.rewritten);
        self.hidden.extend(other.hidden);
        self.operands.extend(other.operands);
    }

    /// Sites of one kind.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        let sites = self.rewritten.iter().chain(&self.hidden);
        sites.filter(|site| site.kind == kind).count()
    }
}

/// Why a kernel cannot be made deterministic.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RewriteError {
    /// The bytes of a time-stamp instruction, and no certainty where instructions start around them.
    #[error(
        "{address:#x} may be RDTSC or RDTSCP: the bytes before it do not disassemble. This kernel cannot run in lockstep; use a \
         distribution's kernel, or one without data in its text"
    )]
    Unsure {
        /// Where.
        address: u64,
    },
    /// A time-stamp instruction with prefixes, which has no replacement of its length here.
    #[error(
        "{address:#x} is RDTSC or RDTSCP with prefixes ({bytes} bytes), which cannot be rewritten. Use another kernel"
    )]
    Prefixed {
        /// Where.
        address: u64,
        /// Its length.
        bytes: usize,
    },
    /// The file is not what it should be.
    #[error("it cannot be searched for RDTSC: {reason}")]
    Image {
        /// What is wrong.
        reason: String,
    },
}

/// Rewrites every RDTSC, RDTSCP and PAUSE in `sections`. After an error nothing has been written.
///
/// # Errors
/// [`RewriteError::Unsure`] and [`RewriteError::Prefixed`].
pub fn rewrite_text(sections: &mut [Section<'_>]) -> Result<Report, RewriteError> {
    let mut report = Report::default();
    for section in &*sections {
        report.extend(sweep::sweep(section.address, section.bytes)?);
    }
    for site in &report.rewritten {
        let holds = |section: &&mut Section<'_>| offset_of(section, site.address).is_some();
        let section = sections.iter_mut().find(holds).expect("found in one of them");
        let offset = offset_of(section, site.address).expect("just found");
        match site.kind {
            Kind::Pause => section.bytes[offset..offset + 2].copy_from_slice(&[OUT_IMM8_AL, PAUSE_PORT]),
            Kind::Rdtscp => section.bytes[offset..offset + 3].copy_from_slice(&[IN_EAX_IMM8, TSCP_PORT, NOP]),
            _ => section.bytes[offset..offset + 2].copy_from_slice(&[IN_EAX_IMM8, TSC_PORT]),
        }
    }
    Ok(report)
}

fn offset_of(section: &Section<'_>, address: u64) -> Option<usize> {
    let offset = usize::try_from(address.checked_sub(section.address)?).ok()?;
    (offset < section.bytes.len()).then_some(offset)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rewrite(code: &[u8]) -> Result<(Vec<u8>, Report), RewriteError> {
        let mut bytes = code.to_vec();
        let mut sections = [Section {
            address: 0x1000,
            bytes: &mut bytes,
        }];
        let report = rewrite_text(&mut sections)?;
        Ok((bytes, report))
    }

    #[test]
    fn both_instructions_are_replaced_by_their_length() {
        // lfence; rdtsc; rdtscp; ret
        let code = [0x0f, 0xae, 0xe8, 0x0f, 0x31, 0x0f, 0x01, 0xf9, 0xc3];
        let (bytes, report) = rewrite(&code).unwrap();
        assert_eq!(bytes, [0x0f, 0xae, 0xe8, 0xe5, 0xe4, 0xe5, 0xe8, 0x90, 0xc3]);
        assert_eq!((report.count(Kind::Rdtsc), report.count(Kind::Rdtscp)), (1, 1));
        assert_eq!(report.rewritten[0].address, 0x1003);
    }

    #[test]
    fn a_loop_that_waits_exits_in_every_turn() {
        // pause; jmp -4; and the same bytes in a constant: mov eax, 0x0090f300; repnz/rep nop with another prefix stays.
        let code = [0xf3, 0x90, 0xeb, 0xfc, 0xb8, 0x00, 0xf3, 0x90, 0x00, 0x66, 0xf3, 0x90];
        let (bytes, report) = rewrite(&code).unwrap();
        assert_eq!(bytes[..4], [0xe6, 0xec, 0xeb, 0xfc]);
        assert_eq!(bytes[4..], code[4..]);
        assert_eq!((report.count(Kind::Pause), report.rewritten[0].address), (1, 0x1000));
    }

    #[test]
    fn an_operand_that_looks_like_one_stays() {
        // mov eax, 0x00310f00; mov rax, [rip + 0xf9010f]; ret
        let code = [
            0xb8, 0x00, 0x0f, 0x31, 0x00, 0x48, 0x8b, 0x05, 0x0f, 0x01, 0xf9, 0x00, 0xc3,
        ];
        let (bytes, report) = rewrite(&code).unwrap();
        assert_eq!(bytes, code);
        assert_eq!((report.rewritten.len(), report.operands), (0, vec![0x1002, 0x1008]));
    }

    #[test]
    fn the_end_of_one_instruction_and_the_start_of_the_next_are_none() {
        // mov al, 0x0f; xor eax, eax
        let (_, report) = rewrite(&[0xb0, 0x0f, 0x31, 0xc0]).unwrap();
        assert_eq!((report.rewritten.len(), report.operands), (0, vec![0x1001]));
    }

    #[test]
    fn what_does_not_disassemble_before_a_site_refuses_the_kernel() {
        // 0x06 (push es) does not exist in 64-bit mode.
        let error = rewrite(&[0x90, 0x06, 0x90, 0x0f, 0x31, 0xc3]).unwrap_err();
        assert_eq!(error, RewriteError::Unsure { address: 0x1003 });
        assert!(error.to_string().contains("0x1003"), "{error}");
        // Far enough behind it the disassembly has found its way again.
        let code = [&[0x06][..], &[0x90; 64], &[0x0f, 0x31]].concat();
        assert_eq!(rewrite(&code).unwrap().1.rewritten.len(), 1);
    }

    #[test]
    fn a_prefix_is_refused_and_nothing_is_written() {
        let mut bytes = [0x0f, 0x31, 0x48, 0x0f, 0x31];
        let mut sections = [Section {
            address: 0,
            bytes: &mut bytes,
        }];
        let error = rewrite_text(&mut sections).unwrap_err();
        assert_eq!(error, RewriteError::Prefixed { address: 2, bytes: 3 });
        assert_eq!(bytes, [0x0f, 0x31, 0x48, 0x0f, 0x31]);
    }

    #[test]
    fn what_cpuid_hides_is_listed_and_stays() {
        // rdrand eax; rdseed rax; rdpid rax; rdpmc
        let code = [
            0x0f, 0xc7, 0xf0, 0x48, 0x0f, 0xc7, 0xf8, 0xf3, 0x0f, 0xc7, 0xf8, 0x0f, 0x33,
        ];
        let (bytes, report) = rewrite(&code).unwrap();
        assert_eq!(bytes, code);
        let kinds: Vec<_> = report.hidden.iter().map(|site| site.kind).collect();
        assert_eq!(kinds, [Kind::Rdrand, Kind::Rdseed, Kind::Rdpid, Kind::Rdpmc]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_rewritten_once_or_refused(code in proptest::collection::vec(prop_oneof![
            Just(0x0f), Just(0x31), Just(0x01), Just(0xf9), Just(0x90), any::<u8>(),
        ], 0..200)) {
            if let Ok((bytes, report)) = rewrite(&code) {
                prop_assert_eq!(bytes.len(), code.len());
                let (again, second) = rewrite(&bytes).unwrap();
                prop_assert_eq!(again, bytes);
                prop_assert!(second.rewritten.is_empty());
                // Every pattern is accounted for: a site or an operand.
                let patterns = code.windows(2).filter(|pair| *pair == [0x0f, 0x31]).count()
                    + code.windows(3).filter(|three| *three == [0x0f, 0x01, 0xf9]).count();
                let stamps = report.count(Kind::Rdtsc) + report.count(Kind::Rdtscp);
                prop_assert_eq!(stamps + report.operands.len(), patterns);
            }
        }
    }
}
