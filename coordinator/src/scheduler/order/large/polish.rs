//! Exact steps on parts of an order: optimal splits of a line of VMs, optimal windows.

use crate::scheduler::group::{GroupTime, places};
use crate::scheduler::order::Problem;
use crate::scheduler::order::exact::Window;
use crate::scheduler::schedule::ROUNDING;

/// VMs in a window: 3^12 steps each.
const WINDOW: usize = 12;
/// Above so many VMs there are too many windows for that.
const MANY: usize = 300;
/// VMs in a window then: a ninth of the steps.
const SMALL_WINDOW: usize = 10;
/// How often all windows are looked at.
const PASSES: usize = 3;

/// Improves `groups` by an optimal split of their order, then by optimal windows.
pub fn polish<T: GroupTime>(problem: &Problem<'_, T>, groups: &mut Vec<Vec<usize>>) {
    let cost = |groups: &[Vec<usize>]| problem.judge(groups.to_vec(), false).impact_bytes;
    if let Some(cut) = split(problem, &groups.concat()) {
        if cost(&cut) < cost(groups) {
            *groups = cut;
        }
    }
    for _ in 0..PASSES {
        if !windows(problem, groups) {
            break;
        }
    }
}

/// The best way to cut this order of VMs into groups; nothing where none is valid, or keeps the
/// tiers: F(j) = min over i of F(i) + cut(first i) · T(i..j].
#[must_use]
pub fn split<T: GroupTime>(problem: &Problem<'_, T>, line: &[usize]) -> Option<Vec<Vec<usize>>> {
    let place = places(problem.time);
    let most = problem.time.most() * (1.0 + ROUNDING);
    let cut = cuts(problem, line);
    let covers = |group: &[usize]| {
        let tiers = problem.tiers;
        tiers.is_none_or(|tiers| tiers.cover(group.iter().copied()))
    };
    let mut cost = vec![f64::INFINITY; line.len() + 1];
    let mut from = vec![0; line.len() + 1];
    cost[0] = 0.0;
    let mut group: Vec<usize> = Vec::new();
    for end in 1..=line.len() {
        group.clear();
        let mut least = 0.0;
        for begin in (0..end).rev() {
            let vm = line[begin];
            least += problem.time.least(vm);
            if least > most {
                break;
            }
            let at = group.partition_point(|&other| place[other] < place[vm]);
            group.insert(at, vm);
            // Lower bounds are cheaper than times: nothing before pays more than it has to.
            if cost[begin] >= cost[end] {
                continue;
            }
            if (begin == 0 || end == line.len()) && !covers(&group) {
                continue;
            }
            let time = problem.time.duration(&group);
            if time.is_finite() && cost[begin] + time * cut[begin] < cost[end] {
                cost[end] = cost[begin] + time * cut[begin];
                from[end] = begin;
            }
        }
    }
    if !cost[line.len()].is_finite() {
        return None;
    }
    let mut groups = Vec::new();
    let mut end = line.len();
    while end > 0 {
        groups.push(line[from[end]..end].to_vec());
        end = from[end];
    }
    groups.reverse();
    Some(groups)
}

/// What crosses when so many of the line have moved, in bytes per second.
fn cuts<T: GroupTime>(problem: &Problem<'_, T>, line: &[usize]) -> Vec<f64> {
    let mut moved = vec![false; line.len()];
    let mut cut = vec![0.0];
    let mut sum = 0.0_f64;
    for &vm in line {
        for &(other, rate) in problem.traffic.of(vm) {
            sum += if moved[other] { -rate } else { rate };
        }
        moved[vm] = true;
        sum = sum.max(0.0);
        cut.push(sum);
    }
    cut
}

/// Orders every window of groups anew; whether one got better.
fn windows<T: GroupTime>(problem: &Problem<'_, T>, groups: &mut Vec<Vec<usize>>) -> bool {
    let place = places(problem.time);
    let most = if problem.time.vms() > MANY {
        SMALL_WINDOW
    } else {
        WINDOW
    };
    let mut better = false;
    let mut begin = 0;
    let mut done = 0;
    while begin < groups.len() {
        let mut end = begin;
        let mut size = 0;
        while end < groups.len() && size + groups[end].len() <= most {
            size += groups[end].len();
            end += 1;
        }
        // One that ends where the one before it ended is a part of it.
        if end > begin + 1 && (end > done || begin == 0) {
            done = end;
            let window = window(problem, groups, begin..end, &place);
            let now = cost_of(problem, groups, begin..end, &window);
            if let Some(best) = window.best(problem) {
                if best.cost < now * (1.0 - 1e-9) {
                    let added = best.groups.len();
                    groups.splice(begin..end, best.groups);
                    done = begin + added;
                    better = true;
                }
            }
        }
        begin += 1;
    }
    better
}

fn window<T: GroupTime>(
    problem: &Problem<'_, T>,
    groups: &[Vec<usize>],
    range: std::ops::Range<usize>,
    place: &[usize],
) -> Window {
    let mut side = vec![std::cmp::Ordering::Greater; problem.time.vms()];
    for (index, group) in groups[..range.end].iter().enumerate() {
        for &vm in group {
            side[vm] = if index < range.start {
                std::cmp::Ordering::Less
            } else {
                std::cmp::Ordering::Equal
            };
        }
    }
    let mut vms = groups[range.clone()].concat();
    vms.sort_by_key(|&vm| place[vm]);
    let to = |vm: usize, wanted| -> f64 {
        let others = problem.traffic.of(vm).iter();
        let others = others.filter(|(other, _)| side[*other] == wanted);
        others.map(|(_, rate)| rate).sum()
    };
    let crossing = problem.traffic.pairs().filter(|&(a, b, _)| {
        (side[a] == std::cmp::Ordering::Less) != (side[b] == std::cmp::Ordering::Less)
    });
    Window {
        to_before: vms
            .iter()
            .map(|&vm| to(vm, std::cmp::Ordering::Less))
            .collect(),
        to_after: vms
            .iter()
            .map(|&vm| to(vm, std::cmp::Ordering::Greater))
            .collect(),
        cut_before: crossing.map(|(_, _, rate)| rate).sum(),
        first: range.start == 0,
        last: range.end == groups.len(),
        vms,
    }
}

/// What the groups of a window cost as they are.
fn cost_of<T: GroupTime>(
    problem: &Problem<'_, T>,
    groups: &[Vec<usize>],
    range: std::ops::Range<usize>,
    window: &Window,
) -> f64 {
    let judged = problem.judge(groups[range].to_vec(), false);
    let mut cut = window.cut_before;
    let mut cost = 0.0;
    let mut moved: Vec<usize> = Vec::new();
    for (group, time) in judged.groups.iter().zip(&judged.durations_s) {
        if cut > 0.0 {
            cost += time * cut;
        }
        for vm in group {
            let index = window.vms.iter().position(|other| other == vm).unwrap_or(0);
            cut += window.to_after[index] - window.to_before[index];
            for (other, rate) in problem.traffic.of(*vm) {
                if moved.contains(other) {
                    cut -= rate;
                } else if window.vms.contains(other) {
                    cut += rate;
                }
            }
            moved.push(*vm);
        }
    }
    cost
}
