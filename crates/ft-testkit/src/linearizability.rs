//! Whether what the clients saw can be explained by one ledger that served one request after the other.
//!
//! The search is stateright's: it looks for an order of all operations that respects the time at which each was asked and answered,
//! and in which a plain ledger gives the same answers. It knows nothing of hosts, logs or generations, and nothing of the
//! order that the guest's answers claim.

use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

use crate::guest::{Operation, Request};

/// The ledger as the clients understand it: how many records there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Records(u32);

impl SequentialSpec for Records {
    type Op = bool;
    type Ret = u32;

    /// An append, or a look; both answer with the number of records.
    fn invoke(&mut self, appends: &bool) -> u32 {
        self.0 += u32::from(*appends);
        self.0
    }
}

/// What the clients of one run asked and were answered.
#[derive(Clone, Debug)]
pub struct History(LinearizabilityTester<u8, Records>);

impl Default for History {
    fn default() -> Self {
        Self(LinearizabilityTester::new(Records::default()))
    }
}

impl History {
    /// A client sends a request for the first time.
    pub fn invoked(&mut self, request: &Request) {
        let appends = matches!(request.operation, Operation::Append { .. });
        // A client has one request open; anything else is an invalid history, and the check says so.
        let _ = self.0.on_invoke(request.client, appends);
    }

    /// It gets its answer.
    pub fn answered(&mut self, client: u8, records: u32) {
        let _ = self.0.on_return(client, records);
    }

    /// Whether there is such an order.
    #[must_use]
    pub fn is_linearizable(&self) -> bool {
        self.0.is_consistent()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(client: u8, operation: Operation) -> Request {
        let id = 1;
        Request { client, id, operation }
    }

    const APPEND: Operation = Operation::Append { value: 1 };

    #[test]
    fn operations_that_overlap_may_be_in_any_order() {
        for answers in [[1, 2], [2, 1]] {
            let mut history = History::default();
            history.invoked(&request(0, APPEND));
            history.invoked(&request(1, APPEND));
            history.answered(0, answers[0]);
            history.answered(1, answers[1]);
            assert!(history.is_linearizable(), "{answers:?}");
        }
    }

    #[test]
    fn an_answer_that_forgets_what_was_answered_before_is_none() {
        let mut history = History::default();
        history.invoked(&request(0, APPEND));
        history.answered(0, 1);
        history.invoked(&request(1, Operation::Read));
        history.answered(1, 0);
        assert!(!history.is_linearizable());
        // Two appends under one number: a fork.
        let mut history = History::default();
        history.invoked(&request(0, APPEND));
        history.invoked(&request(1, APPEND));
        history.answered(0, 1);
        history.answered(1, 1);
        assert!(!history.is_linearizable());
    }

    #[test]
    fn an_append_that_was_never_answered_may_have_happened_or_not() {
        for seen in [0, 1] {
            let mut history = History::default();
            history.invoked(&request(0, APPEND));
            history.invoked(&request(1, Operation::Read));
            history.answered(1, seen);
            assert!(history.is_linearizable());
        }
    }
}
