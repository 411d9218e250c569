//! What a plan is made from.

use std::fmt;

use crate::application::{HostId, Outline, OutlineVm};
use crate::scheduler::bandwidth;
use crate::scheduler::group::replicas::{Tiers, TiersError};
use crate::scheduler::impact::Traffic;
use crate::scheduler::schedule::{Cut, Limits, Load};

use super::HELD_SYNC_S;

/// Which part of a migration is planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Stage {
    /// All of it.
    #[default]
    Whole,
    /// What is left after the bulk copy: the `dirty-set` of each VM (COMMA 3.2.2).
    Two,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Whole => "whole",
            Self::Two => "two",
        })
    }
}

/// The file does not say enough for a plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", problems.join("\n"))]
pub struct MissingError {
    /// What is missing, VM by VM.
    pub problems: Vec<String>,
}

/// What a plan is made from; every quantity is finite, bytes or bytes per second.
#[derive(Debug, Clone)]
pub struct Inputs {
    pub(super) stage: Stage,
    pub(super) vms: Vec<InputVm>,
    pub(super) limits: Limits,
    pub(super) traffic: Traffic,
    pub(super) tiers: Option<Tiers>,
    /// When pre-copy ends without having converged.
    pub(super) rules: bandwidth::Limits,
    /// A VM may stand still for so long at the end, in seconds.
    pub(super) stop_s: f64,
    /// A group is to be released within this time, in seconds.
    pub(super) deadline_s: Option<f64>,
    /// Whether vCPUs may be slowed.
    pub(super) may_throttle: bool,
}

#[derive(Debug, Clone)]
pub(super) struct InputVm {
    pub(super) name: String,
    /// What is to be sent in the stage that is planned.
    pub(super) load: Load,
    /// What is sent at most, whatever is dirtied (VMbuddies 3.3, Eq. 7).
    pub(super) cap: f64,
    pub(super) working_set: Option<f64>,
    /// What the file says is left after the bulk copy.
    pub(super) dirty_set: Option<f64>,
    /// How much its vCPUs may be slowed at most, in percent.
    pub(super) max_throttle: u8,
}

#[allow(clippy::cast_precision_loss, reason = "sizes and rates below 2^60")]
fn float(value: u64) -> f64 {
    value as f64
}

impl Inputs {
    /// What `outline` says.
    ///
    /// # Errors
    /// It does not say enough: what is missing is named, VM by VM.
    pub fn new(outline: &Outline, stage: Stage) -> Result<Self, MissingError> {
        let mut problems = Vec::new();
        let rules = bandwidth::Limits::of(&outline.termination);
        let vms = outline.vms.iter();
        let throttle = outline.throttle.unwrap_or(0);
        let vms = vms.filter_map(|vm| input(vm, &rules, stage, throttle, &mut problems));
        let vms: Vec<InputVm> = vms.collect();
        let tiers = outline.replica_groups.then(|| {
            let names = outline.vms.iter().map(|vm| vm.tier.as_deref());
            Tiers::new(names)
        });
        let tiers = tiers.transpose().unwrap_or_else(|error| {
            problems.push(match error {
                TiersError::None { vm } => format!(
                    "VM {}: `tier` is missing, and replica-groups needs it",
                    outline.vms[vm].name
                ),
                single @ TiersError::Single { .. } => single.to_string(),
            });
            None
        });
        let bandwidth = outline.allowance.usable();
        if bandwidth.is_none() {
            problems.push(match outline.allowance.bandwidth {
                Some(found) => format!("`reserve` leaves nothing of the bandwidth, {found}"),
                None => "`bandwidth` is missing".into(),
            });
        }
        let Some(bandwidth) = bandwidth.filter(|_| problems.is_empty()) else {
            return Err(MissingError { problems });
        };
        let pairs = outline.traffic.iter().map(|traffic| {
            let [a, b] = traffic.between;
            (a.0, b.0, float(traffic.rate.0))
        });
        Ok(Self {
            stage,
            limits: limits(outline, float(bandwidth.0)),
            traffic: Traffic::between(vms.len(), pairs),
            vms,
            tiers,
            rules,
            stop_s: outline.max_downtime.as_secs_f64(),
            deadline_s: outline.deadline.map(|limit| limit.as_secs_f64()),
            may_throttle: outline.throttle.is_some(),
        })
    }

    /// The same with every VM's vCPUs slowed by so many percent, or as much as it bears: it dirties that
    /// much less in a second.
    pub(super) fn slowed(&self, percent: u8) -> Self {
        let mut slowed = self.clone();
        for vm in &mut slowed.vms {
            let part = 1.0 - f64::from(percent.min(vm.max_throttle)) / 100.0;
            vm.load.dirty_rate *= part;
            vm.load.max_dirty_rate *= part;
        }
        slowed
    }

    /// What is left of a VM when it stops at this rate, in bytes: what it dirties in
    /// [`HELD_SYNC_S`], or most of its working set where the rate does not keep up with it.
    pub(super) fn left_at_stop(&self, vm: usize, rate: f64) -> f64 {
        let vm = &self.vms[vm];
        let all = vm.working_set.unwrap_or(f64::INFINITY);
        if rate < vm.load.dirty_rate && all.is_finite() {
            return self.rules.resent_share * all;
        }
        (vm.load.dirty_rate * HELD_SYNC_S).min(all)
    }

    /// What the VMs say to each other.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// What limits the VMs.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The VMs' loads.
    #[must_use]
    pub fn loads(&self) -> Vec<Load> {
        self.vms.iter().map(|vm| vm.load).collect()
    }
}

fn input(
    vm: &OutlineVm,
    rules: &bandwidth::Limits,
    stage: Stage,
    throttle: u8,
    problems: &mut Vec<String>,
) -> Option<InputVm> {
    let known = &vm.profile;
    let name = &vm.name;
    let (mean, most) = match (known.dirty_rate, known.max_dirty_rate) {
        (Some(mean), Some(most)) => (float(mean.0), float(most.0)),
        // Pacer takes the mean dirty rate to be half of the highest.
        (Some(mean), None) => (float(mean.0), 2.0 * float(mean.0)),
        (None, Some(most)) => (float(most.0) / 2.0, float(most.0)),
        (None, None) => {
            problems.push(format!(
                "VM {name}: give `dirty-rate` or `max-dirty-rate` (better both)"
            ));
            return None;
        }
    };
    let working_set = known.writable_working_set.map(|size| float(size.0));
    let dirty_set = known.dirty_set.map(|size| float(size.0));
    let (left_bytes, cap) = match stage {
        Stage::Two => match dirty_set {
            Some(size) => (size, f64::INFINITY),
            None => {
                problems.push(format!("VM {name}: stage two needs `dirty-set`"));
                return None;
            }
        },
        Stage::Whole => match known.memory {
            Some(memory) => {
                let size = float(memory.0) + known.disk.map_or(0.0, |disk| float(disk.0));
                (
                    size,
                    working_set.map_or(f64::INFINITY, |set| cap(rules, size, set)),
                )
            }
            None => {
                problems.push(format!("VM {name}: `memory` is missing"));
                return None;
            }
        },
    };
    Some(InputVm {
        name: name.clone(),
        load: Load {
            left_bytes,
            max_dirty_rate: most,
            dirty_rate: mean,
        },
        cap,
        working_set,
        dirty_set,
        max_throttle: vm.max_throttle.unwrap_or(throttle),
    })
}

/// C = min(M + N·α·W, β·M + W) (VMbuddies 3.3.1, Eq. 7).
fn cap(rules: &bandwidth::Limits, memory: f64, working_set: f64) -> f64 {
    let rounds = f64::from(rules.max_rounds);
    let by_rounds = memory + rounds * rules.resent_share * working_set;
    by_rounds.min(rules.traffic_factor * memory + working_set)
}

/// The bandwidth, and every link, interface and disk that a VM passes.
fn limits(outline: &Outline, bandwidth: f64) -> Limits {
    let cut = |rate: u64, crosses: &dyn Fn(&OutlineVm) -> bool| Cut {
        rate: float(rate),
        crossed_by: outline.vms.iter().map(crosses).collect(),
    };
    let mut cuts = Vec::new();
    for link in &outline.links {
        let [a, b] = link.between;
        for (x, y) in [(a, b), (b, a)] {
            let crosses = |vm: &OutlineVm| vm.from == Some(x) && vm.to == Some(y);
            cuts.push(cut(outline.allowance.usable_of(link.rate).0, &crosses));
        }
    }
    for (index, host) in outline.hosts.iter().enumerate() {
        let here = Some(HostId(index));
        if let Some(rate) = host.nic.map(|rate| outline.allowance.usable_of(rate)) {
            cuts.push(cut(rate.0, &|vm| vm.from == here));
            cuts.push(cut(rate.0, &|vm| vm.to == here));
        }
        if let Some(rate) = host.disk {
            let on_disk = |vm: &OutlineVm| vm.profile.disk.is_some_and(|disk| disk.0 > 0);
            cuts.push(cut(rate.0, &|vm| on_disk(vm) && vm.from == here));
            cuts.push(cut(rate.0, &|vm| on_disk(vm) && vm.to == here));
        }
    }
    // One that never binds says nothing.
    cuts.retain(|cut| cut.rate < bandwidth && cut.crossed_by.contains(&true));
    Limits { bandwidth, cuts }
}
