//! The loop: completions, rings and timers in; what the core decides, out.
//!
//! ```text
//!   ┌─► completions ─► [receive] entries of the peer ──┐
//!   │   doorbell, spin ─► [record] entries of clients ─┼─► Replica::step ─► [actions]
//!   │   deadlines ─────────────────────────────────────┘                        │
//!   └── enter: submit everything and wait ◄── flush ◄────────────────────────────┘
//! ```
//! One thread a VM owns all of this. It sleeps in io_uring_enter, or looks for entries first where that pays ([polling]). Three things are
//! plain system calls because they are done at once: ringing an eventfd, waking the shim, and lines for people (log, events).

mod actions;
mod configure;
mod link;
mod polling;
mod receive;
mod record;
mod repair;
mod status;
mod vm;

use std::{collections::VecDeque, io, os::fd::OwnedFd, rc::Rc, sync::Arc};

use ft_client::events::{Events, monotonic_ns};
use ft_protocol::{Action, Event, Role, Strength};
use serde_json::json;
use tracing::{info, warn};

use self::{
    link::Link,
    vm::{Counters, Vm},
};
use crate::{
    arbiter::Arbiter,
    clients::{Clients, News},
    config::{Config, JournalPolicy, Side},
    control::Shared,
    exit::Exit,
    heartbeat::Heartbeats,
    journal_writer::JournalFailure,
    local::Local,
    merge::Violation,
    timers::ns,
    tls::Identity,
    token::{Done, Ring, Token},
    uring::Operation,
};

/// Looks at the rings between two looks at the clock.
const SPINS: u32 = 16;
/// How long the loop sleeps while an entry is claimed and not there: its writer need not ring.
const GAP_LOOK_NS: u64 = 100_000;
/// Between two looks at a replay ring that is full.
const FULL_RETRY_NS: u64 = 1_000_000;
/// Between two looks at a replay that trails.
const REPLAY_LOOK_NS: u64 = 10_000_000;
/// Bytes of an eventfd's counter.
const BELL_BYTES: usize = 8;
/// How long the end of a side waits for operations that the kernel cannot break off, such as a flush on a dead disk.
const WIND_DOWN_NS: u64 = 1_000_000_000;

/// What the daemon is made of.
#[derive(Debug)]
pub struct Parts {
    /// The ring.
    pub ring: Ring,
    /// Where events go.
    pub events: Events,
    /// Listening unix socket.
    pub socket: OwnedFd,
    /// Backup: listening TCP socket.
    pub listener: Option<OwnedFd>,
    /// Heartbeats, unless this side runs alone.
    pub heartbeats: Option<Heartbeats>,
    /// What local processes share.
    pub local: Local,
    /// The arbiter.
    pub arbiter: Arbiter,
    /// For TLS on the logging channel.
    pub identity: Option<Identity>,
    /// The management plane.
    pub shared: Arc<Shared>,
    /// A random number that names this start of the daemon.
    pub instance: u64,
}

#[derive(Clone, Copy, Debug)]
struct Ending {
    exit: Exit,
    until_ns: u64,
}

/// How a side ended.
#[derive(Clone, Debug)]
pub struct Over {
    /// The status for the operator.
    pub exit: Exit,
    /// Why.
    pub reason: String,
}

/// The daemon of one VM.
#[derive(Debug)]
pub struct Daemon {
    config: Config,
    ring: Ring,
    events: Events,
    order_bell: Rc<OwnedFd>,
    doorbell: Rc<OwnedFd>,
    /// `None` while a read is in flight.
    doorbell_bytes: Option<Vec<u8>>,
    clients: Clients,
    heartbeats: Option<Heartbeats>,
    vm: Vm,
    queue: VecDeque<Event>,
    actions: Vec<Action>,
    news: Vec<News>,
    scratch: Vec<u8>,
    report_at_ns: u64,
    /// The operator's change that is on its way into the log.
    configuring: Option<configure::Pending>,
    ending: Option<Ending>,
    /// Why this side is over.
    reason: String,
    shared: Arc<Shared>,
}

impl Daemon {
    /// Puts the parts together and starts to listen.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn new(config: Config, parts: Parts) -> io::Result<Self> {
        let now_ns = monotonic_ns();
        let connects = (config.role == Side::Primary || config.resync) && !config.alone;
        let timeout_ms = u32::try_from(config.channel_timeout_ms()).unwrap_or(u32::MAX);
        let link = Link::new(parts.listener, connects.then_some(now_ns), timeout_ms, parts.identity);
        let mut daemon = Self {
            clients: Clients::new(&config.vm, parts.socket, ns(config.timers.join_timeout_ms)),
            doorbell: Rc::new(parts.local.doorbell()?),
            doorbell_bytes: Some(vec![0; BELL_BYTES]),
            ring: parts.ring,
            events: parts.events,
            order_bell: Rc::new(parts.shared.bell()?),
            heartbeats: parts.heartbeats,
            vm: Vm::new(&config, parts.instance, parts.local, link, parts.arbiter),
            queue: VecDeque::new(),
            actions: Vec::new(),
            news: Vec::new(),
            scratch: Vec::new(),
            report_at_ns: now_ns + ns(config.timers.report_interval_ms),
            configuring: None,
            ending: None,
            reason: String::new(),
            shared: parts.shared,
            config,
        };
        daemon.clients.accept(&mut daemon.ring)?;
        daemon.read_doorbell()?;
        daemon.read_order_bell(vec![0; BELL_BYTES])?;
        if let Some(heartbeats) = &mut daemon.heartbeats {
            heartbeats.receive(&mut daemon.ring)?;
        }
        daemon.accept_channel()?;
        info!(
            "VM '{}', {:?}, waiting for {} on {}",
            daemon.config.vm,
            daemon.config.role,
            daemon.vm.local.missing().collect::<Vec<_>>().join(", "),
            daemon.config.socket_path.display()
        );
        Ok(daemon)
    }

    /// Runs until this side is over.
    ///
    /// # Errors
    /// A ring that does not work any more.
    pub fn run(mut self) -> io::Result<Over> {
        // What was ordered before there was a ring to be woken by.
        self.obey()?;
        loop {
            while let Some(done) = self.ring.next_completion() {
                self.completed(done)?;
            }
            self.record()?;
            if self.vm.is_full {
                self.receive_log()?;
            }
            self.tell_full()?;
            self.look_at_consumed()?;
            self.look_at_holding()?;
            let now_ns = monotonic_ns();
            self.on_time(now_ns)?;
            self.flush(now_ns)?;
            self.show();
            if let Some(exit) = self.is_over(now_ns) {
                self.report();
                self.show();
                // Its sockets and its memory go now: the process may have other VMs.
                self.ring.wind_down(monotonic_ns() + WIND_DOWN_NS)?;
                let reason = self.reason;
                return Ok(Over { exit, reason });
            }
            self.tell_shim()?;
            self.sleep()?;
        }
    }

    /// Looks for the next entry as long as that pays; whether it is there.
    fn look(&mut self) -> io::Result<bool> {
        let vm = &mut self.vm;
        if vm.local.merger.is_ready() {
            return Ok(true);
        }
        let is_idle = vm.replica.role() == Role::Recording && vm.replica.acknowledged() >= vm.replica.last();
        let until_ns = if is_idle { vm.polling.idle(monotonic_ns()) } else { None };
        let Some(until_ns) = until_ns else { return Ok(false) };
        if self.ring.has_queued() {
            self.ring.enter(None)?;
        }
        while !self.ring.has_news() && monotonic_ns() < until_ns {
            for _ in 0..SPINS {
                if self.vm.local.merger.is_ready() {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
        }
        Ok(false)
    }

    /// Hands over what is queued and waits for something to do.
    fn sleep(&mut self) -> io::Result<()> {
        let listens = self.vm.takes_entries();
        if listens && self.look()? {
            return match self.ring.has_queued() {
                true => self.ring.enter(None),
                false => Ok(()),
            };
        }
        // Whoever appends after this rings; whoever appended before is seen by the second look.
        if listens {
            self.vm.local.merger.set_sleeping(true);
        }
        let now_ns = monotonic_ns();
        let mut wait_ns = self.deadline_ns().saturating_sub(now_ns);
        if listens && self.vm.local.merger.is_ready() {
            wait_ns = 0;
        } else if listens && self.vm.local.merger.has_gap() {
            wait_ns = wait_ns.min(GAP_LOOK_NS);
        }
        self.ring.enter(Some(wait_ns))?;
        if listens {
            self.vm.local.merger.set_sleeping(false);
        }
        Ok(())
    }

    fn completed(&mut self, done: Done) -> io::Result<()> {
        match done.token {
            Token::Doorbell => {
                self.doorbell_bytes = Some(done.memory.into_bytes());
                self.look_at_consumed()
            }
            Token::Order => {
                self.read_order_bell(done.memory.into_bytes())?;
                self.obey()
            }
            Token::LocalAccept => {
                let socket = done.result.map(|_| done.descriptor);
                self.clients.accepted(&mut self.ring, socket, monotonic_ns())
            }
            Token::Local(number) => {
                let mut news = std::mem::take(&mut self.news);
                self.clients
                    .received(&mut self.ring, number, done, &mut self.vm.local, &mut news)?;
                for item in news.drain(..) {
                    self.heard(item)?;
                }
                self.news = news;
                Ok(())
            }
            Token::ChannelAccept => self.channel_accepted(done),
            Token::ChannelConnect => self.channel_connected(done),
            Token::ChannelReceive(number) => self.channel_received(number, done),
            Token::ChannelSend(number) => self.channel_sent(number, done),
            Token::HeartbeatReceive => {
                let Some(heartbeats) = &mut self.heartbeats else {
                    return Ok(());
                };
                match heartbeats.received(&mut self.ring, done)? {
                    Some((generation, message)) => self.handle(Event::Message { generation, message }),
                    None => Ok(()),
                }
            }
            Token::HeartbeatSend => {
                if let Some(heartbeats) = &mut self.heartbeats {
                    heartbeats.sent(done);
                }
                Ok(())
            }
            Token::Arbiter => match self.vm.arbiter.completed(&mut self.ring, done)? {
                Some(answer) => self.arbiter_answered(answer),
                None => Ok(()),
            },
            Token::Journal => match self.vm.journal.completed(&mut self.ring, done) {
                Ok(()) => {
                    let through = self.vm.journal.durable();
                    if through > self.vm.replica.progress().durable {
                        self.handle(Event::Durable { through })?;
                    }
                    Ok(())
                }
                Err(failure) => self.journal_failed(failure),
            },
            Token::Cleanup => Ok(()),
        }
    }

    fn read_doorbell(&mut self) -> io::Result<()> {
        let Some(bytes) = self.doorbell_bytes.take() else {
            return Ok(());
        };
        let read = Operation::Read(Rc::clone(&self.doorbell), bytes);
        self.ring.submit(Token::Doorbell, read)
    }

    fn read_order_bell(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        let read = Operation::Read(Rc::clone(&self.order_bell), bytes);
        self.ring.submit(Token::Order, read)
    }

    /// What a local client said or did.
    fn heard(&mut self, news: News) -> io::Result<()> {
        match news {
            News::Complete => {
                info!("all local processes have joined");
                let (fingerprint, shape) = (self.vm.local.fingerprint(), self.vm.local.shape());
                self.handle(Event::LocalReady { fingerprint, shape })
            }
            News::Reported { seat, reason } => {
                let diverged = seat == self.vm.local.shim() && reason.starts_with("diverged");
                let exit = if diverged { Exit::Diverged } else { Exit::LocalFailure };
                self.client_failed(exit, format!("{} failed: {reason}", self.vm.local.name(seat)))
            }
            News::Garbage { seat } => {
                let reason = format!("{} sent something that is no report", self.vm.local.name(seat));
                self.client_failed(Exit::LocalFailure, reason)
            }
            News::Ended { seat } => {
                let reason = format!("{} ended", self.vm.local.name(seat));
                self.client_failed(Exit::LocalFailure, reason)
            }
        }
    }

    /// A client is gone. What it left in its ring and in the region counts: it may have ended in good order.
    fn client_failed(&mut self, exit: Exit, reason: String) -> io::Result<()> {
        while self.record()? {}
        self.look_at_consumed()?;
        if matches!(self.vm.replica.role(), Role::Off | Role::Halted) {
            return Ok(());
        }
        if self.vm.leads() && self.vm.power_off.is_some() {
            info!("{reason}, after the guest powered off");
            return Ok(());
        }
        self.fail(exit, reason)
    }

    /// This replica is over, with this exit status.
    fn fail(&mut self, exit: Exit, reason: String) -> io::Result<()> {
        self.vm.failure = exit;
        self.handle(Event::LocalFailure { reason })
    }

    fn breached(&mut self, violation: Violation) -> io::Result<()> {
        let name = self.vm.local.name(violation.seat);
        let reason = format!("{name} broke the rules of the log: {}", violation.breach);
        self.fail(Exit::LocalFailure, reason)
    }

    fn journal_failed(&mut self, failure: JournalFailure) -> io::Result<()> {
        if let JournalFailure::Exists { .. } = failure {
            return self.fail(Exit::Environment, failure.to_string());
        }
        let stops = self.config.journal_failure == JournalPolicy::Stop || self.is_waited_for();
        let then = if stops {
            "so does this side"
        } else {
            "the VM goes on without a journal"
        };
        tracing::error!("the journal ends here: {failure}; {then} (--journal-failure)");
        let reason = failure.to_string();
        self.events
            .emit("journal_failed", json!({ "reason": reason, "stops": stops }));
        match stops {
            true => self.fail(Exit::Environment, format!("the journal failed: {reason}")),
            false => Ok(()),
        }
    }

    /// Whether the primary's outputs wait for this side's journal: without one it could never acknowledge again.
    fn is_waited_for(&self) -> bool {
        !self.vm.leads()
            && matches!(self.vm.replica.role(), Role::Replaying | Role::Arbitrating)
            && self.vm.replica.ack_strength() == Strength::Durable
    }

    /// How far the shim is with the replay. It rings when it has applied what somebody waits for.
    fn look_at_consumed(&mut self) -> io::Result<()> {
        let role = self.vm.replica.role();
        let replays = matches!(role, Role::Replaying | Role::GoingLive);
        if !(replays || role == Role::Arbitrating && !self.vm.leads()) {
            return Ok(());
        }
        loop {
            let (last, told) = (self.vm.replica.last(), self.vm.replica.progress().replayed);
            if told < last && self.vm.replica.awaits_replay() {
                self.vm.local.region.want_consumed(told.next());
            }
            let through = self.vm.local.region.consumed().min(last);
            if through <= told {
                return Ok(());
            }
            self.handle(Event::Consumed { through })?;
            self.look_at_transfer(through)?;
            if self.vm.replica.progress().replayed == told {
                return Ok(());
            }
        }
    }

    /// A replay that trails is looked at now and then: its progress is what the primary's speed is measured by.
    fn replay_look_ns(&self) -> Option<u64> {
        let trails =
            self.vm.replica.role() == Role::Replaying && self.vm.replica.progress().replayed < self.vm.replica.last();
        trails.then(|| monotonic_ns() + REPLAY_LOOK_NS)
    }

    // ---- time --------------------------------------------------------------------------------------------------------

    fn deadline_ns(&self) -> u64 {
        let full = self.vm.is_full.then(|| monotonic_ns() + FULL_RETRY_NS);
        let silence = (!self.vm.arbiter_warned)
            .then(|| self.vm.arbiter.asked_at_ns())
            .flatten()
            .map(|asked| asked + ns(self.config.timers.arbiter_warning_ms));
        [
            self.vm.replica.deadline_ns(),
            self.vm.link.deadline_ns(),
            self.vm.journal.deadline_ns(),
            self.clients.deadline_ns(),
            self.ending.map(|ending| ending.until_ns),
            full,
            silence,
            self.replay_look_ns(),
            self.news_due_ns(),
        ]
        .into_iter()
        .flatten()
        .fold(self.report_at_ns, u64::min)
    }

    fn on_time(&mut self, now_ns: u64) -> io::Result<()> {
        if self.vm.replica.deadline_ns().is_some_and(|at| at <= now_ns) {
            self.handle(Event::Tick)?;
        }
        self.link_on_time(now_ns)?;
        self.clients.on_time(&mut self.ring, now_ns)?;
        let asked = self.vm.arbiter.asked_at_ns();
        if !self.vm.arbiter_warned
            && asked.is_some_and(|asked| now_ns >= asked + ns(self.config.timers.arbiter_warning_ms))
        {
            self.vm.arbiter_warned = true;
            warn!(
                "{}: the arbiter does not answer; nothing is released until it does",
                self.config.arbiter
            );
        }
        if now_ns >= self.report_at_ns {
            self.report_at_ns = now_ns + ns(self.config.timers.report_interval_ms);
            self.report();
            if self.vm.takes_entries()
                && let Err(violation) = self.vm.local.merger.check_gap(now_ns)
            {
                self.breached(violation)?;
            }
        }
        Ok(())
    }

    fn report(&mut self) {
        let Counters { entries, bytes } = self.vm.counters;
        let ignored = self.heartbeats.as_ref().map_or(0, Heartbeats::ignored);
        let lag_us = self.vm.replica.lag_ns(monotonic_ns()) / 1000;
        self.events.emit(
            "log",
            json!({ "bytes": bytes, "entries": entries, "datagrams_ignored": ignored, "lag_us": lag_us }),
        );
    }

    fn flush(&mut self, now_ns: u64) -> io::Result<()> {
        self.flush_link()?;
        self.vm.journal.pump(&mut self.ring, now_ns)?;
        self.read_doorbell()
    }

    fn end(&mut self, exit: Exit) -> io::Result<()> {
        self.vm.journal.finish();
        self.close_channel()?;
        self.ending = Some(Ending {
            exit,
            until_ns: monotonic_ns() + ns(self.config.timers.journal_end_timeout_ms),
        });
        Ok(())
    }

    /// The end waits for the last messages, the journal and what is being cleaned up, but not for ever.
    fn is_over(&self, now_ns: u64) -> Option<Exit> {
        let ending = self.ending?;
        let is_quiet = self.vm.journal.is_idle() && self.vm.link.is_quiet() && !self.ring.is_in_flight(&Token::Cleanup);
        (is_quiet || now_ns >= ending.until_ns).then_some(ending.exit)
    }
}
