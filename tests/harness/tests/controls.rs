//! Negative controls: with a promise switched off the witness must not be content. Each scenario also runs on the shipped
//! build, which must pass it: it is the promise that makes the difference.

mod lab;

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ft_harness::events::{CONSOLE, Event};
use ft_harness::faults::{Fault, FaultPlan, Moment};
use ft_harness::pair::{Pair, PairSetup};
use ft_harness::process::{EXITED, Exit};
use ft_harness::roles::{FT_LOG, Roles, SHIM};
use ft_harness::scenario::{Outcome, Setup};
use ft_harness::topology::HostId;
use lab::{Build, cut_then_kill, run, setup};

fn partition(build: Build) -> Setup {
    let moment = Moment {
        answers: 50,
        offset: Duration::ZERO,
    };
    setup(build, 12, FaultPlan::At(Fault::Partition, moment))
}

fn live_sides(outcome: &Outcome) -> usize {
    let since = outcome.timeline.fault_ns.expect("the fault struck");
    let live = |host: &HostId| {
        outcome
            .events
            .iter()
            .any(|event| event.t_ns >= since && event.is(*host, FT_LOG, "go_live"))
    };
    HostId::BOTH.iter().filter(|host| live(host)).count()
}

#[test]
fn held_outputs_survive_a_cut_before_the_kill() {
    let outcome = run(&cut_then_kill(Build::Release), |outcome| outcome.report.good());
    assert_eq!(outcome.report.lost_acknowledged, 0);
}

#[test]
fn without_holding_acknowledged_records_are_lost() {
    let outcome = run(&cut_then_kill(Build::Variant("control-no-hold")), |outcome| {
        outcome.report.lost_acknowledged > 0
    });
    assert!(!outcome.report.good() && !outcome.report.chain_ok);
}

#[test]
fn partition_leaves_one_live_side() {
    let outcome = run(&partition(Build::Release), |outcome| outcome.report.good());
    assert_eq!(live_sides(&outcome), 1);
}

#[test]
fn without_the_arbiter_both_sides_go_live() {
    let outcome = run(&partition(Build::Variant("control-no-arbiter")), |outcome| {
        live_sides(outcome) == 2
    });
    assert!(!outcome.report.good());
}

/// Builds the guest that looks at buffers the card still owns.
fn build_watcher(directory: &Path) -> PathBuf {
    let elf = directory.join("watcher");
    let built = Command::new("cc")
        .args([
            "-nostdlib",
            "-static",
            "-no-pie",
            "-Wl,--build-id=none",
            "-Wl,-Ttext-segment=0x200000",
        ])
        .args(["-Wl,-z,noexecstack", "-o"])
        .arg(&elf)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests/watcher.S"))
        .status()
        .expect("cc runs");
    assert!(built.success(), "the watcher guest does not assemble");
    elf
}

/// Runs the watcher on both hosts and sends it frames until it ends; what happened.
fn watch(build: Build) -> Vec<Event> {
    let directory = tempfile::tempdir().expect("a directory");
    let setup = PairSetup {
        bin_dir: build.directory(),
        guest: build_watcher(directory.path()).into(),
        ft_log_arguments: Vec::new(),
        shim_arguments: Vec::new(),
        crash: None,
    };
    let deadline = Instant::now() + setup.guest.patience().boot;
    let mut pair = Pair::new(setup, &directory.path().join("run")).expect("a network");
    pair.start(deadline).expect("it starts");
    let said = |event: &Event| event.source == CONSOLE && event.text("text") == Some("watching");
    pair.wait_for("the watcher's console line", HostId::A, SHIM, deadline, |events| {
        events.iter().any(said).then_some(())
    })
    .expect("the guest comes up");

    let sender = pair
        .topology()
        .client()
        .run(|| UdpSocket::bind("10.77.0.1:0"))
        .expect("a socket");
    sender.set_broadcast(true).expect("broadcasts");
    let ended = |events: &[Event]| {
        let exits = events
            .iter()
            .filter(|event| event.source == SHIM && event.name == EXITED)
            .count();
        (exits == 2 || events.iter().any(|event| event.name == "diverged")).then_some(())
    };
    while Instant::now() < deadline {
        sender.send_to(b"look", "10.77.0.255:9").expect("sent");
        // A few rounds of the guest between two frames.
        if pair
            .events()
            .wait(Instant::now() + Duration::from_millis(100), ended, |_| None)
            .is_ok()
        {
            return pair.events().all();
        }
    }
    panic!("the watcher did not end; {}", pair.log(HostId::A, SHIM));
}

fn diverged(events: &[Event]) -> bool {
    events.iter().any(|event| event.is(HostId::B, SHIM, "diverged"))
}

#[test]
fn with_bounce_buffers_no_guest_sees_data_before_its_delivery() {
    let events = watch(Build::Release);
    assert!(!diverged(&events));
    for id in HostId::BOTH {
        assert_eq!(Roles::new(&events, 0).exit(id, SHIM), Some(Exit::Code(0)), "host {id}");
    }
}

#[test]
fn without_bounce_buffers_the_replicas_part() {
    assert!(diverged(&watch(Build::Variant("control-direct-delivery"))));
}
