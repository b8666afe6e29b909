//! ELF images: their segments to their physical addresses, and whether one is a Linux kernel.

use elf::{ElfBytes, abi, endian::LittleEndian, note::Note};

use super::{bad_kernel, put};
use crate::{error::Error, machine::memory::Ram};

const LOAD_FROM: u64 = 0x10_0000;
/// Owners of the notes that every Linux kernel of the last decade carries: its own, and those by which Xen and PVH hosts boot it.
const LINUX_NOTES: [&[u8]; 2] = [b"Linux", b"Xen"];

/// An image in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Loaded {
    /// Entry point.
    pub(super) entry: u64,
    /// First byte behind its last segment.
    pub(super) end: u64,
}

fn parse(file: &[u8]) -> Result<ElfBytes<'_, LittleEndian>, Error> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(file).map_err(bad_kernel)?;
    if file.ehdr.e_machine != abi::EM_X86_64 || file.ehdr.class != elf::file::Class::ELF64 {
        return Err(bad_kernel("it is for another machine"));
    }
    Ok(file)
}

/// Whether the image says that it is a Linux kernel.
///
/// # Errors
/// An image that is no ELF64 for x86-64.
pub(super) fn is_linux(file: &[u8]) -> Result<bool, Error> {
    let file = parse(file)?;
    let Some(segments) = file.segments() else {
        return Ok(false);
    };
    let notes = segments.iter().filter(|segment| segment.p_type == abi::PT_NOTE);
    let names = notes
        .filter_map(|segment| file.segment_data_as_notes(&segment).ok())
        .flatten();
    Ok(names
        .filter_map(|note| match note {
            Note::Unknown(note) => Some(note.name),
            Note::GnuAbiTag(_) | Note::GnuBuildId(_) => None,
        })
        .any(|name| LINUX_NOTES.contains(&name.strip_suffix(b"\0").unwrap_or(name))))
}

/// Copies the segments to where they belong.
///
/// # Errors
/// An image that is no static ELF64 for x86-64, or does not fit.
pub(super) fn load(ram: &Ram, file: &[u8]) -> Result<Loaded, Error> {
    let file = parse(file)?;
    let segments = file.segments().ok_or_else(|| bad_kernel("it has no program headers"))?;
    let mut last = None;
    for segment in segments
        .iter()
        .filter(|segment| segment.p_type == abi::PT_LOAD && segment.p_memsz > 0)
    {
        let end = segment
            .p_paddr
            .checked_add(segment.p_memsz)
            .ok_or_else(|| bad_kernel("a segment wraps round"))?;
        if segment.p_paddr < LOAD_FROM || segment.p_filesz > segment.p_memsz {
            return Err(bad_kernel(format!(
                "segment {:#x}..{end:#x} begins below {LOAD_FROM:#x} or is longer in the file than in memory",
                segment.p_paddr
            )));
        }
        if end > ram.bytes() {
            return Err(Error::environment(format!(
                "the guest image needs memory up to {end:#x}, and there is {:#x}. Raise --ram-mib, or check --kernel",
                ram.bytes()
            )));
        }
        let bytes = file.segment_data(&segment).map_err(bad_kernel)?;
        put(ram.memory(), segment.p_paddr, bytes);
        last = last.max(Some(end));
    }
    let end = last.ok_or_else(|| bad_kernel("it has nothing to load"))?;
    Ok(Loaded {
        entry: file.ehdr.e_entry,
        end,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An ELF file with one segment at `address` that holds `text`, in a section of code, and a note of `owner`.
    pub(in super::super) fn image(owner: &[u8], address: u64, text: &[u8]) -> Vec<u8> {
        let note_at = 64 + 2 * 56;
        let mut note = Vec::new();
        for word in [owner.len() as u32, 4, 1] {
            note.extend(word.to_le_bytes());
        }
        note.extend(owner);
        note.resize(note.len().next_multiple_of(4), 0);
        note.extend([0; 4]);
        let text_at = note_at + note.len();
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend([2u16, abi::EM_X86_64].iter().flat_map(|half| half.to_le_bytes()));
        file.extend(1u32.to_le_bytes());
        file.extend(
            [address, 64, (text_at + text.len()) as u64]
                .iter()
                .flat_map(|word| word.to_le_bytes()),
        );
        file.extend(0u32.to_le_bytes());
        file.extend([64u16, 56, 2, 64, 2, 0].iter().flat_map(|half| half.to_le_bytes()));
        for (kind, at, address, bytes) in [
            (abi::PT_LOAD, text_at, address, text.len()),
            (abi::PT_NOTE, note_at, 0, note.len()),
        ] {
            file.extend([kind, 7].iter().flat_map(|word| word.to_le_bytes()));
            let words = [at as u64, address, address, bytes as u64, bytes as u64, 4];
            file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        }
        file.extend(note);
        file.extend(text);
        file.extend([0; 64]);
        file.extend([0, abi::SHT_PROGBITS].iter().flat_map(|word| word.to_le_bytes()));
        let flags = u64::from(abi::SHF_ALLOC | abi::SHF_EXECINSTR);
        let words = [flags, address, text_at as u64, text.len() as u64, 0, 1, 0];
        file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        file
    }

    #[test]
    fn a_linux_kernel_is_known_by_its_notes() {
        for (owner, linux) in [
            (&b"Linux\0"[..], true),
            (b"Xen\0", true),
            (b"GNU\0", false),
            (b"", false),
        ] {
            assert_eq!(is_linux(&image(owner, 0x10_0000, b"x")).unwrap(), linux, "{owner:?}");
        }
    }

    #[test]
    fn segments_are_where_they_belong_or_refused() {
        let ram = Ram::new(2).unwrap();
        let loaded = load(&ram, &image(b"Linux\0", 0x10_0000, b"text")).unwrap();
        assert_eq!((loaded.entry, loaded.end), (0x10_0000, 0x10_0004));
        let error = load(&ram, &image(b"Linux\0", 0x20_0000 - 2, b"text")).unwrap_err();
        assert!(error.to_string().contains("--ram-mib"), "{error}");
        assert!(load(&ram, &image(b"Linux\0", 0x1000, b"text")).is_err());
    }
}
