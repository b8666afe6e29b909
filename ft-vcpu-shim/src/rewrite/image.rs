//! The executable sections of an ELF file: a kernel (vmlinux, `.altinstr_replacement` included) or a kernel module.

use elf::{ElfBytes, abi, endian::LittleEndian};

use super::{Report, RewriteError, Section, rewrite_text};

/// Rewrites the file's executable sections in place, before it is loaded. A kernel's vDSO is data here and stays as it is: user code
/// may not use ports, and it reads the time-stamp counter only while the clocksource is `tsc`, which CPUID takes away.
///
/// # Errors
/// A file that is not ELF64 for x86-64 or has no section headers (then what is code is not known), and [`rewrite_text`]'s.
pub fn rewrite(file: &mut [u8]) -> Result<Report, RewriteError> {
    let ranges = executable_ranges(file)?;
    let mut sections = Vec::with_capacity(ranges.len());
    let (mut rest, mut taken) = (file, 0);
    for (address, start, end) in ranges {
        let (_, tail) = rest.split_at_mut(start - taken);
        let (bytes, tail) = tail.split_at_mut(end - start);
        sections.push(Section { address, bytes });
        (rest, taken) = (tail, end);
    }
    rewrite_text(&mut sections)
}

/// Address and file range of every executable section, in file order, none overlapping.
fn executable_ranges(file: &[u8]) -> Result<Vec<(u64, usize, usize)>, RewriteError> {
    let bad = |reason: String| RewriteError::Image { reason };
    let parsed = ElfBytes::<LittleEndian>::minimal_parse(file).map_err(|source| bad(source.to_string()))?;
    if parsed.ehdr.e_machine != abi::EM_X86_64 || parsed.ehdr.class != elf::file::Class::ELF64 {
        return Err(bad("it is for another machine".into()));
    }
    let headers = parsed
        .section_headers()
        .ok_or_else(|| bad("it has no section headers, so what is code is not known".into()))?;
    let mut ranges = Vec::new();
    for header in headers.iter() {
        let executable = header.sh_flags & u64::from(abi::SHF_EXECINSTR) != 0;
        if !executable || header.sh_type == abi::SHT_NOBITS || header.sh_size == 0 {
            continue;
        }
        let end = header.sh_offset.checked_add(header.sh_size);
        let range = end
            .filter(|end| *end <= file.len() as u64)
            .and_then(|end| Some((usize::try_from(header.sh_offset).ok()?, usize::try_from(end).ok()?)));
        let (start, end) = range.ok_or_else(|| bad("a section lies outside the file".into()))?;
        if header.sh_addr.checked_add(header.sh_size).is_none() {
            return Err(bad("a section wraps round".into()));
        }
        // A relocatable file has no addresses: its offsets name the places in messages.
        let address = if header.sh_addr == 0 {
            header.sh_offset
        } else {
            header.sh_addr
        };
        ranges.push((address, start, end));
    }
    if ranges.is_empty() {
        return Err(bad("it has no executable section".into()));
    }
    ranges.sort_unstable_by_key(|range| range.1);
    if ranges.windows(2).any(|pair| pair[0].2 > pair[1].1) {
        return Err(bad("executable sections overlap".into()));
    }
    let mut addresses: Vec<_> = ranges
        .iter()
        .map(|range| (range.0, range.0 + (range.2 - range.1) as u64))
        .collect();
    addresses.sort_unstable();
    if addresses.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err(bad("executable sections overlap in memory".into()));
    }
    Ok(ranges)
}

#[cfg(test)]
pub(crate) use tests::elf as test_elf;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rewrite::Kind;

    /// An ELF file with one section a pair of (flags, bytes), from offset 64 on.
    pub(crate) fn elf(sections: &[(u64, &[u8])]) -> Vec<u8> {
        let body: Vec<u8> = sections.iter().flat_map(|section| section.1.to_vec()).collect();
        let mut file = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
        file.extend(1u32.to_le_bytes());
        file.extend(
            [0, 0, 64 + body.len() as u64]
                .iter()
                .flat_map(|word: &u64| word.to_le_bytes()),
        );
        file.extend(0u32.to_le_bytes());
        let halves = [64u16, 56, 0, 64, sections.len() as u16 + 1, 0];
        file.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
        file.extend(&body);
        file.extend([0; 64]);
        let mut offset = 64;
        for (flags, bytes) in sections {
            file.extend([0u32, abi::SHT_PROGBITS].iter().flat_map(|word| word.to_le_bytes()));
            let words = [*flags, 0x10_0000 + offset, offset, bytes.len() as u64, 0, 1, 0];
            file.extend(words[..4].iter().flat_map(|word| word.to_le_bytes()));
            file.extend([0; 8]);
            file.extend(words[5..].iter().flat_map(|word| word.to_le_bytes()));
            offset += bytes.len() as u64;
        }
        file
    }

    const CODE: u64 = 6;
    const DATA: u64 = 2;

    #[test]
    fn code_is_rewritten_and_data_is_not() {
        let mut file = elf(&[
            (DATA, &[0x0f, 0x31]),
            (CODE, &[0x90, 0x0f, 0x31]),
            (CODE, &[0x0f, 0x01, 0xf9]),
        ]);
        let report = rewrite(&mut file).unwrap();
        assert_eq!(file[64..72], [0x0f, 0x31, 0x90, 0xe5, 0xe4, 0xe5, 0xe8, 0x90]);
        assert_eq!((report.count(Kind::Rdtsc), report.count(Kind::Rdtscp)), (1, 1));
        assert_eq!(report.rewritten[0].address, 0x10_0000 + 67);
    }

    #[test]
    fn a_file_that_does_not_say_what_is_code_is_refused() {
        let mut file = elf(&[(DATA, &[0x0f, 0x31])]);
        assert!(
            rewrite(&mut file)
                .unwrap_err()
                .to_string()
                .contains("no executable section")
        );
        assert!(rewrite(&mut b"MZ".to_vec()).is_err());
    }

    proptest! {
        #[test]
        fn a_hostile_file_never_panics(at in 0usize..300, value: u8, more in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut file = elf(&[(CODE, &[0x0f, 0x31]), (CODE, &more)]);
            let at = at % file.len();
            file[at] = value;
            let _ = rewrite(&mut file);
        }
    }
}
