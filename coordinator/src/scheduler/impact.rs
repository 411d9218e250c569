//! Communication impact: what crosses the slow link because VMs that talk to each other do not
//! switch over at the same time (COMMA 2.2, Eq. 1).
//!
//! impact = Σ over pairs of |t_i − t_j| · rate(i, j), t = when a VM arrives. Where groups finish
//! one after another it is also Σ over k ≥ 2 of T(G_k) · cut(G_1 ∪ … ∪ G_{k−1}, the rest): the form
//! in which the searches of [`order`](super::order) build it up.

/// How much VMs talk to each other: a symmetric matrix, kept as lists of neighbours.
#[derive(Debug, Clone, PartialEq)]
pub struct Traffic {
    neighbours: Vec<Vec<(usize, f64)>>,
}

impl Traffic {
    /// No traffic between so many VMs.
    #[must_use]
    pub fn none(vms: usize) -> Self {
        Self {
            neighbours: vec![Vec::new(); vms],
        }
    }

    /// Traffic as pairs say it, in bytes per second; both directions together. Pairs that are
    /// named twice add up; a VM's traffic with itself does not count.
    #[must_use]
    pub fn between(vms: usize, pairs: impl IntoIterator<Item = (usize, usize, f64)>) -> Self {
        let mut traffic = Self::none(vms);
        for (a, b, rate) in pairs {
            if a != b && rate > 0.0 {
                traffic.add(a, b, rate);
                traffic.add(b, a, rate);
            }
        }
        traffic
    }

    fn add(&mut self, from: usize, to: usize, rate: f64) {
        let list = &mut self.neighbours[from];
        match list.iter_mut().find(|(vm, _)| *vm == to) {
            Some((_, sum)) => *sum += rate,
            None => list.push((to, rate)),
        }
    }

    /// How many VMs there are.
    #[must_use]
    pub fn vms(&self) -> usize {
        self.neighbours.len()
    }

    /// The VMs that this one talks to, with the rate in bytes per second.
    #[must_use]
    pub fn of(&self, vm: usize) -> &[(usize, f64)] {
        &self.neighbours[vm]
    }

    /// Every pair once, with its rate in bytes per second.
    pub fn pairs(&self) -> impl Iterator<Item = (usize, usize, f64)> + '_ {
        let lists = self.neighbours.iter().enumerate();
        lists.flat_map(|(a, list)| {
            let later = list.iter().filter(move |(b, _)| a < *b);
            later.map(move |&(b, rate)| (a, b, rate))
        })
    }
}

/// Eq. 1: the impact in bytes of VMs that arrive at these times (seconds).
#[must_use]
pub fn of_times(traffic: &Traffic, arrival_s: &[f64]) -> f64 {
    let pairs = traffic.pairs();
    pairs
        .map(|(a, b, rate)| (arrival_s[a] - arrival_s[b]).abs() * rate)
        .sum()
}

/// Eq. 1: the impact in bytes of groups that follow each other, each taking so long (seconds).
#[must_use]
pub fn of_groups(traffic: &Traffic, groups: &[Vec<usize>], durations_s: &[f64]) -> f64 {
    let mut moved = vec![false; traffic.vms()];
    let mut cut = 0.0;
    let mut impact = 0.0;
    for (group, duration) in groups.iter().zip(durations_s) {
        if cut > 0.0 {
            impact += cut * duration;
        }
        for &vm in group {
            moved[vm] = true;
        }
        let crossing = traffic.pairs().filter(|&(a, b, _)| moved[a] != moved[b]);
        cut = crossing.map(|(_, _, rate)| rate).sum();
    }
    impact
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pairs_add_up_and_self_talk_does_not_count() {
        let pairs = [(0, 1, 2.0), (1, 0, 3.0), (2, 2, 9.0), (1, 2, 0.0)];
        let traffic = Traffic::between(3, pairs);
        assert_eq!(traffic.pairs().collect::<Vec<_>>(), [(0, 1, 5.0)]);
        assert_eq!(traffic.of(1), [(0, 5.0)]);
        assert_eq!(of_times(&traffic, &[1.0, 4.0, 9.0]), 15.0);
    }

    #[test]
    fn one_group_has_no_impact() {
        let traffic = Traffic::between(2, [(0, 1, 5.0)]);
        assert_eq!(of_groups(&traffic, &[vec![1, 0]], &[7.0]), 0.0);
    }

    proptest! {
        #[test]
        fn both_forms_of_equation_1_agree(
            sizes in prop::collection::vec((1..4_usize, 0.0..100.0_f64), 1..6),
            rates in prop::collection::vec(0.0..10.0_f64, 300),
        ) {
            let mut next = 0;
            let groups: Vec<Vec<usize>> = sizes.iter().map(|(size, _)| {
                next += size;
                (next - size..next).collect()
            }).collect();
            let durations: Vec<f64> = sizes.iter().map(|(_, duration)| *duration).collect();
            let pairs = (0..next).flat_map(|a| (0..a).map(move |b| (a, b)));
            let pairs = pairs.zip(&rates).map(|((a, b), rate)| (a, b, *rate));
            let traffic = Traffic::between(next, pairs);
            let mut arrival = vec![0.0; next];
            let mut now = 0.0;
            for (group, duration) in groups.iter().zip(&durations) {
                now += duration;
                for &vm in group {
                    arrival[vm] = now;
                }
            }
            let (a, b) = (of_times(&traffic, &arrival), of_groups(&traffic, &groups, &durations));
            prop_assert!((a - b).abs() <= 1e-9 * a.max(1.0), "{a} {b}");
        }
    }
}
