//! The directory arbiter gives a generation to exactly one asker, and an arbiter that is away holds outputs and nothing else.

use std::{path::Path, time::Duration};

use ft_client::events::monotonic_ns;
use ft_log::{
    arbiter::{Answer, Arbiter, ArbiterAddress},
    token::{Ring, Token},
    uring::Uring,
};
use ft_protocol::{Generation, Lsn, Role, Verdict};
use nix::sys::signal::Signal;

use crate::world::{DEADLINE, SUSPICIOUS, VM, World};

/// Asks and waits for the answer.
fn ask(arbiter: &mut Arbiter, ring: &mut Ring, generation: u32) -> Answer {
    arbiter.ask(ring, Generation(generation), monotonic_ns()).unwrap();
    let deadline = monotonic_ns() + DEADLINE.as_nanos() as u64;
    loop {
        assert!(monotonic_ns() < deadline, "no answer");
        ring.enter(Some(Duration::from_secs(1).as_nanos() as u64)).unwrap();
        while let Some(done) = ring.next_completion() {
            if done.token == Token::Arbiter
                && let Some(answer) = arbiter.completed(ring, done).unwrap()
            {
                // What is left is cleaned up behind the answer.
                while ring.in_flight() > 0 {
                    ring.enter(Some(DEADLINE.as_nanos() as u64)).unwrap();
                    while ring.next_completion().is_some() {}
                }
                return answer;
            }
        }
    }
}

fn arbiter(path: &Path, host: &str) -> (Arbiter, Ring) {
    (
        Arbiter::new(&ArbiterAddress::Directory(path.to_owned()), VM, host).unwrap(),
        Uring::new().unwrap(),
    )
}

fn names(path: &Path) -> Vec<String> {
    let names = std::fs::read_dir(path).unwrap();
    let mut names: Vec<_> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn of_many_askers_exactly_one_wins_each_generation() {
    let directory = tempfile::tempdir().unwrap();
    let generations = 1..=20;
    let winners: Vec<Vec<bool>> = std::thread::scope(|scope| {
        let askers: Vec<_> = (0..4)
            .map(|number| {
                let (path, generations) = (directory.path(), generations.clone());
                scope.spawn(move || {
                    let (mut arbiter, mut ring) = arbiter(path, &format!("host-{number}"));
                    let mut won = |generation| ask(&mut arbiter, &mut ring, generation).verdict == Verdict::Won;
                    generations.map(&mut won).collect()
                })
            })
            .collect();
        askers.into_iter().map(|asker| asker.join().unwrap()).collect()
    });
    for generation in 0..20 {
        let count = winners.iter().filter(|won| won[generation]).count();
        assert_eq!(count, 1, "generation {}", generation + 1);
    }
    let mut expected: Vec<_> = generations.map(|generation| format!("{VM}.g{generation}")).collect();
    expected.sort();
    assert_eq!(names(directory.path()), expected, "something was left behind");
}

#[test]
fn a_winner_that_asks_again_has_still_won_and_a_new_process_has_not() {
    let directory = tempfile::tempdir().unwrap();
    let (mut first, mut ring) = arbiter(directory.path(), "A");
    for _ in 0..2 {
        assert_eq!(ask(&mut first, &mut ring, 1).verdict, Verdict::Won);
    }
    // The same host, another process: it must not run the VM a second time.
    let (mut second, mut ring) = arbiter(directory.path(), "A");
    let answer = ask(&mut second, &mut ring, 1);
    assert_eq!(answer.verdict, Verdict::Lost);
    assert!(answer.detail.contains("\"A\""), "{}", answer.detail);
    assert_eq!(ask(&mut second, &mut ring, 2).verdict, Verdict::Won);
    let claim = std::fs::read_to_string(directory.path().join("ledger.g2")).unwrap();
    let claim: serde_json::Value = serde_json::from_str(&claim).unwrap();
    assert_eq!((&claim["host"], &claim["generation"]), (&"A".into(), &2.into()));
    assert!(claim["wall_ns"].is_u64());
}

#[test]
fn whatever_stands_in_the_place_of_a_claim_is_somebody_elses() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("ledger.g1"), "").unwrap();
    std::fs::write(directory.path().join("ledger.g2"), [0xff; 9000]).unwrap();
    let (mut asker, mut ring) = arbiter(directory.path(), "A");
    for generation in [1, 2] {
        assert_eq!(ask(&mut asker, &mut ring, generation).verdict, Verdict::Lost);
    }
}

#[test]
fn a_directory_that_is_away_is_unreachable_until_it_is_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shared");
    let (mut asker, mut ring) = arbiter(&path, "A");
    let answer = ask(&mut asker, &mut ring, 1);
    assert_eq!(answer.verdict, Verdict::Unreachable);
    assert!(answer.detail.contains("shared"), "{}", answer.detail);
    std::fs::create_dir(&path).unwrap();
    assert_eq!(ask(&mut asker, &mut ring, 1).verdict, Verdict::Won);
}

#[test]
fn without_its_arbiter_a_survivor_holds_outputs_and_asks_on() {
    let world = World::new();
    let (mut a, b) = world.pair_with(SUSPICIOUS);
    let committed = a.append(10);
    a.wait_committed(committed);
    let (here, away) = (world.path("arbiter"), world.path("away"));
    std::fs::rename(&here, &away).unwrap();
    b.daemon.signal(Signal::SIGKILL);
    let answer = loop {
        let answer = a.daemon.wait_event("arbiter");
        if answer["generation"] == 2 {
            break answer;
        }
    };
    assert_eq!(answer["verdict"], "unreachable");
    // The guest goes on, its outputs do not leave.
    let last = a.append(100);
    let mut asked = 0;
    while asked < 2 {
        asked += u32::from(a.daemon.wait_event("log")["entries"] == last.0);
    }
    assert_eq!(a.region().role(), Role::Arbitrating);
    assert_eq!(a.region().committed().lsn(), committed);
    std::fs::rename(&away, &here).unwrap();
    a.wait_role(Role::Live);
    assert_eq!(a.region().committed().lsn(), Lsn::MAX);
    a.daemon.wait_event("go_live");
}

#[test]
fn a_vm_that_was_started_before_is_not_started_again() {
    let world = World::new();
    std::fs::write(world.path("arbiter").join("ledger.g1"), "{\"host\":\"B\"}").unwrap();
    let mut a = world.host_with(crate::world::HostId::A, &[]);
    assert_eq!(a.daemon.wait_code(), 4);
    assert!(a.daemon.logged.contains("already claimed"), "{}", a.daemon.logged);
}
