//! Who starts now, and what each VM of a group that moves gets: the scheduler's schemes from where
//! the VMs are, not from where they were planned to be.
//!
//! A plan foresees a group's whole schedule; a move asks anew whenever something has changed. The
//! same functions answer both: [`allocate_within`] (VMbuddies 3.3) and [`delayed`] (COMMA 3.4) take
//! what is left to send, and it does not matter to them how much there was.
//!
//! A VM that is held keeps sending what it dirties: that comes off the bandwidth first. The rest is
//! shared by those that copy, as the [`Scheme`] says. One that is held because it does not converge
//! rests as long as others copy where the policy wants that ([`Moving::in_vain`]); as the papers have it
//! nobody rests.
//!
//! COMMA moves in two stages. In the first ([`bulk`]) everything is copied once. What a VM has dirtied
//! meanwhile waits: it is *parked*, its stream kept open by [`parked_rate`], until its group's turn in
//! the second stage. There it counts as one that has not started.

use std::fmt;

use rate_limiter::BytesPerSecond;
use serde::Serialize;

use super::bandwidth::{self, VmLoad, allocate_within};
use super::schedule::{Limits, Load, best_order, by_start, delayed};
use crate::capacity::{self, Capacity, Demand};

/// What a held VM gets at least, as a part of the bandwidth.
const HELD_AT_LEAST: f64 = 0.001;
/// A start that is due within this time, in seconds, is made now.
const NOW_S: f64 = 0.02;
/// What a parked VM gets, in bytes per second: a pace that can still be raised within a second.
const PARKED: f64 = 65536.0;
/// What a parked VM gets at least and at most, as parts of the bandwidth, and all of them at most.
const PARKED_AT_LEAST: f64 = 0.001;
const PARKED_AT_MOST: f64 = 0.01;
const ALL_PARKED_AT_MOST: f64 = 0.1;
/// Highest dirty rates that miss the bandwidth by less than this part of it still count as fitting:
/// parked VMs take that much, and they are estimates.
const NEARLY: f64 = 0.05;

/// How the VMs of a group share their bandwidth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// All start at once, at rates with which they finish together (VMbuddies 3.3, OBA).
    #[default]
    Together,
    /// One after another by dirty rate, the largest last (VMbuddies 3.2, LLL).
    InTurn,
    /// Each as late as it can, with the bandwidth back-filled (COMMA 3.4).
    Delayed,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Together => "OBA",
            Self::InTurn => "LLL's order",
            Self::Delayed => "delayed starts",
        })
    }
}

/// How far a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Its migration has not started.
    Waiting,
    /// Its memory was copied once; what it has dirtied since is not sent yet.
    Parked {
        /// What its stream gets meanwhile.
        bytes_per_s: u64,
    },
    /// It is in pre-copy.
    Copying,
    /// It is in wait-and-copy.
    Held,
}

impl Progress {
    /// Whether it is still to be started, or to be started again.
    fn is_to_start(self) -> bool {
        matches!(self, Self::Waiting | Self::Parked { .. })
    }
}

/// What is known of a VM, now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moving {
    /// How far it is.
    pub progress: Progress,
    /// Dirty or unsent, in bytes.
    pub left_bytes: f64,
    /// Mean dirty rate: as measured, or as foreseen while it has not started; bytes per second.
    pub dirty_rate: f64,
    /// Dirty rate that was foreseen, for the order in which VMs take their turns.
    pub nominal_dirty_rate: f64,
    /// Highest dirty rate, in bytes per second.
    pub max_dirty_rate: f64,
    /// Writable working set in bytes, where it is known.
    pub working_set: Option<f64>,
    /// It is held because more pre-copy is in vain, as what it sends is dirty again soon, and the policy
    /// lets it rest.
    pub in_vain: bool,
}

impl Moving {
    /// What it is to send while others still copy: of one in vain nothing.
    fn while_others_copy(&self) -> Self {
        let rests = self.in_vain && self.progress == Progress::Held;
        Self {
            dirty_rate: if rests { 0.0 } else { self.dirty_rate },
            max_dirty_rate: if rests { 0.0 } else { self.max_dirty_rate },
            ..*self
        }
    }
}

/// What a group's VMs get.
#[derive(Debug, Clone, PartialEq)]
pub struct Allotment {
    /// Bytes per second, by VM. Those of a VM that is not to start yet are 0, those of a parked one
    /// its least.
    pub rates: Vec<f64>,
    /// Whether a VM runs: VMs that wait, or are parked, and for which this is true are to be started
    /// now.
    pub runs: Vec<bool>,
    /// In how many seconds which VM is to start next, if all goes as foreseen.
    pub next_start: Option<(f64, usize)>,
}

/// Allots `capacity` to the VMs of a group.
#[must_use]
pub fn allot(scheme: Scheme, capacity: &Capacity, vms: &[Moving]) -> Allotment {
    let all_held = vms.iter().all(|vm| vm.progress == Progress::Held);
    let vms: Vec<Moving> = vms
        .iter()
        .map(|vm| {
            if all_held {
                *vm
            } else {
                vm.while_others_copy()
            }
        })
        .collect();
    let vms = vms.as_slice();
    let found = match scheme {
        Scheme::InTurn => Some(in_turn(capacity, vms)),
        Scheme::Delayed => with_delays(capacity, vms),
        Scheme::Together => None,
    };
    found.unwrap_or_else(|| together(capacity, vms))
}

/// What each of `vms` parked VMs gets of `bandwidth`, in bytes per second.
#[must_use]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a small part of a rate"
)]
pub fn parked_rate(bandwidth: BytesPerSecond, vms: usize) -> BytesPerSecond {
    let all = bandwidth.0 as f64;
    let each = PARKED.min(all * PARKED_AT_MOST).max(all * PARKED_AT_LEAST);
    let most = all * ALL_PARKED_AT_MOST / vms.max(1) as f64;
    BytesPerSecond((each.min(most) as u64).max(1))
}

/// COMMA's stage one (3.2.1, Eq. 2): everyone's rate is in proportion to what it has left to copy,
/// so that all end together. Where some pass a narrow place that is as fast as all of them go.
#[must_use]
pub fn bulk(capacity: &Capacity, vms: &[Moving]) -> Allotment {
    let mut rates: Vec<f64> = vms.iter().map(|vm| kept_rate(capacity, vm)).collect();
    let copies = |vm: &Moving| matches!(vm.progress, Progress::Waiting | Progress::Copying);
    let copying: Vec<usize> = (0..vms.len()).filter(|&vm| copies(&vms[vm])).collect();
    let left = |vm: usize| vms[vm].left_bytes.max(1.0);
    let free = less(capacity, &rates);
    let limits = if free.are_positive() {
        free
    } else {
        Limits::of(capacity, vms.len())
    };
    let all_s = limits.time_for(copying.iter().map(|&vm| (vm, left(vm))));
    for &vm in &copying {
        rates[vm] = left(vm) / all_s;
    }
    Allotment {
        rates,
        runs: vms
            .iter()
            .map(|vm| copies(vm) || vm.progress == Progress::Held)
            .collect(),
        next_start: None,
    }
}

/// Takes off the capacity what VMs get that `rates` names.
fn less(capacity: &Capacity, rates: &[f64]) -> Limits {
    let mut limits = Limits::of(capacity, rates.len());
    limits.bandwidth -= rates.iter().sum::<f64>();
    for cut in &mut limits.cuts {
        let crossing = rates.iter().zip(&cut.crossed_by).filter(|(_, here)| **here);
        cut.rate -= crossing.map(|(rate, _)| rate).sum::<f64>();
    }
    limits
}

/// What a VM gets that neither copies nor is to start.
#[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
fn kept_rate(capacity: &Capacity, vm: &Moving) -> f64 {
    match vm.progress {
        Progress::Parked { bytes_per_s } => bytes_per_s as f64,
        _ => held_rate(capacity, vm, vm.dirty_rate),
    }
}

fn held_rate(capacity: &Capacity, vm: &Moving, rate: f64) -> f64 {
    match vm.progress {
        Progress::Held => rate.max(capacity.bandwidth_f64() * HELD_AT_LEAST),
        _ => 0.0,
    }
}

/// Where nobody is left who copies, or nothing converges, the rates follow what is left.
fn by_what_is_left(capacity: &Capacity, vms: &[Moving]) -> Vec<f64> {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "amounts are positive and far below 2^63"
    )]
    let whole = |value: f64| value.max(0.0) as u64;
    let demands = vms.iter().map(|vm| Demand {
        remaining_bytes: whole(vm.left_bytes),
        dirty_rate_bytes_per_s: whole(vm.dirty_rate),
        held: vm.progress == Progress::Held,
    });
    let demands: Vec<Demand> = demands.collect();
    capacity::shares(capacity.rate(vms.len()), &demands)
}

/// Everybody runs.
fn together(capacity: &Capacity, vms: &[Moving]) -> Allotment {
    let mut rates: Vec<f64> = vms
        .iter()
        .map(|vm| held_rate(capacity, vm, vm.dirty_rate))
        .collect();
    let copying: Vec<usize> = (0..vms.len())
        .filter(|&vm| vms[vm].progress != Progress::Held)
        .collect();
    let limits = less(capacity, &rates);
    let loads = copying.iter().map(|&vm| VmLoad {
        remaining_bytes: vms[vm].left_bytes.max(1.0),
        dirty_rate_bytes_per_s: vms[vm].dirty_rate,
        threshold_bytes: 0.0,
        working_set_bytes: vms[vm].working_set,
    });
    let loads: Vec<VmLoad> = loads.collect();
    let found = limits.are_positive().then(|| {
        allocate_within(
            &limits.capacity(&copying),
            &loads,
            &bandwidth::Limits::default(),
        )
        .ok()
    });
    match found.flatten() {
        Some(found) => {
            for (&vm, rate) in copying.iter().zip(found.rates_bytes_per_s) {
                rates[vm] = rate;
            }
        }
        None => rates = by_what_is_left(capacity, vms),
    }
    Allotment {
        rates,
        runs: vec![true; vms.len()],
        next_start: None,
    }
}

/// The first one in the order that is not held gets all that the held ones leave.
fn in_turn(capacity: &Capacity, vms: &[Moving]) -> Allotment {
    let mut order: Vec<usize> = (0..vms.len()).collect();
    order.sort_by(|&a, &b| {
        let rate = |vm: usize| vms[vm].nominal_dirty_rate;
        rate(a).total_cmp(&rate(b)).then(a.cmp(&b))
    });
    let mut rates: Vec<f64> = vms.iter().map(|vm| kept_rate(capacity, vm)).collect();
    let mut runs: Vec<bool> = vms.iter().map(|vm| !vm.progress.is_to_start()).collect();
    // One that was started out of its turn goes on.
    let next = order
        .iter()
        .find(|&&vm| vms[vm].progress == Progress::Copying)
        .or_else(|| order.iter().find(|&&vm| vms[vm].progress.is_to_start()));
    if let Some(&next) = next {
        rates[next] = 0.0;
        let taken: Vec<(usize, f64)> = rates.iter().copied().enumerate().collect();
        let limits = Limits::of(capacity, vms.len());
        let least = capacity.bandwidth_f64() * HELD_AT_LEAST;
        rates[next] = limits.free_for(next, &taken).max(least);
        runs[next] = true;
    }
    Allotment {
        rates,
        runs,
        next_start: None,
    }
}

/// COMMA's schedule from here on; nothing where the highest dirty rates do not fit (Eq. 3).
///
/// VMs that copy have started, whatever a schedule from here would say: they come first, and one
/// that is ahead of it keeps its highest dirty rate while the others catch up.
fn with_delays(capacity: &Capacity, vms: &[Moving]) -> Option<Allotment> {
    let loads = vms.iter().map(|vm| Load {
        left_bytes: vm.left_bytes.max(1.0),
        max_dirty_rate: vm.max_dirty_rate.max(vm.dirty_rate),
        dirty_rate: vm.dirty_rate,
    });
    let loads: Vec<Load> = nearly_fitting(capacity, loads.collect());
    let those = |test: &dyn Fn(Progress) -> bool| -> Vec<usize> {
        (0..vms.len())
            .filter(|&vm| test(vms[vm].progress))
            .collect()
    };
    let mut rates = vec![0.0; vms.len()];
    for vm in those(&|progress| progress == Progress::Held) {
        rates[vm] = held_rate(capacity, &vms[vm], loads[vm].max_dirty_rate);
    }
    let mut copying = by_start(&loads, &those(&|progress| progress == Progress::Copying));
    let waiting = those(&Progress::is_to_start);
    let mut runs: Vec<bool> = vms.iter().map(|vm| !vm.progress.is_to_start()).collect();
    let schedule = loop {
        let limits = less(capacity, &rates);
        if copying.is_empty() && waiting.is_empty() {
            break None;
        }
        let schedule = if copying.is_empty() {
            best_order(&loads, &limits, &waiting)?
        } else {
            let order = [copying.clone(), by_start(&loads, &waiting)].concat();
            delayed(&loads, &limits, &order)?
        };
        let ahead = schedule
            .vms
            .iter()
            .find(|planned| planned.start_s > NOW_S && copying.contains(&planned.vm));
        match ahead.map(|planned| planned.vm) {
            Some(vm) => {
                rates[vm] = loads[vm].max_dirty_rate;
                copying.retain(|&other| other != vm);
            }
            None => break Some(schedule),
        }
    };
    let mut next_start: Option<(f64, usize)> = None;
    for planned in schedule.iter().flat_map(|schedule| &schedule.vms) {
        if planned.start_s > NOW_S {
            if next_start.is_none_or(|(soonest, _)| planned.start_s < soonest) {
                next_start = Some((planned.start_s, planned.vm));
            }
            continue;
        }
        runs[planned.vm] = true;
        let steps = planned.bandwidth.iter().rev();
        let mut steps = steps.skip_while(|(at, _)| *at > NOW_S);
        rates[planned.vm] = steps.next().map_or(0.0, |step| step.1);
    }
    keep_parked(capacity, vms, &runs, &mut rates);
    Some(Allotment {
        rates,
        runs,
        next_start,
    })
}

/// Loads whose highest dirty rates miss what they pass by little: lowered until they fit.
fn nearly_fitting(capacity: &Capacity, mut loads: Vec<Load>) -> Vec<Load> {
    let limits = Limits::of(capacity, loads.len());
    let most = || loads.iter().map(|load| load.max_dirty_rate).enumerate();
    // Of amounts in bytes per second the "time" is the part that they take of what they pass.
    let part = limits.time_for(most());
    if part > 1.0 && part * (1.0 - NEARLY) <= 1.0 {
        for load in &mut loads {
            load.max_dirty_rate = (load.max_dirty_rate / part).max(load.dirty_rate);
        }
    }
    loads
}

/// Gives those that stay parked their least, at the cost of the others where it has to be.
fn keep_parked(capacity: &Capacity, vms: &[Moving], runs: &[bool], rates: &mut [f64]) {
    let stays = |vm: usize| !runs[vm] && matches!(vms[vm].progress, Progress::Parked { .. });
    for vm in (0..vms.len()).filter(|&vm| stays(vm)) {
        rates[vm] = kept_rate(capacity, &vms[vm]);
    }
    let limits = Limits::of(capacity, vms.len());
    let part = |rate: f64, crosses: &dyn Fn(usize) -> bool| {
        let here = (0..vms.len()).filter(|&vm| crosses(vm));
        let (parked, others): (Vec<usize>, Vec<usize>) = here.partition(|&vm| stays(vm));
        let sum = |those: Vec<usize>| those.into_iter().map(|vm| rates[vm]).sum::<f64>();
        let (parked, others) = (sum(parked), sum(others));
        if parked > 0.0 && parked + others > rate {
            ((rate - parked) / others).max(0.0)
        } else {
            1.0
        }
    };
    let cuts = limits.cuts.iter();
    let part = cuts
        .map(|cut| part(cut.rate, &|vm| cut.crossed_by[vm]))
        .fold(part(limits.bandwidth, &|_| true), f64::min);
    for vm in (0..vms.len()).filter(|&vm| !stays(vm)) {
        rates[vm] *= part;
    }
}

#[cfg(test)]
mod tests;
