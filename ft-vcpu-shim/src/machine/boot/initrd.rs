//! The initrd: kernel modules in it are rewritten as the kernel is (see [`crate::rewrite`]), before anything is loaded.
//!
//! ```text
//!  initrd = newc archive, zeros, newc archive ... and at last perhaps one that is compressed (Zstandard: taken apart here)
//!  newc   = { "070701", 13 numbers of 8 hexadecimal digits, name, data }, each padded to 4 bytes; the last is "TRAILER!!!"
//! ```
//! (Linux' Documentation/driver-api/early-userspace/buffer-format.rst.) A module that was changed loses the signature behind it: Linux
//! loads an unsigned module unless it was told not to, and never one with a signature that is wrong. What cannot be looked into is
//! refused: a module with an RDTSC in it would read its host's clock.

use std::borrow::Cow;

use super::zstandard;
use crate::{error::Error, rewrite::image};

const MAGIC: &[u8] = b"070701";
/// The same with sums of the data.
const MAGIC_SUMS: &[u8] = b"070702";
const HEADER_BYTES: usize = 110;
const SIZE_AT: usize = 54;
const NAME_SIZE_AT: usize = 94;
const TRAILER: &[u8] = b"TRAILER!!!";
const SIGNATURE: &[u8] = b"~Module signature appended~\n";
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

fn bad(reason: impl std::fmt::Display) -> Error {
    Error::environment(format!(
        "the initrd cannot be used in lockstep: {reason}. Check --initrd"
    ))
}

/// The initrd with its modules rewritten, at most `bytes_max` long.
///
/// # Errors
/// What cannot be looked into, and modules that cannot be rewritten.
pub(super) fn rewrite(initrd: &[u8], bytes_max: u64) -> Result<Cow<'_, [u8]>, Error> {
    let mut whole = Cow::Borrowed(initrd);
    let mut at = 0;
    loop {
        at += whole[at..].iter().take_while(|byte| **byte == 0).count();
        let rest = &whole[at..];
        if rest.is_empty() {
            return Ok(whole);
        }
        if rest.starts_with(&ZSTD_MAGIC) {
            let archive =
                zstandard(rest, bytes_max).map_err(|error| bad(format!("its Zstandard part is damaged: {error}")))?;
            // Linux wants an archive to begin at a multiple of 4.
            let start = at.next_multiple_of(4);
            let mut unpacked = whole[..at].to_vec();
            unpacked.resize(start, 0);
            unpacked.extend(archive);
            (whole, at) = (Cow::Owned(unpacked), start);
            continue;
        }
        at = archive(&mut whole, at)?;
    }
}

/// Rewrites the modules of the archive at `at` and gives its end.
fn archive(whole: &mut Cow<'_, [u8]>, mut at: usize) -> Result<usize, Error> {
    loop {
        let rest = &whole[at..];
        let truncated = || bad(format!("the archive is cut off in the file at byte {at}"));
        if rest.len() < HEADER_BYTES {
            return Err(truncated());
        }
        if !rest.starts_with(MAGIC) && !rest.starts_with(MAGIC_SUMS) {
            return Err(bad(format!(
                "at byte {at} there is neither a newc archive nor a Zstandard one, so that modules in it cannot be found. \
                 Decompress it (zcat, xzcat, lz4cat) and give the result"
            )));
        }
        let size = number(rest, SIZE_AT).ok_or_else(truncated)?;
        let name_size = number(rest, NAME_SIZE_AT).ok_or_else(truncated)?;
        let name = rest
            .get(HEADER_BYTES..)
            .and_then(|rest| rest.get(..name_size))
            .ok_or_else(truncated)?;
        let name = name.strip_suffix(b"\0").unwrap_or(name).to_vec();
        let data = at + (HEADER_BYTES + name_size).next_multiple_of(4);
        let end = data
            .checked_add(size)
            .filter(|end| *end <= whole.len())
            .ok_or_else(truncated)?;
        if name == TRAILER {
            return Ok(end);
        }
        let sums = rest.starts_with(MAGIC_SUMS);
        module(whole, &name, data..end, sums)?;
        at = end.next_multiple_of(4).min(whole.len());
    }
}

fn number(header: &[u8], at: usize) -> Option<usize> {
    let digits = std::str::from_utf8(header.get(at..at + 8)?).ok()?;
    usize::from_str_radix(digits, 16).ok()
}

/// Rewrites the file if it is a module.
fn module(whole: &mut Cow<'_, [u8]>, name: &[u8], range: std::ops::Range<usize>, sums: bool) -> Result<(), Error> {
    let shown = String::from_utf8_lossy(name);
    if [".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .any(|suffix| name.ends_with(suffix.as_bytes()))
        && !range.is_empty()
    {
        return Err(bad(format!(
            "the module {shown} is compressed, and an RDTSC in it would not be seen. Put it in decompressed, or leave it out"
        )));
    }
    if !name.ends_with(b".ko") || range.is_empty() {
        return Ok(());
    }
    let mut module = whole[range.clone()].to_vec();
    let report = image::rewrite(&mut module).map_err(|error| bad(format!("its module {shown}: {error}")))?;
    if report.rewritten.is_empty() {
        return Ok(());
    }
    if sums {
        return Err(bad(format!(
            "the module {shown} has to be changed, and the archive has sums of its files. Make it with `cpio --format=newc`"
        )));
    }
    if module.ends_with(SIGNATURE) {
        let end = module.len();
        module[end - SIGNATURE.len()..].fill(0);
    }
    tracing::info!(
        "{} instructions of the module {shown} rewritten",
        report.rewritten.len()
    );
    whole.to_mut()[range].copy_from_slice(&module);
    Ok(())
}

#[cfg(test)]
pub(super) use tests::newc as test_newc;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rewrite::image::test_elf;

    const BYTES_MAX: u64 = 1 << 20;

    pub(in crate::machine::boot) fn newc(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut archive = Vec::new();
        for (name, data) in files.iter().chain(&[("TRAILER!!!", &[][..])]) {
            let mut numbers = [0usize; 13];
            (numbers[6], numbers[11]) = (data.len(), name.len() + 1);
            archive.extend(MAGIC);
            archive.extend(numbers.iter().flat_map(|number| format!("{number:08x}").into_bytes()));
            archive.extend(name.as_bytes());
            archive.push(0);
            archive.resize(archive.len().next_multiple_of(4), 0);
            archive.extend(*data);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
        archive.resize(archive.len().next_multiple_of(512), 0);
        archive
    }

    fn module(code: &[u8]) -> Vec<u8> {
        [test_elf(&[(6, code)]), SIGNATURE.to_vec()].concat()
    }

    #[test]
    fn modules_are_rewritten_and_nothing_else_changes() {
        let (plain, clock) = (module(&[0x90, 0x90]), module(&[0x0f, 0x31]));
        let files: [(&str, &[u8]); 3] = [("a/plain.ko", &plain), ("init", &[0x0f, 0x31]), ("a/clock.ko", &clock)];
        let first = newc(&[("microcode", b"x")]);
        let initrd = [first.clone(), newc(&files)].concat();
        let rewritten = rewrite(&initrd, BYTES_MAX).unwrap();
        let mut changed = clock.clone();
        changed[64..66].copy_from_slice(&[0xe5, 0xe4]);
        let end = changed.len();
        changed[end - SIGNATURE.len()..].fill(0);
        let expected: [(&str, &[u8]); 3] = [files[0], files[1], ("a/clock.ko", &changed)];
        assert_eq!(*rewritten, [first.clone(), newc(&expected)].concat());

        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let compressed = ruzstd::encoding::compress_to_vec(&newc(&files)[..], level);
        let initrd = [first.clone(), compressed].concat();
        assert_eq!(*rewrite(&initrd, BYTES_MAX).unwrap(), *rewritten);
        assert!(rewrite(&initrd, 100).is_err(), "larger than the machine");
    }

    #[test]
    fn what_cannot_be_looked_into_is_refused() {
        for (initrd, reason) in [
            (newc(&[("a/clock.ko.xz", b"..")]), "clock.ko.xz"),
            ([vec![0x1f, 0x8b, 8, 0], vec![1; 200]].concat(), "zcat"),
            (newc(&[("init", b"1234")])[..120].to_vec(), "cut off"),
            (newc(&[("a/b.ko", b"no module")]), "b.ko"),
        ] {
            let error = rewrite(&initrd, BYTES_MAX).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(rewrite(&[], BYTES_MAX).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in 0usize..2000, value: u8, length in 0usize..2000) {
            let mut initrd = newc(&[("init", b"#!/bin/sh"), ("m.ko", &module(&[0x0f, 0x31]))]);
            let at = at % initrd.len();
            initrd[at] = value;
            initrd.truncate(length);
            let _ = rewrite(&initrd, BYTES_MAX);
        }
    }
}
