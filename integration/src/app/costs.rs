//! How well a move went, by the measures of the literature, over several rounds.

use serde::Serialize;

use super::report::{Report, Run};
use crate::bench::output::number;
use crate::bench::result::{Bound, Figure, Section, Statistic, Table};
use crate::bench::stats::median;

/// Migration traffic leaves the application its reserve: the 95th percentile in pre-copy is at most
/// so many times that of a stream of the same bytes.
const LEAVES: f64 = 1.5;
const AGAINST_STREAM: &str = "p95 in pre-copy, relative to the stream alone";

/// One measure of one policy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// The policy.
    pub policy: String,
    /// What is measured.
    pub what: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// One value for each round in which it could be measured.
    pub values: Vec<f64>,
}

/// What is measured, its unit, and how: of a run, given all of its round.
type Measure = (&'static str, &'static str, fn(&Run, &[&Run]) -> Option<f64>);

const MEASURES: [Measure; 12] = [
    ("response time", "ms", |run, _| Some(run.feel.during_ms)),
    (
        "response time, relative to sequential",
        "×",
        |run, round| Some(run.feel.during_ms / policy(round, "sequential")?.feel.during_ms),
    ),
    ("degraded beyond the downtime", "s", |run, _| {
        Some(f64::from(run.feel.degraded_beyond_s))
    }),
    ("requests failed", "", |run, _| {
        Some(whole(run.feel.refused))
    }),
    ("connections lost", "", |run, _| Some(whole(run.feel.lost))),
    ("longest gap", "s", |run, _| Some(run.feel.longest_gap_s)),
    ("completion", "s", |run, _| Some(run.movement.total_s)),
    ("completion, relative to parallel", "×", |run, round| {
        Some(run.movement.total_s / policy(round, "parallel")?.movement.total_s)
    }),
    ("impact (Eq. 1)", "MB", |run, _| {
        Some(run.movement.impact_bytes / 1e6)
    }),
    ("between VMs over the WAN", "MB", |run, _| {
        Some(megabytes(run.wan_bytes_between_vms))
    }),
    ("p95 in pre-copy, relative to before", "×", |run, _| {
        Some(run.feel.precopy_p95_ms / run.feel.before_p95_ms)
    }),
    (AGAINST_STREAM, "×", |run, _| {
        Some(run.feel.precopy_p95_ms / run.dummy.as_ref()?.p95_ms)
    }),
];

fn policy<'a>(round: &[&'a Run], name: &str) -> Option<&'a Run> {
    round.iter().find(|run| run.policy == name).copied()
}

fn whole(number: usize) -> f64 {
    u32::try_from(number).map_or(f64::INFINITY, f64::from)
}

fn megabytes(bytes: u64) -> f64 {
    u32::try_from(bytes / 1000).map_or(f64::INFINITY, |kilobytes| f64::from(kilobytes) / 1e3)
}

/// Every measure of every policy, policy by policy in the order of the first round.
#[must_use]
pub fn costs(runs: &[Run]) -> Vec<Cost> {
    let mut policies: Vec<&str> = Vec::new();
    for run in runs {
        if !policies.contains(&run.policy.as_str()) {
            policies.push(&run.policy);
        }
    }
    let mut costs = Vec::new();
    for name in policies {
        for (what, unit, of) in MEASURES {
            let own = runs.iter().filter(|run| run.policy == name);
            let value = |run: &Run| {
                let round: Vec<&Run> = runs.iter().filter(|r| r.round == run.round).collect();
                of(run, &round).filter(|value| value.is_finite())
            };
            costs.push(Cost {
                policy: name.to_owned(),
                what,
                unit,
                values: own.filter_map(value).collect(),
            });
        }
    }
    costs
}

/// One row for each measure, one column for each policy: medians, and the range where there are
/// several values.
#[must_use]
pub fn table(costs: &[Cost]) -> Vec<Vec<String>> {
    let Some(first) = costs.first() else {
        return Vec::new();
    };
    let mut head = vec!["median (range)".to_owned()];
    let same = costs.iter().filter(|cost| cost.what == first.what);
    head.extend(same.map(|cost| cost.policy.clone()));
    let mut rows = vec![head];
    for measure in costs.iter().filter(|cost| cost.policy == first.policy) {
        let own = costs.iter().filter(|cost| cost.what == measure.what);
        let cells: Vec<String> = own.map(cell).collect();
        if cells.iter().any(|cell| !cell.is_empty()) {
            let what = std::iter::once(measure.what.to_owned());
            rows.push(what.chain(cells).collect());
        }
    }
    rows
}

fn cell(cost: &Cost) -> String {
    let Some(first) = cost.values.first() else {
        return String::new();
    };
    let mut text = number(median(&cost.values));
    if cost.values.len() > 1 {
        let least = cost.values.iter().copied().fold(*first, f64::min);
        let most = cost.values.iter().copied().fold(*first, f64::max);
        text += &format!(" ({} to {})", number(least), number(most));
    }
    format!("{text} {}", cost.unit).trim_end().to_owned()
}

/// As a section of the benchmarks' document; `command` is what was typed.
#[must_use]
pub fn section(report: &Report, command: String) -> Section {
    let mut section = Section::new(
        "app",
        "what users feel of a move over a WAN",
        format!(
            "{}. Rounds of one move under every policy, whose order rotates; what is relative is so \
             within a round. [testbed.md](testbed.md) says what the figures mean.",
            report.setting
        ),
    );
    section.command = Some(command);
    let told = report.costs.iter().filter(|cost| !cost.values.is_empty());
    section.figures = told.map(figure).collect();
    section.notes.clone_from(&report.notices);
    section.tables.push(Table {
        title: "Every run".to_owned(),
        columns: vec![
            "round",
            "policy",
            "before, ms",
            "during, ms",
            "p99, ms",
            "degraded, s",
            "gap, s",
            "failed",
            "move, s",
            "split, s",
            "between VMs, MB",
        ],
        rows: report.runs.iter().map(row).collect(),
    });
    section
}

fn figure(cost: &Cost) -> Figure {
    let what = format!("{}: {}", cost.policy, cost.what);
    if cost.what == AGAINST_STREAM && cost.policy == "muster" {
        let bound = Bound::AtMost(LEAVES);
        return Figure::bounded(what, cost.unit, &cost.values, Statistic::Median, bound);
    }
    Figure::told(what, cost.unit, &cost.values)
}

fn row(run: &Run) -> Vec<String> {
    let (feel, movement) = (&run.feel, &run.movement);
    vec![
        (run.round + 1).to_string(),
        run.policy.clone(),
        number(feel.before_ms),
        number(feel.during_ms),
        number(feel.during_p99_ms),
        feel.degraded_s.to_string(),
        number(feel.longest_gap_s),
        (feel.refused + feel.lost).to_string(),
        number(movement.total_s),
        number(movement.split_s),
        number(megabytes(run.wan_bytes_between_vms)),
    ]
}

/// A command line less what says where its results go.
#[must_use]
pub fn command(words: impl Iterator<Item = String>) -> String {
    let mut kept = vec!["muster-testbed".to_owned()];
    let mut words = words.skip(1);
    while let Some(word) = words.next() {
        match word.split('=').next() {
            Some("--markdown" | "--out") if !word.contains('=') => {
                words.next();
            }
            Some("--markdown" | "--out") => {}
            _ => kept.push(word),
        }
    }
    kept.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(policy: &str, what: &'static str, values: &[f64]) -> Cost {
        Cost {
            policy: policy.to_owned(),
            what,
            unit: "s",
            values: values.to_vec(),
        }
    }

    #[test]
    fn policies_stand_beside_each_other() {
        let costs = [
            cost("sequential", "response time", &[1.0, 4.0, 2.0]),
            cost("sequential", "longest gap", &[]),
            cost("muster", "response time", &[3.0]),
            cost("muster", "longest gap", &[]),
        ];
        let rows = table(&costs);
        assert_eq!(rows[0], ["median (range)", "sequential", "muster"]);
        let cells = ["response time", "2.00 (1.00 to 4.00) s", "3.00 s"];
        assert_eq!(rows[1], cells);
        assert_eq!(rows.len(), 2, "what nobody measured is left out");
    }

    #[test]
    fn only_the_stream_alone_is_a_bound() {
        let kept = figure(&cost("muster", AGAINST_STREAM, &[1.2, 1.6, 1.1]));
        assert_eq!(kept.verdict(), Some(true));
        let missed = figure(&cost("muster", AGAINST_STREAM, &[1.6]));
        assert_eq!(missed.verdict(), Some(false));
        assert_eq!(
            figure(&cost("parallel", AGAINST_STREAM, &[9.0])).verdict(),
            None
        );
    }

    #[test]
    fn a_command_says_nothing_of_its_results() {
        let words = "/x/muster-testbed app --rtt 50ms --out y --markdown=z --repeat 10";
        let words = words.split(' ').map(str::to_owned);
        assert_eq!(command(words), "muster-testbed app --rtt 50ms --repeat 10");
    }
}
