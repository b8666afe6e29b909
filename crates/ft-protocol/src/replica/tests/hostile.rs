//! A peer that says what it likes whenever it likes: the core refuses, halts, or goes on, and its own assertions hold.

use proptest::prelude::*;

use super::*;

/// A primary, a backup, a side that is alone and takes a new backup, a host that asks to be one.
fn any_side(kind: u8) -> Replica {
    let mut config = config(kind.is_multiple_of(2));
    if kind >= 2 {
        (config.alone, config.joins) = (config.primary, !config.primary);
    }
    config.ack = [Strength::Received, Strength::Durable, Strength::Replayed][usize::from(kind) % 3];
    Replica::new(config, 0)
}

fn any_hello(primary: bool, a: u8, b: u8) -> Hello {
    Hello {
        instance: 1 + u64::from(b % 3),
        standing: [Standing::Whole, Standing::Nothing, Standing::Part][usize::from(a % 3)],
        timing: Some(Timing {
            heartbeat_misses: u32::from(a),
            ..TIMING
        }),
        ..hello(primary, u64::from(b % 8))
    }
}

/// What a shell does with an event, and with what follows from it at once.
fn perform(replica: &mut Replica, now_ns: u64, event: Event) {
    let actions = step(replica, now_ns, event);
    assert!(actions.len() < 64, "{actions:?}");
    for action in actions {
        if let Action::AppendSynced { instance } = action {
            let lsn = replica.last().next();
            step(replica, now_ns, Event::SyncedEntry { lsn, instance });
            step(replica, now_ns, Event::Appended { through: lsn });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn nothing_that_a_peer_says_breaks_an_invariant(
        kind in 0u8..4,
        script in proptest::collection::vec((0u8..16, any::<u8>(), any::<u8>()), 0..120),
    ) {
        let mut replica = any_side(kind);
        let is_primary = kind.is_multiple_of(2);
        let mut now_ns = 0;
        perform(&mut replica, 0, Event::LocalReady { fingerprint: [1; 32], shape: Some([1; 32]) });
        for (what, a, b) in script {
            let lsn = Lsn(u64::from(a % 16));
            let any_generation = [0, 1, 2, 3, u32::MAX][usize::from(b % 5)];
            let generation = match a % 3 {
                0 => Generation(any_generation),
                _ => replica.generation(),
            };
            let message = |message| Event::Message { generation, message };
            let watermarks = Watermarks { received: lsn, durable: Lsn(u64::from(b % 16)), replayed: Lsn(u64::from(b / 16)) };
            let event = match what {
                0 | 1 => Event::ChannelUp,
                2 => Event::ChannelDown,
                3 | 4 => {
                    let hello = any_hello(!is_primary ^ (b > 250), a, b);
                    if replica.refusal(generation, &hello).is_some() && b % 2 == 0 {
                        continue;
                    }
                    message(Message::Hello(hello))
                }
                5 => message(Message::Ack(watermarks)),
                6 => message(Message::Adopted),
                7 => {
                    let (vm, sequence, replayed) = (0, 0, Lsn(u64::from(b % 16)));
                    message(Message::Heartbeat { vm, lsn, sequence, replayed, full: b > 200, asks: b % 2 == 1 })
                }
                8 if b < 60 => message(Message::Gone { reason: String::new() }),
                8 if b < 120 => message(Message::Refuse { reason: String::new() }),
                8 | 9 => {
                    now_ns += u64::from(a) * INTERVAL / 8;
                    Event::Tick
                }
                10 => {
                    let verdict = [Verdict::Won, Verdict::Lost, Verdict::Unreachable, Verdict::Won][usize::from(a % 4)];
                    let generation = Generation(replica.generation().0.saturating_add(1));
                    Event::Arbiter { generation, verdict }
                }
                11 if replica.leads() => Event::Appended { through: Lsn(replica.last().0 + u64::from(a % 3)) },
                11 => {
                    let (from, generation) = (replica.last().next(), replica.generation());
                    Event::Received { generation, from, through: Lsn(from.0 + u64::from(a % 3)) }
                }
                12 => Event::Adopted,
                13 => Event::Holding { generation },
                14 if !replica.leads() => {
                    let instance = replica.instance() + u64::from(b % 2);
                    Event::SyncedEntry { lsn: Lsn(replica.last().0 + u64::from(a % 3)), instance }
                }
                _ => {
                    perform(&mut replica, now_ns, Event::Durable { through: lsn });
                    Event::Consumed { through: Lsn(u64::from(b)) }
                }
            };
            perform(&mut replica, now_ns, event);
        }
    }
}
