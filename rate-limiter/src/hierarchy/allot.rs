//! The rate of every leaf, as a number: for those whose bytes somebody else moves.
//!
//! Where the kernel paces a stream, nobody asks [`poll`](Hierarchy::poll) for each burst; it is told
//! a rate, now and then. [`Hierarchy::allot`] is what the queueing comes to when all of it flows at
//! once: rates grow in proportion to the weights until a leaf, a group or the link is full, and the
//! others go on.

use std::collections::BTreeMap;

use super::arena::Key;
use super::{Hierarchy, LeafId};
use crate::units::BytesPerSecond;

/// How much a leaf would take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// So much comes before all weights.
    pub least: BytesPerSecond,
    /// It would take at most so much; `None`: whatever it gets.
    pub most: Option<BytesPerSecond>,
}

impl Demand {
    /// Whatever it gets.
    pub const EVERYTHING: Self = Self {
        least: BytesPerSecond(0),
        most: None,
    };

    /// At most so much.
    #[must_use]
    pub const fn at_most(rate: BytesPerSecond) -> Self {
        Self {
            least: BytesPerSecond(0),
            most: Some(rate),
        }
    }

    /// The same, with so much before all weights.
    #[must_use]
    pub const fn with_least(self, least: BytesPerSecond) -> Self {
        Self { least, ..self }
    }
}

/// A leaf while rates grow.
struct Filling {
    key: Key,
    group: Key,
    /// What its share is in proportion to.
    weight: f64,
    /// What it is set to, for the part that goes by weight.
    set_weight: f64,
    limit: f64,
    most: f64,
    wanted: f64,
    rate: f64,
    full: bool,
}

/// Rates closer to a limit than this have reached it, in bytes per second.
const CLOSE: f64 = 0.5;

impl Hierarchy {
    /// What each leaf may send per second: `None` where nothing limits it. `demand` says what a leaf
    /// would take; leaves that it does not know take nothing and are not in the result.
    ///
    /// First everybody gets what they need at least, in equal parts where it is not enough. Then
    /// everybody gets up to their demand, by weight. What is left over is given out too, in equal
    /// parts, so that who suddenly wants more need not wait for the next time. Equal, for
    /// weights speak of who is hungry: a light one's short burst should not take longer. The rates
    /// together exceed neither the link's limit nor a group's, except that nobody is given less than
    /// 1 B/s unless a limit of 0 says so.
    #[must_use]
    pub fn allot(
        &self,
        mut demand: impl FnMut(LeafId) -> Option<Demand>,
    ) -> Vec<(LeafId, Option<BytesPerSecond>)> {
        let mut leaves: Vec<Filling> = self
            .leaves
            .iter()
            .filter_map(|(key, leaf)| {
                let Demand { least, most } = demand(LeafId(key))?;
                let limit = leaf.limit.get().map_or(f64::INFINITY, number);
                Some(Filling {
                    key,
                    group: leaf.group,
                    weight: 1.0,
                    set_weight: weight(leaf.flow.weight()),
                    limit,
                    most: most.map_or(limit, |most| number(most.max(least)).min(limit)),
                    wanted: number(least).min(limit),
                    rate: 0.0,
                    full: false,
                })
            })
            .collect();
        self.fill(&mut leaves);
        for leaf in &mut leaves {
            leaf.wanted = leaf.most;
            leaf.weight = leaf.set_weight;
        }
        self.fill(&mut leaves);
        for leaf in &mut leaves {
            leaf.wanted = leaf.limit;
            leaf.weight = 1.0;
        }
        self.fill(&mut leaves);
        let rate = |leaf: &Filling| match (leaf.rate.is_finite(), leaf.limit > 0.0) {
            (true, true) => Some(whole(leaf.rate)),
            (true, false) => Some(BytesPerSecond(0)),
            (false, _) => None,
        };
        leaves
            .iter()
            .map(|leaf| (LeafId(leaf.key), rate(leaf)))
            .collect()
    }

    /// Lets rates grow together until nothing can grow any more.
    fn fill(&self, leaves: &mut [Filling]) {
        for leaf in leaves.iter_mut() {
            leaf.full = leaf.wanted - leaf.rate < CLOSE;
        }
        let link = self.link.get().map_or(f64::INFINITY, number);
        // Every step fills at least one leaf, group or the link.
        for _ in 0..=leaves.len() * 2 {
            let growing = || leaves.iter().filter(|leaf| !leaf.full);
            let mut step = growing()
                .map(|leaf| (leaf.wanted - leaf.rate) / leaf.weight)
                .fold(f64::INFINITY, f64::min);
            step = step.min(room(link, leaves.iter()));
            let mut limits = BTreeMap::new();
            for leaf in growing() {
                let limit = self.groups.get(leaf.group).and_then(|g| g.limit.get());
                limits.insert(leaf.group, limit.map_or(f64::INFINITY, number));
            }
            for (group, limit) in &limits {
                let members = leaves.iter().filter(|leaf| leaf.group == *group);
                step = step.min(room(*limit, members));
            }
            for leaf in leaves.iter_mut().filter(|leaf| !leaf.full) {
                // Without any limit above it, it has no rate at all.
                leaf.rate += leaf.weight * step.max(0.0);
            }
            if !step.is_finite() || leaves.iter().all(|leaf| leaf.full) {
                return;
            }
            let used: f64 = leaves.iter().map(|leaf| leaf.rate).sum();
            let group_used: BTreeMap<Key, f64> = limits
                .keys()
                .map(|group| {
                    let members = leaves.iter().filter(|leaf| leaf.group == *group);
                    (*group, members.map(|leaf| leaf.rate).sum())
                })
                .collect();
            for leaf in leaves.iter_mut().filter(|leaf| !leaf.full) {
                let group_is_full = limits[&leaf.group] - group_used[&leaf.group] < CLOSE;
                leaf.full = leaf.wanted - leaf.rate < CLOSE || group_is_full || link - used < CLOSE;
            }
        }
    }
}

/// By how much per weight the growing ones may grow until their sum reaches `limit`.
fn room<'a>(limit: f64, leaves: impl Iterator<Item = &'a Filling>) -> f64 {
    if limit.is_infinite() {
        return f64::INFINITY;
    }
    let (mut used, mut weights) = (0.0, 0.0);
    for leaf in leaves {
        used += leaf.rate;
        if !leaf.full {
            weights += leaf.weight;
        }
    }
    if weights > 0.0 {
        ((limit - used) / weights).max(0.0)
    } else {
        f64::INFINITY
    }
}

#[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
fn number(rate: BytesPerSecond) -> f64 {
    rate.0 as f64
}

#[allow(clippy::cast_precision_loss, reason = "only ratios count")]
fn weight(weight: super::flow::Weight) -> f64 {
    weight.max(1) as f64
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "finite and not negative; the cast saturates"
)]
fn whole(rate: f64) -> BytesPerSecond {
    BytesPerSecond((rate.floor() as u64).max(1))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;

    const MB: u64 = 1_000_000;

    fn mb(rate: u64) -> BytesPerSecond {
        BytesPerSecond(rate * MB)
    }

    /// Rates in MB/s, rounded.
    fn rates(hierarchy: &Hierarchy, demands: &[(LeafId, Demand)]) -> Vec<Option<u64>> {
        let of = |leaf| demands.iter().find(|(id, _)| *id == leaf).map(|(_, d)| *d);
        let allotted = hierarchy.allot(of);
        demands
            .iter()
            .map(|(leaf, _)| {
                let found = allotted.iter().find(|(id, _)| id == leaf);
                found.expect("in the result").1.map(|r| (r.0 + MB / 2) / MB)
            })
            .collect()
    }

    #[test]
    fn weights_limits_and_demands() {
        let now = Instant::now();
        let mut hierarchy = Hierarchy::new(now, Some(mb(100)));
        let group = hierarchy.add_group(now, None);
        let [a, b, c] = [0; 3].map(|_| hierarchy.add_leaf(now, group));
        hierarchy.set_leaf_weight(b, 3.0).expect("a weight");
        let all = Demand::EVERYTHING;
        assert_eq!(
            rates(&hierarchy, &[(a, all), (b, all)]),
            [Some(25), Some(75)]
        );
        // What one does not take goes to the others, by weight.
        let little = Demand::at_most(mb(20));
        assert_eq!(
            rates(&hierarchy, &[(a, all), (b, all), (c, little)]),
            [Some(20), Some(60), Some(20)]
        );
        // Nobody wants everything: what is left over is there for all.
        assert_eq!(
            rates(&hierarchy, &[(a, little), (c, little)]),
            [Some(50), Some(50)]
        );
        // In equal parts: the weights have had their say.
        assert_eq!(
            rates(&hierarchy, &[(a, little), (b, little)]),
            [Some(50), Some(50)]
        );
        // A light one's backlog does not wait for a heavy one.
        hierarchy.set_leaf_weight(a, 0.01).expect("a weight");
        let some = all.with_least(mb(5));
        assert_eq!(
            rates(&hierarchy, &[(a, some), (b, all)]),
            [Some(5), Some(95)]
        );
        assert_eq!(
            rates(&hierarchy, &[(a, some), (b, all.with_least(mb(200)))]),
            [Some(5), Some(95)]
        );
        hierarchy.set_leaf_weight(a, 1.0).expect("a weight");
        hierarchy.set_leaf_limit(now, b, Some(mb(10)));
        assert_eq!(
            rates(&hierarchy, &[(a, all), (b, all)]),
            [Some(90), Some(10)]
        );
        hierarchy.set_leaf_limit(now, b, Some(mb(0)));
        assert_eq!(
            rates(&hierarchy, &[(a, all), (b, all)]),
            [Some(100), Some(0)]
        );
    }

    #[test]
    fn groups_and_no_limits() {
        let now = Instant::now();
        let mut hierarchy = Hierarchy::new(now, None);
        let [one, other] = [Some(mb(40)), None].map(|limit| hierarchy.add_group(now, limit));
        let [a, b] = [0; 2].map(|_| hierarchy.add_leaf(now, one));
        let c = hierarchy.add_leaf(now, other);
        let all = Demand::EVERYTHING;
        assert_eq!(
            rates(&hierarchy, &[(a, all), (b, all), (c, all)]),
            [Some(20), Some(20), None]
        );
        hierarchy.set_link_limit(now, Some(mb(90)));
        assert_eq!(
            rates(&hierarchy, &[(a, all), (b, all), (c, all)]),
            [Some(20), Some(20), Some(50)]
        );
        assert_eq!(hierarchy.allot(|_| None), []);
    }

    proptest! {
        #[test]
        fn nothing_is_exceeded_and_nothing_left(
            link in 1_000_000_u64..1_000_000_000,
            group_limits in prop::collection::vec(prop::option::of(1_000_000_u64..500_000_000), 1..4),
            leaves in prop::collection::vec(
                (0_usize..4, 0.01_f64..100.0, prop::option::of(100_000_u64..900_000_000), prop::option::of(0_u64..900_000_000), 0_u64..90_000_000),
                1..8,
            ),
        ) {
            let now = Instant::now();
            let mut hierarchy = Hierarchy::new(now, Some(BytesPerSecond(link)));
            let groups: Vec<_> = group_limits
                .iter()
                .map(|limit| hierarchy.add_group(now, limit.map(BytesPerSecond)))
                .collect();
            let mut made = Vec::new();
            for (group, weight, limit, wanted, least) in leaves {
                let group = group % groups.len();
                let leaf = hierarchy.add_leaf(now, groups[group]);
                hierarchy.set_leaf_weight(leaf, weight).expect("a weight");
                hierarchy.set_leaf_limit(now, leaf, limit.map(BytesPerSecond));
                let demand = Demand {
                    least: BytesPerSecond(least),
                    most: wanted.map(BytesPerSecond),
                };
                made.push((leaf, group, limit, demand));
            }
            let of = |leaf| made.iter().find(|m| m.0 == leaf).map(|m| m.3);
            let allotted = hierarchy.allot(of);
            prop_assert_eq!(allotted.len(), made.len());
            // Nobody starves, whatever the weights: the least comes first, in equal parts.
            for ((_, group, limit, demand), (_, rate)) in made.iter().zip(&allotted) {
                let mates = made.iter().filter(|m| m.1 == *group).count() as u64;
                let of_group = group_limits[*group].map_or(u64::MAX, |limit| limit / mates);
                let least = demand.least.0.min(limit.unwrap_or(u64::MAX)).min(of_group);
                let least = least.min(link / made.len() as u64);
                prop_assert!(rate.expect("limited").0 + 2 >= least);
            }
            let mut by_group = vec![0; groups.len()];
            let mut full = true;
            for ((leaf, group, limit, _), (id, rate)) in made.iter().zip(&allotted) {
                prop_assert_eq!(leaf, id);
                let rate = rate.expect("the link limits everybody").0;
                prop_assert!(limit.is_none_or(|limit| rate <= limit));
                full &= limit == &Some(rate) || limit.is_some_and(|l| l - rate <= 2);
                by_group[*group] += rate;
            }
            let sum: u64 = by_group.iter().sum();
            let slack = 2 * made.len() as u64;
            prop_assert!(sum <= link + slack);
            let mut groups_full = true;
            for (group, (used, limit)) in by_group.iter().zip(&group_limits).enumerate() {
                prop_assert!(limit.is_none_or(|limit| *used <= limit + slack));
                let members_full = made.iter().zip(&allotted).filter(|(m, _)| m.1 == group)
                    .all(|(m, (_, rate))| m.2.is_some_and(|l| l.saturating_sub(rate.expect("a rate").0) <= 2));
                groups_full &= limit.is_some_and(|limit| limit.saturating_sub(*used) <= slack) || members_full;
            }
            prop_assert!(full || groups_full || link.saturating_sub(sum) <= slack, "{} of {}", sum, link);
        }
    }
}
