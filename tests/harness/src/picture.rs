//! Latency over time around the fault, as an SVG.

use std::fmt::Write;

use crate::clock::ms;
use crate::judge::Transcript;
use crate::report::{Report, Timeline};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 28.0;
const TOP: f64 = 116.0;
const BOTTOM: f64 = 56.0;

const BLUE: &str = "#2563eb";
const ORANGE: &str = "#ea580c";
const RED: &str = "#dc2626";
const AMBER: &str = "#b45309";
const GREEN: &str = "#15803d";

/// One answered record, relative to the fault.
struct Point {
    sent_s: f64,
    latency_ms: f64,
    answered_s: f64,
}

/// Draws a run.
#[must_use]
pub fn svg(report: &Report, transcript: &Transcript, timeline: &Timeline) -> String {
    let first = transcript.appends().next().map_or(0, |exchange| exchange.due_ns);
    let zero = timeline.fault_ns.unwrap_or(first);
    let relative = |t_ns: u64| {
        if t_ns >= zero {
            ms(t_ns - zero) / 1e3
        } else {
            -ms(zero - t_ns) / 1e3
        }
    };
    let points: Vec<Point> = transcript
        .appends()
        .filter_map(|exchange| {
            let (_, answered_ns) = exchange.answer.as_ref()?;
            Some(Point {
                sent_s: relative(exchange.due_ns),
                latency_ms: ms(answered_ns.saturating_sub(exchange.due_ns)).max(0.01),
                answered_s: relative(*answered_ns),
            })
        })
        .collect();
    let resumed_s = timeline
        .fault_ns
        .map(|_| resumed_s(&points, timeline.go_live_ns.map_or(0.0, relative)));
    let scale = Scale::new(&points, resumed_s);
    let mut out = String::new();
    frame(&mut out, report, &scale);
    let moments = [
        (timeline.fault_ns, "fault", RED, 0.0),
        (timeline.detect_ns, "suspected", AMBER, 1.0),
        (timeline.go_live_ns, "live", GREEN, 2.0),
    ];
    if let Some(live) = timeline.go_live_ns.filter(|_| timeline.fault_ns.is_some()) {
        band(&mut out, &scale, relative(live));
    }
    if resumed_s.is_some() {
        legend(&mut out);
    }
    for point in points
        .iter()
        .filter(|point| (scale.from_s..=scale.to_s).contains(&point.sent_s))
    {
        let waited = resumed_s.is_some_and(|resumed_s| point.answered_s > 0.0 && point.sent_s < resumed_s);
        let (x, y) = (scale.x(point.sent_s), scale.y(point.latency_ms));
        let colour = if waited { ORANGE } else { BLUE };
        draw(
            &mut out,
            format_args!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="2.6" fill="{colour}" fill-opacity="0.75"/>"#),
        );
    }
    for (t_ns, name, colour, row) in moments {
        if let Some(t_ns) = t_ns {
            marker(&mut out, &scale, relative(t_ns), name, colour, row);
        }
    }
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, element: std::fmt::Arguments<'_>) {
    writeln!(out, "{element}").expect("writing to a String");
}

/// When the machine answered again after the fault; never, for the purposes of a picture, is at the last record.
fn resumed_s(points: &[Point], live_s: f64) -> f64 {
    let last = points.iter().map(|point| point.sent_s).fold(0.1, f64::max);
    let answered = points.iter().map(|point| point.answered_s).filter(|t_s| *t_s > live_s);
    answered.min_by(f64::total_cmp).unwrap_or(last)
}

struct Scale {
    from_s: f64,
    to_s: f64,
    /// Powers of ten.
    low: f64,
    high: f64,
}

impl Scale {
    /// All of a run without fault; otherwise a second before it, and half as long again as its effects last.
    fn new(points: &[Point], resumed_s: Option<f64>) -> Self {
        let last = points.iter().map(|point| point.sent_s).fold(0.1, f64::max);
        let (from_s, to_s) = match resumed_s {
            Some(resumed_s) => (-1.0, (resumed_s * 1.5).max(1.5).min(last)),
            None => (0.0, last),
        };
        let seen = || {
            points
                .iter()
                .filter(|point| (from_s..=to_s).contains(&point.sent_s))
                .map(|p| p.latency_ms)
        };
        let low = seen().fold(1.0, f64::min).log10().floor();
        let high = seen().fold(low.exp2().max(10.0), f64::max).log10().ceil();
        Self {
            from_s,
            to_s,
            low,
            high,
        }
    }

    fn x(&self, t_s: f64) -> f64 {
        LEFT + (t_s - self.from_s) / (self.to_s - self.from_s) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, latency_ms: f64) -> f64 {
        let share = (latency_ms.log10() - self.low) / (self.high - self.low);
        HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    }
}

/// Background, title, axes and grid.
fn frame(out: &mut String, report: &Report, scale: &Scale) {
    draw(
        out,
        format_args!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="'DejaVu Sans', Verdana, sans-serif">
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="{LEFT}" y="32" font-size="18" font-weight="bold" fill="#111827">Latency the client saw: {fault}, seed {seed}</text>
<text x="{LEFT}" y="53" font-size="12.5" fill="#4b5563">{subtitle}</text>"##,
            fault = report.fault,
            seed = report.seed,
            subtitle = subtitle(report),
        ),
    );
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let mut power = scale.low;
    while power <= scale.high {
        let y = scale.y(10_f64.powf(power));
        let label = latency_label(power);
        draw(
            out,
            format_args!(
                r##"<line x1="{LEFT}" y1="{y:.1}" x2="{right}" y2="{y:.1}" stroke="#e5e7eb"/>
<text x="{x}" y="{ty:.1}" font-size="12" fill="#374151" text-anchor="end">{label}</text>"##,
                x = LEFT - 8.0,
                ty = y + 4.0,
            ),
        );
        power += 1.0;
    }
    let step = tick_step(scale.to_s - scale.from_s);
    let mut tick = (scale.from_s / step).ceil() * step;
    while tick <= scale.to_s + 1e-9 {
        let x = scale.x(tick);
        // The addition turns -0 into 0.
        let shown = (tick * 100.0).round() / 100.0 + 0.0;
        draw(
            out,
            format_args!(
                r##"<line x1="{x:.1}" y1="{bottom}" x2="{x:.1}" y2="{y2}" stroke="#9ca3af"/>
<text x="{x:.1}" y="{ty}" font-size="12" fill="#374151" text-anchor="middle">{shown} s</text>"##,
                y2 = bottom + 5.0,
                ty = bottom + 20.0,
            ),
        );
        tick += step;
    }
    let axis = if report.fault == "none" {
        "time the record was sent"
    } else {
        "time the record was sent, from the fault on"
    };
    draw(
        out,
        format_args!(
            r##"<line x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="#6b7280"/>
<text x="{x}" y="{y}" font-size="12" fill="#4b5563" text-anchor="middle">{axis}</text>
<text transform="translate(18 {my}) rotate(-90)" font-size="12" fill="#4b5563" text-anchor="middle">latency</text>"##,
            x = f64::midpoint(LEFT, right),
            y = HEIGHT - 14.0,
            my = f64::midpoint(TOP, bottom),
        ),
    );
}

fn subtitle(report: &Report) -> String {
    let mut parts = vec![format!(
        "{} of {} records acknowledged, {} lost",
        report.replies, report.requests, report.lost_acknowledged
    )];
    if let Some(p50) = report.baseline_ms_p50 {
        parts.push(format!("usually {p50:.1} ms"));
    }
    if let Some(gap) = report.gap_ms_max {
        parts.push(format!("longest silence {gap:.0} ms"));
    }
    parts.push(
        if report.same_connection {
            "same TCP connection"
        } else {
            "connection lost"
        }
        .to_owned(),
    );
    parts.join("  ·  ")
}

fn latency_label(power: f64) -> String {
    if power < 0.0 {
        format!("{:.0} µs", 10_f64.powf(power + 3.0))
    } else if power < 3.0 {
        format!("{:.0} ms", 10_f64.powf(power))
    } else {
        format!("{:.0} s", 10_f64.powf(power - 3.0))
    }
}

fn tick_step(span_s: f64) -> f64 {
    [0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|step| span_s / step <= 12.0)
        .unwrap_or(30.0)
}

/// What the colours mean, at the lower right.
fn legend(out: &mut String) {
    let y = HEIGHT - 14.0;
    for (x, colour, meaning) in [
        (WIDTH - 290.0, ORANGE, "met the outage"),
        (WIDTH - 160.0, BLUE, "answered as usual"),
    ] {
        draw(
            out,
            format_args!(
                r##"<rect x="{x}" y="{ry}" width="8" height="8" rx="4" fill="{colour}"/>
<text x="{tx}" y="{y}" font-size="12" fill="#4b5563">{meaning}</text>"##,
                ry = y - 8.0,
                tx = x + 14.0,
            ),
        );
    }
}

/// The outage: from the fault until the survivor was live.
fn band(out: &mut String, scale: &Scale, live_s: f64) {
    let (x, to) = (scale.x(0.0), scale.x(live_s));
    draw(
        out,
        format_args!(
            r##"<rect x="{x:.1}" y="{TOP}" width="{width:.1}" height="{height}" fill="#fee2e2" fill-opacity="0.7"/>"##,
            width = (to - x).max(0.0),
            height = HEIGHT - TOP - BOTTOM,
        ),
    );
}

/// A vertical line with its label above the plot; labels have a row each, so that close moments stay readable.
fn marker(out: &mut String, scale: &Scale, t_s: f64, name: &str, colour: &str, row: f64) {
    let (x, y) = (scale.x(t_s), TOP - 44.0 + row * 16.0);
    let label = if name == "fault" {
        name.to_owned()
    } else {
        format!("{name} after {:.0} ms", t_s * 1e3)
    };
    draw(
        out,
        format_args!(
            r#"<line x1="{x:.1}" y1="{y1}" x2="{x:.1}" y2="{y2}" stroke="{colour}" stroke-width="1.5"/>
<text x="{tx:.1}" y="{ty}" font-size="12.5" font-weight="bold" fill="{colour}">{label}</text>"#,
            y1 = y - 8.0,
            y2 = HEIGHT - BOTTOM,
            tx = x + 6.0,
            ty = y + 2.0,
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::{Fault, FaultPlan, Moment};
    use crate::judge::{Connection, Exchange, Verdict};
    use crate::ledger::{Answer, GENESIS, Op, Request, Status};

    const MS: u64 = 1_000_000;

    /// Eight seconds at 100 records a second; nothing is answered from 4.003 s to `resumed_ms`.
    fn transcript(resumed_ms: u64) -> Transcript {
        let exchange = |n: u64| {
            let due_ns = n * 10 * MS;
            let usual = due_ns + 900_000 + (n * 7919 % 13) * 60_000;
            let cut = (4003 * MS..resumed_ms * MS).contains(&usual);
            let answered = if cut {
                resumed_ms * MS + (n - 400) * 10_000
            } else {
                usual
            };
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
                answer: Some((answer, answered)),
            }
        };
        Transcript {
            exchanges: (1..=800).map(exchange).collect(),
            connection: Connection::Intact,
        }
    }

    fn drawn(fault: Fault, transcript: &Transcript, timeline: &Timeline) -> String {
        let plan = FaultPlan::At(
            fault,
            Moment {
                answers: 400,
                offset: std::time::Duration::ZERO,
            },
        );
        let verdict = Verdict {
            requests: 800,
            replies: 800,
            same_connection: true,
            chain_ok: true,
            ..Verdict::default()
        };
        let report = Report::new(&plan, 7, transcript, &verdict, &[], &[], timeline);
        svg(&report, transcript, timeline)
    }

    #[test]
    fn fault_and_what_followed_are_marked() {
        let timeline = Timeline {
            fault_ns: Some(4003 * MS),
            detect_ns: Some(4207 * MS),
            go_live_ns: Some(4219 * MS),
        };
        let picture = drawn(Fault::KillPrimary, &transcript(4300), &timeline);
        if let Some(file) = std::env::var_os("FT_PICTURE") {
            std::fs::write(file, &picture).expect("written");
        }
        assert!(picture.contains(">fault</text>"));
        assert!(picture.contains(">suspected after 204 ms</text>") && picture.contains(">live after 216 ms</text>"));
        assert_eq!(
            picture.matches(&format!(r#"r="2.6" fill="{ORANGE}""#)).count(),
            30,
            "records that met the outage"
        );
        assert!(!picture.contains("NaN") && !picture.contains("inf"));
    }

    #[test]
    fn runs_without_fault_or_without_answers_have_a_picture_too() {
        let whole = drawn(Fault::None, &transcript(0), &Timeline::default());
        assert_eq!(whole.matches("<circle").count(), 800);
        assert!(!whole.contains(">fault</text>"));
        let empty = Transcript {
            exchanges: vec![],
            connection: Connection::Silent,
        };
        for timeline in [
            Timeline::default(),
            Timeline {
                fault_ns: Some(1),
                ..Timeline::default()
            },
        ] {
            let picture = drawn(Fault::Partition, &empty, &timeline);
            assert!(!picture.contains("NaN") && !picture.contains("inf"), "{picture}");
        }
    }
}
