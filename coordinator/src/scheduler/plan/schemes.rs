//! Ways to send a group so that its VMs finish together.
//!
//! A VM with `left` bytes that dirties `d` bytes a second needs left / (r − d) seconds at a rate r,
//! and never more than cap / r, where a writable working set bounds what can be dirtied
//! (VMbuddies 3.3.1). COMMA's scheme, delayed starts, is in [`schedule`](super::super::schedule).

use crate::scheduler::bandwidth::{self, VmLoad};
use crate::scheduler::schedule::{Limits, Load, Schedule, VmSchedule};

/// A VM as these models see it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sent {
    /// What is to be sent.
    pub load: Load,
    /// What is sent at most, in bytes; infinite without a known working set.
    pub cap: f64,
    /// The writable working set, where it is known, in bytes.
    pub working_set: Option<f64>,
}

impl Sent {
    /// How long it takes at this rate (bytes per second), in seconds; infinite where it never ends.
    #[must_use]
    pub fn time(&self, rate: f64) -> f64 {
        if self.load.left_bytes <= 0.0 {
            return 0.0;
        }
        let surplus = rate - self.load.dirty_rate;
        let converged = if surplus > 0.0 {
            self.load.left_bytes / surplus
        } else {
            f64::INFINITY
        };
        converged.min(self.cap / rate)
    }
}

/// A VM alone, with all it can get.
#[must_use]
pub fn alone(sent: &[Sent], limits: &Limits, vm: usize) -> Option<Schedule> {
    lll(sent, limits, &[vm])
}

/// LLL: one after another by dirty rate, the largest last; who is ready is held and goes on
/// sending what it dirties (VMbuddies 3.2). Nothing where that never ends.
#[must_use]
pub fn lll(sent: &[Sent], limits: &Limits, group: &[usize]) -> Option<Schedule> {
    in_turn(sent, limits, group, |vm, rate| sent[vm].time(rate))
}

/// LLL with another model of the time (seconds) that a VM takes at a rate (bytes per second).
pub(super) fn in_turn(
    sent: &[Sent],
    limits: &Limits,
    group: &[usize],
    time: impl Fn(usize, f64) -> f64,
) -> Option<Schedule> {
    let mut order = group.to_vec();
    order.sort_by(|&a, &b| {
        let rate = |vm: usize| sent[vm].load.dirty_rate;
        rate(a).total_cmp(&rate(b)).then(a.cmp(&b))
    });
    let mut now = 0.0;
    let mut held: Vec<(usize, f64)> = Vec::new();
    let mut vms = Vec::new();
    for vm in order {
        let rate = limits.free_for(vm, &held);
        let time = time(vm, rate);
        if !time.is_finite() {
            return None;
        }
        let dirty_rate = sent[vm].load.dirty_rate;
        held.push((vm, dirty_rate));
        vms.push(VmSchedule {
            vm,
            start_s: now,
            bandwidth: vec![(now, rate)],
        });
        now += time;
        vms.last_mut()?.bandwidth.push((now, dirty_rate));
    }
    // The last one is not held.
    vms.last_mut().and_then(|vm| vm.bandwidth.pop());
    Some(Schedule {
        duration_s: now,
        vms,
    })
}

/// All at once, each from the start at the rate with which all finish together (VMbuddies 3.3).
/// Nothing where that never ends.
#[must_use]
pub fn oba(
    sent: &[Sent],
    limits: &Limits,
    rules: &bandwidth::Limits,
    group: &[usize],
) -> Option<Schedule> {
    let vms = group.iter().map(|&vm| VmLoad {
        remaining_bytes: sent[vm].load.left_bytes,
        dirty_rate_bytes_per_s: sent[vm].load.dirty_rate,
        threshold_bytes: 0.0,
        working_set_bytes: sent[vm].working_set,
    });
    let vms: Vec<VmLoad> = vms.collect();
    let all = bandwidth::allocate_within(&limits.capacity(group), &vms, rules).ok()?;
    let rates = group.iter().zip(&all.rates_bytes_per_s);
    let vms = rates.map(|(&vm, &rate)| VmSchedule {
        vm,
        start_s: 0.0,
        bandwidth: vec![(0.0, rate)],
    });
    Some(Schedule {
        duration_s: all.completion_s,
        vms: vms.collect(),
    })
}

/// All at once, each with its least rate and an equal part of the rest, and each finishing when it
/// is ready: what is free then goes to the others. One schedule per VM, in the order in which they
/// finish; nothing where that never ends.
#[must_use]
pub fn parallel(sent: &[Sent], limits: &Limits, least: &[f64]) -> Option<Vec<Schedule>> {
    let mut active: Vec<usize> = (0..sent.len()).collect();
    let mut left: Vec<f64> = sent.iter().map(|vm| vm.load.left_bytes).collect();
    let mut carried = vec![0.0; sent.len()];
    let mut steps: Vec<Vec<(f64, f64)>> = vec![Vec::new(); sent.len()];
    let mut done = Vec::new();
    let mut now = 0.0;
    while !active.is_empty() {
        let rates = limits.equal_parts(&active, least);
        let time = |index: usize| {
            let vm = active[index];
            let now = Sent {
                load: Load {
                    left_bytes: left[vm],
                    ..sent[vm].load
                },
                cap: (sent[vm].cap - carried[vm]).max(0.0),
                ..sent[vm]
            };
            now.time(rates[index])
        };
        let times: Vec<f64> = (0..active.len()).map(time).collect();
        let step = times.iter().copied().fold(f64::INFINITY, f64::min);
        if !step.is_finite() {
            return None;
        }
        for (index, &vm) in active.iter().enumerate() {
            let rate = rates[index];
            if step > 0.0 && steps[vm].last().is_none_or(|last| last.1 != rate) {
                steps[vm].push((now, rate));
            }
            left[vm] = (left[vm] + (sent[vm].load.dirty_rate - rate) * step).max(0.0);
            carried[vm] += rate * step;
        }
        now += step;
        let ended = |index: usize| times[index] <= step * (1.0 + 1e-12);
        let over = active.iter().enumerate().filter(|(index, _)| ended(*index));
        for (_, &vm) in over {
            done.push(Schedule {
                duration_s: now,
                vms: vec![VmSchedule {
                    vm,
                    start_s: 0.0,
                    bandwidth: std::mem::take(&mut steps[vm]),
                }],
            });
        }
        let mut index = 0;
        active.retain(|_| {
            index += 1;
            !ended(index - 1)
        });
    }
    Some(done)
}
