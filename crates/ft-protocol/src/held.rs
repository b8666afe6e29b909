//! The Output Rule as a type (paper §2.2).
//!
//! An output is born as a [`Held<T>`] with the LSN of the entry that marks it. The only way to the `T` is a [`Committed`]
//! watermark at or above that LSN.

use crate::{controls, ids::Lsn};

/// How far the backup has acknowledged this generation's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Committed(Lsn);

impl Committed {
    /// The watermark as its keeper states it: the core from acknowledgements, a device daemon from the shared region.
    #[must_use]
    pub fn through(lsn: Lsn) -> Self {
        Self(lsn)
    }

    /// Whether the entry at `lsn` is committed.
    #[must_use]
    pub fn covers(self, lsn: Lsn) -> bool {
        lsn <= self.0
    }

    /// The last committed entry.
    #[must_use]
    pub fn lsn(self) -> Lsn {
        self.0
    }
}

/// An output that may not be seen outside before its marker is committed.
#[derive(Debug)]
#[must_use = "a held output that is dropped is never sent"]
pub struct Held<T> {
    marker: Lsn,
    output: T,
}

impl<T> Held<T> {
    /// Holds `output` until the entry at `marker` is committed.
    pub fn new(marker: Lsn, output: T) -> Self {
        Self { marker, output }
    }

    /// The entry that marks this output.
    pub fn marker(&self) -> Lsn {
        self.marker
    }

    /// What is held, to look at (its size, say), not to send.
    pub fn peek(&self) -> &T {
        &self.output
    }

    /// Whether [`Held::release`] would give the output.
    pub fn is_committed(&self, committed: Committed) -> bool {
        committed.covers(self.marker) || !controls::HOLD_OUTPUT
    }

    /// The output, if its marker is committed.
    ///
    /// # Errors
    /// Gives the held output back where it is not.
    pub fn release(self, committed: Committed) -> Result<T, Self> {
        if self.is_committed(committed) {
            Ok(self.output)
        } else {
            Err(self)
        }
    }
}

#[cfg(all(test, not(feature = "control-no-hold")))]
mod tests {
    use super::*;

    #[test]
    fn output_leaves_only_at_or_above_its_marker() {
        let held = Held::new(Lsn(5), "frame");
        let held = held.release(Committed::through(Lsn(4))).unwrap_err();
        assert_eq!(held.marker(), Lsn(5));
        assert_eq!(held.release(Committed::through(Lsn(5))).unwrap(), "frame");
        assert_eq!(Held::new(Lsn(5), 1).release(Committed::through(Lsn::MAX)).unwrap(), 1);
    }
}
