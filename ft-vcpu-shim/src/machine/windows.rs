//! Whether interrupt windows are stop points on this host, found out by trying.
//!
//! A window that is wanted at a stop opens, on VMX and SVM, at the first instruction boundary that can take an interrupt: the same one
//! in every execution, so it is a position. A KVM that emulates the guest may look for it now and then only.
//!
//! ```text
//!   out   ..  sti  nop  ▲ nop  cli     out   ..  popf  ▲ nop  cli
//!    └ wanted           └ behind the      └ wanted     └ at once
//!                         shadow of STI
//! ```

use std::sync::Arc;

use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use super::{
    boot,
    memory::Ram,
    vcpu::{Exit, Vcpu, guest_cpuid},
};
use crate::error::Error;

const CODE: u64 = 0x10_0000;
const INSTRUCTIONS: [u8; 25] = [
    0xe6, 0xe0, // out 0xe0, al
    0x90, 0x90, // nop, nop
    0xfb, 0x90, // sti, nop
    0x90, 0xfa, // nop, cli
    0xe6, 0xe1, // out 0xe1, al
    0x90, // nop
    0x68, 0x02, 0x02, 0x00, 0x00, // push 0x202
    0x9d, // popf
    0x90, 0xfa, // nop, cli
    0xe9, 0xe8, 0xff, 0xff, 0xff, // jmp CODE
    0xf4,
];
const AFTER_STI: u64 = CODE + 6;
const AFTER_POPF: u64 = CODE + 17;
const ROUNDS: usize = 64;

/// Runs a tiny guest on `kvm`: its windows must open where they do on VMX and SVM, each time. The inner error says where else one did.
///
/// # Errors
/// When not even the tiny guest can be made.
pub fn probe(kvm: &Kvm) -> Result<Result<(), String>, Error> {
    let ram = Arc::new(Ram::new(4)?);
    boot::write_tables(ram.memory());
    ram.memory()
        .write_slice(&INSTRUCTIONS, GuestAddress(CODE))
        .expect("inside RAM");
    let mut vcpu = Vcpu::new(kvm, ram, &guest_cpuid(kvm)?, CODE)?;
    let places = [(0xe0, AFTER_STI), (0xe1, AFTER_POPF)];
    for (round, (port, expected)) in (0..ROUNDS).flat_map(|round| places.map(|place| (round, place))) {
        match vcpu.run_uninterrupted() {
            Ok(Exit::PortWrite { port: at, .. }) if at == port => {}
            other => return Ok(Err(format!("a tiny guest did not come to its access: {other:?}"))),
        }
        vcpu.want_window(true);
        let exit = vcpu.run_uninterrupted();
        vcpu.want_window(false);
        let at = vcpu.registers().rip;
        match exit {
            Ok(Exit::Window) if at == expected => {}
            other => {
                return Ok(Err(format!(
                    "instead of a window at {expected:#x} there was {other:?} at {at:#x} in round {}",
                    round + 1
                )));
            }
        }
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::vcpu::open_kvm;

    #[test]
    fn the_probe_comes_to_a_verdict_and_says_where_a_window_was() {
        if let Err(reason) = probe(&open_kvm().unwrap()).unwrap() {
            assert!(reason.contains("instead of a window"), "{reason}");
        }
    }
}
