//! State deltas: what a replay adopts instead of executing, where the guest stopped at a place that cannot be named.
//!
//! ```text
//!   stop E ──── guest runs, KVM_RUN is interrupted somewhere ────► stop E+1
//!   the log:    Pages (written since the last base), Pages ..., State (vCPU)
//!   a replay at E does not run: pages into RAM, state into the vCPU, and it is at E+1
//! ```
//! A *base* is any stop at which written pages were forgotten: from there to E a replay has written the same pages itself, so that more
//! pages than were written since E do no harm. Pages count only once their State is there: a log that ends between them ends at E.
//!
//! `Pages` payload, little endian: u32 pages, u32 page number for each, then the pages' content as one LZ4 block. Writer and reader stand
//! beside each other here.

use vm_memory::{Bytes, GuestAddress};

use crate::{error::Error, machine::memory::Ram};

/// Bytes of a page.
const PAGE_BYTES: usize = 4096;
/// Pages of one entry: a frame stays well below the largest even if nothing can be compressed.
const PAGES_PER_ENTRY: usize = 64;
/// Pages that a delta may have: all of the largest machine's memory.
pub const PAGES_MAX: usize = 3072 << 8;

const _: () = assert!(
    lz4_flex::block::get_maximum_output_size(PAGES_PER_ENTRY * PAGE_BYTES) + 4 + 4 * PAGES_PER_ENTRY
        <= ft_protocol::limits::PAYLOAD_BYTES_MAX
);

/// A delta as it lies in the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Payloads of its `Pages` entries.
    pub pages: Vec<Vec<u8>>,
    /// Payload of its `State` entry.
    pub state: Vec<u8>,
}

/// The pages of a bitmap (bit n of word w: page 64 w + n), as payloads of `Pages` entries.
pub fn encode_pages<'a>(ram: &'a Ram, written: &'a [u64]) -> impl Iterator<Item = Vec<u8>> + 'a {
    let mut numbers = numbers(written).peekable();
    std::iter::from_fn(move || {
        numbers.peek()?;
        let batch: Vec<u32> = numbers.by_ref().take(PAGES_PER_ENTRY).collect();
        let mut content = vec![0; batch.len() * PAGE_BYTES];
        for (number, page) in batch.iter().zip(content.chunks_exact_mut(PAGE_BYTES)) {
            ram.memory()
                .read_slice(page, address(*number))
                .expect("KVM's bitmap covers the RAM that it was given");
        }
        let mut payload = Vec::with_capacity(4 + 4 * batch.len() + content.len() / 2);
        payload.extend((batch.len() as u32).to_le_bytes());
        payload.extend(batch.iter().flat_map(|number| number.to_le_bytes()));
        payload.extend(lz4_flex::block::compress(&content));
        Some(payload)
    })
}

fn numbers(written: &[u64]) -> impl Iterator<Item = u32> {
    (0u32..).zip(written).flat_map(|(word, bits)| {
        let mut bits = *bits;
        std::iter::from_fn(move || {
            let bit = (bits != 0).then(|| bits.trailing_zeros())?;
            bits &= bits - 1;
            Some(64 * word + bit)
        })
    })
}

fn address(number: u32) -> GuestAddress {
    GuestAddress(u64::from(number) * PAGE_BYTES as u64)
}

/// How many pages a payload claims to have; `None` if it cannot be one.
#[must_use]
pub fn page_count(payload: &[u8]) -> Option<usize> {
    let count = u32::from_le_bytes(*payload.first_chunk()?) as usize;
    ((1..=PAGES_PER_ENTRY).contains(&count) && payload.len() > 4 + 4 * count).then_some(count)
}

/// Puts the pages of a payload into RAM.
///
/// # Errors
/// A payload that [`encode_pages`] did not make for a machine with as much RAM.
pub fn apply_pages(ram: &Ram, payload: &[u8]) -> Result<(), Error> {
    let malformed = || Error::LogEnds("a state delta of the log has pages that this machine has not".into());
    let count = page_count(payload).ok_or_else(malformed)?;
    let (numbers, content) = payload[4..].split_at(4 * count);
    let content = lz4_flex::block::decompress(content, count * PAGE_BYTES).map_err(|_| malformed())?;
    if content.len() != count * PAGE_BYTES {
        return Err(malformed());
    }
    let (numbers, _) = numbers.as_chunks();
    for (number, page) in numbers.iter().zip(content.chunks_exact(PAGE_BYTES)) {
        ram.memory()
            .write_slice(page, address(u32::from_le_bytes(*number)))
            .map_err(|_| malformed())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(ram: &Ram, number: u32) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        ram.memory().read_slice(&mut page, address(number)).unwrap();
        page
    }

    #[test]
    fn written_pages_reach_another_ram_and_others_stay() {
        let (from, to) = (Ram::new(4).unwrap(), Ram::new(4).unwrap());
        let mut written = [0u64; 16];
        for number in (0..1024).step_by(7) {
            written[number / 64] |= 1 << (number % 64);
        }
        for number in 0..1024 {
            from.memory()
                .write_slice(&[number as u8; PAGE_BYTES], address(number))
                .unwrap();
        }
        let payloads: Vec<_> = encode_pages(&from, &written).collect();
        assert_eq!(payloads.len(), 147usize.div_ceil(PAGES_PER_ENTRY));
        for payload in &payloads {
            apply_pages(&to, payload).unwrap();
        }
        for number in 0..1024 {
            let expected = if number % 7 == 0 { number as u8 } else { 0 };
            assert_eq!(page(&to, number), [expected; PAGE_BYTES], "page {number}");
        }
        assert_eq!(encode_pages(&from, &[0; 16]).count(), 0);
    }

    #[test]
    fn pages_beyond_the_ram_are_refused() {
        let (large, small) = (Ram::new(8).unwrap(), Ram::new(4).unwrap());
        let mut written = [0u64; 32];
        written[31] = 1 << 63;
        let payload = encode_pages(&large, &written).next().unwrap();
        assert!(apply_pages(&large, &payload).is_ok());
        assert!(apply_pages(&small, &payload).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), pages in 0u32..70) {
            let ram = Ram::new(4).unwrap();
            let _ = apply_pages(&ram, &bytes);
            let _ = apply_pages(&ram, &[&pages.to_le_bytes()[..], &bytes].concat());
        }
    }
}
