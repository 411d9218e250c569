//! The deadline: whether a plan meets it, and what would help.

use super::{Inputs, Plan, once};
use crate::application::Policy;
use crate::scheduler::order::Search;

/// How much vCPUs are slowed, in percent: the steps that a move takes.
pub(crate) const THROTTLE_STEPS: [u8; 5] = [20, 40, 60, 80, 99];

/// Up to so many VMs remedies are looked for: each is a plan.
const UP_TO: usize = 12;

/// What a person should know of a plan that does not converge, or misses its deadline.
pub(super) fn note(inputs: &Inputs, plan: &Plan, policy: Policy, search: Search) -> Option<String> {
    let misses = |plan: &Plan| plan.deadline.is_some_and(|deadline| !deadline.met);
    let missed = match &plan.deadline {
        _ if !plan.converges => None,
        Some(deadline) if !deadline.met => Some(format!(
            "the deadline of {:.0} s is missed by {:.1} s",
            deadline.limit_s,
            deadline.needed_s - deadline.limit_s
        )),
        _ => return None,
    };
    let may_look = inputs.may_throttle && inputs.vms.len() <= UP_TO;
    let helps = |percent: &u8| {
        let slowed = once(&inputs.slowed(*percent), policy, search);
        slowed.is_ok_and(|plan| plan.converges && !misses(&plan))
    };
    let found = THROTTLE_STEPS
        .iter()
        .find(|percent| may_look && helps(percent));
    let remedy = match (found, &missed) {
        (Some(percent), Some(_)) => format!("it is met with vCPUs slowed by {percent} %"),
        (Some(percent), None) => format!("it converges with vCPUs slowed by {percent} %"),
        (None, _) if may_look => "slowing vCPUs as far as is allowed does not help".to_owned(),
        (None, _) => return missed,
    };
    Some(missed.map_or(remedy.clone(), |missed| format!("{missed}; {remedy}")))
}
