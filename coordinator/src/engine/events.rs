//! What events and reports mean to the group: facts are noted here, and acted upon in `advance`.

use std::time::Duration;

use sidecar::protocol::event::{Envelope, Event};
use sidecar::protocol::types::{Decision, Phase, Role, VmReport};

use super::Step;
use super::group::{GroupRun, Stage};
use super::halves::End;
use crate::application::HostId;

impl GroupRun {
    pub(super) fn apply(&mut self, now: Duration, host: HostId, envelope: &Envelope) {
        let at_us = envelope.at_us;
        match &envelope.event {
            Event::Status { vms } | Event::RunEnded { vms } => {
                for report in vms {
                    self.absorb(now, host, at_us, report, false);
                }
            }
            Event::CoordinatorLost { error } => {
                let name = self.host_name(host);
                self.notice(format!(
                    "{name} had not heard from the coordinator: {error}"
                ));
            }
            Event::InDoubt { error } => {
                self.step(Step::InDoubt {
                    reason: error.clone(),
                });
            }
            Event::Decided { decision } => self.learn(now, *decision),
            Event::Prepared { vm, role, .. }
            | Event::Arrived { vm, role }
            | Event::Committed { vm, role, .. }
            | Event::RolledBack { vm, role, .. }
            | Event::Failed { vm, role, .. } => {
                if let Some(index) = self.index_at(vm, *role, host) {
                    self.half_event(now, index, *role, at_us, &envelope.event);
                }
            }
            Event::Round { vm, .. }
            | Event::Held { vm, .. }
            | Event::Armed { vm, .. }
            | Event::Stopped { vm, .. }
            | Event::Switching { vm }
            | Event::DisksCopied { vm, .. }
            | Event::Throttled { vm, .. } => {
                if let Some(index) = self.index_at(vm, Role::Source, host) {
                    self.source_event(now, index, at_us, &envelope.event);
                }
            }
            Event::Diverged { vm, side, reason } => {
                let found = [Role::Source, Role::Destination]
                    .into_iter()
                    .find_map(|role| self.index_at(vm, role, host));
                if let Some(index) = found {
                    self.vms[index].diverged = Some(*side);
                    self.notice(format!("{vm} ended apart from its group: {reason}"));
                }
            }
        }
    }

    /// The VM of this name whose half of this role is on `host`.
    pub(super) fn index_at(&self, name: &str, role: Role, host: HostId) -> Option<usize> {
        self.vms.iter().position(|vm| {
            let here = match role {
                Role::Source => vm.member.from,
                Role::Destination => vm.member.to,
            };
            vm.member.name == name && here == host
        })
    }

    fn half_event(&mut self, now: Duration, index: usize, role: Role, at_us: i64, event: &Event) {
        let vm = &mut self.vms[index];
        if vm.half(role).end.is_some() {
            return;
        }
        match event {
            Event::Prepared {
                stream,
                memory_bytes,
                qemu_build,
                ..
            } => {
                vm.half(role).prepared = true;
                vm.half(role).phase.get_or_insert(Phase::Prepared);
                match role {
                    Role::Source => {
                        vm.memory_bytes = vm.memory_bytes.max(*memory_bytes);
                        vm.qemu_build = *qemu_build;
                    }
                    Role::Destination => {
                        vm.destination_memory_bytes = *memory_bytes;
                        vm.stream.clone_from(stream);
                    }
                }
                self.compare_memory(now, index);
            }
            Event::Arrived { .. } => {
                vm.half(role).arrived = true;
                match role {
                    Role::Source => vm.enter(Phase::Arrived, at_us),
                    Role::Destination => vm.destination.phase = Some(Phase::Arrived),
                }
                self.past_return = true;
            }
            Event::Committed { resumed_at_us, .. } => {
                vm.half(role).end = Some(End::Committed);
                vm.half(role).phase = Some(Phase::Committed);
                if role == Role::Destination {
                    vm.resumed_at_us = resumed_at_us.or(vm.resumed_at_us);
                }
                self.learn(now, Decision::Commit);
            }
            Event::RolledBack { reason, .. } => {
                vm.half(role).end = Some(End::RolledBack);
                vm.half(role).phase = Some(Phase::RolledBack);
                let text = reason
                    .clone()
                    .unwrap_or_else(|| "it was rolled back".into());
                self.half_broke(now, index, role, text, true);
            }
            Event::Failed {
                error,
                lost,
                secondary,
                ..
            } => {
                vm.error.get_or_insert_with(|| error.clone());
                if *lost && role == Role::Source && vm.source.arrived {
                    // The other copy is whole, and the last one: there is no way but forward.
                    vm.source.end = Some(End::Lost);
                    let name = vm.member.name.clone();
                    self.notice(format!(
                        "{name}: {error}; its copy at the destination is whole"
                    ));
                    return;
                }
                vm.half(role).failed = true;
                if *lost {
                    vm.half(role).end = Some(End::Lost);
                    vm.half(role).phase = Some(Phase::Failed);
                }
                self.half_broke(now, index, role, error.clone(), *secondary);
            }
            _ => {}
        }
    }

    /// QEMU would notice another size only in the stream.
    fn compare_memory(&mut self, now: Duration, index: usize) {
        let vm = &self.vms[index];
        let (source, destination) = (vm.memory_bytes, vm.destination_memory_bytes);
        if source > 0 && destination > 0 && source != destination {
            let text = format!(
                "{} has {} of memory, its QEMU at {} has {}: set `-m` in its template there",
                vm.member.name,
                rate_limiter::Bytes(source),
                self.host_name(vm.member.to),
                rate_limiter::Bytes(destination),
            );
            self.fail(now, text);
        }
    }

    fn half_broke(
        &mut self,
        now: Duration,
        index: usize,
        role: Role,
        error: String,
        secondary: bool,
    ) {
        let member = &self.vms[index].member;
        let host = match role {
            Role::Source => member.from,
            Role::Destination => member.to,
        };
        let text = format!("{} at {}: {error}", member.name, self.host_name(host));
        self.fail_for(now, text, secondary);
    }

    fn source_event(&mut self, now: Duration, index: usize, at_us: i64, event: &Event) {
        let vm = &mut self.vms[index];
        if vm.source.end.is_some() {
            return;
        }
        match event {
            Event::DisksCopied {
                remaining_bytes, ..
            } => {
                vm.disks_copied = true;
                vm.disks_left_bytes = *remaining_bytes;
                let vm = vm.member.name.clone();
                self.step(Step::DisksCopied { vm });
            }
            Event::Round { round, .. } => {
                // What the next report will say, if not more.
                if !vm.stopped {
                    vm.remaining_bytes = vm.remaining_bytes.max(round.dirtied_bytes);
                }
                vm.add_round(*round);
            }
            Event::Held {
                reason,
                remaining_bytes,
                dirty_rate_bytes_per_s,
                ..
            } => {
                vm.held = true;
                vm.refused = self.stage == Stage::Stopping;
                vm.hold_reason.get_or_insert(*reason);
                vm.held_at_us.get_or_insert(at_us);
                vm.remaining_bytes = *remaining_bytes;
                vm.dirty_rate_bytes_per_s = *dirty_rate_bytes_per_s;
                vm.enter(Phase::Held, at_us);
            }
            Event::Armed {
                remaining_bytes,
                dirty_rate_bytes_per_s,
                ..
            } => {
                vm.armed = true;
                vm.remaining_bytes = *remaining_bytes;
                vm.dirty_rate_bytes_per_s = *dirty_rate_bytes_per_s;
                vm.enter(Phase::Armed, at_us);
            }
            Event::Stopped {
                remaining_bytes,
                stopped_at_us,
                ..
            } => {
                vm.enter(Phase::Stopped, *stopped_at_us);
                vm.stopped_at_us = Some(*stopped_at_us);
                self.stopped(now, index, *remaining_bytes);
            }
            Event::Switching { .. } => {
                vm.enter(Phase::Switching, at_us);
                self.past_return = true;
            }
            Event::Throttled { percent, .. } => vm.throttle_percent = *percent,
            _ => {}
        }
    }

    fn stopped(&mut self, now: Duration, index: usize, remaining_bytes: u64) {
        let vm = &mut self.vms[index];
        vm.stopped = true;
        vm.remaining_bytes = remaining_bytes;
        vm.remaining_at_release.get_or_insert(remaining_bytes);
        if !self.spec.hold {
            self.past_return = true;
        } else if matches!(
            self.stage,
            Stage::Precopy | Stage::Held { .. } | Stage::Arming | Stage::Armed { .. }
        ) {
            let name = vm.member.name.clone();
            self.past_return = true;
            self.fail(
                now,
                format!("{name} was paused although it was not released"),
            );
        }
    }

    /// Takes over a report: measurements always, states where an event may have been missed.
    /// `missed` says that events were lost (after a reconnect).
    pub(super) fn absorb(
        &mut self,
        now: Duration,
        host: HostId,
        at_us: i64,
        report: &VmReport,
        missed: bool,
    ) {
        let Some(index) = self.index_at(&report.vm, report.role, host) else {
            return;
        };
        if self.vms[index].member.uuid != report.uuid {
            return;
        }
        self.vms[index].measure(at_us, report);
        self.note_balloon(index, report);
        self.next_start = None;
        let role = report.role;
        let vm = report.vm.clone();
        let event = match report.phase {
            Phase::Committed => Event::Committed {
                vm,
                role,
                resumed_at_us: report.resumed_at_us,
            },
            Phase::RolledBack => Event::RolledBack {
                vm,
                role,
                reason: report.error.clone(),
            },
            Phase::Failed => Event::Failed {
                vm,
                role,
                error: report.error.clone().unwrap_or_else(|| "it failed".into()),
                lost: true,
                secondary: false,
            },
            Phase::Arrived | Phase::Committing => Event::Arrived { vm, role },
            _ => {
                if missed {
                    self.absorb_source(now, index, report);
                }
                return;
            }
        };
        if role == Role::Source && missed && !self.vms[index].stopped {
            let remaining = report.remaining_at_release_bytes.unwrap_or(0);
            if matches!(report.phase, Phase::Arrived | Phase::Committing) {
                self.vms[index].stopped = true;
                self.vms[index].remaining_bytes = remaining;
            }
        }
        self.half_event(now, index, role, at_us, &event);
    }

    fn absorb_source(&mut self, now: Duration, index: usize, report: &VmReport) {
        let vm = &mut self.vms[index];
        let prepared = report.phase != Phase::Preparing && report.phase != Phase::RollingBack;
        if report.role == Role::Destination {
            // Without PREPARED the stream's address is unknown, so it stays unprepared.
            vm.destination.prepared |= prepared && vm.stream.is_some();
            return;
        }
        vm.source.prepared |= prepared;
        match report.phase {
            Phase::Held => vm.held = true,
            Phase::Armed => {
                vm.held = true;
                vm.armed = self.stage == Stage::Arming;
            }
            Phase::Stopped | Phase::Switching if !vm.stopped => {
                vm.held = true;
                self.past_return |= report.phase == Phase::Switching;
                let remaining = report.remaining_at_release_bytes;
                self.stopped(now, index, remaining.unwrap_or(report.remaining_bytes));
            }
            _ => {}
        }
    }
}
