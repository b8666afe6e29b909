//! The judge: what must hold, checked from what the outside and an all-knowing observer see.
//!
//! It knows nothing of the core's state. Its facts are the simulator's ground truth: entries written and stored, claims the
//! arbiter granted, outputs released, roles published, answers clients got. A side that is confused cannot confuse it.

mod end;

use std::{collections::BTreeMap, fmt};

use ft_protocol::{
    Generation, Lsn, Role, Strength,
    entry::{KIND_POWER_OFF, KIND_SYNCED},
};

use crate::{
    faults::Setting,
    guest::{Answer, Operation, Output, Request},
    host::{HostId, Incarnation},
    linearizability::History,
};

/// What must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// An output leaves only if the backup may take over and has its marker (stored, flushed or replayed, as was asked for), or the
    /// arbiter gave the VM to the releasing side and this one has not begun to share it.
    ReleasedIsStored,
    /// One live side a generation, the one that holds the claim; never two at once.
    OneLiveSide,
    /// A side that ended sends nothing, asks nothing, releases nothing.
    Mute,
    /// The live side's history contains every output that was ever released.
    HistoryExtends,
    /// What a client was told stays true, in the order clients can observe.
    NothingLost,
    /// A replay is the execution that was recorded.
    ReplayEqual,
    /// Where a side is left that may go on, every request is answered.
    Progress,
    /// A power-off ends both sides; nobody goes live for it.
    OrderlyEnd,
    /// A host that asks a live side to take it becomes its backup.
    Repaired,
    /// A side ends only if it lost the VM or its own processes failed.
    NoNeedlessHalt,
    /// While the two hosts hear each other, nobody is suspected.
    Calm,
    /// A primary whose backup trails by more than the limit stands still.
    Lag,
    /// A core that asks to be called again lets time pass.
    TimeMoves,
    /// The core's own assertions.
    CoreAssertion,
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReleasedIsStored => "released <= committed",
            Self::OneLiveSide => "at most one live side",
            Self::Mute => "no output from a halted or stale side",
            Self::HistoryExtends => "the live history extends every output released",
            Self::NothingLost => "no acknowledged operation lost or reordered",
            Self::ReplayEqual => "the replay equals the recording",
            Self::Progress => "every request is answered",
            Self::OrderlyEnd => "a power-off ends both sides",
            Self::Repaired => "a new backup is synchronised",
            Self::NoNeedlessHalt => "no side ends without need",
            Self::Calm => "a healthy pair suspects nobody",
            Self::Lag => "the backup does not trail without bound",
            Self::TimeMoves => "time moves",
            Self::CoreAssertion => "the core's assertions hold",
        })
    }
}

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which.
    pub invariant: Invariant,
    /// When, ns.
    pub at_ns: u64,
    /// What was seen.
    pub detail: String,
}

/// What the judge sees of a host when a run is over.
#[derive(Debug)]
pub struct EndState<'a> {
    /// The last start of it.
    pub me: Incarnation,
    /// Not crashed.
    pub alive: bool,
    /// The role it published last.
    pub role: Role,
    /// It was started as a new backup.
    pub joins: bool,
    /// The chain of its guest.
    pub ledger: &'a [u64],
    /// Its guest powered off.
    pub off: bool,
}

#[derive(Debug, Default)]
struct Seen {
    /// The entries this host wrote, by LSN.
    written: Vec<Written>,
    /// Digests of the entries this host stored, in the order of its replay.
    stored: Vec<u64>,
    /// The last entry before them: what was before it came with the state.
    start: u64,
    /// The last of them that is flushed, and replayed.
    flushed: u64,
    replayed: u64,
    /// It began with the VM, or has stored `Synced`: it may take over.
    eligible: bool,
    /// The generation of the pair whose backup it is, or was.
    follows: Option<Generation>,
    /// The generation of the pair whose primary it is, or was.
    shares: Option<Generation>,
    /// The last entry it had written when it began to share the VM.
    free_through: Lsn,
    /// When it last went on after it stood still.
    resumed_ns: u64,
    power_off_stored: bool,
    power_off_written: bool,
    history: Vec<u64>,
    mute: bool,
    lost_claim: bool,
    failed: bool,
    live: bool,
    recorded: bool,
    recording: bool,
    replaying: bool,
    paired: bool,
}

#[derive(Clone, Copy, Debug)]
struct Written {
    lsn: Lsn,
    digest: u64,
    at_ns: u64,
}

impl Seen {
    /// What it stored as entry `lsn`.
    fn stored_at(&self, lsn: Lsn) -> Option<u64> {
        let index = lsn.0.checked_sub(self.start + 1)?;
        self.stored.get(index as usize).copied()
    }

    /// The last entry that it has as it was asked for.
    fn has_through(&self, ack: Strength) -> u64 {
        match ack {
            Strength::Received => self.start + self.stored.len() as u64,
            Strength::Durable => self.flushed,
            Strength::Replayed => self.replayed,
        }
    }

    /// It begins to replay what comes behind `start`.
    fn begin(&mut self, start: u64, eligible: bool) {
        self.stored.clear();
        (self.start, self.flushed, self.replayed) = (start, start, start);
        self.eligible = eligible;
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Judge {
    /// Virtual time of what is being observed.
    pub now_ns: u64,
    calm: bool,
    /// The channel breaks somewhere.
    breaks: bool,
    ack: Strength,
    /// Longest lag at which a primary may execute, what it needs to notice included, ns.
    lag_ns_max: u64,
    /// How long a running host may take to notice a lag, ns.
    notice_ns: u64,
    failure: Option<Failure>,
    seen: [Seen; 2],
    claims: BTreeMap<Generation, Incarnation>,
    live: Vec<(Generation, Incarnation)>,
    has_begun: bool,
    released: BTreeMap<u32, u64>,
    off: bool,
    floor: u32,
    chain_at: BTreeMap<u32, u64>,
    invoked: BTreeMap<(u8, u32), u32>,
    answers: BTreeMap<(u8, u32), Answer>,
    acknowledged: Vec<(u32, u64)>,
    clients: History,
}

impl Judge {
    /// The judge of one run; `calm` if no fault of it keeps the hosts from hearing each other; `breaks` if one breaks the channel; `interval_ns` is the longest time between
    /// two heartbeats, whatever the operator does.
    #[must_use]
    pub fn new(calm: bool, breaks: bool, setting: &Setting, interval_ns: u64) -> Self {
        // A clock may be slow by 10 %, and the lag is looked at with every heartbeat.
        let lag_ns = (setting.lag_limit_ns + interval_ns) * 5 / 4;
        Self {
            calm,
            breaks,
            ack: setting.ack,
            lag_ns_max: lag_ns + 2 * setting.idle_ns,
            notice_ns: interval_ns * 5 / 4,
            ..Self::default()
        }
    }

    /// The first failure.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// Notes a failure, if it is the first.
    pub fn fail(&mut self, invariant: Invariant, detail: impl FnOnce() -> String) {
        if self.failure.is_none() {
            let (at_ns, detail) = (self.now_ns, detail());
            self.failure = Some(Failure {
                invariant,
                at_ns,
                detail,
            });
        }
    }

    /// A host started anew. What its former self had stored stays stored as far as old outputs are concerned.
    pub fn restarted(&mut self, host: HostId) {
        let former = std::mem::take(&mut self.seen[host.index()]);
        self.seen[host.index()] = Seen {
            stored: former.stored,
            start: former.start,
            flushed: former.flushed,
            replayed: former.replayed,
            eligible: former.eligible,
            ..Seen::default()
        };
    }

    /// Whether a primary has ever recorded.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// What a host's guest came to transmit so far.
    #[must_use]
    pub fn history(&self, host: HostId) -> Vec<u64> {
        self.seen[host.index()].history.clone()
    }

    /// A host was taken as a new backup, which begins with the state as of `start`.
    pub fn joined(&mut self, me: Incarnation, start: Lsn) {
        self.seen[me.host.index()].begin(start.0, false);
    }

    /// It has that state, and `history` with it.
    pub fn adopted(&mut self, host: HostId, history: Vec<u64>) {
        self.seen[host.index()].history = history;
    }

    /// A host is gone.
    pub fn crashed(&mut self, host: HostId) {
        self.seen[host.index()].live = false;
    }

    /// A guest wrote an entry.
    pub fn wrote(&mut self, host: HostId, lsn: Lsn, digest: u64, is_power_off: bool) {
        let at_ns = self.now_ns;
        let seen = &mut self.seen[host.index()];
        seen.written.push(Written { lsn, digest, at_ns });
        seen.power_off_written |= is_power_off;
    }

    /// A recording vCPU went on.
    pub fn executed(&mut self, host: HostId) {
        let (own, peer) = (&self.seen[host.index()], &self.seen[host.other().index()]);
        let is_pair = own.recording && peer.replaying;
        // A host that stood still needs a moment to notice what time it is.
        let is_awake = self.now_ns >= own.resumed_ns + self.notice_ns;
        if !is_pair || !is_awake {
            return;
        }
        let oldest = own.written.partition_point(|entry| entry.lsn.0 <= peer.replayed);
        let Some(oldest) = own.written.get(oldest) else { return };
        let lag_ns = self.now_ns - oldest.at_ns;
        if lag_ns > self.lag_ns_max {
            let max = self.lag_ns_max;
            self.fail(Invariant::Lag, || {
                format!("{host:?} executes while the replay trails by {lag_ns} ns; the limit, with what it takes to notice, is {max}")
            });
        }
    }

    /// A host that stood still goes on.
    pub fn resumed(&mut self, host: HostId) {
        self.seen[host.index()].resumed_ns = self.now_ns;
    }

    /// A host's journal is on disk up to this entry.
    pub fn flushed(&mut self, host: HostId, through: Lsn) {
        self.seen[host.index()].flushed = through.0;
    }

    /// A host's guest applied an entry.
    pub fn replayed(&mut self, host: HostId, lsn: Lsn) {
        self.seen[host.index()].replayed = lsn.0;
    }

    /// A host stored an entry where its replay finds it.
    pub fn stored(&mut self, host: HostId, digest: u64, kind: u8) {
        let seen = &mut self.seen[host.index()];
        seen.stored.push(digest);
        seen.power_off_stored |= kind == KIND_POWER_OFF;
        seen.eligible |= kind == KIND_SYNCED;
    }

    /// A guest, recording or replaying, came to transmit this.
    pub fn produced(&mut self, host: HostId, output: &Output) {
        self.seen[host.index()].history.push(output.history);
    }

    /// The arbiter decided.
    pub fn claimed(&mut self, generation: Generation, by: Incarnation, won: bool) {
        if won {
            self.claims.entry(generation).or_insert(by);
        } else {
            self.seen[by.host.index()].lost_claim = true;
        }
    }

    /// A sibling process died.
    pub fn failed_locally(&mut self, host: HostId) {
        self.seen[host.index()].failed = true;
    }

    /// A replay could not apply an entry.
    pub fn diverged(&mut self, host: HostId, why: &str) {
        self.fail(Invariant::ReplayEqual, || format!("{host:?}: {why}"));
    }

    /// A host suspects its peer.
    pub fn suspected(&mut self, host: HostId, why: &str) {
        // With a channel that broke at the power-off, the side that is left does not know that the other one ended in good order.
        // Nor does a backup whose answer to the first hello was lost know that the primary still waits for it; it takes nothing over.
        let excused = self.breaks && (self.off || self.seen[host.index()].stored.is_empty() && host == HostId::B);
        if self.calm && !excused {
            self.fail(Invariant::Calm, || format!("{host:?} suspects its peer: {why}"));
        }
    }

    /// A host sent something or asked the arbiter.
    pub fn spoke(&mut self, host: HostId, what: &str) {
        if self.seen[host.index()].mute {
            self.fail(Invariant::Mute, || format!("{host:?} ended, and then sent {what}"));
        }
    }

    /// A host published its role.
    pub fn published(&mut self, me: Incarnation, role: Role, generation: Generation) {
        let at = me.host.index();
        (self.seen[at].recording, self.seen[at].replaying) = (false, false);
        match role {
            Role::Replaying => {
                let seen = &mut self.seen[at];
                seen.paired = true;
                seen.replaying = true;
                seen.begin(0, true);
                seen.follows = Some(generation);
            }
            Role::Recording => {
                self.has_begun = true;
                let seen = &mut self.seen[at];
                (seen.recorded, seen.recording, seen.live) = (true, true, false);
                seen.shares = Some(generation);
                seen.free_through = seen.written.last().map_or(Lsn::ZERO, |entry| entry.lsn);
            }
            Role::GoingLive => self.goes_live(me, generation),
            Role::Live => {
                self.goes_live(me, generation);
                self.seen[at].live = true;
                // The primary that wrote the power-off may need the VM once more, to let its last outputs go; it ends with it.
                let seen = &self.seen[me.host.index()];
                if (seen.power_off_stored || self.off) && !seen.power_off_written {
                    self.fail(Invariant::OrderlyEnd, || {
                        format!("{:?} goes live after the power-off", me.host)
                    });
                }
                for (index, history) in self.released.clone() {
                    self.must_contain(me.host, index, history);
                }
            }
            Role::Halted => {
                let seen = &mut self.seen[at];
                (seen.mute, seen.live) = (true, false);
                if !seen.lost_claim && !seen.failed {
                    self.fail(Invariant::NoNeedlessHalt, || {
                        format!("{:?} halted, and neither lost a claim nor a process", me.host)
                    });
                }
            }
            Role::Off => {
                // What is committed may still leave: the processes end after it.
                self.seen[at].live = false;
                self.off = true;
            }
            // The pair came apart before it began.
            Role::Pairing => {
                let seen = &mut self.seen[at];
                (seen.paired, seen.power_off_stored) = (false, false);
                seen.history.clear();
            }
            Role::Arbitrating => {}
        }
    }

    fn goes_live(&mut self, me: Incarnation, generation: Generation) {
        if self.claims.get(&generation) != Some(&me) {
            self.fail(Invariant::OneLiveSide, || {
                format!(
                    "{:?} goes live in generation {generation}, which the arbiter did not give to it",
                    me.host
                )
            });
        }
        let other = self.live.iter().find(|(of, who)| {
            let is_live = who.host != me.host && self.seen[who.host.index()].live;
            *who != me && (*of == generation || is_live)
        });
        if let Some((of, who)) = other.copied() {
            self.fail(Invariant::OneLiveSide, || {
                format!(
                    "{:?} goes live in generation {generation}, {:?} did in {of}",
                    me.host, who.host
                )
            });
        }
        self.live.push((generation, me));
    }

    fn must_contain(&mut self, host: HostId, index: u32, history: u64) {
        let own = self.seen[host.index()].history.get(index as usize).copied();
        if own != Some(history) {
            self.fail(Invariant::HistoryExtends, || {
                format!("output {index} was released with history {history:016x}; on the live side {host:?} it is {own:016x?}")
            });
        }
    }

    /// An output left a host.
    pub fn released(&mut self, me: Incarnation, marker: Lsn, output: &Output) {
        self.spoke(me.host, "an output");
        let (at, peer) = (me.host.index(), me.host.other());
        let own = &self.seen[at];
        // Since it claimed its last generation it has not shared the VM with a backup, or it did not then.
        let shares = own.shares.unwrap_or_default().max(Generation::FIRST);
        let holds_the_vm = self
            .claims
            .iter()
            .any(|(generation, owner)| *generation > shares && *owner == me)
            || shares > Generation::FIRST && marker <= own.free_through;
        let written = &own.written;
        let written = written
            .binary_search_by_key(&marker, |entry| entry.lsn)
            .ok()
            .map(|found| written[found].digest);
        let other = &self.seen[peer.index()];
        let stored = other
            .stored_at(marker)
            .filter(|_| marker.0 <= other.has_through(self.ack));
        let is_backup = other.eligible;
        if !holds_the_vm && (written.is_none() || written != stored || !is_backup) {
            self.fail(Invariant::ReleasedIsStored, || {
                let what = if !is_backup {
                    "is not synchronised"
                } else if stored.is_some() {
                    "has another entry there"
                } else {
                    "has not stored it (or flushed, or replayed it, as was asked for)"
                };
                format!(
                    "{:?} released output {} marked by entry {marker}; {peer:?} {what}",
                    me.host, output.index
                )
            });
        }
        let first = *self.released.entry(output.index).or_insert(output.history);
        if first != output.history {
            self.fail(Invariant::HistoryExtends, || {
                format!(
                    "output {} was released with two histories, {first:016x} and {:016x}",
                    output.index, output.history
                )
            });
        }
        for host in HostId::BOTH {
            if self.seen[host.index()].live {
                self.must_contain(host, output.index, output.history);
            }
        }
    }

    /// A client sent a request for the first time.
    pub fn invoked(&mut self, request: &Request) {
        self.clients.invoked(request);
        self.invoked.insert((request.client, request.id), self.floor);
    }

    /// A client got an answer; `request` if it is the first to that request.
    pub fn answered(&mut self, answer: &Answer, request: Option<&Request>) {
        let key = (answer.client, answer.id);
        let first = *self.answers.entry(key).or_insert(*answer);
        let chain = *self.chain_at.entry(answer.order).or_insert(answer.chain);
        if first != *answer || chain != answer.chain {
            self.fail(Invariant::NothingLost, || {
                format!("{answer:?} contradicts an answer given before")
            });
        }
        let Some(request) = request else { return };
        self.clients.answered(answer.client, answer.order);
        let appends = matches!(request.operation, Operation::Append { .. });
        let floor = self.invoked.get(&key).copied().unwrap_or(0);
        if answer.order < floor + u32::from(appends) {
            self.fail(Invariant::NothingLost, || {
                format!("{answer:?}: an operation that had ended before this one began is at {floor}")
            });
        }
        self.floor = self.floor.max(answer.order);
        if appends {
            self.acknowledged.push((answer.order, answer.chain));
        }
    }
}

#[cfg(test)]
#[path = "checkers_tests.rs"]
mod tests;
