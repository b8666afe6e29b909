//! What a machine's journal says about a time: exits, entries by kind.

use std::path::Path;

use ft_client::journal::{JournalError, JournalReader};
use ft_protocol::Body;

use crate::bench::lockstep::Sample;
use crate::error::HarnessError;

/// What was logged between two reports of ft-log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// Exits of the guest, from the first entry that tells one to the last.
    pub(crate) exits: u64,
    /// State deltas.
    pub(crate) deltas: u64,
    /// What these take in the log.
    pub(crate) delta_bytes: u64,
    /// Pages in them.
    pub(crate) delta_pages: u64,
}

/// Adds the entries of one time up.
#[derive(Debug, Default)]
struct Sum {
    traffic: Traffic,
    exits: Option<(u64, u64)>,
}

impl Sum {
    fn add(&mut self, body: &Body<'_>, bytes: usize) {
        let bytes = bytes as u64;
        match body {
            Body::Pages { payload } => {
                self.traffic.delta_bytes += bytes;
                let pages = payload.first_chunk().map_or(0, |pages| u32::from_le_bytes(*pages));
                self.traffic.delta_pages += u64::from(pages);
            }
            Body::State { .. } => {
                self.traffic.delta_bytes += bytes;
                self.traffic.deltas += 1;
            }
            _ => {}
        }
        if let Some(stop) = body.stop() {
            let exits = stop.position.exits;
            self.exits = Some((self.exits.map_or(exits, |(first, _)| first), exits));
        }
    }

    fn finish(self) -> Traffic {
        Traffic {
            exits: self.exits.map_or(0, |(first, last)| last - first),
            ..self.traffic
        }
    }
}

/// What the journal in `directory`, of one generation, has between these reports; it may still be written.
pub(crate) fn between<const N: usize>(
    directory: &Path,
    times: [(Sample, Sample); N],
) -> Result<[Traffic; N], HarnessError> {
    let unreadable = |error: JournalError| {
        HarnessError::Environment(format!("cannot read the journal in {}: {error}", directory.display()))
    };
    let mut sums: [Sum; N] = std::array::from_fn(|_| Sum::default());
    let mut reader = JournalReader::open(directory).map_err(unreadable)?;
    while let Some((entry, bytes)) = reader.next_entry().map_err(unreadable)? {
        for ((from, to), sum) in times.iter().zip(&mut sums) {
            // Of one generation: the number of entries is the last one's LSN.
            if entry.lsn.0 > from.entries() && entry.lsn.0 <= to.entries() {
                sum.add(&entry.body, bytes.len());
            }
        }
    }
    Ok(sums.map(Sum::finish))
}

#[cfg(test)]
mod tests {
    use ft_protocol::{Position, Stop};

    use super::*;

    #[test]
    fn exits_are_counted_between_entries_and_deltas_with_their_pages() {
        let stop = |exits| Stop {
            position: Position {
                exits,
                ..Position::default()
            },
            digest: 0,
        };
        let mut sum = Sum::default();
        let payload: &[u8] = &[3, 0, 0, 0, 9, 9];
        for (body, bytes) in [
            (Body::Sync(stop(100)), 40),
            (Body::Pages { payload }, 1000),
            (Body::Pages { payload }, 2000),
            (
                Body::State {
                    stop: stop(140),
                    payload,
                },
                500,
            ),
        ] {
            sum.add(&body, bytes);
        }
        let expected = Traffic {
            exits: 40,
            deltas: 1,
            delta_bytes: 3500,
            delta_pages: 6,
        };
        assert_eq!(sum.finish(), expected);
        assert_eq!(Sum::default().finish(), Traffic::default());
    }
}
