//! What goes into a replica and what comes out of it: its configuration, events and actions, and the names of its roles.

use crate::{
    held::Committed,
    ids::{Generation, Lsn},
    message::{Message, Strength},
    timing::Timing,
    versions::Versions,
};

/// What this side is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Waiting for the local daemons, the peer, and (primary) the claim of the first generation.
    Pairing,
    /// Primary with a backup: executes, logs, holds outputs.
    Recording,
    /// Backup: receives and replays.
    Replaying,
    /// The peer is suspected; the arbiter was asked. Execution goes on, outputs stay held.
    Arbitrating,
    /// Backup that won: consumes what it received.
    GoingLive,
    /// Executes for the outside world without a backup that could take over. One may be being synchronised.
    Live,
    /// Lost, refused or broken. Mute for good.
    Halted,
    /// The guest powered off.
    Off,
}

/// The arbiter's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The generation is this side's.
    Won,
    /// Somebody else has it.
    Lost,
    /// No answer. Ask again; until then nothing is released.
    Unreachable,
}

/// What happens to a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Shim and devices have joined; the digest of what they would run.
    LocalReady {
        /// See [`Hello::fingerprint`].
        fingerprint: [u8; 32],
        /// The same without what a synchronisation brings: what a new backup must have in common with a VM that has run. `None` where the
        /// state of this VM cannot be transferred.
        shape: Option<[u8; 32]>,
    },
    /// A logging channel is connected; whatever was before it is over.
    ChannelUp,
    /// The logging channel broke or was closed.
    ChannelDown,
    /// A control message from the channel, or a heartbeat datagram.
    Message {
        /// The sender's generation.
        generation: Generation,
        /// The message.
        message: Message,
    },
    /// Primary: local entries up to here are in order and ready to send.
    Appended {
        /// Last LSN.
        through: Lsn,
    },
    /// Backup: entries up to here are stored where the local replay will find them.
    Received {
        /// The sender's generation.
        generation: Generation,
        /// First LSN of the batch.
        from: Lsn,
        /// Last LSN of the batch.
        through: Lsn,
    },
    /// Backup: the local shim has applied entries up to here.
    Consumed {
        /// Last LSN.
        through: Lsn,
    },
    /// Backup: entries up to here are in the journal, flushed to stable storage.
    Durable {
        /// Last LSN.
        through: Lsn,
    },
    /// Backup: the replay has no room for what comes next, or has room again.
    ReplayFull {
        /// Whether it is full.
        full: bool,
    },
    /// The entry at this LSN is the guest's power-off.
    PowerOffEntry {
        /// Its LSN.
        lsn: Lsn,
    },
    /// New backup: the state of the VM as of [`Action::Synchronise`] is here, whole.
    Adopted,
    /// Survivor: every output whose marker is above the watermark of [`Action::Hold`] is held by now, whatever a device read before.
    Holding {
        /// The generation of that action.
        generation: Generation,
    },
    /// The entry at this LSN is [`crate::Body::Synced`]. Told before the [`Event::Appended`] or [`Event::Received`] that has it.
    SyncedEntry {
        /// Its LSN.
        lsn: Lsn,
        /// Which backup is meant.
        instance: u64,
    },
    /// The entry at this LSN is [`crate::Body::Configuration`]. Told after the [`Event::Received`] that has it, and as soon as it is appended.
    ConfigurationEntry {
        /// Its LSN.
        lsn: Lsn,
        /// The times from here on.
        timing: Timing,
    },
    /// The arbiter answered for a generation.
    Arbiter {
        /// Which one was asked for.
        generation: Generation,
        /// The answer.
        verdict: Verdict,
    },
    /// A local sibling died or reported divergence: this replica is over.
    LocalFailure {
        /// For the operator.
        reason: String,
    },
    /// Time passes.
    Tick,
}

/// What the shell must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a control message on the channel.
    Send(Message),
    /// Send a heartbeat datagram.
    SendHeartbeat(Message),
    /// Send the log entries up to here on the channel.
    SendEntries {
        /// Last LSN.
        through: Lsn,
    },
    /// A channel is back: entries after this one are sent (again), the ones before are there.
    Rewind {
        /// The peer's last entry.
        after: Lsn,
    },
    /// The peer has every entry up to here: they need not be kept.
    Forget {
        /// Last LSN.
        through: Lsn,
    },
    /// Let outputs go whose marker is at or below the watermark.
    Commit(Committed),
    /// Survivor: take this host as a backup that is to be synchronised: have the state as of `start` transferred, and keep the entries
    /// behind it. New backup: adopt the state as of `start`, and replay what comes behind it; [`Event::Adopted`] says that it is there.
    Synchronise {
        /// Last entry whose effect is in the state.
        start: Lsn,
    },
    /// Survivor: the backup that was being synchronised is given up; the transfer and the entries that were kept are over.
    GiveUp {
        /// Why, for the operator.
        reason: &'static str,
    },
    /// New backup: no survivor takes this side now. It asks again on the next channel.
    NotTaken {
        /// The peer's word, for the operator.
        reason: String,
    },
    /// Survivor: the watermark falls. Outputs whose marker is above it are held from here on, those at or below it may leave.
    /// [`Event::Holding`] says that it is so at every device.
    Hold {
        /// The new watermark.
        after: Lsn,
    },
    /// Survivor: append the entry [`crate::Body::Synced`] at once, behind a power-off too.
    AppendSynced {
        /// Which backup is meant.
        instance: u64,
    },
    /// The share of its time, in thousandths, that the vCPU must pause: the backup lags.
    Throttle {
        /// 0 to [`crate::limits::THROTTLE_MAX`].
        permille: u32,
    },
    /// Ask the arbiter for a generation (again).
    AskArbiter {
        /// Which one.
        generation: Generation,
    },
    /// Tell the local clients their role. For [`Role::GoingLive`] the replay ends after `replay_end`.
    Publish {
        /// The role.
        role: Role,
        /// The generation.
        generation: Generation,
        /// Last entry to replay; meaningful for `GoingLive` and `Off`.
        replay_end: Lsn,
    },
    /// The peer is suspected (for the operator).
    Suspect {
        /// Why.
        reason: &'static str,
    },
    /// Close the channel: the pair is over.
    CloseChannel,
    /// Break the channel at once: a new one is to be connected.
    BreakChannel,
    /// This side is over. The role is published already.
    Halt {
        /// For the operator.
        reason: String,
    },
    /// The guest powered off and the log is complete: end with success.
    Finish,
}

/// Times and names of a replica.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The VM.
    pub vm: String,
    /// What this side speaks: [`Versions::SPOKEN`].
    pub versions: Versions,
    /// Whether this side was started as primary.
    pub primary: bool,
    /// Primary without a backup from the start.
    pub alone: bool,
    /// Started as backup with nothing: it asks a live survivor to synchronise it, and never pairs with a primary that starts.
    pub joins: bool,
    /// Whether a new backup is taken while this side is live. A shell that cannot transfer the state says no.
    pub takes_joiners: bool,
    /// The times that it starts with. A backup takes those of the side that executes the VM; [`Replica::timing`](super::Replica::timing) has
    /// those in force.
    pub timing: Timing,
    /// Primary: what an acknowledgement must mean.
    pub ack: Strength,
    /// Backup: whether its journal is flushed, so that it can acknowledge durably.
    pub keeps_journal: bool,
    /// Drawn at random at every start of the daemon.
    pub instance: u64,
}
