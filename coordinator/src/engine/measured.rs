//! What the group's streams achieve, for the estimate of what the paths carry, and what that says.

use std::time::Duration;

use rate_limiter::BytesPerSecond;
use sidecar::protocol::types::Phase;

use super::Step;
use super::group::{GroupRun, Stage};
use super::halves::VmRun;
use crate::capacity::Cut;
use crate::scheduler::paths::{Path, Stream};

/// A VM with less left than it may send in this time will soon have sent all.
const SOON: f64 = 0.2;

impl GroupRun {
    /// Its streams as they were last reported, while nothing is paused yet.
    pub fn streams(&self) -> impl Iterator<Item = Stream> + '_ {
        let is_moving = matches!(
            self.stage,
            Stage::Precopy | Stage::Held { .. } | Stage::Arming | Stage::Armed { .. }
        );
        let shares = self.paced.as_ref().filter(|_| is_moving);
        let shares = shares.map(|(_, shares)| shares.as_slice());
        let vms = self.vms.iter().zip(shares.unwrap_or_default());
        vms.filter(|(vm, _)| vm.started && !vm.stopped)
            .filter_map(|(vm, share)| stream(vm, *share))
    }

    /// The paths that carry less than was told, and what the group may use of each.
    pub fn set_paths(&mut self, now: Duration, narrow: &[(Path, BytesPerSecond)]) {
        let members = |path: Path| {
            let vms = self.vms.iter().enumerate();
            let there = vms.filter(|(_, vm)| (vm.member.from, vm.member.to) == path);
            there.map(|(index, _)| index).collect()
        };
        let found = narrow.iter().map(|&(path, rate)| Cut {
            rate,
            members: members(path),
        });
        let found = found.filter(|cut: &Cut| !cut.members.is_empty());
        let cuts: Vec<Cut> = self.known_cuts.iter().cloned().chain(found).collect();
        if cuts == self.spec.capacity.cuts {
            return;
        }
        self.spec.capacity.cuts = cuts;
        if self.stage == Stage::Precopy {
            self.paced = None;
            self.pace(now);
        }
    }

    /// Tells of something that concerns the whole move.
    pub fn announce(&mut self, step: Step) {
        self.step(step);
    }
}

#[allow(clippy::cast_precision_loss, reason = "sizes below 2^53")]
fn stream(vm: &VmRun, share: f64) -> Option<Stream> {
    Some(Stream {
        vm: vm.member.vm,
        path: (vm.member.from, vm.member.to),
        at_us: vm.reported_at_us?,
        sent_bytes: vm.reported_bytes,
        waited_ms: vm.link_wait_ms,
        share,
        copies: vm.source.phase == Some(Phase::Precopy)
            && !vm.parked
            && !vm.held
            && vm.remaining_bytes as f64 > share * SOON,
    })
}
