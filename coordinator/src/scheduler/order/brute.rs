//! COMMA's brute force (3.3.1): every way to divide the VMs into valid groups, in every order, each
//! scored by Eq. 1 as it stands. Up to 9 VMs; the paper takes 32 s there.

use crate::scheduler::group::GroupTime;
use crate::scheduler::impact::of_times;
use crate::scheduler::schedule::{ROUNDING, for_each_order};

use super::Problem;

/// VMs that this search goes up to.
pub const UP_TO: usize = 9;

/// The best groups and their order; nothing where the tiers cannot be kept.
#[must_use]
pub fn search<T: GroupTime>(problem: &Problem<'_, T>) -> Option<Vec<Vec<usize>>> {
    let vms = problem.time.order();
    let subsets = 0..1_u32 << vms.len();
    let times = subsets.map(|set| problem.time.duration(&members(&vms, set)));
    let mut best = Best {
        problem,
        times: times.collect(),
        arrival: vec![0.0; vms.len()],
        vms,
        least: (f64::INFINITY, f64::INFINITY),
        groups: None,
    };
    best.divide((1_u32 << best.vms.len()) - 1, &mut Vec::new());
    best.groups
}

fn members(vms: &[usize], set: u32) -> Vec<usize> {
    let vms = vms.iter().enumerate();
    let within = vms.filter(|(index, _)| set >> index & 1 == 1);
    within.map(|(_, vm)| *vm).collect()
}

/// The search; sets have a bit per VM of `vms`.
struct Best<'a, T> {
    problem: &'a Problem<'a, T>,
    vms: Vec<usize>,
    /// By set.
    times: Vec<f64>,
    /// By VM, of the order that is scored.
    arrival: Vec<f64>,
    /// Impact, and completion where impacts are the same.
    least: (f64, f64),
    groups: Option<Vec<Vec<usize>>>,
}

impl<T: GroupTime> Best<'_, T> {
    /// Puts the first of `rest` into every group that it can be in.
    fn divide(&mut self, rest: u32, groups: &mut Vec<u32>) {
        if rest == 0 {
            for_each_order(&mut groups.clone(), &mut |order| self.score(order));
            return;
        }
        let others = rest & (rest - 1);
        let first = rest ^ others;
        let mut with = others;
        loop {
            let group = first | with;
            if self.times[group as usize].is_finite() {
                groups.push(group);
                self.divide(rest ^ group, groups);
                groups.pop();
            }
            if with == 0 {
                break;
            }
            with = (with - 1) & others;
        }
    }

    fn score(&mut self, order: &[u32]) {
        let mut now = 0.0;
        for &group in order {
            now += self.times[group as usize];
            for (index, &vm) in self.vms.iter().enumerate() {
                if group >> index & 1 == 1 {
                    self.arrival[vm] = now;
                }
            }
        }
        let impact = of_times(self.problem.traffic, &self.arrival);
        let (least, end) = self.least;
        if impact < least * (1.0 - ROUNDING) || (impact <= least * (1.0 + ROUNDING) && now < end) {
            let groups = order.iter().map(|&group| members(&self.vms, group));
            let groups: Vec<Vec<usize>> = groups.collect();
            if self.problem.keeps_tiers(&groups) {
                self.least = (impact, now);
                self.groups = Some(groups);
            }
        }
    }
}
