//! `held`: what wait-and-copy costs a guest and its host. Stock QEMU spins if it is let; the patched
//! one sleeps.
//!
//! Windows in which the guests only run and windows in which they are held alternate.

use std::time::Duration;

use anyhow::{Context, Result};
use coordinator::application::Policy;
use serde_json::json;
use sidecar::protocol::types::QemuBuild;

use super::cpu::CpuTime;
use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::watch::{carried, carry_out};
use super::{Bench, ms};
use crate::clock::Micros;
use crate::lab::{Lab, LabSpec};
use crate::qemu::installed;
use crate::qmp::Qmp;
use crate::signals::Interrupt;

const LINK: &str = "400Mbit/s";
/// The pace of a hold has settled after this.
const SETTLE: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(5);
/// Ticks p99 may at most be so many times that of an unmigrated guest.
const P99_FACTOR: f64 = 2.0;
/// Cores per VM, beside its vCPU.
fn cores_per_vm(build: QemuBuild) -> f64 {
    match build {
        QemuBuild::Patched => 0.02,
        _ => 0.15,
    }
}

const SETS: [(&str, &[&str]); 4] = [
    ("1 idle", &["db:64MiB:0B/s:4KiB"]),
    ("1 dirty", &["db:64MiB:10MB/s:24MiB"]),
    (
        "3 idle",
        &[
            "web:64MiB:0B/s:4KiB",
            "app:64MiB:0B/s:4KiB",
            "db:64MiB:0B/s:4KiB",
        ],
    ),
    (
        "3 dirty",
        &[
            "web:64MiB:1MB/s:4MiB",
            "app:64MiB:4MB/s:12MiB",
            "db:64MiB:10MB/s:24MiB",
        ],
    ),
];

/// Ticks of all guests over one window.
#[derive(Debug, Clone, Copy)]
struct Ticks {
    /// The worst guest's.
    p99_ms: f64,
    max_ms: f64,
}

/// Cores that were kept busy over one window, per VM.
#[derive(Debug, Clone, Copy)]
struct Cores {
    source_qemu: f64,
    source_sidecar: f64,
    destination_qemu: f64,
    destination_sidecar: f64,
}

impl Cores {
    fn source(self) -> f64 {
        self.source_qemu + self.source_sidecar
    }

    fn all(self) -> f64 {
        self.source() + self.destination_qemu + self.destination_sidecar
    }
}

#[derive(Debug, Clone, Copy)]
struct Pair {
    free: Ticks,
    held: Ticks,
    cores: Cores,
    resent: f64,
}

/// Runs it.
///
/// # Errors
/// A move fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (pairs, window) = if bench.quick {
        (1, Duration::from_millis(1500))
    } else {
        (4, Duration::from_secs(5))
    };
    let setup = format!(
        "Guests of 64 MiB over {LINK}: idle, or dirtying as the demo's do. Per set {pairs} \
         alternating pairs of windows of {:.1} s, unmigrated and held (from 1 s after the hold \
         began). p99 of the time between ticks (1 kHz), the worst guest's; cores of all threads \
         but vCPUs, per VM.",
        window.as_secs_f64()
    );
    let mut section = Section::new("held", "what wait-and-copy costs", setup);
    let cores_limit = cores_per_vm(installed()?.build);
    let sets = if bench.quick { &SETS[3..] } else { &SETS[..] };
    let mut rows = Vec::new();
    for (name, guests) in sets {
        let lab = bench.lab(LabSpec {
            settings: vec!["max-downtime = \"500ms\"".to_owned()],
            ..bench.spec(guests, LINK)?
        })?;
        let done = measure(bench, lab, name, pairs, window)?;
        section.figures.extend(figures(name, &done, cores_limit));
        for (index, pair) in done.iter().enumerate() {
            let cells = [
                pair.free.p99_ms,
                pair.held.p99_ms,
                pair.free.max_ms,
                pair.held.max_ms,
                pair.cores.source_qemu,
                pair.cores.source_sidecar,
                pair.cores.destination_qemu,
                pair.cores.destination_sidecar,
                pair.resent,
            ];
            let mut row = vec![format!("{name} {}", index + 1)];
            row.extend(cells.map(number));
            rows.push(row);
        }
    }
    section.tables.push(Table {
        title: "Every pair (ticks in ms; cores per VM; re-sent in MB/s over all VMs)".to_owned(),
        columns: vec![
            "pair",
            "p99",
            "p99 held",
            "max",
            "max held",
            "QEMU",
            "sidecar",
            "QEMU at dest.",
            "sidecar at dest.",
            "re-sent",
        ],
        rows,
    });
    Ok(section)
}

fn figures(name: &str, done: &[Pair], cores_limit: f64) -> Vec<Figure> {
    let of = |value: &dyn Fn(&Pair) -> f64| done.iter().map(value).collect::<Vec<f64>>();
    vec![
        Figure::bounded(
            format!("{name}: tick p99, held / unmigrated"),
            "",
            &of(&|pair| pair.held.p99_ms / pair.free.p99_ms),
            Statistic::Median,
            Bound::AtMost(P99_FACTOR),
        ),
        Figure::bounded(
            format!("{name}: cores per VM at the source's host"),
            "",
            &of(&|pair| pair.cores.source()),
            Statistic::Median,
            Bound::AtMost(cores_limit),
        ),
        Figure::told(
            format!("{name}: cores per VM at both hosts together"),
            "",
            &of(&|pair| pair.cores.all()),
        ),
    ]
}

fn measure(
    bench: &Bench<'_>,
    mut lab: Lab,
    name: &str,
    pairs: usize,
    window: Duration,
) -> Result<Vec<Pair>> {
    let sidecars = [lab.sidecar("a")?.pid(), lab.sidecar("b")?.pid()];
    let mut done = Vec::new();
    for index in 0..pairs {
        let (from, to) = (index % 2, 1 - index % 2);
        let free_first = index % 2 == 0;
        let mut free = None;
        if free_first {
            bench.interrupt.sleep(SETTLE)?;
            free = Some(ticks_while(&lab, bench.interrupt, window)?);
        }
        let (held, cores, resent) = held(bench, &lab, [from, to], sidecars, window)?;
        if !free_first {
            bench.interrupt.sleep(SETTLE)?;
            free = Some(ticks_while(&lab, bench.interrupt, window)?);
        }
        let pair = Pair {
            free: free.context("no unmigrated window")?,
            held,
            cores,
            resent,
        };
        bench.say(&format!(
            "held, {name}, {}/{pairs}: p99 {:.2} ms (unmigrated {:.2}), {:.3} cores per VM at the source, {:.3} in all",
            index + 1,
            pair.held.p99_ms,
            pair.free.p99_ms,
            pair.cores.source(),
            pair.cores.all()
        ));
        done.push(pair);
    }
    Ok(done)
}

/// Moves the group and looks at it while it is held.
fn held(
    bench: &Bench<'_>,
    lab: &Lab,
    [from, to]: [usize; 2],
    sidecars: [u32; 2],
    window: Duration,
) -> Result<(Ticks, Cores, f64)> {
    let hosts = [&lab.spec.hosts[from], &lab.spec.hosts[to]];
    let app = lab.application(hosts[0], hosts[1])?;
    let mut found = None;
    let mut look = || {
        bench.interrupt.sleep(SETTLE)?;
        let watched = Watched::find(lab, hosts, [sidecars[from], sidecars[to]])?;
        let (before, carried) = (watched.cpu()?, carried(lab, from)?);
        let begin = Micros::now();
        let ticks = ticks_while(lab, bench.interrupt, window)?;
        let seconds = Micros::now().since(begin).as_secs_f64();
        let after = watched.cpu()?;
        let sent = (super::float(carried_since(lab, from, carried)?)) / seconds / 1e6;
        let vms = super::float(lab.spec.guests.len() as u64);
        let cores = |index: usize| after[index].since(before[index]).total_s() / seconds / vms;
        let cores = Cores {
            source_qemu: cores(0),
            source_sidecar: cores(1),
            destination_qemu: cores(2),
            destination_sidecar: cores(3),
        };
        found = Some((ticks, cores, sent));
        Ok(())
    };
    carry_out(lab, &app, Policy::Muster, bench.interrupt, Some(&mut look))?;
    found.context("the group was never held")
}

fn carried_since(lab: &Lab, host: usize, before: u64) -> Result<u64> {
    Ok(carried(lab, host)?.saturating_sub(before))
}

/// Whose CPU time is counted: QEMUs without their vCPUs, and sidecars.
struct Watched {
    sources: Vec<(u32, Vec<u32>)>,
    destinations: Vec<(u32, Vec<u32>)>,
    sidecars: [u32; 2],
}

impl Watched {
    fn find(lab: &Lab, hosts: [&String; 2], sidecars: [u32; 2]) -> Result<Self> {
        let qemus = |host: &str| -> Result<Vec<(u32, Vec<u32>)>> {
            let guests = lab.spec.guests.iter();
            guests
                .map(|guest| {
                    let mut monitor = lab.monitor(&guest.name, host)?;
                    Ok((monitor.peer_pid()?, vcpus(&mut monitor)?))
                })
                .collect()
        };
        Ok(Self {
            sources: qemus(hosts[0])?,
            destinations: qemus(hosts[1])?,
            sidecars,
        })
    }

    /// Of the source's QEMUs and sidecar, the destination's QEMUs and sidecar.
    fn cpu(&self) -> Result<[CpuTime; 4]> {
        let qemus = |all: &[(u32, Vec<u32>)]| -> Result<CpuTime> {
            let mut sum = CpuTime::default();
            for (pid, vcpus) in all {
                sum = sum.plus(CpuTime::of_threads(*pid, vcpus)?);
            }
            Ok(sum)
        };
        Ok([
            qemus(&self.sources)?,
            CpuTime::of_process(self.sidecars[0])?,
            qemus(&self.destinations)?,
            CpuTime::of_process(self.sidecars[1])?,
        ])
    }
}

fn vcpus(monitor: &mut Qmp) -> Result<Vec<u32>> {
    let answer = monitor.execute("query-cpus-fast", json!({}), LIMIT)?;
    let threads = answer.as_array().into_iter().flatten();
    threads
        .map(|cpu| {
            let thread = cpu["thread-id"]
                .as_u64()
                .and_then(|id| u32::try_from(id).ok());
            thread.context("query-cpus-fast tells no thread-id")
        })
        .collect()
}

/// The guests' ticks over a window that begins now.
fn ticks_while(lab: &Lab, interrupt: &Interrupt, window: Duration) -> Result<Ticks> {
    let begin = Micros::now();
    interrupt.sleep(window)?;
    let mut worst = Ticks {
        p99_ms: 0.0,
        max_ms: 0.0,
    };
    for guest in &lab.spec.guests {
        let record = lab.ticks.record_since(&guest.name, begin);
        let gaps = record.gaps();
        let gaps = gaps.with_context(|| format!("{} did not tick", guest.name))?;
        let silent = record
            .ticks
            .last()
            .map(|tick| ms(Micros::now().since(tick.at)));
        worst.p99_ms = worst.p99_ms.max(gaps.p99_ms);
        worst.max_ms = worst.max_ms.max(gaps.max_ms).max(silent.unwrap_or(0.0));
    }
    Ok(worst)
}
