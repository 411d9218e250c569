//! An ordered partition and what small changes of it cost.
//!
//! cost = Σ over ranks k of time(k) · cut(k), where cut(k) crosses while the group of rank k moves.
//! A VM that goes from rank a to b changes the times of two groups and the cuts between them: each
//! change is priced in O(neighbours + group sizes + |a − b|) before it is made.

use crate::scheduler::group::{GroupTime, places};
use crate::scheduler::order::Problem;
use crate::scheduler::schedule::ROUNDING;

/// A group of the partition.
#[derive(Debug, Clone, Default)]
struct Group {
    /// In the order of [`GroupTime::order`].
    vms: Vec<usize>,
    time: f64,
    /// Eq. 3's sum, in bytes per second.
    least: f64,
}

/// Groups in order, with their cost.
#[derive(Debug)]
pub struct State<'p, T> {
    problem: &'p Problem<'p, T>,
    place: Vec<usize>,
    most: f64,
    group_of: Vec<usize>,
    groups: Vec<Group>,
    unused: Vec<usize>,
    sequence: Vec<usize>,
    rank: Vec<usize>,
    cut: Vec<f64>,
    talk: Vec<f64>,
    cost: f64,
    /// Change of the cut by rank, while a change is priced.
    shift: Vec<f64>,
    bucket: Vec<f64>,
    without: Vec<usize>,
    with: Vec<usize>,
    marked: Vec<bool>,
    /// VMs looked at so far.
    pub work: u64,
}

impl<'p, T: GroupTime> State<'p, T> {
    /// The state of these groups, each of which must be valid.
    #[must_use]
    pub fn new(problem: &'p Problem<'p, T>, groups: &[Vec<usize>]) -> Self {
        let vms = problem.time.vms();
        let talk = |vm| problem.traffic.of(vm).iter().map(|(_, rate)| rate).sum();
        let mut state = Self {
            problem,
            place: places(problem.time),
            most: problem.time.most() * (1.0 + ROUNDING),
            group_of: vec![0; vms],
            groups: Vec::new(),
            unused: Vec::new(),
            sequence: Vec::new(),
            rank: Vec::new(),
            cut: Vec::new(),
            talk: (0..vms).map(talk).collect(),
            cost: 0.0,
            shift: Vec::new(),
            bucket: Vec::new(),
            without: Vec::new(),
            with: Vec::new(),
            marked: vec![false; vms],
            work: 0,
        };
        for group in groups {
            let mut vms = group.clone();
            vms.sort_by_key(|&vm| state.place[vm]);
            let slot = state.insert(state.sequence.len());
            state.fill(slot, vms);
        }
        state.recount();
        state
    }

    /// The impact in bytes.
    #[must_use]
    pub fn cost(&self) -> f64 {
        self.cost
    }

    /// How many groups there are.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.sequence.len()
    }

    /// The rank of a VM's group.
    #[must_use]
    pub fn rank_of(&self, vm: usize) -> usize {
        self.rank[self.group_of[vm]]
    }

    /// The VMs of the group with this rank.
    #[must_use]
    pub fn group(&self, rank: usize) -> &[usize] {
        &self.groups[self.sequence[rank]].vms
    }

    /// All groups, in order.
    #[must_use]
    pub fn groups(&self) -> Vec<Vec<usize>> {
        let ranks = 0..self.ranks();
        ranks.map(|rank| self.group(rank).to_vec()).collect()
    }

    /// Computes cuts and cost anew, so that rounding does not add up.
    pub fn recount(&mut self) {
        let mut cut = 0.0;
        self.cost = 0.0;
        for rank in 0..self.ranks() {
            self.cut[rank] = cut;
            self.cost += self.time(rank) * cut;
            for &vm in self.group(rank) {
                cut += self.talk[vm];
                for &(other, rate) in self.problem.traffic.of(vm) {
                    match self.rank_of(other) {
                        theirs if theirs < rank => cut -= 2.0 * rate,
                        theirs if theirs == rank => cut -= rate,
                        _ => {}
                    }
                }
            }
            cut = cut.max(0.0);
        }
    }

    fn time(&self, rank: usize) -> f64 {
        self.groups[self.sequence[rank]].time
    }

    fn fill(&mut self, slot: usize, vms: Vec<usize>) {
        for &vm in &vms {
            self.group_of[vm] = slot;
        }
        let least = vms.iter().map(|&vm| self.problem.time.least(vm)).sum();
        self.groups[slot] = Group {
            time: self.problem.time.duration(&vms),
            vms,
            least,
        };
    }

    /// A new empty group at this rank.
    fn insert(&mut self, rank: usize) -> usize {
        let slot = self.unused.pop().unwrap_or_else(|| {
            self.groups.push(Group::default());
            self.rank.push(0);
            self.groups.len() - 1
        });
        let cut = self.cut.get(rank).copied().unwrap_or(0.0);
        self.cut.insert(rank, cut);
        self.sequence.insert(rank, slot);
        self.renumber(rank);
        slot
    }

    fn remove(&mut self, rank: usize) {
        let slot = self.sequence.remove(rank);
        self.cut.remove(rank);
        self.groups[slot] = Group::default();
        self.unused.push(slot);
        self.renumber(rank);
    }

    fn renumber(&mut self, from: usize) {
        for (rank, &slot) in self.sequence.iter().enumerate().skip(from) {
            self.rank[slot] = rank;
        }
        self.shift.resize(self.sequence.len() + 1, 0.0);
        self.bucket.resize(self.sequence.len() + 1, 0.0);
    }

    /// Whether the group of this rank may become `vms`, as far as tiers go.
    fn may_be(&self, rank: usize, vms: &[usize]) -> bool {
        let at_an_end = rank == 0 || rank + 1 == self.ranks();
        let tiers = self.problem.tiers.filter(|_| at_an_end);
        tiers.is_none_or(|tiers| tiers.cover(vms.iter().copied()))
    }

    /// Adds to `shift` what the cuts of ranks `low + 1 ..= high` change by when `vm`, which is at
    /// one of the two, goes to the other.
    fn shift_of(&mut self, vm: usize, low: usize, high: usize, later: bool) {
        let mut before = 0.0;
        for &(other, rate) in self.problem.traffic.of(vm) {
            let rank = self.rank[self.group_of[other]];
            if rank <= low {
                before += rate;
            } else if rank < high {
                self.bucket[rank] += rate;
            }
        }
        let sign = if later { 1.0 } else { -1.0 };
        for rank in low + 1..=high {
            self.shift[rank] += sign * (2.0 * before - self.talk[vm]);
            before += self.bucket[rank];
            self.bucket[rank] = 0.0;
        }
        self.work += (self.problem.traffic.of(vm).len() + high - low) as u64;
    }

    /// The change of the cost when `shift` is applied to ranks `low + 1 ..= high` and the groups of
    /// these two ranks take so long.
    fn change(&self, low: usize, high: usize, times: (f64, f64)) -> f64 {
        let mut sum = (times.0 - self.time(low)) * self.cut[low];
        for rank in low + 1..high {
            sum += self.time(rank) * self.shift[rank];
        }
        sum + times.1 * (self.cut[high] + self.shift[high]) - self.time(high) * self.cut[high]
    }

    fn settle(&mut self, low: usize, high: usize, made: bool) {
        for rank in low + 1..=high {
            if made {
                self.cut[rank] = (self.cut[rank] + self.shift[rank]).max(0.0);
            }
            self.shift[rank] = 0.0;
        }
    }

    fn collect(&mut self, rank: usize, gone: Option<usize>, come: Option<usize>, second: bool) {
        let buffer = if second {
            &mut self.with
        } else {
            &mut self.without
        };
        buffer.clear();
        let group = &self.groups[self.sequence[rank]];
        buffer.extend(group.vms.iter().copied().filter(|&vm| Some(vm) != gone));
        if let Some(vm) = come {
            let place = &self.place;
            let at = buffer.partition_point(|&other| place[other] < place[vm]);
            buffer.insert(at, vm);
        }
        self.work += buffer.len() as u64;
    }

    /// Moves `vm` to the group of rank `to` if `accept` takes the change of the cost.
    pub fn relocate(&mut self, vm: usize, to: usize, accept: impl FnOnce(f64) -> bool) -> bool {
        let from = self.rank_of(vm);
        let target = &self.groups[self.sequence[to]];
        if from == to || target.least + self.problem.time.least(vm) > self.most {
            return false;
        }
        self.exchange_vms((from, Some(vm), None), (to, None, Some(vm)), accept)
    }

    /// Moves `vm` to a new group before that of rank `at`.
    pub fn part(&mut self, vm: usize, at: usize, accept: impl FnOnce(f64) -> bool) -> bool {
        let inside = at > 0 && at < self.ranks();
        if self.problem.tiers.is_some() && !inside {
            return false;
        }
        self.insert(at);
        let done = self.relocate(vm, at, accept);
        if !done {
            self.remove(at);
        }
        done
    }

    /// Lets two VMs of different groups change places.
    pub fn swap(&mut self, a: usize, b: usize, accept: impl FnOnce(f64) -> bool) -> bool {
        let (x, y) = (self.rank_of(a), self.rank_of(b));
        let more = self.problem.time.least(b) - self.problem.time.least(a);
        let least = |rank: usize| self.groups[self.sequence[rank]].least;
        if x == y || least(x) + more > self.most || least(y) - more > self.most {
            return false;
        }
        self.exchange_vms((x, Some(a), Some(b)), (y, Some(b), Some(a)), accept)
    }

    /// One group loses a VM and may gain one, another gains or swaps.
    fn exchange_vms(
        &mut self,
        (x, x_gone, x_come): (usize, Option<usize>, Option<usize>),
        (y, y_gone, y_come): (usize, Option<usize>, Option<usize>),
        accept: impl FnOnce(f64) -> bool,
    ) -> bool {
        self.collect(x, x_gone, x_come, false);
        self.collect(y, y_gone, y_come, true);
        let time_x = self.problem.time.duration(&self.without);
        let time_y = self.problem.time.duration(&self.with);
        let valid = time_x.is_finite() && time_y.is_finite();
        if !(valid && self.may_be(x, &self.without) && self.may_be(y, &self.with)) {
            return false;
        }
        let (low, high) = (x.min(y), x.max(y));
        if let Some(vm) = x_gone {
            self.shift_of(vm, low, high, x < y);
        }
        if let Some(vm) = y_gone {
            self.shift_of(vm, low, high, y < x);
        }
        if let (Some(a), Some(b)) = (x_gone, y_gone) {
            // What the two say to each other crosses before and after.
            let both = self.problem.traffic.of(a).iter().find(|(vm, _)| *vm == b);
            if let Some((_, rate)) = both {
                for rank in low + 1..=high {
                    self.shift[rank] += 2.0 * rate;
                }
            }
        }
        let times = if x < y {
            (time_x, time_y)
        } else {
            (time_y, time_x)
        };
        let change = self.change(low, high, times);
        let made = accept(change);
        self.settle(low, high, made);
        if !made {
            return false;
        }
        self.cost += change;
        for (rank, time, second) in [(x, time_x, false), (y, time_y, true)] {
            let slot = self.sequence[rank];
            let buffer = if second {
                &mut self.with
            } else {
                &mut self.without
            };
            std::mem::swap(&mut self.groups[slot].vms, buffer);
            let vms = &self.groups[slot].vms;
            let least = vms.iter().map(|&vm| self.problem.time.least(vm)).sum();
            for &vm in vms {
                self.group_of[vm] = slot;
            }
            self.groups[slot].time = time;
            self.groups[slot].least = least;
        }
        if self.group(x).is_empty() {
            self.remove(x);
        }
        true
    }

    /// Makes one group of those with ranks `rank` and `rank + 1`.
    pub fn merge(&mut self, rank: usize, accept: impl FnOnce(f64) -> bool) -> bool {
        let [a, b] = [rank, rank + 1].map(|rank| &self.groups[self.sequence[rank]]);
        if a.least + b.least > self.most {
            return false;
        }
        let mut vms = [&a.vms[..], &b.vms].concat();
        vms.sort_unstable_by_key(|&vm| self.place[vm]);
        self.work += vms.len() as u64;
        let time = self.problem.time.duration(&vms);
        let now = a.time * self.cut[rank] + b.time * self.cut[rank + 1];
        let change = time * self.cut[rank] - now;
        if !time.is_finite() || !accept(change) {
            return false;
        }
        self.cost += change;
        self.remove(rank + 1);
        self.fill(self.sequence[rank], vms);
        true
    }

    /// Divides a group: those that `first` picks move before the others.
    pub fn split(
        &mut self,
        rank: usize,
        first: impl Fn(usize) -> bool,
        accept: impl FnOnce(f64) -> bool,
    ) -> bool {
        let (a, b): (Vec<usize>, Vec<usize>) = self.group(rank).iter().partition(|vm| first(**vm));
        if a.is_empty() || b.is_empty() {
            return false;
        }
        if let Some(tiers) = self.problem.tiers {
            let covers = |vms: &[usize]| tiers.cover(vms.iter().copied());
            if rank == 0 && !covers(&a) || rank + 1 == self.ranks() && !covers(&b) {
                return false;
            }
        }
        let [time_a, time_b] = [&a, &b].map(|vms| self.problem.time.duration(vms));
        let between = self.cut[rank] + self.growth(&a, rank);
        let now = self.time(rank) * self.cut[rank];
        let change = time_a * self.cut[rank] + time_b * between - now;
        if !(time_a + time_b).is_finite() || !accept(change) {
            return false;
        }
        self.cost += change;
        self.fill(self.sequence[rank], a);
        let slot = self.insert(rank + 1);
        self.cut[rank + 1] = between.max(0.0);
        self.fill(slot, b);
        true
    }

    /// Lets the groups of ranks `rank` and `rank + 1` change places.
    pub fn exchange(&mut self, rank: usize, accept: impl FnOnce(f64) -> bool) -> bool {
        if !self.may_be(rank, self.group(rank + 1)) || !self.may_be(rank + 1, self.group(rank)) {
            return false;
        }
        let later = std::mem::take(&mut self.groups[self.sequence[rank + 1]].vms);
        let between = self.growth(&later, rank) + self.cut[rank];
        self.groups[self.sequence[rank + 1]].vms = later;
        let (a, b) = (self.time(rank), self.time(rank + 1));
        let now = a * self.cut[rank] + b * self.cut[rank + 1];
        let change = b * self.cut[rank] + a * between - now;
        if !accept(change) {
            return false;
        }
        self.cost += change;
        self.sequence.swap(rank, rank + 1);
        self.cut[rank + 1] = between.max(0.0);
        self.rank[self.sequence[rank]] = rank;
        self.rank[self.sequence[rank + 1]] = rank + 1;
        true
    }

    /// By how much more crosses when `vms`, of this rank or later, have moved right after those of
    /// lower ranks.
    fn growth(&mut self, vms: &[usize], rank: usize) -> f64 {
        for &vm in vms {
            self.marked[vm] = true;
        }
        let mut sum = 0.0;
        for &vm in vms {
            sum += self.talk[vm];
            for &(other, rate) in self.problem.traffic.of(vm) {
                if self.rank_of(other) < rank {
                    sum -= 2.0 * rate;
                } else if self.marked[other] {
                    sum -= rate;
                }
            }
            self.work += (self.problem.traffic.of(vm).len() + 1) as u64;
        }
        for &vm in vms {
            self.marked[vm] = false;
        }
        sum
    }
}

#[cfg(test)]
mod tests;
