//! A live side takes a new backup.

use super::*;

const FINGERPRINT: [u8; 32] = [1; 32];
const SURVIVOR: usize = 0;
const JOINER: usize = 1;

/// A survivor and a new backup, and a channel between them that loses nothing while it is there.
struct Two {
    sides: [Replica; 2],
    is_up: bool,
    now_ns: u64,
    /// What was done that is neither sent nor appended.
    done: Vec<(usize, Action)>,
    synced: Option<Lsn>,
}

impl Two {
    fn new() -> Self {
        Self {
            sides: [survivor(), joiner()],
            is_up: false,
            now_ns: 1,
            done: Vec::new(),
            synced: None,
        }
    }

    /// One event, and everything that follows from it on both sides.
    fn event(&mut self, at: usize, event: Event) {
        let mut actions = Vec::new();
        self.sides[at].step(self.now_ns, event, &mut actions);
        for action in actions {
            self.perform(at, action);
        }
    }

    fn perform(&mut self, at: usize, action: Action) {
        let peer = 1 - at;
        let generation = self.sides[at].generation();
        match action {
            // As a listener does with a connection that is no channel yet.
            Action::Send(Message::Hello(hello))
                if at == JOINER && self.is_up && self.sides[peer].refusal(generation, &hello).is_some() =>
            {
                let reason = "no".into();
                let message = Message::Refuse { reason };
                self.is_up = false;
                self.event(at, Event::Message { generation, message });
                self.event(at, Event::ChannelDown);
            }
            Action::Send(message) if self.is_up => self.event(peer, Event::Message { generation, message }),
            Action::SendEntries { through } if self.is_up => {
                let from = self.sides[peer].last().next();
                let instance = self.sides[peer].instance();
                if let Some(lsn) = self.synced.filter(|lsn| (from..=through).contains(lsn)) {
                    self.event(peer, Event::SyncedEntry { lsn, instance });
                }
                self.event(
                    peer,
                    Event::Received {
                        generation,
                        from,
                        through,
                    },
                );
            }
            Action::AppendSynced { instance } => {
                let lsn = self.sides[at].last().next();
                self.synced = Some(lsn);
                self.event(at, Event::SyncedEntry { lsn, instance });
                self.event(at, Event::Appended { through: lsn });
            }
            Action::CloseChannel | Action::BreakChannel if self.is_up => {
                self.is_up = false;
                self.event(at, Event::ChannelDown);
                self.event(peer, Event::ChannelDown);
            }
            other => self.done.push((at, other)),
        }
    }

    fn connect(&mut self) {
        self.is_up = true;
        self.event(SURVIVOR, Event::ChannelUp);
        self.event(JOINER, Event::ChannelUp);
    }

    fn cut(&mut self) {
        self.is_up = false;
        self.event(SURVIVOR, Event::ChannelDown);
        self.event(JOINER, Event::ChannelDown);
    }

    fn append(&mut self) {
        let through = self.sides[SURVIVOR].last().next();
        self.event(SURVIVOR, Event::Appended { through });
    }

    /// Everything up to where outputs are held.
    fn until_held(&mut self) {
        self.connect();
        self.append();
        self.event(JOINER, Event::Adopted);
        let generation = Generation(2);
        assert!(self.did(SURVIVOR, &Action::Hold { after: Lsn(6) }));
        self.event(SURVIVOR, Event::Holding { generation });
    }

    fn did(&self, at: usize, action: &Action) -> bool {
        self.done.iter().any(|(by, done)| *by == at && done == action)
    }

    fn commits(&self) -> Vec<Lsn> {
        let commit = |(by, action): &(usize, Action)| match action {
            Action::Commit(committed) if *by == SURVIVOR => Some(committed.lsn()),
            _ => None,
        };
        self.done.iter().filter_map(commit).collect()
    }

    fn asked(&self) -> bool {
        let asks = |(_, action): &(usize, Action)| matches!(action, Action::AskArbiter { .. });
        self.done.iter().any(asks)
    }

    fn roles(&self) -> [Role; 2] {
        [SURVIVOR, JOINER].map(|at| self.sides[at].role())
    }

    /// Silence, as one of them notices it.
    fn silence(&mut self, at: usize) {
        self.now_ns += 20 * INTERVAL;
        self.event(at, Event::Tick);
    }
}

/// Live in generation 2, five entries behind it.
fn survivor() -> Replica {
    let mut primary = recording();
    step(&mut primary, 0, Event::Appended { through: Lsn(5) });
    silence(&mut primary);
    won(&mut primary, 2);
    assert_eq!((primary.role(), primary.connects()), (Role::Live, false));
    primary
}

fn joiner_of(config: Config) -> Replica {
    let mut joiner = Replica::new(config, 0);
    let fingerprint = FINGERPRINT;
    assert_eq!(
        step(
            &mut joiner,
            0,
            Event::LocalReady {
                fingerprint,
                shape: Some(fingerprint)
            }
        ),
        []
    );
    joiner
}

fn joiner() -> Replica {
    joiner_of(Config {
        joins: true,
        instance: 70,
        ..config(false)
    })
}

fn asks_to_join() -> Hello {
    Hello {
        instance: 70,
        standing: Standing::Nothing,
        ..hello(false, 0)
    }
}

#[test]
fn a_survivor_holds_before_its_new_backup_may_take_over_and_is_a_primary_again_when_that_is_acknowledged() {
    let mut two = Two::new();
    two.connect();
    assert_eq!(two.roles(), [Role::Live, Role::Replaying]);
    for at in [SURVIVOR, JOINER] {
        assert!(two.did(at, &Action::Synchronise { start: Lsn(5) }));
        assert_eq!(two.sides[at].generation(), Generation(2));
    }
    two.append();
    assert_eq!(two.sides[JOINER].progress().received, Lsn(6));
    assert_eq!(two.commits(), [], "what it acknowledges is nothing to wait for");
    assert!(two.sides[JOINER].awaits_state() && !two.sides[JOINER].is_protected());

    two.event(JOINER, Event::Adopted);
    assert_eq!(two.roles(), [Role::Recording, Role::Replaying]);
    assert!(two.did(SURVIVOR, &Action::Hold { after: Lsn(6) }));
    // Entries that are written before every device holds.
    two.append();
    assert_eq!(two.commits(), []);
    assert!(!two.sides[JOINER].is_protected());

    let generation = Generation(2);
    two.event(SURVIVOR, Event::Holding { generation });
    assert_eq!(two.synced, Some(Lsn(8)));
    assert!(two.sides.iter().all(Replica::is_protected));
    assert_eq!(two.commits(), [Lsn(8)]);
    two.append();
    assert_eq!(two.commits(), [Lsn(8), Lsn(9)]);

    // The next failure is one like the first.
    two.event(JOINER, Event::Consumed { through: Lsn(9) });
    two.silence(JOINER);
    assert!(two.did(
        JOINER,
        &Action::AskArbiter {
            generation: Generation(3)
        }
    ));
    won(&mut two.sides[JOINER], 3);
    let new = &two.sides[JOINER];
    assert_eq!((new.role(), new.leads(), new.connects()), (Role::Live, true, false));
}

#[test]
fn synced_is_acknowledged_as_strongly_as_outputs_wait_for() {
    let mut two = Two::new();
    two.sides[SURVIVOR].ack = Strength::Replayed;
    two.until_held();
    assert!(two.sides[JOINER].is_protected(), "it has everything");
    assert!(!two.sides[SURVIVOR].is_protected());
    two.event(JOINER, Event::Consumed { through: Lsn(6) });
    assert_eq!(two.commits(), []);
    two.event(JOINER, Event::Consumed { through: Lsn(7) });
    assert_eq!(two.commits(), [Lsn(7)]);
    assert!(two.sides[SURVIVOR].is_protected());
}

#[test]
fn before_it_is_synchronised_a_backup_that_loses_the_survivor_forgets_everything_and_asks_anew() {
    for has_state in [false, true] {
        let mut two = Two::new();
        two.connect();
        two.append();
        two.cut();
        if has_state {
            two.event(JOINER, Event::Adopted);
        }
        two.silence(JOINER);
        assert!(!two.asked());
        let joiner = &two.sides[JOINER];
        assert_eq!(
            (joiner.role(), joiner.generation(), joiner.last()),
            (Role::Pairing, Generation(0), Lsn(0))
        );
        assert_eq!(
            joiner.instance(),
            71,
            "what is under way to its former self is not its own"
        );
        // The survivor still believes in the former attempt.
        two.connect();
        assert_eq!(two.roles(), [Role::Live, Role::Replaying]);
        assert!(
            two.done
                .iter()
                .any(|(_, action)| matches!(action, Action::GiveUp { .. }))
        );
        assert!(two.did(JOINER, &Action::Synchronise { start: Lsn(6) }));
    }
}

#[test]
fn a_backup_that_is_not_synchronised_is_given_up_without_the_arbiter() {
    let mut two = Two::new();
    two.connect();
    two.append();
    two.cut();
    two.silence(SURVIVOR);
    assert!(!two.asked());
    assert_eq!(
        (two.sides[SURVIVOR].role(), two.sides[SURVIVOR].generation()),
        (Role::Live, Generation(2))
    );
    assert!(!two.sides[SURVIVOR].keeps_entries());
    assert_eq!(two.sides[SURVIVOR].deadline_ns(), None);
    // What that backup has is of no attempt any more: it is refused, and begins anew.
    two.connect();
    assert_eq!(two.roles()[JOINER], Role::Pairing);
    two.connect();
    assert_eq!(two.roles(), [Role::Live, Role::Replaying]);
}

#[test]
fn from_holding_on_the_loss_of_the_backup_is_the_arbiters_to_settle() {
    for is_appended in [false, true] {
        let mut two = Two::new();
        two.connect();
        two.event(JOINER, Event::Adopted);
        two.cut();
        if is_appended {
            let generation = Generation(2);
            two.event(SURVIVOR, Event::Holding { generation });
        }
        two.silence(SURVIVOR);
        assert_eq!(two.roles()[SURVIVOR], Role::Arbitrating);
        assert!(two.did(
            SURVIVOR,
            &Action::AskArbiter {
                generation: Generation(3)
            }
        ));
        assert_eq!(two.commits(), []);
        // Late: the devices hold, and it is no matter any more.
        let generation = Generation(2);
        if !is_appended {
            two.event(SURVIVOR, Event::Holding { generation });
            assert_eq!(two.synced, None);
        }
        let actions = won(&mut two.sides[SURVIVOR], 3);
        assert!(actions.contains(&Action::Commit(Committed::through(Lsn::MAX))));
        assert_eq!(two.roles()[SURVIVOR], Role::Live);
    }
}

#[test]
fn an_attempt_goes_on_over_a_channel_that_breaks() {
    let mut two = Two::new();
    two.connect();
    two.cut();
    two.append();
    two.event(JOINER, Event::Adopted);
    assert_eq!(two.roles(), [Role::Live, Role::Replaying]);
    two.connect();
    assert!(two.did(SURVIVOR, &Action::Rewind { after: Lsn(5) }));
    assert_eq!(two.sides[JOINER].last(), Lsn(6));
    assert!(two.did(SURVIVOR, &Action::Hold { after: Lsn(5) }) || two.did(SURVIVOR, &Action::Hold { after: Lsn(6) }));
    two.cut();
    let generation = Generation(2);
    two.event(SURVIVOR, Event::Holding { generation });
    assert!(!two.sides[JOINER].is_protected());
    two.connect();
    assert!(two.sides.iter().all(Replica::is_protected));
}

#[test]
fn who_is_not_taken_is_told_why_and_the_survivor_goes_on() {
    let nothing = Generation(0);
    let refusal = |replica: &Replica, generation, hello: &Hello| replica.refusal(generation, hello).unwrap_or_default();
    let live = survivor();
    assert_eq!(live.refusal(nothing, &asks_to_join()), None);

    // The loser of the arbitration, as the primary or the backup that it was.
    let loser = Hello {
        instance: 2,
        ..hello(false, 4)
    };
    assert!(refusal(&live, Generation(1), &loser).contains("Live and takes no peer"));
    // Somebody with a history does not say that he has none.
    assert!(refusal(&live, Generation(1), &asks_to_join()).contains("of no generation"));
    let versions = Versions { oldest: 3, newest: 3 };
    let older = Hello {
        versions,
        ..asks_to_join()
    };
    assert!(refusal(&live, nothing, &older).contains("protocol version 4"));
    let fingerprint = [9; 32];
    let other = Hello {
        fingerprint,
        ..asks_to_join()
    };
    assert!(refusal(&live, nothing, &other).contains("different machines"));

    for (mut replica, reason) in [
        (recording(), "Recording"),
        (replaying(), "Replaying"),
        (replica(false), "not ready"),
    ] {
        assert!(refusal(&replica, nothing, &asks_to_join()).contains(reason));
        let role = replica.role();
        let generation = nothing;
        step(&mut replica, 1, Event::ChannelUp);
        let message = Message::Hello(asks_to_join());
        let answer = step(&mut replica, 1, Event::Message { generation, message });
        assert!(
            matches!(answer[..], [Action::Send(Message::Refuse { .. }), Action::CloseChannel]),
            "{answer:?}"
        );
        assert_eq!(replica.role(), role);
    }

    let mut cannot = survivor();
    cannot.config.takes_joiners = false;
    assert!(refusal(&cannot, nothing, &asks_to_join()).contains("takes no new backup"));
    // A host that has nothing is nobody's primary and nobody's backup.
    assert!(refusal(&joiner(), nothing, &asks_to_join()).contains("has nothing"));
    assert!(refusal(&joiner(), Generation(1), &hello(true, 0)).contains("has nothing"));
}

#[test]
fn a_new_backup_that_is_refused_asks_again_and_takes_no_answer_that_it_did_not_ask_for() {
    let mut joiner = joiner();
    let generation = Generation(2);
    let reason = "later".to_owned();
    let answer = Message::Hello(hello(true, 5));
    let message = answer.clone();
    assert_eq!(
        step(&mut joiner, 1, Event::Message { generation, message }),
        [Action::CloseChannel]
    );
    for _ in 0..2 {
        let asks = step(&mut joiner, 1, Event::ChannelUp);
        assert!(matches!(&asks[..], [Action::Send(Message::Hello(hello))] if hello.standing == Standing::Nothing));
        let message = Message::Refuse { reason: reason.clone() };
        let reason = reason.clone();
        let told = step(&mut joiner, 1, Event::Message { generation, message });
        assert_eq!(told, [Action::NotTaken { reason }, Action::CloseChannel]);
        assert_eq!(joiner.role(), Role::Pairing);
    }
    step(&mut joiner, 1, Event::ChannelUp);
    step(
        &mut joiner,
        1,
        Event::Message {
            generation,
            message: answer,
        },
    );
    assert_eq!((joiner.role(), joiner.last()), (Role::Replaying, Lsn(5)));
}

#[test]
fn a_new_backup_that_says_what_cannot_be_does_not_end_the_survivor() {
    let mut two = Two::new();
    two.connect();
    let generation = Generation(2);
    let message = ack(99);
    two.event(SURVIVOR, Event::Message { generation, message });
    assert_eq!(two.roles()[SURVIVOR], Role::Live);
    assert!(!two.sides[SURVIVOR].keeps_entries());
}

#[test]
fn synced_is_for_one_backup_and_for_nobody_without_the_state() {
    for (has_state, instance) in [(false, 70), (true, 69)] {
        let mut two = Two::new();
        two.connect();
        two.is_up = false;
        if has_state {
            two.event(JOINER, Event::Adopted);
        }
        let lsn = Lsn(6);
        two.event(JOINER, Event::SyncedEntry { lsn, instance });
        assert_eq!(two.roles()[JOINER], Role::Pairing);
        assert!(!two.asked());
    }
}

#[test]
fn a_new_backup_connects_anew_when_heartbeats_tell_of_entries_that_do_not_come() {
    let mut two = Two::new();
    two.connect();
    let heartbeat = |lsn| Event::Message {
        generation: Generation(2),
        message: Message::Heartbeat {
            vm: 0,
            lsn: Lsn(lsn),
            sequence: 0,
            replayed: Lsn(lsn),
            full: false,
            asks: false,
        },
    };
    let mut breaks = |lsn| {
        let mut broken = false;
        for now_ns in (0..CHANNEL * 3 / 4).step_by(INTERVAL as usize) {
            let joiner = &mut two.sides[JOINER];
            step(joiner, now_ns, heartbeat(lsn));
            broken |= step(joiner, now_ns, Event::Tick).contains(&Action::BreakChannel);
        }
        broken
    };
    assert!(!breaks(5));
    assert!(breaks(6));
}

#[test]
fn a_survivor_whose_backup_cannot_keep_up_is_slowed_before_it_holds_and_not_before_the_state_is_there() {
    let mut two = Two::new();
    two.connect();
    two.append();
    two.now_ns = 40 * INTERVAL;
    two.event(SURVIVOR, Event::Appended { through: Lsn(7) });
    let is_slowed = |two: &Two| {
        two.done
            .iter()
            .any(|(_, action)| matches!(action, Action::Throttle { .. }))
    };
    assert!(!is_slowed(&two));
    two.event(JOINER, Event::Adopted);
    assert!(is_slowed(&two));
    assert_eq!(two.roles()[SURVIVOR], Role::Live, "too far away to hold for it");
    two.event(JOINER, Event::Consumed { through: Lsn(7) });
    two.now_ns += INTERVAL;
    two.event(JOINER, Event::Tick);
    assert_eq!(two.roles()[SURVIVOR], Role::Recording);
}

#[test]
fn a_new_backup_takes_the_times_that_the_survivor_keeps() {
    let timing = Timing {
        heartbeat_misses: 30,
        ..TIMING
    };
    let mut two = Two::new();
    two.event(SURVIVOR, Event::ConfigurationEntry { lsn: Lsn(5), timing });
    two.connect();
    assert_eq!(two.sides[JOINER].timing(), &timing);
}
