//! From an application to guests, links and a policy for the simulator.

use rate_limiter::BytesPerSecond;
use sidecar::protocol::command;

use super::study::{Approach, Case, Ending, LoadPhase, Part, Rewriting};
use crate::application::{Outline, OutlineVm, Policy, VmProfile};
use crate::scheduler::bandwidth::release::Rule;
use crate::scheduler::bandwidth::{self, InputError, VmLoad};
use crate::scheduler::fluid::policies::{self, GroupTimetable, Lll, Oba, Timetable};
use crate::scheduler::fluid::{self, Disk, Guest, Load, Phase, SimulateError};
use crate::scheduler::phases::TrackerSettings;
use crate::scheduler::plan::{Inputs, Plan, PlannedVm};
use crate::scheduler::predict::{Curve, Dirtying, Termination};

/// 50 pages: Xen's threshold (VMbuddies 4.2).
const THRESHOLD_BYTES: f64 = 50.0 * 4096.0;
/// A disk's copy gives way to memory when so little of it is dirty.
const DISK_THRESHOLD_BYTES: f64 = 1e6;
/// A bitmap is looked at no more often than this.
const LEAST_ROUND_S: f64 = 0.1;
/// A simulation is given up after the time in which everything could be sent so often, and an hour.
const HORIZON_TIMES: f64 = 20.0;
/// OBA measures dirty rates this often (VMbuddies 5.2).
const REPORT_S: f64 = 1.0;

#[allow(clippy::cast_precision_loss, reason = "sizes and rates below 2^60")]
fn float(value: u64) -> f64 {
    value as f64
}

impl Rewriting {
    /// What of W is dirty after `window_s` seconds at `speed`, as a part.
    fn part(&self, window_s: f64, speed: f64) -> f64 {
        let share = |time_s: f64| -(-window_s * speed / time_s).exp_m1();
        self.hot_share * share(self.hot_s) + (1.0 - self.hot_share) * share(self.cold_s)
    }

    /// What a VM dirties in a second, and the most that it dirties, for the planner.
    pub(super) fn describe(&self, profile: &mut VmProfile) {
        let set = profile.writable_working_set.map_or(0.0, |set| float(set.0));
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a part of a size, at most a thousand times"
        )]
        let rate = |rate: f64| Some(BytesPerSecond(rate.clamp(0.0, 1e14) as u64));
        let hottest = self.hot_share / self.hot_s + (1.0 - self.hot_share) / self.cold_s;
        profile.dirty_rate = rate(set * self.part(1.0, 1.0));
        profile.max_dirty_rate = rate(set * hottest);
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a number of points"
    )]
    fn curve(&self, set: f64, speed: f64) -> Result<Dirtying, InputError> {
        let tick_s = self.hot_s / speed / 8.0;
        let points = (6.0 * self.cold_s / speed / tick_s).clamp(2.0, 1e6) as u32;
        let part = |tick| self.part(f64::from(tick) * tick_s, speed).min(1.0);
        let points = (0..points).map(|tick| set * part(tick));
        Curve::new(tick_s, points, set).map(Dirtying::Curve)
    }
}

/// The simulator's guests and links.
///
/// # Errors
/// A phase or a working set makes no sense.
pub fn scenario(
    outline: &Outline,
    inputs: &Inputs,
    approach: &Approach,
    case: &Case,
    rewriting: Option<&Rewriting>,
) -> Result<fluid::Scenario, InputError> {
    let all: Vec<usize> = (0..outline.vms.len()).collect();
    let loads = inputs.loads();
    let guests = outline.vms.iter().zip(&loads).map(|(vm, load)| {
        let rate = load.dirty_rate;
        if approach.stage == Part::Two {
            let dirtying = unbounded(rate);
            return Ok(guest(load.left_bytes, Load::steady(dirtying), None));
        }
        let memory = vm.profile.memory.map_or(0.0, |size| float(size.0));
        let load = memory_load(vm, rate, memory, case, rewriting)?;
        let disk = vm.profile.disk.filter(|disk| disk.0 > 0).map(|disk| Disk {
            size_bytes: float(disk.0),
            load: Load::steady(unbounded(rate)),
            threshold_bytes: DISK_THRESHOLD_BYTES,
        });
        // The file gives one rate for both; it is the disk's where there is one.
        let load = match disk {
            Some(_) => Load::steady(Dirtying::NONE),
            None => load,
        };
        Ok(guest(memory, load, disk))
    });
    let bulk_s = inputs
        .limits()
        .time_for(loads.iter().map(|load| load.left_bytes).enumerate());
    Ok(fluid::Scenario {
        guests: guests.collect::<Result<_, InputError>>()?,
        capacity: inputs.limits().capacity(&all),
        termination: termination(outline, approach.termination),
        least_round_s: LEAST_ROUND_S,
        horizon_s: HORIZON_TIMES * bulk_s + 3600.0,
    })
}

fn guest(memory_bytes: f64, load: Load, disk: Option<Disk>) -> Guest {
    Guest {
        memory_bytes,
        load,
        disk,
        overhead_s: 0.0,
    }
}

fn unbounded(rate_bytes_per_s: f64) -> Dirtying {
    Dirtying::Sweep {
        rate_bytes_per_s,
        working_set_bytes: f64::INFINITY,
    }
}

fn memory_load(
    vm: &OutlineVm,
    rate: f64,
    memory: f64,
    case: &Case,
    rewriting: Option<&Rewriting>,
) -> Result<Load, InputError> {
    let set = vm.profile.writable_working_set;
    let set = set.map_or(memory, |set| float(set.0));
    let steady = [LoadPhase {
        duration_s: f64::INFINITY,
        speed: 1.0,
    }];
    let phases = if case.load.is_empty() {
        &steady[..]
    } else {
        &case.load
    };
    let phase = |phase: &LoadPhase| {
        let dirtying = match rewriting {
            Some(rewriting) => rewriting.curve(set, phase.speed)?,
            None => Dirtying::Sweep {
                rate_bytes_per_s: rate * phase.speed,
                working_set_bytes: set,
            },
        };
        Ok(Phase {
            duration_s: phase.duration_s,
            dirtying,
        })
    };
    let phases: Result<Vec<Phase>, InputError> = phases.iter().map(phase).collect();
    Ok(Load {
        phases: begun(phases?, case.begins_s),
    })
}

/// The phases as they are after `at_s`: the one that it is in is split.
fn begun(mut phases: Vec<Phase>, at_s: f64) -> Vec<Phase> {
    let whole: f64 = phases.iter().map(|phase| phase.duration_s).sum();
    if !whole.is_finite() || whole <= 0.0 {
        return phases;
    }
    let mut left_s = at_s.rem_euclid(whole);
    while left_s >= phases[0].duration_s {
        left_s -= phases[0].duration_s;
        phases.rotate_left(1);
    }
    if left_s > 0.0 {
        let mut rest = phases[0].clone();
        rest.duration_s -= left_s;
        phases[0].duration_s = left_s;
        phases.rotate_left(1);
        phases.insert(0, rest);
    }
    phases
}

fn termination(outline: &Outline, ending: Ending) -> Termination {
    // What the file's own rule switches off has its default where another rule is asked for.
    let set = outline.termination;
    let usual = command::Termination::default();
    let max_rounds = set.max_rounds.or(usual.max_rounds).unwrap_or(u32::MAX);
    let traffic_factor = set.max_memory_factor.or(usual.max_memory_factor);
    let traffic_factor = traffic_factor.unwrap_or(f64::INFINITY);
    let stalled_rounds = set.stall_rounds.or(usual.stall_rounds).unwrap_or(u32::MAX);
    match ending {
        Ending::Qemu => Termination::Qemu {
            max_downtime_s: outline.max_downtime.as_secs_f64(),
        },
        Ending::Xen => Termination::Xen {
            threshold_bytes: THRESHOLD_BYTES,
            max_rounds,
            traffic_factor,
        },
        Ending::Intelligent => Termination::Intelligent {
            threshold_bytes: THRESHOLD_BYTES,
            epsilon: set.stall_epsilon,
            stalled_rounds,
            max_rounds,
            traffic_factor,
        },
    }
}

/// The simulator's policy; those of COMMA and Muster follow `plan`.
///
/// # Errors
/// The plan does not name each VM once.
pub fn policy(
    outline: &Outline,
    inputs: &Inputs,
    approach: &Approach,
    plan: &Plan,
) -> Result<Box<dyn fluid::Policy>, SimulateError> {
    let vms = outline.vms.len();
    let max_downtime_s = if approach.at_once {
        f64::INFINITY
    } else {
        outline.max_downtime.as_secs_f64()
    };
    // `downtime-limit-hard` is twice max-downtime where a file says nothing.
    let rule = Rule {
        max_downtime_s,
        hard_downtime_s: 2.0 * max_downtime_s,
        ..Rule::default()
    };
    let loads = inputs.loads();
    Ok(match approach.policy {
        Policy::Sequential => Box::new(policies::Sequential::new((0..vms).collect(), vms)?),
        Policy::Parallel => Box::new(policies::Parallel),
        Policy::Lll => {
            let rates: Vec<f64> = loads.iter().map(|load| load.dirty_rate).collect();
            Box::new(Lll::new(&rates, rule))
        }
        Policy::Vmbuddies => {
            let load = |(vm, load): (&OutlineVm, &crate::scheduler::schedule::Load)| VmLoad {
                remaining_bytes: load.left_bytes,
                dirty_rate_bytes_per_s: load.dirty_rate,
                threshold_bytes: THRESHOLD_BYTES,
                working_set_bytes: vm.profile.writable_working_set.map(|set| float(set.0)),
            };
            let limits = bandwidth::Limits::of(&outline.termination);
            let settings = TrackerSettings {
                window_s: approach.window_s,
                ..TrackerSettings::default()
            };
            let loads = outline.vms.iter().zip(&loads).map(load).collect();
            Box::new(Oba::new(loads, limits, settings, REPORT_S, rule))
        }
        Policy::Comma | Policy::Muster => Box::new(timetable(outline, plan, rule)?),
    })
}

/// The plan's groups, and what it sends before the first of them.
fn timetable(outline: &Outline, plan: &Plan, rule: Rule) -> Result<Timetable, SimulateError> {
    let vms = outline.vms.len();
    let named = |name: &String| {
        let vm = outline.vms.iter().position(|vm| vm.name == *name);
        let planned = plan.vms.iter().find(|vm| vm.name == *name);
        vm.zip(planned)
    };
    let first_s = plan.groups.first().map_or(0.0, |group| group.start_s);
    let groups = plan.groups.iter().map(|group| {
        let members = group.vms.iter().filter_map(named);
        members
            .map(|(vm, planned)| (vm, steps(planned, group.start_s, group.duration_s)))
            .collect::<GroupTimetable>()
    });
    let before = outline.vms.iter().map(|vm| {
        let planned = plan.vms.iter().find(|planned| planned.name == vm.name);
        let first = planned.and_then(|planned| planned.bandwidth.first());
        first.map_or(0.0, |&(at_s, rate)| if at_s < first_s { rate } else { 0.0 })
    });
    let timetable = Timetable::new(groups.collect(), vms, rule)?;
    Ok(if first_s > 0.0 {
        timetable.after(before.collect(), first_s)
    } else {
        timetable
    })
}

/// A VM's rates from its group's start on. A group that is not through when it was to be shares all
/// there is.
fn steps(vm: &PlannedVm, start_s: f64, duration_s: f64) -> Vec<(f64, f64)> {
    let mut steps: Vec<(f64, f64)> = Vec::new();
    for &(at_s, rate) in &vm.bandwidth {
        let at_s = at_s - start_s;
        if at_s <= 0.0 {
            steps.clear();
        }
        steps.push((at_s.max(0.0), rate));
    }
    steps.push((duration_s, f64::INFINITY));
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_begins_where_it_is() {
        let phase = |duration_s| Phase {
            duration_s,
            dirtying: Dirtying::NONE,
        };
        let lengths = |at_s| -> Vec<f64> {
            let phases = begun(vec![phase(30.0), phase(10.0)], at_s);
            phases.iter().map(|phase| phase.duration_s).collect()
        };
        assert_eq!(lengths(0.0), [30.0, 10.0]);
        assert_eq!(lengths(12.0), [18.0, 10.0, 12.0]);
        assert_eq!(lengths(30.0), [10.0, 30.0]);
        assert_eq!(lengths(75.0), [5.0, 30.0, 5.0]);
    }

    #[test]
    fn a_working_set_is_rewritten_as_said() {
        let rewriting = Rewriting {
            hot_share: 0.1,
            hot_s: 0.2,
            cold_s: 60.0,
        };
        let Ok(Dirtying::Curve(curve)) = rewriting.curve(1000.0, 2.0) else {
            panic!("a curve");
        };
        let dirtying = Dirtying::Curve(curve);
        let expected = 100.0 + 900.0 * (1.0 - (-1.0_f64).exp());
        assert!((dirtying.dirtied(30.0) - expected).abs() < 0.1);
        assert!(dirtying.dirtied(1e4) <= 1000.0);
        let steepest = 1000.0 * 2.0 * (0.1 / 0.2 + 0.9 / 60.0);
        assert!((dirtying.max_rate_bytes_per_s() / steepest - 1.0).abs() < 0.1);
    }
}
