//! MSRs that would show the guest its host: time, counters, temperatures, power, KVM's paravirtual interfaces.
//!
//! Their accesses are exits instead, so a stop each: the time stamp counter is answered with virtual time, every other one faults, as it
//! does on a CPU that lacks it. CPUID does not offer them (see [`super::cpuid`]), but reading one takes no more than ring 0.

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::{Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use super::vcpu::kvm_failed;
use crate::error::Error;

/// IA32_TIME_STAMP_COUNTER.
pub const TIME_STAMP_COUNTER: u32 = 0x10;

/// First MSR and number of each filtered range.
const HOSTS: [(u32, u32); 16] = [
    (TIME_STAMP_COUNTER, 3), // and KVM's old clock
    (0x3b, 1),               // TSC_ADJUST
    (0xc1, 8),               // PMC0...
    (0xe7, 2),               // MPERF, APERF
    (0x186, 0x17),           // PERFEVTSEL0..., PERF_STATUS, PERF_CTL, THERM_...
    (0x1d9, 6), // DEBUGCTL and the last branches and exceptions that it has the CPU note: no state delta could carry them
    (0x309, 3), // FIXED_CTR0...
    (0x38d, 5), // FIXED_CTR_CTRL, PERF_GLOBAL_...
    (0x4c1, 8), // A_PMC0...
    (0x606, 0x3c), // power and energy
    (0x6e0, 1), // TSC_DEADLINE
    (0xc000_00e7, 3), // MPERF, APERF, instructions retired (AMD)
    (0xc001_0000, 8), // PERF_CTL0..., PERF_CTR0... (AMD)
    (0xc001_0200, 12), // the same, extended
    (0xc001_1029, 1), // DE_CFG (AMD): KVM lets a guest set what it does not take from a state delta
    (0x4b56_4d00, 8), // KVM: clock, asynchronous page faults, steal time, EOI
];
const LONGEST: usize = 0x40;

/// Whether accesses to this MSR are exits.
#[must_use]
pub fn is_filtered(index: u32) -> bool {
    HOSTS
        .iter()
        .any(|(first, count)| (*first..first + count).contains(&index))
}

/// Makes the accesses of the guests of `vm` to these MSRs exits. Before its vCPU is made.
///
/// # Errors
/// A KVM that cannot.
pub(super) fn filter(vm: &VmFd) -> Result<(), Error> {
    let mut exits = kvm_enable_cap {
        cap: Cap::X86UserSpaceMsr as u32,
        ..Default::default()
    };
    exits.args[0] = u64::from(MsrExitReason::Filter.bits());
    vm.enable_cap(&exits).map_err(kvm_failed("make MSR accesses exits"))?;
    let nothing_allowed = [0u8; LONGEST / 8];
    let ranges = HOSTS.map(|(base, msr_count)| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base,
        msr_count,
        bitmap: &nothing_allowed,
    });
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
        .map_err(kvm_failed("filter MSRs"))?;
    // Performance counters, RDPMC included. A KVM without this has the filter.
    if vm.check_extension_raw(u64::from(KVM_CAP_PMU_CAPABILITY)) > 0 {
        let mut pmu = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            ..Default::default()
        };
        pmu.args[0] = u64::from(KVM_PMU_CAP_DISABLE);
        vm.enable_cap(&pmu).map_err(kvm_failed("switch the guest's PMU off"))?;
    }
    Ok(())
}

const _: () = {
    let mut index = 0;
    while index < HOSTS.len() {
        assert!(HOSTS[index].1 as usize <= LONGEST);
        index += 1;
    }
};
