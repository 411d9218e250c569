//! What `muster plan` shows: the plan and the other policies as a table, and when which VM gets how
//! much bandwidth, in the terminal and as a picture.

pub mod picture;

use std::fmt::Write;

use rate_limiter::{Bytes, BytesPerSecond};
use serde::Serialize;

use super::table::{Grid, time, whole};
use crate::scheduler::plan::Plan;

/// Version of the JSON form.
pub const SCHEMA_VERSION: u32 = 1;

/// Columns of the timeline in the terminal.
const COLUMNS: u32 = 64;

/// A plan, and what the other policies would do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Planned {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The application's name.
    pub application: String,
    /// What was planned: `whole` or `two`.
    pub stage: String,
    /// How groups and their order were looked for.
    pub search: String,
    /// The plan; its fields stand beside these.
    #[serde(flatten)]
    pub plan: Plan,
    /// Every other policy.
    pub others: Vec<Plan>,
}

impl Planned {
    fn all(&self) -> impl Iterator<Item = &Plan> {
        std::iter::once(&self.plan).chain(&self.others)
    }
}

/// Everything as text: the plan, its timeline, and all policies side by side.
#[must_use]
pub fn text(planned: &Planned) -> String {
    let mut text = format!("{}: {}\n", planned.application, headline(&planned.plan));
    for note in &planned.plan.notes {
        let _ = writeln!(text, "note: {note}");
    }
    if let Some(deadline) = planned.plan.deadline.filter(|deadline| deadline.met) {
        let spare = deadline.limit_s - deadline.needed_s;
        let _ = writeln!(
            text,
            "deadline: {} is met with {} to spare",
            time(deadline.limit_s),
            time(spare)
        );
    }
    if planned.plan.converges {
        let _ = write!(
            text,
            "\n{}\n{}",
            groups(&planned.plan),
            chart(&planned.plan)
        );
    }
    let _ = write!(text, "\n{}", comparison(planned));
    for other in planned.others.iter().filter(|plan| !plan.converges) {
        let reason = other.reason.as_deref().unwrap_or_default();
        let _ = writeln!(text, "{}: {reason}", other.policy);
    }
    text
}

fn headline(plan: &Plan) -> String {
    match (&plan.reason, plan.completion_s) {
        (Some(reason), _) => format!("{} does not converge: {reason}", plan.policy),
        (None, end) => format!(
            "policy {}, {} group{}, {}",
            plan.policy,
            plan.groups.len(),
            if plan.groups.len() == 1 { "" } else { "s" },
            time(end.unwrap_or_default())
        ),
    }
}

fn groups(plan: &Plan) -> String {
    let mut grid = Grid {
        rows: vec![["group", "start", "duration"].map(String::from).to_vec()],
    };
    for (index, group) in plan.groups.iter().enumerate() {
        grid.rows.push(vec![
            format!("{} {}", index + 1, group.vms.join(", ")),
            time(group.start_s),
            time(group.duration_s),
        ]);
    }
    grid.render()
}

fn comparison(planned: &Planned) -> String {
    let header = [
        "policy",
        "groups",
        "completion",
        "downtime",
        "traffic",
        "impact",
    ];
    let mut grid = Grid {
        rows: vec![header.map(String::from).to_vec()],
    };
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "–".into());
    let bytes = |bytes: Option<f64>| or_dash(bytes.map(|bytes| Bytes(whole(bytes)).to_string()));
    for plan in planned.all() {
        let optimal = if plan.optimal { " (least)" } else { "" };
        grid.rows.push(vec![
            plan.policy.clone(),
            if plan.converges {
                plan.groups.len().to_string()
            } else {
                "does not converge".into()
            },
            or_dash(plan.completion_s.map(time)),
            or_dash(plan.downtime_s.map(time)),
            bytes(plan.traffic_bytes),
            bytes(plan.impact_bytes) + optimal,
        ]);
    }
    grid.render()
}

/// One row per VM: its bandwidth over time, in eighths of the highest rate of all; `·` where it
/// does not send, `|` when it arrives.
fn chart(plan: &Plan) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let end = plan.completion_s.unwrap_or_default();
    let rates = plan.vms.iter().flat_map(|vm| &vm.bandwidth);
    let most = rates.map(|step| step.1).fold(0.0, f64::max);
    let names = plan.vms.iter().map(|vm| vm.name.chars().count());
    let width = names.max().unwrap_or(0);
    let mut text = String::new();
    for vm in &plan.vms {
        let cell = |column: u32| {
            let at = end * (f64::from(column) + 0.5) / f64::from(COLUMNS);
            if at >= vm.finish_s {
                let before = end * (f64::from(column) - 0.5) / f64::from(COLUMNS);
                return if before < vm.finish_s { '|' } else { ' ' };
            }
            let step = vm.bandwidth.iter().rev().find(|step| step.0 <= at);
            let part = step.map_or(0.0, |step| step.1 / most);
            if part <= 0.0 || most <= 0.0 {
                return '·';
            }
            let eighth = usize::try_from(whole((part * 8.0).ceil())).unwrap_or(1);
            BARS[eighth.clamp(1, 8) - 1]
        };
        let pad = " ".repeat(width - vm.name.chars().count());
        let row: String = (0..=COLUMNS).map(cell).collect();
        let _ = writeln!(text, "{}{pad}  {}", vm.name, row.trim_end());
    }
    let last = time(end);
    let gap = (COLUMNS as usize + 1).saturating_sub(1 + last.chars().count());
    let _ = writeln!(
        text,
        "{}  0{}{last}   full height: {}",
        " ".repeat(width),
        " ".repeat(gap),
        BytesPerSecond(whole(most))
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::allot::Scheme;
    use crate::scheduler::plan::{PlannedGroup, PlannedVm};

    pub(super) fn planned() -> Planned {
        let vm = |name: &str, start_s: f64, finish_s: f64, bandwidth| PlannedVm {
            name: name.into(),
            start_s,
            finish_s,
            bandwidth,
        };
        let group = |name: &str, start_s| PlannedGroup {
            vms: vec![name.into()],
            scheme: Scheme::Delayed,
            start_s,
            duration_s: 10.0,
        };
        let plan = Plan {
            policy: "comma".into(),
            converges: true,
            reason: None,
            notes: vec!["a <note>".into()],
            groups: vec![group("web", 0.0), group("database", 10.0)],
            vms: vec![
                vm("web", 0.0, 10.0, vec![(0.0, 8e6)]),
                vm("database", 10.0, 20.0, vec![(10.0, 4e6), (15.0, 8e6)]),
            ],
            completion_s: Some(20.0),
            traffic_bytes: Some(140e6),
            downtime_s: Some(0.05),
            deadline: None,
            impact_bytes: Some(5e6),
            optimal: true,
        };
        let stuck = Plan {
            policy: "parallel".into(),
            converges: false,
            reason: Some("they dirty <too> fast".into()),
            groups: Vec::new(),
            vms: Vec::new(),
            completion_s: None,
            traffic_bytes: None,
            downtime_s: None,
            impact_bytes: None,
            optimal: false,
            deadline: None,
            notes: Vec::new(),
        };
        Planned {
            schema_version: SCHEMA_VERSION,
            application: "shop".into(),
            stage: "whole".into(),
            search: "auto".into(),
            plan,
            others: vec![stuck],
        }
    }

    #[test]
    fn everything_is_shown() {
        let text = text(&planned());
        for needle in [
            "shop: policy comma, 2 groups, 20.00 s",
            "note: a <note>",
            "2 database",
            "(least)",
            "does not converge",
            "parallel: they dirty <too> fast",
            "full height: 8.0 MB/s",
        ] {
            assert!(text.contains(needle), "{needle} in\n{text}");
        }
    }

    #[test]
    fn bars_follow_the_bandwidth() {
        let chart = chart(&planned().plan);
        let rows: Vec<&str> = chart.lines().collect();
        assert_eq!(rows[0], format!("web       {}|", "█".repeat(32)));
        assert_eq!(
            rows[1],
            format!(
                "database  {}{}{}|",
                "·".repeat(32),
                "▄".repeat(16),
                "█".repeat(16)
            )
        );
    }

    #[test]
    fn a_plan_without_data_is_no_accident() {
        let mut empty = planned();
        empty.plan.vms[0].bandwidth.clear();
        empty.plan.vms[1].bandwidth.clear();
        empty.plan.completion_s = Some(0.0);
        assert!(!text(&empty).contains("NaN"));
        assert!(!picture::picture(&empty).contains("NaN"));
    }

    #[test]
    fn the_plan_stands_beside_the_rest_in_json() {
        let json = serde_json::to_value(planned()).expect("JSON");
        assert_eq!(json["impact_bytes"], 5e6);
        assert_eq!(json["others"][0]["converges"], false);
        assert!(json["others"][0]["completion_s"].is_null());
        assert_eq!(json["vms"][1]["bandwidth"][1][0], 15.0);
    }
}
