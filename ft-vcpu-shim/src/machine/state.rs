//! Everything a vCPU that stands still is made of, as bytes: what a state delta carries beside pages.
//!
//! ```text
//!   capture ─► VcpuState ─► encode ──► log ──► decode ─► VcpuState ─► put into another vCPU
//! ```
//! Of the model-specific registers it has those that a guest may write and that the same instructions give the same value on every
//! host; time stamps, counters and what KVM invents are none of them. Writer and reader stand beside each other here.

use std::ops::Range;

use kvm_bindings::{Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, IntoBytes};

use super::vcpu::kvm_failed;
use crate::error::Error;

const CR4_PGE: u64 = 1 << 7;
const LSTAR: u32 = 0xc000_0082;
/// MSRs that belong to the state, where KVM has them, beside [`MACHINE_CHECK_BANKS`].
const MSRS: [u32; 51] = [
    0x3a,  // FEATURE_CONTROL
    0x48,  // SPEC_CTRL
    0x122, // TSX_CTRL
    0x140, // MISC_FEATURES_ENABLES
    0x174,
    0x175,
    0x176, // SYSENTER_CS, ESP, EIP
    0x17a, // MCG_STATUS
    0x17b, // MCG_CTL
    0x1a0, // MISC_ENABLE
    0x1fc, // POWER_CTL
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f, // MTRRs: base and mask of the variable ranges
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,       // the fixed ranges
    0x277,       // PAT
    0x2ff,       // MTRR default type
    0xda0,       // XSS
    0xc000_0081, // STAR
    LSTAR,
    0xc000_0083, // CSTAR
    0xc000_0084, // SFMASK
    0xc000_0102, // KERNEL_GS_BASE
    0xc000_0103, // TSC_AUX
    0xc001_0015, // HWCR (AMD)
    0xc001_0114, // VM_CR (AMD)
    0xc001_0117, // VM_HSAVE_PA (AMD)
    0xc001_011f, // VIRT_SPEC_CTRL (AMD)
];
/// Control, status, address and miscellaneous of each bank; Linux enables all that there are, and reads whether it could.
const MACHINE_CHECK_BANKS: Range<u32> = 0x400..0x480;
const MSRS_MAX: usize = MSRS.len() + (MACHINE_CHECK_BANKS.end - MACHINE_CHECK_BANKS.start) as usize;

fn msrs() -> impl Iterator<Item = u32> {
    MSRS.into_iter().chain(MACHINE_CHECK_BANKS)
}

/// Whether an MSR belongs to the state.
fn is_state(index: u32) -> bool {
    MSRS.contains(&index) || MACHINE_CHECK_BANKS.contains(&index)
}

/// Most bytes of an encoded state: all of it is of fixed size but the MSRs.
const FIXED_BYTES: usize = 1
    + size_of::<kvm_regs>()
    + size_of::<kvm_sregs>()
    + size_of::<kvm_xcrs>()
    + size_of::<kvm_xsave>()
    + size_of::<kvm_debugregs>()
    + size_of::<kvm_vcpu_events>();

/// The state of one vCPU.
#[derive(Debug)]
pub struct VcpuState {
    /// Whether an interrupt can enter here: KVM says so only to the vCPU that stopped.
    pub can_interrupt: bool,
    /// General registers.
    pub regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
}

/// Which of [`msrs`] this KVM has for a guest with the CPUID of `vcpu`: some can be read and not set.
///
/// # Errors
/// When KVM cannot be asked.
pub(super) fn supported_msrs(vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut supported = Vec::with_capacity(MSRS_MAX);
    for index in msrs() {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut one = list(&[entry]);
        let read = vcpu.get_msrs(&mut one).map_err(kvm_failed("read MSRs"))?;
        if read == 1 && vcpu.set_msrs(&one).map_err(kvm_failed("set MSRs"))? == 1 {
            supported.push(entry);
        }
    }
    Ok(supported)
}

fn list(entries: &[kvm_msr_entry]) -> Msrs {
    Msrs::from_entries(entries).expect("far fewer than KVM's limit")
}

/// MSRs that only the host sets, and a guest reads: with another value there, it would be another execution.
const OF_THE_HOST: [u32; 3] = [
    0x8b,  // the microcode's revision
    0xce,  // PLATFORM_INFO
    0x10a, // ARCH_CAPABILITIES
];

/// What a guest with the CPUID of `vcpu` reads of its host, by MSR.
pub(super) fn host_msrs(vcpu: &VcpuFd) -> Result<Vec<(u32, u64)>, Error> {
    let mut values = Vec::with_capacity(OF_THE_HOST.len());
    for index in OF_THE_HOST {
        let mut one = list(&[kvm_msr_entry {
            index,
            ..Default::default()
        }]);
        if vcpu.get_msrs(&mut one).map_err(kvm_failed("read MSRs"))? == 1 {
            values.push((index, one.as_slice()[0].data));
        }
    }
    Ok(values)
}

/// Where SYSCALL leads, if the guest said so.
pub(super) fn system_call_entry(vcpu: &VcpuFd) -> Result<Option<u64>, Error> {
    let mut values = list(&[kvm_msr_entry {
        index: LSTAR,
        ..Default::default()
    }]);
    let read = vcpu.get_msrs(&mut values).map_err(kvm_failed("read MSRs"))?;
    Ok((read == 1)
        .then(|| values.as_slice()[0].data)
        .filter(|entry| *entry != 0))
}

impl VcpuState {
    /// Takes the state of `vcpu`, which has no unfinished access, with these MSRs.
    pub(super) fn capture(vcpu: &VcpuFd, msrs: &[kvm_msr_entry], can_interrupt: bool) -> Result<Self, Error> {
        let failed = kvm_failed("read the vCPU's state");
        let mut values = list(msrs);
        let read = vcpu.get_msrs(&mut values).map_err(&failed)?;
        if read != msrs.len() {
            return Err(Error::environment(format!(
                "KVM does not give MSR {:#x} any more",
                msrs[read].index
            )));
        }
        Ok(Self {
            can_interrupt,
            regs: vcpu.get_regs().map_err(&failed)?,
            sregs: vcpu.get_sregs().map_err(&failed)?,
            xcrs: vcpu.get_xcrs().map_err(&failed)?,
            xsave: vcpu.get_xsave().map_err(&failed)?,
            debug: vcpu.get_debug_regs().map_err(&failed)?,
            events: vcpu.get_vcpu_events().map_err(&failed)?,
            msrs: values.as_slice().to_vec(),
        })
    }

    /// Puts the state into `vcpu`. Events come last: setting registers drops a pending exception.
    pub(super) fn put(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let failed = kvm_failed("set the vCPU's state");
        // The guest's page tables may be others now, and what this vCPU has cached of the old ones must go: KVM drops it when CR4 changes,
        // and the state itself may have the CR4 that is there.
        let mut other = self.sregs;
        other.cr4 ^= CR4_PGE;
        vcpu.set_sregs(&other).map_err(&failed)?;
        vcpu.set_sregs(&self.sregs).map_err(&failed)?;
        vcpu.set_regs(&self.regs).map_err(&failed)?;
        vcpu.set_xcrs(&self.xcrs).map_err(&failed)?;
        // SAFETY: `kvm_xsave` is the whole 4096 bytes that KVM_SET_XSAVE reads; larger areas are for features that only a
        // process which asked the kernel for them (AMX) can give to a guest, and this one asks for none.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(&failed)?;
        // Only what differs: some cannot be set any more once the vCPU ran, not even to what they are.
        let mut current = list(&self.msrs);
        let read = vcpu.get_msrs(&mut current).map_err(&failed)?;
        let same = |entry: &kvm_msr_entry| current.as_slice()[..read].contains(entry);
        let other: Vec<kvm_msr_entry> = self.msrs.iter().filter(|entry| !same(entry)).copied().collect();
        let set = vcpu.set_msrs(&list(&other)).map_err(&failed)?;
        if set != other.len() {
            return Err(Error::environment(format!(
                "KVM refused MSR {:#x} = {:#x}: the hosts differ more than their CPUID tells",
                other[set].index, other[set].data
            )));
        }
        vcpu.set_debug_regs(&self.debug).map_err(&failed)?;
        vcpu.set_vcpu_events(&self.events).map_err(&failed)
    }

    /// The state as bytes of the log.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED_BYTES + self.msrs.len() * size_of::<kvm_msr_entry>());
        out.push(u8::from(self.can_interrupt));
        for part in [
            self.regs.as_bytes(),
            self.sregs.as_bytes(),
            self.xcrs.as_bytes(),
            self.xsave.as_bytes(),
            self.debug.as_bytes(),
            self.events.as_bytes(),
            self.msrs.as_bytes(),
        ] {
            out.extend_from_slice(part);
        }
        lz4_flex::block::compress(&out)
    }

    /// Reads what [`VcpuState::encode`] wrote; `None` for anything else.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes_max = FIXED_BYTES + MSRS_MAX * size_of::<kvm_msr_entry>();
        let bytes = lz4_flex::block::decompress(bytes, bytes_max).ok()?;
        let (can_interrupt, rest) = bytes.split_first()?;
        let (regs, rest) = FromBytes::read_from_prefix(rest).ok()?;
        let (sregs, rest) = FromBytes::read_from_prefix(rest).ok()?;
        let (xcrs, rest) = FromBytes::read_from_prefix(rest).ok()?;
        let (xsave, rest) = FromBytes::read_from_prefix(rest).ok()?;
        let (debug, rest) = FromBytes::read_from_prefix(rest).ok()?;
        let (events, rest) = FromBytes::read_from_prefix(rest).ok()?;
        let msrs = rest.chunks(size_of::<kvm_msr_entry>());
        let msrs: Option<Vec<kvm_msr_entry>> = msrs.map(|entry| FromBytes::read_from_bytes(entry).ok()).collect();
        // Nothing is set in a vCPU that is not of this list, whoever wrote the log.
        let msrs = msrs.filter(|msrs| msrs.iter().all(|entry| is_state(entry.index)))?;
        Some(Self {
            can_interrupt: match can_interrupt {
                0 => false,
                1 => true,
                _ => return None,
            },
            regs,
            sregs,
            xcrs,
            xsave,
            debug,
            events,
            msrs,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::machine::{
        msr,
        vcpu::{guest_cpuid, open_kvm},
    };

    fn state(msr: u32) -> VcpuState {
        VcpuState {
            can_interrupt: true,
            regs: kvm_regs {
                rip: 0x1234,
                ..Default::default()
            },
            sregs: kvm_sregs::default(),
            xcrs: kvm_xcrs::default(),
            xsave: kvm_xsave::default(),
            debug: kvm_debugregs::default(),
            events: kvm_vcpu_events::default(),
            msrs: vec![kvm_msr_entry {
                index: msr,
                data: 7,
                ..Default::default()
            }],
        }
    }

    #[test]
    fn a_state_reads_back_and_an_msr_that_is_none_of_it_is_refused() {
        let encoded = state(0xc000_0081).encode();
        assert!(encoded.len() < 200, "{} bytes for zeros", encoded.len());
        let decoded = VcpuState::decode(&encoded).unwrap();
        assert_eq!((decoded.can_interrupt, decoded.regs.rip), (true, 0x1234));
        assert_eq!(decoded.encode(), encoded);
        assert!(
            VcpuState::decode(&state(0x10).encode()).is_none(),
            "the time stamp counter"
        );
        assert!(VcpuState::decode(&encoded[..encoded.len() - 1]).is_none());
    }

    /// What KVM itself would have saved, so what a guest can have changed, is recorded in some way.
    #[test]
    fn every_msr_of_this_kvm_is_carried_or_filtered_or_the_hosts() {
        // Only the host sets them.
        const HOSTS: [u32; 8] = [
            0x34,        // SMI_COUNT
            0x8b,        // the microcode's revision
            0x9e,        // SMBASE
            0xce,        // PLATFORM_INFO
            0x10a,       // ARCH_CAPABILITIES
            0x345,       // PERF_CAPABILITIES
            0xc000_0104, // TSC_RATIO
            0xc001_0010, // SYSCFG
        ];
        // Faults, since CPUID does not offer what they belong to.
        let is_hidden = |index| {
            matches!(index,
                0x8c..=0x8f | 0xd90 | 0xe1 // SGX, MPX, WAITPKG
                | 0x1c4 | 0x1c5 // XFD
                | 0x480..=0x491 // VMX
                | 0x560..=0x587 // processor trace
                | 0x6a0..=0x6a8 // shadow stacks
                | 0xc001_0140 | 0xc001_0141 // OSVW
                | 0xc000_0300..=0xc000_0302 | 0x3f1 | 0x3f2 // counters, with KVM's PMU switched off
                | 0x4000_0000..=0x4000_01ff // Hyper-V
            )
        };
        let list = open_kvm().unwrap().get_msr_index_list().unwrap();
        let mut left = list.as_slice().to_vec();
        left.retain(|index| {
            !(is_state(*index) || msr::is_filtered(*index) || HOSTS.contains(index) || is_hidden(*index))
        });
        assert!(left.is_empty(), "{left:x?}");
    }

    #[test]
    fn what_a_guest_wrote_before_a_delta_is_what_it_reads_after_one() {
        let (from, to) = (vcpu(), vcpu());
        let mut carried = 0;
        for (index, data) in [(0x405, 0x1234), (0x47f, 5), (0x17a, 4), (0x1fc, 1), (0xc001_1029, 2)] {
            let entry = kvm_msr_entry {
                index,
                data,
                ..Default::default()
            };
            let msrs = supported_msrs(&from).unwrap();
            if from.set_msrs(&list(&[entry])).unwrap() != 1 {
                continue;
            }
            let state = VcpuState::capture(&from, &msrs, false).unwrap();
            VcpuState::decode(&state.encode()).unwrap().put(&to).unwrap();
            let mut read = list(&[kvm_msr_entry {
                index,
                ..Default::default()
            }]);
            assert_eq!(to.get_msrs(&mut read).unwrap(), 1);
            assert_eq!(read.as_slice()[0].data, data, "MSR {index:#x}");
            carried += 1;
        }
        assert!(carried >= 3, "{carried}");
    }

    fn vcpu() -> VcpuFd {
        let kvm = open_kvm().unwrap();
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&guest_cpuid(&kvm).unwrap()).unwrap();
        vcpu
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = VcpuState::decode(&bytes);
            let _ = VcpuState::decode(&lz4_flex::block::compress(&bytes));
        }
    }
}
