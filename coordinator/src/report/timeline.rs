//! The timeline: an SVG picture of one or several moves on one time axis.
//!
//! One panel per move, one lane per VM. A lane shows where the VM runs: before the bar it runs at
//! its source undisturbed, then come the phases of its move, and after it, it runs at its
//! destination. The time in which VMs of the application ran on different sides is shaded over
//! the whole panel.

use std::fmt::Write;

use rate_limiter::Bytes;
use sidecar::protocol::types::{Phase, Side};

use super::table::time;
use super::{MoveReport, Outcome, VmMove};

pub(super) const WIDTH: f64 = 1080.0;
pub(super) const LEFT: f64 = 132.0;
pub(super) const RIGHT: f64 = 40.0;
const LANE: f64 = 34.0;
const BAR: f64 = 20.0;
const HEADER: f64 = 66.0;
const GAP: f64 = 18.0;
const TOP: f64 = 86.0;

const AT_SOURCE: &str = "#d5dae1";
pub(super) const PRECOPY: &str = "#6aa6e0";
const HELD: &str = "#f2b84b";
const STOPPED: &str = "#d6303a";
const AT_DESTINATION: &str = "#4bab75";
const ROLLED_BACK: &str = "#9a8bc4";
pub(super) const SPLIT: &str = "#d6303a";
pub(super) const INK: &str = "#1d2733";
pub(super) const SOFT: &str = "#5d6b7a";

/// A stretch of a lane.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Stretch {
    from_s: f64,
    to_s: f64,
    colour: &'static str,
}

/// The picture of these moves, under each other.
#[must_use]
pub fn timeline(reports: &[MoveReport]) -> String {
    let longest = reports
        .iter()
        .map(|report| report.total_s)
        .fold(0.1, f64::max);
    let axis = Axis::new(longest * 1.04);
    let panel = |report: &MoveReport| HEADER + LANE * lanes(report) + GAP;
    let height = TOP + reports.iter().map(panel).sum::<f64>() + 52.0;
    let mut svg = String::new();
    open(&mut svg, height, reports);
    legend(&mut svg);
    let mut y = TOP;
    for report in reports {
        draw_panel(&mut svg, report, &axis, y);
        y += panel(report);
    }
    axis.draw(&mut svg, y);
    svg.push_str("</svg>\n");
    svg
}

fn lanes(report: &MoveReport) -> f64 {
    f64::from(u32::try_from(report.vms.len()).unwrap_or(u32::MAX))
}

pub(super) struct Axis {
    end_s: f64,
    step_s: f64,
}

impl Axis {
    pub(super) fn new(end_s: f64) -> Self {
        let steps = [
            0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0,
            600.0, 1800.0, 3600.0,
        ];
        let step_s = steps
            .into_iter()
            .find(|step| end_s / step <= 13.0)
            .unwrap_or(7200.0);
        Self { end_s, step_s }
    }

    pub(super) fn x(&self, seconds: f64) -> f64 {
        LEFT + (seconds / self.end_s).clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        (0..)
            .map(|n: i32| f64::from(n) * self.step_s)
            .take_while(|at| *at <= self.end_s)
    }

    pub(super) fn draw(&self, svg: &mut String, y: f64) {
        let end = WIDTH - RIGHT;
        let _ = writeln!(
            svg,
            r#"<line x1="{LEFT}" y1="{y}" x2="{end}" y2="{y}" stroke="{SOFT}"/>"#
        );
        for at in self.ticks() {
            let x = self.x(at);
            let decimals = if self.step_s < 0.1 {
                2
            } else {
                usize::from(self.step_s < 1.0)
            };
            let below = y + 18.0;
            let _ = writeln!(
                svg,
                r#"<line x1="{x:.1}" y1="{y}" x2="{x:.1}" y2="{:.1}" stroke="{SOFT}"/><text x="{x:.1}" y="{below}" class="soft" text-anchor="middle">{at:.decimals$} s</text>"#,
                y + 5.0
            );
        }
        let middle = f64::midpoint(LEFT, end);
        let below = y + 38.0;
        let _ = writeln!(
            svg,
            r#"<text x="{middle}" y="{below}" class="soft" text-anchor="middle">time since the move began</text>"#
        );
    }
}

fn open(svg: &mut String, height: f64, reports: &[MoveReport]) {
    let name = reports
        .first()
        .map_or("", |report| report.application.as_str());
    let _ = writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0}" viewBox="0 0 {WIDTH} {height:.0}" font-family="Inter, 'DejaVu Sans', 'Liberation Sans', Helvetica, Arial, sans-serif">
<title>Moving {0}</title>
<style>text{{fill:{INK};font-size:13px}}.soft{{fill:{SOFT};font-size:12px}}.head{{font-size:17px;font-weight:600}}.top{{font-size:20px;font-weight:600}}.badge{{fill:{STOPPED};font-size:12px;font-weight:600;paint-order:stroke;stroke:#ffffff;stroke-width:4px;stroke-linejoin:round}}.split{{fill:{SPLIT};font-size:12px}}</style>
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="24" y="36" class="top">Moving {0}</text>"##,
        escape(name)
    );
}

fn legend(svg: &mut String) {
    let entries = [
        (AT_SOURCE, "runs at source", 1.0),
        (PRECOPY, "pre-copy", 1.0),
        (HELD, "held (wait-and-copy)", 1.0),
        (STOPPED, "stopped", 1.0),
        (AT_DESTINATION, "runs at destination", 1.0),
        (ROLLED_BACK, "rolling back", 1.0),
        (SPLIT, "split: VMs on different sides", 0.2),
    ];
    let mut x = 24.0;
    for (colour, text, opacity) in entries {
        let _ = writeln!(
            svg,
            r#"<rect x="{x:.0}" y="52" width="14" height="14" rx="3" fill="{colour}" fill-opacity="{opacity}"/><text x="{:.0}" y="63.5" class="soft">{text}</text>"#,
            x + 20.0
        );
        let letters = u32::try_from(text.len()).unwrap_or(0);
        x += 44.0 + f64::from(letters) * 6.6;
    }
}

fn draw_panel(svg: &mut String, report: &MoveReport, axis: &Axis, y: f64) {
    let result = match report.result {
        Outcome::Committed => String::new(),
        other => format!(" — {other}"),
    };
    let _ = writeln!(
        svg,
        r#"<text x="24" y="{:.0}" class="head">{}{}</text>"#,
        y + 24.0,
        escape(&report.policy),
        escape(&result)
    );
    let mut facts = vec![
        format!("total {}", time(report.total_s)),
        format!("sent {}", Bytes(report.sent_bytes)),
        format!("split {}", time(report.split_s)),
        format!("impact {}", Bytes(super::table::whole(report.impact_bytes))),
        format!("resume skew {}", time(report.resume_skew_s)),
    ];
    if let Some(reason) = &report.reason {
        let short: String = reason.chars().take(110).collect();
        facts = vec![format!("after {}", time(report.total_s)), short];
    }
    let _ = writeln!(
        svg,
        r#"<text x="24" y="{:.0}" class="soft">{}</text>"#,
        y + 44.0,
        escape(&facts.join("  ·  "))
    );
    let top = y + HEADER - 6.0;
    let bottom = top + LANE * lanes(report);
    for at in axis.ticks() {
        let x = axis.x(at);
        let _ = writeln!(
            svg,
            r##"<line x1="{x:.1}" y1="{top:.1}" x2="{x:.1}" y2="{bottom:.1}" stroke="#e8ebef"/>"##
        );
    }
    // Behind the lanes, so that their colours stay those of the legend.
    draw_split(svg, report, axis, top, bottom);
    let mut lane = top;
    for vm in &report.vms {
        draw_lane(svg, report, vm, axis, lane);
        lane += LANE;
    }
    let mut lane = top;
    for vm in &report.vms {
        draw_downtime(svg, report, vm, axis, lane);
        lane += LANE;
    }
}

fn since(report: &MoveReport, at_us: i64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "microseconds of one move")]
    let us = at_us.saturating_sub(report.started_at_us) as f64;
    us / 1e6
}

/// The phases of one VM, from the beginning of the move to the end of the picture.
fn stretches(report: &MoveReport, vm: &VmMove, end_s: f64) -> Vec<Stretch> {
    let colour = |phase: Phase| match phase {
        Phase::Preparing | Phase::Prepared | Phase::RolledBack => AT_SOURCE,
        Phase::Precopy => PRECOPY,
        Phase::Held | Phase::Armed => HELD,
        Phase::RollingBack => ROLLED_BACK,
        Phase::Committed if vm.resumed_at_us.is_some() => AT_DESTINATION,
        _ => STOPPED,
    };
    let mut marks: Vec<(f64, &'static str)> = vec![(0.0, AT_SOURCE)];
    for entry in &vm.history {
        let past = vm
            .resumed_at_us
            .is_some_and(|resumed| entry.at_us >= resumed);
        if !past {
            marks.push((since(report, entry.at_us).max(0.0), colour(entry.phase)));
        }
    }
    if let Some(stopped) = vm.stopped_at_us {
        if vm.history.iter().all(|entry| entry.phase != Phase::Stopped) {
            marks.push((since(report, stopped), STOPPED));
        }
    }
    if let Some(resumed) = vm.resumed_at_us {
        marks.push((since(report, resumed), AT_DESTINATION));
    } else if vm.side == Some(Side::Source)
        && vm.history.iter().all(|e| e.phase != Phase::RolledBack)
    {
        let begun = vm.history.iter().any(|entry| entry.phase == Phase::Precopy);
        marks.push((if begun { report.total_s } else { 0.0 }, AT_SOURCE));
    }
    marks.sort_by(|a, b| a.0.total_cmp(&b.0));
    let ends = marks.iter().skip(1).map(|(at, _)| *at).chain([end_s]);
    marks
        .iter()
        .zip(ends)
        .filter(|((from, _), to)| to > from)
        .map(|((from_s, colour), to_s)| Stretch {
            from_s: *from_s,
            to_s,
            colour,
        })
        .collect()
}

fn draw_lane(svg: &mut String, report: &MoveReport, vm: &VmMove, axis: &Axis, y: f64) {
    let top = y + (LANE - BAR) / 2.0;
    let text = y + LANE / 2.0 + 4.5;
    let _ = writeln!(
        svg,
        r#"<text x="24" y="{text:.1}">{}</text><text x="{:.1}" y="{text:.1}" class="soft" text-anchor="end">{}</text>"#,
        escape(&vm.name),
        LEFT - 10.0,
        short_size(vm.memory_bytes)
    );
    for stretch in stretches(report, vm, axis.end_s) {
        let (from, to) = (axis.x(stretch.from_s), axis.x(stretch.to_s));
        // A stop of milliseconds is still to be seen on an axis of minutes.
        let width = (to - from).max(if stretch.colour == STOPPED { 3.0 } else { 0.5 });
        let _ = writeln!(
            svg,
            r#"<rect x="{from:.2}" y="{top:.1}" width="{width:.2}" height="{BAR}" fill="{}"/>"#,
            stretch.colour
        );
    }
}

fn short_size(bytes: u64) -> String {
    match bytes {
        0 => String::new(),
        b if b >= 1 << 30 && b % (1 << 30) == 0 => format!("{} GiB", b >> 30),
        b => format!("{} MiB", b >> 20),
    }
}

fn draw_downtime(svg: &mut String, report: &MoveReport, vm: &VmMove, axis: &Axis, y: f64) {
    let (Some(stopped), Some(downtime)) = (vm.stopped_at_us, vm.downtime_s) else {
        return;
    };
    let x = axis.x(since(report, stopped)) - 6.0;
    let text = y + LANE / 2.0 + 4.5;
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{text:.1}" class="badge" text-anchor="end">{}</text>"#,
        time(downtime)
    );
}

/// Shades the time in which VMs of the application ran on different sides.
fn draw_split(svg: &mut String, report: &MoveReport, axis: &Axis, top: f64, bottom: f64) {
    let first = report.vms.iter().filter_map(|vm| vm.resumed_at_us).min();
    let (Some(first), true) = (first, report.split_s > 0.0) else {
        return;
    };
    let from_s = since(report, first);
    let from = axis.x(from_s);
    let width = (axis.x(from_s + report.split_s) - from).max(1.0);
    let height = bottom - top;
    let _ = writeln!(
        svg,
        r#"<rect x="{from:.1}" y="{top:.1}" width="{width:.1}" height="{height:.1}" fill="{SPLIT}" fill-opacity="0.2"/><path d="M{from:.1} {top:.1}v{height:.1}M{:.1} {top:.1}v{height:.1}" stroke="{SPLIT}" stroke-opacity="0.6" stroke-dasharray="3 3"/>"#,
        from + width
    );
    if width > 90.0 {
        let _ = writeln!(
            svg,
            r#"<text x="{:.1}" y="{:.1}" class="split" text-anchor="middle">split {}</text>"#,
            from + width / 2.0,
            top - 5.0,
            time(report.split_s)
        );
    }
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    #[test]
    fn one_lane_per_vm_and_the_split_is_shaded() {
        let reports = example::three_policies();
        let svg = timeline(&reports);
        for name in ["web", "app", "db"] {
            assert_eq!(svg.matches(&format!(">{name}</text>")).count(), 3);
        }
        // Two of three moves were split (each a rectangle and its legend entry once).
        assert_eq!(svg.matches("fill-opacity=\"0.2\"").count(), 3);
        if let Ok(path) = std::env::var("MUSTER_TIMELINE_OUT") {
            std::fs::write(path, &svg).expect("writable");
        }
    }

    #[test]
    fn text_from_outside_is_escaped() {
        let svg = timeline(&[example::rolled_back()]);
        assert!(svg.contains("died &amp; &lt;left&gt;"));
        assert!(!svg.contains("<left>"));
    }

    #[test]
    fn a_lane_has_no_gaps() {
        for report in example::three_policies() {
            for vm in &report.vms {
                let stretches = stretches(&report, vm, 30.0);
                assert_eq!(stretches.first().map(|s| s.from_s), Some(0.0));
                assert_eq!(
                    stretches.last().map(|s| (s.to_s, s.colour)),
                    Some((30.0, AT_DESTINATION))
                );
                assert!(
                    stretches
                        .windows(2)
                        .all(|pair| pair[0].to_s == pair[1].from_s)
                );
            }
        }
    }

    #[test]
    fn no_moves_make_an_empty_picture() {
        assert!(timeline(&[]).ends_with("</svg>\n"));
    }
}
