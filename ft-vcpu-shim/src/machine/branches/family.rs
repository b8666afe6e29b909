//! Which event counts retired conditional branches on which CPU, and how late its overflow comes at most.
//!
//! The events are those of the vendors' lists (Intel: `BR_INST_RETIRED.CONDITIONAL`, `BR_INST_RETIRED.COND`; AMD: `ex_ret_cond`), for the
//! families on which rr, which replays processes by them, found them to repeat. A CPU that is not in the table is refused, not tried.

use kvm_bindings::kvm_cpuid_entry2;

/// A raw event of a PMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The vendor's name, with the family.
    pub name: &'static str,
    /// Event and unit mask.
    pub config: u64,
    /// Branches by which an overflow is late at most.
    pub margin: u32,
}

const fn event(name: &'static str, config: u64, margin: u32) -> Event {
    Event { name, config, margin }
}

/// Nehalem to Comet Lake.
const INTEL_CORE: Event = event("BR_INST_RETIRED.CONDITIONAL (Intel Core)", 0x01c4, 100);
/// Ice Lake to Rocket Lake.
const INTEL_ICE_LAKE: Event = event("BR_INST_RETIRED.COND (Intel Ice Lake)", 0x11c4, 100);
/// Sapphire and Emerald Rapids.
const INTEL_SAPPHIRE_RAPIDS: Event = event("BR_INST_RETIRED.COND (Intel Sapphire Rapids)", 0x11c4, 125);
/// All Zen. Its overflows are late by thousands of branches at times, without a bound that is known.
const AMD_ZEN: Event = event("ex_ret_cond (AMD Zen)", 0x00d1, 10_000);

/// The event of the CPU that this CPUID table (leaves 0 and 1) describes; otherwise why there is none.
///
/// # Errors
/// A CPU of no known family.
pub fn event_of(cpuid: &[kvm_cpuid_entry2]) -> Result<Event, String> {
    let leaf = |function| cpuid.iter().find(|entry| entry.function == function);
    let (Some(vendor), Some(signature)) = (leaf(0), leaf(1)) else {
        return Err("CPUID does not say which CPU this is; use state deltas".into());
    };
    let vendor: Vec<u8> = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
    let (family, model) = family_and_model(signature.eax);
    let found = match (vendor.as_slice(), family) {
        (b"GenuineIntel", 6) => intel(model),
        (b"AuthenticAMD", 0x17 | 0x19 | 0x1a) => Some(AMD_ZEN),
        _ => None,
    };
    found.ok_or_else(|| {
        format!(
            "no event is known that counts branches alike on every {} of family {family:#x}, model {model:#x}; use state deltas",
            String::from_utf8_lossy(&vendor)
        )
    })
}

fn family_and_model(signature: u32) -> (u32, u32) {
    let base = signature >> 8 & 0xf;
    let family = if base == 0xf {
        base + (signature >> 20 & 0xff)
    } else {
        base
    };
    (family, signature >> 4 & 0xf | signature >> 12 & 0xf0)
}

/// Cores only: not the Atoms, and not the CPUs with cores of two kinds, whose counters are two as well.
fn intel(model: u32) -> Option<Event> {
    match model {
        0x1a | 0x1e | 0x2e | 0x25 | 0x2c | 0x2f // Nehalem, Westmere
        | 0x2a | 0x2d | 0x3a | 0x3e // Sandy Bridge, Ivy Bridge
        | 0x3c | 0x3f | 0x45 | 0x46 | 0x3d | 0x47 | 0x4f | 0x56 // Haswell, Broadwell
        | 0x4e | 0x5e | 0x55 | 0x8e | 0x9e | 0xa5 | 0xa6 // Skylake, Kaby Lake, Comet Lake
            => Some(INTEL_CORE),
        0x7e | 0x6a | 0x8c | 0x8d | 0xa7 => Some(INTEL_ICE_LAKE),
        0x8f | 0xcf => Some(INTEL_SAPPHIRE_RAPIDS),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(vendor: &[u8; 12], signature: u32) -> [kvm_cpuid_entry2; 2] {
        let word = |at: usize| u32::from_le_bytes(*vendor[at..].first_chunk().unwrap());
        [
            kvm_cpuid_entry2 {
                function: 0,
                ebx: word(0),
                edx: word(4),
                ecx: word(8),
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                function: 1,
                eax: signature,
                ..Default::default()
            },
        ]
    }

    #[test]
    fn every_known_family_has_its_event_and_margin() {
        for (vendor, signature, config, margin) in [
            (b"GenuineIntel", 0x0001_06a5, 0x01c4, 100),    // Nehalem
            (b"GenuineIntel", 0x0003_06f2, 0x01c4, 100),    // Haswell-EP
            (b"GenuineIntel", 0x0005_0657, 0x01c4, 100),    // Cascade Lake
            (b"GenuineIntel", 0x0006_06a6, 0x11c4, 100),    // Ice Lake-SP
            (b"GenuineIntel", 0x0008_06f8, 0x11c4, 125),    // Sapphire Rapids
            (b"AuthenticAMD", 0x0080_0f12, 0x00d1, 10_000), // Naples
            (b"AuthenticAMD", 0x0083_0f10, 0x00d1, 10_000), // Rome
            (b"AuthenticAMD", 0x00a2_0f12, 0x00d1, 10_000), // Zen 3
            (b"AuthenticAMD", 0x00b0_0f21, 0x00d1, 10_000), // Zen 5
        ] {
            let event = event_of(&cpu(vendor, signature)).unwrap();
            assert_eq!((event.config, event.margin), (config, margin), "{signature:#x}");
        }
    }

    #[test]
    fn other_cpus_are_refused_by_name() {
        for (vendor, signature, named) in [
            (b"GenuineIntel", 0x0009_0672, "model 0x97"), // Alder Lake: cores of two kinds
            (b"GenuineIntel", 0x0000_06f6, "model 0xf"),  // Merom
            (b"GenuineIntel", 0x0005_06c9, "model 0x5c"), // Goldmont
            (b"AuthenticAMD", 0x0060_0f12, "family 0x15"), // Bulldozer
            (b"AuthenticAMD", 0x0000_0f61, "family 0xf"), // QEMU's
            (b"CentaurHauls", 0x0000_06fa, "CentaurHauls"),
        ] {
            let reason = event_of(&cpu(vendor, signature)).unwrap_err();
            assert!(
                reason.contains(named) && reason.contains("use state deltas"),
                "{reason}"
            );
        }
        assert!(event_of(&[]).is_err());
    }
}
