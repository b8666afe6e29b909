//! What a run comes to: figures for programs (JSON), a few lines for people.

use std::fmt::Write;

use serde::Serialize;

use crate::clock::ms;
use crate::download::Download;
use crate::events::Event;
use crate::faults::{Expected, Fault, FaultPlan};
use crate::judge::{Transcript, Verdict};
use crate::roles::{FT_LOG, NET, Roles, SHIM};
use crate::topology::HostId;

/// The moments of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timeline {
    /// The fault struck.
    pub fault_ns: Option<u64>,
    /// The survivor suspected its peer.
    pub detect_ns: Option<u64>,
    /// The survivor was live.
    pub go_live_ns: Option<u64>,
}

impl Timeline {
    /// Reads the moments from the events.
    #[must_use]
    pub fn new(events: &[Event], plan: &FaultPlan, fault_ns: Option<u64>) -> Self {
        let Some(fault) = fault_ns else { return Self::default() };
        let roles = Roles::new(events, since(plan, fault_ns));
        let survivor = roles.survivor(plan.expected());
        let live = match survivor {
            HostId::A => roles.first(survivor, FT_LOG, "go_live"),
            HostId::B => roles.first(survivor, SHIM, "live"),
        };
        // A crash point's fault is seen a moment after it struck, perhaps after the survivor saw it.
        let not_before = |event: &Event| event.t_ns.max(fault);
        Self {
            fault_ns,
            detect_ns: roles.first(survivor, FT_LOG, "suspect").map(not_before),
            go_live_ns: live.map(not_before),
        }
    }
}

/// From when on events count as consequences of the fault.
#[must_use]
pub fn since(plan: &FaultPlan, fault_ns: Option<u64>) -> u64 {
    match plan {
        FaultPlan::CrashPoint { .. } => 0,
        FaultPlan::At(..) | FaultPlan::CutThenKill { .. } => fault_ns.unwrap_or(0),
    }
}

/// The figures of one run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// How the backup is kept equal.
    pub engine: &'static str,
    /// What ran in the machine.
    pub guest: &'static str,
    /// What was done to the pair.
    pub fault: String,
    /// The seed of everything random.
    pub seed: u64,
    /// Records sent.
    pub requests: u64,
    /// Records acknowledged.
    pub replies: u64,
    /// The chain is whole, in answers and on the survivor's disk.
    pub chain_ok: bool,
    /// Acknowledged records that are gone.
    pub lost_acknowledged: u64,
    /// Records with two histories.
    pub forked: u64,
    /// One TCP connection carried everything.
    pub same_connection: bool,
    /// Longest time without an answer, from the fault on (in the whole run if there was none).
    pub gap_ms_max: Option<f64>,
    /// From the fault to the survivor's suspicion.
    pub detect_ms: Option<f64>,
    /// From the fault to the survivor being live.
    pub go_live_ms: Option<f64>,
    /// Median latency before the fault.
    pub baseline_ms_p50: Option<f64>,
    /// 99th percentile of the latency before the fault.
    pub baseline_ms_p99: Option<f64>,
    /// Logging traffic before the fault.
    pub log_mbit_s: Option<f64>,
    /// Median time an output was held, before the fault (upper bound of its bucket).
    pub hold_us_p50: Option<u64>,
    /// 99th percentile of the time an output was held, before the fault (upper bound of its bucket).
    pub hold_us_p99: Option<u64>,
    /// The file that was fetched meanwhile, from a guest that serves one.
    pub download: Option<Download>,
    /// The host that is left.
    pub survivor: &'static str,
    /// Everything that is not as it must be; empty after a good run.
    pub problems: Vec<String>,
}

impl Report {
    /// Works the figures out.
    #[must_use]
    pub fn new(
        plan: &FaultPlan,
        seed: u64,
        transcript: &Transcript,
        verdict: &Verdict,
        role_problems: &[String],
        events: &[Event],
        timeline: &Timeline,
    ) -> Self {
        let before = timeline.fault_ns.unwrap_or(u64::MAX);
        let baseline = latencies_ms(transcript, before);
        let holds = last_holds(events, before);
        let since_fault = |t_ns: Option<u64>| Some(ms(t_ns?.saturating_sub(timeline.fault_ns?)));
        let problems = verdict.problems.iter().chain(role_problems).cloned().collect();
        Self {
            engine: "lockstep",
            guest: "ledger",
            fault: plan.name(),
            seed,
            requests: verdict.requests,
            replies: verdict.replies,
            chain_ok: verdict.chain_ok,
            lost_acknowledged: verdict.lost.len() as u64,
            forked: verdict.forked.len() as u64,
            same_connection: verdict.same_connection,
            gap_ms_max: gap_ms_max(transcript, timeline.fault_ns.unwrap_or(0)),
            detect_ms: since_fault(timeline.detect_ns),
            go_live_ms: since_fault(timeline.go_live_ns),
            baseline_ms_p50: percentile(&baseline, 50),
            baseline_ms_p99: percentile(&baseline, 99),
            log_mbit_s: log_mbit_s(events, before),
            hold_us_p50: bucket_percentile(&holds, 50),
            hold_us_p99: bucket_percentile(&holds, 99),
            download: None,
            survivor: Roles::new(events, since(plan, timeline.fault_ns))
                .survivor(plan.expected())
                .name(),
            problems,
        }
    }

    /// Whether the witness is content and the roles ended as they must.
    #[must_use]
    pub fn good(&self) -> bool {
        self.problems.is_empty()
    }

    /// The report for a person.
    #[must_use]
    pub fn text(&self, plan: &FaultPlan) -> String {
        let mut text = String::new();
        let mut line = |head: &str, body: String| writeln!(text, "  {head:<12}{body}").expect("writing to a String");
        let moment = match plan {
            FaultPlan::At(fault, moment) if *fault != Fault::None => {
                format!(", {} µs after answer {}", moment.offset.as_micros(), moment.answers)
            }
            _ => String::new(),
        };
        line("fault", format!("{}, seed {}{moment}", self.fault, self.seed));
        line(if self.good() { "outcome" } else { "expected" }, self.outcome(plan));
        line(
            "clients",
            format!(
                "{} records sent, {} acknowledged, {} lost, {} with two histories",
                self.requests, self.replies, self.lost_acknowledged, self.forked
            ),
        );
        let connection = if self.same_connection {
            "the same from beginning to end"
        } else {
            "LOST"
        };
        line("connection", connection.to_owned());
        if let Some(download) = &self.download {
            let mut body = if download.problems.is_empty() {
                format!("{} bytes on one connection, SHA-256 as it must be", download.received)
            } else {
                format!("{} of {} bytes", download.received, download.bytes)
            };
            if let Some(before) = download.received_at_fault {
                write!(body, "; {before} of them before the fault").expect("writing to a String");
            }
            line("download", body);
        }
        if let Some(gap) = self.gap_ms_max {
            let mut body = format!("{gap:.1} ms at the longest");
            for (what, value) in [("detected", self.detect_ms), ("live", self.go_live_ms)] {
                if let Some(value) = value {
                    write!(body, ", {what} after {value:.1} ms").expect("writing to a String");
                }
            }
            line("silence", body);
        }
        if let (Some(p50), Some(p99)) = (self.baseline_ms_p50, self.baseline_ms_p99) {
            let when = if self.fault == Fault::None.name() {
                ""
            } else {
                " before the fault"
            };
            line("latency", format!("{p50:.2} ms (p50), {p99:.2} ms (p99){when}"));
        }
        if let (Some(p50), Some(p99)) = (self.hold_us_p50, self.hold_us_p99) {
            line(
                "held",
                format!("outputs waited up to {p50} µs (p50), {p99} µs (p99) for the backup"),
            );
        }
        if let Some(rate) = self.log_mbit_s {
            line("logging", format!("{rate:.2} Mbit/s"));
        }
        let chain = if self.chain_ok {
            "whole, in answers and on disk"
        } else {
            "BROKEN"
        };
        line("chain", format!("{chain} (host {})", self.survivor));
        line(
            "witness",
            if self.good() { "content" } else { "NOT CONTENT:" }.to_owned(),
        );
        for problem in self.problems.iter().take(PROBLEMS_SHOWN) {
            writeln!(text, "    - {problem}").expect("writing to a String");
        }
        if self.problems.len() > PROBLEMS_SHOWN {
            writeln!(text, "    - ... and {} more", self.problems.len() - PROBLEMS_SHOWN).expect("writing to a String");
        }
        text
    }

    fn outcome(&self, plan: &FaultPlan) -> String {
        match (plan.expected(), self.survivor) {
            (Expected::Both, _) => "no failover; the pair powered off".to_owned(),
            (Expected::One, "A") => "the primary (host A) won and went on; the backup halted".to_owned(),
            (Expected::One, _) => "the backup (host B) won and went live; the primary halted".to_owned(),
            (Expected::Only(HostId::A), _) => "the primary (host A) went on alone".to_owned(),
            (Expected::Only(HostId::B), _) => "the backup (host B) went live".to_owned(),
        }
    }
}

const PROBLEMS_SHOWN: usize = 12;

/// Latencies of the records answered before `before_ns`, sorted.
fn latencies_ms(transcript: &Transcript, before_ns: u64) -> Vec<f64> {
    let mut latencies: Vec<f64> = transcript
        .appends()
        .filter_map(|exchange| exchange.answer.as_ref().map(|(_, t_ns)| (exchange.due_ns, *t_ns)))
        .filter(|(_, answered)| *answered < before_ns)
        .map(|(due, answered)| ms(answered.saturating_sub(due)))
        .collect();
    latencies.sort_by(f64::total_cmp);
    latencies
}

fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// The longest time between one answer and the next that ends after `from_ns`.
fn gap_ms_max(transcript: &Transcript, from_ns: u64) -> Option<f64> {
    let answered: Vec<u64> = transcript
        .appends()
        .filter_map(|exchange| exchange.answer.as_ref().map(|(_, t_ns)| *t_ns))
        .collect();
    answered
        .windows(2)
        .filter(|pair| pair[1] >= from_ns)
        .map(|pair| pair[1] - pair[0])
        .max()
        .map(ms)
}

/// Bytes the primary logged a second, from its cumulative `log` events before the fault.
#[allow(clippy::cast_precision_loss, reason = "a run logs far less than 2^53 bytes")]
fn log_mbit_s(events: &[Event], before_ns: u64) -> Option<f64> {
    let mut samples = events
        .iter()
        .filter(|event| event.is(HostId::A, FT_LOG, "log") && event.t_ns < before_ns)
        .filter_map(|event| Some((event.t_ns, event.number("bytes")?)));
    let (first_ns, first) = samples.next()?;
    let (last_ns, last) = samples.next_back()?;
    let seconds = ms(last_ns.checked_sub(first_ns).filter(|ns| *ns > 0)?) / 1e3;
    Some(last.saturating_sub(first) as f64 * 8.0 / 1e6 / seconds)
}

/// The primary's last histogram of hold times before the fault: (upper bound in microseconds, count).
pub(crate) fn last_holds(events: &[Event], before_ns: u64) -> Vec<(u64, u64)> {
    let last = events
        .iter()
        .rfind(|event| event.is(HostId::A, NET, "hold") && event.t_ns < before_ns);
    let buckets = last
        .and_then(|event| event.fields.get("buckets"))
        .and_then(|buckets| buckets.as_array());
    let mut holds: Vec<(u64, u64)> = buckets
        .into_iter()
        .flatten()
        .filter_map(|bucket| Some((bucket.get(0)?.as_u64()?, bucket.get(1)?.as_u64()?)))
        .collect();
    holds.sort_unstable();
    holds
}

pub(crate) fn bucket_percentile(buckets: &[(u64, u64)], percent: u64) -> Option<u64> {
    let total: u64 = buckets.iter().map(|(_, count)| count).sum();
    if total == 0 {
        return None;
    }
    let rank = (total * percent).div_ceil(100);
    let mut seen = 0;
    buckets
        .iter()
        .find(|(_, count)| {
            seen += count;
            seen >= rank
        })
        .map(|(upper, _)| *upper)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::Moment;
    use crate::judge::{Connection, Exchange};
    use crate::ledger::{Answer, GENESIS, Op, Request, Status};
    use serde_json::json;

    const MS: u64 = 1_000_000;

    /// Records due every 10 ms, answered after `latency_ms[n]`.
    fn transcript(latency_ms: &[u64]) -> Transcript {
        let exchange = |(n, latency): (u64, &u64)| {
            let due_ns = n * 10 * MS;
            let answer = Answer {
                status: Status::Ok,
                n,
                uptime_ns: n,
                hash: GENESIS,
                payload: vec![],
            };
            Exchange {
                request: Request {
                    op: Op::Append,
                    n,
                    payload: vec![],
                },
                due_ns,
                sent_ns: Some(due_ns),
                answer: Some((answer, due_ns + latency * MS)),
            }
        };
        Transcript {
            exchanges: (1..).zip(latency_ms).map(exchange).collect(),
            connection: Connection::Intact,
        }
    }

    fn event(t_ms: u64, host: HostId, source: &str, name: &str, fields: serde_json::Value) -> Event {
        let fields = fields.as_object().cloned().unwrap_or_default();
        Event {
            t_ns: t_ms * MS,
            host,
            source: source.to_owned(),
            name: name.to_owned(),
            fields,
        }
    }

    fn plan() -> FaultPlan {
        FaultPlan::At(
            Fault::KillPrimary,
            Moment {
                answers: 2,
                offset: std::time::Duration::ZERO,
            },
        )
    }

    fn events() -> Vec<Event> {
        vec![
            event(1, HostId::A, FT_LOG, "log", json!({"bytes": 1000})),
            event(
                11,
                HostId::A,
                NET,
                "hold",
                json!({"buckets": [[100, 98], [400, 1], [200, 1]]}),
            ),
            event(21, HostId::A, FT_LOG, "log", json!({"bytes": 6000})),
            event(40, HostId::B, FT_LOG, "suspect", json!({})),
            event(50, HostId::B, SHIM, "live", json!({})),
            event(60, HostId::A, FT_LOG, "log", json!({"bytes": 9_000_000})),
        ]
    }

    fn report() -> Report {
        // The fault is at 25 ms: records 1 and 2 are answered before it, 3 to 5 together at 95 ms.
        let transcript = transcript(&[1, 2, 65, 55, 45]);
        let timeline = Timeline::new(&events(), &plan(), Some(25 * MS));
        let verdict = Verdict {
            requests: 5,
            replies: 5,
            same_connection: true,
            chain_ok: true,
            ..Verdict::default()
        };
        Report::new(&plan(), 7, &transcript, &verdict, &[], &events(), &timeline)
    }

    #[test]
    fn figures_are_those_of_the_run() {
        let report = report();
        assert_eq!(report.gap_ms_max, Some(73.0));
        assert_eq!((report.detect_ms, report.go_live_ms), (Some(15.0), Some(25.0)));
        assert_eq!((report.baseline_ms_p50, report.baseline_ms_p99), (Some(1.0), Some(2.0)));
        assert_eq!(report.log_mbit_s, Some(2.0));
        assert_eq!((report.hold_us_p50, report.hold_us_p99), (Some(100), Some(200)));
        assert!(report.good());
    }

    #[test]
    fn json_has_the_promised_keys() {
        let json = serde_json::to_value(report()).expect("a report is JSON");
        for key in [
            "engine",
            "guest",
            "fault",
            "seed",
            "requests",
            "replies",
            "chain_ok",
            "lost_acknowledged",
            "forked",
            "same_connection",
            "gap_ms_max",
            "detect_ms",
            "go_live_ms",
            "baseline_ms_p50",
            "baseline_ms_p99",
            "log_mbit_s",
            "hold_us_p50",
            "hold_us_p99",
        ] {
            assert!(json.get(key).is_some(), "{key} is missing in {json}");
        }
        assert_eq!(json["fault"], "kill-primary");
    }

    #[test]
    fn run_without_fault_or_figures_has_nulls() {
        let plan = FaultPlan::At(
            Fault::None,
            Moment {
                answers: 1,
                offset: std::time::Duration::ZERO,
            },
        );
        let timeline = Timeline::new(&[], &plan, None);
        let report = Report::new(
            &plan,
            1,
            &transcript(&[1, 1, 9]),
            &Verdict::default(),
            &[],
            &[],
            &timeline,
        );
        assert_eq!(
            (report.detect_ms, report.go_live_ms, report.log_mbit_s),
            (None, None, None)
        );
        assert_eq!((report.hold_us_p50, report.gap_ms_max), (None, Some(18.0)));
    }

    #[test]
    fn text_tells_what_is_wrong() {
        let mut report = report();
        assert!(report.text(&plan()).contains("content"));
        report.problems = (0..20).map(|n| format!("problem {n}")).collect();
        let text = report.text(&plan());
        assert!(
            text.contains("NOT CONTENT") && text.contains("problem 11") && text.contains("and 8 more"),
            "{text}"
        );
    }

    #[test]
    fn percentiles_take_the_nearest_rank() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(percentile(&values, 50), Some(100.0));
        assert_eq!(percentile(&values, 99), Some(198.0));
        assert_eq!(percentile(&[], 50), None);
        assert_eq!(bucket_percentile(&[(10, 0)], 50), None);
    }
}
