//! `ft-vcpu-shim check` as an operator runs it: a host pairs with itself, and not with one of another CPU.

use std::process::{Command, Output};

use serde_json::{Value, json};

fn check(flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ft-vcpu-shim"));
    command.arg("check").args(flags).output().unwrap()
}

#[test]
fn a_host_pairs_with_itself_and_not_with_another_cpu() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.json");
    let with = file.to_str().unwrap();
    let output = check(&["--json"]);
    assert!(output.status.success(), "{output:?}");
    std::fs::write(&file, &output.stdout).unwrap();
    let output = check(&["--with", with]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("can be primary and backup"), "{text}");
    // Whatever this host has: the operator is told, and not left to find out by --positions branches.
    assert!(text.contains("--positions branches"), "{text}");

    let mut host: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let ecx = host["cpuid"][1][2][2].as_u64().unwrap();
    host["cpuid"][1][2][2] = json!(ecx ^ 1);
    std::fs::write(&file, host.to_string()).unwrap();
    let output = check(&["--with", with]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("ECX") && text.contains("bits 0x00000001"), "{text}");
}

#[test]
fn a_file_that_is_no_host_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.json");
    std::fs::write(&file, "{}").unwrap();
    for path in [file.to_str().unwrap(), "/nonexistent"] {
        let output = check(&["--with", path]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{errors}");
        assert!(errors.contains("--with"), "{errors}");
    }
}
