//! Policy `muster`: every group by the fastest of three schemes, groups in the best order.
//!
//! OBA sends all at once, so nobody waits, but everything is dirtied from the start; LLL and COMMA's
//! delayed starts leave VMs untouched until late, but hold those that are ready. Which is faster
//! depends on the working sets: where they are small against the memory OBA wins, where nothing
//! bounds what is dirtied the others do. All are predicted, for every group: OBA by VMbuddies' model
//! while groups are searched for, and for the groups that were found with working sets that saturate
//! (`saturating.rs`), where they are known.
//!
//! A group is valid here if it is one by COMMA's rule (Eq. 3: the highest dirty rates fit), or if
//! the mean dirty rates, which is what held VMs take, leave a tenth of the bandwidth free: the
//! release waits for a moment at which what remains fits.

use crate::scheduler::allot::Scheme;
use crate::scheduler::bandwidth;
use crate::scheduler::group::{ByDelayedStart, GroupTime};
use crate::scheduler::order::{AUTO_EXACT_UP_TO, Search, rest};
use crate::scheduler::schedule::{Limits, Load, Schedule, best_order, by_start};

use super::policies::{find_order, not_together};
use super::saturating;
use super::schemes::{Sent, lll, oba};
use super::{Draft, Effort, Inputs, Trouble};

/// The part of every limit that the mean dirty rates of a held group may take.
const HELD_PART: f64 = 0.9;

pub(super) fn draft(inputs: &Inputs, sent: &[Sent], search: Search) -> Result<Draft, Trouble> {
    let loads = inputs.loads();
    let time = Fastest {
        sent,
        limits: &inputs.limits,
        rules: &inputs.rules,
        delayed: ByDelayedStart::new(&loads, &inputs.limits),
    };
    let few = sent.len() <= AUTO_EXACT_UP_TO && search != Search::Large;
    let exact = few || time.duration(&time.order()).is_finite();
    let ordered = if exact {
        find_order(inputs, &time, search)?
    } else {
        // Many more groups are looked at: the scheme with the cheapest prediction stands for all.
        find_order(inputs, &time.delayed, search)?
    };
    let mut notes = Vec::new();
    let mut schedules = Vec::new();
    // Nothing is proven of times that the search did not have.
    let mut as_searched = true;
    for group in &ordered.groups {
        let found = time.fastest(&loads, group);
        let (scheme, schedule) = found.ok_or_else(|| not_together(inputs))?;
        let names = group.iter().map(|&vm| inputs.vms[vm].name.as_str());
        if group.len() > 1 {
            notes.push(format!(
                "{} by {scheme}",
                names.collect::<Vec<_>>().join(", ")
            ));
        }
        as_searched &= schedule.duration_s == time.duration(group);
        schedules.push((scheme, schedule));
    }
    let mut draft = Draft::in_turn(0.0, schedules);
    draft.proven = ordered.optimal && exact && as_searched;
    draft.notes = notes;
    Ok(draft)
}

/// The VMs that have not moved, planned anew from what limits them now: at once, or by a whole search.
/// Nothing where one of them does not converge even alone.
pub(super) fn again(
    inputs: &Inputs,
    sent: &[Sent],
    moved: &[bool],
    groups: &[Vec<usize>],
    effort: Effort,
) -> Option<Vec<(Vec<usize>, Scheme)>> {
    let loads = inputs.loads();
    let time = Fastest {
        sent,
        limits: &inputs.limits,
        rules: &inputs.rules,
        delayed: ByDelayedStart::new(&loads, &inputs.limits),
    };
    let traffic = &inputs.traffic;
    // As for a plan: the cheapest prediction stands for all where there are many.
    let are_many = moved.iter().filter(|moved| !**moved).count() > AUTO_EXACT_UP_TO;
    let groups = match (effort, are_many) {
        (Effort::Quick, true) => rest::quick(&time.delayed, traffic, moved, groups)?,
        (Effort::Quick, false) => rest::quick(&time, traffic, moved, groups)?,
        (Effort::Full, true) => rest::full(&time.delayed, traffic, moved)?,
        (Effort::Full, false) => rest::full(&time, traffic, moved)?,
    };
    let with_scheme = groups.into_iter().map(|mut group| {
        let scheme = time.fastest(&loads, &group)?.0;
        group.sort_unstable();
        Some((group, scheme))
    });
    with_scheme.collect()
}

/// Whether the VMs can be held together.
fn holdable(sent: &[Sent], limits: &Limits, group: &[usize]) -> bool {
    let dirty = group.iter().map(|&vm| (vm, sent[vm].load.dirty_rate));
    limits.hold(dirty.map(|(vm, rate)| (vm, rate / HELD_PART)))
}

/// A group's time by the fastest scheme, for the search.
struct Fastest<'a> {
    sent: &'a [Sent],
    limits: &'a Limits,
    rules: &'a bandwidth::Limits,
    delayed: ByDelayedStart<'a>,
}

impl Fastest<'_> {
    /// LLL and OBA, where the group can be held.
    fn held(&self, group: &[usize]) -> [Option<Schedule>; 2] {
        if !holdable(self.sent, self.limits, group) {
            return [None, None];
        }
        // A VM alone is the same by both.
        let together = || oba(self.sent, self.limits, self.rules, group);
        let together = (group.len() > 1).then(together).flatten();
        [lll(self.sent, self.limits, group), together]
    }

    /// OBA where all working sets are known, and saturate.
    fn saturating(&self, group: &[usize]) -> Option<Schedule> {
        if group.len() < 2 || !holdable(self.sent, self.limits, group) {
            return None;
        }
        saturating::oba(self.sent, self.limits, group)
    }

    /// The fastest schedule of a group, with its scheme.
    fn fastest(&self, loads: &[Load], group: &[usize]) -> Option<(Scheme, Schedule)> {
        let [lll, oba] = self.held(group);
        let delayed = best_order(loads, self.limits, &by_start(loads, group));
        let schemes = [
            (Scheme::InTurn, lll),
            (Scheme::Together, oba),
            (Scheme::Together, self.saturating(group)),
            (Scheme::Delayed, delayed),
        ];
        let converging = schemes
            .into_iter()
            .filter_map(|(scheme, schedule)| Some((scheme, schedule?)));
        converging.min_by(|a, b| a.1.duration_s.total_cmp(&b.1.duration_s))
    }
}

impl GroupTime for Fastest<'_> {
    fn vms(&self) -> usize {
        self.sent.len()
    }

    fn duration(&self, group: &[usize]) -> f64 {
        let held = self.held(group).into_iter().flatten();
        held.map(|schedule| schedule.duration_s)
            .fold(self.delayed.duration(group), f64::min)
    }

    fn order(&self) -> Vec<usize> {
        self.delayed.order()
    }

    /// Both rules imply that the mean dirty rates fit.
    fn least(&self, vm: usize) -> f64 {
        self.sent[vm].load.dirty_rate
    }

    fn most(&self) -> f64 {
        self.delayed.most()
    }
}
