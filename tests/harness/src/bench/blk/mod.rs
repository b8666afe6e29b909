//! The block daemon next to qemu-storage-daemon's vhost-user-blk export: one frontend, one image, in turns.
//!
//! ```text
//!  for each round: for each [Point]: ours, peer:  [backend] starts ─► [load] warms up, measures ─► backend ends
//!  ─► the medians of all rounds: IOPS, and the backend's CPU time per I/O
//! ```
//! Then the daemon with engine `device` next to itself alone, in the same way: `protected` rows.

mod backend;
mod load;

use std::path::Path;

use self::{
    backend::{Backend, Which},
    load::{Load, Measured, Pattern},
};
use crate::{
    bench::{row::Row, stats},
    error::HarnessError,
};

pub use self::backend::Programs;

/// Bytes of the image.
const IMAGE_BYTES: u64 = 1 << 30;

/// And of a protected one, which is copied and read before each measurement.
const PROTECTED_IMAGE_BYTES: u64 = 128 << 20;

/// What is measured.
#[derive(Clone, Copy, Debug)]
struct Point {
    load: Load,
    direct: bool,
}

impl Point {
    fn all(cached: bool) -> Vec<Self> {
        let mut points = Vec::new();
        for direct in if cached { vec![true, false] } else { vec![true] } {
            for polled in [false, true] {
                for queues in [1, 4] {
                    for (pattern, depths) in [
                        (Pattern::RandomRead, &[1, 32][..]),
                        (Pattern::RandomWrite, &[1, 32]),
                        (Pattern::SequentialRead, &[8]),
                        (Pattern::SequentialWrite, &[8]),
                    ] {
                        for depth in depths {
                            let load = Load {
                                pattern,
                                depth: *depth,
                                queues,
                                polled,
                            };
                            points.push(Self { load, direct });
                        }
                    }
                }
            }
        }
        points
    }

    fn name(&self) -> String {
        let cache = if self.direct { "direct" } else { "cached" };
        format!("unprotected blk {} {cache}", self.load)
    }
}

/// Measures every point; `only` names the points that are wanted.
///
/// # Errors
/// When a backend does not start, or an I/O fails.
pub fn rows(
    programs: &Programs,
    directory: &Path,
    rounds: u8,
    only: Option<&str>,
    mut row: impl FnMut(Row),
) -> Result<(), HarnessError> {
    let image = directory.join("image");
    backend::fill(&image, IMAGE_BYTES)?;
    for point in Point::all(true) {
        if only.is_some_and(|only| !point.name().contains(only)) {
            continue;
        }
        let mut measured: [Vec<Measured>; 2] = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (which, into) in [Which::Ours, Which::Peer].into_iter().zip(&mut measured) {
                let backend = Backend::start(programs, which, directory, &image, point.load.queues, point.direct)?;
                into.push(load::run(&backend, point.load, IMAGE_BYTES)?);
            }
        }
        let median =
            |which: usize, of: fn(&Measured) -> f64| stats::median(&measured[which].iter().map(of).collect::<Vec<_>>());
        let spread = |which: usize| stats::range(&measured[which].iter().map(Measured::iops).collect::<Vec<_>>());
        let conditions = format!(
            "peer: qemu-storage-daemon, aio=io_uring, an iothread; {rounds} rounds in turns, ours {}, peer {}",
            spread(0),
            spread(1)
        );
        let name = point.name();
        let (iops, cpu) = (
            Measured::iops as fn(&Measured) -> f64,
            Measured::cpu_us as fn(&Measured) -> f64,
        );
        row(Row::new(&name, median(0, iops), median(1, iops), "IOPS", conditions));
        row(Row::new(
            format!("{name}, CPU"),
            median(0, cpu),
            median(1, cpu),
            "us/I/O",
            "of the backend, less is better".into(),
        ));
    }
    protected_rows(programs, directory, rounds, only, row)
}

/// What replication costs: the disk with everything of both hosts on this one, and the same disk alone.
fn protected_rows(
    programs: &Programs,
    directory: &Path,
    rounds: u8,
    only: Option<&str>,
    mut row: impl FnMut(Row),
) -> Result<(), HarnessError> {
    let image = directory.join("protected-image");
    backend::fill(&image, PROTECTED_IMAGE_BYTES)?;
    for (pattern, depth) in [
        (Pattern::RandomWrite, 1),
        (Pattern::RandomWrite, 32),
        (Pattern::RandomRead, 1),
        (Pattern::RandomRead, 32),
    ] {
        let load = Load {
            pattern,
            depth,
            queues: 1,
            polled: false,
        };
        let name = format!("protected qd{depth} blk {load} cached");
        if only.is_some_and(|only| !name.contains(only)) {
            continue;
        }
        let mut measured: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (which, into) in [Which::Protected, Which::Ours].into_iter().zip(&mut measured) {
                let backend = Backend::start(programs, which, directory, &image, 1, false)?;
                into.push(load::run(&backend, load, PROTECTED_IMAGE_BYTES)?.iops());
            }
        }
        let conditions = format!(
            "peer: the same daemon alone; engine device, both hosts on this one, --ack received; {rounds} rounds in turns, \
             protected {}, alone {}",
            stats::range(&measured[0]),
            stats::range(&measured[1])
        );
        let [ours, peer] = measured.map(|values| stats::median(&values));
        row(Row::new(name, ours, peer, "IOPS", conditions));
    }
    Ok(())
}
