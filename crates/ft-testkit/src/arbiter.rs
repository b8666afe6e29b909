//! The model arbiter: create-if-absent, one claim a generation, and everything that can go wrong on the way to it and back.
//!
//! The table of claims is the simulator's ground truth of who may be live. A claim belongs to one start of a host, so a host
//! that comes back is somebody else.

use std::collections::BTreeMap;

use ft_protocol::{Generation, Verdict};

use crate::host::{HostId, Incarnation};

/// The shared test-and-set.
#[derive(Debug, Default)]
pub struct Arbiter {
    claims: BTreeMap<Generation, Incarnation>,
    unreachable: [u32; 2],
    slow: Vec<u64>,
    losing_answers: u32,
}

impl Arbiter {
    /// Takes a claim: the first one of a generation wins, and wins again however often its owner asks.
    pub fn claim(&mut self, generation: Generation, by: Incarnation) -> Verdict {
        if *self.claims.entry(generation).or_insert(by) == by {
            Verdict::Won
        } else {
            Verdict::Lost
        }
    }

    /// Who holds a generation.
    #[must_use]
    pub fn owner(&self, generation: Generation) -> Option<Incarnation> {
        self.claims.get(&generation).copied()
    }

    /// Whether this host's requests reach it now.
    #[must_use]
    pub fn is_reachable(&self, host: HostId) -> bool {
        self.unreachable[host.index()] == 0
    }

    /// Longest extra delay of a request or an answer now, ns.
    #[must_use]
    pub fn delay_ns_max(&self) -> u64 {
        self.slow.iter().copied().max().unwrap_or(0)
    }

    /// Whether answers get lost now, after the claim was taken.
    #[must_use]
    pub fn loses_answers(&self) -> bool {
        self.losing_answers > 0
    }

    /// Begins (or ends) a time in which this host does not reach it.
    pub fn set_unreachable(&mut self, host: HostId, begin: bool) {
        count(&mut self.unreachable[host.index()], begin);
    }

    /// Begins (or ends) a time in which it is slow.
    pub fn set_slow(&mut self, delay_ns_max: u64, begin: bool) {
        if begin {
            self.slow.push(delay_ns_max);
        } else if let Some(at) = self.slow.iter().position(|delay| *delay == delay_ns_max) {
            self.slow.swap_remove(at);
        }
    }

    /// Begins (or ends) a time in which answers get lost.
    pub fn set_losing_answers(&mut self, begin: bool) {
        count(&mut self.losing_answers, begin);
    }
}

/// Overlapping windows of one kind of fault are counted.
pub(crate) fn count(counter: &mut u32, begin: bool) {
    *counter = if begin { *counter + 1 } else { counter.saturating_sub(1) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_claim_wins_and_its_owner_may_ask_again() {
        let mut arbiter = Arbiter::default();
        let (a, b) = (
            Incarnation {
                host: HostId::A,
                number: 1,
            },
            Incarnation {
                host: HostId::B,
                number: 1,
            },
        );
        let restarted = Incarnation {
            host: HostId::A,
            number: 2,
        };
        assert_eq!(arbiter.claim(Generation(2), b), Verdict::Won);
        assert_eq!(arbiter.claim(Generation(2), a), Verdict::Lost);
        assert_eq!(arbiter.claim(Generation(2), b), Verdict::Won);
        assert_eq!(arbiter.claim(Generation(1), a), Verdict::Won);
        assert_eq!(arbiter.claim(Generation(1), restarted), Verdict::Lost);
        assert_eq!(arbiter.owner(Generation(2)), Some(b));
    }
}
