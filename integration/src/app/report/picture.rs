//! The picture: for every policy the response times of all requests, the mean of every second, the
//! answers per second, and the phases of every VM, all on one time axis.

use std::fmt::Write as _;

use sidecar::protocol::types::Phase;

use super::{Report, Run};
use crate::app::load::Ending;
use crate::clock::Micros;

const WIDTH: f64 = 1080.0;
const LEFT: f64 = 110.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 74.0;
const TITLE: f64 = 26.0;
const CHART: f64 = 170.0;
const STRIP: f64 = 26.0;
const LANE: f64 = 15.0;
const GAP: f64 = 22.0;
const BOTTOM: f64 = 40.0;

const INK: &str = "#1d2733";
const SOFT: &str = "#5d6b7a";
const GRID: &str = "#e3e7ec";
const DOT: &str = "#6f7f92";
const MEAN: &str = "#14549c";
const FAILED: &str = "#d6303a";
const ANSWERED: &str = "#9db8d2";
const AT_SOURCE: &str = "#d5dae1";
const PRECOPY: &str = "#6aa6e0";
const HELD: &str = "#f2b84b";
const STOPPED: &str = "#d6303a";
const AT_DESTINATION: &str = "#4bab75";

/// Response times from here to there, in milliseconds, on a logarithmic axis.
const LOWEST_MS: f64 = 5.0;
const HIGHEST_MS: f64 = 20_000.0;

/// Seconds from the move's beginning to a place on the paper.
struct Axis {
    from_s: f64,
    to_s: f64,
}

impl Axis {
    fn of(report: &Report) -> Self {
        let mut axis = Self {
            from_s: 0.0,
            to_s: 1.0,
        };
        for run in &report.runs {
            for sample in &run.samples {
                let at = seconds(sample.due, run.began);
                axis.from_s = axis.from_s.min(at);
                axis.to_s = axis.to_s.max(at);
            }
        }
        axis
    }

    fn x(&self, at_s: f64) -> f64 {
        let share = (at_s - self.from_s) / (self.to_s - self.from_s);
        LEFT + share.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    fn step(&self) -> f64 {
        let about = (self.to_s - self.from_s) / 12.0;
        let steps = [1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0];
        steps
            .into_iter()
            .find(|step| *step >= about)
            .unwrap_or(600.0)
    }
}

fn seconds(at: Micros, began: Micros) -> f64 {
    if at < began {
        -began.since(at).as_secs_f64()
    } else {
        at.since(began).as_secs_f64()
    }
}

/// The place of a response time above the chart's foot.
fn height(ms: f64) -> f64 {
    let share = (ms.max(LOWEST_MS) / LOWEST_MS).ln() / (HIGHEST_MS / LOWEST_MS).ln();
    share.min(1.0) * CHART
}

/// Draws the report.
pub(super) fn picture(report: &Report) -> String {
    let axis = Axis::of(report);
    let panel = |run: &Run| TITLE + CHART + STRIP + LANE * lanes(run) + GAP;
    let total = TOP + report.runs.iter().map(panel).sum::<f64>() + BOTTOM;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {total}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"{INK}\">\n\
         <rect width=\"{WIDTH}\" height=\"{total}\" fill=\"#fff\"/>\n"
    );
    text(
        &mut svg,
        LEFT,
        24.0,
        "font-size=\"16\" font-weight=\"600\"",
        "What users feel of a move",
    );
    text(
        &mut svg,
        LEFT,
        42.0,
        &format!("fill=\"{SOFT}\""),
        &report.setting,
    );
    legend(&mut svg);
    let mut y = TOP;
    for run in &report.runs {
        draw(&mut svg, run, &axis, y);
        y += panel(run);
    }
    let mut at = (axis.from_s / axis.step()).ceil() * axis.step();
    while at <= axis.to_s {
        let style = format!("fill=\"{SOFT}\" text-anchor=\"middle\"");
        text(&mut svg, axis.x(at), y, &style, &format!("{at:.0} s"));
        at += axis.step();
    }
    let style = format!("fill=\"{SOFT}\" text-anchor=\"middle\"");
    text(
        &mut svg,
        f64::midpoint(LEFT, WIDTH),
        y + 18.0,
        &style,
        "since the move began",
    );
    svg.push_str("</svg>\n");
    svg
}

fn lanes(run: &Run) -> f64 {
    f64::from(u32::try_from(run.movement.vms.len()).unwrap_or(u32::MAX))
}

fn legend(svg: &mut String) {
    let mut x = LEFT;
    for (colour, what) in [
        (DOT, "a request"),
        (FAILED, "a failed one"),
        (MEAN, "mean of a second"),
        (ANSWERED, "answers per second"),
        (AT_SOURCE, "VM at its source"),
        (PRECOPY, "pre-copy"),
        (HELD, "held"),
        (STOPPED, "downtime"),
        (AT_DESTINATION, "at its destination"),
    ] {
        rect(svg, x, 52.0, 10.0, 10.0, colour);
        text(svg, x + 14.0, 61.0, "", what);
        x += 26.0 + 6.4 * f64::from(u32::try_from(what.len()).unwrap_or(0));
    }
}

fn draw(svg: &mut String, run: &Run, axis: &Axis, top: f64) {
    let title = format!(
        "{}: {:.1} s, {:.1} ms before, {:.1} ms during the move, {} s degraded, {} failed",
        run.title(),
        run.movement.total_s,
        run.feel.before_ms,
        run.feel.during_ms,
        run.feel.degraded_s,
        run.feel.refused + run.feel.lost
    );
    text(svg, LEFT, top + 15.0, "font-weight=\"600\"", &title);
    let foot = top + TITLE + CHART;
    grid(svg, axis, foot, top + TITLE);
    let end = axis.x(run.movement.total_s);
    let begin = axis.x(0.0);
    let _ = writeln!(
        svg,
        "<rect x=\"{begin:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{CHART}\" fill=\"{PRECOPY}\" opacity=\"0.09\"/>",
        top + TITLE,
        end - begin
    );
    for sample in &run.samples {
        let took = sample.took().as_secs_f64() * 1e3;
        let x = axis.x(seconds(sample.due, run.began));
        let good = sample.ending == Ending::Answered;
        let (colour, radius) = if good { (DOT, 1.1) } else { (FAILED, 3.0) };
        let _ = writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"{radius}\" fill=\"{colour}\"/>",
            foot - height(took)
        );
    }
    let mut points = String::new();
    for second in run.feel.seconds.iter().filter(|second| second.due > 0) {
        let x = axis.x(place(second.at_s) + 0.5);
        let _ = write!(points, "{x:.1},{:.1} ", foot - height(second.mean_ms));
    }
    let _ = writeln!(
        svg,
        "<polyline points=\"{points}\" fill=\"none\" stroke=\"{MEAN}\" stroke-width=\"1.8\"/>"
    );
    for mark in &run.wan_changes {
        change(svg, axis.x(mark.at_s), top + TITLE, &mark.what);
    }
    answers(svg, run, axis, foot + STRIP);
    for (index, vm) in (0_u32..).zip(&run.movement.vms) {
        let y = foot + STRIP + 3.0 + LANE * f64::from(index);
        lane(svg, run, vm, axis, y);
    }
}

/// A change of the WAN.
fn change(svg: &mut String, x: f64, top: f64, what: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"{INK}\" stroke-dasharray=\"3 3\"/>",
        top + CHART
    );
    text(svg, x + 4.0, top + 12.0, "font-size=\"10\"", what);
}

fn grid(svg: &mut String, axis: &Axis, foot: f64, top: f64) {
    for (ms, label) in [
        (10.0, "10 ms"),
        (100.0, "100 ms"),
        (1000.0, "1 s"),
        (10_000.0, "10 s"),
    ] {
        let y = foot - height(ms);
        line(svg, (LEFT, y), (WIDTH - RIGHT, y));
        let style = format!("fill=\"{SOFT}\" text-anchor=\"end\"");
        text(svg, LEFT - 6.0, y + 4.0, &style, label);
    }
    let mut at = (axis.from_s / axis.step()).ceil() * axis.step();
    while at <= axis.to_s {
        line(svg, (axis.x(at), top), (axis.x(at), foot));
        at += axis.step();
    }
}

fn answers(svg: &mut String, run: &Run, axis: &Axis, foot: f64) {
    let most = run
        .feel
        .seconds
        .iter()
        .map(|second| second.answered)
        .max()
        .unwrap_or(0)
        .max(1);
    for second in &run.feel.seconds {
        let tall = f64::from(second.answered) / f64::from(most) * (STRIP - 6.0);
        let (x, to) = (axis.x(place(second.at_s)), axis.x(place(second.at_s + 1)));
        rect(svg, x, foot - tall, (to - x - 0.6).max(0.4), tall, ANSWERED);
    }
    let style = format!("fill=\"{SOFT}\" text-anchor=\"end\"");
    text(svg, LEFT - 6.0, foot - 4.0, &style, &format!("≤ {most}/s"));
}

fn lane(svg: &mut String, run: &Run, vm: &coordinator::report::VmMove, axis: &Axis, y: f64) {
    let style = format!("fill=\"{SOFT}\" text-anchor=\"end\"");
    text(svg, LEFT - 6.0, y + 10.0, &style, &vm.name);
    let at = |us: i64| {
        let off = us - run.movement.started_at_us;
        i32::try_from(off).map_or(axis.to_s, |off| f64::from(off) / 1e6)
    };
    let mut marks = vec![(axis.from_s, AT_SOURCE)];
    for entry in &vm.history {
        match entry.phase {
            Phase::Precopy => marks.push((at(entry.at_us), PRECOPY)),
            Phase::Held => marks.push((at(entry.at_us), HELD)),
            _ => {}
        }
    }
    if let Some(stopped) = vm.stopped_at_us {
        marks.push((at(stopped), STOPPED));
    }
    if let Some(resumed) = vm.resumed_at_us {
        marks.push((at(resumed), AT_DESTINATION));
    }
    marks.sort_by(|one, other| one.0.total_cmp(&other.0));
    let ends = marks.iter().skip(1).map(|mark| mark.0).chain([axis.to_s]);
    for ((from, colour), to) in marks.iter().zip(ends) {
        let (x, end) = (axis.x(*from), axis.x(to));
        // A downtime of some milliseconds is to be seen.
        let least = if *colour == STOPPED { 1.5 } else { 0.0 };
        rect(svg, x, y, (end - x).max(least), LANE - 4.0, colour);
    }
}

fn place(second: i64) -> f64 {
    i32::try_from(second).map_or(0.0, f64::from)
}

fn rect(svg: &mut String, x: f64, y: f64, width: f64, height: f64, colour: &str) {
    let _ = writeln!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
    );
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64)) {
    let _ = writeln!(
        svg,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{GRID}\"/>",
        from.0, from.1, to.0, to.1
    );
}

fn text(svg: &mut String, x: f64, y: f64, style: &str, what: &str) {
    let what = super::page::escaped(what);
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{what}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_is_logarithmic_and_bounded() {
        assert!(height(LOWEST_MS).abs() < 1e-9 && height(0.0).abs() < 1e-9);
        assert!((height(HIGHEST_MS) - CHART).abs() < 1e-9);
        assert!((height(1e9) - CHART).abs() < 1e-9);
        let step = height(100.0) - height(10.0);
        assert!((height(1000.0) - height(100.0) - step).abs() < 1e-9);
    }
}
