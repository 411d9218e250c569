//! Whether and how VMs are ballooned while they move (VMbuddies 4.2).

use std::time::Duration;

use rate_limiter::Bytes;
use sidecar::protocol::command::PrepareBalloon;

use super::{Application, Vm, VmId, VmProfile};

/// What `[application]` says of ballooning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ballooning {
    /// Whether VMs are ballooned that do not say so themselves.
    pub on: bool,
    /// What a guest keeps beyond what it uses.
    pub reserve: Bytes,
    /// How long it may take before the copy of the memory begins.
    pub wait: Duration,
}

impl Default for Ballooning {
    fn default() -> Self {
        Self {
            on: false,
            reserve: Bytes(64 << 20),
            wait: Duration::from_secs(5),
        }
    }
}

impl Ballooning {
    /// The load of a VM as it moves: where it is ballooned (`on`), and the file says what its guest
    /// uses, only that and the reserve count as its memory, but all that it is known to write to.
    pub(super) fn moved(
        self,
        on: Option<bool>,
        reserve: Option<Bytes>,
        profile: VmProfile,
    ) -> VmProfile {
        let is_ballooned = on.unwrap_or(self.on);
        let (true, Some(memory), Some(used)) = (is_ballooned, profile.memory, profile.used_memory)
        else {
            return profile;
        };
        let reserve = reserve.unwrap_or(self.reserve);
        let kept = Bytes(used.0.saturating_add(reserve.0));
        let written = profile.writable_working_set.unwrap_or_default();
        VmProfile {
            memory: Some(kept.max(written).min(memory)),
            ..profile
        }
    }
}

impl Application {
    fn is_ballooned(&self, vm: &Vm) -> bool {
        vm.balloon.unwrap_or(self.ballooning.on)
    }

    /// How a VM is ballooned, if it is.
    #[must_use]
    pub fn balloon_of(&self, vm: VmId) -> Option<PrepareBalloon> {
        let vm = self.vm(vm);
        self.is_ballooned(vm).then(|| PrepareBalloon {
            reserve_bytes: vm.balloon_reserve.unwrap_or(self.ballooning.reserve).0,
            wait_ms: u64::try_from(self.ballooning.wait.as_millis()).unwrap_or(u64::MAX),
        })
    }

    /// What is known of a VM's load as it moves.
    #[must_use]
    pub fn moved_profile(&self, vm: &Vm) -> VmProfile {
        self.ballooning
            .moved(vm.balloon, vm.balloon_reserve, vm.profile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_ballooned_vm_moves_with_what_it_uses_and_its_reserve() {
        let profile = VmProfile {
            memory: Some(Bytes(1024 * MIB)),
            used_memory: Some(Bytes(200 * MIB)),
            ..VmProfile::default()
        };
        let moved = |on, reserve, profile| Ballooning::default().moved(on, reserve, profile).memory;
        assert_eq!(moved(None, None, profile), profile.memory);
        assert_eq!(moved(Some(true), None, profile), Some(Bytes(264 * MIB)));
        let more = Some(Bytes(900 * MIB));
        assert_eq!(moved(Some(true), more, profile), profile.memory);
        let writes = VmProfile {
            writable_working_set: Some(Bytes(500 * MIB)),
            ..profile
        };
        assert_eq!(moved(Some(true), None, writes), Some(Bytes(500 * MIB)));
        let unknown = VmProfile {
            used_memory: None,
            ..profile
        };
        assert_eq!(moved(Some(true), None, unknown), profile.memory);
    }
}
