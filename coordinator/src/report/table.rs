//! The final table: one or several moves, side by side.

use rate_limiter::Bytes;

use super::predicted::Compared;
use super::{MoveReport, VmMove};

/// A grid of text; the first column is aligned left, the others right.
pub(super) struct Grid {
    pub rows: Vec<Vec<String>>,
}

impl Grid {
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[column] - cell.chars().count());
                if column == 0 {
                    line += &format!("{cell}{pad}");
                } else {
                    line += &format!("  {pad}{cell}");
                }
            }
            text += line.trim_end();
            text.push('\n');
            if index == 0 {
                let rule = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
                text += &"─".repeat(rule);
                text.push('\n');
            }
        }
        text
    }
}

/// The table of these moves: one column each.
#[must_use]
pub fn table(reports: &[MoveReport]) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |name: &str, cell: &dyn Fn(&MoveReport) -> String| {
        let cells = std::iter::once(name.to_owned()).chain(reports.iter().map(cell));
        rows.push(cells.collect());
    };
    row("", &|report| report.policy.clone());
    row("result", &|report| report.result.to_string());
    row("total time", &|report| format!("{:.2} s", report.total_s));
    row("sent", &|report| Bytes(report.sent_bytes).to_string());
    for name in names(reports) {
        row(&format!("downtime {name}"), &|report| {
            find(report, &name)
                .and_then(|vm| vm.downtime_s)
                .map_or("–".into(), time)
        });
    }
    if reports
        .iter()
        .flat_map(|report| &report.vms)
        .any(|vm| vm.held_s > 0.0)
    {
        for name in names(reports) {
            row(
                &format!("held {name}"),
                &|report| match find(report, &name) {
                    Some(vm) if vm.held_s > 0.0 => time(vm.held_s),
                    _ => "–".into(),
                },
            );
        }
    }
    row("stop skew", &|report| time(report.stop_skew_s));
    row("resume skew", &|report| time(report.resume_skew_s));
    row("split", &|report| time(report.split_s));
    row("synchronised", &|report| time(report.synchronised_s));
    row("impact", &|report| {
        Bytes(whole(report.impact_bytes)).to_string()
    });
    if reports
        .iter()
        .any(|report| report.prediction.completion_s.is_some())
    {
        let bytes = |bytes: f64| Bytes(whole(bytes)).to_string();
        row("predicted time", &|report| {
            predicted(report.prediction.completion_s, |s| format!("{s:.2} s"))
        });
        row("predicted sent", &|report| {
            predicted(report.prediction.traffic_bytes, bytes)
        });
        row("predicted downtime", &|report| {
            predicted(report.prediction.downtime_s, time)
        });
        row("predicted impact", &|report| {
            predicted(report.prediction.impact_bytes, bytes)
        });
    }
    Grid { rows }.render()
}

/// What was predicted, with the error: `24.00 s (-1.2 %)`.
fn predicted(compared: Option<Compared>, show: impl Fn(f64) -> String) -> String {
    let Some(compared) = compared else {
        return "–".into();
    };
    let shown = show(compared.predicted);
    match compared.error_percent {
        Some(error) => format!("{shown} ({error:+.1} %)"),
        None => shown,
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an impact is not negative and far below 2^64"
)]
pub(super) fn whole(bytes: f64) -> u64 {
    bytes.max(0.0).round() as u64
}

fn names(reports: &[MoveReport]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for vm in reports.iter().flat_map(|report| &report.vms) {
        if !names.contains(&vm.name) {
            names.push(vm.name.clone());
        }
    }
    names
}

fn find<'r>(report: &'r MoveReport, name: &str) -> Option<&'r VmMove> {
    report.vms.iter().find(|vm| vm.name == name)
}

/// A time as a person reads it: `3.4 ms`, `120 ms`, `2.50 s`.
#[must_use]
pub fn time(seconds: f64) -> String {
    match seconds {
        0.0 => "0".into(),
        s if s < 0.0095 => format!("{:.1} ms", s * 1e3),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    #[test]
    fn columns_line_up() {
        let text = table(&example::three_policies());
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].contains("sequential") && lines[0].ends_with("muster"),
            "{text}"
        );
        assert!(text.contains("downtime db"), "{text}");
        assert!(text.contains("24.00 s (-0.4 %)"), "{text}");
        assert!(text.contains("synchronised"), "{text}");
        let ends: Vec<usize> = lines[2..].iter().map(|line| line.chars().count()).collect();
        assert!(ends.iter().all(|end| *end == ends[0]), "{text}");
    }

    #[test]
    fn times_read_well() {
        assert_eq!(time(0.0034), "3.4 ms");
        assert_eq!(time(0.12), "120 ms");
        assert_eq!(time(2.5), "2.50 s");
    }
}
