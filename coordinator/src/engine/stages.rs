//! COMMA's two stages (3.2), as one group has them: its disks are copied once, beside those of the
//! other groups; then its VMs are parked until the conductor gives it its turn, in which what was
//! written meanwhile and the memory are sent, and they switch over. Of a VM without local disks the
//! memory is what is copied once.
//!
//! The mirrors of a parked VM are held back by its sidecar, and its memory's migration has not begun.
//! A parked VM without disks is in pre-copy for its QEMU, or held: nothing but its pace keeps it back. Its pages
//! wait to be sent, and those that are dirtied again meanwhile are sent once (3.4).

use std::time::Duration;

use rate_limiter::BytesPerSecond;

use super::Step;
use super::group::{GroupRun, Stage};
use super::halves::VmRun;
use crate::scheduler::allot::{Moving, Progress};

/// A VM that was held while it was parked counts as copying until what it has left falls no more.
/// That has to last so long to be believed, and three reports beside.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where a group of two stages is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Its memory is copied once; then it waits.
    Bulk {
        /// Since when it waits.
        waits_since: Option<Duration>,
    },
    /// It is its turn. So it is from the beginning for a group that has one stage.
    Turn,
}

/// What is left to VMs that were held while they were parked.
#[derive(Debug, Clone, Copy)]
pub(super) struct CatchUp {
    since: Duration,
    /// When less was left than ever, and how much.
    best: Option<(Duration, u64)>,
}

impl GroupRun {
    /// Whether its memory was copied once, or need not be.
    #[must_use]
    pub fn has_copied(&self) -> bool {
        match self.part {
            Part::Bulk { waits_since } => waits_since.is_some(),
            Part::Turn => true,
        }
    }

    /// Whether its turn has not come yet.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        matches!(self.part, Part::Bulk { .. })
    }

    /// Whether it is still on its way to a switchover: not deciding, and not going back.
    #[must_use]
    pub fn is_moving(&self) -> bool {
        !matches!(
            self.stage,
            Stage::Deciding | Stage::Committing | Stage::RollingBack | Stage::Ended
        )
    }

    /// Whether its VMs are being paused, or are, so that it may be committed any moment.
    #[must_use]
    pub fn is_switching(&self) -> bool {
        matches!(
            self.stage,
            Stage::Stopping | Stage::Switching | Stage::Deciding | Stage::Committing
        )
    }

    /// Whether it goes back.
    #[must_use]
    pub fn is_rolling_back(&self) -> bool {
        self.stage == Stage::RollingBack
    }

    /// What the scheduler has to know of its VMs now, in their order.
    #[must_use]
    pub fn moving(&self) -> Vec<Moving> {
        let parked = self.spec.parked.unwrap_or(BytesPerSecond(1));
        let is_bulk = matches!(self.part, Part::Bulk { .. });
        #[allow(clippy::cast_precision_loss, reason = "sizes below 2^53")]
        let of = |vm: &VmRun| {
            let moving = vm.moving();
            let progress = match moving.progress {
                // Its guest's writes do not wait for the others.
                _ if vm.parked && vm.is_write_blocking() => Progress::Parked {
                    bytes_per_s: parked.0.max(vm.disk_rate_bytes_per_s.saturating_mul(2)),
                },
                _ if vm.parked => Progress::Parked {
                    bytes_per_s: parked.0,
                },
                Progress::Held if vm.is_behind => Progress::Copying,
                progress => progress,
            };
            let left_bytes = match is_bulk && vm.has_disks() {
                true => vm.disks_left_bytes as f64,
                false => moving.left_bytes,
            };
            // In stage two disks are sent beside the memory, and written meanwhile.
            let disks = match is_bulk {
                true => 0.0,
                false => vm.disk_rate_bytes_per_s as f64,
            };
            // A working set that is not sent again is dirty, and what is measured of it is little.
            let memory = match progress {
                Progress::Held if !self.spec.rests => {
                    moving.dirty_rate.max(moving.nominal_dirty_rate)
                }
                _ => moving.dirty_rate,
            };
            let dirty_rate = memory + disks;
            Moving {
                progress,
                left_bytes,
                dirty_rate,
                max_dirty_rate: moving.max_dirty_rate.max(dirty_rate),
                in_vain: moving.in_vain && self.spec.rests,
                ..moving
            }
        };
        self.vms.iter().map(of).collect()
    }

    /// Another share of the bandwidth, of many small steps: VMs get theirs anew where it matters, and
    /// at once where the group has to make room for others.
    pub fn share_bandwidth(&mut self, now: Duration, bandwidth: BytesPerSecond) {
        let before = self.spec.capacity.bandwidth;
        if before == bandwidth {
            return;
        }
        self.spec.capacity.bandwidth = bandwidth;
        if bandwidth.0 < before.0 / 20 * 19 {
            self.paced = None;
        }
        if self.stage == Stage::Precopy {
            self.pace(now);
        }
    }

    /// Its turn has come: what its VMs have dirtied is sent, and they may switch over.
    pub fn give_turn(&mut self, now: Duration) {
        let Part::Bulk { waits_since } = self.part else {
            return;
        };
        self.part = Part::Turn;
        self.turn_at = Some(now);
        self.waited = waits_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        if self.stage == Stage::Precopy {
            self.stage_deadline = self.release_deadline();
            self.paced = None;
            self.step(Step::Turn);
            self.advance(now);
        }
    }

    /// Gives the group up, for a reason that lies outside of it. After the decision was proposed it
    /// finishes forward.
    pub fn abandon(&mut self, now: Duration, reason: String) {
        match self.stage {
            Stage::New => self.interrupt(now),
            Stage::Ended => {}
            _ => self.fail(now, reason),
        }
    }

    /// Parks the VMs whose memory was copied once; whether there were any.
    pub(super) fn park(&mut self, now: Duration) -> bool {
        let Part::Bulk { waits_since: None } = self.part else {
            return false;
        };
        let mut any = false;
        for vm in &mut self.vms {
            // Its second round has begun, or it has nothing left to send.
            let is_memory_copied = vm.round > 1 || vm.held;
            let is_copied = match vm.has_disks() {
                true => vm.started && vm.disks_copied,
                false => vm.started && is_memory_copied,
            };
            any |= is_copied && !vm.parked;
            vm.parked |= is_copied;
        }
        if self.vms.iter().all(|vm| vm.parked) {
            self.part = Part::Bulk {
                waits_since: Some(now),
            };
            // Its turn comes when the groups before it have ended, and those have deadlines.
            self.stage_deadline = None;
            self.step(Step::Copied);
        }
        any
    }

    /// These VMs are sent on.
    pub(super) fn unpark(&mut self, now: Duration, which: &[usize]) {
        for &index in which {
            let vm = &mut self.vms[index];
            vm.parked = false;
            vm.is_behind = vm.held;
            if vm.held {
                self.catch_up = Some(CatchUp {
                    since: now,
                    best: None,
                });
            }
        }
    }

    /// Whether the VMs may be gathered for their switchover: it is the group's turn, and no VM is
    /// kept back or behind.
    pub(super) fn may_gather(&mut self, now: Duration) -> bool {
        self.look_at_catch_up(now);
        self.part == Part::Turn && self.vms.iter().all(|vm| !vm.parked && !vm.is_behind)
    }

    fn look_at_catch_up(&mut self, now: Duration) {
        let Some(mut catch_up) = self.catch_up else {
            return;
        };
        let behind = self.vms.iter().filter(|vm| vm.is_behind);
        let left: u64 = behind.map(|vm| vm.remaining_bytes).sum();
        let report = self.spec.limits.report_interval;
        let rate = self.spec.capacity.rate(self.vms.len());
        let is_little =
            rate.time_for(rate_limiter::Bytes(left)) <= self.spec.limits.max_downtime / 2;
        let is_looked_at = now >= catch_up.since + report * 2;
        let falls = match catch_up.best {
            Some((_, best)) => left < best / 10 * 9,
            None => true,
        };
        if falls {
            catch_up.best = Some((now, left));
        }
        self.catch_up = Some(catch_up);
        let is_stuck = self.catch_up_ends().is_some_and(|end| now >= end);
        if (is_little && is_looked_at) || is_stuck {
            self.catch_up = None;
            for vm in &mut self.vms {
                vm.is_behind = false;
            }
        }
    }

    /// When VMs that catch up without getting on count as held after all.
    pub(super) fn catch_up_ends(&self) -> Option<Duration> {
        let CatchUp { since, best } = self.catch_up?;
        let last = best.map_or(since, |(at, _)| at);
        Some(last + PATIENCE + self.spec.limits.report_interval * 3)
    }
}
