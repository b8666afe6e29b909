//! One run: two hosts, the network, the arbiter, the clients and the judge, under one queue and one source of chance.
//!
//! ```text
//!  plan (seed) ──► world ──happening──► shell, engine ──event──► replica ──action──► shell ──► network, arbiter, devices
//!                    └──────────────────────── ground truth ────────────────────────────────────► judge
//! ```

use std::fmt;

use ft_protocol::{Action, Role};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    arbiter::Arbiter,
    checkers::{EndState, Failure, Invariant, Judge},
    client::Client,
    crash_points::{Cut, Point},
    faults::{Fault, Plan, Setting},
    guest::{Answer, Request},
    host::{Host, HostId, Incarnation},
    mutants::Mutant,
    network::{Network, Packet, Way},
    queue::{Happening, Queue, Task},
};

/// Happenings of one run; more is a run that does not end.
const HAPPENINGS_MAX: u64 = 200_000;
/// Happenings of one moment; more is a core that asks to be called again and again.
const HAPPENINGS_OF_A_MOMENT_MAX: u32 = 5_000;

/// One line of a run's history.
#[derive(Clone, Debug)]
pub struct Line {
    /// When, ns.
    pub at_ns: u64,
    /// Where; `None` for the world.
    pub host: Option<HostId>,
    /// What.
    pub what: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let indent = match self.host {
            Some(HostId::A) => 0,
            Some(HostId::B) => 36,
            None => 72,
        };
        let (us, ns) = (self.at_ns / 1_000, self.at_ns % 1_000);
        writeln!(f, "{us:>8}.{ns:03}  {:indent$}{}", "", self.what)
    }
}

/// How a run is to be done, besides its plan.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Broken promise.
    pub mutant: Option<Mutant>,
    /// Keep the history.
    pub trace: bool,
    /// Print the history as it happens: it survives an abort.
    pub print: bool,
    /// What happens at one of the crash points.
    pub cut: Option<Cut>,
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The first invariant that did not hold.
    pub failure: Option<Failure>,
    /// Happenings.
    pub happenings: u64,
    /// Outputs released.
    pub outputs: u64,
    /// Sides that went live.
    pub failovers: u32,
    /// New backups that were synchronised.
    pub repairs: u64,
    /// Those of them that went live.
    pub successors: u64,
    /// Requests answered.
    pub answers: u64,
    /// Virtual time, ns.
    pub virtual_ns: u64,
    /// Crash points passed.
    pub points: u64,
    /// The history, if it was to be kept.
    pub history: Vec<Line>,
}

/// See the module.
#[derive(Debug)]
pub struct World {
    pub(crate) now_ns: u64,
    pub(crate) queue: Queue,
    pub(crate) rng: ChaCha8Rng,
    pub(crate) plan: Plan,
    pub(crate) options: Options,
    pub(crate) hosts: [Host; 2],
    pub(crate) network: Network,
    pub(crate) arbiter: Arbiter,
    pub(crate) clients: Vec<Client>,
    pub(crate) client_loss: Vec<u8>,
    pub(crate) judge: Judge,
    pub(crate) outcome: Outcome,
    pub(crate) actions: Vec<Action>,
    /// When every request must be answered.
    end_ns: u64,
    /// When there is nothing more to see, if every request is answered.
    quiet_ns: u64,
}

/// Runs a plan to its end, or to its first failure.
#[must_use]
pub fn run(plan: &Plan, options: Options) -> Outcome {
    let mut world = World::new(plan.clone(), options);
    world.begin();
    world.until_the_end();
    world.outcome.failure = world.judge.failure().cloned();
    world.outcome.virtual_ns = world.now_ns;
    world.outcome
}

impl World {
    fn new(plan: Plan, options: Options) -> Self {
        // The plan took stream 0 of the seed.
        let mut rng = ChaCha8Rng::seed_from_u64(plan.seed);
        rng.set_stream(1);
        let host = |host| Host::new(Incarnation { host, number: 1 }, &plan.setting, 0, false);
        Self {
            now_ns: 0,
            queue: Queue::default(),
            rng,
            options,
            hosts: HostId::BOTH.map(host),
            network: Network::default(),
            arbiter: Arbiter::default(),
            clients: (0..plan.setting.clients)
                .map(|number| Client::new(number, &plan.setting))
                .collect(),
            client_loss: Vec::new(),
            judge: Judge::new(
                options.cut.is_none() && plan.is_calm(),
                plan.breaks() > 0,
                &plan.setting,
                plan.longest().heartbeat_interval_ns,
            ),
            outcome: Outcome::default(),
            actions: Vec::new(),
            end_ns: 0,
            quiet_ns: 0,
            plan,
        }
    }

    fn set_end(&mut self) {
        self.end_ns = self.plan.end_ns();
        self.quiet_ns = self.plan.quiet_ns();
    }

    fn begin(&mut self) {
        self.set_end();
        for host in HostId::BOTH {
            self.start(host);
        }
        for number in 0..self.plan.faults.len() {
            self.queue
                .push(self.plan.faults[number].at_ns, Happening::Fault { number });
        }
        for client in 0..self.clients.len() as u8 {
            let at = self.rng.random_range(0..self.setting().client_ns);
            self.queue.push(at, Happening::Client { client });
        }
    }

    pub(crate) fn start(&mut self, host: HostId) {
        let ready_ns = self.setting().ready_ns[host.index()];
        self.later(host, ready_ns, Task::Start);
        self.plan_connect(host, ready_ns / 2);
    }

    fn until_the_end(&mut self) {
        let mut of_this_moment = 0;
        let mut done_ns = None;
        // Long enough for a suspicion and what follows from it.
        let settle_ns = 3 * self.setting().suspect_ns();
        while let Some((at_ns, happening)) = self.queue.pop() {
            let done = self.clients.iter().all(Client::is_done);
            if done && done_ns.is_none() {
                done_ns = Some(self.now_ns);
            }
            let settled_ns = done_ns.map_or(u64::MAX, |done_ns| self.quiet_ns.max(done_ns) + settle_ns);
            let is_over = at_ns > settled_ns && !self.is_repair_due();
            if is_over || at_ns > self.end_ns {
                break;
            }
            of_this_moment = if at_ns == self.now_ns { of_this_moment + 1 } else { 0 };
            self.now_ns = at_ns;
            self.judge.now_ns = at_ns;
            self.outcome.happenings += 1;
            if of_this_moment > HAPPENINGS_OF_A_MOMENT_MAX || self.outcome.happenings > HAPPENINGS_MAX {
                let roles = self.hosts.each_ref().map(|host| host.role);
                self.judge.fail(Invariant::TimeMoves, || {
                    format!("the simulation does not come to an end; the roles are {roles:?}")
                });
            }
            self.happen(happening);
            if self.judge.failure().is_some() {
                return;
            }
        }
        let ends = self.hosts.each_ref().map(|host| EndState {
            me: host.me,
            alive: host.alive,
            role: host.role,
            joins: host.joins,
            ledger: host.guest.ledger(),
            off: host.guest.is_off(),
        });
        let done = self.clients.iter().all(Client::is_done);
        self.judge.finish(&ends, done);
    }

    /// Whether a new backup waits for being one, and somebody is there who could take it.
    fn is_repair_due(&self) -> bool {
        HostId::BOTH.into_iter().any(|id| {
            let [host, other] = [id, id.other()].map(|id| &self.hosts[id.index()]);
            let waits = host.is_running() && host.joins && matches!(host.role, Role::Pairing | Role::Replaying);
            waits && other.is_running() && other.is_executing() && !other.replica.is_protected()
        })
    }

    pub(crate) fn happen(&mut self, happening: Happening) {
        let to = match &happening {
            Happening::Arrived { to, .. } | Happening::Datagram { to, .. } | Happening::Request { to, .. } => Some(*to),
            Happening::Host { of, .. } => Some(of.host),
            _ => None,
        };
        if let Some(host) = to {
            let host = self.host(host);
            if host.alive && host.paused > 0 {
                host.deferred.push(happening);
                return;
            }
        }
        match happening {
            Happening::Packet { to, connection, packet } => {
                if let Some(packet) = self.network.arrive(to, connection, packet) {
                    self.happen(Happening::Arrived { to, connection, packet });
                }
            }
            Happening::Arrived { to, connection, packet } => self.packet(to, connection, packet),
            Happening::Unpark { from } => {
                for (connection, packet) in self.network.take_parked(from) {
                    let to = from.other();
                    self.happen(Happening::Arrived { to, connection, packet });
                }
            }
            Happening::Datagram { to, bytes } => {
                if self.network.is_open(to.other()) {
                    self.datagram(to, &bytes);
                }
            }
            Happening::Claim { ask, generation, by } => self.claim(ask, generation, by),
            Happening::Request { to, request } => self.request(to, &request),
            Happening::Answered { answer } => self.answered(&answer),
            Happening::Client { client } => self.client(client),
            Happening::Fault { number } => self.fault(number, true),
            Happening::Heal { number } => self.fault(number, false),
            Happening::Host { of, task } => {
                let host = self.host(of.host);
                if host.me == of && host.is_running() {
                    self.task(of.host, task);
                }
            }
        }
    }

    // ---- clients -----------------------------------------------------------------------------------------------------

    fn client(&mut self, number: u8) {
        let client = &mut self.clients[usize::from(number)];
        let Some((request, is_first)) = client.wake(&mut self.rng) else {
            return;
        };
        if is_first {
            self.judge.invoked(&request);
        }
        // A bridge floods: the frame comes to both hosts, and whoever executes the VM takes it.
        for to in HostId::BOTH {
            if let Some(at) = self.client_path() {
                self.queue.push(at, Happening::Request { to, request });
            }
        }
        let client_ns = self.setting().client_ns;
        let next = self.now_ns + self.rng.random_range(client_ns / 6..client_ns);
        self.queue.push(next, Happening::Client { client: number });
    }

    /// When a frame between a client and a host arrives; `None` if it is lost.
    fn client_path(&mut self) -> Option<u64> {
        for percent in &self.client_loss {
            if self.rng.random_range(0..100) < *percent {
                return None;
            }
        }
        let (latency_ns, jitter_ns) = (self.setting().latency_ns, self.setting().jitter_ns);
        Some(self.now_ns + latency_ns + self.rng.random_range(0..=jitter_ns))
    }

    pub(crate) fn send_to_client(&mut self, answer: Answer) {
        if let Some(at) = self.client_path() {
            self.queue.push(at, Happening::Answered { answer });
        }
    }

    fn answered(&mut self, answer: &Answer) {
        let closed: Option<Request> = self.clients[usize::from(answer.client)].answered(answer);
        self.outcome.answers += u64::from(closed.is_some());
        self.judge.answered(answer, closed.as_ref());
        self.note(None, || {
            format!("client {} has the answer to request {}", answer.client, answer.id)
        });
    }

    // ---- faults ------------------------------------------------------------------------------------------------------

    fn fault(&mut self, number: usize, begin: bool) {
        let fault = self.plan.faults[number].fault.clone();
        self.note(None, || format!("{}: {fault}", if begin { "FAULT" } else { "over" }));
        self.apply_fault(&fault, begin);
        if begin && let Some(for_ns) = fault.for_ns() {
            self.queue.push(self.now_ns + for_ns, Happening::Heal { number });
        }
    }

    pub(crate) fn apply_fault(&mut self, fault: &Fault, begin: bool) {
        match *fault {
            Fault::Weather { from, weather, .. } => self.network.set_weather(from, weather, begin),
            Fault::Partition { from, .. } => {
                for host in HostId::BOTH.into_iter().filter(|host| from[host.index()]) {
                    self.with_way(|network, way| network.set_blocked(host, begin, way));
                }
            }
            Fault::Stall { from, .. } => self.with_way(|network, way| network.set_stalled(from, begin, way)),
            Fault::Reset => self.reset_channel(),
            Fault::Wedge => self.network.wedge(),
            Fault::Crash { host, silent } => self.crash(host, silent),
            Fault::Restart { host } => self.restart(host, false),
            // Nobody starts a new backup of a VM that has not begun.
            Fault::Join { host } => self.restart(host, self.judge.has_begun()),
            Fault::Pause { host, timers_first, .. } => self.pause(host, begin, timers_first),
            Fault::SlowShim { host, .. } => {
                crate::arbiter::count(&mut self.host(host).shim_stalled, begin);
                self.wake_guest(host, 0);
            }
            Fault::ArbiterUnreachable { hosts, .. } => {
                for host in HostId::BOTH.into_iter().filter(|host| hosts[host.index()]) {
                    self.arbiter.set_unreachable(host, begin);
                }
            }
            Fault::ArbiterSlow { delay_ns, .. } => self.arbiter.set_slow(delay_ns, begin),
            Fault::ArbiterAnswersLost { .. } => self.arbiter.set_losing_answers(begin),
            Fault::ClientLoss { percent, .. } => {
                if begin {
                    self.client_loss.push(percent);
                } else if let Some(at) = self.client_loss.iter().position(|other| *other == percent) {
                    self.client_loss.swap_remove(at);
                }
            }
            Fault::Configure { timing } => self.configure(timing),
            Fault::LocalFailure { host } => self.local_failure(host),
        }
    }

    /// The channel breaks; both ends notice, each in its time.
    fn reset_channel(&mut self) {
        let Some(connection) = self.network.reset() else { return };
        for host in HostId::BOTH {
            let delay_ns = self.rng.random_range(0..=2 * self.setting().latency_ns);
            self.later(host, delay_ns, Task::Closed { connection });
        }
    }

    /// A host is gone at once; with a kill, its kernel closes the channel.
    pub(crate) fn crash(&mut self, host: HostId, silent: bool) {
        if !self.host(host).alive {
            return;
        }
        self.note(Some(host), || "is gone".into());
        let packet = if self.rng.random_bool(0.5) {
            Packet::Close
        } else {
            Packet::Reset
        };
        let connection = self.host(host).connection.take();
        self.host(host).alive = false;
        self.host(host).deferred.clear();
        self.judge.crashed(host);
        if let Some(connection) = connection.filter(|_| !silent) {
            self.with_way(|network, way| network.send(host, connection, packet, way));
        }
    }

    fn restart(&mut self, host: HostId, joins: bool) {
        if self.host(host).is_running() {
            return;
        }
        let number = self.host(host).me.number + 1;
        let (paused, shim_stalled) = (self.host(host).paused, self.host(host).shim_stalled);
        *self.host(host) = Host {
            paused,
            shim_stalled,
            ..Host::new(Incarnation { host, number }, &self.plan.setting, self.now_ns, joins)
        };
        self.judge.restarted(host);
        self.start(host);
    }

    fn pause(&mut self, host: HostId, begin: bool, timers_first: bool) {
        crate::arbiter::count(&mut self.host(host).paused, begin);
        if self.host(host).paused > 0 {
            return;
        }
        self.judge.resumed(host);
        let mut deferred = std::mem::take(&mut self.host(host).deferred);
        if timers_first {
            deferred.sort_by_key(|happening| !matches!(happening, Happening::Host { .. }));
        }
        for happening in deferred {
            self.happen(happening);
        }
        self.flush(host);
    }

    // ---- tools -------------------------------------------------------------------------------------------------------

    pub(crate) fn host(&mut self, host: HostId) -> &mut Host {
        &mut self.hosts[host.index()]
    }

    pub(crate) fn setting(&self) -> &Setting {
        &self.plan.setting
    }

    pub(crate) fn is_mutant(&self, mutant: Mutant) -> bool {
        self.options.mutant == Some(mutant)
    }

    /// Plans a task of a host, after `delay_ns`.
    pub(crate) fn later(&mut self, host: HostId, delay_ns: u64, task: Task) {
        let of = self.host(host).me;
        self.queue.push(self.now_ns + delay_ns, Happening::Host { of, task });
    }

    pub(crate) fn with_way<R>(&mut self, work: impl FnOnce(&mut Network, &mut Way<'_>) -> R) -> R {
        let mut way = Way {
            now_ns: self.now_ns,
            queue: &mut self.queue,
            rng: &mut self.rng,
            setting: &self.plan.setting,
        };
        work(&mut self.network, &mut way)
    }

    /// Adds a line to the history, if it is kept.
    pub(crate) fn note(&mut self, host: Option<HostId>, what: impl FnOnce() -> String) {
        if self.options.trace || self.options.print {
            let (at_ns, what) = (self.now_ns, what());
            let line = Line { at_ns, host, what };
            if self.options.print {
                print!("{line}");
            } else {
                self.outcome.history.push(line);
            }
        }
    }

    /// Passes a crash point; `true` if the host died here.
    pub(crate) fn passes(&mut self, host: HostId, point: Point) -> bool {
        let number = self.outcome.points;
        self.outcome.points += 1;
        let Some(cut) = self.options.cut.filter(|cut| cut.at == number) else {
            return false;
        };
        self.note(Some(host), || format!("CUT {point}"));
        if let Some(fault) = cut.what.fault(host, self.setting()) {
            let dies = matches!(fault, Fault::Crash { .. });
            self.plan.faults.push(crate::faults::FaultEvent {
                at_ns: self.now_ns,
                fault,
            });
            self.set_end();
            let number = self.plan.faults.len() - 1;
            self.fault(number, true);
            return dies;
        }
        false
    }

    /// Counts a side that published `Live`.
    pub(crate) fn count_role(&mut self, id: HostId, role: Role) {
        self.outcome.failovers += u32::from(role == Role::Live);
        let is_successor = role == Role::GoingLive && self.host(id).joins;
        self.outcome.successors += u64::from(is_successor);
    }
}
