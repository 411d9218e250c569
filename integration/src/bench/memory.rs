//! `memory`: how much a sidecar needs while sixteen VMs move through it at once.

use std::time::Duration;

use anyhow::Result;
use coordinator::application::Policy;

use super::Bench;
use super::cpu::{forget_peak, memory_kib};
use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::watch::carry_out;
use crate::lab::LabSpec;

const LINK: &str = "1Gbit/s";

/// Runs it.
///
/// # Errors
/// A move fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (vms, rounds) = if bench.quick { (4, 1) } else { (16, 3) };
    let names: Vec<String> = (1..=vms)
        .map(|n| format!("vm{n:02}:12MiB:500kB/s:2MiB"))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut spec = bench.spec(&names, LINK)?;
    for guest in &mut spec.guests {
        // Sixteen guests at 1 kHz would be the load, not the move.
        guest.tick_hz = 100;
    }
    let mut lab = bench.lab(LabSpec {
        settings: vec!["max-downtime = \"500ms\"".to_owned()],
        ..spec
    })?;
    let hosts = lab.spec.hosts.clone();
    let mut pids = Vec::new();
    for host in &hosts {
        pids.push(lab.sidecar(host)?.pid());
    }
    let idle: Vec<f64> = resident(&pids)?.iter().map(|(_, now)| mib(*now)).collect();
    let (mut sources, mut destinations, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds * 2 {
        let (from, to) = (round % 2, 1 - round % 2);
        for pid in &pids {
            forget_peak(*pid)?;
        }
        let app = lab.application(&hosts[from], &hosts[to])?;
        let moved = carry_out(&lab, &app, Policy::Muster, bench.interrupt, None)?;
        let peaks: Vec<f64> = resident(&pids)?
            .iter()
            .map(|(peak, _)| mib(*peak))
            .collect();
        sources.push(peaks[from]);
        destinations.push(peaks[to]);
        bench.say(&format!(
            "memory {}/{}: {vms} VMs in {:.1} s, peak {:.1} MiB at the source, {:.1} MiB at the destination",
            round + 1,
            rounds * 2,
            moved.report.total_s,
            peaks[from],
            peaks[to]
        ));
        rows.push(vec![
            (round + 1).to_string(),
            number(peaks[from]),
            number(peaks[to]),
            number(moved.report.total_s),
            number(moved.report.resume_skew_s * 1e3),
        ]);
        bench.interrupt.sleep(Duration::from_millis(100))?;
    }
    let setup = format!(
        "{vms} VMs of 12 MiB in one run, over {LINK}; VmHWM of each sidecar, begun anew before \
         each move."
    );
    let mut section = Section::new("memory", "memory of a sidecar", setup);
    let most = Bound::AtMost(32.0);
    section.figures = vec![
        Figure::bounded("peak at the source", "MiB", &sources, Statistic::Max, most),
        Figure::bounded(
            "peak at the destination",
            "MiB",
            &destinations,
            Statistic::Max,
            most,
        ),
        Figure::told("before the first move", "MiB", &idle),
    ];
    section.tables.push(Table {
        title: "Every move".to_owned(),
        columns: vec![
            "move",
            "source, MiB",
            "destination, MiB",
            "total, s",
            "resume skew, ms",
        ],
        rows,
    });
    Ok(section)
}

fn resident(pids: &[u32]) -> Result<Vec<(u64, u64)>> {
    Ok(pids
        .iter()
        .map(|pid| memory_kib(*pid))
        .collect::<Result<_, _>>()?)
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
