//! What a simulation shows.

use crate::scheduler::predict::End;

/// How one VM moved.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Travel {
    /// When its copy began.
    pub start_s: f64,
    /// When it was held: its pseudo-synchropoint.
    pub ready_s: f64,
    /// When it was paused.
    pub paused_s: f64,
    /// When it ran at its destination.
    pub finish_s: f64,
    /// All that was sent.
    pub traffic_bytes: f64,
    /// Rounds after the first copy, until it was held.
    pub rounds: u32,
    /// Why pre-copy ended.
    pub end: Option<End>,
    /// Its rate: from when on, bytes a second.
    pub rates: Vec<(f64, f64)>,
}

impl Travel {
    /// How long it was paused.
    #[must_use]
    pub fn downtime_s(&self) -> f64 {
        self.finish_s - self.paused_s
    }
}

/// Traffic between two VMs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Traffic {
    /// The two, by position.
    pub between: [usize; 2],
    /// Both directions together.
    pub rate_bytes_per_s: f64,
}

/// How all VMs moved.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Each VM, in the order of the scenario.
    pub vms: Vec<Travel>,
}

impl Outcome {
    /// Until the last VM runs at its destination.
    #[must_use]
    pub fn completion_s(&self) -> f64 {
        self.vms.iter().map(|vm| vm.finish_s).fold(0.0, f64::max)
    }

    /// All that was sent.
    #[must_use]
    pub fn traffic_bytes(&self) -> f64 {
        self.vms.iter().map(|vm| vm.traffic_bytes).sum()
    }

    /// The longest downtime.
    #[must_use]
    pub fn downtime_s(&self) -> f64 {
        self.vms.iter().map(Travel::downtime_s).fold(0.0, f64::max)
    }

    /// How long the VMs ran on both sides: VMbuddies' unsynchronised time (Figure 12).
    #[must_use]
    pub fn split_s(&self) -> f64 {
        let finish = self.vms.iter().map(|vm| vm.finish_s);
        let first = finish.clone().fold(f64::INFINITY, f64::min);
        (self.completion_s() - first).max(0.0)
    }

    /// What was said between VMs on different sides (COMMA, Eq. 1): Σ |tᵢ − tⱼ| · rate. Traffic of
    /// VMs that there are not counts nothing.
    #[must_use]
    pub fn impact_bytes(&self, traffic: &[Traffic]) -> f64 {
        let impact = |traffic: &Traffic| {
            let [a, b] = traffic.between.map(|vm| self.vms.get(vm));
            Some((a?.finish_s - b?.finish_s).abs() * traffic.rate_bytes_per_s)
        };
        traffic.iter().filter_map(impact).sum()
    }
}
