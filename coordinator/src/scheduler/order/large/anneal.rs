//! Simulated annealing on ordered partitions.
//!
//! The start temperature is a few times the cost per VM, the end a thousandth of that; between them
//! it falls geometrically with the work done. The best state seen is the result.

use crate::scheduler::group::GroupTime;
use crate::scheduler::order::Problem;
use crate::scheduler::random::Random;

use super::Effort;
use super::state::State;

/// The end temperature, in parts of the start temperature.
const COLD: f64 = 1e-3;

/// Improves `start`; `seed` chooses among the possible runs.
#[must_use]
pub fn anneal<T: GroupTime>(
    problem: &Problem<'_, T>,
    start: &[Vec<usize>],
    effort: &Effort,
    seed: u64,
) -> Vec<Vec<usize>> {
    let vms = problem.time.vms();
    let mut state = State::new(problem, start);
    let mut random = Random(seed);
    let mut best = (state.cost(), start.to_vec());
    let mut seen: Vec<u32> = Vec::new();
    let budget = effort.work_per_vm.saturating_mul(vms as u64);
    let hot = effort.heat * state.cost() / ratio(vms as u64, 1);
    let mut temperature = hot;
    let mut steps = 0_u64;
    while state.work < budget {
        if steps % 256 == 0 {
            temperature = hot * COLD.powf(ratio(state.work, budget));
        }
        if steps % (1 << 14) == 0 {
            state.recount();
        }
        steps += 1;
        state.work += 4;
        let chance = random.unit();
        let accept = |change: f64| change <= 0.0 || (-change / temperature).exp() > chance;
        if step(&mut state, problem, &mut random, accept) && state.cost() < best.0 * (1.0 - 1e-9) {
            best.0 = state.cost();
            seen.clear();
            let ranks = (0..vms).map(|vm| u32::try_from(state.rank_of(vm)).unwrap_or(u32::MAX));
            seen.extend(ranks);
        }
    }
    if let Some(last) = seen.iter().max() {
        best.1 = vec![Vec::new(); *last as usize + 1];
        for (vm, &rank) in seen.iter().enumerate() {
            best.1[rank as usize].push(vm);
        }
    }
    best.1
}

fn ratio(part: u64, whole: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a share of the work")]
    let share = part as f64 / whole as f64;
    share
}

/// Tries one change; whether it was made.
fn step<T: GroupTime>(
    state: &mut State<'_, T>,
    problem: &Problem<'_, T>,
    random: &mut Random,
    accept: impl FnOnce(f64) -> bool,
) -> bool {
    let vms = problem.time.vms();
    let ranks = state.ranks();
    let vm = random.below(vms);
    let talks_to = problem.traffic.of(vm);
    match random.below(100) {
        0..35 if !talks_to.is_empty() => {
            let (other, _) = talks_to[random.below(talks_to.len())];
            let to = state.rank_of(other);
            state.relocate(vm, to, accept)
        }
        0..50 => {
            let to = random.below(ranks);
            state.relocate(vm, to, accept)
        }
        50..70 => {
            let rank = random.below(ranks);
            let group = state.group(rank);
            let other = group[random.below(group.len())];
            state.swap(vm, other, accept)
        }
        70..80 => {
            let at = random.below(ranks + 1);
            state.part(vm, at, accept)
        }
        80..86 if ranks > 1 => state.merge(random.below(ranks - 1), accept),
        86..92 => {
            let rank = random.below(ranks);
            let bits = random.next();
            state.split(rank, |vm| bits >> (vm % 64) & 1 == 1, accept)
        }
        _ if ranks > 1 => state.exchange(random.below(ranks - 1), accept),
        _ => false,
    }
}
