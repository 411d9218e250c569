//! Slowing vCPUs, where `on-non-convergence = "throttle"` allows it, and within what each VM bears.
//!
//! Who is slowed, and for what:
//!
//! - *held*: all VMs are held and what remains does not fit for the horizon. Those that dirty most are
//!   slowed, step by step, until it fits.
//! - *alone*: a VM in pre-copy dirties for the horizon what it could be sent at most, so that it would not
//!   converge even if it had everything for itself.
//! - *deadline*: at the rate at which it goes, the group will not be held before its deadline. Who
//!   dirties most is slowed.
//!
//! A throttle is taken off when its reason is gone: what the VM would dirty without it, by its measured
//! rate, is well below what it can be sent; or the deadline would be met without it; or it is held and
//! others still copy. What is not taken off here ends with the VM at the source: QEMU ends it when a
//! migration fails or is cancelled, and the VM at the destination never had it.

use std::time::Duration;

use sidecar::protocol::command::{Command, ThrottleArgs};

use super::Step;
use super::group::{GroupRun, Stage};
use super::halves::VmRun;
use super::stages::Part;
use crate::application::OnNonConvergence;
use crate::scheduler::plan::THROTTLE_STEPS;
use crate::scheduler::plan::schemes::Sent;
use crate::scheduler::schedule::{Limits, Load};

/// Throttles of QEMU's auto-converge take effect in steps of 3.2 s.
pub(super) const SETTLES: Duration = Duration::from_secs(4);
/// A VM that dirties this part of what it can be sent does not converge alone …
const ALONE: f64 = 0.9;
/// … and needs no throttle where it would dirty less than this part without it.
const NOT_NEEDED: f64 = 0.7;
/// A group has to be too slow for its deadline for so long.
const SLOW_FOR: Duration = Duration::from_secs(3);

/// How a VM is slowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Throttle {
    /// As it was told last, in percent.
    percent: u8,
    /// The most that it ever was.
    most: u8,
    /// When it was told.
    at: Option<Duration>,
    /// Since when it does not converge alone.
    stuck_since: Option<Duration>,
    /// For the deadline.
    is_for_deadline: bool,
}

impl Throttle {
    /// The next step within what is allowed, if there is one. After it was taken off it begins where it
    /// had been.
    fn next(&self, allowed: u8) -> Option<u8> {
        let mut steps = THROTTLE_STEPS.iter().copied();
        let step = steps.find(|step| *step > self.percent && *step >= self.most)?;
        Some(step.min(allowed)).filter(|step| *step > self.percent)
    }

    fn has_settled(&self, now: Duration) -> bool {
        self.at.is_none_or(|at| now >= at + SETTLES)
    }

    /// What would be dirtied without it, where `rate` is with it.
    fn without(&self, rate: f64) -> f64 {
        rate / (1.0 - f64::from(self.percent) / 100.0)
    }
}

impl GroupRun {
    /// Slows the held VMs that dirty at least their share, one step more; false where none may be slowed
    /// further. Who is slowed already stays among them: it dirties less for that very reason.
    pub(super) fn throttle_held(&mut self, now: Duration) -> bool {
        let count = u64::try_from(self.vms.len()).unwrap_or(1);
        let sum: u64 = self.vms.iter().map(|vm| vm.dirty_rate_bytes_per_s).sum();
        let link = self.spec.capacity.rate(self.vms.len()).0;
        let share = if self.vms.iter().any(|vm| vm.throttle_percent > 0) {
            sum.max(link)
        } else {
            sum
        };
        let dirties_most = |vm: &VmRun| {
            vm.throttle_percent > 0 || vm.dirty_rate_bytes_per_s.saturating_mul(count) >= share
        };
        let steps: Vec<(usize, u8)> = (0..self.vms.len())
            .filter(|&index| dirties_most(&self.vms[index]))
            .filter_map(|index| Some((index, self.next_step(index)?)))
            .collect();
        for (index, percent) in &steps {
            self.set_throttle(now, *index, *percent);
        }
        !steps.is_empty()
    }

    fn next_step(&self, index: usize) -> Option<u8> {
        let vm = &self.vms[index];
        vm.throttle.next(vm.member.max_throttle)
    }

    fn set_throttle(&mut self, now: Duration, index: usize, percent: u8) {
        let args = self.args();
        let vm = &mut self.vms[index];
        vm.throttle.percent = percent;
        vm.throttle.most = vm.throttle.most.max(percent);
        vm.throttle.at = Some(now);
        vm.throttle.is_for_deadline &= percent > 0;
        let (host, vm) = (vm.member.from, vm.member.name.clone());
        self.step(Step::Throttled {
            vm: vm.clone(),
            percent,
        });
        let throttle = ThrottleArgs {
            run: args.run,
            epoch: args.epoch,
            vm,
            percent,
        };
        self.send(now, host, Command::Throttle(throttle));
    }

    /// In pre-copy: who has to be slowed, and who no more.
    pub(super) fn look_at_throttles(&mut self, now: Duration) {
        let may = self.spec.limits.on_non_convergence == OnNonConvergence::Throttle;
        if !may || self.stage != Stage::Precopy {
            return;
        }
        let all_held = self.vms.iter().all(|vm| vm.held);
        let limits = Limits::of(&self.spec.capacity, self.vms.len());
        for index in 0..self.vms.len() {
            let percent = self.judge_alone(now, index, limits.alone(index), all_held);
            if let Some(percent) = percent {
                self.set_throttle(now, index, percent);
            }
        }
        self.judge_deadline(now);
    }

    /// The throttle that a VM gets now for itself, where it changes.
    #[allow(clippy::cast_precision_loss, reason = "sizes and rates below 2^53")]
    fn judge_alone(
        &mut self,
        now: Duration,
        index: usize,
        alone: f64,
        all_held: bool,
    ) -> Option<u8> {
        let next = self.next_step(index);
        let limits = self.spec.limits;
        let vm = &mut self.vms[index];
        let is_slowed = vm.throttle.percent > 0;
        let has_company = self.has_company;
        if vm.held || vm.parked || vm.stopped || !vm.started {
            vm.throttle.stuck_since = None;
            return (is_slowed && vm.held && !vm.stopped && !all_held).then_some(0);
        }
        let dirty_rate = vm.dirty_rate_bytes_per_s as f64;
        let fits = vm.remaining_bytes as f64 <= alone * limits.max_downtime.as_secs_f64();
        if vm.round > 1 && !fits && dirty_rate >= ALONE * alone {
            let since = *vm.throttle.stuck_since.get_or_insert(now);
            // Others that are under way leave it their part when they have ended.
            let is_time = !has_company && now >= since.saturating_add(limits.horizon);
            return next.filter(|_| is_time && vm.throttle.has_settled(now));
        }
        vm.throttle.stuck_since = None;
        let is_needed = vm.throttle.without(dirty_rate) >= NOT_NEEDED * alone;
        let may_go = is_slowed && !vm.throttle.is_for_deadline && vm.throttle.has_settled(now);
        (may_go && !is_needed).then_some(0)
    }

    /// Whether the group will be held before its deadline; slows who dirties most where it will not.
    #[allow(clippy::cast_precision_loss, reason = "rates below 2^53")]
    fn judge_deadline(&mut self, now: Duration) {
        if self.part != Part::Turn {
            return;
        }
        let end = self.release_deadline();
        let Some(end) = end.filter(|_| self.spec.limits.deadline.is_some() && !self.hold_sent)
        else {
            return;
        };
        let left = end.saturating_sub(now).as_secs_f64();
        let slowed: Vec<usize> = (0..self.vms.len())
            .filter(|&index| self.vms[index].throttle.is_for_deadline)
            .collect();
        if self.time_to_go(true) <= NOT_NEEDED * left {
            for index in slowed {
                if self.vms[index].throttle.has_settled(now) {
                    self.set_throttle(now, index, 0);
                }
            }
        }
        let to_go = self.time_to_go(false);
        if to_go <= left {
            self.slow_since = None;
            return;
        }
        let since = *self.slow_since.get_or_insert(now);
        let all_settled = self.vms.iter().all(|vm| vm.throttle.has_settled(now));
        if now < since + SLOW_FOR || !all_settled {
            return;
        }
        let copying = (0..self.vms.len()).filter(|&index| is_copying(&self.vms[index]));
        let steps = copying.filter_map(|index| Some((index, self.next_step(index)?)));
        let most = steps.max_by_key(|(index, _)| self.vms[*index].dirty_rate_bytes_per_s);
        match most.filter(|(index, _)| self.vms[*index].dirty_rate_bytes_per_s > 0) {
            Some((index, percent)) => {
                self.vms[index].throttle.is_for_deadline = true;
                self.set_throttle(now, index, percent);
            }
            None if !self.is_late => {
                self.is_late = true;
                let missing = if to_go.is_finite() {
                    format!("about {:.0} s are missing", to_go - left)
                } else {
                    "it does not converge".to_owned()
                };
                self.notice(format!(
                    "the deadline will not be met: {missing}, and no VM may be slowed further"
                ));
            }
            None => {}
        }
    }

    /// In how many seconds all will be held, by what is measured; without throttles, or as it is.
    #[allow(clippy::cast_precision_loss, reason = "sizes and rates below 2^53")]
    fn time_to_go(&self, without_throttles: bool) -> f64 {
        let Some((_, shares)) = &self.paced else {
            return 0.0;
        };
        let copying = self.vms.iter().zip(shares).filter(|(vm, _)| is_copying(vm));
        let each = copying.map(|(vm, share)| {
            let moving = vm.moving();
            let dirty_rate = if without_throttles {
                vm.throttle.without(moving.dirty_rate)
            } else {
                moving.dirty_rate
            };
            let sent = Sent {
                load: Load {
                    left_bytes: moving.left_bytes,
                    max_dirty_rate: moving.max_dirty_rate,
                    dirty_rate,
                },
                cap: f64::INFINITY,
                working_set: moving.working_set,
                stop_s: self.spec.limits.max_downtime.as_secs_f64(),
            };
            sent.time_left(vm.round <= 1, *share)
        });
        let unheld = self.vms.iter().filter(|vm| !vm.held);
        let left: f64 = unheld.map(|vm| vm.moving().left_bytes).sum();
        let all = left / self.spec.capacity.rate(self.vms.len()).0.max(1) as f64;
        each.fold(all, f64::max)
    }
}

fn is_copying(vm: &VmRun) -> bool {
    vm.started && !vm.held && !vm.parked && !vm.stopped
}
