//! What this host's KVM can do for lockstep, found out by trying; and whether two hosts can be a pair.
//!
//! ```text
//!   Host::examine ─► ring 0 natively?  interrupt windows?  breakpoints?  branch counter?  CPUID table
//!                            └──────────────── JSON ────────────────► Host::differences(other host's)
//! ```

use std::sync::Arc;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use super::{
    boot, branches,
    memory::Ram,
    vcpu::{Exit, Vcpu, guest_cpuid, host_msrs},
    windows,
};
use crate::{debug::support, error::Error};

const CODE: u64 = 0x10_0000;
/// Instructions of every kernel that a KVM without VMX or SVM does not emulate in ring 0, then a write to port 0xE0.
const OF_A_KERNEL: [u8; 9] = [
    0xf3, 0x48, 0x0f, 0xb8, 0xc3, // popcnt rax, rbx
    0xe6, 0xe0, // out 0xe0, al
    0xeb, 0xf7, // jmp CODE
];

/// A host, as far as lockstep needs to know it.
#[derive(Clone, Debug)]
pub struct Host {
    /// Whether ring 0 runs natively, so that a stock Linux can; otherwise what came of trying.
    pub linux: Result<(), String>,
    /// Whether interrupt windows are stop points; otherwise where one opened.
    pub windows: Result<(), String>,
    /// Whether breakpoints work in ring 3 (for debugging only).
    pub breakpoints: Result<(), String>,
    /// Whether the host has a counter of branches that names places between stops, and which; otherwise why not.
    pub branches: Result<String, String>,
    /// MSRs that only the host sets, as a guest reads them.
    pub msrs: Vec<(u32, u64)>,
    /// The guest's CPUID table here.
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

impl Host {
    /// Looks at this host.
    ///
    /// # Errors
    /// When not even a tiny guest can be made.
    pub fn examine(kvm: &Kvm) -> Result<Self, Error> {
        let cpuid = guest_cpuid(kvm)?;
        Ok(Self {
            linux: runs_kernels(kvm, &cpuid)?,
            windows: windows::probe(kvm)?,
            breakpoints: support::probe(kvm)?,
            branches: branches::clock(kvm, &cpuid)?.map(|(event, _)| event.name.to_owned()),
            msrs: host_msrs(kvm, &cpuid)?,
            cpuid: cpuid.as_slice().to_vec(),
        })
    }

    /// The host as JSON: what [`Host::differences`] of another one takes.
    #[must_use]
    pub fn json(&self) -> Value {
        let verdict = |verdict: &Result<(), String>| match verdict {
            Ok(()) => json!({"works": true}),
            Err(reason) => json!({"works": false, "reason": reason}),
        };
        let row = |entry: &kvm_cpuid_entry2| {
            let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            json!([entry.function, entry.index, registers])
        };
        json!({
            "linux": verdict(&self.linux),
            "windows": verdict(&self.windows),
            "breakpoints": verdict(&self.breakpoints),
            "branches": match &self.branches {
                Ok(event) => json!({"works": true, "event": event}),
                Err(reason) => json!({"works": false, "reason": reason}),
            },
            "msrs": self.msrs,
            "cpuid": self.cpuid.iter().map(row).collect::<Vec<_>>(),
        })
    }

    /// What keeps this host and the one that gave `other` ([`Host::json`]) from being a pair, one line each.
    ///
    /// # Errors
    /// Text that is no host.
    pub fn differences(&self, other: &Value) -> Result<Vec<String>, String> {
        let windows = other["windows"]["works"]
            .as_bool()
            .ok_or("it does not say whether windows work")?;
        let rows = other["cpuid"].as_array().ok_or("it has no CPUID table")?;
        let mut differences = Vec::new();
        if windows != self.windows.is_ok() {
            let here = if windows { "the other host" } else { "this host" };
            differences.push(format!("interrupt windows are stop points on {here} only"));
        }
        let mut left: Vec<&kvm_cpuid_entry2> = self.cpuid.iter().collect();
        for row in rows {
            let (function, index, registers) = parse_row(row).ok_or_else(|| format!("{row} is no CPUID leaf"))?;
            let Some(at) = left
                .iter()
                .position(|entry| (entry.function, entry.index) == (function, index))
            else {
                differences.push(format!("CPUID leaf {function:#x}.{index} is on the other host only"));
                continue;
            };
            let own = left.swap_remove(at);
            let own = [own.eax, own.ebx, own.ecx, own.edx];
            for ((name, own), others) in ["EAX", "EBX", "ECX", "EDX"].iter().zip(own).zip(registers) {
                if own != others {
                    differences.push(format!(
                        "CPUID leaf {function:#x}.{index} {name}: {own:#010x} here, {others:#010x} there (bits {:#010x})",
                        own ^ others
                    ));
                }
            }
        }
        let msrs: Vec<(u32, u64)> =
            serde_json::from_value(other["msrs"].clone()).map_err(|_| "it does not say what its MSRs are")?;
        let (mut here, mut there) = (self.msrs.clone(), msrs.clone());
        here.retain(|msr| !msrs.contains(msr));
        there.retain(|msr| !self.msrs.contains(msr));
        for (host, (index, value)) in here
            .into_iter()
            .map(|msr| ("this", msr))
            .chain(there.into_iter().map(|msr| ("the other", msr)))
        {
            differences.push(format!("MSR {index:#x} is {value:#x} on {host} host only"));
        }
        for entry in left {
            differences.push(format!(
                "CPUID leaf {:#x}.{} is on this host only",
                entry.function, entry.index
            ));
        }
        Ok(differences)
    }
}

fn parse_row(row: &Value) -> Option<(u32, u32, [u32; 4])> {
    let number = |value: &Value| u32::try_from(value.as_u64()?).ok();
    let registers = row[2].as_array()?;
    let registers: Vec<u32> = registers.iter().map(number).collect::<Option<_>>()?;
    Some((number(&row[0])?, number(&row[1])?, registers.try_into().ok()?))
}

fn runs_kernels(kvm: &Kvm, cpuid: &CpuId) -> Result<Result<(), String>, Error> {
    let ram = Arc::new(Ram::new(4)?);
    boot::write_tables(ram.memory());
    ram.memory()
        .write_slice(&OF_A_KERNEL, GuestAddress(CODE))
        .expect("inside RAM");
    let mut vcpu = Vcpu::new(kvm, ram, cpuid, CODE)?;
    Ok(match vcpu.run_uninterrupted() {
        Ok(Exit::PortWrite { .. }) => Ok(()),
        other => Err(format!(
            "a tiny guest in ring 0 came to {other:?} instead of past a POPCNT: this KVM emulates ring 0, and not all of it"
        )),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(ebx: u32, windows: bool) -> Host {
        let leaf = |function, ebx| kvm_cpuid_entry2 {
            function,
            ebx,
            ..Default::default()
        };
        Host {
            linux: Ok(()),
            windows: if windows { Ok(()) } else { Err("late".into()) },
            breakpoints: Ok(()),
            branches: Err("none".into()),
            msrs: vec![(0x8b, 1), (0x10a, 5)],
            cpuid: vec![leaf(1, 7), leaf(7, ebx)],
        }
    }

    #[test]
    fn equal_hosts_pair_and_every_difference_is_named() {
        let here = host(0x20, true);
        assert_eq!(
            here.differences(&host(0x20, true).json()).unwrap(),
            Vec::<String>::new()
        );
        let other = host(0x60, false);
        let differences = here.differences(&other.json()).unwrap();
        assert_eq!(differences.len(), 2, "{differences:?}");
        assert!(differences[0].contains("this host only"), "{differences:?}");
        assert!(differences[1].contains("leaf 0x7.0 EBX") && differences[1].contains("bits 0x00000040"));
        let mut patched = host(0x20, true);
        patched.msrs[1].1 = 7;
        let differences = here.differences(&patched.json()).unwrap();
        assert_eq!(
            differences,
            [
                "MSR 0x10a is 0x5 on this host only",
                "MSR 0x10a is 0x7 on the other host only"
            ]
        );
        let mut fewer = host(0x20, true);
        fewer.cpuid.pop();
        assert!(here.differences(&fewer.json()).unwrap()[0].contains("this host only"));
        assert!(fewer.differences(&here.json()).unwrap()[0].contains("other host only"));
    }

    #[test]
    fn what_is_no_host_is_said_to_be_none() {
        let here = host(0, true);
        for other in [
            json!({}),
            json!({"windows": {"works": true}}),
            json!({"windows": {"works": true}, "cpuid": [[1]]}),
        ] {
            assert!(here.differences(&other).is_err(), "{other}");
        }
    }
}
