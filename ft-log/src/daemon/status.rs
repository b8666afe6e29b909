//! The daemon's side of the management plane: shows its figures, takes its orders.

use std::io;

use tracing::info;

use super::Daemon;
use crate::{
    control::shared::{Figures, Orders, StoppedBy},
    exit::Exit,
    heartbeat::Heartbeats,
};

impl Daemon {
    /// Shows how things are. A few relaxed stores: cheap enough for every turn of the loop.
    pub(super) fn show(&self) {
        let (vm, replica) = (&self.vm, &self.vm.replica);
        let journal = vm.journal.status();
        self.shared.publish(&Figures {
            role: replica.role(),
            generation: replica.generation().0,
            version: replica.version().unwrap_or(0),
            last: replica.last().0,
            committed: vm.local.region.committed().lsn().0,
            consumed: vm.local.region.consumed().0,
            entries: vm.counters.entries,
            bytes: vm.counters.bytes,
            channel_up: vm.link.channel.is_some() && replica.is_channel_open(),
            datagrams_ignored: self.heartbeats.as_ref().map_or(0, Heartbeats::ignored),
            arbiter_unreachable: vm.arbiter_trouble.is_some(),
            journal: journal.state,
            segment: journal.segment.into(),
            segment_bytes: journal.segment_bytes,
            journal_waiting_bytes: journal.waiting_bytes,
            timing: *replica.timing(),
        });
    }

    /// Does what the operator ordered.
    pub(super) fn obey(&mut self) -> io::Result<()> {
        let Orders {
            rotate,
            configure,
            stop,
        } = self.shared.take_orders();
        if rotate {
            info!("the journal goes on with a new segment, as the operator ordered");
            self.vm.journal.rotate();
        }
        if let Some(order) = configure {
            self.configure(order)?;
        }
        let reason = match stop {
            None => return Ok(()),
            Some(StoppedBy::Signal) => "terminated by the operator",
            Some(StoppedBy::Control) => "terminated by the operator (control socket)",
        };
        self.fail(Exit::Ordinary, reason.into())
    }
}
