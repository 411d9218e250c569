//! The policies: what each does with all VMs.

use crate::application::Policy;
use crate::scheduler::allot::Scheme;
use crate::scheduler::group::{ByDelayedStart, GroupTime};
use crate::scheduler::order::{OrderError, Ordered, Problem, Search, find};
use crate::scheduler::schedule::{Limits, Load, Schedule, by_start, delayed};

use super::inputs::{InputVm, Inputs, Stage};
use super::schemes::{Sent, alone, lll, oba, parallel};
use super::{Draft, Placed, Trouble, muster, saturating};

/// What a policy does, or why it does not converge.
pub(super) fn draft(inputs: &Inputs, policy: Policy, search: Search) -> Result<Draft, Trouble> {
    let sent = sent(inputs);
    let all: Vec<usize> = (0..sent.len()).collect();
    match policy {
        Policy::Sequential => {
            let each = all.iter().map(|&vm| {
                let found = alone(&sent, &inputs.limits, vm);
                let found = found.filter(|_| inputs.stage == Stage::Whole || fits(inputs, &[vm]));
                let found = found.map(|schedule| (Scheme::Together, schedule));
                found.ok_or_else(|| too_fast(inputs, vm))
            });
            let each: Result<Vec<(Scheme, Schedule)>, Trouble> = each.collect();
            Ok(Draft::in_turn(0.0, each?))
        }
        Policy::Parallel => at_once(inputs, &sent),
        Policy::Lll => {
            let found = lll(&sent, &inputs.limits, &all);
            together(inputs, Scheme::InTurn, found)
        }
        Policy::Vmbuddies => {
            let published = oba(&sent, &inputs.limits, &inputs.rules, &all);
            // Its bound of the traffic is far above what small working sets cost.
            let saturating = saturating::oba(&sent, &inputs.limits, &all);
            let found = [published, saturating].into_iter().flatten();
            let found = found.min_by(|a, b| a.duration_s.total_cmp(&b.duration_s));
            together(inputs, Scheme::Together, found)
        }
        Policy::Comma => comma(inputs, search),
        Policy::Muster => muster::draft(inputs, &sent, search),
    }
}

pub(super) fn sent(inputs: &Inputs) -> Vec<Sent> {
    let vms = inputs.vms.iter().map(|vm| Sent {
        load: vm.load,
        cap: vm.cap,
        // Where nothing bounds what is sent, neither does the working set.
        working_set: vm.working_set.filter(|_| vm.cap.is_finite()),
        stop_s: inputs.stop_s,
    });
    vms.collect()
}

/// Eq. 3: whether these VMs are a valid group.
fn fits(inputs: &Inputs, vms: &[usize]) -> bool {
    let least = vms
        .iter()
        .map(|&vm| (vm, inputs.vms[vm].load.max_dirty_rate));
    inputs.limits.hold(least)
}

fn mb(rate: f64) -> String {
    format!("{:.1} MB/s", rate / 1e6)
}

/// One VM does not converge.
fn too_fast(inputs: &Inputs, vm: usize) -> Trouble {
    let InputVm { name, load, .. } = &inputs.vms[vm];
    let limit = inputs.limits.alone(vm);
    let rate = if load.max_dirty_rate > limit {
        format!("up to {}", mb(load.max_dirty_rate))
    } else {
        mb(load.dirty_rate)
    };
    Trouble::Diverges(format!(
        "VM {name} does not converge even alone: it dirties {rate}, and {} carry it; throttle it, \
         or give the migration more bandwidth",
        mb(limit)
    ))
}

fn together(inputs: &Inputs, scheme: Scheme, found: Option<Schedule>) -> Result<Draft, Trouble> {
    let schedule = found.ok_or_else(|| not_together(inputs))?;
    Ok(Draft::in_turn(0.0, [(scheme, schedule)]))
}

pub(super) fn not_together(inputs: &Inputs) -> Trouble {
    let dirty: f64 = inputs.vms.iter().map(|vm| vm.load.dirty_rate).sum();
    Trouble::Diverges(format!(
        "the VMs do not converge together: they dirty {} in all, and {} carry it",
        mb(dirty),
        mb(inputs.limits.bandwidth)
    ))
}

/// All at once. The VMs share alike; in stage two each gets its highest dirty rate at least.
fn at_once(inputs: &Inputs, sent: &[Sent]) -> Result<Draft, Trouble> {
    let all: Vec<usize> = (0..sent.len()).collect();
    let stage_two = inputs.stage == Stage::Two;
    if stage_two && !fits(inputs, &all) {
        let most: f64 = inputs.vms.iter().map(|vm| vm.load.max_dirty_rate).sum();
        return Err(Trouble::Diverges(format!(
            "the VMs do not converge at once: they dirty up to {} in all, and {} carry it (Eq. 3)",
            mb(most),
            mb(inputs.limits.bandwidth)
        )));
    }
    let least = |vm: &Sent| {
        if stage_two {
            vm.load.max_dirty_rate
        } else {
            0.0
        }
    };
    let least: Vec<f64> = sent.iter().map(least).collect();
    let each = parallel(sent, &inputs.limits, &least).ok_or_else(|| not_together(inputs))?;
    let groups = each.into_iter().map(|schedule| Placed {
        start_s: 0.0,
        schedule,
        scheme: Scheme::Together,
    });
    Ok(Draft {
        groups: groups.collect(),
        ..Draft::default()
    })
}

/// COMMA: stage one copies everything once, all finishing together (Eq. 2); stage two sends what
/// was dirtied since, in valid groups.
fn comma(inputs: &Inputs, search: Search) -> Result<Draft, Trouble> {
    let whole = inputs.stage == Stage::Whole;
    let sizes = || inputs.vms.iter().map(|vm| vm.load.left_bytes).enumerate();
    let stage_one_s = if whole {
        inputs.limits.time_for(sizes())
    } else {
        0.0
    };
    let mut notes = Vec::new();
    let loads: Vec<Load> = if whole {
        if inputs.vms.iter().any(|vm| vm.dirty_set.is_none()) {
            notes.push(
                "where `dirty-set` is missing, stage two sends what is dirtied in stage one, at \
                 most the writable working set"
                    .to_owned(),
            );
        }
        inputs
            .vms
            .iter()
            .map(|vm| stage_two(vm, stage_one_s))
            .collect()
    } else {
        inputs.loads()
    };
    let time = ByDelayedStart::new(&loads, &inputs.limits);
    let ordered = find_order(inputs, &time, search)?;
    let schedules = in_papers_order(&loads, &inputs.limits, &ordered);
    let schedules = schedules.into_iter().map(|found| (Scheme::Delayed, found));
    let mut draft = Draft::in_turn(stage_one_s, schedules);
    if whole && stage_one_s > 0.0 {
        draft.before = sizes().map(|(_, bytes)| bytes / stage_one_s).collect();
    }
    draft.proven = ordered.optimal;
    draft.notes = notes;
    Ok(draft)
}

/// What stage one leaves of a VM.
fn stage_two(vm: &InputVm, stage_one_s: f64) -> Load {
    let dirtied = (vm.load.dirty_rate * stage_one_s)
        .min(vm.load.left_bytes)
        .min(vm.working_set.unwrap_or(f64::INFINITY));
    Load {
        left_bytes: vm.dirty_set.unwrap_or(dirtied),
        ..vm.load
    }
}

fn in_papers_order(loads: &[Load], limits: &Limits, ordered: &Ordered) -> Vec<Schedule> {
    let groups = ordered.groups.iter();
    groups
        .filter_map(|group| delayed(loads, limits, &by_start(loads, group)))
        .collect()
}

/// Groups and their order, with errors that name VMs.
pub(super) fn find_order(
    inputs: &Inputs,
    time: &impl GroupTime,
    search: Search,
) -> Result<Ordered, Trouble> {
    let problem = Problem {
        time,
        traffic: &inputs.traffic,
        tiers: inputs.tiers.as_ref(),
    };
    find(&problem, search).map_err(|error| match error {
        OrderError::NotConverging { vm } => too_fast(inputs, vm),
        other => Trouble::Search(other),
    })
}
