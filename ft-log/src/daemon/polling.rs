//! Whether to look for the next entry for a moment before sleeping.
//!
//! A sleeper costs its waker a system call and an interrupt of another processor. Somebody whose output was just committed often has the next
//! entry within microseconds; then looking is cheaper than sleeping. Nobody looks while an acknowledgement is under way: the processor
//! may be what the other side needs for it.

/// How long to look. An average pause beyond it, and nobody looks.
const LOOK_NS: u64 = 30_000;
/// A longer pause counts as one of this length, so that a few short ones are enough to look again.
const PAUSE_NS_MAX: u64 = 4 * LOOK_NS;
/// How slowly the average follows, as a shift.
const INERTIA: u32 = 2;

/// The pauses between a commit of everything and the entry after it.
#[derive(Debug)]
pub(super) struct Polling {
    since_ns: Option<u64>,
    average_ns: u64,
}

impl Default for Polling {
    fn default() -> Self {
        Self {
            since_ns: None,
            average_ns: PAUSE_NS_MAX,
        }
    }
}

impl Polling {
    /// Nothing is under way and nothing there. Until when to look, if that pays.
    pub(super) fn idle(&mut self, now_ns: u64) -> Option<u64> {
        let since = *self.since_ns.get_or_insert(now_ns);
        (self.average_ns <= LOOK_NS).then_some(since + LOOK_NS)
    }

    /// Entries came.
    pub(super) fn took(&mut self, now_ns: u64) {
        if let Some(since) = self.since_ns.take() {
            let pause = now_ns.saturating_sub(since).min(PAUSE_NS_MAX);
            self.average_ns = self.average_ns - (self.average_ns >> INERTIA) + (pause >> INERTIA);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether it looks after pauses of so many ns.
    fn looks(polling: &mut Polling, pauses_ns: &[u64]) -> bool {
        for pause in pauses_ns {
            let _ = polling.idle(1_000_000);
            polling.took(1_000_000 + pause);
        }
        let until = polling.idle(2_000_000);
        assert!(until.is_none_or(|until| until == 2_000_000 + LOOK_NS));
        polling.since_ns = None;
        until.is_some()
    }

    #[test]
    fn it_looks_while_pauses_are_short_and_never_beyond_its_time() {
        let mut polling = Polling::default();
        assert!(!looks(&mut polling, &[]), "nothing is known yet");
        assert!(looks(&mut polling, &[5_000; 8]));
        assert!(looks(&mut polling, &[LOOK_NS]), "one longer pause is forgiven");
        assert!(!looks(&mut polling, &[1_000_000_000; 3]));
        assert!(looks(&mut polling, &[5_000; 8]));
        // A wait that goes on counts from its start.
        let until = polling.idle(5_000_000);
        assert_eq!(polling.idle(5_000_000 + LOOK_NS / 2), until);
    }
}
