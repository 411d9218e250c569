//! Groups that have not started are planned anew when what they were planned with has changed.
//!
//! - Groups of `muster` follow each other, and a group's run is made when it starts. So those that wait are
//!   made anew when a path is found to carry something else: at once the way that takes milliseconds, and
//!   by a whole search beside the move ([`Planning`]), whose answer counts if nothing has started
//!   meanwhile. Where no two VMs fit any more they follow one another. The same where VMs that wait are
//!   found to dirty something else than before.
//! - Groups of `comma` are prepared together, and what is committed together stands from then on. When
//!   stage one is over, and whenever a turn is over, the order of those that wait is made anew, from the
//!   dirty sets and dirty rates that were measured (COMMA 3.5).

use std::collections::BTreeMap;

use rate_limiter::BytesPerSecond;

use super::{Conductor, Purpose, Randomness};
use crate::application::{HostId, Link, VmId, VmProfile};
use crate::engine::Step;
use crate::policy::PlannedGroup;
use crate::scheduler::allot::{Moving, Scheme};
use crate::scheduler::group::GroupTime;
use crate::scheduler::impact::Traffic;
use crate::scheduler::order::rest;
use crate::scheduler::paths::Path;
use crate::scheduler::plan::{Effort, Inputs, Stage, again};
use crate::scheduler::schedule::{Limits, Load, by_start, delayed};

/// A path's rate has to differ by this part of itself for a new plan.
const CHANGE: f64 = 0.1;
/// A dirty rate, too, and by this part of the bandwidth: small rates differ by much, and mean little.
const OF_BANDWIDTH: f64 = 0.02;
/// Another order of the turns has to cost less than this part of the one that stands.
const BETTER: f64 = 0.95;
/// Up to so many groups are ordered anew between turns.
const TURNS: usize = 10;

/// What a plan is made anew with.
#[derive(Debug, Default)]
pub(super) struct Replan {
    /// The narrow paths that the plan knows of.
    known: BTreeMap<Path, BytesPerSecond>,
    /// What was measured of VMs that wait, since the plan was first made.
    measured: BTreeMap<VmId, VmProfile>,
    /// One of them dirties something else.
    is_news: bool,
    /// A search that is to be made.
    asked: Option<Planning>,
    /// Counts changes of what waits: an answer to an older question is of no use.
    generation: u64,
}

/// A search that takes too long for the move's loop.
#[derive(Debug, Clone)]
pub struct Planning {
    inputs: Inputs,
    moved: Vec<bool>,
    groups: Vec<Vec<usize>>,
    generation: u64,
}

/// Its answer.
#[derive(Debug)]
pub struct Replanned {
    groups: Option<Vec<(Vec<usize>, Scheme)>>,
    generation: u64,
}

impl Replan {
    /// What waited has started: an answer that comes now is too late.
    pub(super) fn has_started(&mut self) {
        self.generation += 1;
        self.asked = None;
    }
}

impl Planning {
    /// Makes it.
    #[must_use]
    pub fn run(&self) -> Replanned {
        Replanned {
            groups: again(&self.inputs, &self.moved, &self.groups, Effort::Full),
            generation: self.generation,
        }
    }
}

impl<R: Randomness> Conductor<'_, R> {
    /// A search that is to be made beside the move.
    pub fn poll_planning(&mut self) -> Option<Planning> {
        self.replan.asked.take()
    }

    /// The answer of a search that was made beside the move.
    pub fn handle_replanned(&mut self, found: Replanned) {
        if let Some(groups) = found.groups {
            if found.generation == self.replan.generation {
                self.take_plan(groups);
            }
        }
    }

    /// VMs whose groups wait, and may still be made anew.
    #[must_use]
    pub fn waiting(&self) -> Vec<VmId> {
        let is_forward = self.waiting.iter().all(|one| one.1 == Purpose::Forward);
        if !self.plan.may_change || !is_forward {
            return Vec::new();
        }
        let groups = self.waiting.iter().map(|one| &self.plan.groups[one.0]);
        groups.flat_map(|group| group.vms.clone()).collect()
    }

    /// What was measured of VMs that wait.
    pub fn handle_measured(&mut self, found: Vec<(VmId, VmProfile)>) {
        let waiting = self.waiting();
        for (vm, profile) in found {
            if waiting.contains(&vm) {
                self.replan.is_news |= self.is_other(&self.profile(vm), &profile);
                self.replan.measured.insert(vm, profile);
            }
        }
        if self.replan.is_news {
            self.plan_again();
        }
    }

    /// What is known of a VM before it moves: what was measured last.
    fn profile(&self, vm: VmId) -> VmProfile {
        let measured = self.replan.measured.get(&vm).copied();
        measured.unwrap_or(self.app.vm(vm).profile)
    }

    /// The same as it moves, with what is taken from its guest.
    pub(super) fn moved_profile(&self, vm: VmId) -> VmProfile {
        let mut known = self.app.vm(vm).clone();
        known.profile = self.profile(vm);
        self.app.moved_profile(&known)
    }

    #[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
    fn is_other(&self, before: &VmProfile, now: &VmProfile) -> bool {
        let little = self.app.allowance.for_move().0 as f64 * OF_BANDWIDTH;
        let differ = |rate: fn(&VmProfile) -> Option<BytesPerSecond>| {
            let [before, now] = [before, now].map(|of| rate(of).map_or(0.0, |rate| rate.0 as f64));
            (now - before).abs() > (CHANGE * before).max(little)
        };
        differ(|of| of.dirty_rate) || differ(|of| of.max_dirty_rate)
    }

    /// What waits is planned anew, where a path or a VM has changed enough.
    pub(super) fn plan_again(&mut self) {
        let narrow: BTreeMap<Path, BytesPerSecond> = self.paths.narrow().collect();
        if self.waiting().is_empty() || !(self.differs(&narrow) || self.replan.is_news) {
            return;
        }
        let app = self.app;
        let mut outline = app.outline();
        for &vm in self.replan.measured.keys() {
            outline.vms[vm.0].profile = self.moved_profile(vm);
        }
        // The reserve comes off a link's rate, and is off these.
        let reserve = app.allowance.reserve.0;
        outline.links.extend(narrow.iter().map(|(path, rate)| Link {
            between: [path.0, path.1],
            rate: BytesPerSecond(rate.0.saturating_add(reserve)),
            rtt: None,
        }));
        let Ok(inputs) = Inputs::new(&outline, Stage::Whole) else {
            return;
        };
        self.replan.known = narrow;
        self.replan.is_news = false;
        let groups: Vec<Vec<usize>> = self
            .waiting
            .iter()
            .map(|(planned, _)| {
                self.plan.groups[*planned]
                    .vms
                    .iter()
                    .map(|vm| vm.0)
                    .collect()
            })
            .collect();
        let mut moved = vec![true; app.vms.len()];
        for &vm in groups.iter().flatten() {
            moved[vm] = false;
        }
        self.replan.generation += 1;
        if let Some(groups) = again(&inputs, &moved, &groups, Effort::Quick) {
            self.take_plan(groups);
        }
        self.replan.asked = Some(Planning {
            inputs,
            moved,
            groups,
            generation: self.replan.generation,
        });
    }

    #[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
    fn differs(&self, narrow: &BTreeMap<Path, BytesPerSecond>) -> bool {
        let told = self.app.allowance.for_move();
        let known = &self.replan.known;
        let mut paths = narrow.keys().chain(known.keys());
        paths.any(|path| {
            let rate = |of: &BTreeMap<Path, BytesPerSecond>| of.get(path).unwrap_or(&told).0 as f64;
            let (before, now) = (rate(known), rate(narrow));
            (now - before).abs() > CHANGE * before
        })
    }

    /// These groups wait from now on.
    fn take_plan(&mut self, groups: Vec<(Vec<usize>, Scheme)>) {
        let groups = groups.into_iter().map(|(vms, scheme)| PlannedGroup {
            vms: vms.into_iter().map(VmId).collect(),
            scheme,
        });
        let groups: Vec<PlannedGroup> = groups.collect();
        let waiting = self.waiting.iter();
        let before: Vec<&PlannedGroup> = waiting.map(|one| &self.plan.groups[one.0]).collect();
        if before.len() == groups.len() && before.iter().zip(&groups).all(|(a, b)| **a == *b) {
            return;
        }
        let first = self.plan.groups.len();
        let names = groups.iter().map(|group| group.vms.clone()).collect();
        self.plan.groups.extend(groups);
        let added = first..self.plan.groups.len();
        self.waiting = added.map(|planned| (planned, Purpose::Forward)).collect();
        self.tell_plan(names);
    }

    fn tell_plan(&mut self, groups: Vec<Vec<VmId>>) {
        let app = self.app;
        let names = |vms: Vec<VmId>| vms.into_iter().map(|vm| app.vm(vm).name.clone()).collect();
        let groups = groups.into_iter().map(names).collect();
        let mut started = self.started.iter_mut();
        if let Some(started) = started.find(|started| started.group.outcome().is_none()) {
            started.group.announce(Step::Planned { groups });
        }
    }

    /// A turn is over, or stage one: those that wait are ordered by what they have dirtied.
    pub(super) fn order_turns(&mut self) {
        let waiting: Vec<usize> = self
            .turns
            .iter()
            .copied()
            .filter(|&one| self.waits(one))
            .collect();
        let has_turn = self.active().any(|started| !started.group.is_waiting());
        if has_turn || waiting.len() < 2 || waiting.len() > TURNS {
            return;
        }
        let vms = self.app.vms.len();
        let mut place = vec![waiting.len(); vms];
        let mut times = Vec::new();
        for (index, &planned) in waiting.iter().enumerate() {
            for vm in &self.plan.groups[planned].vms {
                place[vm.0] = index;
            }
            times.push(self.time_of_turn(planned));
        }
        // VMs that have moved are one more vertex, behind the groups.
        #[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
        let pairs = self.app.traffic.iter().map(|traffic| {
            let [a, b] = traffic.between.map(|vm| place[vm.0]);
            (a, b, traffic.rate.0 as f64)
        });
        let traffic = Traffic::between(waiting.len() + 1, pairs);
        let mut moved = vec![false; waiting.len()];
        moved.push(place.contains(&waiting.len()));
        times.push(0.0);
        let Some(order) = rest::exactly(&Turns { times: &times }, &traffic, &moved) else {
            return;
        };
        let order = order.iter().flatten().copied();
        let order: Vec<usize> = order.filter(|one| *one < waiting.len()).collect();
        let before: Vec<usize> = (0..waiting.len()).collect();
        let [now, then] = [&order, &before].map(|order| impact(&times, &traffic, order));
        if now >= then * BETTER {
            return;
        }
        let order: Vec<usize> = order.into_iter().map(|one| waiting[one]).collect();
        let others = self
            .turns
            .iter()
            .copied()
            .filter(|one| !waiting.contains(one));
        self.turns = others.chain(order.iter().copied()).collect();
        let groups = order.iter().map(|&one| self.plan.groups[one].vms.clone());
        let groups = groups.collect();
        self.tell_plan(groups);
    }

    /// Whether a planned group waits for its turn.
    fn waits(&self, planned: usize) -> bool {
        let mut started = self.started.iter().rev();
        let latest = started.find(|started| started.planned == planned);
        latest.is_some_and(|started| {
            let group = &started.group;
            group.outcome().is_none() && group.is_moving() && group.is_waiting()
        })
    }

    /// How long a group's turn will take, from what its VMs have dirtied, in seconds.
    fn time_of_turn(&self, planned: usize) -> f64 {
        let mut started = self.started.iter().rev();
        let Some(latest) = started.find(|started| started.planned == planned) else {
            return 0.0;
        };
        let members = &latest.group.spec().members;
        let ends: Vec<(VmId, HostId, HostId)> = members
            .iter()
            .map(|member| (member.vm, member.from, member.to))
            .collect();
        let vms = latest.group.moving();
        turn_s(&Limits::of(&self.capacity(&ends), vms.len()), &vms)
    }

    /// Whether a group in this place of the order comes after that one.
    pub(super) fn is_after(&self, planned: usize, other: usize) -> bool {
        let place = |one: usize| self.turns.iter().position(|turn| *turn == one);
        place(planned) > place(other)
    }
}

/// Groups that stand: each takes its time, and no two are put together.
#[derive(Debug)]
struct Turns<'a> {
    times: &'a [f64],
}

impl GroupTime for Turns<'_> {
    fn vms(&self) -> usize {
        self.times.len()
    }

    fn duration(&self, group: &[usize]) -> f64 {
        match group {
            [one] => self.times[*one],
            _ => f64::INFINITY,
        }
    }

    fn order(&self) -> Vec<usize> {
        (0..self.times.len()).collect()
    }

    fn least(&self, _vm: usize) -> f64 {
        1.0
    }

    fn most(&self) -> f64 {
        1.0
    }
}

/// What this order of the turns costs. The last vertex are the VMs that have moved.
fn impact(times: &[f64], traffic: &Traffic, order: &[usize]) -> f64 {
    let mut has_moved = vec![false; times.len()];
    if let Some(moved) = has_moved.last_mut() {
        *moved = true;
    }
    let mut sum = 0.0;
    for &group in order {
        let crossing = traffic
            .pairs()
            .filter(|(a, b, _)| has_moved[*a] != has_moved[*b]);
        sum += times[group] * crossing.map(|(_, _, rate)| rate).sum::<f64>();
        has_moved[group] = true;
    }
    sum
}

/// How long it takes to send what these VMs have left, by delayed starts; about, where their highest dirty
/// rates do not fit together.
fn turn_s(limits: &Limits, vms: &[Moving]) -> f64 {
    let loads = vms.iter().map(|vm| Load {
        left_bytes: vm.left_bytes,
        max_dirty_rate: vm.max_dirty_rate.max(vm.dirty_rate),
        dirty_rate: vm.dirty_rate,
    });
    let loads: Vec<Load> = loads.collect();
    let all: Vec<usize> = (0..loads.len()).collect();
    if let Some(schedule) = delayed(&loads, limits, &by_start(&loads, &all)) {
        return schedule.duration_s;
    }
    let left = loads.iter().map(|load| load.left_bytes).enumerate();
    let dirty: f64 = loads.iter().map(|load| load.dirty_rate).sum();
    // At least a tenth of the bandwidth is left for it.
    let free = (1.0 - dirty / limits.bandwidth).max(0.1);
    limits.time_for(left) / free
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::allot::Progress;

    fn moving(left_bytes: f64, dirty_rate: f64) -> Moving {
        Moving {
            progress: Progress::Parked { bytes_per_s: 1 },
            left_bytes,
            dirty_rate,
            nominal_dirty_rate: dirty_rate,
            max_dirty_rate: 2.0 * dirty_rate,
            working_set: None,
            in_vain: false,
        }
    }

    #[test]
    fn a_turn_takes_what_was_dirtied() {
        let link = Limits::link(32e6);
        // A database of the paper: S 2048 MB, m 15, d 7.5.
        let found = turn_s(&link, &[moving(2048e6, 7.5e6)]);
        assert!((found - 83.591_836_735).abs() < 1e-6, "{found}");
        // Two that do not fit together still have a time.
        let found = turn_s(&link, &[moving(1e8, 12e6), moving(1e8, 15e6)]);
        assert!(
            (found - 2e8 / 32e6 / (1.0 - 27.0 / 32.0)).abs() < 1e-6,
            "{found}"
        );
        assert!(turn_s(&link, &[moving(1e8, 1e9)]).is_finite());
        assert_eq!(turn_s(&link, &[moving(0.0, 0.0)]), 0.0);
    }
}
