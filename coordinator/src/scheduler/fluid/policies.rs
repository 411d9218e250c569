//! The papers' policies, and one that follows a plan.

use super::guest::SimulateError;
use super::simulate::{Orders, Policy, Stage, View};
use crate::scheduler::bandwidth::release::{Judge, Look, Rule, Verdict};
use crate::scheduler::bandwidth::{Limits, VmLoad};
use crate::scheduler::phases::{Measured, Reallocator, TrackerSettings};

/// How often a held group is looked at.
const LOOK_S: f64 = 0.1;

/// One after another, each switched over as soon as it is ready: VMbuddies' NS (5.1), and MO with
/// the termination of that name.
#[derive(Debug, Clone)]
pub struct Sequential {
    order: Vec<usize>,
}

impl Sequential {
    /// In this order.
    ///
    /// # Errors
    /// Not each of `vms` VMs is in it once.
    pub fn new(order: Vec<usize>, vms: usize) -> Result<Self, SimulateError> {
        each_once(order.iter().copied(), vms)?;
        Ok(Self { order })
    }
}

impl Policy for Sequential {
    fn decide(&mut self, view: &View<'_>, orders: &mut Orders) {
        release_the_held(view, orders);
        let is_done = |vm: &&usize| view.vms[**vm].stage == Stage::Done;
        let done = self.order.iter().take_while(is_done).count();
        if let Some(&next) = self.order.get(done) {
            orders.limits_bytes_per_s[next] = f64::INFINITY;
        }
    }
}

/// All at once, each switched over as soon as it is ready.
#[derive(Debug, Clone, Copy)]
pub struct Parallel;

impl Policy for Parallel {
    fn decide(&mut self, view: &View<'_>, orders: &mut Orders) {
        orders.limits_bytes_per_s.fill(f64::INFINITY);
        release_the_held(view, orders);
    }
}

/// Those that were already paused are not released again: only the held are.
fn release_the_held(view: &View<'_>, orders: &mut Orders) {
    let held = (0..view.vms.len()).filter(|&vm| view.vms[vm].stage == Stage::Held);
    orders.release = held.map(|vm| vec![vm]).collect();
}

/// Largest memory Load VM Last (VMbuddies 3.2): one after another in ascending order of the dirty
/// rates; who is ready is held until all are.
#[derive(Debug, Clone)]
pub struct Lll {
    order: Vec<usize>,
    hold: Hold,
}

impl Lll {
    /// For VMs with these dirty rates, released by `rule`.
    #[must_use]
    pub fn new(dirty_rates_bytes_per_s: &[f64], rule: Rule) -> Self {
        let mut order: Vec<usize> = (0..dirty_rates_bytes_per_s.len()).collect();
        order.sort_by(|&a, &b| dirty_rates_bytes_per_s[a].total_cmp(&dirty_rates_bytes_per_s[b]));
        Self {
            hold: Hold::new(order.clone(), rule),
            order,
        }
    }
}

impl Policy for Lll {
    fn decide(&mut self, view: &View<'_>, orders: &mut Orders) {
        let is_ready =
            |vm: &&usize| !matches!(view.vms[**vm].stage, Stage::Waiting | Stage::PreCopy);
        let ready = self.order.iter().take_while(is_ready).count();
        if let Some(&next) = self.order.get(ready) {
            orders.limits_bytes_per_s[next] = f64::INFINITY;
        }
        self.hold.weigh(view, orders);
    }
}

/// All at once with the rates of OBA, allocated anew when a phase or a window ends, and released
/// together (VMbuddies 3.3, 3.4).
#[derive(Debug, Clone)]
pub struct Oba {
    reallocator: Reallocator,
    interval_s: f64,
    next_report_s: f64,
    hold: Hold,
}

impl Oba {
    /// Of the `loads` only threshold and working set are used; the rest is measured every
    /// `interval_s` seconds, above 0.
    #[must_use]
    pub fn new(
        loads: Vec<VmLoad>,
        limits: Limits,
        settings: TrackerSettings,
        interval_s: f64,
        rule: Rule,
    ) -> Self {
        Self {
            hold: Hold::new((0..loads.len()).collect(), rule),
            reallocator: Reallocator::new(0.0, loads, limits, settings),
            interval_s: interval_s.max(1e-3),
            next_report_s: 0.0,
        }
    }
}

impl Policy for Oba {
    fn decide(&mut self, view: &View<'_>, orders: &mut Orders) {
        if view.now_s >= self.next_report_s {
            self.next_report_s = view.now_s + self.interval_s;
            let measured = view.vms.iter().map(|vm| Measured {
                remaining_bytes: vm.remaining_bytes,
                dirty_rate_bytes_per_s: vm.dirty_rate_bytes_per_s,
            });
            let measured: Vec<Measured> = measured.collect();
            match self
                .reallocator
                .report(view.now_s, &measured, view.capacity)
            {
                Ok(Some(all)) => orders.limits_bytes_per_s = all.rates_bytes_per_s,
                Ok(None) => {}
                // Nothing converges: the links divide themselves.
                Err(_) => orders.limits_bytes_per_s.fill(f64::INFINITY),
            }
        }
        for (limit, vm) in orders.limits_bytes_per_s.iter_mut().zip(view.vms) {
            // A held VM sends what it dirties, and no more, however much it may.
            if vm.stage == Stage::Held {
                *limit = f64::INFINITY;
            }
        }
        self.hold.weigh(view, orders);
        orders.wake_s = orders.wake_s.min(self.next_report_s);
    }
}

/// One group's part of a [`Timetable`]: its VMs, each with its rate from when on, in seconds from
/// the group's start. The last rate stays.
pub type GroupTimetable = Vec<(usize, Vec<(f64, f64)>)>;

/// Groups one after another, each with given rates, and released together: a plan carried out.
#[derive(Debug, Clone)]
pub struct Timetable {
    groups: Vec<(GroupTimetable, Hold)>,
    current: usize,
    began_s: f64,
    /// Rates of all VMs until the first group begins.
    before: Vec<f64>,
}

impl Timetable {
    /// Of these groups, each released by `rule`. A group begins when the one before has moved.
    ///
    /// # Errors
    /// Not each of `vms` VMs is in it once.
    pub fn new(groups: Vec<GroupTimetable>, vms: usize, rule: Rule) -> Result<Self, SimulateError> {
        each_once(groups.iter().flatten().map(|(vm, _)| *vm), vms)?;
        let with_hold = |group: GroupTimetable| {
            let hold = Hold::new(group.iter().map(|(vm, _)| *vm).collect(), rule);
            (group, hold)
        };
        Ok(Self {
            groups: groups.into_iter().map(with_hold).collect(),
            current: 0,
            began_s: 0.0,
            before: Vec::new(),
        })
    }

    /// The first group begins at `begin_s`; until then each VM has the rate in `rates` (COMMA's stage
    /// one).
    #[must_use]
    pub fn after(self, rates_bytes_per_s: Vec<f64>, begin_s: f64) -> Self {
        Self {
            began_s: begin_s,
            before: rates_bytes_per_s,
            ..self
        }
    }
}

impl Policy for Timetable {
    fn decide(&mut self, view: &View<'_>, orders: &mut Orders) {
        if !self.before.is_empty() {
            if view.now_s < self.began_s {
                orders.limits_bytes_per_s.clone_from(&self.before);
                orders.wake_s = self.began_s;
                return;
            }
            self.before.clear();
            orders.limits_bytes_per_s.fill(0.0);
        }
        let is_done = |group: &GroupTimetable| {
            let stages = group.iter().map(|(vm, _)| view.vms[*vm].stage);
            stages.into_iter().all(|stage| stage == Stage::Done)
        };
        while let Some((group, _)) = self.groups.get(self.current) {
            if !is_done(group) {
                break;
            }
            self.current += 1;
            self.began_s = view.now_s;
        }
        let Some((group, hold)) = self.groups.get_mut(self.current) else {
            return;
        };
        let mut next = f64::INFINITY;
        for (vm, steps) in group.iter() {
            let mut limit = 0.0;
            for &(from_s, rate) in steps {
                let at = self.began_s + from_s;
                if at <= view.now_s {
                    limit = rate;
                } else {
                    next = next.min(at);
                }
            }
            orders.limits_bytes_per_s[*vm] = limit;
        }
        orders.wake_s = next;
        hold.weigh(view, orders);
    }
}

/// A group that is released together.
#[derive(Debug, Clone)]
struct Hold {
    members: Vec<usize>,
    judge: Judge,
    next_look_s: f64,
}

impl Hold {
    fn new(members: Vec<usize>, rule: Rule) -> Self {
        Self {
            members,
            judge: Judge::new(rule),
            next_look_s: 0.0,
        }
    }

    /// Once all are held: releases them by the rule, or asks to be woken.
    #[allow(clippy::cast_precision_loss, reason = "a rate far below 2^53")]
    fn weigh(&mut self, view: &View<'_>, orders: &mut Orders) {
        let members = self.members.iter().map(|&vm| &view.vms[vm]);
        if members.clone().any(|vm| vm.stage != Stage::Held) {
            return;
        }
        if view.now_s < self.next_look_s {
            orders.wake_s = orders.wake_s.min(self.next_look_s);
            return;
        }
        self.next_look_s = view.now_s + LOOK_S;
        let verdict = self.judge.look(Look {
            now_s: view.now_s,
            downtime_s: view.downtime_s(&self.members),
            remaining_bytes: members.clone().map(|vm| vm.remaining_bytes).sum(),
            dirty_bytes_per_s: members.map(|vm| vm.dirty_rate_bytes_per_s).sum(),
            bandwidth_bytes_per_s: view.capacity.bandwidth.0 as f64,
        });
        match verdict {
            Verdict::Release => orders.release = vec![self.members.clone()],
            Verdict::Wait { .. } => orders.wake_s = orders.wake_s.min(self.next_look_s),
            Verdict::TooHot { best_s } => orders.too_hot = Some((self.members.clone(), best_s)),
        }
    }
}

fn each_once(named: impl Iterator<Item = usize>, vms: usize) -> Result<(), SimulateError> {
    let mut count = vec![0; vms];
    for vm in named {
        if vm >= vms {
            return Err(SimulateError::Policy { vm, guests: vms });
        }
        count[vm] += 1;
    }
    match count.iter().position(|&times| times != 1) {
        Some(vm) => Err(SimulateError::Policy { vm, guests: vms }),
        None => Ok(()),
    }
}
