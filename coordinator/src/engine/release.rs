//! Arming, weighing, releasing: when a held group switches over, and what if it never fits.

use std::time::Duration;

use sidecar::protocol::command::{Command, ReportIntervalArgs};
use sidecar::protocol::types::QemuBuild;

use super::Step;
use super::advance::{ms, switch_within};
use super::group::{GroupRun, Stage};
use super::halves::VmRun;
use super::throttle::SETTLES;
use crate::application::OnNonConvergence;

pub(super) const ARM_WITHIN: Duration = Duration::from_secs(3);
pub(super) const STOP_WITHIN: Duration = Duration::from_secs(5);
/// What a group that is held at its deadline is given to be released.
pub(super) const LATE_RELEASE: Duration = Duration::from_secs(10);
const REPORT_WHILE_ARMED_MS: u64 = 25;
/// Longer than two reports take: what looks unchanged has not been looked at again.
const WEIGH_INTERVAL: Duration = Duration::from_millis(50);
/// What a VM sends in stop-and-copy beside its memory: the state of its devices, and its description.
/// It counts in the shares, or a VM without a dirty page would get nothing for it.
const STATE_BYTES: u64 = 256 << 10;
/// A group that has just been held is armed after this time at the latest.
const DRAIN_WITHIN: Duration = Duration::from_millis(600);
/// An armed QEMU that is not patched spins: not longer than this at a time.
pub(super) const ARMED_AT_MOST: Duration = Duration::from_secs(1);

impl GroupRun {
    pub(super) fn report_every(&mut self, now: Duration, interval_ms: u64) {
        let args = self.args();
        for host in self.sources() {
            let interval = ReportIntervalArgs {
                run: args.run,
                epoch: args.epoch,
                interval_ms,
            };
            self.send(now, host, Command::SetReportInterval(interval));
        }
    }

    /// All are held: what a VM has left from its last round is sent in the paced hold first. An
    /// armed QEMU that has nothing left to send spins, and its guest, and others, pay for it.
    pub(super) fn drain(&mut self, now: Duration) {
        if self.has_drained() || self.is_horizon_over(now) {
            self.arm(now);
            return;
        }
        self.report_every(now, REPORT_WHILE_ARMED_MS);
        self.stage = Stage::Held {
            retry_at: now + DRAIN_WITHIN,
        };
        self.stage_deadline = self.release_deadline();
    }

    /// Before the first arming: whether little is left to send. A patched QEMU does not spin when it is
    /// armed, and shows best then whether what is left still falls: it is enough that it fits.
    pub(super) fn has_drained(&self) -> bool {
        let is_patched = |vm: &VmRun| vm.qemu_build == QemuBuild::Patched;
        let limit = self.spec.limits.max_downtime;
        let enough = match self.vms.iter().all(is_patched) {
            true => limit,
            false => limit / 4,
        };
        self.arm_attempts == 0 && self.predict() <= enough
    }

    pub(super) fn arm(&mut self, now: Duration) {
        let limits = self.spec.limits;
        let predicted = self.predict();
        let may_force = limits.on_non_convergence == OnNonConvergence::Force && !self.forced;
        if may_force && predicted > limits.max_downtime && self.is_horizon_over(now) {
            self.does_not_converge(now, predicted);
        }
        for vm in &mut self.vms {
            vm.armed = false;
        }
        self.best = None;
        self.weighed = None;
        self.arm_attempts += 1;
        self.stage = Stage::Arming;
        self.stage_deadline = Some(now + ARM_WITHIN);
        let args = self.args();
        for host in self.sources() {
            self.send(now, host, Command::Arm(args));
        }
        self.ask_presence(now);
        self.report_every(now, REPORT_WHILE_ARMED_MS);
    }

    /// Σ remaining / bandwidth, over every cut.
    pub(super) fn predict(&self) -> Duration {
        let remaining: Vec<u64> = self.vms.iter().map(|vm| vm.remaining_bytes).collect();
        self.spec.capacity.downtime(&remaining)
    }

    /// Armed: releases if it fits, waits for a better moment, or goes back to the paced hold.
    pub(super) fn weigh(&mut self, now: Duration) {
        let Stage::Armed { since } = self.stage else {
            return;
        };
        let predicted = self.predict();
        let best = self.best.map_or(predicted, |best| best.min(predicted));
        self.best = Some(best);
        let limits = self.spec.limits;
        let last_chance = now >= since + ARMED_AT_MOST;
        let good_moment = last_chance || predicted.as_secs_f64() <= best.as_secs_f64() * 1.05;
        let forced = self.forced && predicted <= limits.hard_downtime && good_moment;
        let may = forced || predicted <= limits.max_downtime;
        if may && !self.still_falls(now, since, predicted) && self.all_present() {
            self.release(now, predicted);
        } else if last_chance {
            self.disarm(now, best);
        }
    }

    /// Whether waiting a little longer, at full speed, still shortens the downtime: compared with
    /// the last moment, up to half of the time that the group may stay armed.
    fn still_falls(&mut self, now: Duration, since: Duration, predicted: Duration) -> bool {
        let is_little = predicted <= self.spec.limits.max_downtime / 20;
        // A patched QEMU does not send what it holds in vain, unless that has come to fit.
        let rests = |vm: &VmRun| vm.qemu_build == QemuBuild::Patched && vm.is_held_in_vain();
        let all_rest = predicted > self.spec.limits.max_downtime && self.vms.iter().all(rests);
        if is_little || all_rest || now >= since + ARMED_AT_MOST / 2 {
            return false;
        }
        match self.weighed {
            Some((at, _)) if now < at + WEIGH_INTERVAL => true,
            before => {
                self.weighed = Some((now, predicted));
                before
                    .is_none_or(|(_, before)| predicted.as_secs_f64() < 0.9 * before.as_secs_f64())
            }
        }
    }

    fn disarm(&mut self, now: Duration, best: Duration) {
        let args = self.args();
        for host in self.sources() {
            self.send(now, host, Command::Disarm(args));
        }
        self.report_every(now, ms(self.spec.limits.report_interval));
        self.step(Step::Disarmed { best });
        self.try_again(now, best);
    }

    /// Back in the hold: armed again after a while, unless that has gone on for too long.
    fn try_again(&mut self, now: Duration, best: Duration) {
        let back_off = Duration::from_millis(500) * 2_u32.pow(self.arm_attempts.clamp(1, 4) - 1);
        self.stage = Stage::Held {
            retry_at: now + back_off,
        };
        self.stage_deadline = self.release_deadline();
        if self.is_horizon_over(now) {
            self.does_not_converge(now, best);
        }
    }

    fn is_horizon_over(&self, now: Duration) -> bool {
        let since = self.all_held_at.unwrap_or(now);
        now >= since.saturating_add(self.spec.limits.horizon)
    }

    /// The horizon is over and the group has not fitted `max-downtime`.
    fn does_not_converge(&mut self, now: Duration, best: Duration) {
        self.all_held_at = Some(now);
        let limits = self.spec.limits;
        let text = format!(
            "the switchover would take {} ms at best, max-downtime is {} ms",
            best.as_millis(),
            limits.max_downtime.as_millis()
        );
        match limits.on_non_convergence {
            OnNonConvergence::Abort => {
                self.fail(now, format!("{text}; on-non-convergence = abort"));
            }
            OnNonConvergence::Throttle if self.throttle_held(now) => {
                // The next step follows after one attempt that had time to settle.
                self.all_held_at = Some((now + SETTLES).saturating_sub(limits.horizon));
                self.stage = Stage::Held {
                    retry_at: now + SETTLES,
                };
            }
            _ if self.forced => {
                let hard = limits.hard_downtime.as_millis();
                self.fail(now, format!("{text}, the hard limit is {hard} ms"));
            }
            _ => {
                self.forced = true;
                self.notice(format!("{text}: it will be released within the hard limit"));
            }
        }
    }

    fn release(&mut self, now: Duration, predicted: Duration) {
        self.stage = Stage::Stopping;
        self.stage_deadline = Some(now + STOP_WITHIN);
        let args = self.args();
        for host in self.sources() {
            self.send(now, host, Command::Release(args));
        }
        self.ask_presence(now);
        self.step(Step::Released { predicted });
    }

    /// Whether every source can resume from pre-switchover and hold again: patched QEMUs can, where
    /// they hold by themselves.
    fn can_go_back(&self) -> bool {
        let throttles = self.spec.limits.on_non_convergence == OnNonConvergence::Throttle;
        let patched = |vm: &VmRun| vm.qemu_build == QemuBuild::Patched;
        self.spec.hold && !throttles && self.vms.iter().all(patched)
    }

    /// The paused VMs run again, and are held again.
    pub(super) fn go_back(&mut self, now: Duration, predicted: Duration) {
        for vm in &mut self.vms {
            vm.held = vm.refused;
            vm.refused = false;
            vm.armed = false;
            vm.stopped = false;
            vm.stopped_at_us = None;
            vm.remaining_at_release = None;
        }
        self.best = Some(self.best.map_or(predicted, |best| best.max(predicted)));
        self.predicted = None;
        self.stage = Stage::Backing;
        self.stage_deadline = Some(now + STOP_WITHIN);
        let args = self.args();
        for host in self.sources() {
            self.send(now, host, Command::Back(args));
        }
        self.report_every(now, ms(self.spec.limits.report_interval));
        self.step(Step::SentBack { predicted });
    }

    /// Every VM is held again after a `back`.
    pub(super) fn is_back(&mut self, now: Duration) {
        let best = self.best.unwrap_or_default();
        self.try_again(now, best);
    }

    /// Every VM is paused and said what exactly is left: on, or back.
    #[allow(clippy::cast_precision_loss, reason = "a weight")]
    pub(super) fn all_stopped(&mut self, now: Duration) {
        let predicted = self.predict();
        self.predicted = Some(predicted);
        let remaining_bytes = self.vms.iter().map(|vm| vm.remaining_bytes).sum();
        self.step(Step::AllStopped {
            remaining_bytes,
            predicted,
        });
        let limits = self.spec.limits;
        let hard = limits.hard_downtime;
        let may_go_back = self.can_go_back();
        let limit = if may_go_back && !self.forced {
            limits.max_downtime
        } else {
            hard
        };
        if may_go_back && predicted > limit {
            self.go_back(now, predicted);
            return;
        }
        if predicted > hard {
            let text = format!(
                "what is left of the paused VMs would take {} ms, the hard limit is {} ms",
                predicted.as_millis(),
                hard.as_millis()
            );
            self.fail(now, text);
            return;
        }
        let weights: Vec<f64> = self
            .vms
            .iter()
            .map(|vm| vm.remaining_bytes.saturating_add(STATE_BYTES) as f64)
            .collect();
        self.send_shares(now, &weights, true);
        self.stage = Stage::Switching;
        self.stage_deadline = Some(now + switch_within(predicted));
        self.past_return = true;
        let args = self.args();
        for host in self.sources() {
            self.send(now, host, Command::Continue(args));
        }
        self.step(Step::Continued);
    }
}
