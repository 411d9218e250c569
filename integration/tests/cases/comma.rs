//! COMMA's two stages: everything once, then groups in turn.

use anyhow::{Context, Result, ensure};
use coordinator::application::Policy;
use coordinator::engine::Step;
use coordinator::observer::{GroupName, Observer};
use coordinator::report::{AdaptationKind, GroupMove, MoveReport, Outcome, VmMove};
use rate_limiter::BytesPerSecond;
use sidecar::protocol::types::Phase;
use testbed::clock::Micros;
use testbed::qemu::Accel;

use super::groups::{check_all, go, lab, nothing_left, spec};

/// Any two of these fit the link but for the last two.
const GUESTS: [&str; 3] = [
    "web:32MiB:1MB/s:2MiB",
    "one:64MiB:10MB/s:8MiB",
    "two:48MiB:10MB/s:8MiB",
];
const LINK: u64 = 20_000_000;
/// Bulk copies may end so far apart, as a part of the time that they take. Beside rates that are
/// adjusted there are rounds that are seen up to 0.1 s late.
const SPREAD: f64 = 0.1;
/// What is underway, and in buffers, when a VM is parked.
const UNDERWAY: u64 = 3 << 20;
const PARKED: u64 = 65_536;

/// When each group had copied everything, and when its turn came: unix time in microseconds.
#[derive(Default)]
struct Turns(Vec<(Vec<String>, Step, i64)>);

impl Observer for Turns {
    fn step(&mut self, group: &GroupName, step: &Step) {
        if matches!(step, Step::Copied | Step::Turn | Step::Ended(_)) {
            let at = coordinator::drive::unix_us();
            self.0.push((group.vms.clone(), step.clone(), at));
        }
    }
}

impl Turns {
    fn at(&self, group: &GroupMove, is: impl Fn(&Step) -> bool) -> Result<i64> {
        let mut steps = self.0.iter();
        let found = steps.find(|(vms, step, _)| *vms == group.vms && is(step));
        Ok(found.context("a step is missing")?.2)
    }
}

/// When the first round of a VM was over, and how long it took, in seconds.
fn bulk(vm: &VmMove) -> Result<(f64, f64)> {
    let mut history = vm.history.iter();
    let begun = history.find(|entry| entry.phase == Phase::Precopy);
    let begun = begun.context("it never was in pre-copy")?.at_us;
    let first = vm.rounds.first().context("no round")?;
    let took = seconds(first.duration_ms) / 1e3;
    Ok((seconds(begun) / 1e6 + took, took))
}

#[allow(clippy::cast_precision_loss, reason = "times of one test")]
fn seconds(value: impl TryInto<i64>) -> f64 {
    value.try_into().unwrap_or(i64::MAX) as f64
}

fn members<'a>(report: &'a MoveReport, group: &GroupMove) -> Vec<&'a VmMove> {
    let vms = report.vms.iter();
    vms.filter(|vm| group.vms.contains(&vm.name)).collect()
}

fn times(vms: &[&VmMove], of: impl Fn(&VmMove) -> Option<i64>) -> Result<(i64, i64)> {
    let all: Option<Vec<i64>> = vms.iter().map(|vm| of(vm)).collect();
    let all = all.context("a time is missing")?;
    let first = all.iter().min().context("no VM")?;
    Ok((*first, *all.iter().max().context("no VM")?))
}

/// Of a VM that waits for its turn hardly anything is sent.
fn is_kept_back(vm: &VmMove, from_us: i64, until_us: i64) -> Result<()> {
    let mut between = vm
        .samples
        .iter()
        .filter(|sample| (from_us..=until_us).contains(&sample.at_us));
    let first = between.next().context("no report while it waited")?;
    let last = between.next_back().context("one report while it waited")?;
    let time_us = u64::try_from(last.at_us - first.at_us)?;
    let most = UNDERWAY + 2 * PARKED * time_us / 1_000_000;
    let sent = last.transferred_bytes - first.transferred_bytes;
    ensure!(
        sent <= most,
        "{} sent {sent} bytes while it waited for {time_us} us",
        vm.name
    );
    Ok(())
}

pub fn two_stages(accel: Accel) -> Result<()> {
    let mut spec = spec(accel, &GUESTS)?;
    spec.link = BytesPerSecond(LINK);
    spec.traffic = [("web", "one"), ("one", "two")]
        .map(|(a, b)| (a.into(), b.into(), BytesPerSecond(50_000)))
        .to_vec();
    spec.settings.push("max-downtime = \"600ms\"".into());
    spec.settings.push("report-interval = \"200ms\"".into());
    let lab = lab(spec)?;
    let since = Micros::now();
    let mut turns = Turns::default();
    let report = go(&lab, Policy::Comma, "a", "b", &mut turns)?;
    ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
    let [before, after] = &report.groups[..] else {
        anyhow::bail!("{} groups", report.groups.len());
    };
    let turn_of = |group| turns.at(group, |step| *step == Step::Turn);
    let (first, second) = if turn_of(before)? < turn_of(after)? {
        (before, after)
    } else {
        // By what was dirtied in stage one the other order was the better one, and that is told.
        let mut told = report.adaptations.iter();
        ensure!(told.any(|one| one.kind == AdaptationKind::Plan));
        (after, before)
    };

    let bulks: Result<Vec<(f64, f64)>> = report.vms.iter().map(bulk).collect();
    let bulks = bulks?;
    let ends = || bulks.iter().map(|one| one.0);
    let (first_end, last_end) = (
        ends().fold(f64::INFINITY, f64::min),
        ends().fold(0.0, f64::max),
    );
    let longest = bulks.iter().map(|one| one.1).fold(0.0, f64::max);
    ensure!(
        last_end - first_end <= SPREAD * longest,
        "the bulk copies ended {} s apart: {bulks:?}",
        last_end - first_end
    );

    let all: Vec<&VmMove> = report.vms.iter().collect();
    let stops = times(&all, |vm| vm.stopped_at_us)?;
    ensure!(
        seconds(stops.0) / 1e6 >= last_end,
        "a VM stopped before everything was copied"
    );
    let (one, two) = (members(&report, first), members(&report, second));
    let resumed = times(&one, |vm| vm.resumed_at_us)?.1;
    let stopped = times(&two, |vm| vm.stopped_at_us)?.0;
    let turn = turns.at(second, |step| *step == Step::Turn)?;
    let ended = turns.at(first, |step| matches!(step, Step::Ended(_)))?;
    ensure!(
        resumed <= ended && ended <= turn && turn < stopped,
        "resumed {resumed}, ended {ended}, turn {turn}, stopped {stopped}"
    );
    for vms in [&one, &two] {
        let (last_stop, first_resume) = (
            times(vms, |vm| vm.stopped_at_us)?.1,
            times(vms, |vm| vm.resumed_at_us)?.0,
        );
        ensure!(last_stop < first_resume, "a group did not switch together");
    }
    let copied = turns.at(second, |step| *step == Step::Copied)?;
    for vm in &two {
        is_kept_back(vm, copied, turn)?;
    }
    check_all(&lab, "b", since)?;
    nothing_left(&lab, "b")
}
