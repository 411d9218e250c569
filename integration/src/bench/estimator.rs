//! `estimator`: how well `dirtylog` predicts footprints on traces of known shape.

#[path = "../../../dirtylog/tests/traces/mod.rs"]
mod traces;

use anyhow::Result;

use super::Bench;
use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use traces::{Errors, Trace, errors};

/// Runs it. The traces are the same in every run.
///
/// # Errors
/// Never.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let setup = "Traces of 65 536 pages with one tick a second, from fixed seeds; the number of \
                 distinct pages dirtied within the next 10 s is predicted after every tick. Error: \
                 mean absolute error over the mean. `phased` is told the phases by nobody; `linear` \
                 is the present rate times 10 s; `next write` is Pacer's prediction."
        .to_owned();
    let mut section = Section::new("estimator", "the predicted footprint", setup);
    section.without_qemu = true;
    let mut rows = Vec::new();
    let mut row = |name: &str, found: &Errors| {
        let percent = [found.mean, found.phased, found.linear, found.next_write];
        let mut row = vec![name.to_owned()];
        row.extend(percent.map(|error| number(error * 100.0)));
        rows.push(row);
    };
    type Stationary = (&'static str, fn() -> Trace);
    let stationary: [Stationary; 3] = [
        ("uniform", traces::uniform),
        ("zipf", traces::zipf),
        ("sweep", traces::sweep),
    ];
    for (name, trace) in stationary {
        let found = errors(trace(), 100, 400);
        section.figures.push(bounded(name, found.mean, 5.0));
        row(name, &found);
    }
    let phases = errors(traces::phases(), 180, 900);
    section
        .figures
        .push(bounded("on-off, 30 s each", phases.phased, 25.0));
    row("on-off, 30 s each", &phases);
    let jittered = errors(traces::jittered_phases(), 300, 1200);
    section
        .figures
        .push(bounded("on-off, 27 to 33 s", jittered.phased, 25.0));
    row("on-off, 27 to 33 s", &jittered);
    let random = errors(traces::random_phases(), 300, 1200);
    let error = [random.phased * 100.0];
    section
        .figures
        .push(Figure::told("on-off, random: error", "%", &error));
    row("on-off, random", &random);
    section.tables.push(Table {
        title: "Errors in percent".to_owned(),
        columns: vec!["trace", "mean", "phased", "linear", "next write"],
        rows,
    });
    bench.say("estimator: done");
    Ok(section)
}

fn bounded(name: &str, error: f64, most_percent: f64) -> Figure {
    Figure::bounded(
        format!("{name}: error"),
        "%",
        &[error * 100.0],
        Statistic::Median,
        Bound::AtMost(most_percent),
    )
}
