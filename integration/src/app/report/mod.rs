//! The report of `muster-testbed app`: text, JSON, a picture, and a page that holds all of it.

mod more;
mod page;
mod picture;

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use coordinator::MoveReport;
use serde::Serialize;

use super::costs::{self, Cost};
use super::feel::Feel;
use super::load::Sample;
use super::search::Search;
use super::sla::Verdict;
use super::spacing::Spacing;
use super::wan_plan::Mark;
use crate::clock::Micros;
use crate::qemu::Accel;

/// Version of the JSON form.
pub const SCHEMA_VERSION: u32 = 2;

/// How long one VM was away.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Away {
    /// Its name.
    pub name: String,
    /// By QEMU: from STOP at the source to RESUME at the destination, in seconds.
    pub inside_s: Option<f64>,
    /// By the users' pings: the longest time without an answer, less their spacing, in seconds.
    pub outside_s: f64,
}

/// A stream of a move's bytes at its pace, without a move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Alone {
    /// Its bytes.
    pub bytes: u64,
    /// How long it took, in seconds.
    pub took_s: f64,
    /// The 95th percentile of response times in the time that pre-copy took, in milliseconds.
    pub p95_ms: f64,
}

/// One policy's run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// The policy.
    pub policy: String,
    /// Its round, from 0.
    pub round: u32,
    /// Its load, in words.
    pub load: String,
    /// Whether every request ended that was due.
    pub settled: bool,
    /// What the users felt.
    pub feel: Feel,
    /// Service levels.
    pub service_levels: Vec<Verdict>,
    /// When the next move could begin.
    pub spacing: Spacing,
    /// How long each VM was away.
    pub downtimes: Vec<Away>,
    /// Bytes over the WAN during the move, all together.
    pub wan_bytes: u64,
    /// Of these between VMs.
    pub wan_bytes_between_vms: u64,
    /// How the WAN changed meanwhile.
    pub wan_changes: Vec<Mark>,
    /// The same stream without a move, if there was one.
    pub dummy: Option<Alone>,
    /// The move as the coordinator reports it.
    pub movement: MoveReport,
    /// When the move began.
    #[serde(skip)]
    pub began: Micros,
    /// Every request.
    #[serde(skip)]
    pub samples: Vec<Sample>,
}

impl Run {
    /// Policy, and round from the second on.
    #[must_use]
    pub fn title(&self) -> String {
        match self.round {
            0 => self.policy.clone(),
            round => format!("{} {}", self.policy, round + 1),
        }
    }
}

/// All runs, and what they were made with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Machine, QEMU, WAN, load: by name.
    pub environment: serde_json::Value,
    /// One line for a person.
    pub setting: String,
    /// What a person should know before believing the figures.
    pub notices: Vec<String>,
    /// How well each policy did, over all rounds.
    pub costs: Vec<Cost>,
    /// The search for a safe load, if there was one.
    pub search: Option<Search>,
    /// In their order.
    pub runs: Vec<Run>,
    /// Who executed the guests.
    #[serde(skip)]
    pub accel: Accel,
}

impl Report {
    /// Writes `report.json`, `report.svg` and `report.html` to a directory.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let json = serde_json::to_string_pretty(self)?;
        let picture = picture::picture(self);
        let page = page::page(self, &picture);
        for (name, text) in [
            ("report.json", json + "\n"),
            ("report.svg", picture),
            ("report.html", page),
        ] {
            let path = directory.join(name);
            std::fs::write(&path, text)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// The figures as tables.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for notice in &self.notices {
            let _ = writeln!(text, "note: {notice}\n");
        }
        for (title, rows) in self.tables() {
            let _ = writeln!(text, "{title}");
            text += &columns(&rows);
            text.push('\n');
        }
        text
    }

    /// Tables by title; the first row of each names its columns.
    fn tables(&self) -> Vec<(&'static str, Vec<Vec<String>>)> {
        let mut tables = Vec::new();
        if let Some(search) = &self.search {
            let title = "Safe load: a move violates no service level";
            tables.push((title, more::tries(search)));
        }
        if !self.costs.is_empty() {
            tables.push(("How well it went", costs::table(&self.costs)));
        }
        tables.extend([
            ("What the users felt", self.felt()),
            (
                "Migration and application on one WAN: 95th percentile of response times",
                more::shared(&self.runs),
            ),
            (
                "Service levels: worst percentile of any window, and windows in violation",
                self.levels(),
            ),
            (
                "Spacing: from the move's end until the 90th percentile over the window is well",
                more::spacings(&self.runs),
            ),
            ("Downtime: by QEMU / by the users' pings", self.away()),
        ]);
        if self.runs.iter().any(|run| !run.wan_changes.is_empty()) {
            tables.push(("Changes of the WAN", more::changes(&self.runs)));
        }
        tables
    }

    fn felt(&self) -> Vec<Vec<String>> {
        let mut rows = vec![row(&[
            "policy",
            "before",
            "during",
            "slowdown",
            "p99 during",
            "degraded",
            "recovery",
            "longest gap",
            "failed",
            "move",
            "split",
            "over the WAN",
            "between VMs",
            "impact",
        ])];
        for run in &self.runs {
            let (feel, movement) = (&run.feel, &run.movement);
            rows.push(vec![
                run.title(),
                format!("{:.1} ms", feel.before_ms),
                format!("{:.1} ms", feel.during_ms),
                format!("{:.2}×", feel.slowdown),
                format!("{:.0} ms", feel.during_p99_ms),
                format!("{} s", feel.degraded_s),
                format!("{:.1} s", feel.recovery_s),
                format!("{:.2} s", feel.longest_gap_s),
                format!("{} of {}", feel.refused + feel.lost, feel.requests),
                format!("{:.2} s", movement.total_s),
                format!("{:.2} s", movement.split_s),
                megabytes(run.wan_bytes),
                megabytes(run.wan_bytes_between_vms),
                megabytes_f(movement.impact_bytes),
            ]);
        }
        rows
    }

    fn levels(&self) -> Vec<Vec<String>> {
        let mut head = row(&["action", "limit"]);
        for run in &self.runs {
            head.push(format!("{} p90", run.title()));
            head.push(format!("{} p99", run.title()));
        }
        let mut rows = vec![head];
        let Some(first) = self.runs.first() else {
            return rows;
        };
        for verdict in first.service_levels.iter().step_by(2) {
            let mut cells = vec![
                verdict.action.name().to_owned(),
                format!("{:.1} s", verdict.limit_s),
            ];
            let all = self.runs.iter().flat_map(|run| &run.service_levels);
            for own in all.filter(|own| own.action == verdict.action) {
                cells.push(match own.violations {
                    0 => format!("{:.2} s", own.worst_s),
                    violations => {
                        format!(
                            "{:.2} s ({violations} of {} violated)",
                            own.worst_s, own.windows
                        )
                    }
                });
            }
            rows.push(cells);
        }
        rows
    }

    fn away(&self) -> Vec<Vec<String>> {
        let mut head = row(&["policy"]);
        if let Some(first) = self.runs.first() {
            head.extend(first.downtimes.iter().map(|away| away.name.clone()));
        }
        let mut rows = vec![head];
        for run in &self.runs {
            let mut cells = vec![run.title()];
            for away in &run.downtimes {
                let inside = away
                    .inside_s
                    .map_or("?".to_owned(), |s| format!("{:.0}", s * 1e3));
                cells.push(format!("{inside} / {:.0} ms", away.outside_s * 1e3));
            }
            rows.push(cells);
        }
        rows
    }
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

fn megabytes(bytes: u64) -> String {
    let kilobytes = u32::try_from(bytes / 1000).unwrap_or(u32::MAX);
    megabytes_f(f64::from(kilobytes) * 1e3)
}

fn megabytes_f(bytes: f64) -> String {
    // The sum of nothing is -0.
    format!("{:.2} MB", bytes / 1e6 + 0.0)
}

/// Rows with their cells under each other.
fn columns(rows: &[Vec<String>]) -> String {
    let width = |at: usize| {
        let cells = rows.iter().filter_map(|row| row.get(at));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (at, cell) in row.iter().enumerate() {
            let space = width(at) - cell.chars().count() + 2;
            let _ = write!(line, "{cell}{}", " ".repeat(space));
        }
        let _ = writeln!(text, "  {}", line.trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stand_under_each_other() {
        let rows = [row(&["a", "bb"]), row(&["ccc×", "d"])];
        assert_eq!(columns(&rows), "  a     bb\n  ccc×  d\n");
        assert_eq!(megabytes(1_234_567), "1.23 MB");
    }
}
