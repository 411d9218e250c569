//! What is still to move, ordered anew while some VMs have moved already.
//!
//! Those that have moved are one vertex for the searches, which goes first: that costs nothing, and
//! anywhere else it costs more than everything. So what the others say to it counts from the begin.
//!
//! - [`quick`]: for the control loop. Few VMs are solved exactly; of many the line of their groups is cut
//!   up anew, the best way for this order ([`split`]).
//! - [`full`]: a search as for a plan; for many VMs it takes seconds.

use crate::scheduler::group::GroupTime;
use crate::scheduler::impact::Traffic;

use super::large::polish::split;
use super::{Problem, Search, find};

/// Up to so many VMs are solved exactly in the control loop.
const QUICKLY_EXACT: usize = 8;

/// Groups of those that have not moved, in order.
type Groups = Vec<Vec<usize>>;

/// The groups that were foreseen, made anew at once; nothing where a VM is no valid group even alone.
#[must_use]
pub fn quick<T: GroupTime>(
    time: &T,
    traffic: &Traffic,
    moved: &[bool],
    groups: &[Vec<usize>],
) -> Option<Groups> {
    let rest = Rest::new(time, moved);
    if rest.vms.len() <= QUICKLY_EXACT {
        return search(time, traffic, moved, Search::Exact);
    }
    let traffic = rest.traffic(traffic);
    let problem = Problem {
        time: &rest,
        traffic: &traffic,
        tiers: None,
    };
    let line = groups.iter().flatten();
    let line = line.filter_map(|vm| rest.vms.iter().position(|other| other == vm));
    let line: Vec<usize> = rest.first().into_iter().chain(line).collect();
    split(&problem, &line).map(|groups| rest.name(groups))
}

/// The best groups that a search finds; nothing where a VM is no valid group even alone.
#[must_use]
pub fn full<T: GroupTime>(time: &T, traffic: &Traffic, moved: &[bool]) -> Option<Groups> {
    search(time, traffic, moved, Search::Auto)
}

/// The best groups for few VMs.
#[must_use]
pub fn exactly<T: GroupTime>(time: &T, traffic: &Traffic, moved: &[bool]) -> Option<Groups> {
    search(time, traffic, moved, Search::Exact)
}

fn search<T: GroupTime>(
    time: &T,
    traffic: &Traffic,
    moved: &[bool],
    search: Search,
) -> Option<Groups> {
    let rest = Rest::new(time, moved);
    let traffic = rest.traffic(traffic);
    let problem = Problem {
        time: &rest,
        traffic: &traffic,
        tiers: None,
    };
    let found = find(&problem, search).ok()?;
    Some(rest.name(found.groups))
}

/// The VMs that have not moved; behind them, where any has, a vertex for all that have.
#[derive(Debug)]
struct Rest<'a, T> {
    time: &'a T,
    vms: Vec<usize>,
    any_moved: bool,
    /// More than all groups take, in seconds.
    longest: f64,
}

impl<'a, T: GroupTime> Rest<'a, T> {
    fn new(time: &'a T, moved: &[bool]) -> Self {
        let vms: Vec<usize> = (0..time.vms()).filter(|&vm| !moved[vm]).collect();
        let each = vms.iter().map(|&vm| time.duration(&[vm]));
        let longest = 1.0 + 10.0 * each.filter(|time| time.is_finite()).sum::<f64>();
        Self {
            time,
            any_moved: vms.len() < time.vms(),
            vms,
            longest,
        }
    }

    /// The vertex of those that have moved.
    fn first(&self) -> Option<usize> {
        self.any_moved.then_some(self.vms.len())
    }

    fn traffic(&self, traffic: &Traffic) -> Traffic {
        let of = |vm: usize| {
            let here = self.vms.iter().position(|other| *other == vm);
            here.or(self.first())
        };
        let pairs = traffic.pairs();
        let pairs = pairs.filter_map(|(a, b, rate)| Some((of(a)?, of(b)?, rate)));
        Traffic::between(self.vms(), pairs)
    }

    /// Groups with the VMs' own numbers, without the one of those that have moved.
    fn name(&self, groups: Groups) -> Groups {
        let own = |group: Vec<usize>| {
            let vms = group.into_iter();
            vms.filter_map(|vm| self.vms.get(vm).copied())
                .collect::<Vec<usize>>()
        };
        let groups = groups.into_iter().map(own);
        groups.filter(|group| !group.is_empty()).collect()
    }
}

impl<T: GroupTime> GroupTime for Rest<'_, T> {
    fn vms(&self) -> usize {
        self.vms.len() + usize::from(self.any_moved)
    }

    fn duration(&self, group: &[usize]) -> f64 {
        match self.first() {
            Some(first) if group == [first] => self.longest,
            Some(first) if group.contains(&first) => f64::INFINITY,
            _ => {
                let group: Vec<usize> = group.iter().map(|&vm| self.vms[vm]).collect();
                self.time.duration(&group)
            }
        }
    }

    fn order(&self) -> Vec<usize> {
        let order = self.time.order().into_iter();
        let here = order.filter_map(|vm| self.vms.iter().position(|other| *other == vm));
        self.first().into_iter().chain(here).collect()
    }

    fn least(&self, vm: usize) -> f64 {
        self.vms.get(vm).map_or(0.0, |&vm| self.time.least(vm))
    }

    fn most(&self) -> f64 {
        self.time.most()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::scheduler::group::ByDelayedStart;
    use crate::scheduler::impact::of_groups;
    use crate::scheduler::schedule::{Limits, Load};

    fn load(left_bytes: f64, dirty_rate: f64) -> Load {
        Load {
            left_bytes,
            max_dirty_rate: 2.0 * dirty_rate,
            dirty_rate,
        }
    }

    /// What groups after those that have moved cost.
    fn cost(
        time: &impl GroupTime,
        traffic: &Traffic,
        moved: &[bool],
        groups: &[Vec<usize>],
    ) -> f64 {
        let before: Vec<usize> = (0..moved.len()).filter(|&vm| moved[vm]).collect();
        let mut all = vec![before];
        all.extend_from_slice(groups);
        let problem = Problem {
            time,
            traffic,
            tiers: None,
        };
        let mut times = problem.judge(groups.to_vec(), false).durations_s;
        times.insert(0, 0.0);
        of_groups(traffic, &all, &times)
    }

    #[test]
    fn who_talks_to_those_that_have_moved_goes_first() {
        let loads = [1.0, 1.0, 1.0].map(|_| load(100.0, 6.0));
        let limits = Limits::link(20.0);
        let time = ByDelayedStart::new(&loads, &limits);
        let traffic = Traffic::between(3, [(0, 2, 5.0), (0, 1, 1.0)]);
        let moved = [true, false, false];
        let expected = vec![vec![2], vec![1]];
        let foreseen = [vec![1], vec![2]];
        assert_eq!(
            quick(&time, &traffic, &moved, &foreseen),
            Some(expected.clone())
        );
        assert_eq!(full(&time, &traffic, &moved), Some(expected));
        // Who talks to each other goes at once, where there is the bandwidth for it.
        let wide = Limits::link(100.0);
        let time = ByDelayedStart::new(&loads, &wide);
        let both = Traffic::between(3, [(0, 2, 1.0), (1, 2, 5.0)]);
        let found = quick(&time, &both, &moved, &foreseen).expect("valid");
        assert_eq!(found.len(), 1);
        // With less than one of them needs, there is no plan.
        let narrow = Limits::link(10.0);
        let time = ByDelayedStart::new(&loads, &narrow);
        assert_eq!(quick(&time, &traffic, &moved, &foreseen), None);
    }

    #[test]
    fn where_no_two_fit_they_go_one_after_another() {
        let loads = vec![load(100.0, 6.0); 104];
        let limits = Limits::link(13.0);
        let time = ByDelayedStart::new(&loads, &limits);
        let pairs = (1..104).map(|vm| (vm - 1, vm, 1.0));
        let traffic = Traffic::between(104, pairs);
        let moved: Vec<bool> = (0..104).map(|vm| vm < 4).collect();
        // They were to move in pairs.
        let foreseen: Vec<Vec<usize>> = (2..52).map(|pair| vec![2 * pair, 2 * pair + 1]).collect();
        let found = quick(&time, &traffic, &moved, &foreseen).expect("valid");
        let alone: Vec<Vec<usize>> = (4..104).map(|vm| vec![vm]).collect();
        assert_eq!(found, alone);
    }

    proptest! {
        #[test]
        fn a_search_of_the_rest_is_no_worse_than_the_quick_way(
            parts in prop::collection::vec((1.0..1000.0_f64, 1.0..9.0_f64), 3..13),
            rates in prop::collection::vec(0.0..10.0_f64, 80),
            moved in 1_usize..3,
        ) {
            let loads: Vec<Load> = parts.iter().map(|(left, rate)| load(*left, *rate)).collect();
            let limits = Limits::link(20.0);
            let time = ByDelayedStart::new(&loads, &limits);
            let count = loads.len();
            let pairs = (0..count).flat_map(|a| (0..a).map(move |b| (a, b)));
            let pairs = pairs.zip(&rates).map(|((a, b), rate)| (a, b, *rate));
            let traffic = Traffic::between(count, pairs);
            let moved: Vec<bool> = (0..count).map(|vm| vm < moved).collect();
            let foreseen: Vec<Vec<usize>> =
                (0..count).filter(|&vm| !moved[vm]).map(|vm| vec![vm]).collect();
            let quick = quick(&time, &traffic, &moved, &foreseen).expect("each is valid alone");
            let full = full(&time, &traffic, &moved).expect("each is valid alone");
            for groups in [&quick, &full] {
                let mut all = groups.concat();
                all.sort_unstable();
                prop_assert_eq!(all, foreseen.concat());
            }
            let costs = [&quick, &full, &foreseen].map(|one| cost(&time, &traffic, &moved, one));
            prop_assert!(costs[1] <= costs[0] * (1.0 + 1e-9), "{costs:?}");
            prop_assert!(costs[0] <= costs[2] * (1.0 + 1e-9), "{costs:?}");
        }
    }
}
