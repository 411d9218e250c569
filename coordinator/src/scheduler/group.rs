//! Valid groups: which VMs can move together (COMMA 3.2.2, Eq. 3), how long that takes, and the
//! ways to form groups that do not yet look at their order.
//!
//! - [`GroupTime`]: how long a group takes; all that the searches know of bandwidth.
//! - [`ByDelayedStart`]: COMMA's answer, the schedule of 3.4.
//! - [`by_heaviest_pair`]: COMMA's heuristic, steps 1 and 2 (3.3.2).
//! - [`partition`]: Fiduccia-Mattheyses; [`replicas`]: a server of every tier on both sites.

pub mod partition;
pub mod replicas;

use super::impact::Traffic;
use super::schedule::{Limits, Load, ROUNDING, by_start, delayed};

/// How long groups take. A group's time depends on the group alone.
pub trait GroupTime {
    /// How many VMs there are.
    fn vms(&self) -> usize;

    /// From the group's start to its common finish, in seconds; infinite where the group is not
    /// valid. `group` lists its VMs in the order of [`order`](Self::order), without repetition.
    fn duration(&self, group: &[usize]) -> f64;

    /// All VMs, in the order in which [`duration`](Self::duration) wants to see them.
    fn order(&self) -> Vec<usize>;

    /// What a VM needs at least once it has started, in bytes per second: Eq. 3's summand.
    fn least(&self, vm: usize) -> f64;

    /// What the VMs of a group may need together, in bytes per second: Eq. 3's bound.
    fn most(&self) -> f64;
}

/// Time by COMMA's schedule: delayed starts in its order, back-filled bandwidth (3.4).
#[derive(Debug, Clone)]
pub struct ByDelayedStart<'a> {
    loads: &'a [Load],
    limits: &'a Limits,
    order: Vec<usize>,
}

impl<'a> ByDelayedStart<'a> {
    /// For these VMs under these limits.
    #[must_use]
    pub fn new(loads: &'a [Load], limits: &'a Limits) -> Self {
        let all: Vec<usize> = (0..loads.len()).collect();
        Self {
            loads,
            limits,
            order: by_start(loads, &all),
        }
    }
}

impl GroupTime for ByDelayedStart<'_> {
    fn vms(&self) -> usize {
        self.loads.len()
    }

    fn duration(&self, group: &[usize]) -> f64 {
        if !self.limits.cuts.is_empty() {
            let schedule = delayed(self.loads, self.limits, group);
            return schedule.map_or(f64::INFINITY, |schedule| schedule.duration_s);
        }
        // The same schedule where all VMs share one link: the steps are not wanted.
        let bandwidth = self.limits.bandwidth;
        let mut earlier: f64 = group.iter().map(|&vm| self.loads[vm].max_dirty_rate).sum();
        if earlier > bandwidth * (1.0 + ROUNDING) {
            return f64::INFINITY;
        }
        let mut before_finish = 0.0;
        for &vm in group.iter().rev() {
            let load = &self.loads[vm];
            earlier -= load.max_dirty_rate;
            let growth = load.max_dirty_rate - load.dirty_rate;
            let left = load.left_bytes - growth * before_finish;
            if left > 0.0 {
                let net = bandwidth - earlier - load.dirty_rate;
                if net <= bandwidth * ROUNDING {
                    return f64::INFINITY;
                }
                before_finish += left / net;
            }
        }
        before_finish
    }

    fn order(&self) -> Vec<usize> {
        self.order.clone()
    }

    fn least(&self, vm: usize) -> f64 {
        self.loads[vm].max_dirty_rate
    }

    fn most(&self) -> f64 {
        self.limits.bandwidth
    }
}

/// Where every VM stands in the order that `time` wants.
#[must_use]
pub fn places(time: &impl GroupTime) -> Vec<usize> {
    let mut place = vec![0; time.vms()];
    for (index, vm) in time.order().into_iter().enumerate() {
        place[vm] = index;
    }
    place
}

/// Groups by COMMA's heuristic (3.3.2, steps 1 and 2): pairs by descending rate are put together
/// where the result is valid. VMs without traffic, of which the paper says nothing, stay alone.
#[must_use]
pub fn by_heaviest_pair(time: &impl GroupTime, traffic: &Traffic) -> Vec<Vec<usize>> {
    let place = places(time);
    let mut pairs: Vec<(usize, usize, f64)> = traffic.pairs().collect();
    pairs.sort_by(|a, b| b.2.total_cmp(&a.2).then((a.0, a.1).cmp(&(b.0, b.1))));
    let mut group_of: Vec<Option<usize>> = vec![None; time.vms()];
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (a, b, _) in pairs {
        // A VM that is in no group yet joins as a group of its own: the paper's three cases in one.
        let [x, y] = [a, b].map(|vm| {
            *group_of[vm].get_or_insert_with(|| {
                groups.push(vec![vm]);
                groups.len() - 1
            })
        });
        if x == y {
            continue;
        }
        let mut joined = [&groups[x][..], &groups[y]].concat();
        joined.sort_by_key(|&vm| place[vm]);
        if time.duration(&joined).is_finite() {
            for &vm in &groups[y] {
                group_of[vm] = Some(x);
            }
            groups[x] = joined;
            groups[y].clear();
        }
    }
    groups.retain(|group| !group.is_empty());
    let alone = (0..time.vms()).filter(|&vm| group_of[vm].is_none());
    groups.extend(alone.map(|vm| vec![vm]));
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pairs_join_while_the_sum_of_highest_dirty_rates_fits() {
        let load = |most| Load {
            left_bytes: 10.0,
            max_dirty_rate: most,
            dirty_rate: 0.5 * most,
        };
        let loads = [10.0, 10.0, 10.0, 1.0, 1.0].map(load);
        let limits = Limits::link(20.0);
        let time = ByDelayedStart::new(&loads, &limits);
        let traffic = Traffic::between(5, [(0, 1, 9.0), (1, 2, 8.0), (2, 3, 1.0)]);
        let groups = by_heaviest_pair(&time, &traffic);
        // Each group in its order of starts.
        assert_eq!(groups, [vec![0, 1], vec![3, 2], vec![4]]);
    }

    proptest! {
        #[test]
        fn the_short_form_is_the_schedules_duration(
            parts in prop::collection::vec((0.0..1000.0_f64, 0.1..30.0_f64, 0.0..0.95_f64), 1..9),
        ) {
            let load = |(left_bytes, max_dirty_rate, mean)| Load {
                left_bytes,
                max_dirty_rate,
                dirty_rate: max_dirty_rate * mean,
            };
            let loads: Vec<Load> = parts.into_iter().map(load).collect();
            let limits = Limits::link(100.0);
            let time = ByDelayedStart::new(&loads, &limits);
            let short = time.duration(&time.order());
            let whole = delayed(&loads, &limits, &time.order());
            let whole = whole.map_or(f64::INFINITY, |schedule| schedule.duration_s);
            prop_assert!(short == whole || (short - whole).abs() <= 1e-9 * whole, "{short} {whole}");
        }
    }
}
