//! What a group's migration has to pass through, how long a remainder takes, and how the bandwidth
//! is shared.
//!
//! - What a migration may use: the bandwidth, a link or an interface without the reserve of the
//!   application's own traffic ([`Allowance::usable`], [`Allowance::usable_of`]).
//! - Downtime of a stop-and-copy: D = max over every cut c (the application's bandwidth, links,
//!   network interfaces) of Σ R_i / rate_c over the VMs that cross it.
//! - Shares in pre-copy: held VMs need their dirty rate d_i; the surplus goes to the laggards in
//!   proportion to what they have left, so that all finish together: b_i = d_i + (B − Σd)·R_i/ΣR.

use std::time::Duration;

use rate_limiter::{Bytes, BytesPerSecond};

use crate::application::{Application, HostId, VmId};

/// What a migration may use of the bandwidth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Allowance {
    /// The bandwidth: as the file says, or as it was probed; `None` before that.
    pub bandwidth: Option<BytesPerSecond>,
    /// What is kept of it for the application's own traffic.
    pub reserve: BytesPerSecond,
}

impl Allowance {
    /// The bandwidth without the reserve; `None` where it is not known, or all is reserved.
    #[must_use]
    pub fn usable(&self) -> Option<BytesPerSecond> {
        let left = self.bandwidth?.0.checked_sub(self.reserve.0);
        left.filter(|rate| *rate > 0).map(BytesPerSecond)
    }

    /// What a migration may use of a link or an interface of this rate.
    #[must_use]
    pub fn usable_of(&self, rate: BytesPerSecond) -> BytesPerSecond {
        BytesPerSecond(rate.0.saturating_sub(self.reserve.0).max(1))
    }

    /// The same for a move, which begins when it is known: else only what the file says of links
    /// and interfaces limits.
    #[must_use]
    pub fn for_move(&self) -> BytesPerSecond {
        self.usable().unwrap_or(UNLIMITED)
    }
}

/// A rate that nothing has: far below what overflows in sums.
const UNLIMITED: BytesPerSecond = BytesPerSecond(1 << 50);

/// A place that several VMs pass through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Its rate.
    pub rate: BytesPerSecond,
    /// Members of the group that cross it, by their position in the group.
    pub members: Vec<usize>,
}

/// Everything that limits one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capacity {
    /// The group's share of the application's bandwidth.
    pub bandwidth: BytesPerSecond,
    /// Links and interfaces.
    pub cuts: Vec<Cut>,
}

impl Capacity {
    /// The capacity for VMs going from host to host as given.
    #[must_use]
    pub fn of(app: &Application, group: &[(VmId, HostId, HostId)]) -> Self {
        let crossing = |test: &dyn Fn(HostId, HostId) -> bool| -> Vec<usize> {
            let members = group.iter().enumerate();
            members
                .filter(|(_, (_, from, to))| test(*from, *to))
                .map(|(index, _)| index)
                .collect()
        };
        let mut cuts = Vec::new();
        for link in &app.links {
            let [a, b] = link.between;
            // Full duplex: each direction has the link's rate.
            for (x, y) in [(a, b), (b, a)] {
                cuts.push(Cut {
                    rate: app.allowance.usable_of(link.rate),
                    members: crossing(&|from, to| from == x && to == y),
                });
            }
        }
        for (index, host) in app.hosts.iter().enumerate() {
            let here = HostId(index);
            if let Some(rate) = host.nic.map(|rate| app.allowance.usable_of(rate)) {
                for members in [
                    crossing(&|from, _| from == here),
                    crossing(&|_, to| to == here),
                ] {
                    cuts.push(Cut { rate, members });
                }
            }
        }
        cuts.retain(|cut| !cut.members.is_empty());
        Self {
            bandwidth: app.allowance.for_move(),
            cuts,
        }
    }

    /// How long what remains takes to cross, with every VM paused.
    #[must_use]
    pub fn downtime(&self, remaining: &[u64]) -> Duration {
        let all = self.bandwidth.time_for(Bytes(remaining.iter().sum()));
        let cuts = self.cuts.iter().map(|cut| {
            let sum = cut.members.iter().map(|&member| remaining[member]).sum();
            cut.rate.time_for(Bytes(sum))
        });
        cuts.fold(all, Duration::max)
    }

    /// The group's bandwidth as a number, in bytes per second.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
    pub fn bandwidth_f64(&self) -> f64 {
        self.bandwidth.0 as f64
    }

    /// The rate that the whole group can reach: the bandwidth, or less where all share a cut.
    #[must_use]
    pub fn rate(&self, members: usize) -> BytesPerSecond {
        let narrow = self.cuts.iter().filter(|cut| cut.members.len() == members);
        narrow
            .map(|cut| cut.rate)
            .fold(self.bandwidth, BytesPerSecond::min)
    }
}

/// What [`shares`] knows of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Dirty or unsent memory in bytes.
    pub remaining_bytes: u64,
    /// Dirty rate in bytes per second.
    pub dirty_rate_bytes_per_s: u64,
    /// Whether it is in wait-and-copy already.
    pub held: bool,
}

/// Part of the bandwidth that a held VM gets at least.
const FLOOR: f64 = 0.001;

/// Each VM's share of `bandwidth` in bytes per second, so that those not yet held finish together.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
pub fn shares(bandwidth: BytesPerSecond, vms: &[Demand]) -> Vec<f64> {
    let total = bandwidth.0 as f64;
    let dirty: f64 = vms.iter().map(|vm| vm.dirty_rate_bytes_per_s as f64).sum();
    let left: f64 = vms
        .iter()
        .filter(|vm| !vm.held)
        .map(|vm| vm.remaining_bytes.max(1) as f64)
        .sum();
    let surplus = total - dirty;
    let all_held = vms.iter().all(|vm| vm.held);
    vms.iter()
        .map(|vm| {
            let dirty_rate = vm.dirty_rate_bytes_per_s as f64;
            let part = vm.remaining_bytes.max(1) as f64 / left.max(1.0);
            match (vm.held, surplus > 0.0) {
                (true, true) => dirty_rate.max(total * FLOOR),
                (true, false) if all_held => total * dirty_rate / dirty,
                // What it would send is dirty again before the others are there.
                (true, false) => total * FLOOR,
                (false, true) => dirty_rate + surplus * part,
                // Nobody can converge: the shares follow what is left, and the hold decides.
                (false, false) => total * part,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(remaining: u64, dirty: u64, held: bool) -> Demand {
        Demand {
            remaining_bytes: remaining,
            dirty_rate_bytes_per_s: dirty,
            held,
        }
    }

    #[test]
    fn the_reserve_is_taken_off_the_bandwidth() {
        let usable = |bandwidth, reserve| {
            let allowance = Allowance {
                bandwidth,
                reserve: BytesPerSecond(reserve),
            };
            allowance.usable().map(|rate| rate.0)
        };
        assert_eq!(usable(Some(BytesPerSecond(50)), 5), Some(45));
        assert_eq!(usable(Some(BytesPerSecond(50)), 0), Some(50));
        assert_eq!(usable(Some(BytesPerSecond(50)), 50), None);
        assert_eq!(usable(Some(BytesPerSecond(50)), u64::MAX), None);
        assert_eq!(usable(None, 0), None);
    }

    #[test]
    fn laggards_share_the_surplus_and_finish_together() {
        let vms = [
            demand(100, 10, false),
            demand(300, 20, false),
            demand(5, 30, true),
        ];
        let shares = shares(BytesPerSecond(160), &vms);
        assert_eq!(shares, vec![35.0, 95.0, 30.0]);
        let finish: Vec<f64> = [0, 1]
            .map(|i: usize| {
                vms[i].remaining_bytes as f64 / (shares[i] - vms[i].dirty_rate_bytes_per_s as f64)
            })
            .to_vec();
        assert!((finish[0] - finish[1]).abs() < 1e-9);
    }

    #[test]
    fn held_vms_leave_the_link_to_the_others_when_nothing_converges() {
        let vms = [demand(50, 80, true), demand(300, 40, false)];
        let some = shares(BytesPerSecond(100), &vms);
        assert!(some[0] < 0.2 && some[1] >= 99.0, "{some:?}");
        let vms = vms.map(|vm| Demand { held: true, ..vm });
        let all = shares(BytesPerSecond(120), &vms);
        assert_eq!(all, vec![80.0, 40.0]);
    }

    #[test]
    fn shares_stay_positive_when_nothing_converges() {
        let vms = [
            demand(0, 500, false),
            demand(10, 500, true),
            demand(9, 0, false),
        ];
        assert!(
            shares(BytesPerSecond(100), &vms)
                .iter()
                .all(|&share| share > 0.0)
        );
    }

    #[test]
    fn the_slowest_cut_sets_the_downtime() {
        let capacity = Capacity {
            bandwidth: BytesPerSecond(125),
            cuts: vec![Cut {
                rate: BytesPerSecond(50),
                members: vec![2],
            }],
        };
        // R = 10, 20, 70 at 125 take 0.8 s; 70 at 50 take 1.4 s.
        assert_eq!(capacity.downtime(&[10, 20, 0]), Duration::from_millis(240));
        assert_eq!(
            capacity.downtime(&[10, 20, 70]),
            Duration::from_millis(1400)
        );
        assert_eq!(capacity.rate(3), BytesPerSecond(125));
        assert_eq!(capacity.rate(1), BytesPerSecond(50));
    }
}
