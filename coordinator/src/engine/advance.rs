//! From `prepare` to the arrival: what is sent when, and what a deadline means in each stage.

use std::time::Duration;

use sidecar::protocol::command::{Command, PrepareArgs, PrepareVm, VmArgs};
use sidecar::protocol::types::Role;

use super::group::{GroupRun, Stage};
use super::release::{ARM_WITHIN, LATE_RELEASE, STOP_WITHIN};
use super::stages::Part;
use super::{GroupSpec, Step};
use crate::application::{HostId, OnNonConvergence};

const PREPARE_WITHIN: Duration = Duration::from_secs(20);

pub(super) fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl GroupRun {
    /// Begins: both sides are prepared at once.
    pub fn begin(&mut self, now: Duration) {
        if self.stage != Stage::New {
            return;
        }
        self.begun_at = now;
        self.stage = Stage::Preparing;
        self.stage_deadline = Some(now + PREPARE_WITHIN);
        for host in self.hosts.values_mut() {
            host.heard(now);
        }
        self.step(Step::Preparing);
        for (role, hosts) in [
            (Role::Destination, self.destinations()),
            (Role::Source, self.sources()),
        ] {
            for host in hosts {
                let command = Command::Prepare(prepare(&self.spec, role, host));
                self.send(now, host, command);
            }
        }
        self.check_hosts(now);
    }

    /// Goes as far as what is known allows.
    pub(super) fn advance(&mut self, now: Duration) {
        self.look_at_disks(now);
        match self.stage {
            Stage::Preparing
                if self
                    .vms
                    .iter()
                    .all(|vm| vm.source.prepared && vm.destination.prepared) =>
            {
                self.start(now);
            }
            Stage::Precopy => self.advance_precopy(now),
            Stage::Held { retry_at } if now >= retry_at || self.has_drained() => self.arm(now),
            Stage::Arming if self.vms.iter().all(|vm| vm.armed) => {
                self.stage = Stage::Armed { since: now };
                self.stage_deadline = self.release_deadline();
                let predicted = self.predict();
                self.step(Step::Armed { predicted });
                self.weigh(now);
            }
            Stage::Armed { .. } => self.weigh(now),
            Stage::Stopping if self.vms.iter().all(|vm| vm.stopped) && self.register_present() => {
                self.all_stopped(now);
            }
            Stage::Stopping
                if self.vms.iter().any(|vm| vm.refused)
                    && self.vms.iter().all(|vm| vm.stopped || vm.refused) =>
            {
                let predicted = self.predict();
                self.go_back(now, predicted);
            }
            Stage::Backing if self.vms.iter().all(|vm| vm.held) => self.is_back(now),
            Stage::Switching if self.vms.iter().all(super::halves::VmRun::arrived) => {
                self.propose_commit(now);
            }
            Stage::Committing | Stage::RollingBack => self.advance_settling(now),
            _ => {}
        }
    }

    fn advance_precopy(&mut self, now: Duration) {
        self.look_at_throttles(now);
        if self.spec.hold {
            if self.may_gather(now) && self.vms.iter().all(|vm| vm.held) {
                self.all_held_at = Some(now);
                self.step(Step::AllHeld);
                self.pace(now);
                self.drain(now);
            } else {
                self.pace(now);
            }
            return;
        }
        if self.vms.iter().all(super::halves::VmRun::arrived) {
            self.stage = Stage::Switching;
            self.propose_commit(now);
        } else if self.predicted.is_none() && self.vms.iter().all(|vm| vm.stopped) {
            let predicted = self.predict();
            self.predicted = Some(predicted);
            self.stage_deadline = Some(now + switch_within(predicted));
            let remaining_bytes = self.vms.iter().map(|vm| vm.remaining_bytes).sum();
            self.step(Step::AllStopped {
                remaining_bytes,
                predicted,
            });
        }
    }

    fn start(&mut self, now: Duration) {
        self.step(Step::Prepared);
        self.stage = Stage::Precopy;
        self.stage_deadline = self.release_deadline();
        self.pace(now);
        self.step(Step::Started);
    }

    /// Until when the group must be released.
    pub(super) fn release_deadline(&self) -> Option<Duration> {
        let whole = |vm: &super::halves::VmRun| {
            let disks = vm.member.disks.iter().map(|disk| disk.size_bytes);
            disks.fold(vm.memory_bytes, u64::saturating_add)
        };
        let all = self.vms.iter().map(whole).fold(0, u64::saturating_add);
        let once = self
            .spec
            .capacity
            .rate(self.vms.len())
            .time_for(rate_limiter::Bytes(all));
        let generous = Duration::from_secs(60).saturating_add(once.saturating_mul(10));
        let limits = self.spec.limits;
        let limit = limits.deadline.unwrap_or(generous);
        // VMs that were put into the hold at the deadline get their time to be released.
        let limit = limit.saturating_add(if self.hold_sent {
            LATE_RELEASE * 3
        } else {
            Duration::ZERO
        });
        let from = match (limits.deadline, self.turn_at) {
            (None, Some(turn)) => turn,
            _ => self.begun_at + self.waited,
        };
        Some(from.saturating_add(limit))
    }

    /// The stage's deadline has passed.
    pub(super) fn stage_overdue(&mut self, now: Duration) {
        let limits = self.spec.limits;
        match self.stage {
            Stage::Preparing => {
                let missing =
                    self.names_where(|vm| !vm.source.prepared || !vm.destination.prepared);
                self.fail(
                    now,
                    format!("not prepared within {PREPARE_WITHIN:?}: {missing}"),
                );
            }
            Stage::Precopy
                if self.spec.hold
                    && !self.hold_sent
                    && self.part == Part::Turn
                    && self.vms.iter().all(|vm| vm.started)
                    && limits.on_non_convergence != OnNonConvergence::Abort =>
            {
                self.hold_sent = true;
                self.forced = true;
                self.stage_deadline = Some(now + LATE_RELEASE);
                let missing = self.names_where(|vm| !vm.held);
                self.notice(format!("the deadline has come: {missing} is held now"));
                let all: Vec<usize> = (0..self.vms.len()).collect();
                self.unpark(now, &all);
                self.paced = None;
                let args = self.args();
                let late: Vec<(HostId, String)> = self
                    .vms
                    .iter()
                    .filter(|vm| !vm.held)
                    .map(|vm| (vm.member.from, vm.member.name.clone()))
                    .collect();
                for (host, vm) in late {
                    let hold = VmArgs {
                        run: args.run,
                        epoch: args.epoch,
                        vm,
                    };
                    self.send(now, host, Command::Hold(hold));
                }
            }
            Stage::Precopy => {
                let text = if self.spec.hold {
                    let missing = self.names_where(|vm| !vm.held);
                    format!("the deadline has passed while {missing} was still in pre-copy")
                } else {
                    let missing = self.names_where(|vm| !vm.arrived());
                    format!("the deadline has passed and {missing} has not arrived")
                };
                self.fail(now, text);
            }
            Stage::Held { .. } | Stage::Armed { .. } => {
                self.fail(
                    now,
                    "the deadline has passed before the group could be released".into(),
                );
            }
            Stage::Arming => {
                let missing = self.names_where(|vm| !vm.armed);
                self.fail(now, format!("not armed within {ARM_WITHIN:?}: {missing}"));
            }
            Stage::Stopping => {
                let missing = self.names_where(|vm| !vm.stopped);
                self.fail(now, format!("not paused within {STOP_WITHIN:?}: {missing}"));
            }
            Stage::Backing => {
                let missing = self.names_where(|vm| !vm.held);
                let text = format!("not held again within {STOP_WITHIN:?}: {missing}");
                self.fail(now, text);
            }
            Stage::Switching => {
                let missing = self.names_where(|vm| !vm.arrived());
                self.fail(now, format!("not arrived in time: {missing}"));
            }
            Stage::Deciding | Stage::Committing | Stage::RollingBack => self.settling_overdue(),
            Stage::New | Stage::Ended => {}
        }
    }

    pub(super) fn names_where(&self, test: impl Fn(&super::halves::VmRun) -> bool) -> String {
        let names: Vec<&str> = self
            .vms
            .iter()
            .filter(|vm| test(vm))
            .map(|vm| vm.member.name.as_str())
            .collect();
        names.join(", ")
    }
}

/// QMP may be silent for 3 D in stop-and-copy; then a little more.
pub(super) fn switch_within(predicted: Duration) -> Duration {
    predicted.saturating_mul(3) + Duration::from_secs(3)
}

fn prepare(spec: &GroupSpec, role: Role, host: HostId) -> PrepareArgs {
    let here = |member: &&super::Member| match role {
        Role::Source => member.from == host,
        Role::Destination => member.to == host,
    };
    let limits = spec.limits;
    PrepareArgs {
        run: spec.run,
        epoch: spec.epoch,
        role,
        register: spec.register_address.clone(),
        lease_ms: ms(limits.lease),
        report_interval_ms: ms(limits.report_interval),
        max_downtime_ms: ms(limits.max_downtime),
        hold: spec.hold,
        resend: !spec.rests,
        throttle: limits.on_non_convergence == OnNonConvergence::Throttle,
        multifd_channels: limits.multifd_channels,
        termination: limits.termination,
        disk_stall_ms: ms(limits.disk_stall),
        vms: spec
            .members
            .iter()
            .filter(here)
            .map(|member| PrepareVm {
                vm: member.name.clone(),
                uuid: member.uuid,
                token: member.token.clone(),
                machine: member.machine.clone(),
                transport: member.transport,
                disks: member.disks.clone(),
                balloon: member.balloon,
            })
            .collect(),
    }
}
