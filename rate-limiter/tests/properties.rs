//! Any sequence of calls, held against a model that knows only buckets.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use rate_limiter::{Bytes, BytesPerSecond, GroupId, Hierarchy, LeafId, Poll, TokenBucket};

const GROUPS: usize = 3;
const LEAVES: usize = 6;

#[derive(Debug, Clone)]
enum Call {
    LinkLimit(Option<u64>),
    GroupLimit(usize, Option<u64>),
    LeafLimit(usize, Option<u64>),
    Weight(usize, f64),
    Backlogged(usize, bool),
    /// Remove a leaf and add another one to this group.
    Replace(usize, usize),
    /// Time passes, in µs; negative: the caller's clock jumps back.
    Pass(i64),
    /// Poll until it waits; move this part of each grant, in 1/8.
    Turns(u64),
    /// Poll without charging.
    Drop,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let rate = prop_oneof![
        1 => Just(None),
        1 => Just(Some(0)),
        2 => (1..10_000_u64).prop_map(Some),
        6 => (100_000..300_000_000_u64).prop_map(Some),
    ];
    let call = prop_oneof![
        1 => rate.clone().prop_map(Call::LinkLimit),
        1 => (0..GROUPS, rate.clone()).prop_map(|(group, rate)| Call::GroupLimit(group, rate)),
        2 => (0..LEAVES, rate).prop_map(|(leaf, rate)| Call::LeafLimit(leaf, rate)),
        1 => (0..LEAVES, -1.0..100.0).prop_map(|(leaf, weight)| Call::Weight(leaf, weight)),
        4 => (0..LEAVES, prop::bool::weighted(0.8))
            .prop_map(|(leaf, backlogged)| Call::Backlogged(leaf, backlogged)),
        1 => (0..LEAVES, 0..GROUPS).prop_map(|(leaf, group)| Call::Replace(leaf, group)),
        6 => (-1_000..40_000_i64).prop_map(Call::Pass),
        6 => (0..=8_u64).prop_map(Call::Turns),
        1 => Just(Call::Drop),
    ];
    prop::collection::vec(call, 1..120)
}

/// One limit, and all that has passed under it since it last changed.
#[derive(Debug, Default)]
struct Limit {
    bucket: Option<TokenBucket>,
    passed: Vec<(Instant, u64)>,
    /// The bucket's time: the latest it has seen, should the clock jump back.
    seen: Option<Instant>,
}

impl Limit {
    fn burst(rate: u64) -> u64 {
        (rate * 15 / 1000).max(16 << 10)
    }

    fn quantum(&self) -> Bytes {
        let bytes = |bucket: &TokenBucket| (bucket.rate().0 * 4 / 1000).clamp(4 << 10, 256 << 10);
        Bytes(self.bucket.as_ref().map_or(256 << 10, bytes))
    }

    fn set(&mut self, now: Instant, limit: Option<u64>) {
        self.passed.clear();
        let Some(rate) = limit else {
            self.bucket = None;
            self.seen = None;
            return;
        };
        self.seen = self.seen.max(Some(now));
        let burst = Bytes(Self::burst(rate));
        if let Some(bucket) = &mut self.bucket {
            bucket.set_rate(now, BytesPerSecond(rate));
            bucket.set_burst(now, burst);
        } else {
            let quantum = Bytes((rate * 4 / 1000).clamp(4 << 10, 256 << 10));
            let bucket = TokenBucket::with_tokens(BytesPerSecond(rate), burst, quantum, now);
            self.bucket = Some(bucket);
        }
    }

    fn ready_at(&self, now: Instant) -> Option<Instant> {
        match &self.bucket {
            Some(bucket) => bucket.ready_at(now, self.quantum()),
            None => Some(now),
        }
    }

    /// What a grant may be, `None` if there may be none.
    fn allowed(&self, now: Instant) -> Option<Bytes> {
        let Some(bucket) = &self.bucket else {
            return Some(self.quantum());
        };
        let held = bucket.available(now);
        (held.0 >= self.quantum().0 / 4).then(|| held.min(self.quantum()))
    }

    /// Never more than limit · t + burst, over any window since the last change.
    fn take(&mut self, now: Instant, bytes: u64) -> Result<(), TestCaseError> {
        let Some(bucket) = &mut self.bucket else {
            return Ok(());
        };
        prop_assert!(Bytes(bytes) <= bucket.available(now));
        bucket.take(now, Bytes(bytes));
        let seen = self.seen.map_or(now, |seen| seen.max(now));
        self.seen = Some(seen);
        self.passed.push((seen, bytes));
        let rate = bucket.rate().0;
        let mut sum = 0;
        for &(since, bytes) in self.passed.iter().rev() {
            sum += u128::from(bytes);
            let nanos = seen.saturating_duration_since(since).as_nanos();
            let most = u128::from(rate) * nanos / 1_000_000_000 + u128::from(Self::burst(rate));
            prop_assert!(sum <= most, "{sum} B in {nanos} ns at {rate} B/s");
        }
        Ok(())
    }
}

struct Leaf {
    id: LeafId,
    group: usize,
    backlogged: bool,
    limit: Limit,
}

struct Model {
    limiter: Hierarchy,
    now: Instant,
    link: Limit,
    groups: Vec<(GroupId, Limit)>,
    leaves: Vec<Leaf>,
}

impl Model {
    fn new() -> Self {
        let now = Instant::now() + Duration::from_secs(10);
        let mut limiter = Hierarchy::new(now, None);
        let groups: Vec<_> = (0..GROUPS)
            .map(|_| (limiter.add_group(now, None), Limit::default()))
            .collect();
        let leaves = (0..LEAVES)
            .map(|index| Leaf {
                id: limiter.add_leaf(now, groups[index % GROUPS].0),
                group: index % GROUPS,
                backlogged: false,
                limit: Limit::default(),
            })
            .collect();
        Self {
            limiter,
            now,
            link: Limit::default(),
            groups,
            leaves,
        }
    }

    /// When a backlogged leaf first has a whole quantum in every bucket.
    fn ready_at(&self) -> Option<Instant> {
        let backlogged = self.leaves.iter().filter(|leaf| leaf.backlogged);
        let leaf_ready = |leaf: &Leaf| {
            let group = self.groups[leaf.group].1.ready_at(self.now)?;
            let link = self.link.ready_at(self.now)?;
            Some(leaf.limit.ready_at(self.now)?.max(group).max(link))
        };
        backlogged.filter_map(leaf_ready).min()
    }

    /// What a leaf may be granted.
    fn allowed(&self, leaf: &Leaf) -> Option<Bytes> {
        let group = self.groups[leaf.group].1.allowed(self.now)?;
        let link = self.link.allowed(self.now)?;
        Some(leaf.limit.allowed(self.now)?.min(group).min(link)).filter(|_| leaf.backlogged)
    }

    fn poll(&mut self) -> Result<Option<(usize, u64)>, TestCaseError> {
        let ready = self.ready_at();
        let allowed = self.leaves.iter().any(|leaf| self.allowed(leaf).is_some());
        match self.limiter.poll(self.now) {
            Poll::Grant { leaf, bytes } => {
                let index = self
                    .leaves
                    .iter()
                    .position(|known| known.id == leaf)
                    .unwrap();
                prop_assert_eq!(Some(bytes), self.allowed(&self.leaves[index]));
                Ok(Some((index, bytes.0)))
            }
            Poll::Wait(deadline) => {
                prop_assert!(!allowed, "not work conserving");
                prop_assert_eq!(Some(deadline), ready);
                prop_assert!(deadline > self.now);
                Ok(None)
            }
            Poll::Idle => {
                prop_assert!(!allowed && ready.is_none(), "idle, but ready at {ready:?}");
                Ok(None)
            }
        }
    }

    fn turns(&mut self, eighths: u64) -> Result<(), TestCaseError> {
        for _ in 0..40 {
            let Some((index, granted)) = self.poll()? else {
                break;
            };
            let moved = granted * eighths / 8;
            let leaf = &mut self.leaves[index];
            self.limiter.charge(self.now, leaf.id, Bytes(moved));
            leaf.limit.take(self.now, moved)?;
            self.groups[leaf.group].1.take(self.now, moved)?;
            self.link.take(self.now, moved)?;
        }
        Ok(())
    }

    fn call(&mut self, call: Call) -> Result<(), TestCaseError> {
        let now = self.now;
        let rate = |limit: Option<u64>| limit.map(BytesPerSecond);
        match call {
            Call::LinkLimit(limit) => {
                self.limiter.set_link_limit(now, rate(limit));
                self.link.set(now, limit);
                prop_assert_eq!(self.limiter.link_limit(), rate(limit));
            }
            Call::GroupLimit(group, limit) => {
                let (id, model) = &mut self.groups[group];
                self.limiter.set_group_limit(now, *id, rate(limit));
                model.set(now, limit);
                prop_assert_eq!(self.limiter.group_limit(*id), rate(limit));
            }
            Call::LeafLimit(leaf, limit) => {
                let leaf = &mut self.leaves[leaf];
                self.limiter.set_leaf_limit(now, leaf.id, rate(limit));
                leaf.limit.set(now, limit);
                prop_assert_eq!(self.limiter.leaf_limit(leaf.id), rate(limit));
            }
            Call::Weight(leaf, weight) => {
                let set = self.limiter.set_leaf_weight(self.leaves[leaf].id, weight);
                prop_assert_eq!(set.is_ok(), weight > 0.0);
            }
            Call::Backlogged(leaf, backlogged) => {
                self.leaves[leaf].backlogged = backlogged;
                self.limiter
                    .set_backlogged(self.leaves[leaf].id, backlogged);
            }
            Call::Replace(leaf, group) => {
                self.limiter.remove_leaf(self.leaves[leaf].id);
                let id = self.limiter.add_leaf(now, self.groups[group].0);
                self.leaves[leaf] = Leaf {
                    id,
                    group,
                    backlogged: false,
                    limit: Limit::default(),
                };
            }
            Call::Pass(micros) => {
                let time = Duration::from_micros(micros.unsigned_abs());
                self.now = if micros < 0 { now - time } else { now + time };
            }
            Call::Turns(eighths) => self.turns(eighths)?,
            Call::Drop => drop(self.poll()?),
        }
        prop_assert!(self.limiter.is_valid());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Limits are never exceeded, nothing that could be granted is withheld, deadlines are exact.
    #[test]
    fn agrees_with_the_model(calls in calls()) {
        let mut model = Model::new();
        for call in calls {
            model.call(call)?;
        }
    }

    /// The bucket alone keeps its invariants, and tokens come only from time.
    #[test]
    fn a_bucket_stays_valid(
        calls in prop::collection::vec((0..4, any::<u64>(), -1_000_000..1_000_000_000_i64), 1..60),
    ) {
        let mut now = Instant::now() + Duration::from_secs(10);
        let mut bucket = TokenBucket::new(BytesPerSecond(1_000_000), Bytes(16_384), now);
        for (kind, value, nanos) in calls {
            let time = Duration::from_nanos(nanos.unsigned_abs());
            now = if nanos < 0 { now - time } else { now + time };
            let before = bucket.available(now);
            match kind {
                0 => bucket.set_rate(now, BytesPerSecond(value >> (value % 64))),
                1 => bucket.set_burst(now, Bytes(value >> (value % 64))),
                2 => bucket.take(now, Bytes(value >> (value % 64))),
                _ => bucket.take(now, Bytes(0)),
            }
            prop_assert!(bucket.is_valid());
            prop_assert!(bucket.available(now) <= before.max(Bytes(0)));
            if let Some(ready) = bucket.ready_at(now, Bytes(1)) {
                prop_assert!(bucket.burst().0 == 0 || bucket.available(ready) >= Bytes(1));
            }
        }
    }

    /// By weight, within one quantum each, over any interval in which all are backlogged.
    #[test]
    fn shares_follow_weights(
        link in prop_oneof![Just(None), (1..500_u64).prop_map(|mb| Some(mb * 1_000_000))],
        members in prop::collection::vec((0..GROUPS, 1..64_u32), 2..10),
        parts in prop::collection::vec(1..=8_u64, 1..400),
    ) {
        let mut now = Instant::now();
        let mut limiter = Hierarchy::new(now, link.map(BytesPerSecond));
        let groups = [(); GROUPS].map(|()| limiter.add_group(now, None));
        let mut group_weight = [0.0; GROUPS];
        let mut leaves = Vec::new();
        for &(group, eighths) in &members {
            let weight = f64::from(eighths) / 8.0;
            let leaf = limiter.add_leaf(now, groups[group]);
            limiter.set_leaf_weight(leaf, weight).unwrap();
            limiter.set_backlogged(leaf, true);
            group_weight[group] += weight;
            leaves.push((leaf, group, weight));
        }
        let mut flows = vec![(0.0, 0.0); leaves.len()];
        let mut group_served = [0.0; GROUPS];
        let mut spread = Spread::default();
        for part in parts {
            let (leaf, bytes) = loop {
                match limiter.poll(now) {
                    Poll::Grant { leaf, bytes } => break (leaf, bytes),
                    Poll::Wait(deadline) => now = deadline,
                    Poll::Idle => return Err(TestCaseError::fail("idle")),
                }
            };
            let moved = (bytes.0 * part / 8).max(1);
            limiter.charge(now, leaf, Bytes(moved));
            let index = leaves.iter().position(|&(id, ..)| id == leaf).unwrap();
            let (_, group, weight) = leaves[index];
            flows[index].0 += moved as f64 / weight;
            group_served[group] += moved as f64 / group_weight[group];
            let quantum = link.map_or(256 << 10, |rate| (rate * 4 / 1000).clamp(4 << 10, 256 << 10)) as f64;
            for a in 0..leaves.len() {
                for b in 0..a {
                    if leaves[a].1 == leaves[b].1 {
                        let bound = quantum / leaves[a].2 + quantum / leaves[b].2;
                        spread.check((0, a, b), flows[a].0 - flows[b].0, bound)?;
                    }
                }
            }
            for a in 0..GROUPS {
                for b in 0..a {
                    if group_weight[a] > 0.0 && group_weight[b] > 0.0 {
                        let bound = quantum / group_weight[a] + quantum / group_weight[b];
                        spread.check((1, a, b), group_served[a] - group_served[b], bound)?;
                    }
                }
            }
        }
    }
}

/// The range of each difference so far: its width is the worst interval.
#[derive(Default)]
struct Spread(std::collections::HashMap<(u8, usize, usize), (f64, f64)>);

impl Spread {
    fn check(
        &mut self,
        pair: (u8, usize, usize),
        now: f64,
        bound: f64,
    ) -> Result<(), TestCaseError> {
        let (low, high) = self.0.entry(pair).or_insert((0.0, 0.0));
        *low = low.min(now);
        *high = high.max(now);
        prop_assert!(
            *high - *low <= bound + 1.0,
            "{pair:?}: {low} to {high}, bound {bound}"
        );
        Ok(())
    }
}
