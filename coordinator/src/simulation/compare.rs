//! Ours beside the source's.

use serde::Serialize;

use super::run::{Attempt, CaseResult};
use super::study::{Cell, Claim, Figure, Relation, Study};

/// A figure of the source, and ours.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// In which case.
    pub case: String,
    /// What.
    pub figure: Figure,
    /// `s`, `MB`, or nothing for a ratio.
    pub unit: &'static str,
    /// Of which approach.
    pub approach: String,
    /// To which approach, if it is a ratio.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// In which case that one is, where it is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_case: Option<String>,
    /// Of which VM alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// How the source's value is meant.
    pub relation: Relation,
    /// The source's value; none where it says that it does not converge.
    pub paper: Option<f64>,
    /// By the planner; none where it does not converge, or does not say.
    pub planned: Option<f64>,
    /// By the simulator; none where it does not converge.
    pub simulated: Option<f64>,
    /// Where the source says so.
    pub place: String,
}

/// Every figure of the source that `results` have, in the order of the cases.
#[must_use]
pub fn compare(study: &Study, results: &[CaseResult]) -> Vec<Comparison> {
    let find = |case: &str, approach: &str| {
        let case = results.iter().find(|result| result.case == case)?;
        let mut attempts = case.approaches.iter();
        attempts.find(|attempt| attempt.approach == approach)
    };
    let mut all = Vec::new();
    for table in &study.table {
        for result in results {
            let Some(cells) = table.rows.get(&result.case) else {
                continue;
            };
            for (approach, cell) in table.approaches.iter().zip(cells) {
                let Some(ours) = find(&result.case, approach) else {
                    continue;
                };
                all.push(Comparison {
                    case: result.case.clone(),
                    figure: table.figure,
                    unit: unit(table.figure),
                    approach: approach.clone(),
                    to: None,
                    in_case: None,
                    vm: None,
                    relation: Relation::Is,
                    paper: match cell {
                        Cell::Number(value) => Some(*value),
                        Cell::Text(_) => None,
                    },
                    planned: planned(ours, table.figure),
                    simulated: simulated(ours, table.figure, None),
                    place: study.source.clone(),
                });
            }
        }
    }
    for claim in &study.claim {
        let base = claim.in_case.as_ref().unwrap_or(&claim.case);
        let ours = find(&claim.case, &claim.of);
        let other = claim.to.as_ref().map(|to| find(base, to));
        if let (Some(ours), Some(other)) = (ours, other.map_or(Some(None), |found| found.map(Some)))
        {
            all.push(judged(claim, ours, other));
        }
    }
    all
}

fn judged(claim: &Claim, ours: &Attempt, other: Option<&Attempt>) -> Comparison {
    let ratio = |value: &dyn Fn(&Attempt) -> Option<f64>| match other {
        Some(other) => Some(value(ours)? / value(other)?),
        None => value(ours),
    };
    let vm = claim.vm.as_deref();
    Comparison {
        case: claim.case.clone(),
        figure: claim.figure,
        unit: if other.is_some() {
            ""
        } else {
            unit(claim.figure)
        },
        approach: claim.of.clone(),
        to: claim.to.clone(),
        in_case: claim.in_case.clone(),
        vm: claim.vm.clone(),
        relation: claim.relation,
        paper: Some(claim.value),
        planned: ratio(&|attempt| planned(attempt, claim.figure).filter(|_| vm.is_none())),
        simulated: ratio(&|attempt| simulated(attempt, claim.figure, vm)),
        place: claim.place.clone(),
    }
}

/// The planner's downtime is of one group and one set of rules: nothing to compare.
fn planned(attempt: &Attempt, figure: Figure) -> Option<f64> {
    let amounts = attempt.planned.filter(|_| figure != Figure::Downtime)?;
    Some(amounts.figure(figure))
}

fn simulated(attempt: &Attempt, figure: Figure, vm: Option<&str>) -> Option<f64> {
    let Some(name) = vm else {
        return Some(attempt.simulated?.figure(figure));
    };
    let vm = attempt.vms.iter().find(|vm| vm.name == name)?;
    match figure {
        Figure::Completion => Some(vm.finish_s),
        Figure::Traffic => Some(vm.traffic_bytes / 1e6),
        Figure::Downtime => Some(vm.downtime_s),
        Figure::Impact | Figure::Split => None,
    }
}

fn unit(figure: Figure) -> &'static str {
    match figure {
        Figure::Completion | Figure::Downtime | Figure::Split => "s",
        Figure::Traffic | Figure::Impact => "MB",
    }
}
