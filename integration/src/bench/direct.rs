//! `direct`: what it costs that the sidecars connect, watch and pace a stream that QEMU itself
//! writes, against QEMU's own TCP migration between the same two hosts.

use anyhow::Result;
use sidecar::protocol::types::Transport;

use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::transfer::{self, Pair, Run, each};
use super::{Bench, stats};

const PAIRS: usize = 20;

/// Runs it.
///
/// # Errors
/// A migration fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (done, guest) = transfer::pairs(bench, "direct", Transport::Direct, PAIRS)?;
    Ok(section(&done, guest))
}

fn section(done: &[Pair], guest: &str) -> Section {
    let setup = transfer::setup(guest, done.len());
    let mut section = Section::new("direct", "the direct transport", setup);
    let of = |value: &dyn Fn(&Run, &Run) -> f64| each(done, value);
    let wall = of(&|plain, direct| direct.seconds / plain.seconds);
    let ours = of(&|_, direct| direct.sidecars.iter().map(|t| direct.per_gib(*t)).sum());
    section.figures = vec![
        Figure::told("time, direct / QEMU alone", "", &wall),
        Figure::bounded(
            "CPU of QEMUs and sidecars, direct / QEMU alone",
            "",
            &of(&|plain, direct| direct.all_per_gib() / plain.all_per_gib()),
            Statistic::Median,
            Bound::AtMost(1.02),
        ),
        Figure::bounded(
            "CPU of both sidecars",
            "s/GiB",
            &ours,
            Statistic::Median,
            Bound::AtMost(0.01),
        ),
        Figure::told("direct", "GiB/s", &of(&|_, direct| direct.gib_per_s())),
        Figure::told("QEMU alone", "GiB/s", &of(&|plain, _| plain.gib_per_s())),
    ];
    if let Some((low, high)) = stats::interval(&wall) {
        // The slower ends of times are the lower ones of throughput.
        section.figures.extend([
            Figure::bounded(
                "throughput, direct / QEMU alone: lower end of the median's interval",
                "",
                &[1.0 / high],
                Statistic::Median,
                Bound::AtLeast(0.95),
            ),
            Figure::bounded(
                "the same, upper end",
                "",
                &[1.0 / low],
                Statistic::Median,
                Bound::AtLeast(1.0),
            ),
        ]);
    }
    section.notes.push(format!(
        "{} The interval of a median holds it with 95 % confidence (order statistics).",
        transfer::busy(done)
    ));
    section.tables.push(Table {
        title: "Every pair".to_owned(),
        columns: vec![
            "pair",
            "QEMU alone, GiB/s",
            "direct, GiB/s",
            "QEMU alone, CPU s/GiB",
            "direct, CPU s/GiB",
            "sidecars, CPU s/GiB",
        ],
        rows: done.iter().zip(&ours).enumerate().map(row).collect(),
    });
    section
}

fn row((index, ((plain, direct), ours)): (usize, (&Pair, &f64))) -> Vec<String> {
    vec![
        (index + 1).to_string(),
        number(plain.gib_per_s()),
        number(direct.gib_per_s()),
        number(plain.all_per_gib()),
        number(direct.all_per_gib()),
        number(*ours),
    ]
}
