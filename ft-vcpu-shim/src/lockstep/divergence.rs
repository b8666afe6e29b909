//! What is said when a replay is not the recorded execution any more.

use std::fmt;

use ft_protocol::{Lsn, Stop};

/// The first difference that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// The entry that did not fit.
    pub entry: Lsn,
    /// Its kind.
    pub kind: &'static str,
    /// Where it was recorded.
    pub recorded: Stop,
    /// Where the replay is.
    pub replayed: Stop,
    /// What differs.
    pub what: String,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |stop: &Stop| {
            format!(
                "exit {} RIP {:#x} RCX {:#x} digest {:016x}",
                stop.position.exits, stop.position.rip, stop.position.rcx, stop.digest
            )
        };
        write!(
            f,
            "diverged at entry {} ({}): {}; recorded at {}, replayed at {}. This replica's state is worthless: start a fresh backup",
            self.entry,
            self.kind,
            self.what,
            show(&self.recorded),
            show(&self.replayed)
        )
    }
}

/// What differs between two stops; `None` if nothing does.
#[must_use]
pub fn difference(recorded: &Stop, replayed: &Stop) -> Option<&'static str> {
    let (then, now) = (&recorded.position, &replayed.position);
    if then.exits != now.exits || then.offset != now.offset {
        Some("it belongs to another exit")
    } else if then.rip != now.rip {
        Some("the instruction pointer differs")
    } else if then.rcx != now.rcx {
        Some("RCX differs")
    } else if recorded.digest != replayed.digest {
        Some("exits, registers or outputs before it differ")
    } else {
        None
    }
}
