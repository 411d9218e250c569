//! Ways to send a group so that its VMs finish together.
//!
//! How long a VM takes at a rate says [`Sent::time`]. COMMA's scheme, delayed starts, is in
//! [`schedule`](super::super::schedule).

use super::sent::Sending;
use crate::scheduler::bandwidth::{self, VmLoad};
use crate::scheduler::schedule::{Limits, Schedule, VmSchedule};

pub use super::sent::Sent;

/// A VM alone, with all it can get.
#[must_use]
pub fn alone(sent: &[Sent], limits: &Limits, vm: usize) -> Option<Schedule> {
    lll(sent, limits, &[vm])
}

/// LLL: one after another by dirty rate, the largest last; who is ready is held and goes on
/// sending what it dirties (VMbuddies 3.2). Nothing where that never ends.
#[must_use]
pub fn lll(sent: &[Sent], limits: &Limits, group: &[usize]) -> Option<Schedule> {
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
        let time = sent[vm].time(rate);
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
    let mut sending: Vec<Sending> = sent.iter().map(Sending::of).collect();
    let mut steps: Vec<Vec<(f64, f64)>> = vec![Vec::new(); sent.len()];
    let mut done = Vec::new();
    let mut now = 0.0;
    while !active.is_empty() {
        let rates = limits.equal_parts(&active, least);
        let time = |index: usize| {
            let vm = active[index];
            sent[vm].time_from(&sending[vm], rates[index])
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
            sent[vm].go_on(&mut sending[vm], rate, step);
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
