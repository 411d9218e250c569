//! Sharing: what each VM of the group gets, and when it starts. The scheduler says it
//! ([`allot`]), from where the VMs are; here it becomes commands.

use std::collections::BTreeMap;
use std::time::Duration;

use sidecar::protocol::command::{Command, PaceArgs, PaceVm, StartArgs};

use super::Step;
use super::advance::ms;
use super::group::GroupRun;
use super::halves::VmRun;
use super::stages::Part;
use crate::scheduler::allot::{Allotment, Moving, allot, bulk};

const PACE_INTERVAL: Duration = Duration::from_millis(200);
/// Shares are sent again when one has changed by more than this.
const PACE_CHANGE: f64 = 0.05;
/// The same in the bulk copy, whose VMs are to end together.
const BULK_PACE_CHANGE: f64 = 0.01;
/// Bulk copies are reported, and their shares corrected, so often in the end.
const CLOSING_INTERVAL: Duration = Duration::from_millis(50);
/// That begins when so many seconds are left.
const CLOSING: f64 = 3.0;
/// A report that comes so much early counts as one of its interval.
const EARLY: Duration = Duration::from_millis(5);
/// Smallest weight sent: everybody gets something. Weights are shares in percent.
const MIN_WEIGHT: f64 = 1.0;

impl GroupRun {
    /// Shares the bandwidth anew: starts the VMs whose turn has come, and sends each source host
    /// its limit and its VMs' shares where they have changed.
    pub(super) fn pace(&mut self, now: Duration) {
        let parked_any = self.park(now);
        let vms = self.moving();
        self.look_closely(now, &vms);
        let capacity = &self.spec.capacity;
        let Allotment {
            rates,
            mut runs,
            next_start,
        } = match self.part {
            Part::Bulk { .. } => bulk(capacity, &vms),
            Part::Turn => allot(self.spec.scheme, capacity, &vms),
        };
        // A start that was foreseen is made, though no report may have come since.
        if let Some((_, vm)) = self.next_start.filter(|(at, _)| now >= *at) {
            runs[vm] = true;
        }
        let next = next_start.filter(|(_, vm)| !runs[*vm]);
        let next = next.map(|(s, vm)| (now + Duration::from_secs_f64(s.min(1e6)), vm));
        // Only a report puts it off: what is left looks unchanged until there is one.
        self.next_start = match (self.next_start, next) {
            (Some(before), Some(next)) if before.1 == next.1 => Some(before.min(next)),
            (_, next) => next,
        };
        let due: Vec<usize> = (0..self.vms.len())
            .filter(|&vm| runs[vm] && !self.vms[vm].started)
            .collect();
        let sent_on: Vec<usize> = (0..self.vms.len())
            .filter(|&vm| runs[vm] && self.vms[vm].parked)
            .collect();
        self.unpark(now, &sent_on);
        let is_urgent = parked_any || !due.is_empty() || !sent_on.is_empty();
        let least_change = match self.part {
            Part::Bulk { .. } => BULK_PACE_CHANGE,
            Part::Turn => PACE_CHANGE,
        };
        if let (Some((at, last)), false) = (&self.paced, is_urgent) {
            let changed = last
                .iter()
                .zip(&rates)
                .any(|(old, new)| (old - new).abs() > least_change * old.abs());
            let interval = match self.is_closing {
                true => CLOSING_INTERVAL,
                false => PACE_INTERVAL,
            };
            if !changed || now + EARLY < *at + interval {
                return;
            }
        }
        self.send_shares(now, &rates, false);
        let is_first = self.paced.is_none();
        self.paced = Some((now, rates));
        // In stage one only disks are copied of VMs that have some.
        let is_bulk = matches!(self.part, Part::Bulk { .. });
        let (disks, whole): (Vec<usize>, Vec<usize>) = due
            .iter()
            .partition(|&&vm| is_bulk && self.vms[vm].has_disks());
        self.start_vms(now, &disks, true);
        self.start_vms(now, &whole, false);
        let memory_follows = |&vm: &usize| !self.vms[vm].memory_started;
        let follow: Vec<usize> = sent_on.into_iter().filter(memory_follows).collect();
        self.start_vms(now, &follow, false);
        if !due.is_empty() && !is_first {
            let names = due.iter().map(|&vm| self.vms[vm].member.name.clone());
            let vms = names.collect();
            self.step(Step::StartedLater { vms });
        }
    }

    /// The ends of bulk copies depend on how fresh is what is known of them.
    fn look_closely(&mut self, now: Duration, vms: &[Moving]) {
        let copies = matches!(self.part, Part::Bulk { waits_since: None });
        let left: f64 = vms.iter().map(|vm| vm.left_bytes).sum();
        let is_closing = copies
            && self.vms.iter().any(|vm| vm.started && vm.has_disks())
            && left / self.spec.capacity.bandwidth_f64() < CLOSING;
        if is_closing != self.is_closing {
            self.is_closing = is_closing;
            let usual = self.spec.limits.report_interval;
            let interval = if is_closing {
                usual.min(CLOSING_INTERVAL)
            } else {
                usual
            };
            self.report_every(now, ms(interval));
        }
    }

    /// Whether a VM passes something narrower than what the whole group can reach: a weight alone
    /// does not keep it within that.
    fn is_narrow(&self, vm: &VmRun) -> bool {
        let index = self
            .vms
            .iter()
            .position(|other| other.member.vm == vm.member.vm);
        let capacity = &self.spec.capacity;
        let all = capacity.rate(self.vms.len());
        let mut cuts = capacity.cuts.iter();
        cuts.any(|cut| cut.rate < all && index.is_some_and(|index| cut.members.contains(&index)))
    }

    /// Whether a VM has to be kept within its share: weights alone give what one cannot use at the
    /// moment to others. Those of a bulk copy would not end together then; what one did not use
    /// comes back to it with the next shares.
    fn is_limited(&self, vm: &VmRun) -> bool {
        matches!(self.part, Part::Bulk { waits_since: None }) || self.is_narrow(vm)
    }

    /// Sends `start` to these VMs: of the disks alone, or of everything.
    fn start_vms(&mut self, now: Duration, due: &[usize], disks_only: bool) {
        let args = self.args();
        for host in self.sources() {
            let mut vms = BTreeMap::new();
            for &index in due {
                let vm = &mut self.vms[index];
                if vm.member.from == host {
                    vm.started = true;
                    vm.memory_started = !disks_only;
                    let stream = vm.stream.clone().unwrap_or_default();
                    vms.insert(vm.member.name.clone(), stream);
                }
            }
            if !vms.is_empty() {
                let start = StartArgs {
                    run: args.run,
                    epoch: args.epoch,
                    vms,
                    disks_only,
                };
                self.send(now, host, Command::Start(start));
            }
        }
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of a rate is a rate"
    )]
    pub(super) fn send_shares(&mut self, now: Duration, shares: &[f64], lift_limits: bool) {
        let rate = self.spec.capacity.rate(self.vms.len()).0;
        let whole: f64 = shares.iter().sum();
        for host in self.sources() {
            let mut vms = BTreeMap::new();
            let mut of_host = 0.0;
            for (vm, share) in self.vms.iter().zip(shares) {
                if vm.member.from == host {
                    of_host += share;
                    let is_limited = self.is_limited(vm);
                    let limit = match self.spec.parked {
                        _ if lift_limits => Some(0),
                        Some(_) if vm.parked && vm.is_write_blocking() => Some(0),
                        Some(parked) if vm.parked => Some(parked.0),
                        _ if is_limited && vm.held => Some(0),
                        _ if is_limited => Some(share.round().max(1.0) as u64),
                        // It may have been parked.
                        Some(_) => Some(0),
                        None => None,
                    };
                    let pace = PaceVm {
                        bytes_per_s: limit,
                        weight: Some((share / whole.max(1.0) * 100.0).max(MIN_WEIGHT)),
                    };
                    vms.insert(vm.member.name.clone(), pace);
                }
            }
            let limit = (rate as f64 * of_host / whole.max(1.0)).round() as u64;
            let args = self.args();
            let pace = PaceArgs {
                run: args.run,
                epoch: args.epoch,
                group_bytes_per_s: Some(limit.clamp(1, rate.max(1))),
                vms,
                at_ms: None,
            };
            self.send(now, host, Command::Pace(pace));
        }
    }
}
