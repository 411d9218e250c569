//! `policies` and `policies-hot`: every policy, in turns, on the same guests over the same link: what a
//! move takes, what it sends, for how long the application is split, and how well its completion was
//! predicted.

use anyhow::{Context, Result};
use coordinator::application::Policy;
use coordinator::report::predicted::Compared;
use rate_limiter::BytesPerSecond;

use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::watch::{Moved, carry_out};
use super::{Bench, float, ms};
use crate::lab::LabSpec;

const LINK: &str = "400Mbit/s";
const MAX_DOWNTIME: &str = "300ms";
const TURNS: usize = 4;
/// Who talks to whom, in bytes per second.
const TRAFFIC: [(&str, &str, u64); 2] = [("web", "app", 200_000), ("app", "db", 500_000)];
/// An impact that is 0 with the two digits of MB that COMMA's tables have. Exactly 0 takes RESUMEs in
/// the same microsecond.
const NO_IMPACT_MB: f64 = 0.005;

/// Guests, and what is promised of them.
struct Set {
    name: &'static str,
    title: &'static str,
    guests: [&'static str; 3],
    quick_guests: [&'static str; 3],
    bounds: fn(&[Turn]) -> Vec<Figure>,
}

const CALM: Set = Set {
    name: "policies",
    title: "every policy on the same guests",
    guests: [
        "web:128MiB:1MB/s:4MiB",
        "app:256MiB:4MB/s:16MiB",
        "db:512MiB:10MB/s:48MiB",
    ],
    quick_guests: [
        "web:16MiB:1MB/s:4MiB",
        "app:24MiB:2MB/s:4MiB",
        "db:40MiB:4MB/s:8MiB",
    ],
    bounds: calm_bounds,
};

/// Working sets of a sixteenth of the memory, written faster than a round lasts; together the guests
/// dirty three quarters of what the link carries.
const HOT: Set = Set {
    name: "policies-hot",
    title: "every policy on guests with small, saturated working sets",
    guests: [
        "web:64MiB:8MB/s:4MiB",
        "app:96MiB:12MB/s:6MiB",
        "db:160MiB:16MB/s:10MiB",
    ],
    quick_guests: [
        "web:16MiB:8MB/s:1MiB",
        "app:32MiB:12MB/s:2MiB",
        "db:48MiB:16MB/s:3MiB",
    ],
    bounds: hot_bounds,
};

/// One move per policy, in the order of [`Policy::ALL`].
struct Turn(Vec<(Policy, Moved)>);

impl Turn {
    fn of(&self, policy: Policy) -> Option<&Moved> {
        let mut moves = self.0.iter();
        moves.find(|one| one.0 == policy).map(|one| &one.1)
    }
}

/// Runs `policies`.
///
/// # Errors
/// A move fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    run_set(bench, &CALM)
}

/// Runs `policies-hot`.
///
/// # Errors
/// A move fails.
pub fn run_hot(bench: &Bench<'_>) -> Result<Section> {
    run_set(bench, &HOT)
}

fn run_set(bench: &Bench<'_>, set: &Set) -> Result<Section> {
    let (turns, guests) = if bench.quick {
        (1, &set.quick_guests)
    } else {
        (TURNS, &set.guests)
    };
    let traffic = TRAFFIC.map(|(a, b, rate)| (a.to_owned(), b.to_owned(), BytesPerSecond(rate)));
    let lab = bench.lab(LabSpec {
        settings: vec![format!("max-downtime = \"{MAX_DOWNTIME}\"")],
        traffic: traffic.to_vec(),
        ..bench.spec(guests, LINK)?
    })?;
    let mut done = Vec::new();
    let mut at = 0;
    for turn in 0..turns {
        // Each is first, second, ... equally often, as far as there are as many turns.
        let mut order = Policy::ALL.to_vec();
        let policies = order.len();
        order.rotate_left(turn % policies);
        let mut moves = Vec::new();
        for policy in order {
            let app = lab.application(&lab.spec.hosts[at], &lab.spec.hosts[1 - at])?;
            let moved = carry_out(&lab, &app, policy, bench.interrupt, None)?;
            at = 1 - at;
            let report = &moved.report;
            bench.say(&format!(
                "{} {}/{turns}: {policy} {:.2} s, {:.0} MiB, split {:.2} s, predicted {}",
                set.name,
                turn + 1,
                report.total_s,
                mib(report.sent_bytes),
                report.split_s,
                predicted(report.prediction.completion_s)
            ));
            moves.push((policy, moved));
        }
        moves.sort_by_key(|one| Policy::ALL.iter().position(|policy| *policy == one.0));
        done.push(Turn(moves));
    }
    section(set, &done, guests)
}

fn predicted(compared: Option<Compared>) -> String {
    compared.map_or_else(|| "–".to_owned(), |one| format!("{:.2} s", one.predicted))
}

/// Of each turn in which both were carried out.
fn ratios(done: &[Turn], one: Policy, other: Policy, value: fn(&Moved) -> f64) -> Vec<f64> {
    let ratio = |turn: &Turn| Some(value(turn.of(one)?) / value(turn.of(other)?));
    done.iter().filter_map(ratio).collect()
}

fn values(done: &[Turn], policy: Policy, value: impl Fn(&Moved) -> f64) -> Vec<f64> {
    let moves = done.iter().filter_map(|turn| turn.of(policy));
    moves.map(value).collect()
}

fn total_s(moved: &Moved) -> f64 {
    moved.report.total_s
}

fn sent_mib(moved: &Moved) -> f64 {
    mib(moved.report.sent_bytes)
}

fn impact_mb(moved: &Moved) -> f64 {
    moved.report.impact_bytes / 1e6
}

/// `muster` against another policy.
fn against(
    done: &[Turn],
    other: Policy,
    what: &str,
    value: fn(&Moved) -> f64,
    bound: f64,
) -> Figure {
    let what = format!("{what}, muster / {other}");
    let ratios = ratios(done, Policy::Muster, other, value);
    Figure::bounded(what, "", &ratios, Statistic::Median, Bound::AtMost(bound))
}

fn calm_bounds(done: &[Turn]) -> Vec<Figure> {
    let most = |what, unit, value: fn(&Moved) -> f64, bound| {
        let values = values(done, Policy::Muster, value);
        Figure::bounded(what, unit, &values, Statistic::Max, Bound::AtMost(bound))
    };
    let errors = errors_percent(done, Policy::Muster);
    let errors: Vec<f64> = errors.into_iter().map(f64::abs).collect();
    vec![
        most("split time, muster", "s", |moved| moved.report.split_s, 0.0),
        most("impact, muster", "MB", impact_mb, NO_IMPACT_MB),
        Figure::bounded(
            "predicted completion, muster: error",
            "%",
            &errors,
            Statistic::Median,
            Bound::AtMost(10.0),
        ),
        against(done, Policy::Parallel, "total time", total_s, 1.05),
        against(done, Policy::Parallel, "bytes sent", sent_mib, 1.05),
        against(done, Policy::Lll, "total time", total_s, 1.02),
    ]
}

fn hot_bounds(done: &[Turn]) -> Vec<Figure> {
    vec![
        against(done, Policy::Lll, "total time", total_s, 0.85),
        against(done, Policy::Lll, "bytes sent", sent_mib, 0.85),
    ]
}

/// (predicted − actual) / actual of the completion time, in percent, where it was predicted.
fn errors_percent(done: &[Turn], policy: Policy) -> Vec<f64> {
    let moves = done.iter().filter_map(|turn| turn.of(policy));
    let error = |moved: &Moved| moved.report.prediction.completion_s?.error_percent;
    moves.filter_map(error).collect()
}

/// What is told of every policy: its name, its unit, its value.
type Told = (&'static str, &'static str, fn(&Moved) -> f64);

const TOLD: [Told; 5] = [
    ("total time", "s", total_s),
    ("sent", "MiB", sent_mib),
    ("split time", "s", |moved| moved.report.split_s),
    ("impact", "MB", impact_mb),
    ("downtime", "ms", |moved| ms(moved.longest_downtime())),
];

fn section(set: &Set, done: &[Turn], guests: &[&str]) -> Result<Section> {
    let policies = Policy::ALL.map(Policy::as_str).join(", ");
    let traffic = TRAFFIC.map(|(a, b, rate)| format!("{a}-{b} {} kB/s", rate / 1000));
    let setup = format!(
        "{} over {LINK}, max-downtime {MAX_DOWNTIME}; traffic {}; {} turns of one move each by \
         {policies}, their order rotating. Impact: Eq. 1 of COMMA, of the RESUMEs. Downtime: of the \
         guest that stood longest, by its ticks. Predicted: what `muster plan` says, from the \
         guests' memory, dirty rate and working set as they were asked for.",
        guests.join(", "),
        traffic.join(", "),
        done.len(),
    );
    let mut section = Section::new(set.name, set.title, setup);
    section.figures = (set.bounds)(done);
    for (what, unit, value) in TOLD {
        for policy in Policy::ALL {
            let values = values(done, policy, value);
            let what = format!("{policy}: {what}");
            section.figures.push(Figure::told(what, unit, &values));
        }
    }
    for policy in Policy::ALL {
        let errors = errors_percent(done, policy);
        if errors.is_empty() {
            let first = done.first().and_then(|turn| turn.of(policy));
            let report = &first.context("a turn without this policy")?.report;
            let reason = report.prediction.reason.as_deref().unwrap_or_default();
            section
                .notes
                .push(format!("{policy} was not predicted: {reason}"));
        } else {
            let what = format!("{policy}: predicted completion, error");
            section.figures.push(Figure::told(what, "%", &errors));
        }
    }
    section.tables.push(every_move(done));
    Ok(section)
}

fn every_move(done: &[Turn]) -> Table {
    let moves = done
        .iter()
        .enumerate()
        .flat_map(|(turn, moves)| moves.0.iter().map(move |one| (turn, one)));
    let row = |(turn, (policy, moved)): (usize, &(Policy, Moved))| {
        let mut row = vec![(turn + 1).to_string(), policy.to_string()];
        row.extend(TOLD.map(|(_, _, value)| number(value(moved))));
        let completion = moved.report.prediction.completion_s;
        row.push(completion.map_or_else(|| "–".to_owned(), |one| number(one.predicted)));
        row
    };
    Table {
        title: "Every move".to_owned(),
        columns: vec![
            "turn",
            "policy",
            "total, s",
            "sent, MiB",
            "split, s",
            "impact, MB",
            "downtime, ms",
            "predicted, s",
        ],
        rows: moves.map(row).collect(),
    }
}

fn mib(bytes: u64) -> f64 {
    float(bytes) / 1_048_576.0
}
