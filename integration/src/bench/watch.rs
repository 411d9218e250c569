//! A move carried out by the coordinator, seen by a benchmark: when the sidecars said what, and
//! what the guests saw.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coordinator::application::{Application, Policy};
use coordinator::engine::Step;
use coordinator::observer::{GroupName, Observer, Progress};
use coordinator::report::{Outcome, VmMove};
use coordinator::{MoveReport, RunOptions};
use sidecar::protocol::event::{Envelope, Event};
use sidecar::protocol::types::Phase;

use crate::clock::Micros;
use crate::lab::Lab;
use crate::signals::Interrupt;
use crate::ticks::GapStats;

const TICKS_WITHIN: Duration = Duration::from_secs(10);

/// What one guest saw of a move.
#[derive(Debug, Clone)]
pub struct Stood {
    /// Its last tick at the source.
    pub last: Micros,
    /// Its first tick at the destination.
    pub first: Micros,
    /// How long it stood still: the gap less one tick period.
    pub downtime: Duration,
    /// Its ticks until the last one at the source.
    pub until_then: GapStats,
}

/// One committed move.
#[derive(Debug)]
pub struct Moved {
    /// As the coordinator reports it.
    pub report: MoveReport,
    /// What each guest saw.
    pub stood: Vec<Stood>,
    /// When the last half said ARRIVED: unix time in microseconds.
    pub last_arrived_us: i64,
    /// When the disks of each VM that has some were copied once: the same.
    pub copied_us: Vec<i64>,
}

impl Moved {
    /// From the first guest's last tick at the source to the last guest's first one at the
    /// destination, less a tick: the time in which the group was not whole.
    #[must_use]
    pub fn group_downtime(&self) -> Duration {
        let begin = self.stood.iter().map(|one| one.last).min();
        let end = self.stood.iter().map(|one| one.first).max();
        let (Some(begin), Some(end)) = (begin, end) else {
            return Duration::MAX;
        };
        let period = |one: &Stood| one.first.since(one.last).saturating_sub(one.downtime);
        let period = self.stood.iter().map(period).max().unwrap_or_default();
        end.since(begin).saturating_sub(period)
    }

    /// The longest that one guest stood still.
    #[must_use]
    pub fn longest_downtime(&self) -> Duration {
        let all = self.stood.iter().map(|one| one.downtime);
        all.max().unwrap_or(Duration::MAX)
    }

    /// Σ remaining / bandwidth when all were paused.
    #[must_use]
    pub fn predicted(&self) -> Duration {
        let all = self.report.groups.iter();
        let sum: f64 = all.filter_map(|group| group.predicted_downtime_s).sum();
        Duration::try_from_secs_f64(sum).unwrap_or_default()
    }

    /// Where the downtime went, in ms: from the first guest's last tick until the first STOP, until
    /// all are told to go on, until the last half has arrived, until the last RESUME, until the last
    /// guest's first tick.
    #[must_use]
    pub fn stages_ms(&self) -> [f64; 5] {
        let vms = &self.report.vms;
        let stop = vms.iter().filter_map(|vm| vm.stopped_at_us).min();
        let switching = |vm: &VmMove| {
            let mut entries = vm.history.iter();
            let entry = entries.find(|entry| entry.phase == Phase::Switching);
            entry.map(|entry| entry.at_us)
        };
        let on = vms.iter().filter_map(switching).max();
        let (Some(stop), Some(on)) = (stop, on) else {
            return [f64::NAN; 5];
        };
        let end = self.last_resumed_us();
        let unix = |at: Micros| i64::try_from(at.unix_us()).unwrap_or(i64::MAX);
        let last = self.stood.iter().map(|one| unix(one.last)).min();
        let first = self.stood.iter().map(|one| unix(one.first)).max();
        let (last, first) = (last.unwrap_or(stop), first.unwrap_or(end));
        [
            (last, stop),
            (stop, on),
            (on, self.last_arrived_us),
            (self.last_arrived_us, end),
            (end, first),
        ]
        .map(|(from, to)| micros_to_ms(to - from))
    }

    /// RESUME of the last VM: unix time in microseconds.
    #[must_use]
    pub fn last_resumed_us(&self) -> i64 {
        let all = self.report.vms.iter().filter_map(|vm| vm.resumed_at_us);
        all.max().unwrap_or(i64::MIN)
    }
}

/// Microseconds of one move in milliseconds.
#[allow(clippy::cast_precision_loss, reason = "the time of one move")]
#[must_use]
pub fn micros_to_ms(micros: i64) -> f64 {
    micros as f64 / 1e3
}

/// Is called once, when every VM is held, and blocks the move meanwhile.
pub type WhileHeld<'a> = &'a mut dyn FnMut() -> Result<()>;

struct Watch<'a, 'h> {
    interrupt: &'a Interrupt,
    asked: Arc<AtomicU8>,
    held: Option<WhileHeld<'h>>,
    failed: Option<anyhow::Error>,
    last_arrived_us: i64,
    copied_us: Vec<i64>,
}

impl Observer for Watch<'_, '_> {
    fn event(&mut self, _host: &str, envelope: &Envelope) {
        if let Event::Arrived { .. } = envelope.event {
            self.last_arrived_us = self.last_arrived_us.max(envelope.at_us);
        }
        if let Event::DisksCopied { .. } = envelope.event {
            self.copied_us.push(envelope.at_us);
        }
    }

    fn step(&mut self, _group: &GroupName, step: &Step) {
        if *step == Step::AllHeld {
            if let Some(held) = self.held.take() {
                if let Err(error) = held() {
                    self.failed = Some(error);
                    self.asked.store(1, Ordering::Relaxed);
                }
            }
        }
    }

    fn progress(&mut self, _progress: &Progress) {
        if self.interrupt.check().is_err() {
            self.asked.store(1, Ordering::Relaxed);
        }
    }
}

/// Moves an application and waits until all its guests tick at their destination.
///
/// # Errors
/// It is not committed, the user interrupts, `while_held` fails, or a guest ran on both sides or
/// lost a tick.
pub fn carry_out(
    lab: &Lab,
    app: &Application,
    policy: Policy,
    interrupt: &Interrupt,
    while_held: Option<WhileHeld<'_>>,
) -> Result<Moved> {
    interrupt.check()?;
    let options = RunOptions {
        policy: Some(policy),
        ..RunOptions::default()
    };
    let mut watch = Watch {
        interrupt,
        asked: Arc::clone(&options.interrupt),
        held: while_held,
        failed: None,
        last_arrived_us: i64::MIN,
        copied_us: Vec::new(),
    };
    let since = Micros::now();
    let report = coordinator::run(app, &options, &mut watch)?;
    interrupt.check()?;
    if let Some(error) = watch.failed {
        return Err(error);
    }
    if report.result != Outcome::Committed {
        let reason = report.reason.unwrap_or_default();
        bail!("{policy}: {}: {reason}", report.result);
    }
    let stood = report
        .vms
        .iter()
        .map(|vm| stood(lab, &vm.name, &vm.to, since));
    let stood = stood.collect::<Result<_>>()?;
    // Nobody looks at older ticks again.
    lab.ticks
        .forget_before(Micros::now() - Duration::from_millis(100));
    Ok(Moved {
        report,
        stood,
        last_arrived_us: watch.last_arrived_us,
        copied_us: watch.copied_us,
    })
}

/// What a guest saw that was moved to host `to`, from its ticks since `since`.
///
/// # Errors
/// It does not tick there, ran on both sides, or lost a tick.
pub fn stood(lab: &Lab, vm: &str, to: &str, since: Micros) -> Result<Stood> {
    lab.ticks.wait_for_tick(vm, to, TICKS_WITHIN)?;
    let record = lab.ticks.record_since(vm, since);
    if !record.overlaps().is_empty() {
        bail!("{vm} ran on both sides: {:?}", record.overlaps());
    }
    if let Some(lost) = record.breaks().first() {
        bail!("{vm} lost or repeated ticks: {lost:?}");
    }
    let switchovers = record.switchovers();
    let [switchover] = &switchovers[..] else {
        bail!("{vm}: expected one switchover: {switchovers:?}");
    };
    let until_then = record.window(since..switchover.first).gaps();
    Ok(Stood {
        last: switchover.last,
        first: switchover.first,
        downtime: switchover.downtime,
        until_then: until_then.with_context(|| format!("{vm} did not tick before it moved"))?,
    })
}

/// Bytes that this host has sent over the link between hosts a and b.
///
/// # Errors
/// There is no such link, or it cannot be asked.
pub fn carried(lab: &Lab, host: usize) -> Result<u64> {
    let carried = lab.network.link("a", "b")?.carried()?;
    let name = &lab.spec.hosts[host];
    let end = [carried.first, carried.second]
        .into_iter()
        .find(|end| end.0 == *name);
    end.map(|(_, bytes)| bytes.0)
        .context("no such end of the link")
}
