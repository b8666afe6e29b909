//! Which versions of the protocol two hosts speak, and which one of them they use.
//!
//! ```text
//!  primary: hello, 3 to 5 ──► backup, 4 to 7        both: the highest that both speak, 5
//!  primary: hello, 3 to 5 ──► backup, 6 to 7        none: refused, with both ranges in the reason
//! ```
//! Versions of what is said between two hosts (hello to heartbeat, and the frames of entries with it):
//!
//! - 1: the first.
//! - 2: hello with instance, acknowledgement wanted and last LSN; acknowledgements with three watermarks; heartbeats with the replay's
//!   progress.
//! - 3: hello with the range of versions that its sender speaks. Its fields keep their places for ever: a later version may only append
//!   to them, so that sides without a common version can still tell each other so. Entries of the device engine.
//! - 4: hello says what its sender has (a host that holds nothing asks to be synchronised); `adopted`; the entry `synced`.
//! - 5: hello says the times that its sender keeps, and a backup takes the primary's; the entry `configuration` changes them. Heartbeats ask for
//!   an answer, and are fewer while there is nothing to say. `digests`, and the entries `compare` and `transferred`: a new backup's disk is
//!   brought up with them. Releases of 4 take no new backup.
//!
//! Releases of 1 and 2 speak one version each, and this one none of them. The table of all formats is in docs/log-format.md.

use std::fmt;

/// A range of versions, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Versions {
    /// The oldest.
    pub oldest: u32,
    /// The newest.
    pub newest: u32,
}

impl Versions {
    /// What this release speaks.
    pub const SPOKEN: Self = Self { oldest: 3, newest: 5 };
    /// The first whose hello has a range.
    pub(crate) const FIRST_WITH_RANGE: u32 = 3;
    /// The first in which a live side can take a new backup.
    pub(crate) const FIRST_WITH_REPAIR: u32 = 4;
    /// The first in which times are changed while a pair runs, and heartbeats rest.
    pub(crate) const FIRST_WITH_TIMING: u32 = 5;

    /// The version that two sides use: the highest that both speak.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u32> {
        let highest = self.newest.min(other.newest);
        (highest >= self.oldest.max(other.oldest)).then_some(highest)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.oldest == self.newest {
            true => write!(f, "{}", self.newest),
            false => write!(f, "{} to {}", self.oldest, self.newest),
        }
    }
}

const _: () = assert!(Versions::SPOKEN.oldest <= Versions::SPOKEN.newest);
const _: () = assert!(Versions::SPOKEN.oldest >= Versions::FIRST_WITH_RANGE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_sides_use_the_highest_version_that_both_speak() {
        let range = |oldest, newest| Versions { oldest, newest };
        for (a, b, common) in [
            (range(3, 3), range(3, 3), Some(3)),
            (range(3, 5), range(4, 7), Some(5)),
            (range(3, 9), range(4, 4), Some(4)),
            (range(3, 5), range(5, 5), Some(5)),
            (range(3, 5), range(6, 7), None),
            (range(3, 3), range(2, 2), None),
        ] {
            assert_eq!((a.common(b), b.common(a)), (common, common), "{a} and {b}");
        }
        assert_eq!(range(3, 5).to_string(), "3 to 5");
        assert_eq!(range(3, 3).to_string(), "3");
    }
}
