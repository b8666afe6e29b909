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
const HIDDEN: [Hidden; 46] = [
    Hidden(1, 0, edx, 4),            // TSC
    Hidden(1, 0, edx, 9),            // local APIC: interrupts enter by the 8259A pair
    Hidden(1, 0, edx, 21),           // DS: debug store, branches and events into memory
    Hidden(1, 0, edx, 22),           // ACPI: thermal monitor
    Hidden(1, 0, ecx, 2),            // DTES64
    Hidden(1, 0, ecx, 3),            // MONITOR/MWAIT
    Hidden(1, 0, ecx, 5),            // VMX: a guest's guest would not be replayed
    Hidden(1, 0, ecx, 15),           // PDCM: performance counters
    Hidden(1, 0, ecx, 21),           // x2APIC
    Hidden(1, 0, ecx, 24),           // TSC deadline timer
    Hidden(1, 0, ecx, 30),           // RDRAND
    Hidden(7, 0, ebx, 1),            // TSC_ADJUST
    Hidden(7, 0, ebx, 2),            // SGX
    Hidden(7, 0, ebx, 4),            // HLE: transactions abort when they like
    Hidden(7, 0, ebx, 11),           // RTM
    Hidden(7, 0, ebx, 14),           // MPX
    Hidden(7, 0, ebx, 18),           // RDSEED
    Hidden(7, 0, ebx, 25),           // processor trace
    Hidden(7, 0, ecx, 5),            // WAITPKG: waits end with time
    Hidden(7, 0, ecx, 7),            // shadow stacks: their MSRs are in no state delta
    Hidden(7, 0, ecx, 22),           // RDPID
    Hidden(7, 0, ecx, 24),           // bus lock detection, which is switched on in DEBUGCTL
    Hidden(7, 0, ecx, 29),           // ENQCMD
    Hidden(7, 0, edx, 13),           // TSX_FORCE_ABORT
    Hidden(7, 0, edx, 19),           // architectural LBR
    Hidden(7, 0, edx, 20),           // indirect branch tracking, as shadow stacks
    Hidden(0xd, 1, eax, 0), // XSAVEOPT, and the following: what they write depends on what the CPU takes for unused
    Hidden(0xd, 1, eax, 1), // XSAVEC
    Hidden(0xd, 1, eax, 2), // XGETBV of XINUSE
    Hidden(0xd, 1, eax, 3), // XSAVES
    Hidden(0xd, 1, eax, 4), // XFD: its MSRs are in no state delta
    Hidden(0x8000_0001, 0, edx, 4), // TSC, AMD's copy
    Hidden(0x8000_0001, 0, edx, 9), // local APIC, AMD's copy
    Hidden(0x8000_0001, 0, edx, 27), // RDTSCP
    Hidden(0x8000_0001, 0, ecx, 2), // SVM
    Hidden(0x8000_0001, 0, ecx, 3), // extended APIC
    Hidden(0x8000_0001, 0, ecx, 9), // OSVW: the errata of the host's CPU
    Hidden(0x8000_0001, 0, ecx, 10), // instruction-based sampling
    Hidden(0x8000_0001, 0, ecx, 15), // lightweight profiling
    Hidden(0x8000_0001, 0, ecx, 23), // performance counters of the core
    Hidden(0x8000_0001, 0, ecx, 24), // of the northbridge
    Hidden(0x8000_0001, 0, ecx, 27), // their time stamp counter
    Hidden(0x8000_0001, 0, ecx, 28), // of the last-level cache
    Hidden(0x8000_0001, 0, ecx, 29), // MONITORX/MWAITX
    Hidden(0x8000_0008, 0, ebx, 1), // count of retired instructions
    Hidden(0x8000_0008, 0, ebx, 4), // RDPRU: MPERF and APERF in user mode
];

/// Leaves that only describe what is hidden: power management, performance counters, SGX, trace, clock rates, SVM, sampling.
const EMPTY: [u32; 11] = [
    5,
    6,
    0xa,
    0x12,
    0x14,
    0x15,
    0x16,
    0x8000_0007,
    0x8000_000a,
    0x8000_001b,
    0x8000_0022,
];

/// KVM's own leaves (kvmclock, steal time, asynchronous page faults, PV EOI) are not offered at all.
const HYPERVISOR_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4fff_ffff;

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
            leaf if EMPTY.contains(&leaf) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
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

    fn ones(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        }
    }

    fn of_a_host_with_everything() -> Vec<kvm_cpuid_entry2> {
        let leaves = [
            (1, 0),
            (7, 0),
            (0xd, 1),
            (0x4000_0001, 0),
            (0x8000_0001, 0),
            (0x8000_0008, 0),
        ];
        let leaves = leaves.into_iter().chain(EMPTY.map(|function| (function, 0)));
        let host: Vec<_> = leaves.map(|(function, index)| ones(function, index)).collect();
        deterministic(CpuId::from_entries(&host).unwrap()).as_slice().to_vec()
    }

    /// Written down a second time, as the manuals name them: a bit that is lost from the list above is missed here.
    #[test]
    fn what_differs_from_run_to_run_is_not_offered() {
        let guest = of_a_host_with_everything();
        let leaf = |function| *guest.iter().find(|entry| entry.function == function).unwrap();
        assert!(guest.iter().all(|entry| entry.function != 0x4000_0001), "KVM's leaves");
        let (one, seven, states) = (leaf(1), leaf(7), leaf(0xd));
        let (extended, capacity) = (leaf(0x8000_0001), leaf(0x8000_0008));
        let offered = |value: u32, bit: u32| value >> bit & 1 == 1;
        for (name, value, bit) in [
            ("TSC", one.edx, 4),
            ("APIC", one.edx, 9),
            ("MONITOR", one.ecx, 3),
            ("VMX", one.ecx, 5),
            ("PDCM", one.ecx, 15),
            ("x2APIC", one.ecx, 21),
            ("TSC deadline", one.ecx, 24),
            ("RDRAND", one.ecx, 30),
            ("HLE", seven.ebx, 4),
            ("RTM", seven.ebx, 11),
            ("MPX", seven.ebx, 14),
            ("RDSEED", seven.ebx, 18),
            ("PT", seven.ebx, 25),
            ("WAITPKG", seven.ecx, 5),
            ("bus lock detection", seven.ecx, 24),
            ("RDPID", seven.ecx, 22),
            ("XSAVEOPT", states.eax, 0),
            ("XSAVEC", states.eax, 1),
            ("XGETBV", states.eax, 2),
            ("XSAVES", states.eax, 3),
            ("XFD", states.eax, 4),
            ("RDTSCP", extended.edx, 27),
            ("SVM", extended.ecx, 2),
            ("OSVW", extended.ecx, 9),
            ("IBS", extended.ecx, 10),
            ("MWAITX", extended.ecx, 29),
            ("RDPRU", capacity.ebx, 4),
        ] {
            assert!(!offered(value, bit), "{name} is offered");
        }
        for (name, value, bit) in [("FPU", one.edx, 0), ("AVX", one.ecx, 28), ("AVX2", seven.ebx, 5)] {
            assert!(offered(value, bit), "{name} is gone");
        }
        for function in EMPTY {
            let entry = leaf(function);
            assert_eq!(
                (entry.eax, entry.ebx, entry.ecx, entry.edx),
                (0, 0, 0, 0),
                "leaf {function:#x}"
            );
        }
    }

    #[test]
    fn hosts_that_differ_in_one_bit_have_other_bytes() {
        let table = |ebx| {
            let entry = kvm_cpuid_entry2 { ebx, ..ones(7, 0) };
            bytes(&deterministic(CpuId::from_entries(&[entry]).unwrap()))
        };
        assert_ne!(table(!0), table(!(1 << 5)), "AVX2 on one host only");
        assert_eq!(table(!0), table(!(1 << 18)), "RDSEED is hidden anyway");
    }
}
