//! `disks`: local disks of different size that move with their guests, by `sequential`, `parallel` and
//! `muster` in turns (COMMA's Tables 2 and 3, scaled down); and what a disk that is written adds to the
//! downtime over a slow link.

use anyhow::Result;
use coordinator::application::Policy;
use rate_limiter::{Bytes, BytesPerSecond};
use sidecar::config::ImageFormat;
use sidecar::protocol::types::Phase;

use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::watch::{Moved, carry_out};
use super::{Bench, float, ms};
use crate::guest::DiskSpec;
use crate::lab::LabSpec;

const MIB: u64 = 1 << 20;
const LINK: &str = "400Mbit/s";
const MAX_DOWNTIME: &str = "300ms";
const POLICIES: [Policy; 3] = [Policy::Sequential, Policy::Parallel, Policy::Muster];
const GUESTS: [&str; 3] = [
    "web:32MiB:1MB/s:4MiB",
    "app:48MiB:2MB/s:4MiB",
    "db:64MiB:4MB/s:8MiB",
];
/// Size in MiB and write rate in bytes per second, by guest.
const DISKS: [(u64, u64); 3] = [(64, 100_000), (96, 500_000), (160, 1_000_000)];
const QUICK_DISKS: [(u64, u64); 3] = [(8, 100_000), (12, 500_000), (20, 1_000_000)];
const TRAFFIC: [(&str, &str, u64); 2] = [("web", "app", 200_000), ("app", "db", 500_000)];
/// An impact that is 0 with the two digits of MB that COMMA's tables have.
const NO_IMPACT_MB: f64 = 0.005;

/// One guest over a slow link, with and without a disk that it writes.
const SLOW_LINK: &str = "85Mbit/s";
const ALONE: &str = "db:16MiB:1MB/s:2MiB";
const WRITTEN: u64 = 2_000_000;

fn disk(size_mib: u64, rate: u64) -> DiskSpec {
    DiskSpec {
        size: Bytes(size_mib * MIB),
        rate: BytesPerSecond(rate),
        filled: true,
        write_blocking: false,
        format: ImageFormat::Raw,
        least: None,
    }
}

/// Runs it.
///
/// # Errors
/// A move fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let moves = side_by_side(bench)?;
    let added = added_downtime(bench)?;
    Ok(section(&moves, &added))
}

fn side_by_side(bench: &Bench<'_>) -> Result<Vec<(Policy, Moved)>> {
    let (turns, disks) = if bench.quick {
        (1, QUICK_DISKS)
    } else {
        (4, DISKS)
    };
    let traffic = TRAFFIC.map(|(a, b, rate)| (a.to_owned(), b.to_owned(), BytesPerSecond(rate)));
    let mut spec = LabSpec {
        settings: vec![format!("max-downtime = \"{MAX_DOWNTIME}\"")],
        traffic: traffic.to_vec(),
        ..bench.spec(&GUESTS, LINK)?
    };
    for (guest, (size, rate)) in spec.guests.iter_mut().zip(disks) {
        guest.disk = Some(disk(size, rate));
    }
    let lab = bench.lab(spec)?;
    let mut done = Vec::new();
    let mut at = 0;
    for turn in 0..turns {
        let mut order = POLICIES;
        order.rotate_left(turn % POLICIES.len());
        for policy in order {
            let app = lab.application(&lab.spec.hosts[at], &lab.spec.hosts[1 - at])?;
            let moved = carry_out(&lab, &app, policy, bench.interrupt, None)?;
            at = 1 - at;
            bench.say(&format!(
                "disks {}/{turns}: {policy} {:.2} s, bulk copies ended within {:.1} %, split {:.2} s",
                turn + 1,
                moved.report.total_s,
                spread_percent(&moved),
                moved.report.split_s
            ));
            done.push((policy, moved));
        }
    }
    Ok(done)
}

/// How far apart the ends of the bulk copies are, in percent of the time from the first start to the
/// last end.
fn spread_percent(moved: &Moved) -> f64 {
    let vms = moved.report.vms.iter();
    let entered = vms.filter_map(|vm| {
        let mut history = vm.history.iter();
        history.find(|entry| entry.phase == Phase::Precopy)
    });
    let start = entered.map(|entry| entry.at_us).min();
    let (first, last) = (moved.copied_us.iter().min(), moved.copied_us.iter().max());
    match (start, first, last) {
        (Some(start), Some(&first), Some(&last)) if last > start => {
            100.0 * micros(last - first) / micros(last - start)
        }
        _ => f64::NAN,
    }
}

#[allow(clippy::cast_precision_loss, reason = "the time of one move")]
fn micros(time: i64) -> f64 {
    time as f64
}

/// Downtimes in ms of a guest with and without its disk, in pairs.
fn added_downtime(bench: &Bench<'_>) -> Result<Vec<(f64, f64)>> {
    let (pairs, size) = if bench.quick { (1, 8) } else { (5, 48) };
    let make = |with_disk: bool| {
        let mut spec = bench.spec(&[ALONE], SLOW_LINK)?;
        spec.settings = vec![format!("max-downtime = \"{MAX_DOWNTIME}\"")];
        if with_disk {
            spec.guests[0].disk = Some(disk(size, WRITTEN));
        }
        bench.lab(spec)
    };
    let labs = [make(false)?, make(true)?];
    let mut done = Vec::new();
    for pair in 0..pairs {
        let mut times = [0.0; 2];
        for (lab, time) in labs.iter().zip(&mut times) {
            let hosts = [&lab.spec.hosts[pair % 2], &lab.spec.hosts[1 - pair % 2]];
            let app = lab.application(hosts[0], hosts[1])?;
            let moved = carry_out(lab, &app, Policy::Muster, bench.interrupt, None)?;
            *time = ms(moved.longest_downtime());
        }
        bench.say(&format!(
            "disks, downtime {}/{pairs}: {:.0} ms without a disk, {:.0} ms with",
            pair + 1,
            times[0],
            times[1]
        ));
        done.push((times[0], times[1]));
    }
    Ok(done)
}

type Told = (&'static str, &'static str, fn(&Moved) -> f64);

const TOLD: [Told; 6] = [
    ("total time", "s", |moved| moved.report.total_s),
    ("sent", "MiB", |moved| {
        float(moved.report.sent_bytes) / 1_048_576.0
    }),
    ("split time", "s", |moved| moved.report.split_s),
    ("impact", "MB", |moved| moved.report.impact_bytes / 1e6),
    ("downtime", "ms", |moved| ms(moved.longest_downtime())),
    ("bulk copies ended within", "%", spread_percent),
];

fn section(moves: &[(Policy, Moved)], added: &[(f64, f64)]) -> Section {
    let disks = DISKS.map(|(size, rate)| format!("{size} MiB at {} kB/s", rate / 1000));
    let setup = format!(
        "{} with disks of {} over {LINK}, max-downtime {MAX_DOWNTIME}; sequential, parallel and muster \
         in rotating order. Impact: Eq. 1 of COMMA. Added downtime: {ALONE} over {SLOW_LINK} (10 MB/s), \
         in pairs without and with a disk written at 2 MB/s.",
        GUESTS.join(", "),
        disks.join(", "),
    );
    let mut section = Section::new("disks", "local disks", setup);
    let of = |policy: Policy, value: &dyn Fn(&Moved) -> f64| -> Vec<f64> {
        let moves = moves.iter().filter(|one| one.0 == policy);
        moves.map(|one| value(&one.1)).collect()
    };
    let muster = |what, unit, value: &dyn Fn(&Moved) -> f64, bound| {
        let values = of(Policy::Muster, value);
        Figure::bounded(what, unit, &values, Statistic::Max, Bound::AtMost(bound))
    };
    let total = |policy| of(policy, &|moved: &Moved| moved.report.total_s);
    let pairs = total(Policy::Muster)
        .into_iter()
        .zip(total(Policy::Parallel));
    let ratios: Vec<f64> = pairs.map(|(muster, parallel)| muster / parallel).collect();
    let differences: Vec<f64> = added.iter().map(|(without, with)| with - without).collect();
    let median = |what: &str, unit, values: &[f64], bound| {
        Figure::bounded(what, unit, values, Statistic::Median, Bound::AtMost(bound))
    };
    section.figures = vec![
        muster("bulk copies end within, muster", "%", &spread_percent, 2.0),
        muster(
            "split time, muster",
            "s",
            &|m: &Moved| m.report.split_s,
            0.0,
        ),
        muster(
            "impact, muster",
            "MB",
            &|moved: &Moved| moved.report.impact_bytes / 1e6,
            NO_IMPACT_MB,
        ),
        median("total time, muster / parallel", "", &ratios, 1.05),
        median("downtime that a disk adds", "ms", &differences, 50.0),
    ];
    for (what, unit, value) in TOLD {
        for policy in POLICIES {
            let what = format!("{policy}: {what}");
            let values = of(policy, &value);
            section.figures.push(Figure::told(what, unit, &values));
        }
    }
    let row = |(policy, moved): &(Policy, Moved)| {
        let mut row = vec![policy.to_string()];
        row.extend(TOLD.map(|(_, _, value)| number(value(moved))));
        row
    };
    section.tables.push(Table {
        title: "Every move".to_owned(),
        columns: vec![
            "policy",
            "total, s",
            "sent, MiB",
            "split, s",
            "impact, MB",
            "downtime, ms",
            "bulk ends, %",
        ],
        rows: moves.iter().map(row).collect(),
    });
    section
}
