//! `total`: what it costs in total time that the group waits for itself: `muster` and `parallel`
//! in alternating pairs, with the demo's guests.

use anyhow::Result;
use coordinator::application::Policy;

use super::Bench;
use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::watch::{Moved, carry_out};
use crate::lab::{Lab, LabSpec};

const GUESTS: [&str; 3] = [
    "web:128MiB:1MB/s:4MiB",
    "app:256MiB:4MB/s:16MiB",
    "db:512MiB:10MB/s:48MiB",
];
const QUICK_GUESTS: [&str; 3] = [
    "web:16MiB:1MB/s:4MiB",
    "app:24MiB:4MB/s:8MiB",
    "db:40MiB:10MB/s:16MiB",
];
const LINK: &str = "400Mbit/s";
const MAX_DOWNTIME: &str = "300ms";

struct Pair {
    muster: Moved,
    parallel: Moved,
}

impl Pair {
    fn ratio(&self) -> f64 {
        self.muster.report.total_s / self.parallel.report.total_s
    }
}

/// Runs it.
///
/// # Errors
/// A move fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (pairs, guests) = if bench.quick {
        (1, &QUICK_GUESTS)
    } else {
        (6, &GUESTS)
    };
    let lab = bench.lab(LabSpec {
        settings: vec![format!("max-downtime = \"{MAX_DOWNTIME}\"")],
        ..bench.spec(guests, LINK)?
    })?;
    let mut done = Vec::new();
    let mut at = 0;
    let mut go = |lab: &Lab, policy| {
        let app = lab.application(&lab.spec.hosts[at], &lab.spec.hosts[1 - at])?;
        at = 1 - at;
        carry_out(lab, &app, policy, bench.interrupt, None)
    };
    for index in 1..=pairs {
        // Each is first in every other pair, and goes each way equally often.
        let pair = if index % 2 == 1 {
            let muster = go(&lab, Policy::Muster)?;
            let parallel = go(&lab, Policy::Parallel)?;
            Pair { muster, parallel }
        } else {
            let parallel = go(&lab, Policy::Parallel)?;
            let muster = go(&lab, Policy::Muster)?;
            Pair { muster, parallel }
        };
        bench.say(&format!(
            "total {index}/{pairs}: muster {:.2} s, parallel {:.2} s, ratio {:.3}",
            pair.muster.report.total_s,
            pair.parallel.report.total_s,
            pair.ratio()
        ));
        done.push(pair);
    }
    Ok(section(&done, guests))
}

fn section(done: &[Pair], guests: &[&str]) -> Section {
    let setup = format!(
        "{} over {LINK}, max-downtime {MAX_DOWNTIME}; {} alternating pairs.",
        guests.join(", "),
        done.len()
    );
    let mut section = Section::new("total", "total time against `parallel`", setup);
    let of = |value: &dyn Fn(&Pair) -> f64| done.iter().map(value).collect::<Vec<f64>>();
    section.figures = vec![
        Figure::bounded(
            "total time, muster / parallel",
            "",
            &of(&Pair::ratio),
            Statistic::Median,
            Bound::AtMost(1.10),
        ),
        Figure::told("muster", "s", &of(&|pair| pair.muster.report.total_s)),
        Figure::told("parallel", "s", &of(&|pair| pair.parallel.report.total_s)),
        Figure::told(
            "bytes sent, muster / parallel",
            "",
            &of(&|pair| mib(pair.muster.report.sent_bytes) / mib(pair.parallel.report.sent_bytes)),
        ),
        Figure::told(
            "split time, muster",
            "s",
            &of(&|pair| pair.muster.report.split_s),
        ),
        Figure::told(
            "split time, parallel",
            "s",
            &of(&|pair| pair.parallel.report.split_s),
        ),
    ];
    for (index, vm) in done
        .iter()
        .flat_map(|pair| pair.muster.report.vms.iter().enumerate())
        .take(guests.len())
    {
        let held = of(&|pair| pair.muster.report.vms[index].held_s);
        let what = format!("{} held, muster", vm.name);
        section.figures.push(Figure::told(what, "s", &held));
    }
    let mut rows = Vec::new();
    for (index, pair) in done.iter().enumerate() {
        for moved in [&pair.muster, &pair.parallel] {
            let report = &moved.report;
            let held: Vec<String> = report
                .vms
                .iter()
                .map(|vm| format!("{} {}", vm.name, number(vm.held_s)))
                .collect();
            rows.push(vec![
                (index + 1).to_string(),
                report.policy.clone(),
                number(report.total_s),
                number(mib(report.sent_bytes)),
                number(report.split_s),
                held.join(", "),
            ]);
        }
    }
    section.tables.push(Table {
        title: "Every move".to_owned(),
        columns: vec![
            "pair",
            "policy",
            "total, s",
            "sent, MiB",
            "split, s",
            "held, s",
        ],
        rows,
    });
    section
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1_048_576.0
}
