//! The guest's CPUID: what the host has, without what would make two runs differ.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// A feature bit to hide: leaf, subleaf, register, bit, name.
struct Hidden(u32, u32, fn(&mut kvm_cpuid_entry2) -> &mut u32, u32);

fn eax(entry: &mut kvm_cpuid_entry2) -> &mut u32 {
    &mut entry.eax
}
fn ebx(entry: &mut kvm_cpuid_entry2) -> &mut u32 {
    &mut entry.ebx
}
fn ecx(entry: &mut kvm_cpuid_entry2) -> &mut u32 {
    &mut entry.ecx
}
fn edx(entry: &mut kvm_cpuid_entry2) -> &mut u32 {
    &mut entry.edx
}

/// Everything whose result is not a function of the instructions before it, and what only makes sense with a local APIC.
const HIDDEN: [Hidden; 13] = [
    Hidden(1, 0, edx, 4),            // TSC
    Hidden(1, 0, edx, 9),            // local APIC: interrupts enter by the 8259A pair
    Hidden(1, 0, ecx, 3),            // MONITOR/MWAIT
    Hidden(1, 0, ecx, 15),           // PDCM: performance counters
    Hidden(1, 0, ecx, 21),           // x2APIC
    Hidden(1, 0, ecx, 24),           // TSC deadline timer
    Hidden(1, 0, ecx, 30),           // RDRAND
    Hidden(7, 0, ebx, 18),           // RDSEED
    Hidden(7, 0, ebx, 4),            // HLE: transactions abort when they like
    Hidden(7, 0, ebx, 11),           // RTM
    Hidden(7, 0, ecx, 22),           // RDPID
    Hidden(0x8000_0001, 0, edx, 27), // RDTSCP
    Hidden(0x8000_0007, 0, edx, 8),  // invariant TSC
];

/// KVM's own leaves (kvmclock, steal time, asynchronous page faults, PV EOI) are not offered at all.
const HYPERVISOR_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4fff_ffff;
/// Leaf of the performance monitoring unit.
const PMU_LEAF: u32 = 0xa;

/// `supported` without the nondeterministic features. APIC ids and core numbers, which differ by where KVM asked, are zero.
#[must_use]
pub fn deterministic(supported: CpuId) -> CpuId {
    let mut entries = supported.as_slice().to_vec();
    entries.retain(|entry| {
        !HYPERVISOR_LEAVES.contains(&entry.function) && entry.function != 0xb && entry.function != 0x1f
    });
    for entry in &mut entries {
        match entry.function {
            1 => entry.ebx &= 0x0000_ffff,
            PMU_LEAF => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x15 | 0x16 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_001e => *eax(entry) = 0,
            _ => {}
        }
        for Hidden(function, index, register, bit) in &HIDDEN {
            if entry.function == *function && entry.index == *index {
                *register(entry) &= !(1 << bit);
            }
        }
    }
    CpuId::from_entries(&entries).expect("no longer than what KVM gave")
}

/// The table as bytes, for the fingerprint that two hosts compare.
#[must_use]
pub fn bytes(cpuid: &CpuId) -> Vec<u8> {
    let words = |entry: &kvm_cpuid_entry2| {
        [
            entry.function,
            entry.index,
            entry.flags,
            entry.eax,
            entry.ebx,
            entry.ecx,
            entry.edx,
        ]
    };
    cpuid
        .as_slice()
        .iter()
        .flat_map(words)
        .flat_map(u32::to_le_bytes)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_random_numbers_and_paravirtual_leaves_are_gone() {
        let all = |function| kvm_cpuid_entry2 {
            function,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        let host = CpuId::from_entries(&[all(1), all(7), all(0x4000_0001), all(0x8000_0001)]).unwrap();
        let guest = deterministic(host);
        let leaf = |function| {
            guest
                .as_slice()
                .iter()
                .find(|entry| entry.function == function)
                .copied()
        };
        assert_eq!(leaf(0x4000_0001), None);
        let one = leaf(1).unwrap();
        assert_eq!(
            (one.edx & (1 << 4), one.ecx & (1 << 30)),
            (0, 0),
            "TSC and RDRAND are visible"
        );
        assert_eq!(leaf(7).unwrap().ebx & (1 << 18), 0, "RDSEED is visible");
        assert_eq!(leaf(0x8000_0001).unwrap().edx & (1 << 27), 0, "RDTSCP is visible");
        assert_eq!(one.edx & 1, 1, "an ordinary feature is gone");
    }
}
