//! Policy `muster`: every group by the fastest of three schemes, groups in the best order.
//!
//! OBA sends all at once, so nothing is held, but everything is dirtied from the start; LLL and
//! COMMA's delayed starts leave VMs untouched until late, but hold those that are ready. Which is
//! faster depends on the working sets: where they are small against the memory OBA wins, where
//! nothing bounds what is dirtied the others do. Both are predicted, for every group.

use crate::scheduler::group::{ByDelayedStart, GroupTime};
use crate::scheduler::order::{AUTO_EXACT_UP_TO, Search};
use crate::scheduler::schedule::{Limits, Load, Schedule, best_order, by_start};

use super::policies::{find_order, fits, not_together};
use super::schemes::{Sent, lll, oba};
use super::{Draft, Inputs, Trouble};

pub(super) fn draft(inputs: &Inputs, sent: &[Sent], search: Search) -> Result<Draft, Trouble> {
    let loads = inputs.loads();
    let exact = sent.len() <= AUTO_EXACT_UP_TO && search != Search::Large;
    let ordered = if exact {
        let fastest = Fastest {
            inputs,
            sent,
            delayed: ByDelayedStart::new(&loads, &inputs.limits),
        };
        find_order(inputs, &fastest, search)?
    } else {
        // Many more groups are looked at: the scheme with the cheapest prediction stands for all.
        find_order(inputs, &ByDelayedStart::new(&loads, &inputs.limits), search)?
    };
    let mut notes = Vec::new();
    let mut schedules = Vec::new();
    for group in &ordered.groups {
        let found = fastest(sent, &loads, &inputs.limits, group);
        let (name, schedule) = found.ok_or_else(|| not_together(inputs))?;
        let names: Vec<&str> = group
            .iter()
            .map(|&vm| inputs.vms[vm].name.as_str())
            .collect();
        if group.len() > 1 {
            notes.push(format!("{} by {name}", names.join(", ")));
        }
        schedules.push(schedule);
    }
    let mut draft = Draft::in_turn(0.0, schedules);
    draft.proven = ordered.optimal && (exact || ordered.impact_bytes == 0.0);
    draft.notes = notes;
    Ok(draft)
}

/// The fastest scheme of a group, with its name.
fn fastest(
    sent: &[Sent],
    loads: &[Load],
    limits: &Limits,
    group: &[usize],
) -> Option<(&'static str, Schedule)> {
    let schemes = [
        ("OBA", oba(sent, limits, group)),
        ("LLL's order", lll(sent, limits, group)),
        (
            "delayed starts",
            best_order(loads, limits, &by_start(loads, group)),
        ),
    ];
    let converging = schemes
        .into_iter()
        .filter_map(|(name, schedule)| Some((name, schedule?)));
    converging.min_by(|a, b| a.1.duration_s.total_cmp(&b.1.duration_s))
}

/// A group's time by the fastest scheme, for the search.
struct Fastest<'a> {
    inputs: &'a Inputs,
    sent: &'a [Sent],
    delayed: ByDelayedStart<'a>,
}

impl GroupTime for Fastest<'_> {
    fn vms(&self) -> usize {
        self.sent.len()
    }

    fn duration(&self, group: &[usize]) -> f64 {
        if !fits(self.inputs, group) {
            return f64::INFINITY;
        }
        let limits = &self.inputs.limits;
        let time = |schedule: Option<Schedule>| {
            schedule.map_or(f64::INFINITY, |schedule| schedule.duration_s)
        };
        self.delayed
            .duration(group)
            .min(time(lll(self.sent, limits, group)))
            .min(time(oba(self.sent, limits, group)))
    }

    fn order(&self) -> Vec<usize> {
        self.delayed.order()
    }

    fn least(&self, vm: usize) -> f64 {
        self.delayed.least(vm)
    }

    fn most(&self) -> f64 {
        self.delayed.most()
    }
}
