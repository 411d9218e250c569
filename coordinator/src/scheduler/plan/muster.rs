//! Policy `muster`: every group by the fastest of three schemes, groups in the best order.
//!
//! OBA sends all at once, so nobody waits, but everything is dirtied from the start; LLL and COMMA's
//! delayed starts leave VMs untouched until late, but hold those that are ready. Which is faster
//! depends on the working sets: where they are small against the memory OBA wins, where nothing
//! bounds what is dirtied the others do. All are predicted, for every group: while groups are
//! searched for, by the papers' models; for the groups that were found, with working sets that
//! saturate (`saturating.rs`), where they are known.
//!
//! A group is valid here if it is one by COMMA's rule (Eq. 3: the highest dirty rates fit), or if
//! the mean dirty rates, which is what held VMs take, leave a tenth of the bandwidth free: the
//! release waits for a moment at which what remains fits.

use crate::scheduler::allot::Scheme;
use crate::scheduler::bandwidth;
use crate::scheduler::group::{ByDelayedStart, GroupTime};
use crate::scheduler::order::{AUTO_EXACT_UP_TO, Search};
use crate::scheduler::schedule::{Limits, Load, Schedule, best_order, by_start};

use super::policies::{find_order, not_together};
use super::saturating;
use super::schemes::{Sent, lll, oba};
use super::{Draft, Inputs, Trouble};

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

    /// LLL and OBA where all working sets are known, and saturate.
    fn saturating(&self, group: &[usize]) -> [Option<Schedule>; 2] {
        if group.len() < 2 || !holdable(self.sent, self.limits, group) {
            return [None, None];
        }
        [
            saturating::lll(self.sent, self.limits, group),
            saturating::oba(self.sent, self.limits, group),
        ]
    }

    /// The fastest schedule of a group, with its scheme.
    fn fastest(&self, loads: &[Load], group: &[usize]) -> Option<(Scheme, Schedule)> {
        let [lll, oba] = self.held(group);
        let [saturating_lll, saturating_oba] = self.saturating(group);
        let delayed = best_order(loads, self.limits, &by_start(loads, group));
        let schemes = [
            (Scheme::InTurn, lll),
            (Scheme::Together, oba),
            (Scheme::InTurn, saturating_lll),
            (Scheme::Together, saturating_oba),
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
