//! `export`: what it costs QEMU to export its dirty log while it migrates.
//!
//! QEMU counts the time itself (`export-time` of `query-dirty-log-export`; its trace event
//! `dirty_log_export_sync` tells the same of each synchronisation).

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result};
use dirtylog::export::memfd;
use serde_json::json;

use super::Bench;
use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::transfer;
use crate::lab::{Lab, LabSpec};
use crate::qmp::Qmp;

const GUEST: &str = "db:1024MiB:60MB/s:64MiB";
const QUICK_GUEST: &str = "db:64MiB:20MB/s:8MiB";
/// The shaped link: many seconds and some rounds. The other one carries what it can.
const LINK: &str = "1Gbit/s";
const PAIRS_SHAPED: usize = 4;
const PAIRS_UNSHAPED: usize = 10;
const FIRST_PORT: usize = 4900;
const LIMIT: Duration = Duration::from_secs(10);

/// One migration with the export, and one without.
struct Pair {
    seconds: f64,
    export_s: f64,
    syncs: f64,
    without_s: f64,
}

/// Runs it.
///
/// # Errors
/// A migration fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (guest, shaped, unshaped) = if bench.quick {
        (QUICK_GUEST, 1, 1)
    } else {
        (GUEST, PAIRS_SHAPED, PAIRS_UNSHAPED)
    };
    let lab = bench.lab(LabSpec {
        resident: vec!["b".to_owned()],
        ..bench.spec(&[guest], LINK)?
    })?;
    let setup = format!(
        "One guest, {guest}; QEMU's own TCP migration, with and without the export in turn, over \
         {LINK} and over an unshaped veth."
    );
    let mut section = Section::new(
        "export",
        "the time that exporting the dirty log takes",
        setup,
    );
    let mut rows = Vec::new();
    let mut port = FIRST_PORT;
    for (link, pairs) in [(LINK, shaped), ("unshaped", unshaped)] {
        if link != LINK {
            lab.network.link("a", "b")?.unshape()?;
        }
        let mut done = Vec::new();
        for index in 0..pairs {
            bench.interrupt.check()?;
            done.push(pair(&lab, &mut port, index % 2 == 0)?);
        }
        section.figures.extend(figures(link, &done));
        rows.extend(done.iter().map(|pair| {
            let cells = [
                pair.seconds,
                pair.without_s,
                pair.export_s * 1e3,
                pair.syncs,
            ];
            let mut row = vec![link.to_owned()];
            row.extend(cells.map(number));
            row
        }));
        bench.say(&format!("export: {link} done"));
    }
    section.tables.push(Table {
        title: "Every pair".to_owned(),
        columns: vec!["link", "with, s", "without, s", "exporting, ms", "syncs"],
        rows,
    });
    Ok(section)
}

fn figures(link: &str, done: &[Pair]) -> Vec<Figure> {
    let of = |value: &dyn Fn(&Pair) -> f64| done.iter().map(value).collect::<Vec<f64>>();
    vec![
        Figure::bounded(
            format!("{link}: exporting, share of the migration's time"),
            "%",
            &of(&|pair| pair.export_s / pair.seconds * 100.0),
            Statistic::Max,
            Bound::AtMost(1.0),
        ),
        Figure::told(
            format!("{link}: exporting once"),
            "ms",
            &of(&|pair| pair.export_s / pair.syncs * 1e3),
        ),
        Figure::told(
            format!("{link}: migration's time, with / without"),
            "",
            &of(&|pair| pair.seconds / pair.without_s),
        ),
    ]
}

fn pair(lab: &Lab, port: &mut usize, with_first: bool) -> Result<Pair> {
    let mut plain = || {
        *port += 1;
        let guest = &lab.spec.guests[0].name;
        transfer::plain(lab, guest, *port).map(|run| run.seconds)
    };
    let without = if with_first { None } else { Some(plain()?) };
    start_export(lab)?;
    let before = counters(lab)?;
    let seconds = plain()?;
    let after = counters(lab)?;
    monitor(lab)?.execute("dirty-log-export-stop", json!({}), LIMIT)?;
    Ok(Pair {
        seconds,
        export_s: (after.0 - before.0) / 1e9,
        syncs: after.1 - before.1,
        without_s: without.map_or_else(plain, Ok)?,
    })
}

/// The source's, which serves one client at a time.
fn monitor(lab: &Lab) -> Result<Qmp> {
    Ok(lab.monitor(&lab.spec.guests[0].name, "a")?)
}

fn start_export(lab: &Lab) -> Result<()> {
    let fd = memfd("dirty-log")?;
    let mut monitor = monitor(lab)?;
    monitor.pass_fd("dirty-log", fd.as_fd(), LIMIT)?;
    // Interval 0: only what a migration synchronises is exported.
    let arguments = json!({"fdname": "dirty-log", "interval": 0});
    monitor.execute("dirty-log-export-start", arguments, LIMIT)?;
    Ok(())
}

/// `export-time` in ns, and `syncs`.
fn counters(lab: &Lab) -> Result<(f64, f64)> {
    let told = monitor(lab)?.execute("query-dirty-log-export", json!({}), LIMIT)?;
    let number = |name: &str| {
        let number = told[name].as_f64();
        number.with_context(|| format!("query-dirty-log-export tells no {name}"))
    };
    Ok((number("export-time")?, number("syncs")?))
}
