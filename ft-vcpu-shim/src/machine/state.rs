//! Everything a vCPU that stands still is made of, as bytes: what a state delta carries beside pages.
//!
//! ```text
//!   capture ─► VcpuState ─► encode ──► log ──► decode ─► VcpuState ─► put into another vCPU
//! ```
//! Of the model-specific registers it has those that a guest may write and that the same instructions give the same value on every
//! host; time stamps, counters and what KVM invents are none of them. Writer and reader stand beside each other here.

use kvm_bindings::{Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, IntoBytes};

use super::vcpu::kvm_failed;
use crate::error::Error;

const CR4_PGE: u64 = 1 << 7;
const LSTAR: u32 = 0xc000_0082;
/// MSRs that belong to the state, where KVM has them.
const MSRS: [u32; 43] = [
    0x48, // SPEC_CTRL
    0x174,
    0x175,
    0x176, // SYSENTER_CS, ESP, EIP
    0x1a0, // MISC_ENABLE
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
    0xc001_011f, // VIRT_SPEC_CTRL (AMD)
];

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

/// Which of [`MSRS`] this KVM has for a guest with the CPUID of `vcpu`: some can be read and not set.
///
/// # Errors
/// When KVM cannot be asked.
pub(super) fn supported_msrs(vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut supported = Vec::with_capacity(MSRS.len());
    for index in MSRS {
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
        let bytes_max = FIXED_BYTES + MSRS.len() * size_of::<kvm_msr_entry>();
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
        let msrs = msrs.filter(|msrs| msrs.iter().all(|entry| MSRS.contains(&entry.index)))?;
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

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = VcpuState::decode(&bytes);
            let _ = VcpuState::decode(&lz4_flex::block::compress(&bytes));
        }
    }
}
