//! Engine `device`: two daemons and two ft-logs, driven by a frontend without a VM.

#![cfg_attr(feature = "control-no-hold", allow(dead_code, reason = "the control has one test"))]

mod guest;
mod host;
mod model;
#[cfg(not(feature = "control-no-hold"))]
mod promises;
#[cfg(not(feature = "control-no-hold"))]
mod resync;
#[cfg(not(feature = "control-no-hold"))]
mod standing;
#[path = "../../../crates/ft-vhost/tests/support/mod.rs"]
mod support;

/// A build whose completions do not wait loses what the guest was told, and the judge sees it.
#[cfg(feature = "control-no-hold")]
#[test]
fn completing_before_the_commit_is_caught() {
    let host::Pair {
        primary,
        mut backup,
        arbiter: _arbiter,
        ..
    } = host::Pair::start(&host::SUSPICIOUS);
    let mut guest = guest::Guest::attach(&primary);
    guest.write(8, 8);
    guest.finish();
    primary.log.stop();
    guest.write(40, 8);
    guest.finish();
    primary.kill(false);
    backup.blk.wait_line("listening");
    let wrong = guest.model.violations(&backup.content());
    assert_eq!(
        wrong.len(),
        8,
        "eight sectors that the guest was told of are lost: {wrong:?}"
    );
}
