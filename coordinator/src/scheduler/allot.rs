//! Who starts now, and what each VM of a group that moves gets: the scheduler's schemes from where
//! the VMs are, not from where they were planned to be.
//!
//! A plan foresees a group's whole schedule; a move asks anew whenever something has changed. The
//! same functions answer both: [`allocate_within`] (VMbuddies 3.3) and [`delayed`] (COMMA 3.4) take
//! what is left to send, and it does not matter to them how much there was.
//!
//! A VM that is held keeps sending what it dirties: that comes off the bandwidth first. The rest is
//! shared by those that copy, as the [`Scheme`] says. One that is held because it does not converge
//! rests as long as others copy.

use std::fmt;

use serde::Serialize;

use super::bandwidth::{self, VmLoad, allocate_within};
use super::schedule::{Limits, Load, best_order, by_start, delayed};
use crate::capacity::{self, Capacity, Demand};

/// What a held VM gets at least, as a part of the bandwidth.
const HELD_AT_LEAST: f64 = 0.001;
/// A start that is due within this time, in seconds, is made now.
const NOW_S: f64 = 0.02;

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
    /// It is in pre-copy.
    Copying,
    /// It is in wait-and-copy.
    Held,
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
    /// Held because more pre-copy is in vain: what it sends is dirty again soon.
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
    /// Bytes per second, by VM. Those of a VM that is not to start yet are 0.
    pub rates: Vec<f64>,
    /// Whether a VM runs: VMs that wait and for which this is true are to be started now.
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
    let fits = limits.bandwidth > 0.0 && limits.cuts.iter().all(|cut| cut.rate > 0.0);
    let found = fits.then(|| {
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
    let mut rates: Vec<f64> = vms
        .iter()
        .map(|vm| held_rate(capacity, vm, vm.dirty_rate))
        .collect();
    let mut runs: Vec<bool> = vms
        .iter()
        .map(|vm| vm.progress != Progress::Waiting)
        .collect();
    // One that was started out of its turn goes on.
    let next = order
        .iter()
        .find(|&&vm| vms[vm].progress == Progress::Copying)
        .or_else(|| {
            order
                .iter()
                .find(|&&vm| vms[vm].progress == Progress::Waiting)
        });
    if let Some(&next) = next {
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
    let loads: Vec<Load> = loads.collect();
    let in_progress = |progress: Progress| -> Vec<usize> {
        (0..vms.len())
            .filter(|&vm| vms[vm].progress == progress)
            .collect()
    };
    let mut rates = vec![0.0; vms.len()];
    for vm in in_progress(Progress::Held) {
        rates[vm] = held_rate(capacity, &vms[vm], loads[vm].max_dirty_rate);
    }
    let mut copying = by_start(&loads, &in_progress(Progress::Copying));
    let waiting = in_progress(Progress::Waiting);
    let mut runs: Vec<bool> = vms
        .iter()
        .map(|vm| vm.progress != Progress::Waiting)
        .collect();
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
    Some(Allotment {
        rates,
        runs,
        next_start,
    })
}

#[cfg(test)]
mod tests;
