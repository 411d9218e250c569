//! Guests that write to their disks as fast as these are copied: slowed, as far as the file allows.

use std::time::Duration;

use rate_limiter::Bytes;
use sidecar::protocol::command::{Command, ThrottleDisksArgs};

use super::Step;
use super::group::{GroupRun, Stage};
use super::stages::Part;

/// It has to last so long: a stream takes a moment to get going, and a limit to show.
const PATIENCE: Duration = Duration::from_secs(3);

impl GroupRun {
    /// Slows whose disks do not get copied.
    pub(super) fn look_at_disks(&mut self, now: Duration) {
        if !matches!(self.stage, Stage::Precopy | Stage::Held { .. }) {
            return;
        }
        let little = self.spec.limits.max_downtime / 2;
        let rate = self.spec.capacity.rate(self.vms.len());
        // Nearly as fast as what its stream carries; later that carries its memory as well.
        let is_bulk = matches!(self.part, Part::Bulk { .. });
        let args = self.args();
        for index in 0..self.vms.len() {
            let vm = &mut self.vms[index];
            let Some(least) = vm.member.min_write_rate else {
                continue;
            };
            let disks = u64::try_from(vm.member.disks.len()).unwrap_or(u64::MAX);
            let stream = vm.rate_bytes_per_s;
            let too_fast = if is_bulk {
                stream / 5 * 4
            } else {
                stream / 5 * 2
            };
            let is_hot = vm.started
                && !vm.parked
                && rate.time_for(Bytes(vm.disks_left_bytes)) > little
                && vm.disk_rate_bytes_per_s > too_fast;
            if !is_hot {
                vm.hot_since = None;
                continue;
            }
            let since = *vm.hot_since.get_or_insert(now);
            let before = vm.disk_limit_bytes_per_s.unwrap_or(u64::MAX);
            if now < since + PATIENCE || before <= least.0 || disks == 0 {
                continue;
            }
            let bytes_per_s = (vm.disk_rate_bytes_per_s / disks / 2)
                .min(before / 2)
                .max(least.0);
            vm.disk_limit_bytes_per_s = Some(bytes_per_s);
            vm.hot_since = None;
            let (host, name) = (vm.member.from, vm.member.name.clone());
            let throttle = ThrottleDisksArgs {
                run: args.run,
                epoch: args.epoch,
                vm: name.clone(),
                bytes_per_s,
            };
            self.send(now, host, Command::ThrottleDisks(throttle));
            self.step(Step::DisksThrottled {
                vm: name,
                bytes_per_s,
            });
        }
    }
}
