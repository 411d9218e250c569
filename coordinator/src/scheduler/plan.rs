//! Plans: what each policy would do with an application, without touching a VM.
//!
//! [`Inputs`] are what is known of the application; [`plan`] says for one policy which VMs finish
//! together, when each starts, how much bandwidth each gets, and what that costs. A policy that
//! does not converge gives a plan that says so, and why.
//!
//! The models are those of the papers: data that is dirtied at its mean rate while it is sent
//! ([`schemes`]), groups that follow each other, and Eq. 1 of COMMA for the impact. What is left at
//! the switchover, and so the downtime, is what a VM dirties in [`HELD_SYNC_S`].

mod deadline;
mod inputs;
mod muster;
mod policies;
mod saturating;
pub mod schemes;
mod sent;

use serde::Serialize;

use super::allot::Scheme;
use super::impact::of_times;
use super::order::{OrderError, Search};
use super::schedule::{Schedule, VmSchedule};
use crate::application::Policy;

pub(crate) use deadline::THROTTLE_STEPS;
pub use inputs::{Inputs, MissingError, Stage};

/// A held VM's dirty pages are found in this interval, in seconds: what it dirties in that time is
/// left when it stops.
pub const HELD_SYNC_S: f64 = 0.1;

/// What a policy would do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The policy.
    pub policy: String,
    /// Whether the VMs converge. Where they do not, times are missing.
    pub converges: bool,
    /// Why they do not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What a person should know of how it was planned.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// VMs that switch over together, in order.
    pub groups: Vec<PlannedGroup>,
    /// The VMs, in the file's order.
    pub vms: Vec<PlannedVm>,
    /// Until the last VM has arrived, in seconds.
    pub completion_s: Option<f64>,
    /// Sent in all, in bytes.
    pub traffic_bytes: Option<f64>,
    /// The longest stop of a group, in seconds.
    pub downtime_s: Option<f64>,
    /// Communication impact in bytes (COMMA 2.2, Eq. 1).
    pub impact_bytes: Option<f64>,
    /// Whether no valid groups in any order have less impact: proven.
    pub optimal: bool,
    /// Whether the groups are released within the file's deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<PlannedDeadline>,
}

/// A deadline beside what a plan needs; each group has its own.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PlannedDeadline {
    /// The file's, in seconds.
    pub limit_s: f64,
    /// What the slowest group needs, in seconds.
    pub needed_s: f64,
    /// Whether it is met.
    pub met: bool,
}

/// A group of a plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedGroup {
    /// Names of its VMs.
    pub vms: Vec<String>,
    /// How they share the bandwidth.
    pub scheme: Scheme,
    /// When its first VM starts, in seconds from the plan's start.
    pub start_s: f64,
    /// From then until its VMs have arrived, in seconds.
    pub duration_s: f64,
}

/// A VM of a plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedVm {
    /// Its name.
    pub name: String,
    /// When its migration starts, in seconds from the plan's start.
    pub start_s: f64,
    /// When it arrives.
    pub finish_s: f64,
    /// From when (seconds) at which rate (bytes per second). The last step lasts until it arrives.
    pub bandwidth: Vec<(f64, f64)>,
}

/// The plan of a policy. Where VMs do not converge, it says so.
///
/// # Errors
/// The search cannot take so many VMs, or no groups keep the tiers.
pub fn plan(inputs: &Inputs, policy: Policy, search: Search) -> Result<Plan, OrderError> {
    let mut plan = once(inputs, policy, search)?;
    if let Some(note) = deadline::note(inputs, &plan, policy, search) {
        plan.notes.push(note);
    }
    Ok(plan)
}

fn once(inputs: &Inputs, policy: Policy, search: Search) -> Result<Plan, OrderError> {
    match policies::draft(inputs, policy, search) {
        Ok(draft) => Ok(draft.finish(inputs, policy)),
        Err(Trouble::Search(error)) => Err(error),
        Err(Trouble::Diverges(reason)) => Ok(Plan::without_times(policy, reason)),
    }
}

/// How much time a plan that is made anew may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// Milliseconds: in the control loop of a move.
    Quick,
    /// What a plan takes: beside the move.
    Full,
}

/// The groups of `muster` for the VMs that have not moved, from what limits them now. `groups` are those
/// that were foreseen. Nothing where a VM does not converge even alone; then those stand.
#[must_use]
pub fn again(
    inputs: &Inputs,
    moved: &[bool],
    groups: &[Vec<usize>],
    effort: Effort,
) -> Option<Vec<(Vec<usize>, Scheme)>> {
    muster::again(inputs, &policies::sent(inputs), moved, groups, effort)
}

/// Why there is no draft.
#[derive(Debug)]
enum Trouble {
    /// The VMs do not converge, and why.
    Diverges(String),
    /// The search found nothing.
    Search(OrderError),
}

impl Plan {
    /// A plan that says why there is none.
    #[must_use]
    pub fn without_times(policy: Policy, reason: String) -> Self {
        Self {
            policy: policy.to_string(),
            converges: false,
            reason: Some(reason),
            notes: Vec::new(),
            groups: Vec::new(),
            vms: Vec::new(),
            completion_s: None,
            traffic_bytes: None,
            downtime_s: None,
            impact_bytes: None,
            optimal: false,
            deadline: None,
        }
    }
}

/// A plan that is being made: groups with their schedules.
#[derive(Debug, Default)]
struct Draft {
    groups: Vec<Placed>,
    /// Rates before the first group begins, by VM.
    before: Vec<f64>,
    proven: bool,
    notes: Vec<String>,
}

/// A group's schedule, and when it begins.
#[derive(Debug)]
struct Placed {
    start_s: f64,
    schedule: Schedule,
    scheme: Scheme,
}

impl Draft {
    /// Groups that follow each other.
    fn in_turn(start_s: f64, schedules: impl IntoIterator<Item = (Scheme, Schedule)>) -> Self {
        let mut now = start_s;
        let groups = schedules.into_iter().map(|(scheme, schedule)| {
            let start_s = now;
            now += schedule.duration_s;
            Placed {
                start_s,
                schedule,
                scheme,
            }
        });
        Self {
            groups: groups.collect(),
            ..Self::default()
        }
    }

    fn finish(self, inputs: &Inputs, policy: Policy) -> Plan {
        let vms = inputs.vms.len();
        let mut planned: Vec<Option<PlannedVm>> = vec![None; vms];
        let mut groups = Vec::new();
        let mut downtime = 0.0_f64;
        let first_s = self.groups.first().map_or(0.0, |group| group.start_s);
        for Placed {
            start_s,
            schedule,
            scheme,
        } in &self.groups
        {
            let finish_s = start_s + schedule.duration_s;
            let mut left = Vec::new();
            for vm in &schedule.vms {
                let before = self.before.get(vm.vm).map(|rate| (*rate, first_s));
                planned[vm.vm] = Some(place(inputs, vm, before, *start_s, finish_s));
                let rate = vm.bandwidth.last().map_or(0.0, |step| step.1);
                left.push((vm.vm, inputs.left_at_stop(vm.vm, rate)));
            }
            downtime = downtime.max(inputs.limits.time_for(left.iter().copied()));
            let mut members: Vec<usize> = schedule.vms.iter().map(|vm| vm.vm).collect();
            members.sort_unstable();
            let names = members.iter().map(|&vm| inputs.vms[vm].name.clone());
            groups.push(PlannedGroup {
                vms: names.collect(),
                scheme: *scheme,
                start_s: *start_s,
                duration_s: schedule.duration_s,
            });
        }
        // The first stage of two counts for every group, the wait for its turn does not.
        let times = groups.iter().map(|group| group.duration_s);
        let deadline = inputs.deadline_s.map(|limit_s| {
            let needed_s = first_s + times.fold(0.0, f64::max);
            PlannedDeadline {
                limit_s,
                needed_s,
                met: needed_s <= limit_s,
            }
        });
        let planned: Vec<PlannedVm> = planned.into_iter().flatten().collect();
        let arrival: Vec<f64> = planned.iter().map(|vm| vm.finish_s).collect();
        let impact = of_times(&inputs.traffic, &arrival);
        Plan {
            policy: policy.to_string(),
            converges: true,
            reason: None,
            notes: self.notes,
            groups,
            completion_s: Some(arrival.iter().copied().fold(0.0, f64::max)),
            traffic_bytes: Some(planned.iter().map(sent).sum()),
            downtime_s: Some(downtime),
            impact_bytes: Some(impact),
            optimal: self.proven || impact == 0.0,
            deadline,
            vms: planned,
        }
    }
}

fn place(
    inputs: &Inputs,
    vm: &VmSchedule,
    before: Option<(f64, f64)>,
    start_s: f64,
    finish_s: f64,
) -> PlannedVm {
    let mut bandwidth = Vec::new();
    let own_start_s = start_s + vm.start_s;
    if let Some((rate, until_s)) = before {
        bandwidth.push((0.0, rate));
        if own_start_s > until_s {
            bandwidth.push((until_s, 0.0));
        }
    }
    bandwidth.extend(vm.bandwidth.iter().map(|(at, rate)| (start_s + at, *rate)));
    PlannedVm {
        name: inputs.vms[vm.vm].name.clone(),
        start_s: before.map_or(own_start_s, |_| 0.0),
        finish_s,
        bandwidth,
    }
}

/// What a VM sends, in bytes.
fn sent(vm: &PlannedVm) -> f64 {
    let ends = vm.bandwidth.iter().skip(1).map(|step| step.0);
    let steps = vm.bandwidth.iter().zip(ends.chain([vm.finish_s]));
    steps.map(|((from, rate), to)| rate * (to - from)).sum()
}

#[cfg(test)]
mod tests;
