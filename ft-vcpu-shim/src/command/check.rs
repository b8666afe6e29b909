//! `ft-vcpu-shim check`: what this host allows, and whether it can pair with another one. Before a VM is put on it.

use std::{fmt::Write as _, path::PathBuf};

use clap::Args;
use serde_json::Value;

use crate::{
    error::Error,
    machine::{host::Host, vcpu::open_kvm},
};

/// Flags of `check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Prints the host as JSON: what --with of the other host takes.
    #[arg(long, conflicts_with = "with")]
    json: bool,
    /// Says whether this host and the one whose `check --json` is in this file can be a pair.
    #[arg(long, value_name = "FILE")]
    with: Option<PathBuf>,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Findings {
    /// For the operator.
    pub text: String,
    /// Whether the answer is yes: the two hosts can pair; without --with, always.
    pub yes: bool,
}

/// Examines this host.
///
/// # Errors
/// No KVM, or a file of another host that cannot be read.
pub fn check(args: &CheckArgs) -> Result<Findings, Error> {
    let host = Host::examine(&open_kvm()?)?;
    if args.json {
        return Ok(Findings {
            text: format!("{}\n", host.json()),
            yes: true,
        });
    }
    let Some(path) = &args.with else {
        return Ok(Findings {
            text: describe(&host),
            yes: true,
        });
    };
    let unusable = |reason: String| {
        Error::environment(format!(
            "{} is not what `check --json` of the other host prints: {reason}. Check --with",
            path.display()
        ))
    };
    let other = std::fs::read_to_string(path)
        .map_err(|source| Error::environment(format!("cannot read {}: {source}. Check --with", path.display())))?;
    let other: Value = serde_json::from_str(&other).map_err(|error| unusable(error.to_string()))?;
    let differences = host.differences(&other).map_err(unusable)?;
    let mut text = describe(&host);
    if differences.is_empty() {
        text.push_str("pair: these two hosts can be primary and backup of each other\n");
    } else {
        text.push_str("pair: not these two hosts, a backup would be refused:\n");
        for difference in &differences {
            let _ = writeln!(text, "  {difference}");
        }
    }
    Ok(Findings {
        text,
        yes: differences.is_empty(),
    })
}

fn describe(host: &Host) -> String {
    let mut text = String::new();
    let mut row = |what: &str, verdict: &Result<(), String>, yes: &str, no: &str| {
        let _ = match verdict {
            Ok(()) => writeln!(text, "{what}: {yes}"),
            Err(reason) => writeln!(text, "{what}: {no}\n  {reason}"),
        };
    };
    row(
        "stock Linux guests",
        &host.linux,
        "yes",
        "no, bundled guests only: load kvm_intel or kvm_amd, or use scripts/lab",
    );
    row(
        "interrupt windows",
        &host.windows,
        "are stop points: an interrupt enters a busy guest as soon as it can",
        "are none: an interrupt waits for the guest's next exit, or for a state delta",
    );
    row(
        "breakpoints, for gdb",
        &host.breakpoints,
        "work",
        "not in ring 3: gdb moves from stop to stop there",
    );
    text.push_str("places between stops: state deltas (the vCPU and the pages written, in the log)\n");
    let _ = match &host.branches {
        Ok(event) => writeln!(
            text,
            "  or, with --positions branches on both hosts, a counter of branches: {event}, which passed its test"
        ),
        Err(reason) => writeln!(text, "  --positions branches is refused here: {reason}"),
    };
    text.push_str(
        "\
time stamp counter: hidden by CPUID; RDTSC and RDTSCP in the kernel and in the initrd's modules are answered from the log, so is RDMSR
risks, found only as divergence: RDTSC, RDTSCP, RDRAND and RDSEED of user code that does not ask CPUID, and of modules loaded from a disk
",
    );
    let _ = writeln!(
        text,
        "CPUID: {} leaves, compared with those of a backup before it is taken",
        host.cpuid.len()
    );
    text
}
