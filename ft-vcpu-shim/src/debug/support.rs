//! Whether this host's KVM implements execution breakpoints, found out by trying.
//!
//! KVM_SET_GUEST_DEBUG is accepted where it does nothing: a KVM without hardware virtualization may have breakpoints where it
//! emulates the guest and none where it runs it natively, in ring 3. So a tiny guest in ring 3 is stopped once before anybody
//! relies on it.
//!
//! ```text
//!   CODE:  nop   nop   nop   mov eax, [DEVICE]
//!                      ▲ a breakpoint; then the load, as an exit
//! ```

use std::sync::Arc;

use kvm_bindings::{kvm_segment, kvm_sregs};
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use crate::{
    error::Error,
    machine::{
        boot,
        memory::Ram,
        vcpu::{Exit, Vcpu, guest_cpuid},
    },
};

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x1_0000;
const DEVICE: u64 = 0x40_0000;
const DEVICE_PHYSICAL: u64 = 0xd000_0000;
const TABLE: u64 = 0x7;
const LARGE_PAGE: u64 = 0x87;
const ACCESSED_DIRTY: u64 = 0x60;
const BREAKPOINT: u64 = CODE + 2;
const INSTRUCTIONS: [u8; 10] = [0x90, 0x90, 0x90, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x40, 0x00];

/// Runs the tiny guest on `kvm`: it must stand still at its breakpoint and go on afterwards. The inner error says what it did
/// instead.
///
/// # Errors
/// When not even the tiny guest can be made.
pub fn probe(kvm: &Kvm) -> Result<Result<(), String>, Error> {
    let ram = Arc::new(Ram::new(4)?);
    let mut vcpu = tiny_guest(kvm, &ram)?;
    vcpu.debug(&[BREAKPOINT])?;
    let first = match vcpu.run_uninterrupted() {
        Ok(exit) => exit,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let at = vcpu.registers().rip;
    if first != Exit::Trap || at != BREAKPOINT {
        return Ok(Err(format!(
            "instead of standing still at {BREAKPOINT:#x} a guest in ring 3 came to {at:#x} with {first:?}"
        )));
    }
    vcpu.debug(&[])?;
    Ok(match vcpu.run_uninterrupted() {
        Ok(Exit::MmioRead { address }) if address == DEVICE_PHYSICAL => Ok(()),
        Ok(exit) => Err(format!("the guest did not go on afterwards: {exit:?}")),
        Err(error) => Err(error.to_string()),
    })
}

fn tiny_guest(kvm: &Kvm, ram: &Arc<Ram>) -> Result<Vcpu, Error> {
    let words = [
        (PML4, PDPT | TABLE | ACCESSED_DIRTY),
        (PDPT, PAGE_DIRECTORY | TABLE | ACCESSED_DIRTY),
        (PAGE_DIRECTORY, LARGE_PAGE | ACCESSED_DIRTY),
        (
            PAGE_DIRECTORY + 8 * (DEVICE >> 21),
            DEVICE_PHYSICAL | LARGE_PAGE | ACCESSED_DIRTY,
        ),
    ];
    for (at, word) in words {
        ram.memory().write_obj(word, GuestAddress(at)).expect("inside RAM");
    }
    ram.memory()
        .write_slice(&INSTRUCTIONS, GuestAddress(CODE))
        .expect("inside RAM");
    let mut vcpu = Vcpu::new(kvm, Arc::clone(ram), &guest_cpuid(kvm)?, CODE)?;
    let state = vcpu.state()?;
    vcpu.enter(&boot::entry_regs(CODE), &ring_3(state.sregs))?;
    Ok(vcpu)
}

fn ring_3(sregs: kvm_sregs) -> kvm_sregs {
    let mut sregs = boot::entry_sregs(sregs);
    sregs.cr3 = PML4;
    let user = |segment: kvm_segment, selector| kvm_segment {
        selector,
        dpl: 3,
        ..segment
    };
    sregs.cs = user(sregs.cs, 0x13);
    let data = user(sregs.ds, 0x1b);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::vcpu::open_kvm;

    #[test]
    fn the_probe_comes_to_a_verdict_and_the_tiny_guest_runs_without_a_debugger() {
        let kvm = open_kvm().unwrap();
        let ram = Arc::new(Ram::new(4).unwrap());
        let mut vcpu = tiny_guest(&kvm, &ram).unwrap();
        let address = DEVICE_PHYSICAL;
        assert_eq!(vcpu.run_uninterrupted().unwrap(), Exit::MmioRead { address });
        // A KVM that has none must give a reason that names what its guest did.
        if let Err(reason) = probe(&kvm).unwrap() {
            assert!(reason.contains("guest"), "{reason}");
        }
    }
}
