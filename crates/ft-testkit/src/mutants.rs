//! Mutants: one promise of the shell or of the arbiter broken at a time. A checker that no mutant fails proves nothing.

use std::{fmt, str::FromStr};

/// A broken promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The backup acknowledges entries before they are stored.
    AckEarly,
    /// The devices take what was sent for what was acknowledged.
    ReleaseEarly,
    /// The daemon stamps what it hears (messages, entries, verdicts) with the generation it would like to hear.
    IgnoreGeneration,
    /// The arbiter grants a generation to everybody.
    ArbiterSaysYesTwice,
    /// Going live drops what was received and not yet replayed.
    DropTailAtGoLive,
    /// After a reconnection, entries that come again are stored again.
    ResendWithoutDedup,
    /// The processes of a halted replica do not end, and the devices let go what they hold.
    SpeakAfterHalt,
    /// The daemon does not ask an unreachable arbiter again.
    NeverAskAgain,
    /// The daemon does not recognise the guest's power-off.
    HidePowerOff,
    /// The replay skips the entries that move the guest's time.
    SkipTime,
    /// Heartbeats are not sent.
    NoHeartbeats,
    /// After a reconnection, only new entries are sent.
    NoResend,
    /// A channel that is of no use is not broken.
    NeverBreak,
    /// The backup says that entries are flushed before they are.
    AckBeforeFlush,
    /// The backup says that entries are replayed when they have arrived.
    AckBeforeReplay,
    /// The vCPU does not pause, however far the backup trails.
    IgnoreThrottle,
    /// A backup goes on with the times that it started with.
    IgnoreConfiguration,
    /// A new backup that has the state takes itself for synchronised, whatever the survivor says.
    WinUnsynced,
    /// The survivor lets outputs go that a new backup acknowledged before it may take over.
    CountUnsynced,
    /// The survivor's devices begin to hold outputs when `Synced` is acknowledged, not before it is appended.
    HoldLate,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Self; 20] = [
        Self::AckEarly,
        Self::ReleaseEarly,
        Self::IgnoreGeneration,
        Self::ArbiterSaysYesTwice,
        Self::DropTailAtGoLive,
        Self::ResendWithoutDedup,
        Self::SpeakAfterHalt,
        Self::NeverAskAgain,
        Self::HidePowerOff,
        Self::SkipTime,
        Self::NoHeartbeats,
        Self::NoResend,
        Self::NeverBreak,
        Self::AckBeforeFlush,
        Self::AckBeforeReplay,
        Self::IgnoreThrottle,
        Self::IgnoreConfiguration,
        Self::WinUnsynced,
        Self::CountUnsynced,
        Self::HoldLate,
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AckEarly => "ack-early",
            Self::ReleaseEarly => "release-early",
            Self::IgnoreGeneration => "ignore-generation",
            Self::ArbiterSaysYesTwice => "arbiter-says-yes-twice",
            Self::DropTailAtGoLive => "drop-tail-at-go-live",
            Self::ResendWithoutDedup => "resend-without-dedup",
            Self::SpeakAfterHalt => "speak-after-halt",
            Self::NeverAskAgain => "never-ask-again",
            Self::HidePowerOff => "hide-power-off",
            Self::SkipTime => "skip-time",
            Self::NoHeartbeats => "no-heartbeats",
            Self::NoResend => "no-resend",
            Self::NeverBreak => "never-break",
            Self::AckBeforeFlush => "ack-before-flush",
            Self::AckBeforeReplay => "ack-before-replay",
            Self::IgnoreThrottle => "ignore-throttle",
            Self::IgnoreConfiguration => "ignore-configuration",
            Self::WinUnsynced => "win-unsynced",
            Self::CountUnsynced => "count-unsynced",
            Self::HoldLate => "hold-late",
        }
    }
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mutant {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|mutant| mutant.name() == name)
            .ok_or_else(|| {
                let names: Vec<_> = Self::ALL.iter().map(|mutant| mutant.name()).collect();
                format!("no mutant '{name}'; there are {}", names.join(", "))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for mutant in Mutant::ALL {
            assert_eq!(mutant.name().parse(), Ok(mutant));
        }
        assert!("".parse::<Mutant>().is_err());
    }
}
