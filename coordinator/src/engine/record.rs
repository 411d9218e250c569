//! What the report takes from a group.

use sidecar::protocol::types::Phase;

use super::group::GroupRun;
use super::halves::VmRun;
use crate::application::{HostId, VmId};
use crate::report::{GroupMove, Outcome, VmMove};

impl GroupRun {
    /// The group's entry in the report.
    #[must_use]
    pub fn group_move(&self) -> GroupMove {
        GroupMove {
            run: self.spec.run,
            vms: self.vms.iter().map(|vm| vm.member.name.clone()).collect(),
            result: self.outcome.unwrap_or(Outcome::NeedsAttention),
            bandwidth_bytes_per_s: self.spec.capacity.rate(self.vms.len()).0,
            predicted_downtime_s: self.predicted.map(|d| d.as_secs_f64()),
        }
    }

    /// The entries of its VMs.
    #[must_use]
    pub fn vm_moves(&self, host_name: impl Fn(HostId) -> String) -> Vec<(VmId, VmMove)> {
        let entry = |vm: &VmRun| (vm.member.vm, vm_move(vm, &host_name));
        self.vms.iter().map(entry).collect()
    }

    /// What a person should know about it.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }
}

#[allow(clippy::cast_precision_loss, reason = "microseconds of one move")]
fn seconds(from_us: i64, to_us: i64) -> f64 {
    to_us.saturating_sub(from_us) as f64 / 1e6
}

fn vm_move(vm: &VmRun, host_name: &impl Fn(HostId) -> String) -> VmMove {
    let released_at_us = vm.stopped_at_us.or_else(|| {
        let after = vm.history.iter().find(|entry| {
            !matches!(
                entry.phase,
                Phase::Preparing | Phase::Prepared | Phase::Precopy | Phase::Held | Phase::Armed
            )
        });
        after.map(|entry| entry.at_us)
    });
    let held_s = match (vm.held_at_us, released_at_us) {
        (Some(held), Some(released)) => seconds(held, released).max(0.0),
        _ => 0.0,
    };
    let downtime_s = match (vm.stopped_at_us, vm.resumed_at_us) {
        (Some(stopped), Some(resumed)) => Some(seconds(stopped, resumed)),
        _ => None,
    };
    VmMove {
        name: vm.member.name.clone(),
        from: host_name(vm.member.from),
        to: host_name(vm.member.to),
        side: vm.side(),
        memory_bytes: vm.memory_bytes,
        transport: vm.member.transport,
        qemu_build: vm.qemu_build,
        hold_reason: vm.hold_reason,
        held_s,
        rounds: vm.rounds.clone(),
        sent_bytes: vm.transferred_bytes,
        remaining_at_release_bytes: vm.remaining_at_release,
        downtime_s,
        stopped_at_us: vm.stopped_at_us,
        resumed_at_us: vm.resumed_at_us,
        history: vm.history.clone(),
        samples: vm.samples.clone(),
        balloon: vm.balloon,
        free_page_hint: vm.free_page_hint,
        error: vm.error.clone(),
    }
}
