//! What `muster simulate` shows: every approach in every case, and ours beside the source's.

use std::fmt::Write;

use rate_limiter::Bytes;
use serde::Serialize;

use super::table::{Grid, time, whole};
use crate::simulation::study::{Open, Relation};
use crate::simulation::{Amounts, CaseResult, Comparison};

/// Version of the JSON form.
pub const SCHEMA_VERSION: u32 = 1;

/// Columns of running text.
const WIDTH: usize = 100;

/// A study that was simulated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Simulated {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The scenario's name, or the application's.
    pub scenario: String,
    /// What it is.
    pub title: String,
    /// Where it is from.
    pub source: String,
    /// What the source leaves open, and what was taken.
    pub open: Vec<Open>,
    /// Ours.
    pub cases: Vec<CaseResult>,
    /// Ours beside the source's.
    pub comparisons: Vec<Comparison>,
}

/// Everything as text.
#[must_use]
pub fn text(simulated: &Simulated) -> String {
    let Simulated {
        scenario,
        title,
        source,
        ..
    } = simulated;
    let mut text = format!("{scenario}: {title} ({source})\n");
    for case in &simulated.cases {
        let _ = write!(text, "\n{}", results(case));
        for attempt in &case.approaches {
            if let Some(reason) = &attempt.reason {
                let _ = writeln!(text, "{}: {reason}", attempt.approach);
            }
        }
    }
    if !simulated.comparisons.is_empty() {
        let _ = write!(text, "\n{}", beside(&simulated.comparisons));
    }
    if !simulated.open.is_empty() {
        text += "\nThe source leaves open, and this was taken:\n";
    }
    for open in &simulated.open {
        let fitted = if open.fitted { " (FITTED)" } else { "" };
        text += &wrapped(&format!("- {}{fitted}: {}", open.what, open.assumed));
    }
    text
}

/// One point of a list, in lines of at most [`WIDTH`] characters where words allow it.
fn wrapped(point: &str) -> String {
    let mut text = String::new();
    let mut column = 0;
    for word in point.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > WIDTH {
            text += "\n  ";
            column = 2;
        } else if column > 0 {
            text.push(' ');
            column += 1;
        }
        text += word;
        column += length;
    }
    text.push('\n');
    text
}

fn results(case: &CaseResult) -> String {
    let header = [
        case.case.as_str(),
        "planned",
        "simulated",
        "downtime",
        "traffic",
        "split",
        "impact",
    ];
    let mut grid = Grid {
        rows: vec![header.map(String::from).to_vec()],
    };
    for attempt in &case.approaches {
        let ours = |show: &dyn Fn(&Amounts) -> String| {
            attempt.simulated.as_ref().map_or_else(|| "–".into(), show)
        };
        let planned = attempt.planned;
        grid.rows.push(vec![
            attempt.approach.clone(),
            planned.map_or_else(|| "–".into(), |amounts| time(amounts.completion_s)),
            ours(&|amounts| time(amounts.completion_s)),
            ours(&|amounts| time(amounts.downtime_s)),
            ours(&|amounts| Bytes(whole(amounts.traffic_bytes)).to_string()),
            ours(&|amounts| time(amounts.split_s)),
            ours(&|amounts| Bytes(whole(amounts.impact_bytes)).to_string()),
        ]);
    }
    grid.render()
}

fn beside(comparisons: &[Comparison]) -> String {
    let header = ["case", "figure", "paper", "planned", "simulated", "/ paper"];
    let mut grid = Grid {
        rows: vec![header.map(String::from).to_vec()],
    };
    for row in comparisons {
        let value = |value: f64| {
            format!("{} {}", digits(value), row.unit)
                .trim_end()
                .to_owned()
        };
        let or_inf = |found: Option<f64>, none: &str| found.map_or_else(|| none.into(), value);
        let mut name = match &row.vm {
            Some(vm) => format!("{}, {vm}", row.approach),
            None => row.approach.clone(),
        };
        if let Some(to) = &row.to {
            let _ = write!(name, " / {to}");
        }
        if let Some(case) = &row.in_case {
            let _ = write!(name, " ({case})");
        }
        let figure = serde_json::to_value(row.figure).ok();
        let figure = figure.and_then(|name| name.as_str().map(String::from));
        let relation = match row.relation {
            Relation::Is => "",
            Relation::AtLeast => "≥ ",
            Relation::AtMost => "≤ ",
        };
        let ratio = row.paper.zip(row.simulated);
        let ratio = ratio.filter(|(paper, _)| *paper > 0.0);
        grid.rows.push(vec![
            row.case.clone(),
            format!("{} {name}", figure.unwrap_or_default()),
            format!("{relation}{}", or_inf(row.paper, "INF")),
            or_inf(row.planned, "–"),
            or_inf(row.simulated, "–"),
            ratio.map_or_else(
                || "–".into(),
                |(paper, ours)| format!("{:.2}", ours / paper),
            ),
        ]);
    }
    grid.render()
}

/// Three digits, or all before the point.
fn digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.0095 => format!("{value:.2}"),
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_points_are_wrapped_and_indented() {
        let text = wrapped(&format!("- {}", "word ".repeat(40)));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{text}");
        assert!(lines[1].starts_with("  word") && text.ends_with("word\n"));
    }

    #[test]
    fn numbers_are_as_long_as_they_say_something() {
        let found = [0.0, 0.00123, 0.5, 13.04, 1478.4].map(digits);
        assert_eq!(found, ["0", "1.2e-3", "0.50", "13.0", "1478"]);
    }
}
