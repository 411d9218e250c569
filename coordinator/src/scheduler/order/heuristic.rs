//! COMMA's heuristic (3.3.2): groups by descending rate of their pairs, then the best order of
//! these groups.
//!
//! The paper compares all permutations of the groups. [`order_groups`] finds the same order by
//! dynamic programming over sets of groups, up to [`PERMUTED_UP_TO`] of them. Above that no exact
//! step is affordable: the best of the greedy orders (from every first group, next the one whose
//! move costs least per traffic that it brings together), improved by moving single groups until
//! nothing helps.

use crate::scheduler::group::{GroupTime, by_heaviest_pair};
use crate::scheduler::impact::Traffic;

use super::Problem;

/// Up to so many groups are brought into their best order; this takes 2^groups steps.
pub const PERMUTED_UP_TO: usize = 16;

/// The heuristic's groups, in order.
#[must_use]
pub fn search<T: GroupTime>(problem: &Problem<'_, T>) -> Vec<Vec<usize>> {
    let groups = by_heaviest_pair(problem.time, problem.traffic);
    order_groups(problem, groups)
}

/// Brings groups into the order of least impact: the best up to [`PERMUTED_UP_TO`] groups.
#[must_use]
pub fn order_groups<T: GroupTime>(
    problem: &Problem<'_, T>,
    groups: Vec<Vec<usize>>,
) -> Vec<Vec<usize>> {
    let judged = problem.judge(groups, false);
    let graph = Graph::new(problem.traffic, &judged.groups, judged.durations_s);
    let order = if judged.groups.len() <= PERMUTED_UP_TO {
        graph.best_order()
    } else {
        graph.good_order()
    };
    let mut groups = judged.groups;
    let taken = order
        .into_iter()
        .map(|group| std::mem::take(&mut groups[group]));
    taken.collect()
}

/// Groups as vertices.
#[derive(Debug)]
struct Graph {
    traffic: Traffic,
    duration: Vec<f64>,
    /// What each says to all others.
    outside: Vec<f64>,
}

impl Graph {
    fn new(traffic: &Traffic, groups: &[Vec<usize>], duration: Vec<f64>) -> Self {
        let mut of = vec![0; traffic.vms()];
        for (index, group) in groups.iter().enumerate() {
            for &vm in group {
                of[vm] = index;
            }
        }
        let pairs = traffic.pairs().map(|(a, b, rate)| (of[a], of[b], rate));
        let traffic = Traffic::between(groups.len(), pairs);
        let sum = |group| traffic.of(group).iter().map(|(_, rate)| rate).sum();
        Self {
            outside: (0..groups.len()).map(sum).collect(),
            traffic,
            duration,
        }
    }

    fn cost(&self, order: &[usize]) -> f64 {
        let mut moved = vec![false; order.len()];
        let (mut cut, mut cost) = (0.0, 0.0);
        for &group in order {
            cost += self.duration[group] * cut;
            cut += self.growth(group, &moved);
            moved[group] = true;
        }
        cost
    }

    /// By how much more crosses when this group has moved too.
    fn growth(&self, group: usize, moved: &[bool]) -> f64 {
        let to_moved = self.traffic.of(group).iter().filter(|(g, _)| moved[*g]);
        self.outside[group] - 2.0 * to_moved.map(|(_, rate)| rate).sum::<f64>()
    }

    fn best_order(&self) -> Vec<usize> {
        let count = self.duration.len();
        let subsets = 1_usize << count;
        let mut cost = vec![f64::INFINITY; subsets];
        let mut last = vec![0; subsets];
        cost[0] = 0.0;
        let mut cut = vec![0.0; subsets];
        for moved in 0..subsets {
            for group in (0..count).filter(|group| moved >> group & 1 == 0) {
                let next = moved | 1 << group;
                let sum = cost[moved] + self.duration[group] * cut[moved];
                if sum < cost[next] {
                    (cost[next], last[next]) = (sum, group);
                }
                if next > 0 && cut[next] == 0.0 {
                    let to_moved = self.traffic.of(group).iter();
                    let to_moved = to_moved.filter(|(g, _)| moved >> g & 1 == 1);
                    let to_moved: f64 = to_moved.map(|(_, rate)| rate).sum();
                    cut[next] = (cut[moved] + self.outside[group] - 2.0 * to_moved).max(0.0);
                }
            }
        }
        let mut order = Vec::with_capacity(count);
        let mut moved = subsets - 1;
        while moved != 0 {
            order.push(last[moved]);
            moved ^= 1 << last[moved];
        }
        order.reverse();
        order
    }

    fn good_order(&self) -> Vec<usize> {
        // Greedy orders cost a square each: enough first groups for any size.
        let starts = (0..self.duration.len()).step_by(self.duration.len() / 16);
        let orders = starts.map(|first| self.greedy(first));
        let best = orders.min_by(|a, b| self.cost(a).total_cmp(&self.cost(b)));
        self.improved(best.unwrap_or_default())
    }

    fn greedy(&self, first: usize) -> Vec<usize> {
        let count = self.duration.len();
        let mut moved = vec![false; count];
        let mut growth = self.outside.clone();
        let mut order = vec![first];
        loop {
            let last = order[order.len() - 1];
            moved[last] = true;
            for &(group, rate) in self.traffic.of(last) {
                growth[group] -= 2.0 * rate;
            }
            let open = (0..count).filter(|&group| !moved[group]);
            let key = |group: usize| growth[group] / self.duration[group].max(f64::MIN_POSITIVE);
            let Some(next) = open.min_by(|&a, &b| key(a).total_cmp(&key(b)).then(a.cmp(&b))) else {
                return order;
            };
            order.push(next);
        }
    }

    /// Moves single groups to their best place until nothing helps.
    fn improved(&self, mut order: Vec<usize>) -> Vec<usize> {
        for _ in 0..order.len() {
            let mut helped = false;
            for from in 0..order.len() {
                let (gain, to) = [
                    self.best_place(&order, from, true),
                    self.best_place(&order, from, false),
                ]
                .into_iter()
                .fold(
                    (0.0, from),
                    |best, found| if found.0 < best.0 { found } else { best },
                );
                if gain < -1e-9 * self.cost(&order) {
                    let group = order.remove(from);
                    order.insert(to, group);
                    helped = true;
                }
            }
            if !helped {
                break;
            }
        }
        order
    }

    /// The place at which one group costs least, looking one way: it changes places with one
    /// neighbour after another. Returns the change of the cost, and the place.
    fn best_place(&self, order: &[usize], from: usize, later: bool) -> (f64, usize) {
        let group = order[from];
        let rate = |other: usize| {
            let found = self.traffic.of(group).iter().find(|(g, _)| *g == other);
            found.map_or(0.0, |(_, rate)| *rate)
        };
        let mut moved = vec![false; order.len()];
        for &other in &order[..from] {
            moved[other] = true;
        }
        let (mut sum, mut best) = (0.0, (0.0, from));
        // What the group adds to the cut where it stands, given those before it.
        let mut mine = self.growth(group, &moved);
        if later {
            for (place, &other) in order.iter().enumerate().skip(from + 1) {
                let theirs = self.growth(other, &moved);
                // (group, other) with cuts c, c + mine becomes (other, group) with c, c + theirs.
                sum += self.duration[group] * theirs - self.duration[other] * mine;
                moved[other] = true;
                mine -= 2.0 * rate(other);
                if sum < best.0 {
                    best = (sum, place);
                }
            }
        } else {
            for place in (0..from).rev() {
                let other = order[place];
                moved[other] = false;
                mine += 2.0 * rate(other);
                let theirs = self.growth(other, &moved);
                sum += self.duration[other] * mine - self.duration[group] * theirs;
                if sum < best.0 {
                    best = (sum, place);
                }
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::scheduler::schedule::for_each_order;

    fn graph(vms: usize) -> impl Strategy<Value = Graph> {
        let rates = prop::collection::vec(prop_oneof![Just(0.0), 0.0..10.0_f64], vms * vms);
        let times = prop::collection::vec(0.1..10.0_f64, vms);
        (rates, times).prop_map(move |(rates, times)| {
            let pairs = (0..vms).flat_map(|a| (0..a).map(move |b| (a, b)));
            let pairs = pairs.zip(rates).map(|((a, b), rate)| (a, b, rate));
            let groups: Vec<Vec<usize>> = (0..vms).map(|vm| vec![vm]).collect();
            Graph::new(&Traffic::between(vms, pairs), &groups, times)
        })
    }

    proptest! {
        #[test]
        fn the_best_order_is_that_of_all_permutations(graph in graph(6)) {
            let mut least = f64::INFINITY;
            for_each_order(&mut [0, 1, 2, 3, 4, 5], &mut |order| {
                least = least.min(graph.cost(order));
            });
            let found = graph.cost(&graph.best_order());
            prop_assert!((found - least).abs() <= 1e-9 * least.max(1.0), "{found} {least}");
        }

        #[test]
        fn one_groups_best_place_is_the_best_of_all(graph in graph(7), from in 0..7_usize) {
            let order: Vec<usize> = (0..7).collect();
            let before = graph.cost(&order);
            let (_, to) = [true, false]
                .map(|later| graph.best_place(&order, from, later))
                .into_iter()
                .fold((0.0, from), |a, b| if b.0 < a.0 { b } else { a });
            let moved = |to: usize| {
                let mut order = order.clone();
                let group = order.remove(from);
                order.insert(to, group);
                graph.cost(&order)
            };
            let least = (0..7).map(moved).fold(before, f64::min);
            prop_assert!((moved(to) - least).abs() <= 1e-9 * before.max(1.0));
        }

        #[test]
        fn a_good_order_of_many_is_never_worse_than_its_start(graph in graph(18)) {
            let greedy = graph.cost(&graph.greedy(0));
            let order = graph.good_order();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..18).collect::<Vec<_>>());
            prop_assert!(graph.cost(&order) <= greedy * (1.0 + 1e-9));
        }
    }
}
