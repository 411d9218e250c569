//! `hot`: guests that dirty their working sets faster than the link carries them. When does
//! pre-copy end, and what does it cost?
//!
//! In turns, on the same guests: intelligent termination (rounds that send no more than is dirtied
//! meanwhile end pre-copy), the rule that VMbuddies compares with (Xen's: at most 30 rounds, at
//! most 3 times the memory), and QEMU by itself with auto-converge, which is given as its
//! downtime-limit the downtime that intelligent termination has reached in the same turn. The last
//! one knows in advance what the others have to find out; so a fourth move is told it, too.

mod alone;

use std::time::Duration;

use anyhow::{Context, Result};
use coordinator::application::Policy;
use sidecar::protocol::command::Termination;
use sidecar::protocol::types::Phase;

use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::watch::{Stood, carried, carry_out};
use super::{Bench, float, ms};
use crate::clock::Micros;
use crate::guest::GuestSpec;
use crate::lab::{Lab, LabSpec};
use alone::Alone;

const GUESTS: [&str; 3] = [
    "web:64MiB:30MB/s:6MiB",
    "app:96MiB:45MB/s:10MiB",
    "db:128MiB:60MB/s:16MiB",
];
const QUICK_GUESTS: [&str; 3] = [
    "web:16MiB:15MB/s:4MiB",
    "app:24MiB:15MB/s:6MiB",
    "db:32MiB:20MB/s:8MiB",
];
const LINK: &str = "400Mbit/s";
const TURNS: usize = 6;
/// Less than the working sets take to cross.
const MAX_DOWNTIME: &str = "100ms";
/// How long the guests are watched before each move.
const BEFORE: Duration = Duration::from_secs(2);
const QUICK_BEFORE: Duration = Duration::from_millis(500);

/// What one move cost.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// Over the link, from host to host.
    sent_mib: f64,
    /// From the begin of pre-copy to the last guest's first tick at the destination.
    seconds: f64,
    /// The longest that a guest stood still.
    downtime_ms: f64,
    /// Ticks per second until the guest stopped, against those before; the slowest guest's.
    speed_percent: f64,
    /// The longest time without a tick until the guest stopped; the worst guest's.
    gap_ms: f64,
}

/// Who ends pre-copy.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rule {
    Intelligent,
    Static,
    /// Intelligent, with another max-downtime.
    Told(Duration),
    /// QEMU by itself, with this downtime-limit.
    Alone(Duration),
}

struct Turn {
    intelligent: Cost,
    fixed: Cost,
    told: Cost,
    alone: Cost,
    throttled_percent: u64,
}

/// Guests that go to and fro.
struct Guests<'a> {
    bench: &'a Bench<'a>,
    lab: Lab,
    alone: Alone,
    /// Index of the host where they are.
    at: usize,
    throttled_percent: u64,
}

/// Runs it.
///
/// # Errors
/// A move fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (turns, guests) = if bench.quick {
        (1, QUICK_GUESTS)
    } else {
        (TURNS, GUESTS)
    };
    let lab = bench.lab(LabSpec {
        settings: vec![
            format!("max-downtime = \"{MAX_DOWNTIME}\""),
            "downtime-limit-hard = \"20s\"".to_owned(),
            "on-non-convergence = \"force\"".to_owned(),
            "horizon = \"0s\"".to_owned(),
        ],
        ..bench.spec(&guests, LINK)?
    })?;
    let mut moved = Guests {
        bench,
        lab,
        alone: Alone::default(),
        at: 0,
        throttled_percent: 0,
    };
    let mut done = Vec::new();
    for index in 0..turns {
        bench.say(&format!("hot {}/{turns}", index + 1));
        // Each is before and after the others equally often, as far as the downtime must be known.
        let (intelligent, fixed) = if index % 2 == 0 {
            let intelligent = moved.go(Rule::Intelligent)?;
            (intelligent, moved.go(Rule::Static)?)
        } else {
            let fixed = moved.go(Rule::Static)?;
            (moved.go(Rule::Intelligent)?, fixed)
        };
        let limit = Duration::from_secs_f64(intelligent.downtime_ms / 1e3);
        let (told, alone) = if index % 2 == 0 {
            let told = moved.go(Rule::Told(limit))?;
            (told, moved.go(Rule::Alone(limit))?)
        } else {
            let alone = moved.go(Rule::Alone(limit))?;
            (moved.go(Rule::Told(limit))?, alone)
        };
        done.push(Turn {
            intelligent,
            fixed,
            told,
            alone,
            throttled_percent: moved.throttled_percent,
        });
    }
    Ok(section(&done, &guests))
}

impl Guests<'_> {
    /// Moves them to the other host.
    fn go(&mut self, rule: Rule) -> Result<Cost> {
        let before = self.speeds()?;
        let sent = carried(&self.lab, self.at)?;
        let (begun, stood) = match rule {
            Rule::Alone(limit) => self.by_themselves(limit)?,
            _ => self.by_coordinator(rule)?,
        };
        let sent = carried(&self.lab, self.at)? - sent;
        self.at = 1 - self.at;
        let cost = cost(&before, sent, begun, &stood);
        self.bench.say(&format!(
            "  {rule:.0?}: {:.0} MiB, {:.2} s, downtime {:.0} ms, speed {:.2} %",
            cost.sent_mib, cost.seconds, cost.downtime_ms, cost.speed_percent
        ));
        Ok(cost)
    }

    /// Ticks per second of each guest, left alone.
    fn speeds(&self) -> Result<Vec<f64>> {
        let begin = Micros::now();
        let quick = self.bench.quick;
        let time = if quick { QUICK_BEFORE } else { BEFORE };
        self.bench.interrupt.sleep(time)?;
        let speed = |guest: &GuestSpec| {
            let gaps = self.lab.ticks.record_since(&guest.name, begin).gaps();
            let gaps = gaps.with_context(|| format!("{} does not tick", guest.name))?;
            Ok(gaps.hz)
        };
        self.lab.spec.guests.iter().map(speed).collect()
    }

    fn by_themselves(&mut self, limit: Duration) -> Result<(Micros, Vec<Stood>)> {
        let hosts = &self.lab.spec.hosts;
        let ends = [self.at, 1 - self.at].map(|host| hosts[host].as_str());
        let moved = self.alone.migrate(&self.lab, ends, limit)?;
        self.throttled_percent = moved.throttled_percent;
        Ok((moved.begun, moved.stood))
    }

    fn by_coordinator(&self, rule: Rule) -> Result<(Micros, Vec<Stood>)> {
        let hosts = &self.lab.spec.hosts;
        let mut app = self.lab.application(&hosts[self.at], &hosts[1 - self.at])?;
        match rule {
            Rule::Static => app.termination = Termination::XEN,
            Rule::Told(limit) => app.max_downtime = limit,
            Rule::Intelligent | Rule::Alone(_) => {}
        }
        let moved = carry_out(&self.lab, &app, Policy::Muster, self.bench.interrupt, None)?;
        let ends = moved.report.vms.iter().map(|vm| {
            let (rounds, held) = (vm.rounds.len(), vm.held_s);
            let reason = vm.hold_reason;
            format!("{} {rounds} rounds, {reason:?}, held {held:.2} s", vm.name)
        });
        let ends = ends.collect::<Vec<_>>().join("; ");
        self.bench.say(&format!("  {ends}"));
        let histories = moved.report.vms.iter().flat_map(|vm| &vm.history);
        let begun = histories.filter(|entry| entry.phase == Phase::Precopy);
        let begun = begun.map(|entry| entry.at_us).min();
        let begun = begun.and_then(|at_us| u64::try_from(at_us).ok());
        let begun = Micros::from_unix_us(begun.context("pre-copy did not begin")?);
        Ok((begun, moved.stood))
    }
}

fn cost(before: &[f64], sent_bytes: u64, begun: Micros, stood: &[Stood]) -> Cost {
    let end = stood.iter().map(|one| one.first).max().unwrap_or(begun);
    let downtime = stood.iter().map(|one| one.downtime).max();
    let speeds = stood
        .iter()
        .zip(before)
        .map(|(one, hz)| one.until_then.hz / hz * 100.0);
    Cost {
        sent_mib: float(sent_bytes) / 1_048_576.0,
        seconds: end.since(begun).as_secs_f64(),
        downtime_ms: ms(downtime.unwrap_or_default()),
        speed_percent: speeds.fold(f64::INFINITY, f64::min),
        gap_ms: stood
            .iter()
            .map(|one| one.until_then.max_ms)
            .fold(0.0, f64::max),
    }
}

fn section(done: &[Turn], guests: &[&str]) -> Section {
    let setup = format!(
        "{} over {LINK}; {} turns of four moves each. Intelligent termination with its default \
         bounds, and the static rule (30 rounds, 3 times the memory) by the coordinator, with \
         max-downtime {MAX_DOWNTIME}, which none of them can keep, on-non-convergence = force and \
         horizon = 0s. QEMU by itself: the same QEMU without a capability of the series, three TCP \
         migrations at once, auto-converge, downtime-limit as that turn's intelligent termination \
         had it; `told` is intelligent termination with the same as its max-downtime. Bytes: what the source's host sent over the link. Time: from the begin of pre-copy \
         to the last guest's first tick at the destination. Downtime: of the guest that stood \
         longest. Speed: ticks per second until the guest stopped against those before the move, \
         of the slowest guest.",
        guests.join(", "),
        done.len(),
    );
    let mut section = Section::new(
        "hot",
        "guests that dirty faster than the link carries",
        setup,
    );
    let of = |value: &dyn Fn(&Turn) -> f64| done.iter().map(value).collect::<Vec<f64>>();
    let bounded = |what, values: Vec<f64>, bound| {
        Figure::bounded(what, "", &values, Statistic::Median, Bound::AtMost(bound))
    };
    section.figures = vec![
        bounded(
            "bytes, intelligent / static rule",
            of(&|turn| turn.intelligent.sent_mib / turn.fixed.sent_mib),
            0.70,
        ),
        bounded(
            "time, intelligent / static rule",
            of(&|turn| turn.intelligent.seconds / turn.fixed.seconds),
            0.70,
        ),
        bounded(
            "time, intelligent / QEMU alone with auto-converge",
            of(&|turn| turn.intelligent.seconds / turn.alone.seconds),
            1.05,
        ),
        Figure::told(
            "time, intelligent and told / QEMU alone with auto-converge",
            "",
            &of(&|turn| turn.told.seconds / turn.alone.seconds),
        ),
        Figure::told(
            "bytes, intelligent / QEMU alone",
            "",
            &of(&|turn| turn.intelligent.sent_mib / turn.alone.sent_mib),
        ),
    ];
    type Of = fn(&Turn) -> Cost;
    let kinds: [(&str, Of); 4] = [
        ("intelligent", |turn| turn.intelligent),
        ("static rule", |turn| turn.fixed),
        ("told", |turn| turn.told),
        ("QEMU alone", |turn| turn.alone),
    ];
    type Value = fn(&Cost) -> f64;
    let values: [(&str, &str, Value); 5] = [
        ("sent", "MiB", |cost| cost.sent_mib),
        ("time", "s", |cost| cost.seconds),
        ("downtime", "ms", |cost| cost.downtime_ms),
        ("speed", "%", |cost| cost.speed_percent),
        ("longest time without a tick", "ms", |cost| cost.gap_ms),
    ];
    for (what, unit, value) in values {
        for (who, kind) in kinds {
            let values = of(&|turn| value(&kind(turn)));
            section
                .figures
                .push(Figure::told(format!("{who}: {what}"), unit, &values));
        }
    }
    section.figures.push(Figure::told(
        "QEMU alone: most that a guest was throttled",
        "%",
        &of(&|turn| float(turn.throttled_percent)),
    ));
    section.tables.push(Table {
        title: "Every move".to_owned(),
        columns: vec![
            "turn",
            "rule",
            "sent, MiB",
            "time, s",
            "downtime, ms",
            "speed, %",
            "longest gap, ms",
        ],
        rows: done
            .iter()
            .enumerate()
            .flat_map(|(index, turn)| {
                kinds.map(|(who, kind)| {
                    let cost = kind(turn);
                    let mut row = vec![(index + 1).to_string(), who.to_owned()];
                    row.extend(values.map(|(_, _, value)| number(value(&cost))));
                    row
                })
            })
            .collect(),
    });
    section
}
