//! The table as people and programs read it.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Pass;
use super::bad_days::BadDay;
use super::cell::Point;
use super::play::Row;

fn seconds(time: Option<Duration>) -> String {
    time.map_or("-".into(), |time| format!("{:.1}", time.as_secs_f64()))
}

/// One cell, as it ends.
#[must_use]
pub fn line(row: &Row) -> String {
    let (noticed, by) = match &row.noticed {
        Some((after, by)) => (Some(*after), by.as_str()),
        None => (None, ""),
    };
    let verdict = if row.problems.is_empty() { "ok" } else { "BAD" };
    let mut text = format!(
        "{verdict:3} {:38} {:22} noticed {:>4} s, settled {:>4} s, healed {:>4} s, exit {}, took {} s  [{:.90}]",
        row.cell,
        row.outcome,
        seconds(noticed),
        seconds(row.settled),
        seconds(row.healed),
        row.code.map_or("-".into(), |code| code.to_string()),
        seconds(Some(row.took)),
        by,
    );
    for problem in &row.problems {
        let _ = write!(text, "\n      {problem}");
    }
    if !row.problems.is_empty() {
        for line in row.log.lines() {
            let _ = write!(text, "\n        {line:.260}");
        }
    }
    text
}

/// One bad day, as it ends.
#[must_use]
pub fn day_line(day: BadDay, said: &Result<String>) -> String {
    match said {
        Ok(said) => format!("ok  bad-day/{day:30} [{said:.150}]"),
        Err(error) => format!("BAD bad-day/{day}\n{error:#}"),
    }
}

/// The table: a row per fault and target, a column per phase; in each cell the outcome and the
/// seconds to notice and to settle.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut text = format!("{:28}", "outcome notice/settle [s]");
    for point in Point::ALL {
        let _ = write!(text, " {point:24}");
    }
    text.push('\n');
    let mut done = Vec::new();
    for first in rows {
        let kind = (first.cell.fault, first.cell.target);
        if done.contains(&kind) {
            continue;
        }
        done.push(kind);
        let _ = write!(text, "{:28}", format!("{} {}", kind.0, kind.1));
        for point in Point::ALL {
            let cell = rows
                .iter()
                .find(|row| (row.cell.fault, row.cell.target) == kind && row.cell.point == point);
            let words = cell.map_or(String::new(), |row| {
                let bad = if row.problems.is_empty() { "" } else { "BAD " };
                let noticed = row.noticed.as_ref().map(|(after, _)| *after);
                let settled = row.settled.or(row.healed);
                format!(
                    "{bad}{} {}/{}",
                    row.outcome,
                    seconds(noticed),
                    seconds(settled)
                )
            });
            let _ = write!(text, " {words:24}");
        }
        text.push('\n');
    }
    text
}

fn row_json(row: &Row) -> Value {
    let s = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
    json!({
        "fault": row.cell.fault.to_string(),
        "target": row.cell.target.to_string(),
        "phase": row.cell.point.to_string(),
        "outcome": row.outcome,
        "noticed_s": s(row.noticed.as_ref().map(|(after, _)| *after)),
        "noticed_by": row.noticed.as_ref().map(|(_, by)| by),
        "settled_s": s(row.settled),
        "healed_s": s(row.healed),
        "exit_code": row.code,
        "problems": row.problems,
        "took_s": row.took.as_secs_f64(),
    })
}

/// Writes every pass as JSON.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, passes: &[Pass]) -> Result<()> {
    let list: Vec<Value> = passes
        .iter()
        .map(|pass| {
            let rows: Vec<Value> = pass.rows.iter().map(row_json).collect();
            let days: Vec<Value> = pass
                .days
                .iter()
                .map(|(day, said)| match said {
                    Ok(said) => json!({ "name": day.to_string(), "said": said }),
                    Err(error) => {
                        json!({ "name": day.to_string(), "problem": format!("{error:#}") })
                    }
                })
                .collect();
            json!({
                "accelerator": pass.accel.to_string(),
                "vms": pass.vms,
                "cells": rows,
                "bad_days": days,
            })
        })
        .collect();
    let value = json!({ "schema_version": 1, "passes": list });
    std::fs::write(path, serde_json::to_string_pretty(&value)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}
