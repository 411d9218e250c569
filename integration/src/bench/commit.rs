//! `commit`: how long the decision takes, as part of a move and alone.

use std::time::Instant;

use anyhow::Result;
use coordinator::application::Policy;
use sidecar::protocol::command::{Command, DecideArgs, RunArgs};
use sidecar::protocol::types::RecordValue;
use uuid::Uuid;

use super::Bench;
use super::control::Driver;
use super::output::number;
use super::result::{Figure, Section, Table};
use super::watch::{carry_out, micros_to_ms};
use crate::lab::LabSpec;

const GUESTS: [&str; 3] = [
    "web:12MiB:1MB/s:2MiB",
    "app:12MiB:1MB/s:2MiB",
    "db:12MiB:1MB/s:2MiB",
];
const LINK: &str = "1Gbit/s";

/// Runs it.
///
/// # Errors
/// A move fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (moves, decisions) = if bench.quick { (2, 20) } else { (20, 100) };
    let lab = bench.lab(LabSpec {
        settings: vec!["max-downtime = \"300ms\"".to_owned()],
        ..bench.spec(&GUESTS, LINK)?
    })?;
    let (mut latencies, mut rows) = (Vec::new(), Vec::new());
    for index in 0..moves {
        let (from, to) = (index % 2, 1 - index % 2);
        let app = lab.application(&lab.spec.hosts[from], &lab.spec.hosts[to])?;
        let moved = carry_out(&lab, &app, Policy::Muster, bench.interrupt, None)?;
        let latency = micros_to_ms(moved.last_resumed_us() - moved.last_arrived_us);
        latencies.push(latency);
        let skew = moved.report.resume_skew_s * 1e3;
        bench.say(&format!(
            "commit {}/{moves}: {latency:.1} ms from the last ARRIVED to the last RESUME",
            index + 1
        ));
        rows.push(vec![(index + 1).to_string(), number(latency), number(skew)]);
    }
    let decide = decide_alone(bench, &lab, decisions)?;
    let setup = format!(
        "Three VMs of 12 MiB over {LINK}, {moves} moves: from the last half's ARRIVED to the last \
         VM's RESUME, by the sidecars' stamps. Then {decisions} times `decide` for a new run, from \
         the command to the answer (temporary file, fsync, link, fsync of the directories)."
    );
    let mut section = Section::new("commit", "latency of the decision", setup);
    section.figures = vec![
        Figure::told("last ARRIVED to last RESUME", "ms", &latencies),
        Figure::told("`decide` alone", "ms", &decide),
    ];
    section.tables.push(Table {
        title: "Every move".to_owned(),
        columns: vec!["move", "latency, ms", "resume skew, ms"],
        rows,
    });
    Ok(section)
}

fn decide_alone(bench: &Bench<'_>, lab: &crate::lab::Lab, times: usize) -> Result<Vec<f64>> {
    let guest = &lab.spec.guests[0].name;
    let mut driver = Driver::connect(lab, guest, &lab.spec.hosts[0], &lab.spec.hosts[1])?;
    let mut taken = Vec::new();
    for _ in 0..times {
        bench.interrupt.check()?;
        let run = Uuid::new_v4();
        let decide = DecideArgs {
            run,
            vm: None,
            value: RecordValue::Abort,
        };
        let begin = Instant::now();
        driver.ask(0, &Command::Decide(decide))?;
        taken.push(begin.elapsed().as_secs_f64() * 1e3);
        driver.ask(0, &Command::Forget(RunArgs { run, epoch: 1 }))?;
    }
    Ok(taken)
}
