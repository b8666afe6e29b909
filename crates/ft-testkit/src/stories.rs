//! Stories: faults that belong together, and that chance seldom brings together.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::{
    faults::{FAULTS_MAX, Fault, FaultEvent, draw_host, draw_some},
    host::HostId,
};

/// Faults that chance seldom brings together, in three plans of four.
pub(crate) fn draw_story(rng: &mut ChaCha8Rng, unit_ns: u64, faults: &mut Vec<FaultEvent>) {
    let at_ns = rng.random_range(0..8 * unit_ns);
    match rng.random_range(0..8) {
        2 => {
            // The channel breaks again and again: what is sent again is cut again.
            for step in 0..FAULTS_MAX as u64 {
                let at_ns = at_ns + step * rng.random_range(0..unit_ns / 4);
                faults.push(FaultEvent {
                    at_ns,
                    fault: Fault::Reset,
                });
            }
        }
        3 => faults.push(FaultEvent {
            at_ns,
            fault: Fault::Wedge,
        }),
        0 => {
            // Late answers to the first claim come when the second is being asked for.
            let slow = Fault::ArbiterSlow {
                delay_ns: 4 * unit_ns,
                for_ns: 2 * unit_ns,
            };
            faults.push(FaultEvent { at_ns: 0, fault: slow });
            let fault = Fault::Partition {
                from: draw_some(rng),
                for_ns: 3 * unit_ns,
            };
            faults.push(FaultEvent {
                at_ns: at_ns / 2,
                fault,
            });
        }
        1 => {
            // The primary is lost when the backup has much to replay.
            let fault = Fault::SlowShim {
                host: HostId::B,
                for_ns: 2 * unit_ns,
            };
            faults.push(FaultEvent { at_ns, fault });
            let fault = Fault::Crash {
                host: HostId::A,
                silent: rng.random_bool(0.5),
            };
            faults.push(FaultEvent {
                at_ns: at_ns + unit_ns,
                fault,
            });
        }
        4 => new_backup(rng, unit_ns, at_ns / 2, faults),
        5 => disturbed_synchronisation(rng, unit_ns, at_ns / 2, faults),
        _ => {}
    }
}

/// A side fails, comes back as the new backup of the survivor, the survivor fails or is cut off, and comes back in its turn.
fn new_backup(rng: &mut ChaCha8Rng, unit_ns: u64, at_ns: u64, faults: &mut Vec<FaultEvent>) {
    let first = draw_host(rng);
    let second = first.other();
    let mut at_ns = fail_and_join(rng, unit_ns, at_ns, first, faults);
    // Before, in, and after the synchronisation, which takes up to one unit and some.
    at_ns += rng.random_range(0..3 * unit_ns);
    if rng.random_bool(0.7) {
        fail_and_join(rng, unit_ns, at_ns, second, faults);
    } else {
        let from = draw_some(rng);
        let for_ns = rng.random_range(unit_ns / 2..3 * unit_ns);
        let fault = Fault::Partition { from, for_ns };
        faults.push(FaultEvent { at_ns, fault });
    }
}

/// A side fails and comes back as a new backup, and something is wrong while it is synchronised.
fn disturbed_synchronisation(rng: &mut ChaCha8Rng, unit_ns: u64, at_ns: u64, faults: &mut Vec<FaultEvent>) {
    let host = draw_host(rng);
    let joined_ns = fail_and_join(rng, unit_ns, at_ns, host, faults);
    for _ in 0..rng.random_range(1..=3) {
        let at_ns = joined_ns + rng.random_range(0..3 * unit_ns / 2);
        let for_ns = unit_ns / 8 * (1 << rng.random_range(0..5));
        let host = draw_host(rng);
        let fault = match rng.random_range(0..8) {
            0 | 1 => Fault::Reset,
            2 => Fault::Wedge,
            3 => Fault::Stall { from: host, for_ns },
            4 => Fault::Partition {
                from: draw_some(rng),
                for_ns,
            },
            5 => Fault::Pause {
                host,
                for_ns,
                timers_first: rng.random_bool(0.5),
            },
            6 => Fault::SlowShim { host, for_ns },
            _ => Fault::LocalFailure { host },
        };
        faults.push(FaultEvent { at_ns, fault });
    }
}

/// When it joins, mostly after its peer had time to go live.
fn fail_and_join(rng: &mut ChaCha8Rng, unit_ns: u64, at_ns: u64, host: HostId, faults: &mut Vec<FaultEvent>) -> u64 {
    let fault = match rng.random_range(0..4) {
        0 => Fault::LocalFailure { host },
        _ => Fault::Crash {
            host,
            silent: rng.random_bool(0.5),
        },
    };
    faults.push(FaultEvent { at_ns, fault });
    let at_ns = at_ns + rng.random_range(unit_ns / 2..3 * unit_ns);
    let fault = Fault::Join { host };
    faults.push(FaultEvent { at_ns, fault });
    at_ns
}
