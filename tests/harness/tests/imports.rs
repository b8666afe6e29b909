//! Imports go one way: daemons → ft-vhost → ft-client → ft-protocol, and no daemon imports another.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Everything of this workspace that each crate may import. Development dependencies are free: tests may look at anything.
const ALLOWED: [(&str, &[&str]); 11] = [
    ("ft-protocol", &[]),
    ("ft-client", &["ft-protocol"]),
    ("ft-vhost", &["ft-client", "ft-protocol"]),
    ("ft-testkit", &["ft-protocol"]),
    ("ft-log", &["ft-client", "ft-protocol"]),
    ("vhost-ft-blk", &["ft-vhost", "ft-client", "ft-protocol"]),
    ("vhost-ft-net", &["ft-vhost", "ft-client", "ft-protocol"]),
    ("ft-vcpu-shim", &["ft-vhost", "ft-client", "ft-protocol"]),
    ("ft-harness", &["ft-client", "ft-protocol"]),
    ("ledger-core", &[]),
    ("ledger-linux", &["ledger-core"]),
];

/// Which crates of the workspace each of its crates imports, outside tests.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let name = |value: &serde_json::Value| value["name"].as_str().expect("a name").to_owned();
    let members: BTreeSet<String> = packages.iter().map(name).collect();
    packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().expect("dependencies");
            let imported = dependencies
                .iter()
                .filter(|dependency| dependency["kind"] != "dev")
                .map(name);
            (name(package), imported.filter(|name| members.contains(name)).collect())
        })
        .collect()
}

#[test]
fn imports_go_one_way() {
    let imports = imports();
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into_iter().collect();
    for (name, imported) in &imports {
        let allowed = allowed
            .get(name.as_str())
            .unwrap_or_else(|| panic!("{name} is new: say above what it may import"));
        for import in imported {
            assert!(allowed.contains(&import.as_str()), "{name} must not import {import}");
        }
    }
    assert_eq!(imports.len(), ALLOWED.len(), "a crate listed above is gone");
}

#[test]
fn protocol_core_does_no_io() {
    let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/ft-protocol/src");
    let mut files = 0;
    let mut directories = vec![source];
    let mut paths = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("the core's sources") {
            let path = entry.expect("an entry").path();
            let kind = if path.is_dir() { &mut directories } else { &mut paths };
            kind.push(path);
        }
    }
    for path in paths {
        let text = std::fs::read_to_string(&path).expect("a source file");
        for forbidden in [
            "std::fs",
            "std::net",
            "std::thread",
            "std::time::Instant",
            "SystemTime",
            "rand::",
            "unsafe {",
        ] {
            assert!(!text.contains(forbidden), "{} uses {forbidden}", path.display());
        }
        files += 1;
    }
    assert!(files > 5, "the core is where it is looked for");
}
