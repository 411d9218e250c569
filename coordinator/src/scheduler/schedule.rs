//! Scheduling inside a group: delayed starts and back-filled bandwidth (COMMA 3.4).
//!
//! All VMs of a group finish together. Each runs at its highest dirty rate once it has started, and
//! what is left of the bandwidth goes to the VM that starts last, so that it can start later; what
//! is left before its start goes to the one before it, and so on. A schedule is therefore built
//! backwards from the common finish.
//!
//! [`delayed`] does this for any order of starts and under any set of [`Limits`]: the bandwidth,
//! and the links and network interfaces that only some of the VMs cross. [`by_start`] is COMMA's
//! order, [`best_order`] the best of all orders for small groups.

mod limits;

use std::cmp::Ordering;

pub use limits::{Cut, Limits, ROUNDING};

/// Groups up to this size have every order tried by [`best_order`].
pub const ALL_ORDERS_UP_TO: usize = 6;

/// What a VM has left to send, and how fast it dirties what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Data left at the start, in bytes.
    pub left_bytes: f64,
    /// Highest dirty rate, in bytes per second: the least rate that a started VM gets.
    pub max_dirty_rate: f64,
    /// Mean dirty rate while it is sent, in bytes per second; at most `max_dirty_rate`.
    pub dirty_rate: f64,
}

/// When a VM starts, and what it gets.
#[derive(Debug, Clone, PartialEq)]
pub struct VmSchedule {
    /// The VM.
    pub vm: usize,
    /// From the group's start, in seconds.
    pub start_s: f64,
    /// Steps: from when (seconds from the group's start) at which rate (bytes per second). The
    /// last one lasts until the common finish.
    pub bandwidth: Vec<(f64, f64)>,
}

/// The schedule of a group.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// From the first start to the common finish, in seconds.
    pub duration_s: f64,
    /// The VMs, earliest starter first.
    pub vms: Vec<VmSchedule>,
}

/// COMMA's order of starts: the VM whose data takes longest at its least rate starts first, so by
/// `left / (max dirty rate − dirty rate)`, descending.
#[must_use]
pub fn by_start(loads: &[Load], group: &[usize]) -> Vec<usize> {
    let mut order = group.to_vec();
    order.sort_by(|&a, &b| earlier(&loads[a], &loads[b]).then(a.cmp(&b)));
    order
}

/// Compares two loads by COMMA's order of starts: `Less` starts earlier.
#[must_use]
pub fn earlier(a: &Load, b: &Load) -> Ordering {
    let key = |load: &Load| {
        if load.left_bytes <= 0.0 {
            0.0
        } else {
            load.left_bytes / (load.max_dirty_rate - load.dirty_rate)
        }
    };
    key(b).total_cmp(&key(a))
}

/// Builds a schedule backwards from the common finish.
#[derive(Debug)]
struct Delayed<'a> {
    loads: &'a [Load],
    limits: &'a Limits,
    /// The VMs that have not started yet, seen from the finish; earliest starter first.
    running: Vec<Backwards>,
}

/// One VM, seen from the finish.
#[derive(Debug)]
struct Backwards {
    vm: usize,
    left: f64,
    rate: f64,
    /// Until when before the finish (seconds), at which rate.
    steps: Vec<(f64, f64)>,
}

/// The schedule of VMs that start in this order (earliest first); nothing where they do not
/// converge: the sum of highest dirty rates is above a limit, or nothing is left above the mean.
#[must_use]
pub fn delayed(loads: &[Load], limits: &Limits, order: &[usize]) -> Option<Schedule> {
    let least = order.iter().map(|&vm| (vm, loads[vm].max_dirty_rate));
    if !limits.hold(least) {
        return None;
    }
    let running = order.iter().map(|&vm| Backwards {
        vm,
        left: loads[vm].left_bytes,
        rate: 0.0,
        steps: Vec::new(),
    });
    let delayed = Delayed {
        loads,
        limits,
        running: running.collect(),
    };
    let mut done = delayed.run()?;
    let duration_s = done
        .iter()
        .filter_map(|vm| vm.steps.last())
        .map(|(until, _)| *until)
        .fold(0.0, f64::max);
    done.sort_by_key(|vm| order.iter().position(|&other| other == vm.vm));
    let vms = done.into_iter().map(|vm| forwards(vm, duration_s));
    Some(Schedule {
        duration_s,
        vms: vms.collect(),
    })
}

fn forwards(vm: Backwards, duration_s: f64) -> VmSchedule {
    let at = |before_finish: f64| (duration_s - before_finish).max(0.0);
    let steps = vm.steps.iter().rev();
    VmSchedule {
        vm: vm.vm,
        start_s: vm.steps.last().map_or(duration_s, |(until, _)| at(*until)),
        bandwidth: steps.map(|&(until, rate)| (at(until), rate)).collect(),
    }
}

impl Delayed<'_> {
    fn run(mut self) -> Option<Vec<Backwards>> {
        let mut done = Vec::new();
        let mut before_finish = 0.0;
        loop {
            let (ended, running) = self.running.into_iter().partition(|vm| vm.left <= 0.0);
            self.running = running;
            done.extend::<Vec<_>>(ended);
            if self.running.is_empty() {
                return Some(done);
            }
            self.allot();
            let net = |vm: &Backwards| vm.rate - self.loads[vm.vm].dirty_rate;
            let (next, step) = self
                .running
                .iter()
                .enumerate()
                .filter(|(_, vm)| net(vm) > vm.rate * ROUNDING)
                .map(|(index, vm)| (index, vm.left / net(vm)))
                .min_by(|a, b| a.1.total_cmp(&b.1))?;
            before_finish += step;
            for vm in &mut self.running {
                vm.left -= (vm.rate - self.loads[vm.vm].dirty_rate) * step;
                match vm.steps.last_mut() {
                    Some((until, rate)) if *rate == vm.rate => *until = before_finish,
                    _ => vm.steps.push((before_finish, vm.rate)),
                }
            }
            // It ends here by definition; others that end within rounding go with it.
            self.running[next].left = 0.0;
            for vm in &mut self.running {
                if vm.left <= self.loads[vm.vm].left_bytes * ROUNDING {
                    vm.left = 0.0;
                }
            }
        }
    }

    /// Everyone's highest dirty rate, and the rest to those that start last.
    fn allot(&mut self) {
        for vm in &mut self.running {
            vm.rate = self.loads[vm.vm].max_dirty_rate;
        }
        let cuts = &self.limits.cuts;
        let used: f64 = self.running.iter().map(|vm| vm.rate).sum();
        let mut free = self.limits.bandwidth - used;
        let mut free_in_cut: Vec<f64> = cuts
            .iter()
            .map(|cut| {
                let crossing = self.running.iter().filter(|vm| cut.crossed_by[vm.vm]);
                cut.rate - crossing.map(|vm| vm.rate).sum::<f64>()
            })
            .collect();
        for vm in self.running.iter_mut().rev() {
            let narrow = cuts.iter().zip(&free_in_cut);
            let narrow = narrow.filter(|(cut, _)| cut.crossed_by[vm.vm]);
            let extra = narrow.map(|(_, free)| *free).fold(free, f64::min);
            if extra <= self.limits.bandwidth * ROUNDING {
                continue;
            }
            vm.rate += extra;
            free -= extra;
            for (cut, free) in cuts.iter().zip(&mut free_in_cut) {
                if cut.crossed_by[vm.vm] {
                    *free -= extra;
                }
            }
        }
    }
}

/// The fastest schedule of a group: of all orders up to [`ALL_ORDERS_UP_TO`] VMs, else COMMA's.
#[must_use]
pub fn best_order(loads: &[Load], limits: &Limits, group: &[usize]) -> Option<Schedule> {
    let first = by_start(loads, group);
    let mut best = delayed(loads, limits, &first)?;
    if group.len() > ALL_ORDERS_UP_TO {
        return Some(best);
    }
    for_each_order(&mut first.clone(), &mut |order| {
        if let Some(schedule) = delayed(loads, limits, order) {
            if schedule.duration_s < best.duration_s * (1.0 - ROUNDING) {
                best = schedule;
            }
        }
    });
    Some(best)
}

/// Calls `visit` with every order of `items`.
pub fn for_each_order<T>(items: &mut [T], visit: &mut impl FnMut(&[T])) {
    fn heap<T>(count: usize, items: &mut [T], visit: &mut impl FnMut(&[T])) {
        if count <= 1 {
            visit(items);
            return;
        }
        for index in 0..count {
            heap(count - 1, items, visit);
            if index + 1 < count {
                let other = if count % 2 == 0 { index } else { 0 };
                items.swap(other, count - 1);
            }
        }
    }
    heap(items.len(), items, visit);
}

#[cfg(test)]
mod tests;
