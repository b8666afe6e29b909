//! Counts of durations, in buckets whose width grows with the duration: within 12.5 % of the truth at any scale.

/// Buckets of one power of two.
const STEPS: u64 = 8;
/// Log2 of it.
const STEP_BITS: u32 = STEPS.ilog2();
/// Powers of two beyond the linear start; the last bucket ends after more than an hour.
const OCTAVES: usize = 30;
const BUCKETS: usize = STEPS as usize * (OCTAVES + 1);

/// A histogram of microseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: Box::new([0; BUCKETS]),
            total: 0,
        }
    }
}

/// The bucket of a value: values below [`STEPS`] have their own, then each power of two has [`STEPS`].
fn bucket(microseconds: u64) -> usize {
    if microseconds < STEPS {
        return microseconds as usize;
    }
    let octave = microseconds.ilog2() - STEP_BITS;
    let step = (microseconds >> octave) - STEPS;
    let index = (u64::from(octave) + 1) * STEPS + step;
    (index as usize).min(BUCKETS - 1)
}

/// First value beyond a bucket.
fn upper(bucket: usize) -> u64 {
    let (octave, step) = (bucket as u64 / STEPS, bucket as u64 % STEPS);
    if octave == 0 {
        return step + 1;
    }
    (STEPS + step + 1) << (octave - 1)
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, microseconds: u64) {
        self.counts[bucket(microseconds)] += 1;
        self.total += 1;
    }

    /// Durations counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The buckets that are not empty: the first duration beyond each, and its count.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let counted = self.counts.iter().enumerate().filter(|(_, count)| **count != 0);
        counted.map(|(bucket, count)| (upper(bucket), *count))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bucket_is_as_wide_as_promised(value in 0u64..1 << 32) {
            let bucket = bucket(value);
            let (from, to) = (bucket.checked_sub(1).map_or(0, upper), upper(bucket));
            prop_assert!((from..to).contains(&value), "{value} in {from}..{to}");
            prop_assert!(value < STEPS || (to - from) * STEPS <= value);
        }

        #[test]
        fn whatever_is_recorded_is_counted(values in proptest::collection::vec(any::<u64>(), 0..100)) {
            let mut histogram = Histogram::default();
            values.iter().for_each(|value| histogram.record(*value));
            prop_assert_eq!(histogram.total(), values.len() as u64);
            prop_assert_eq!(histogram.buckets().map(|(_, count)| count).sum::<u64>(), values.len() as u64);
            prop_assert!(histogram.buckets().map(|(upper, _)| upper).is_sorted());
        }
    }
}
