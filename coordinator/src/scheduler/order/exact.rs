//! The optimum by dynamic programming over subsets: 3^n steps instead of the brute force's n!.
//!
//! What is still to be paid depends only on which VMs have moved:
//! f(S) = min over valid G ⊆ V ∖ S of [S ≠ ∅] · T(G) · cut(S, V ∖ S) + f(S ∪ G), f(V) = 0.
//! The same steps solve a window of a longer order, whose cost outside of it is known
//! ([`Window`]): [`large`](super::large) polishes its orders so.

use crate::scheduler::group::GroupTime;
use crate::scheduler::schedule::ROUNDING;

use super::Problem;

/// VMs that this search goes up to: 20 take seconds, and 24 MiB.
pub const UP_TO: usize = 20;

/// The best groups and their order; nothing where the tiers cannot be kept.
#[must_use]
pub fn search<T: GroupTime>(problem: &Problem<'_, T>) -> Option<Vec<Vec<usize>>> {
    let vms = problem.time.order();
    let window = Window {
        to_before: vec![0.0; vms.len()],
        to_after: vec![0.0; vms.len()],
        vms,
        cut_before: 0.0,
        first: true,
        last: true,
    };
    window.best(problem).map(|best| best.groups)
}

/// A part of an order: VMs between those that have moved and those that move later.
#[derive(Debug)]
pub struct Window {
    /// Its VMs, in the order of [`GroupTime::order`].
    pub vms: Vec<usize>,
    /// What each says to those that have moved, in bytes per second.
    pub to_before: Vec<f64>,
    /// What each says to those that move later, in bytes per second.
    pub to_after: Vec<f64>,
    /// What crosses before the window begins, in bytes per second.
    pub cut_before: f64,
    /// Whether nothing has moved before.
    pub first: bool,
    /// Whether nothing moves later.
    pub last: bool,
}

/// The best order of a window.
#[derive(Debug)]
pub struct Best {
    /// Its groups.
    pub groups: Vec<Vec<usize>>,
    /// Their share of the impact, in bytes.
    pub cost: f64,
}

impl Window {
    /// The best groups and their order within the window; nothing where the tiers cannot be kept.
    #[must_use]
    pub fn best<T: GroupTime>(&self, problem: &Problem<'_, T>) -> Option<Best> {
        let count = self.vms.len();
        let subsets = 1_usize << count;
        let all = subsets - 1;
        let time = self.times(problem, subsets);
        let cut = self.cuts(problem, subsets);
        let covers: Option<Vec<bool>> = problem.tiers.map(|tiers| {
            let members = (0..subsets).map(|set| tiers.cover(self.members(set)));
            members.collect()
        });
        let covers = |set: usize| covers.as_ref().is_none_or(|covers| covers[set]);

        // By what is still to move: the least cost, the completion, and the group to take first.
        let mut cost = vec![f64::INFINITY; subsets];
        let mut ends = vec![f64::INFINITY; subsets];
        let mut take = vec![0_u32; subsets];
        (cost[0], ends[0]) = (0.0, 0.0);
        for rest in 1..subsets {
            let rate = if self.first && rest == all {
                0.0
            } else {
                cut[rest]
            };
            let (mut least, mut end, mut best) = (f64::INFINITY, f64::INFINITY, 0);
            // Costs that differ by rounding are the same: the shorter one is taken.
            let mut bound = least;
            let mut group = rest;
            while group != 0 {
                // The time of an invalid group is not a number, and so never less than anything.
                let sum = time[group] * rate + cost[rest ^ group];
                if sum <= bound {
                    let time = time[group] + ends[rest ^ group];
                    let allowed = (!self.first || rest != all || covers(group))
                        && (!self.last || rest != group || covers(group));
                    if (sum < least * (1.0 - ROUNDING) || time < end) && allowed {
                        (least, end, best) = (sum, time, group);
                        bound = least * (1.0 + ROUNDING);
                    }
                }
                group = (group - 1) & rest;
            }
            (cost[rest], ends[rest]) = (least, end);
            take[rest] = u32::try_from(best).unwrap_or(0);
        }
        if !cost[all].is_finite() {
            return None;
        }
        let mut groups = Vec::new();
        let mut rest = all;
        while rest != 0 {
            let group = take[rest] as usize;
            groups.push(self.members(group).collect());
            rest ^= group;
        }
        Some(Best {
            groups,
            cost: cost[all],
        })
    }

    fn members(&self, set: usize) -> impl Iterator<Item = usize> + '_ {
        let vms = self.vms.iter().enumerate();
        vms.filter(move |(index, _)| set >> index & 1 == 1)
            .map(|(_, vm)| *vm)
    }

    fn times<T: GroupTime>(&self, problem: &Problem<'_, T>, subsets: usize) -> Vec<f64> {
        let mut group = Vec::with_capacity(self.vms.len());
        let times = (0..subsets).map(|set| {
            group.clear();
            group.extend(self.members(set));
            let time = problem.time.duration(&group);
            if time.is_finite() { time } else { f64::NAN }
        });
        times.collect()
    }

    /// What crosses when these VMs of the window are still to move, in bytes per second.
    fn cuts<T: GroupTime>(&self, problem: &Problem<'_, T>, subsets: usize) -> Vec<f64> {
        let count = self.vms.len();
        let mut inside = vec![0.0; count * count];
        for (a, vm) in self.vms.iter().enumerate() {
            for (other, rate) in problem.traffic.of(*vm) {
                if let Some(b) = self.vms.iter().position(|vm| vm == other) {
                    inside[a * count + b] = *rate;
                }
            }
        }
        let all = subsets - 1;
        let mut cut = vec![0.0; subsets];
        cut[all] = self.cut_before;
        for rest in (0..all).rev() {
            // From the set with one VM more, which has moved since.
            let vm = (!rest).trailing_zeros() as usize;
            let from = rest | 1 << vm;
            let mut sum = cut[from] + self.to_after[vm] - self.to_before[vm];
            for (other, rate) in inside[vm * count..][..count].iter().enumerate() {
                sum += if rest >> other & 1 == 1 { *rate } else { -rate };
            }
            cut[rest] = sum.max(0.0);
        }
        cut
    }
}
