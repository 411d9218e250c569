//! Good groups and orders for any number of VMs: several seeds, annealing, and exact steps on parts.
//!
//! 1. Seeds: COMMA's heuristic; Fiduccia-Mattheyses groups; orders that grow along the smallest cut.
//!    Each is cut up anew by [`polish::split`], which is optimal for a given order of VMs.
//! 2. [`anneal`] from the best of them: VMs change groups or swap, groups merge, split, and change
//!    places; only what changes is computed ([`state`]).
//! 3. [`polish`]: optimal splits again, then optimal windows of up to 12 VMs (10 where there are many).
//!
//! The same problem gives the same answer: random numbers come from a fixed seed, and effort is
//! counted in work, not in time.

pub mod anneal;
pub mod polish;
pub mod seeds;
pub mod state;

use crate::scheduler::group::GroupTime;

use super::Problem;

/// How much work a search may do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effort {
    /// Annealing: VMs looked at, per VM.
    pub work_per_vm: u64,
    /// How often annealing starts, from the best found so far.
    pub rounds: u32,
    /// The start temperature, in parts of the cost per VM.
    pub heat: f64,
}

impl Default for Effort {
    fn default() -> Self {
        Self {
            work_per_vm: 200_000,
            rounds: 2,
            heat: 6.0,
        }
    }
}

/// Good groups and their order; nothing where the tiers cannot be kept.
#[must_use]
pub fn search<T: GroupTime>(problem: &Problem<'_, T>, effort: &Effort) -> Option<Vec<Vec<usize>>> {
    let cost = |groups: &Vec<Vec<usize>>| problem.judge(groups.clone(), false).impact_bytes;
    let seeds = seeds::all(problem);
    let scored = seeds.into_iter().map(|groups| (cost(&groups), groups));
    let (mut least, mut best) = scored.min_by(|a, b| a.0.total_cmp(&b.0))?;
    for round in 0..effort.rounds {
        if least == 0.0 {
            break;
        }
        let mut found = anneal::anneal(problem, &best, effort, u64::from(round));
        polish::polish(problem, &mut found);
        let cost = cost(&found);
        if cost < least {
            (least, best) = (cost, found);
        }
    }
    Some(best)
}
