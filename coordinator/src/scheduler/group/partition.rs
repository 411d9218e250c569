//! Groups with little traffic between them: Fiduccia-Mattheyses, k-way, over a heavy-edge
//! coarsening (VMbuddies 4.3).
//!
//! VMs that talk most are merged level by level while a merged one still fits; the coarsest level
//! is packed into as few groups as it takes; then every level is refined on the way back. A pass
//! moves each VM at most once, best gain first (gain(v, p → q) = w(v, q) − w(v, p)), downhill too,
//! and then goes back to its best moment; passes repeat until one gains nothing.
//!
//! This minimises the traffic between groups, not the impact: a seed for
//! [`order`](crate::scheduler::order), which scores it.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::scheduler::impact::Traffic;
use crate::scheduler::schedule::ROUNDING;

/// Groups of VMs whose `weight` sums to at most `capacity`, with little traffic between them.
/// A VM that is too heavy alone is in a group of its own.
#[must_use]
pub fn partition(traffic: &Traffic, weight: &[f64], capacity: f64) -> Vec<Vec<usize>> {
    let level = Level {
        traffic: traffic.clone(),
        weight: weight.to_vec(),
        capacity: capacity * (1.0 + ROUNDING),
    };
    let group_of = level.solve();
    let count = group_of.iter().max().map_or(0, |last| last + 1);
    let mut groups = vec![Vec::new(); count];
    for (vm, group) in group_of.into_iter().enumerate() {
        groups[group].push(vm);
    }
    groups.retain(|group| !group.is_empty());
    groups
}

/// The graph at one level of coarsening.
struct Level {
    traffic: Traffic,
    weight: Vec<f64>,
    capacity: f64,
}

/// A move that looked good when it was pushed.
struct Move {
    gain: f64,
    vm: usize,
    to: usize,
}

impl Ord for Move {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_vm = (other.vm, other.to).cmp(&(self.vm, self.to));
        self.gain.total_cmp(&other.gain).then(by_vm)
    }
}

impl PartialOrd for Move {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Move {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Move {}

impl Level {
    fn solve(&self) -> Vec<usize> {
        let mut group_of = match self.coarser() {
            Some((coarse, merged)) => {
                let above = coarse.solve();
                merged.iter().map(|&vertex| above[vertex]).collect()
            }
            None => self.pack(),
        };
        while self.pass(&mut group_of) {}
        group_of
    }

    /// Merges pairs along the heaviest edges; nothing where that shrinks the graph no more.
    fn coarser(&self) -> Option<(Self, Vec<usize>)> {
        let vms = self.weight.len();
        let mut pairs: Vec<(usize, usize, f64)> = self.traffic.pairs().collect();
        pairs.sort_by(|a, b| b.2.total_cmp(&a.2).then((a.0, a.1).cmp(&(b.0, b.1))));
        let mut mate: Vec<usize> = (0..vms).collect();
        for (a, b, _) in pairs {
            if mate[a] == a && mate[b] == b && self.weight[a] + self.weight[b] <= self.capacity {
                mate[a] = b;
                mate[b] = a;
            }
        }
        let mut merged = vec![0; vms];
        let mut weight = Vec::new();
        for vm in 0..vms {
            if mate[vm] < vm {
                merged[vm] = merged[mate[vm]];
                weight[merged[vm]] += self.weight[vm];
            } else {
                merged[vm] = weight.len();
                weight.push(self.weight[vm]);
            }
        }
        if weight.len() * 20 > vms * 19 {
            return None;
        }
        let pairs = self.traffic.pairs();
        let pairs = pairs.map(|(a, b, rate)| (merged[a], merged[b], rate));
        let coarse = Self {
            traffic: Traffic::between(weight.len(), pairs),
            weight,
            capacity: self.capacity,
        };
        Some((coarse, merged))
    }

    /// Heaviest first, each into the group it talks to most of those with room.
    fn pack(&self) -> Vec<usize> {
        let mut vms: Vec<usize> = (0..self.weight.len()).collect();
        vms.sort_by(|&a, &b| self.weight[b].total_cmp(&self.weight[a]).then(a.cmp(&b)));
        let mut group_of = vec![usize::MAX; vms.len()];
        let mut used: Vec<f64> = Vec::new();
        for vm in vms {
            let mut talk = vec![0.0; used.len()];
            for &(other, rate) in self.traffic.of(vm) {
                if group_of[other] != usize::MAX {
                    talk[group_of[other]] += rate;
                }
            }
            let room = (0..used.len()).filter(|&g| used[g] + self.weight[vm] <= self.capacity);
            let best = room.max_by(|&a, &b| talk[a].total_cmp(&talk[b]).then(b.cmp(&a)));
            let group = best.unwrap_or_else(|| {
                used.push(0.0);
                used.len() - 1
            });
            used[group] += self.weight[vm];
            group_of[vm] = group;
        }
        group_of
    }

    /// The best move of a VM among the groups that it talks to and that have room.
    fn best_move(&self, vm: usize, group_of: &[usize], used: &[f64]) -> Option<Move> {
        let mut talk: Vec<(usize, f64)> = Vec::new();
        let mut inside = 0.0;
        for &(other, rate) in self.traffic.of(vm) {
            let group = group_of[other];
            if group == group_of[vm] {
                inside += rate;
            } else if let Some((_, sum)) = talk.iter_mut().find(|(known, _)| *known == group) {
                *sum += rate;
            } else {
                talk.push((group, rate));
            }
        }
        let room = talk
            .into_iter()
            .filter(|(group, _)| used[*group] + self.weight[vm] <= self.capacity);
        let moves = room.map(|(to, rate)| Move {
            gain: rate - inside,
            vm,
            to,
        });
        moves.max()
    }

    /// One pass; whether it gained anything.
    fn pass(&self, group_of: &mut [usize]) -> bool {
        let mut used = vec![0.0; group_of.iter().max().map_or(0, |last| last + 1)];
        for (vm, &group) in group_of.iter().enumerate() {
            used[group] += self.weight[vm];
        }
        let vms = 0..group_of.len();
        let first = vms.filter_map(|vm| self.best_move(vm, group_of, &used));
        let mut heap: BinaryHeap<Move> = first.collect();
        // Less is rounding: passes would follow it for ever.
        let noise = 1e-9 * self.traffic.pairs().map(|(_, _, rate)| rate).sum::<f64>();
        let mut locked = vec![false; group_of.len()];
        let mut log: Vec<(usize, usize)> = Vec::new();
        let (mut sum, mut best, mut kept) = (0.0, 0.0, 0);
        while let Some(pushed) = heap.pop() {
            let vm = pushed.vm;
            if locked[vm] {
                continue;
            }
            let Some(now) = self.best_move(vm, group_of, &used) else {
                continue;
            };
            if now != pushed {
                // What it saw has changed; it waits for its turn again.
                if now < pushed {
                    heap.push(now);
                    continue;
                }
            }
            log.push((vm, group_of[vm]));
            used[group_of[vm]] -= self.weight[vm];
            used[now.to] += self.weight[vm];
            group_of[vm] = now.to;
            locked[vm] = true;
            sum += now.gain;
            if sum > best + noise {
                (best, kept) = (sum, log.len());
            }
            let open = self
                .traffic
                .of(vm)
                .iter()
                .filter(|(other, _)| !locked[*other]);
            for &(other, _) in open {
                heap.extend(self.best_move(other, group_of, &used));
            }
        }
        for (vm, from) in log.drain(kept..).rev() {
            group_of[vm] = from;
        }
        kept > 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn between(traffic: &Traffic, groups: &[Vec<usize>]) -> f64 {
        let of = |vm| groups.iter().position(|group| group.contains(&vm));
        let pairs = traffic.pairs().filter(|&(a, b, _)| of(a) != of(b));
        pairs.map(|(_, _, rate)| rate).sum()
    }

    #[test]
    fn cliques_stay_whole() {
        // Four cliques of five, one weak edge from each to the next.
        let inside = (0..4).flat_map(|c| {
            let pairs = (0..5).flat_map(|a| (0..a).map(move |b| (a, b)));
            pairs.map(move |(a, b)| (c * 5 + a, c * 5 + b, 10.0))
        });
        let weak = (0..3).map(|c| (c * 5 + 4, c * 5 + 5, 1.0));
        let traffic = Traffic::between(20, inside.chain(weak));
        let groups = partition(&traffic, &[1.0; 20], 5.0);
        assert_eq!(groups.len(), 4, "{groups:?}");
        assert_eq!(between(&traffic, &groups), 3.0, "{groups:?}");
    }

    #[test]
    fn a_vm_that_is_too_heavy_stays_alone() {
        let traffic = Traffic::between(3, [(0, 1, 5.0), (1, 2, 1.0)]);
        let mut groups = partition(&traffic, &[9.0, 1.0, 1.0], 4.0);
        groups.sort();
        assert_eq!(groups, [vec![0], vec![1, 2]]);
    }

    proptest! {
        #[test]
        fn everyone_is_in_one_group_that_fits(
            weight in prop::collection::vec(0.1..10.0_f64, 1..40),
            pairs in prop::collection::vec((0..40_usize, 0..40_usize, 0.0..9.0_f64), 0..120),
        ) {
            let vms = weight.len();
            let pairs = pairs.into_iter().map(|(a, b, rate)| (a % vms, b % vms, rate));
            let traffic = Traffic::between(vms, pairs);
            let groups = partition(&traffic, &weight, 10.0);
            let mut all: Vec<usize> = groups.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..vms).collect::<Vec<_>>());
            for group in &groups {
                let sum: f64 = group.iter().map(|&vm| weight[vm]).sum();
                prop_assert!(sum <= 10.0 * (1.0 + 1e-9));
            }
        }
    }
}
