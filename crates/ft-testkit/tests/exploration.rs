//! Every order of events in small configurations, and flaws that this must find.

#![cfg(not(any(feature = "control-no-hold", feature = "control-no-arbiter")))]

use std::collections::BTreeSet;

use ft_protocol::Strength;
use ft_testkit::explore::{Flaw, Lost, PROMISE, Small};
use stateright::{Checker, Expectation, Model};

/// A pair, one failure, one break.
const SMALL: Small = Small {
    entries: 2,
    breaks: 1,
    timeouts: 1,
    crashes: 1,
    restarts: 0,
    lost: None,
    ack: Strength::Received,
    flaw: None,
};

/// What is explored. Each is about something else, since everything at once is too much.
const ALL: [Small; 10] = [
    SMALL,
    Small {
        ack: Strength::Durable,
        breaks: 0,
        ..SMALL
    },
    Small {
        ack: Strength::Replayed,
        breaks: 0,
        ..SMALL
    },
    // Resumed twice, and the end of one connection unknown to one side.
    Small {
        breaks: 2,
        crashes: 0,
        timeouts: 0,
        ..SMALL
    },
    // The survivor is lost too.
    Small {
        entries: 1,
        breaks: 0,
        timeouts: 2,
        crashes: 2,
        ..SMALL
    },
    // A host comes back, and pairs anew or is refused.
    Small {
        entries: 1,
        restarts: 1,
        ..SMALL
    },
    // A new backup; either side fails, at any moment of the synchronisation.
    REPAIR,
    // The channel breaks in the middle.
    Small {
        entries: 1,
        breaks: 1,
        crashes: 0,
        ..REPAIR
    },
    // The survivor is the one that was started as primary, and outputs wait for the replay.
    Small {
        entries: 1,
        lost: Some(Lost::Backup),
        ack: Strength::Replayed,
        ..REPAIR
    },
    // A second failure, and a third pair.
    Small {
        entries: 1,
        restarts: 1,
        ..REPAIR
    },
];

/// A side went live, the other one asks to be its backup.
const REPAIR: Small = Small {
    breaks: 0,
    lost: Some(Lost::Primary),
    ..SMALL
};

/// A failure and a break at any moment of the synchronisation: what takes a minute, and two gigabytes.
const LARGE: Small = Small { breaks: 1, ..REPAIR };

/// Explores one to the end, or to where the promise does not hold; the names of what was seen.
fn explore(small: Small) -> (Option<String>, BTreeSet<&'static str>) {
    let checker = small.checker().spawn_bfs().join();
    println!("{small:?}: {} states", checker.unique_state_count());
    let broken = checker.discovery(PROMISE).map(|path| {
        let wrong = path.last_state().wrong();
        format!("{wrong:?} after {:?}", path.into_actions())
    });
    (broken, checker.discoveries().into_keys().collect())
}

#[test]
fn the_promise_holds_in_every_order_and_everything_worth_seeing_is_seen() {
    let mut seen = BTreeSet::new();
    for small in ALL {
        let (broken, of_this) = explore(small);
        assert_eq!(broken, None, "{small:?}");
        seen.extend(of_this);
    }
    for property in SMALL.properties() {
        if property.expectation == Expectation::Sometimes {
            assert!(seen.contains(property.name), "never seen: {}", property.name);
        }
    }
}

#[test]
#[ignore = "a minute with --release, and two gigabytes"]
fn the_promise_holds_in_a_larger_configuration() {
    assert_eq!(explore(LARGE).0, None);
}

#[test]
fn every_flaw_is_found() {
    for flaw in [
        Flaw::AckUnstored,
        Flaw::AckUnflushed,
        Flaw::YesTwice,
        Flaw::Renumber,
        Flaw::WinUnsynced,
        Flaw::CountUnsynced,
        Flaw::HoldLate,
    ] {
        let is_of_repair = matches!(flaw, Flaw::WinUnsynced | Flaw::CountUnsynced | Flaw::HoldLate);
        let where_it_shows = ALL.into_iter().filter(|small| small.lost.is_some() == is_of_repair);
        let found = where_it_shows.into_iter().find_map(|small| {
            let flaw = Some(flaw);
            explore(Small { flaw, ..small }).0
        });
        println!("{flaw:?}: {found:?}");
        assert!(found.is_some(), "{flaw:?}");
    }
}
