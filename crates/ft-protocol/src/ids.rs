//! Identifiers that must not be mixed up.

use std::fmt;

/// Number of one primary/backup pairing of a VM. Grows by one with every arbitration; anything older is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

impl Generation {
    /// The generation that the first start of a VM claims.
    pub const FIRST: Self = Self(1);

    /// Whether a pair can be of this generation: it was claimed, and there is one after it to arbitrate about.
    #[must_use]
    pub fn can_pair(self) -> bool {
        self >= Self::FIRST && self.0 < u32::MAX
    }

    /// The generation that arbitration after this one is about.
    ///
    /// # Panics
    /// After 2^32 - 1 arbitrations of one VM.
    #[must_use]
    pub fn next(self) -> Self {
        Self(
            self.0
                .checked_add(1)
                .expect("2^32 arbitrations of one VM: the counter is exhausted"),
        )
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Position of a log entry in the one total order of its VM: dense, starts at 1 in each generation. 0 stands before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Before the first entry.
    pub const ZERO: Self = Self(0);
    /// After every entry: the watermark of a side that runs alone.
    pub const MAX: Self = Self(u64::MAX);

    /// The entry after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::MAX {
            return f.write_str("all");
        }
        write!(f, "{}", self.0)
    }
}

/// A device of one VM, numbered in the order of `ft-log --devices`. The vCPU shim itself is [`DeviceId::SHIM`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u8);

impl DeviceId {
    /// The shim, where an entry is not about a device.
    pub const SHIM: Self = Self(u8::MAX);
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::SHIM {
            return f.write_str("shim");
        }
        write!(f, "device {}", self.0)
    }
}
