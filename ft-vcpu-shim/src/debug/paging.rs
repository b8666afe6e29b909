//! Guest-virtual to guest-physical addresses, by walking the guest's page tables as its CPU would, without setting a bit in them.
//!
//! KVM_TRANSLATE would do it for a vCPU; this works on any memory image, at any CR3, and is a pure function.

/// The registers a walk depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

/// Why an address has no translation.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum TranslateError {
    /// A table says so, or the address is not canonical.
    #[error("address {address:#x} is not mapped in the guest")]
    NotMapped {
        /// The guest-virtual address.
        address: u64,
    },
    /// A table lies outside guest memory.
    #[error("the page tables for address {address:#x} are outside guest memory")]
    TableOutside {
        /// The guest-virtual address.
        address: u64,
    },
    /// The guest is in a paging mode that is not walked.
    #[error("the guest uses 32-bit paging, which is not walked here: give physical addresses")]
    Mode,
}

const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS_BITS: u64 = 0x000f_ffff_ffff_f000;
const PAGE_BITS: u32 = 12;
const INDEX_BITS: u32 = 9;

/// The guest-physical address of `address`. `read` gives the 8-byte word at a guest-physical address, `None` outside RAM.
///
/// # Errors
/// [`TranslateError`].
pub fn translate(paging: &Paging, address: u64, read: impl Fn(u64) -> Option<u64>) -> Result<u64, TranslateError> {
    if paging.cr0 & CR0_PG == 0 {
        return Ok(address);
    }
    if paging.efer & EFER_LMA == 0 {
        return Err(TranslateError::Mode);
    }
    let levels = if paging.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
    let bits = PAGE_BITS + INDEX_BITS * levels;
    let canonical = ((address << (64 - bits)) as i64 >> (64 - bits)) as u64;
    if canonical != address {
        return Err(TranslateError::NotMapped { address });
    }
    let mut table = paging.cr3 & ADDRESS_BITS;
    for level in (0..levels).rev() {
        let shift = PAGE_BITS + INDEX_BITS * level;
        let index = (address >> shift) & 0x1ff;
        let entry = read(table + 8 * index).ok_or(TranslateError::TableOutside { address })?;
        if entry & PRESENT == 0 {
            return Err(TranslateError::NotMapped { address });
        }
        let is_page = level == 0 || (entry & LARGE != 0 && (1..=2).contains(&level));
        if is_page {
            let offset_mask = (1 << shift) - 1;
            return Ok((entry & ADDRESS_BITS & !offset_mask) | (address & offset_mask));
        }
        table = entry & ADDRESS_BITS;
    }
    unreachable!("the last level is always a page")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const LONG_MODE: Paging = Paging {
        cr0: CR0_PG | 1,
        cr3: 0x1000,
        cr4: 1 << 5,
        efer: EFER_LMA,
    };

    /// Maps `address` to a page of `shift` bits at `page`, with tables from 0x1000 on.
    fn tables(address: u64, page: u64, shift: u32, levels: u32) -> HashMap<u64, u64> {
        let mut memory = HashMap::new();
        let mut table = 0x1000;
        let mut level = levels;
        loop {
            level -= 1;
            let at = PAGE_BITS + INDEX_BITS * level;
            let place = table + 8 * ((address >> at) & 0x1ff);
            if at == shift {
                let large = if level > 0 { LARGE } else { 0 };
                memory.insert(place, page | PRESENT | large);
                return memory;
            }
            table += 0x1000;
            memory.insert(place, table | PRESENT | 1 << 63);
        }
    }

    proptest! {
        #[test]
        fn every_page_size_and_depth_is_walked(address in any::<u64>(), page in 0u64..1 << 50, size in 0usize..3, five in any::<bool>()) {
            let shift = [12, 21, 30][size];
            let levels = if five { 5 } else { 4 };
            let bits = PAGE_BITS + INDEX_BITS * levels;
            let address = ((address << (64 - bits)) as i64 >> (64 - bits)) as u64;
            let page = page >> shift << shift;
            let memory = tables(address, page, shift, levels);
            let paging = Paging { cr4: if five { CR4_LA57 } else { 0 }, ..LONG_MODE };
            let read = |at| Some(memory.get(&at).copied().unwrap_or(0));
            prop_assert_eq!(translate(&paging, address, read), Ok(page | (address & ((1 << shift) - 1))));
            let other = address ^ 1 << shift;
            prop_assert_eq!(translate(&paging, other, read), Err(TranslateError::NotMapped { address: other }));
        }

        #[test]
        fn hostile_tables_and_registers_never_panic(cr3 in any::<u64>(), cr4 in any::<u64>(), address in any::<u64>(), word in any::<u64>()) {
            let paging = Paging { cr3, cr4, ..LONG_MODE };
            let _ = translate(&paging, address, |at| (at < 1 << 40).then_some(word ^ at));
        }
    }

    #[test]
    fn what_is_not_walked_is_said() {
        let nothing = |_| None;
        let flat = Paging { cr0: 1, ..LONG_MODE };
        assert_eq!(translate(&flat, 0x1234, nothing), Ok(0x1234));
        let legacy = Paging { efer: 0, ..LONG_MODE };
        assert_eq!(translate(&legacy, 0, nothing), Err(TranslateError::Mode));
        let address = 0x8000_0000_0000;
        assert_eq!(
            translate(&LONG_MODE, address, nothing),
            Err(TranslateError::NotMapped { address })
        );
        assert_eq!(
            translate(&LONG_MODE, 0, nothing),
            Err(TranslateError::TableOutside { address: 0 })
        );
    }
}
