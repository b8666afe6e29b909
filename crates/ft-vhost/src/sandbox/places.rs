//! Landlock: where files may be made and opened. What is open already is not affected.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};

use super::{Sandbox, SandboxError};

/// The newest kernel whose rights are known here: what an older one lacks is left out.
const NEWEST: ABI = ABI::V6;
/// Where TAP interfaces are opened.
const TUN: &str = "/dev/net/tun";

/// Confines this thread, and those it starts; gives whether the kernel can.
pub(super) fn confine(sandbox: &Sandbox) -> Result<bool, SandboxError> {
    let socket = make_bitflags!(AccessFs::{MakeSock | RemoveFile});
    let file = make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | MakeReg | RemoveFile | ReadDir});
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::Signal)?
        .create()?;
    for path in &sandbox.sockets {
        rules = allow(rules, directory(path), socket)?;
    }
    for path in &sandbox.files {
        rules = allow(rules, directory(path), file)?;
    }
    for path in &sandbox.appended {
        rules = allow(rules, path, make_bitflags!(AccessFs::{WriteFile}))?;
    }
    if sandbox.network {
        rules = allow(
            rules,
            Path::new(TUN),
            make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev}),
        )?;
    }
    Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

fn allow(rules: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated, SandboxError> {
    // Whoever is to make a file there says better what is wrong with a place that cannot be had.
    let Ok(place) = PathFd::new(path) else { return Ok(rules) };
    Ok(rules.add_rule(PathBeneath::new(place, access))?)
}

/// The directory a file is made in.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}
