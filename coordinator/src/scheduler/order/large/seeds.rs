//! Where a search starts: orders that are cheap to find and good already.

use crate::scheduler::group::partition::partition;
use crate::scheduler::group::{GroupTime, by_heaviest_pair};
use crate::scheduler::order::Problem;
use crate::scheduler::order::heuristic::order_groups;

use super::polish::split;

/// Orders that grow along the smallest cut start from so many VMs.
const GROWN_FROM: usize = 8;

/// All seeds. Those that do not keep the tiers are left out.
#[must_use]
pub fn all<T: GroupTime>(problem: &Problem<'_, T>) -> Vec<Vec<Vec<usize>>> {
    let vms = problem.time.vms();
    let least: Vec<f64> = (0..vms).map(|vm| problem.time.least(vm)).collect();
    let by_pair = by_heaviest_pair(problem.time, problem.traffic);
    let by_cut = partition(problem.traffic, &least, problem.time.most());
    let mut seeds = Vec::new();
    for groups in [by_pair, by_cut] {
        let valid = problem.judge(groups, false);
        if valid
            .durations_s
            .iter()
            .all(|duration| duration.is_finite())
        {
            seeds.push(order_groups(problem, valid.groups));
        }
    }
    let mut lines: Vec<Vec<usize>> = seeds.iter().map(|groups| groups.concat()).collect();
    let starts = (0..vms).step_by((vms / GROWN_FROM).max(1));
    lines.extend(starts.map(|first| grown(problem, first)));
    if problem.tiers.is_some() {
        lines.extend(
            lines
                .clone()
                .into_iter()
                .filter_map(|line| with_covered_ends(problem, &line)),
        );
    }
    seeds.extend(lines.iter().filter_map(|line| split(problem, line)));
    seeds.retain(|groups| problem.keeps_tiers(groups));
    seeds
}

/// All VMs, each next the one that adds least to what crosses.
fn grown<T: GroupTime>(problem: &Problem<'_, T>, first: usize) -> Vec<usize> {
    let vms = problem.time.vms();
    let mut growth: Vec<f64> = (0..vms)
        .map(|vm| problem.traffic.of(vm).iter().map(|(_, rate)| rate).sum())
        .collect();
    let mut open: Vec<usize> = (0..vms).collect();
    let mut line = Vec::with_capacity(vms);
    let mut next = Some(first);
    while let Some(vm) = next {
        open.retain(|&other| other != vm);
        line.push(vm);
        for &(other, rate) in problem.traffic.of(vm) {
            growth[other] -= 2.0 * rate;
        }
        let least = open.iter().copied();
        next = least.min_by(|&a, &b| growth[a].total_cmp(&growth[b]).then(a.cmp(&b)));
    }
    line
}

/// The same order, but with a VM of every tier at both ends: the lightest ones of each tier.
fn with_covered_ends<T: GroupTime>(problem: &Problem<'_, T>, line: &[usize]) -> Option<Vec<usize>> {
    let tiers = problem.tiers?;
    let mut light = line.to_vec();
    light.sort_by(|&a, &b| problem.time.least(a).total_cmp(&problem.time.least(b)));
    let mut ends: [Vec<usize>; 2] = [Vec::new(), Vec::new()];
    for index in 0..2 {
        for &vm in &light {
            let taken = ends.iter().any(|end| end.contains(&vm));
            let same = |&other: &usize| tiers.same(vm, other);
            if !taken && !ends[index].iter().any(same) {
                ends[index].push(vm);
            }
        }
    }
    let [first, last] = ends;
    let middle = line
        .iter()
        .filter(|vm| !first.contains(vm) && !last.contains(vm));
    let middle: Vec<usize> = middle.copied().collect();
    Some([first, middle, last].concat())
}
