//! The story before an exploration with a new backup: a pair, an entry, a failure, a side that goes live, and a host that starts anew.

use ft_protocol::Role;
use stateright::Model;

use super::{Lost, Small, State, Step};

impl Small {
    /// From the beginning to where the host that was lost has started anew. What may happen from here on is what it was.
    pub(super) fn prelude(&self, mut state: State, lost: Lost) -> State {
        let (lost, survivor) = match lost {
            Lost::Primary => (0, 1),
            Lost::Backup => (1, 0),
        };
        let timeouts = self.timeouts;
        state.crashes = 1;
        state.restarts = 1;
        state.sides[usize::from(survivor)].timeouts = 1;
        let pair = [
            Step::Ready(0),
            Step::Ready(1),
            Step::Decide(0),
            Step::Answer(0),
            Step::Connect,
        ];
        let entry = [
            Step::Deliver(1),
            Step::Deliver(0),
            Step::Append(0),
            Step::Deliver(1),
            Step::Consume(1),
            Step::Deliver(0),
        ];
        let failure = [
            Step::Crash(lost),
            Step::Timeout(survivor),
            Step::Decide(0),
            Step::Answer(0),
            Step::Restart(lost),
        ];
        for step in pair.into_iter().chain(entry).chain(failure).chain([Step::Ready(lost)]) {
            let mut possible = Vec::new();
            self.actions(&state, &mut possible);
            assert!(possible.contains(&step), "{step:?} is none of {possible:?}");
            state = self.next_state(&state, step).expect("every step leads somewhere");
        }
        let side = &mut state.sides[usize::from(survivor)];
        assert_eq!(side.replica.role(), Role::Live);
        (side.own, side.timeouts) = (0, timeouts);
        state.sides[usize::from(lost)].timeouts = timeouts;
        (state.breaks, state.crashes, state.restarts) = (self.breaks, self.crashes, self.restarts);
        state
    }
}
