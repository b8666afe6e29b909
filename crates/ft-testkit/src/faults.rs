//! Which faults are survivable, and the plan of one run: its setting and its faults, all drawn from one seed.
//!
//! Every fault ends before the run does, so that what must come back can be demanded. Faults are independent items of a list:
//! [`crate::shrink`] leaves some of them out.

use std::fmt;

use ft_protocol::{Strength, Timing};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    guest::CLIENTS_MAX,
    host::{Clock, HostId},
    network::Weather,
    stories::draw_story,
};

const MS: u64 = 1_000_000;
const US: u64 = 1_000;

/// What does not change during a run.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Shortest time on the wire.
    pub latency_ns: u64,
    /// Longest addition to it.
    pub jitter_ns: u64,
    /// Between two heartbeats, by the sender's clock.
    pub heartbeat_interval_ns: u64,
    /// Missed ones until suspicion.
    pub heartbeat_misses: u32,
    /// The clocks of A and B.
    pub clocks: [Clock; 2],
    /// When the daemons of A and B have joined.
    pub ready_ns: [u64; 2],
    /// Between two stop points of a busy recording guest.
    pub stop_ns: u64,
    /// Between two stop points of an idle guest.
    pub idle_ns: u64,
    /// Replay of one entry.
    pub replay_ns: u64,
    /// Entries the replay queue holds; a full one stops the reader of the channel.
    pub replay_entries_max: usize,
    /// Bytes under way on the channel in one direction.
    pub window_bytes: usize,
    /// Bytes of entries that may be without an acknowledgement; more stop the primary's guest.
    pub log_bytes_max: usize,
    /// Outputs of the replay that a backup keeps for its go-live; older ones are forgotten, as a lossy network would.
    pub held_replayed_max: usize,
    /// How long the channel may be away or stand still.
    pub channel_timeout_ns: u64,
    /// What outputs wait for.
    pub ack: Strength,
    /// A flush of the backup's journal.
    pub flush_ns: u64,
    /// How long the state of the VM takes to a new backup, at most.
    pub transfer_ns: u64,
    /// Lag from which on the primary is slowed.
    pub lag_target_ns: u64,
    /// Lag at which it stands still.
    pub lag_limit_ns: u64,
    /// Clients.
    pub clients: u8,
    /// Requests of each client.
    pub requests: u32,
    /// Time after which a client asks again, or asks the next.
    pub client_ns: u64,
    /// The last request of client 0 powers the guest off.
    pub power_off: bool,
}

impl Setting {
    /// The times that both hosts start with.
    #[must_use]
    pub fn timing(&self) -> Timing {
        Timing {
            heartbeat_interval_ns: self.heartbeat_interval_ns,
            heartbeat_misses: self.heartbeat_misses,
            channel_timeout_ns: self.channel_timeout_ns,
            // A replay that hangs is no fault of the simulator.
            replay_timeout_ns: 3_600_000 * MS,
            lag_target_ns: self.lag_target_ns,
            lag_limit_ns: self.lag_limit_ns,
        }
    }

    /// Times that an operator may change to. Between the two of a pair, some make suspicious whoever keeps the former ones.
    fn other_timing(&self, rng: &mut ChaCha8Rng) -> Timing {
        let timing = self.timing();
        match rng.random_range(0..3) {
            0 => Timing {
                heartbeat_interval_ns: self.suspect_ns(),
                heartbeat_misses: 3,
                channel_timeout_ns: timing.channel_timeout_ns.max(4 * self.suspect_ns()),
                ..timing
            },
            1 => Timing {
                heartbeat_interval_ns: timing.heartbeat_interval_ns / 2,
                lag_target_ns: timing.lag_target_ns / 2,
                ..timing
            },
            _ => timing,
        }
    }

    /// Nominal time until a dead peer is suspected.
    #[must_use]
    pub fn suspect_ns(&self) -> u64 {
        self.heartbeat_interval_ns * u64::from(self.heartbeat_misses)
    }
}

/// One thing that goes wrong. Those with `for_ns` end by themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Datagrams of one direction are lost, doubled, late and out of order.
    Weather {
        /// The sender.
        from: HostId,
        /// How bad.
        weather: Weather,
        /// How long.
        for_ns: u64,
    },
    /// Nothing gets through from these hosts to the peer.
    Partition {
        /// From A, from B.
        from: [bool; 2],
        /// How long.
        for_ns: u64,
    },
    /// The channel stands still in one direction; datagrams go on.
    Stall {
        /// The sender.
        from: HostId,
        /// How long.
        for_ns: u64,
    },
    /// The channel breaks; what was under way is lost.
    Reset,
    /// Nothing arrives on the channel's connection any more, and no end is told; another connection would do.
    Wedge,
    /// A host is gone at once.
    Crash {
        /// Which.
        host: HostId,
        /// Its network does not say so (a power cut, not a kill).
        silent: bool,
    },
    /// A host that crashed or ended starts anew, with nothing.
    Restart {
        /// Which.
        host: HostId,
    },
    /// A host that crashed or ended starts anew, as a new backup of whoever is live.
    Join {
        /// Which.
        host: HostId,
    },
    /// A host stands still with everything in it, a release that was about to happen included.
    Pause {
        /// Which.
        host: HostId,
        /// How long.
        for_ns: u64,
        /// When it goes on, timers run before what arrived meanwhile.
        timers_first: bool,
    },
    /// The vCPU shim of a host stands still: buffers fill up there, and run empty here.
    SlowShim {
        /// Which.
        host: HostId,
        /// How long.
        for_ns: u64,
    },
    /// These hosts do not reach the arbiter.
    ArbiterUnreachable {
        /// A, B.
        hosts: [bool; 2],
        /// How long.
        for_ns: u64,
    },
    /// The arbiter takes up to this long for the way in, and for the way out.
    ArbiterSlow {
        /// Longest extra delay of one way.
        delay_ns: u64,
        /// How long.
        for_ns: u64,
    },
    /// Answers of the arbiter are lost after the claim was taken.
    ArbiterAnswersLost {
        /// How long.
        for_ns: u64,
    },
    /// Frames between clients and hosts are lost.
    ClientLoss {
        /// Percent.
        percent: u8,
        /// How long.
        for_ns: u64,
    },
    /// The operator changes the times of the pair, where a side takes that.
    Configure {
        /// From here on.
        timing: Timing,
    },
    /// A sibling process dies: the replica says so and ends.
    LocalFailure {
        /// Where.
        host: HostId,
    },
}

impl Fault {
    /// Whether a pair goes on through it: the two hosts hear each other, and the channel can be connected again.
    #[must_use]
    pub fn is_harmless(&self) -> bool {
        matches!(
            self,
            Self::SlowShim { .. }
                | Self::Reset
                | Self::Wedge
                | Self::ArbiterUnreachable { .. }
                | Self::ArbiterSlow { .. }
                | Self::ArbiterAnswersLost { .. }
                | Self::ClientLoss { .. }
                | Self::Configure { .. }
        )
    }

    /// How long it lasts, for those that end by themselves.
    #[must_use]
    pub fn for_ns(&self) -> Option<u64> {
        match *self {
            Self::Weather { for_ns, .. }
            | Self::Partition { for_ns, .. }
            | Self::Stall { for_ns, .. }
            | Self::Pause { for_ns, .. }
            | Self::SlowShim { for_ns, .. }
            | Self::ArbiterUnreachable { for_ns, .. }
            | Self::ArbiterSlow { for_ns, .. }
            | Self::ArbiterAnswersLost { for_ns }
            | Self::ClientLoss { for_ns, .. } => Some(for_ns),
            Self::Reset
            | Self::Wedge
            | Self::Crash { .. }
            | Self::Restart { .. }
            | Self::Join { .. }
            | Self::Configure { .. }
            | Self::LocalFailure { .. } => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let both = |of: &[bool; 2]| match of {
            [true, true] => "A and B",
            [true, false] => "A",
            _ => "B",
        };
        match self {
            Self::Weather { from, weather, .. } => write!(
                f,
                "datagrams from {from:?}: {} % lost, {} % doubled, up to {} µs late",
                weather.loss_percent,
                weather.duplicate_percent,
                weather.delay_ns_max / US
            ),
            Self::Partition { from, .. } => write!(f, "partition: nothing gets through from {}", both(from)),
            Self::Stall { from, .. } => write!(f, "the channel from {from:?} stands still"),
            Self::Reset => f.write_str("the channel breaks"),
            Self::Wedge => f.write_str("nothing arrives on this connection any more"),
            Self::Crash { host, silent: true } => write!(f, "power cut of {host:?}"),
            Self::Crash { host, silent: false } => write!(f, "kill of {host:?}"),
            Self::Restart { host } => write!(f, "{host:?} starts anew, if it is down"),
            Self::Join { host } => write!(f, "{host:?} starts anew as a new backup, if it is down"),
            Self::Pause { host, timers_first, .. } => {
                let order = if *timers_first { "timers" } else { "messages" };
                write!(f, "{host:?} stands still (then {order} first)")
            }
            Self::SlowShim { host, .. } => write!(f, "the shim of {host:?} stands still"),
            Self::ArbiterUnreachable { hosts, .. } => write!(f, "arbiter out of reach of {}", both(hosts)),
            Self::ArbiterSlow { delay_ns, .. } => write!(f, "arbiter up to {} µs late", delay_ns / US),
            Self::ArbiterAnswersLost { .. } => f.write_str("the arbiter's answers are lost"),
            Self::ClientLoss { percent, .. } => write!(f, "{percent} % of the clients' frames are lost"),
            Self::Configure { timing } => write!(
                f,
                "the operator wants {} heartbeats of {} µs, and a lag of {} µs",
                timing.heartbeat_misses,
                timing.heartbeat_interval_ns / US,
                timing.lag_target_ns / US
            ),
            Self::LocalFailure { host } => write!(f, "a sibling process dies on {host:?}"),
        }?;
        self.for_ns()
            .map_or(Ok(()), |for_ns| write!(f, ", for {} µs", for_ns / US))
    }
}

/// A fault and when it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultEvent {
    /// Virtual time.
    pub at_ns: u64,
    /// What.
    pub fault: Fault,
}

/// Everything that is decided before a run begins.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed of it all.
    pub seed: u64,
    /// What stays.
    pub setting: Setting,
    /// What goes wrong, in the order it was drawn.
    pub faults: Vec<FaultEvent>,
}

/// Faults of one run, but for what the operator changes.
pub const FAULTS_MAX: usize = 6;
/// Changes of the times in one run.
const CONFIGURATIONS_MAX: usize = 2;

impl Plan {
    /// The plan of a seed.
    #[must_use]
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let setting = draw_setting(&mut rng);
        let mut faults: Vec<FaultEvent> = Vec::new();
        if rng.random_range(0..12) > 0 {
            let unit_ns = setting.suspect_ns();
            draw_story(&mut rng, unit_ns, &mut faults);
            for _ in faults.len()..rng.random_range(1..=FAULTS_MAX) {
                // Half of the faults come shortly after another one: what is worth testing is what they do together.
                let at_ns = match faults.last() {
                    Some(last) if rng.random_bool(0.5) => {
                        (last.at_ns + rng.random_range(0..3 * unit_ns)).saturating_sub(unit_ns)
                    }
                    // Pairing takes little of a run, and is worth as much.
                    _ if rng.random_range(0..6) == 0 => rng.random_range(0..unit_ns / 8),
                    _ => rng.random_range(0..10 * unit_ns),
                };
                let fault = draw_fault(&mut rng, unit_ns);
                faults.push(FaultEvent { at_ns, fault });
            }
        }
        if rng.random_range(0..4) == 0 {
            for _ in 0..rng.random_range(1..=CONFIGURATIONS_MAX) {
                let at_ns = rng.random_range(0..12 * setting.suspect_ns());
                let timing = setting.other_timing(&mut rng);
                let fault = Fault::Configure { timing };
                faults.push(FaultEvent { at_ns, fault });
            }
        }
        Self { seed, setting, faults }
    }

    /// The small scripted run of the crash-point enumeration: nothing is left to chance but the jitter of the network.
    #[must_use]
    pub fn script(faults: Vec<FaultEvent>, power_off: bool) -> Self {
        let clock = Clock {
            offset_ns: 0,
            rate: 1024,
        };
        let setting = Setting {
            latency_ns: 100 * US,
            jitter_ns: 10 * US,
            heartbeat_interval_ns: 20 * MS,
            heartbeat_misses: 3,
            clocks: [clock; 2],
            ready_ns: [MS, MS],
            stop_ns: 50 * US,
            idle_ns: 5 * MS,
            replay_ns: 150 * US,
            replay_entries_max: 8,
            window_bytes: 4096,
            log_bytes_max: 2048,
            held_replayed_max: 4,
            channel_timeout_ns: 120 * MS,
            ack: Strength::Received,
            flush_ns: MS,
            transfer_ns: 4 * MS,
            lag_target_ns: 100 * MS,
            lag_limit_ns: 1000 * MS,
            clients: 1,
            requests: 5,
            client_ns: 5 * MS,
            power_off,
        };
        Self {
            seed: 0,
            setting,
            faults,
        }
    }

    /// The longest times that are ever in force.
    #[must_use]
    pub fn longest(&self) -> Timing {
        let configured = self.faults.iter().filter_map(|event| match event.fault {
            Fault::Configure { timing } => Some(timing),
            _ => None,
        });
        configured.fold(self.setting.timing(), |longest, timing| {
            // Those with the longest interval have the longest silence.
            let slower = [longest, timing]
                .into_iter()
                .max_by_key(|timing| timing.heartbeat_interval_ns);
            Timing {
                channel_timeout_ns: longest.channel_timeout_ns.max(timing.channel_timeout_ns),
                ..slower.unwrap_or(longest)
            }
        })
    }

    /// Whether nobody has a reason to suspect anybody. A channel that breaks again and again may stand still for too long.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        let wedges = self.faults.iter().filter(|event| event.fault == Fault::Wedge).count();
        wedges <= 1 && self.breaks() <= 3 && self.faults.iter().all(|event| event.fault.is_harmless())
    }

    /// How often the channel breaks.
    #[must_use]
    pub fn breaks(&self) -> usize {
        let breaks = |event: &&FaultEvent| matches!(event.fault, Fault::Reset | Fault::Wedge);
        self.faults.iter().filter(breaks).count()
    }

    /// When the last fault is over.
    #[must_use]
    pub fn quiet_ns(&self) -> u64 {
        let ends = self
            .faults
            .iter()
            .map(|event| event.at_ns + event.fault.for_ns().unwrap_or(0));
        ends.max().unwrap_or(0)
    }

    /// When every request must be answered.
    #[must_use]
    pub fn end_ns(&self) -> u64 {
        let work_ns = 2 * self.setting.client_ns * u64::from(self.setting.requests + 2);
        // After the last fault: suspicion (twice, skewed), the arbiter's timeouts, the replay of a full queue, a new backup, the clients.
        let channel_ns = 3 * self.longest().channel_timeout_ns + 2 * self.setting.transfer_ns;
        self.quiet_ns() + 8 * self.longest().silence_ns() + channel_ns + 20 * MS + work_ns
    }
}

fn draw_setting(rng: &mut ChaCha8Rng) -> Setting {
    let heartbeat_interval_ns = rng.random_range(5..=40) * MS;
    let heartbeat_misses = rng.random_range(3..=6);
    let unit_ns = heartbeat_interval_ns * u64::from(heartbeat_misses);
    let latency_ns = rng.random_range(20 * US..2 * MS);
    let requests = rng.random_range(6..=14);
    let idle_ns = rng.random_range(unit_ns / 32..unit_ns / 8);
    let lag_target_ns = unit_ns / 2 * rng.random_range(1..=4);
    let clock = |rng: &mut ChaCha8Rng| Clock {
        offset_ns: rng.random_range(0..1000 * MS),
        rate: rng.random_range(920..=1130),
    };
    Setting {
        latency_ns,
        jitter_ns: rng.random_range(0..=latency_ns),
        heartbeat_interval_ns,
        heartbeat_misses,
        clocks: [clock(rng), clock(rng)],
        ready_ns: [rng.random_range(0..unit_ns / 4), rng.random_range(0..unit_ns / 4)],
        stop_ns: rng.random_range(20 * US..400 * US),
        idle_ns,
        // A replay that is slower than the recording for good would need the primary throttled.
        replay_ns: ((10 * US) << rng.random_range(0..9)).min(idle_ns / 4),
        replay_entries_max: rng.random_range(1..=48),
        // Enough for the heartbeat of an idle guest and some more; less would be an unprotected VM's network.
        window_bytes: rng.random_range(400..4096) + (80 * 20 * latency_ns / idle_ns) as usize,
        // What is not acknowledged counts: less than a few round trips of it is no protected VM.
        log_bytes_max: rng.random_range(1000..8192) + (150 * 20 * latency_ns / idle_ns) as usize,
        held_replayed_max: rng.random_range(0..=8),
        channel_timeout_ns: unit_ns * rng.random_range(2..=5),
        ack: [Strength::Received, Strength::Durable, Strength::Replayed][rng.random_range(0..4usize).saturating_sub(1)],
        flush_ns: rng.random_range(50 * US..2 * MS),
        lag_target_ns,
        lag_limit_ns: lag_target_ns + unit_ns * rng.random_range(1..=4),
        clients: rng.random_range(1..=CLIENTS_MAX as u8),
        requests,
        client_ns: 9 * unit_ns / u64::from(requests),
        power_off: rng.random_range(0..10) == 0,
        transfer_ns: unit_ns / 32 * (1 << rng.random_range(0..6)),
    }
}

pub(crate) fn draw_host(rng: &mut ChaCha8Rng) -> HostId {
    HostId::BOTH[rng.random_range(0..2)]
}

pub(crate) fn draw_some(rng: &mut ChaCha8Rng) -> [bool; 2] {
    [[true, true], [true, false], [false, true]][rng.random_range(0..3)]
}

fn draw_fault(rng: &mut ChaCha8Rng, unit_ns: u64) -> Fault {
    // Short and long against the time until suspicion; the logarithm is what is uniform.
    let for_ns = unit_ns / 16 * (1 << rng.random_range(0..6)) + rng.random_range(0..unit_ns / 4);
    match rng.random_range(0..100) {
        0..12 => Fault::Weather {
            from: draw_host(rng),
            weather: Weather {
                loss_percent: rng.random_range(0..=90),
                duplicate_percent: rng.random_range(0..=50),
                delay_ns_max: rng.random_range(0..unit_ns),
            },
            for_ns,
        },
        12..24 => Fault::Partition {
            from: draw_some(rng),
            for_ns,
        },
        24..28 => Fault::Stall {
            from: draw_host(rng),
            for_ns,
        },
        28..34 => Fault::Reset,
        34..36 => Fault::Wedge,
        36..48 => Fault::Crash {
            host: draw_host(rng),
            silent: rng.random_bool(0.5),
        },
        48..50 => Fault::Restart { host: draw_host(rng) },
        50..52 => Fault::Join { host: draw_host(rng) },
        52..63 => Fault::Pause {
            host: draw_host(rng),
            for_ns,
            timers_first: rng.random_bool(0.5),
        },
        63..70 => Fault::SlowShim {
            host: draw_host(rng),
            for_ns: 2 * for_ns,
        },
        70..79 => Fault::ArbiterUnreachable {
            hosts: draw_some(rng),
            for_ns,
        },
        79..89 => Fault::ArbiterSlow {
            delay_ns: rng.random_range(unit_ns / 4..4 * unit_ns),
            for_ns: 2 * for_ns,
        },
        89..93 => Fault::ArbiterAnswersLost { for_ns },
        93..97 => Fault::ClientLoss {
            percent: rng.random_range(10..=80),
            for_ns,
        },
        _ => Fault::LocalFailure { host: draw_host(rng) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_plan_and_every_fault_is_drawn_by_some_seed() {
        let mut kinds = std::collections::HashSet::new();
        for seed in 0..300 {
            let plan = Plan::from_seed(seed);
            assert_eq!(plan.faults, Plan::from_seed(seed).faults);
            assert!(plan.faults.len() <= FAULTS_MAX + CONFIGURATIONS_MAX && plan.quiet_ns() < plan.end_ns());
            kinds.extend(plan.faults.iter().map(|event| std::mem::discriminant(&event.fault)));
        }
        assert_eq!(kinds.len(), 16);
    }
}
