//! Names of the operations in flight.

use crate::uring::{Completion, Uring};

/// Which operation a completion ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Read of the doorbell that local clients ring.
    Doorbell,
    /// Read of the bell that is rung for an order.
    Order,
    /// Accept on the unix socket.
    LocalAccept,
    /// Receive on a local connection, by its number.
    Local(u32),
    /// Accept on the logging channel's address.
    ChannelAccept,
    /// Connect to the peer.
    ChannelConnect,
    /// Receive on a channel, by its number.
    ChannelReceive(u32),
    /// Send on a channel, by its number.
    ChannelSend(u32),
    /// Receive of a heartbeat.
    HeartbeatReceive,
    /// Send of a heartbeat.
    HeartbeatSend,
    /// The arbiter's current step.
    Arbiter,
    /// The journal's current step.
    Journal,
    /// Something whose end nobody waits for.
    Cleanup,
}

/// The ring of this daemon.
pub type Ring = Uring<Token>;
/// A completion on it.
pub type Done = Completion<Token>;
