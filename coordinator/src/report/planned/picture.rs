//! A plan as a picture (SVG): a lane per VM whose height is its bandwidth, for every policy that
//! converges, on one time axis. The time in which VMs are on different sides is shaded.

use std::fmt::Write;

use rate_limiter::Bytes;

use super::Planned;
use crate::report::table::{time, whole};
use crate::report::timeline::{Axis, INK, LEFT, PRECOPY, RIGHT, SOFT, SPLIT, WIDTH, escape};
use crate::scheduler::plan::{Plan, PlannedVm};

const LANE: f64 = 34.0;
const BAR: f64 = 26.0;
const HEADER: f64 = 62.0;
const GAP: f64 = 18.0;
const TOP: f64 = 62.0;

/// The picture of a plan and of the other policies, under each other.
#[must_use]
pub fn picture(planned: &Planned) -> String {
    let ends = planned.all().filter_map(|plan| plan.completion_s);
    let axis = Axis::new(ends.fold(0.1, f64::max) * 1.02);
    let rates = planned.all().flat_map(|plan| &plan.vms);
    let rates = rates.flat_map(|vm| &vm.bandwidth).map(|step| step.1);
    let most = rates.fold(1.0, f64::max);
    let height = TOP + planned.all().map(panel_height).sum::<f64>() + 52.0;
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0}" viewBox="0 0 {WIDTH} {height:.0}" font-family="Inter, 'DejaVu Sans', 'Liberation Sans', Helvetica, Arial, sans-serif">
<title>Plan for {0}</title>
<style>text{{fill:{INK};font-size:13px}}.soft{{fill:{SOFT};font-size:12px}}.head{{font-size:17px;font-weight:600}}.top{{font-size:20px;font-weight:600}}</style>
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="24" y="36" class="top">Plan for {0}</text>"##,
        escape(&planned.application)
    );
    let mut y = TOP;
    for plan in planned.all() {
        draw_panel(&mut svg, plan, &axis, most, y);
        y += panel_height(plan);
    }
    axis.draw(&mut svg, y);
    svg.push_str("</svg>\n");
    svg
}

fn panel_height(plan: &Plan) -> f64 {
    HEADER + LANE * lanes(plan) + GAP
}

fn lanes(plan: &Plan) -> f64 {
    f64::from(u32::try_from(plan.vms.len()).unwrap_or(u32::MAX))
}

fn draw_panel(svg: &mut String, plan: &Plan, axis: &Axis, most: f64, y: f64) {
    let facts = match (&plan.reason, plan.completion_s) {
        (Some(reason), _) => format!("does not converge: {reason}"),
        (None, end) => {
            let size = |bytes: Option<f64>| Bytes(whole(bytes.unwrap_or_default()));
            [
                format!("completion {}", time(end.unwrap_or_default())),
                format!("downtime {}", time(plan.downtime_s.unwrap_or_default())),
                format!("traffic {}", size(plan.traffic_bytes)),
                format!("impact {}", size(plan.impact_bytes)),
            ]
            .join("  ·  ")
        }
    };
    let _ = writeln!(
        svg,
        r#"<text x="24" y="{:.0}" class="head">{}</text><text x="24" y="{:.0}" class="soft">{}</text>"#,
        y + 24.0,
        escape(&plan.policy),
        y + 44.0,
        escape(&facts)
    );
    let top = y + HEADER - 4.0;
    let bottom = top + LANE * lanes(plan);
    let arrivals = plan.vms.iter().map(|vm| vm.finish_s);
    let (first, last) = arrivals.fold((f64::INFINITY, 0.0_f64), |(first, last), at| {
        (first.min(at), last.max(at))
    });
    if last > first {
        let (from, to) = (axis.x(first), axis.x(last));
        let _ = writeln!(
            svg,
            r#"<rect x="{from:.1}" y="{top:.1}" width="{:.1}" height="{:.1}" fill="{SPLIT}" fill-opacity="0.12"/>"#,
            (to - from).max(1.0),
            bottom - top
        );
    }
    let mut lane = top;
    for vm in &plan.vms {
        draw_lane(svg, vm, axis, most, lane);
        lane += LANE;
    }
}

fn draw_lane(svg: &mut String, vm: &PlannedVm, axis: &Axis, most: f64, y: f64) {
    let base = y + LANE - 4.0;
    let end = axis.x(vm.finish_s);
    let _ = writeln!(
        svg,
        r##"<text x="24" y="{:.1}">{}</text><line x1="{LEFT}" y1="{base:.1}" x2="{:.1}" y2="{base:.1}" stroke="#e8ebef"/>"##,
        y + LANE / 2.0 + 4.5,
        escape(&vm.name),
        WIDTH - RIGHT
    );
    let ends = vm.bandwidth.iter().skip(1).map(|step| axis.x(step.0));
    for (&(from, rate), to) in vm.bandwidth.iter().zip(ends.chain([end])) {
        let from = axis.x(from);
        let height = BAR * rate / most;
        if rate > 0.0 && to > from {
            let _ = writeln!(
                svg,
                r#"<rect x="{from:.2}" y="{:.2}" width="{:.2}" height="{height:.2}" fill="{PRECOPY}"/>"#,
                base - height,
                to - from
            );
        }
    }
    let _ = writeln!(
        svg,
        r#"<path d="M{end:.2} {:.1}V{base:.1}" stroke="{INK}" stroke-width="1.5"/>"#,
        base - BAR
    );
}

#[cfg(test)]
mod tests {
    use super::super::tests::planned;
    use super::*;

    #[test]
    fn a_lane_per_vm_and_text_is_escaped() {
        let svg = picture(&planned());
        assert_eq!(svg.matches(">web</text>").count(), 1);
        assert_eq!(svg.matches(PRECOPY).count(), 3);
        assert_eq!(svg.matches("fill-opacity").count(), 1);
        assert!(svg.contains("they dirty &lt;too&gt; fast"));
        assert!(svg.ends_with("</svg>\n"));
    }
}
