//! One host dies at a chosen point of its work; the witness judges what is left.
//!
//! The binaries are built with `crash-points`: whoever reaches the point named in `FT_CRASH_AT` for the n-th time kills its
//! process group, which is its host. No cable is pulled here: the dead host's kernel closes its connections, so that both
//! ways to lose a host are tested, this one and the demo's.

mod lab;

use ft_harness::faults::FaultPlan;
use ft_harness::topology::HostId;
use lab::{Build, run, setup};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Seeded times at which each point is tried, besides the chosen ones, unless FT_MATRIX_TIMES says otherwise.
const SEEDED: usize = 2;

fn seeded_times() -> usize {
    let asked = std::env::var("FT_MATRIX_TIMES").ok();
    asked.map_or(SEEDED, |times| times.parse().expect("FT_MATRIX_TIMES is a number"))
}

/// Dies at `point` on `host` for each of `chosen` and for seeded times in `1..=up_to`.
fn dies(host: HostId, point: &str, chosen: &[u64], up_to: u64) {
    let seed = point.bytes().fold(u64::from(host == HostId::B), |seed, byte| {
        seed.wrapping_mul(31).wrapping_add(u64::from(byte))
    });
    let mut chance = ChaCha8Rng::seed_from_u64(seed);
    let seeded: Vec<u64> = (0..seeded_times()).map(|_| chance.random_range(2..=up_to)).collect();
    println!("host {host} dies at {point}: seed {seed}, times {chosen:?} and {seeded:?}");
    for nth in chosen.iter().chain(&seeded) {
        let plan = FaultPlan::CrashPoint {
            host,
            at: format!("{point}:{nth}"),
        };
        let outcome = run(&setup(Build::Variant("crash-points"), seed, plan), |outcome| {
            outcome.report.good()
        });
        assert_eq!(outcome.report.replies, outcome.report.requests);
    }
}

macro_rules! matrix {
    ($($test:ident: $host:ident at $point:literal, $chosen:expr, up to $up_to:literal;)*) => {
        $(
            #[test]
            fn $test() {
                dies(HostId::$host, $point, &$chosen, $up_to);
            }
        )*
    };
}

// Times are such that every run reaches them: 120 records make some 600 kicks and deliveries, and at least 40 writes and
// flushes, however the guest batches them. A primary that dies before its first entry is sent has no heir: a backup that
// received nothing does not go live. The replay has no point of its own for a delivery.
matrix! {
    primary_before_a_kick: A at "shim.kick.before", [1, 2], up to 250;
    primary_after_a_kick: A at "shim.kick.after", [1], up to 250;
    primary_before_a_delivery: A at "shim.deliver.before", [1], up to 150;
    primary_after_a_delivery: A at "shim.deliver.after", [1], up to 150;
    primary_before_a_send: A at "log.send.before", [2, 3], up to 120;
    primary_after_a_send: A at "log.send.after", [1, 2], up to 120;
    primary_before_a_commit: A at "log.commit.before", [1], up to 100;
    primary_after_a_commit: A at "log.commit.after", [1], up to 100;
    primary_before_a_release: A at "net.release.before", [1], up to 60;
    primary_after_a_release: A at "net.release.after", [1], up to 60;
    primary_before_a_write: A at "blk.write.before", [1], up to 40;
    primary_after_a_write: A at "blk.write.after", [1], up to 40;
    primary_before_a_flush: A at "blk.flush.before", [1], up to 40;
    primary_after_a_flush: A at "blk.flush.after", [1], up to 40;
    backup_before_an_acknowledgement: B at "log.ack.before", [1], up to 100;
    backup_after_a_kick: B at "shim.kick.after", [1], up to 250;
    backup_before_a_write: B at "blk.write.before", [1], up to 40;
    backup_after_a_write: B at "blk.write.after", [1], up to 40;
    backup_before_a_flush: B at "blk.flush.before", [1], up to 40;
    backup_after_a_flush: B at "blk.flush.after", [1], up to 40;
}
