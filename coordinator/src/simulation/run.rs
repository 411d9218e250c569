//! Plans and simulates every approach in every case.

use serde::Serialize;

use super::study::{Approach, Case, Ending, Figure, Part, Study};
use super::{StudyError, case, guests};
use crate::application::Policy;
use crate::scheduler::fluid::{self, Outcome, SimulateError, Travel};
use crate::scheduler::impact;
use crate::scheduler::order::Search;
use crate::scheduler::plan::{Inputs, Plan, Stage, plan as plan_of};
use crate::scheduler::predict::End;

/// What a move costs; means over the draws.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Amounts {
    /// Until the last VM runs at its destination, in seconds.
    pub completion_s: f64,
    /// All that was sent, in bytes.
    pub traffic_bytes: f64,
    /// How long at least one VM was paused, in seconds.
    pub downtime_s: f64,
    /// Communication impact, in bytes (COMMA, Eq. 1).
    pub impact_bytes: f64,
    /// From the first VM's arrival to the last one's, in seconds.
    pub split_s: f64,
}

impl Amounts {
    /// In the unit in which sources print it: s or MB.
    #[must_use]
    pub fn figure(&self, figure: Figure) -> f64 {
        match figure {
            Figure::Completion => self.completion_s,
            Figure::Traffic => self.traffic_bytes / 1e6,
            Figure::Downtime => self.downtime_s,
            Figure::Impact => self.impact_bytes / 1e6,
            Figure::Split => self.split_s,
        }
    }

    fn of_plan(plan: &Plan) -> Option<Self> {
        let finish = plan.vms.iter().map(|vm| vm.finish_s);
        let first = finish.clone().fold(f64::INFINITY, f64::min);
        let completion_s = plan.completion_s?;
        Some(Self {
            completion_s,
            traffic_bytes: plan.traffic_bytes?,
            downtime_s: plan.downtime_s?,
            impact_bytes: plan.impact_bytes?,
            split_s: (completion_s - first).max(0.0),
        })
    }

    fn of_outcome(outcome: &Outcome, traffic: &impact::Traffic) -> Self {
        let arrival: Vec<f64> = outcome.vms.iter().map(|vm| vm.finish_s).collect();
        Self {
            completion_s: outcome.completion_s(),
            traffic_bytes: outcome.traffic_bytes(),
            downtime_s: paused_s(&outcome.vms),
            impact_bytes: impact::of_times(traffic, &arrival),
            split_s: outcome.split_s(),
        }
    }

    fn mean(all: &[Self]) -> Self {
        #[allow(clippy::cast_precision_loss, reason = "a number of draws")]
        let count = all.len().max(1) as f64;
        let mean = |field: fn(&Self) -> f64| all.iter().map(field).sum::<f64>() / count;
        Self {
            completion_s: mean(|amounts| amounts.completion_s),
            traffic_bytes: mean(|amounts| amounts.traffic_bytes),
            downtime_s: mean(|amounts| amounts.downtime_s),
            impact_bytes: mean(|amounts| amounts.impact_bytes),
            split_s: mean(|amounts| amounts.split_s),
        }
    }
}

/// How long at least one VM was paused.
fn paused_s(vms: &[Travel]) -> f64 {
    let mut pauses: Vec<(f64, f64)> = vms.iter().map(|vm| (vm.paused_s, vm.finish_s)).collect();
    pauses.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut until = 0.0_f64;
    let mut sum = 0.0;
    for (from, to) in pauses {
        sum += (to - from.max(until)).max(0.0);
        until = until.max(to);
    }
    sum
}

/// How a VM moved in the simulation; of several draws in the first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VmAmounts {
    /// Its name.
    pub name: String,
    /// When its copy began, in seconds.
    pub start_s: f64,
    /// When its pre-copy ended.
    pub ready_s: f64,
    /// When it ran at its destination.
    pub finish_s: f64,
    /// How long it was paused.
    pub downtime_s: f64,
    /// What it sent.
    pub traffic_bytes: f64,
    /// Rounds after the first copy, until pre-copy ended.
    pub rounds: u32,
    /// Why it ended: converged, stalled, rounds or traffic.
    pub end: Option<&'static str>,
}

/// One approach in one case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Attempt {
    /// The approach.
    pub approach: String,
    /// Its policy.
    pub policy: String,
    /// When pre-copy ended.
    pub termination: Ending,
    /// What was planned and simulated.
    pub stage: Part,
    /// What the planner predicts.
    pub planned: Option<Amounts>,
    /// What the simulator finds.
    pub simulated: Option<Amounts>,
    /// Why one of them is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The VMs in the simulation.
    pub vms: Vec<VmAmounts>,
}

/// All approaches in one case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaseResult {
    /// The case.
    pub case: String,
    /// The approaches.
    pub approaches: Vec<Attempt>,
}

/// Plans and simulates every approach of `study` in every case; only those with `policy`, if one is
/// given.
///
/// # Errors
/// The study or its application is wrong, or does not say enough. That something does not converge is
/// a result, not an error.
pub fn simulate(study: &Study, policy: Option<Policy>) -> Result<Vec<CaseResult>, StudyError> {
    let cases = study.case.iter().map(|case| {
        let approaches = study.approach.iter();
        let chosen =
            approaches.filter(|approach| policy.is_none_or(|only| approach.policy == only));
        let attempts: Result<Vec<Attempt>, StudyError> = chosen
            .map(|approach| attempt(study, case, approach))
            .collect();
        Ok(CaseResult {
            case: case.name.clone(),
            approaches: attempts?,
        })
    });
    cases.collect()
}

fn attempt(study: &Study, case: &Case, approach: &Approach) -> Result<Attempt, StudyError> {
    let search: Search = approach.search.parse().map_err(StudyError::Study)?;
    let stage = match approach.stage {
        Part::Whole => Stage::Whole,
        Part::Two => Stage::Two,
    };
    let mut found = Attempt {
        approach: approach.name.clone(),
        policy: approach.policy.to_string(),
        termination: approach.termination,
        stage: approach.stage,
        planned: None,
        simulated: None,
        reason: None,
        vms: Vec::new(),
    };
    let (mut planned, mut simulated) = (Vec::new(), Vec::new());
    for draw in 0..case.draws.max(1) {
        let outline = case::outline(study, case, approach, draw)?;
        let inputs = Inputs::new(&outline, stage)?;
        let plan = plan_of(&inputs, approach.policy, search)?;
        let amounts = Amounts::of_plan(&plan);
        if amounts.is_none() {
            found.reason.clone_from(&plan.reason);
        }
        planned.push(amounts);
        // What follows a plan needs one, and at stage two Eq. 3 forbids what does not fit.
        let follows = matches!(approach.policy, Policy::Comma | Policy::Muster);
        if amounts.is_none() && (follows || stage == Stage::Two) {
            simulated.push(None);
            continue;
        }
        let rewriting = study.rewriting.as_ref();
        let scenario = guests::scenario(&outline, &inputs, approach, case, rewriting)
            .map_err(SimulateError::from)?;
        let mut policy = guests::policy(&outline, &inputs, approach, &plan)?;
        match fluid::simulate(&scenario, policy.as_mut()) {
            Ok(outcome) => {
                simulated.push(Some(Amounts::of_outcome(&outcome, inputs.traffic())));
                if draw == 0 {
                    let names = outline.vms.iter().map(|vm| &vm.name);
                    let vms = names.zip(&outcome.vms);
                    found.vms = vms.map(|(name, vm)| travelled(name, vm)).collect();
                }
            }
            Err(error @ (SimulateError::Endless { .. } | SimulateError::TooHot { .. })) => {
                simulated.push(None);
                found.reason.get_or_insert_with(|| error.to_string());
            }
            Err(error) => return Err(error.into()),
        }
    }
    let mean = |all: Vec<Option<Amounts>>| -> Option<Amounts> {
        let all: Option<Vec<Amounts>> = all.into_iter().collect();
        all.map(|all| Amounts::mean(&all))
    };
    found.planned = mean(planned);
    found.simulated = mean(simulated);
    Ok(found)
}

fn travelled(name: &str, vm: &Travel) -> VmAmounts {
    VmAmounts {
        name: name.to_owned(),
        start_s: vm.start_s,
        ready_s: vm.ready_s,
        finish_s: vm.finish_s,
        downtime_s: vm.downtime_s(),
        traffic_bytes: vm.traffic_bytes,
        rounds: vm.rounds,
        end: vm.end.map(|end| match end {
            End::Converged => "converged",
            End::Stalled => "stalled",
            End::Rounds => "rounds",
            End::Traffic => "traffic",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_counts_once_however_many_are_in_it() {
        let vm = |paused_s, finish_s| Travel {
            paused_s,
            finish_s,
            ..Travel::default()
        };
        assert_eq!(paused_s(&[vm(5.0, 7.0), vm(1.0, 2.0), vm(6.0, 8.0)]), 4.0);
        assert_eq!(paused_s(&[vm(1.0, 9.0), vm(2.0, 3.0)]), 8.0);
        assert_eq!(paused_s(&[]), 0.0);
    }
}
