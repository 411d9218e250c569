//! `moves`: three VMs there and back; together they go, one by one they return.
//!
//! Each pair is three moves of one VM (a to b) and one move of the group (b to a) right after, so
//! that "the slowest VM moved alone" is measured beside the group it is compared with.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use coordinator::application::Policy;
use sidecar::protocol::types::QemuBuild;

use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::stats;
use super::watch::{Moved, carry_out};
use super::{Bench, ms};
use crate::lab::{Lab, LabSpec};
use crate::qemu::installed;

const GUESTS: [&str; 3] = [
    "web:24MiB:1MB/s:4MiB",
    "app:40MiB:4MB/s:8MiB",
    "db:64MiB:10MB/s:16MiB",
];
const LINK: &str = "400Mbit/s";
const MAX_DOWNTIME: &str = "300ms";
const PINGS: usize = 50;

/// What is asked of a kind of QEMU.
struct Bounds {
    /// What the group may take beyond what one VM alone takes, without the round trip.
    allowance: Duration,
    /// Median; its 95th percentile may be three times as large.
    resume_skew_ms: f64,
    /// Likewise, where it is bounded: an armed QEMU that is not patched spins, and others stop
    /// later for it.
    stop_skew_ms: Option<f64>,
}

impl Bounds {
    fn of(build: QemuBuild) -> Self {
        match build {
            QemuBuild::Patched => Self {
                allowance: Duration::from_millis(5),
                resume_skew_ms: 2.0,
                stop_skew_ms: Some(5.0),
            },
            _ => Self {
                allowance: Duration::from_millis(20),
                resume_skew_ms: 5.0,
                stop_skew_ms: None,
            },
        }
    }
}

/// The numbers of one pair.
struct Pair {
    group: Moved,
    slowest_alone: Duration,
}

impl Pair {
    /// How far the group's downtime is from its bound; negative is inside.
    fn excess_ms(&self, round_trip: Duration, bounds: &Bounds) -> f64 {
        let allowed = bounds.allowance + round_trip;
        let bound = self.slowest_alone.max(self.group.predicted()) + allowed;
        ms(self.group.group_downtime()) - ms(bound)
    }
}

/// Runs it.
///
/// # Errors
/// A move fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let pairs = if bench.quick { 2 } else { 20 };
    let lab = bench.lab(LabSpec {
        settings: vec![format!("max-downtime = \"{MAX_DOWNTIME}\"")],
        ..bench.spec(&GUESTS, LINK)?
    })?;
    let round_trip = round_trip(&lab)?;
    let mut done = Vec::new();
    for index in 1..=pairs {
        let pair = one_pair(bench, &lab)?;
        bench.say(&format!(
            "moves {index}/{pairs}: group downtime {:.0} ms (alone {:.0}, left {:.0}), resume skew {:.1} ms",
            ms(pair.group.group_downtime()),
            ms(pair.slowest_alone),
            ms(pair.group.predicted()),
            pair.group.report.resume_skew_s * 1e3,
        ));
        done.push(pair);
    }
    Ok(section(&done, round_trip, &Bounds::of(installed()?.build)))
}

fn one_pair(bench: &Bench<'_>, lab: &Lab) -> Result<Pair> {
    let [a, b] = [&lab.spec.hosts[0], &lab.spec.hosts[1]];
    let mut slowest_alone = Duration::ZERO;
    for guest in &lab.spec.guests {
        let app = lab.application_of(&[&guest.name], a, b)?;
        let moved = carry_out(lab, &app, Policy::Muster, bench.interrupt, None)?;
        slowest_alone = slowest_alone.max(moved.longest_downtime());
    }
    let app = lab.application(b, a)?;
    let group = carry_out(lab, &app, Policy::Muster, bench.interrupt, None)?;
    Ok(Pair {
        group,
        slowest_alone,
    })
}

fn section(done: &[Pair], round_trip: Duration, bounds: &Bounds) -> Section {
    let guests = GUESTS.join(", ");
    let setup = format!(
        "{guests} over {LINK}, max-downtime {MAX_DOWNTIME}. {} pairs: each VM alone from a to b, \
         then the group from b to a. Group downtime: from the first guest's last tick at the \
         source to the last guest's first tick at the destination. Round trip of the idle link: \
         {} ms.",
        done.len(),
        number(ms(round_trip)),
    );
    let mut section = Section::new("moves", "three VMs, together or not at all", setup);
    let of = |value: &dyn Fn(&Pair) -> f64| done.iter().map(value).collect::<Vec<f64>>();
    let skew = of(&|pair| pair.group.report.resume_skew_s * 1e3);
    let stop_skew = of(&|pair| pair.group.report.stop_skew_s * 1e3);
    let excess = of(&|pair| pair.excess_ms(round_trip, bounds));
    let inside = excess.iter().filter(|excess| **excess <= 0.0).count();
    section.figures = vec![
        Figure::bounded(
            "split time",
            "ms",
            &of(&|pair| pair.group.report.split_s * 1e3),
            Statistic::Max,
            Bound::AtMost(0.0),
        ),
        Figure::bounded(
            "group downtime less its bound",
            "ms",
            &excess,
            Statistic::Median,
            Bound::AtMost(0.0),
        ),
        Figure::told(
            "group downtime",
            "ms",
            &of(&|pair| ms(pair.group.group_downtime())),
        ),
        Figure::told(
            "longest downtime of a guest",
            "ms",
            &of(&|pair| ms(pair.group.longest_downtime())),
        ),
        Figure::told(
            "slowest VM moved alone",
            "ms",
            &of(&|pair| ms(pair.slowest_alone)),
        ),
        Figure::told(
            "Σ remaining / bandwidth",
            "ms",
            &of(&|pair| ms(pair.group.predicted())),
        ),
        Figure::told("total time", "s", &of(&|pair| pair.group.report.total_s)),
    ];
    let figures = &mut section.figures;
    figures.extend(skews("resume skew", &skew, bounds.resume_skew_ms));
    match bounds.stop_skew_ms {
        Some(limit_ms) => figures.extend(skews("stop skew", &stop_skew, limit_ms)),
        None => figures.push(Figure::told("stop skew", "ms", &stop_skew)),
    }
    section.notes.push(format!(
        "The group's downtime was within max(slowest VM alone, Σ remaining / bandwidth) + {} ms + \
         one round trip in {inside} of {} moves.",
        bounds.allowance.as_millis(),
        done.len()
    ));
    section.tables.push(table(done));
    section
}

/// A skew, whose median has a limit, and its 95th percentile one of three times that.
fn skews(name: &str, values: &[f64], limit_ms: f64) -> [Figure; 2] {
    let p95 = format!("{name}, p95");
    let (median, rarely) = (Bound::AtMost(limit_ms), Bound::AtMost(3.0 * limit_ms));
    [
        Figure::bounded(name, "ms", values, Statistic::Median, median),
        Figure::bounded(p95, "ms", values, Statistic::P95, rarely),
    ]
}

fn table(done: &[Pair]) -> Table {
    let row = |(index, pair): (usize, &Pair)| {
        let report = &pair.group.report;
        let left: u64 = report
            .vms
            .iter()
            .filter_map(|vm| vm.remaining_at_release_bytes)
            .sum();
        let cells = [
            ms(pair.group.group_downtime()),
            ms(pair.group.longest_downtime()),
            ms(pair.slowest_alone),
            ms(pair.group.predicted()),
        ];
        let mut row = vec![(index + 1).to_string()];
        row.extend(cells.map(number));
        row.push((left >> 10).to_string());
        row.extend([
            pair.group.stages_ms().map(number).join(" + "),
            number(report.stop_skew_s * 1e3),
            number(report.resume_skew_s * 1e3),
            number(report.split_s * 1e3),
            number(report.total_s),
        ]);
        row
    };
    Table {
        title: "Every move of the group (times in ms, total in s; of its downtime: last tick to STOP, to `continue`, to the last \
                ARRIVED, to the last RESUME, to the first tick)".to_owned(),
        columns: vec![
            "move",
            "group downtime",
            "longest guest",
            "slowest alone",
            "Σ left / B",
            "left, KiB",
            "before + stopping + copying + deciding + after",
            "stop skew",
            "resume skew",
            "split",
            "total, s",
        ],
        rows: done.iter().enumerate().map(row).collect(),
    }
}

/// Median time of one byte there and back over the idle link.
fn round_trip(lab: &Lab) -> Result<Duration> {
    let [a, b] = [&lab.spec.hosts[0], &lab.spec.hosts[1]];
    let (from, to) = (lab.network.host(a)?, lab.network.host(b)?);
    let listener = to
        .enter(|| TcpListener::bind((to.address(), 0)))?
        .context("cannot listen for a ping")?;
    let address = listener.local_addr()?;
    let mut near =
        from.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(2)))??;
    let (mut far, _) = listener.accept()?;
    for end in [&near, &far] {
        end.set_nodelay(true)?;
        end.set_read_timeout(Some(Duration::from_secs(2)))?;
    }
    let echo = std::thread::spawn(move || {
        let mut byte = [0];
        while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
    });
    let mut times = Vec::new();
    for _ in 0..PINGS {
        let begin = Instant::now();
        near.write_all(&[0])?;
        near.read_exact(&mut [0])?;
        times.push(begin.elapsed().as_secs_f64());
    }
    drop(near);
    let _ = echo.join();
    Ok(Duration::from_secs_f64(stats::median(&times)))
}
