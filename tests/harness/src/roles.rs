//! Who must have ended as what. Pure: from the events of a run.

use crate::events::Event;
use crate::faults::Expected;
use crate::process::{EXITED, Exit};
use crate::topology::HostId;

/// Name of the logging daemon.
pub const FT_LOG: &str = "ft-log";
/// Name of the block daemon.
pub const BLK: &str = "vhost-ft-blk";
/// Name of the network daemon.
pub const NET: &str = "vhost-ft-net";
/// Name of the VMM.
pub const SHIM: &str = "ft-vcpu-shim";
/// All four, in the order they are started.
pub const PROCESSES: [&str; 4] = [FT_LOG, BLK, NET, SHIM];

/// Exit status of a daemon that lost the arbitration.
pub const HALTED_STATUS: i32 = 4;

/// The events of a run, asked about roles.
#[derive(Debug, Clone, Copy)]
pub struct Roles<'a> {
    events: &'a [Event],
    /// When the fault struck; what was before it does not count. 0: everything counts.
    since_ns: u64,
}

impl<'a> Roles<'a> {
    /// Looks at `events` from `since_ns` on.
    #[must_use]
    pub fn new(events: &'a [Event], since_ns: u64) -> Self {
        Self { events, since_ns }
    }

    /// The first event of this kind.
    #[must_use]
    pub fn first(&self, host: HostId, source: &str, name: &str) -> Option<&'a Event> {
        self.events
            .iter()
            .find(|event| event.t_ns >= self.since_ns && event.is(host, source, name))
    }

    /// How a process ended, if it did.
    #[must_use]
    pub fn exit(&self, host: HostId, process: &str) -> Option<Exit> {
        self.events
            .iter()
            .find(|event| event.is(host, process, EXITED))
            .and_then(Exit::from_event)
    }

    /// Whether this host went live (or on alone) after the fault.
    #[must_use]
    pub fn went_live(&self, host: HostId) -> bool {
        self.first(host, FT_LOG, "go_live").is_some()
    }

    /// The host that is left, as far as one can say.
    #[must_use]
    pub fn survivor(&self, expected: Expected) -> HostId {
        match expected {
            Expected::Both => HostId::A,
            Expected::Only(host) => host,
            Expected::One if self.went_live(HostId::B) && !self.went_live(HostId::A) => HostId::B,
            Expected::One => HostId::A,
        }
    }

    /// Everything that is not as it must be; empty when the roles ended well.
    #[must_use]
    pub fn problems(&self, expected: Expected) -> Vec<String> {
        let mut problems = Vec::new();
        for host in HostId::BOTH {
            if let Some(event) = self.events.iter().find(|event| event.is(host, SHIM, "diverged")) {
                problems.push(format!(
                    "host {host} diverged: {}",
                    serde_json::Value::from(event.fields.clone())
                ));
            }
        }
        match expected {
            Expected::Both => {
                for host in HostId::BOTH {
                    self.orderly_end(host, &mut problems);
                }
                if self.went_live(HostId::B) || self.first(HostId::B, SHIM, "live").is_some() {
                    problems.push("the backup went live though nothing had happened".to_owned());
                }
            }
            Expected::Only(survivor) => {
                self.took_over(survivor, &mut problems);
                self.dead(survivor.peer(), &mut problems);
            }
            Expected::One => {
                let live: Vec<HostId> = HostId::BOTH.into_iter().filter(|host| self.went_live(*host)).collect();
                match live[..] {
                    [winner] => {
                        self.took_over(winner, &mut problems);
                        self.halted(winner.peer(), &mut problems);
                    }
                    [] => problems.push("neither side went live".to_owned()),
                    _ => problems.push("both sides went live".to_owned()),
                }
            }
        }
        problems
    }

    fn took_over(&self, host: HostId, problems: &mut Vec<String>) {
        if !self.went_live(host) {
            problems.push(format!("host {host} did not go live"));
        } else if host == HostId::B && self.first(host, SHIM, "live").is_none() {
            problems.push("host B won, but its virtual machine did not go live".to_owned());
        }
        self.orderly_end(host, problems);
    }

    fn orderly_end(&self, host: HostId, problems: &mut Vec<String>) {
        for process in PROCESSES {
            match self.exit(host, process) {
                Some(Exit::Code(0)) => {}
                Some(exit) => problems.push(format!("{process} on host {host} ended with {exit}")),
                None => problems.push(format!("{process} on host {host} did not end after the power-off")),
            }
        }
    }

    fn dead(&self, host: HostId, problems: &mut Vec<String>) {
        for process in PROCESSES {
            if self.exit(host, process).is_none() {
                problems.push(format!("{process} on host {host} is not dead"));
            }
        }
    }

    fn halted(&self, host: HostId, problems: &mut Vec<String>) {
        if self.first(host, FT_LOG, "halted").is_none() {
            problems.push(format!("host {host} lost, but did not say that it halted"));
        }
        match self.exit(host, FT_LOG) {
            Some(Exit::Code(HALTED_STATUS)) => {}
            Some(exit) => problems.push(format!(
                "ft-log on host {host} lost and ended with {exit}, not {HALTED_STATUS}"
            )),
            None => problems.push(format!("ft-log on host {host} lost and did not end")),
        }
        for process in [BLK, NET, SHIM] {
            if self.exit(host, process).is_none() {
                problems.push(format!("{process} is still running on host {host}, which lost"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    fn event(t_ns: u64, host: HostId, source: &str, name: &str) -> Event {
        Event {
            t_ns,
            host,
            source: source.to_owned(),
            name: name.to_owned(),
            fields: Map::new(),
        }
    }

    fn exits(host: HostId, code: i32) -> Vec<Event> {
        let exit = |process| {
            let mut event = event(100, host, process, EXITED);
            event.fields.insert("code".to_owned(), json!(code));
            event
        };
        PROCESSES.into_iter().map(exit).collect()
    }

    fn takeover(host: HostId) -> Vec<Event> {
        let mut events = vec![event(20, host, FT_LOG, "go_live"), event(21, host, SHIM, "live")];
        events.extend(exits(host, 0));
        events
    }

    fn problems(events: &[Event], expected: Expected) -> Vec<String> {
        Roles::new(events, 10).problems(expected)
    }

    #[test]
    fn orderly_end_of_both_is_well() {
        let mut events = exits(HostId::A, 0);
        events.extend(exits(HostId::B, 0));
        assert_eq!(problems(&events, Expected::Both), Vec::<String>::new());
        events.push(event(30, HostId::B, FT_LOG, "go_live"));
        assert_eq!(
            problems(&events, Expected::Both),
            ["the backup went live though nothing had happened"]
        );
    }

    #[test]
    fn process_that_stays_or_fails_is_named() {
        let mut events = exits(HostId::A, 0);
        events.extend(exits(HostId::B, 6));
        events.retain(|event| !event.is(HostId::A, NET, EXITED));
        let found = problems(&events, Expected::Both);
        assert_eq!(found.len(), 5, "{found:?}");
        assert_eq!(found[0], "vhost-ft-net on host A did not end after the power-off");
        assert_eq!(found[1], "ft-log on host B ended with exit status 6");
    }

    #[test]
    fn survivor_must_have_gone_live_after_the_fault() {
        let mut events = takeover(HostId::B);
        events.extend(exits(HostId::A, 9));
        assert_eq!(problems(&events, Expected::Only(HostId::B)), Vec::<String>::new());
        // The primary's go_live at its start does not make it the one that went on alone.
        let mut early = exits(HostId::A, 0);
        early.push(event(1, HostId::A, FT_LOG, "go_live"));
        early.extend(exits(HostId::B, 9));
        assert_eq!(problems(&early, Expected::Only(HostId::A)), ["host A did not go live"]);
    }

    #[test]
    fn partition_has_one_winner_and_one_halted_loser() {
        let mut events = takeover(HostId::A);
        events.push(event(22, HostId::B, FT_LOG, "halted"));
        events.extend(exits(HostId::B, HALTED_STATUS));
        assert_eq!(problems(&events, Expected::One), Vec::<String>::new());
        assert_eq!(Roles::new(&events, 10).survivor(Expected::One), HostId::A);

        let unsaid: Vec<Event> = events.iter().filter(|event| event.name != "halted").cloned().collect();
        assert_eq!(
            problems(&unsaid, Expected::One),
            ["host B lost, but did not say that it halted"]
        );

        let mut wrong_status = takeover(HostId::B);
        wrong_status.push(event(22, HostId::A, FT_LOG, "halted"));
        wrong_status.extend(exits(HostId::A, 0));
        assert_eq!(
            problems(&wrong_status, Expected::One),
            ["ft-log on host A lost and ended with exit status 0, not 4"]
        );
        assert_eq!(Roles::new(&wrong_status, 10).survivor(Expected::One), HostId::B);
    }

    #[test]
    fn two_winners_or_none_is_a_problem() {
        let mut both = takeover(HostId::A);
        both.extend(takeover(HostId::B));
        assert_eq!(problems(&both, Expected::One), ["both sides went live"]);
        assert_eq!(problems(&[], Expected::One), ["neither side went live"]);
    }

    #[test]
    fn divergence_is_always_a_problem() {
        let mut events = takeover(HostId::B);
        events.extend(exits(HostId::A, 9));
        events.push(event(15, HostId::B, SHIM, "diverged"));
        assert_eq!(problems(&events, Expected::Only(HostId::B)), ["host B diverged: {}"]);
    }
}
