//! Crash-point enumeration: a small scripted run, cut at every send, ack, release, submit, store and ask, before and after.
//!
//! Nothing is sampled. A first run counts the points that it passes; then one run for every point and every way to be cut.

use std::fmt;

use crate::{
    faults::{Fault, FaultEvent, Plan, Setting},
    host::HostId,
    mutants::Mutant,
    world::{Line, Options, Outcome, run},
};

/// What a host does at a crash point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// A message or entries go to the channel.
    Send,
    /// An acknowledgement goes to the channel.
    Ack,
    /// An output leaves.
    Release,
    /// An entry enters the log.
    Submit,
    /// A received entry is stored.
    Store,
    /// An entry is replayed.
    Replay,
    /// The arbiter is asked.
    Ask,
}

/// A place where a host can be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// At what.
    pub deed: Deed,
    /// Before it, or after it.
    pub after: bool,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let when = if self.after { "after" } else { "before" };
        write!(f, "{when} {:?}", self.deed)
    }
}

/// How a host is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Power cut.
    PowerCut,
    /// kill -9.
    Kill,
    /// Stopped for longer than the timeouts, then continued.
    Pause,
    /// Nothing gets through any more from here to the peer, for longer than the timeouts.
    Silence,
    /// No word between the two for longer than the timeouts.
    Partition,
}

impl How {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::PowerCut, Self::Kill, Self::Pause, Self::Silence, Self::Partition];

    pub(crate) fn fault(self, host: HostId, setting: &Setting) -> Option<Fault> {
        let for_ns = 3 * setting.suspect_ns();
        Some(match self {
            Self::PowerCut => Fault::Crash { host, silent: true },
            Self::Kill => Fault::Crash { host, silent: false },
            Self::Pause => Fault::Pause {
                host,
                for_ns,
                timers_first: false,
            },
            Self::Silence => Fault::Partition {
                from: [host == HostId::A, host == HostId::B],
                for_ns,
            },
            Self::Partition => Fault::Partition {
                from: [true, true],
                for_ns,
            },
        })
    }
}

/// Cuts a run at its `at`-th crash point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The number of the point.
    pub at: u64,
    /// How.
    pub what: How,
}

/// A position at which the scripted run did not survive.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Which script.
    pub script: &'static str,
    /// Where and how.
    pub cut: Option<Cut>,
    /// What came of it, its history included.
    pub outcome: Outcome,
}

/// What the enumeration came to.
#[derive(Debug, Default)]
pub struct Enumeration {
    /// Crash points of all scripts together.
    pub points: u64,
    /// Runs.
    pub runs: u64,
    /// Runs in which a side went live.
    pub failovers: u64,
    /// Runs that failed.
    pub broken: Vec<Broken>,
}

/// The scripts: a quiet life, one that ends with a power-off, some in which a failure is under way when the cut comes, and one in which each
/// side in turn fails and becomes the new backup of the other.
#[must_use]
pub fn scripts() -> Vec<(&'static str, Plan)> {
    let at = |at_ms: u64, fault: Fault| FaultEvent {
        at_ns: at_ms * 1_000_000,
        fault,
    };
    let partition = Fault::Partition {
        from: [true, true],
        for_ns: 200_000_000,
    };
    let kill = Fault::Crash {
        host: HostId::A,
        silent: false,
    };
    let slow = Fault::SlowShim {
        host: HostId::B,
        for_ns: 100_000_000,
    };
    let lose = |host| Fault::Crash { host, silent: false };
    let mut again = Plan::script(
        vec![
            at(12, lose(HostId::A)),
            at(90, Fault::Join { host: HostId::A }),
            at(120, lose(HostId::B)),
            at(200, Fault::Join { host: HostId::B }),
        ],
        false,
    );
    again.setting.requests = 12;
    again.setting.client_ns = 15_000_000;
    vec![
        ("pairing again", again),
        ("quiet", Plan::script(Vec::new(), false)),
        ("power-off", Plan::script(Vec::new(), true)),
        ("partition", Plan::script(vec![at(12, partition)], false)),
        ("primary killed", Plan::script(vec![at(12, kill.clone())], false)),
        // Without its shim the backup has a tail to replay when it wins.
        (
            "primary killed, slow backup",
            Plan::script(vec![at(8, slow), at(12, kill)], false),
        ),
        (
            "channel broken",
            Plan::script(
                vec![at(9, Fault::Reset), at(10, Fault::Reset), at(14, Fault::Wedge)],
                false,
            ),
        ),
    ]
}

/// Cuts every script at every point in every way.
#[must_use]
pub fn enumerate(mutant: Option<Mutant>) -> Enumeration {
    enumerate_round(mutant, 0)
}

/// The same with what the scripts leave to chance drawn from another seed.
#[must_use]
pub fn enumerate_round(mutant: Option<Mutant>, seed: u64) -> Enumeration {
    let mut all = Enumeration::default();
    for (script, mut plan) in scripts() {
        plan.seed = seed;
        let mut options = Options {
            mutant,
            ..Options::default()
        };
        let whole = all.run(script, &plan, options);
        all.points += whole;
        for at in 0..whole {
            for what in How::ALL {
                options.cut = Some(Cut { at, what });
                all.run(script, &plan, options);
            }
        }
    }
    all
}

impl Enumeration {
    /// Adds what another round came to.
    pub fn add(&mut self, other: Self) {
        self.points += other.points;
        self.runs += other.runs;
        self.failovers += other.failovers;
        self.broken.extend(other.broken);
    }

    fn run(&mut self, script: &'static str, plan: &Plan, options: Options) -> u64 {
        let outcome = run(plan, options);
        self.runs += 1;
        self.failovers += u64::from(outcome.failovers > 0);
        let points = outcome.points;
        if outcome.failure.is_some() {
            let outcome = run(plan, Options { trace: true, ..options });
            let cut = options.cut;
            self.broken.push(Broken { script, cut, outcome });
        }
        points
    }
}

impl Broken {
    /// The history, for people.
    #[must_use]
    pub fn history(&self) -> &[Line] {
        &self.outcome.history
    }
}
