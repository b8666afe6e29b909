//! The queue of what happens next. Two happenings of one moment keep the order in which they were put in.

use std::{cmp::Ordering, collections::BinaryHeap};

use ft_protocol::{Generation, Lsn, Verdict};

use crate::{
    guest::{Answer, Request},
    host::HostId,
    network::{ConnectionId, Packet},
};

/// Something that happens at one moment of virtual time.
#[derive(Clone, Debug)]
pub enum Happening {
    /// A packet of the logging channel is at the receiver's door.
    Packet {
        /// The receiver.
        to: HostId,
        /// The connection it travelled on.
        connection: ConnectionId,
        /// What it is.
        packet: Packet,
    },
    /// A packet is in the receiver's kernel, through the network.
    Arrived {
        /// The receiver.
        to: HostId,
        /// The connection it travelled on.
        connection: ConnectionId,
        /// What it is.
        packet: Packet,
    },
    /// What waited for the end of a partition or stall goes on.
    Unpark {
        /// The sender of what waited.
        from: HostId,
    },
    /// A datagram arrives.
    Datagram {
        /// The receiver.
        to: HostId,
        /// One frame.
        bytes: Vec<u8>,
    },
    /// A claim reaches the arbiter.
    Claim {
        /// The number of the request.
        ask: u32,
        /// What is claimed.
        generation: Generation,
        /// By which start of which host.
        by: Work,
    },
    /// A client's request arrives at a host.
    Request {
        /// The host.
        to: HostId,
        /// The request.
        request: Request,
    },
    /// An answer arrives at its client.
    Answered {
        /// The answer.
        answer: Answer,
    },
    /// A client sends its next request, or the same one again.
    Client {
        /// Which.
        client: u8,
    },
    /// A fault begins.
    Fault {
        /// Its number in the plan.
        number: usize,
    },
    /// A fault that lasts ends.
    Heal {
        /// Its number in the plan.
        number: usize,
    },
    /// A host does something. Nothing, if that start of it is over.
    Host {
        /// Which start of which host.
        of: Work,
        /// What.
        task: Task,
    },
}

/// A start of a host, as tasks name it.
pub type Work = crate::host::Incarnation;

/// What a host has planned for itself, or is about to learn.
#[derive(Clone, Debug)]
pub enum Task {
    /// The daemons of the host have joined.
    Start,
    /// The core's deadline.
    Tick,
    /// The vCPU is at a stop point.
    Stop,
    /// The devices look at the commit watermark.
    Release,
    /// Try to connect the channel.
    Connect,
    /// The local end of this connection is closed or broken.
    Closed {
        /// Which.
        connection: ConnectionId,
    },
    /// The daemon hands the channel what has collected.
    Flush,
    /// The disk has flushed what was stored when it began.
    Flushed {
        /// Entries that are durable now.
        entries: u64,
    },
    /// The arbiter did not answer in time.
    AskTimeout {
        /// The number of the request.
        ask: u32,
    },
    /// The state of the VM is here, unless something came between (new backup).
    StateHere {
        /// Which attempt it belongs to.
        attempt: u32,
        /// The last entry whose effect is in it.
        start: Lsn,
    },
    /// Every device holds its outputs (survivor).
    Holding {
        /// The generation in which that was asked for.
        generation: Generation,
    },
    /// The shim has dropped the rest of the replay (only the mutant that does so).
    TailDropped,
    /// The arbiter's answer is here.
    Verdict {
        /// The number of the request.
        ask: u32,
        /// The generation.
        generation: Generation,
        /// The answer.
        verdict: Verdict,
    },
    /// A received entry is stored at last (only the mutant that acknowledges early stores late).
    StoreLate {
        /// The connection it came on.
        connection: ConnectionId,
        /// The entry's frame.
        frame: Vec<u8>,
    },
}

#[derive(Debug)]
struct Scheduled {
    at_ns: u64,
    number: u64,
    what: Happening,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at_ns, other.number).cmp(&(self.at_ns, self.number))
    }
}

/// Everything that is going to happen.
#[derive(Debug, Default)]
pub struct Queue {
    heap: BinaryHeap<Scheduled>,
    pushed: u64,
}

impl Queue {
    /// Plans `what` for `at_ns`.
    pub fn push(&mut self, at_ns: u64, what: Happening) {
        self.pushed += 1;
        self.heap.push(Scheduled {
            at_ns,
            number: self.pushed,
            what,
        });
    }

    /// The next happening and its time.
    pub fn pop(&mut self) -> Option<(u64, Happening)> {
        self.heap.pop().map(|next| (next.at_ns, next.what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_comes_first_and_ties_keep_their_order() {
        let mut queue = Queue::default();
        for (at_ns, client) in [(5, 0), (3, 1), (5, 2), (3, 3)] {
            queue.push(at_ns, Happening::Client { client });
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.pop())
            .map(|(at_ns, what)| match what {
                Happening::Client { client } => (at_ns, client),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(order, [(3, 1), (3, 3), (5, 0), (5, 2)]);
    }
}
