//! The device thread: one owner of guest memory, queues, disk or TAP, and all their waiting.
//!
//! ```text
//!  [alone]  kick eventfd ─► kick ─► perform ─► completion ─► input ─► deliver at once ─► call eventfd
//!  [mirror] the same; what changes the device is an entry of the log, and its completion waits until that is committed
//!  [follow] entry of the log ─► apply      [attend] a card of the same VM waits meanwhile
//!  [gated]  gate: Kick ─► kick ─► perform ─► completion ─► input ─► log, bounce store ─► gate: Deliver ─► deliver
//! ```
//! What differs between a disk and a network is behind [`Device`].

use ft_client::{Counters, events::Events};
use ft_protocol::{Body, Committed, Lsn, message::Digest};

use crate::{exit::End, guest_side::GuestSide};

pub mod alone;
pub(crate) mod attend;
pub(crate) mod follow;
pub mod gated;
pub mod mirror;
mod patience;
pub mod uring;

pub use mirror::{Logged, Mirror};
pub use uring::{Buffer, Completion, Fallocate, GuestBuffer, Uring};

/// Tokens from here on belong to the loop; a device uses smaller ones.
pub const LOOP_TOKENS: u64 = 1 << 63;

/// Which life the device leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// No ft-log: the guest gets everything at once.
    Alone,
    /// Reaches the outside world, and logs what comes from there.
    Live,
    /// Repeats what the log says.
    Follows,
}

/// What a device of engine `device` is to its VM, as far as this host knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// About to be one of two: from here on only the pair knows which one counts.
    Joins,
    /// It came to nothing: all is as it was.
    NeverJoined,
    /// The VM starts without a backup.
    Alone,
    /// No other one counts any more, or the other one has everything and nobody goes on.
    Last,
}

/// Something from outside for the guest.
#[derive(Debug)]
pub struct Input {
    /// Queue it is for.
    pub queue: u16,
    /// What [`GuestSide::deliver`] takes.
    pub payload: Vec<u8>,
}

/// What a daemon does behind the queues of its device.
pub trait Device {
    /// The half that touches guest memory.
    fn guest(&mut self) -> &mut dyn GuestSide;

    /// The configuration space at this moment.
    fn config(&mut self) -> Vec<u8> {
        self.guest().config()
    }

    /// The driver took these features.
    fn set_features(&mut self, _features: u64) {}

    /// The driver writes to the configuration space.
    ///
    /// # Errors
    /// Why it may not.
    fn set_config(&mut self, _offset: u32, _bytes: &[u8]) -> Result<(), String> {
        Err("the configuration space is read-only".into())
    }

    /// The driver ran before, and what it wrote to the configuration space is not known.
    fn resume(&mut self) {}

    /// A queue is about to start, and none runs. What is behind the device is this one's from here on.
    ///
    /// # Errors
    /// Why the queue cannot start.
    fn attach(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// The last queue stopped, and nothing is in flight: another device may have what is behind this one.
    fn detach(&mut self) {}

    /// The operator gave the device `bytes`, or changed what is behind it (`None`); gives the configuration space from here on.
    ///
    /// # Errors
    /// Why it cannot be.
    fn resize(&mut self, _bytes: Option<u64>) -> Result<Vec<u8>, String> {
        Err("this device has no size".into())
    }

    /// Whether it is a network device, which frontends tell [its MTU](Device::set_mtu) and when to [announce](Device::announce) it.
    fn is_network(&self) -> bool {
        false
    }

    /// The guest is told this MTU.
    ///
    /// # Errors
    /// Why it cannot be.
    fn set_mtu(&mut self, _mtu: u64) -> Result<(), String> {
        Err("this device has no MTU".into())
    }

    /// The guest came from elsewhere: the network is to learn that its address is here now.
    fn announce(&mut self, _mac: [u8; 6]) {}

    /// What the device counts is to be found there from here on.
    fn count_in(&mut self, _counters: Counters) {}

    /// The driver notified a queue.
    fn kicked(&mut self, _queue: u16) {}

    /// The device begins its life.
    ///
    /// # Errors
    /// [`End`], as for all calls here: the daemon ends.
    fn start(&mut self, life: Life, io: &mut Uring) -> Result<(), End>;

    /// Performs what the last kick drained. `marker` marks its outputs; without one there is nothing to wait for.
    ///
    /// # Errors
    /// [`End`].
    fn perform(&mut self, marker: Option<Lsn>, io: &mut Uring) -> Result<(), End>;

    /// One of the device's operations finished.
    ///
    /// # Errors
    /// [`End`].
    fn complete(&mut self, completion: Completion, io: &mut Uring) -> Result<(), End>;

    /// The next input, if something arrived.
    ///
    /// # Errors
    /// [`End`].
    fn take_input(&mut self, io: &mut Uring) -> Result<Option<Input>, End>;

    /// A payload's buffer comes back.
    fn recycle(&mut self, payload: Vec<u8>);

    /// An input of the log was delivered while following.
    fn followed(&mut self) {}

    /// The replay is over: from here on the device is live.
    ///
    /// # Errors
    /// [`End`].
    fn go_live(&mut self, io: &mut Uring, events: &mut Events) -> Result<(), End>;

    /// Sends the outputs that are committed; gives the marker of the first that is not.
    ///
    /// # Errors
    /// [`End`].
    fn release(&mut self, _committed: Committed) -> Result<Option<Lsn>, End> {
        Ok(None)
    }

    /// Engine `device`: the device's part in its VM changes. What it notes of that survives a power cut.
    ///
    /// # Errors
    /// [`End`] where it cannot take this part.
    fn take_part(&mut self, _part: Part) -> Result<(), End> {
        Ok(())
    }

    /// Engine `device`, primary: what the device changes from here on goes through `mirror`.
    ///
    /// # Errors
    /// [`End`] where the device has no such engine.
    fn mirror(&mut self, _mirror: Mirror) -> Result<(), End> {
        Err(End::environment("this device has no engine 'device'"))
    }

    /// Engine `device`, primary: completes what is committed, and logs what found no room; gives the marker of the first that is not
    /// committed.
    ///
    /// # Errors
    /// [`End`].
    fn committed(&mut self, _committed: Committed, _io: &mut Uring) -> Result<Option<Lsn>, End> {
        Ok(None)
    }

    /// Engine `device`: digest of what a new backup must have in common with this device, whatever it holds; `None` where what it holds
    /// cannot be brought up.
    fn shape(&self) -> Option<[u8; 32]> {
        None
    }

    /// Engine `device`, live side: a new backup is being synchronised, or none (any more). Another number is another synchronisation.
    fn synchronise(&mut self, _number: Option<u32>) {}

    /// Engine `device`, live side: what the new backup's device holds there, block by block.
    fn compare(&mut self, _sector: u64, _digests: &[Digest]) {}

    /// Engine `device`, new backup: what this device holds there.
    ///
    /// # Errors
    /// [`End::Replica`] where that cannot be said.
    fn digests(&mut self, _sector: u64, _sectors: u32) -> Result<Vec<Digest>, End> {
        Err(End::Replica("this device cannot be brought up".into()))
    }

    /// Engine `device`, primary: nobody uses the device any more, and nothing is in flight. The last entry.
    fn power_off(&mut self) {}

    /// Engine `device`, backup: does what the primary did.
    ///
    /// # Errors
    /// [`End::Replica`] where that cannot be done here: this side is no equal any more.
    fn apply(&mut self, body: &Body<'_>) -> Result<(), End> {
        Err(End::Replica(format!(
            "this device cannot follow a {} entry",
            body.name()
        )))
    }

    /// Whether another kick may be taken: bounce memory is bounded.
    fn has_room(&self) -> bool {
        true
    }

    /// Whether nothing is in flight.
    fn is_idle(&self) -> bool;

    /// Does what is due; gives when to be called again, in ns of [`ft_client::events::monotonic_ns`].
    ///
    /// # Errors
    /// [`End`].
    fn tick(&mut self, _now_ns: u64, _io: &mut Uring, _events: &mut Events) -> Result<Option<u64>, End> {
        Ok(None)
    }

    /// The daemon ends: nothing is called after this.
    fn ended(&mut self, _events: &mut Events) {}

    /// Somebody waits for the device to be idle: what waits for better times ends with an error.
    ///
    /// # Errors
    /// [`End`].
    fn give_up(&mut self, _io: &mut Uring) -> Result<(), End> {
        Ok(())
    }

    /// How long, at most, to look for more work before sleeping: a wake-up costs more than a short wait.
    fn poll_ns_max(&self) -> u64 {
        0
    }
}

/// The earlier of two deadlines.
fn earliest(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    one.into_iter().chain(other).min()
}

/// Time left until a deadline.
fn until(deadline_ns: Option<u64>, now_ns: u64) -> Option<std::time::Duration> {
    deadline_ns.map(|deadline| std::time::Duration::from_nanos(deadline.saturating_sub(now_ns)))
}
