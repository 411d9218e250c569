//! What limits a set of VMs: the bandwidth, and narrower places that only some of them pass.

use rate_limiter::BytesPerSecond;

use crate::capacity::{self, Capacity};

/// Relative error that sums of rates may have.
pub const ROUNDING: f64 = 1e-12;

/// A place that only some of the VMs pass through, such as a network interface.
#[derive(Debug, Clone, PartialEq)]
pub struct Cut {
    /// Its rate, in bytes per second.
    pub rate: f64,
    /// Which VMs cross it, by their index.
    pub crossed_by: Vec<bool>,
}

/// Everything that limits a set of VMs.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// What all of them share, in bytes per second.
    pub bandwidth: f64,
    /// Narrower places.
    pub cuts: Vec<Cut>,
}

impl Limits {
    /// One link, crossed by all.
    #[must_use]
    pub fn link(bandwidth: f64) -> Self {
        Self {
            bandwidth,
            cuts: Vec::new(),
        }
    }

    /// What limits a group of `vms`.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
    pub fn of(capacity: &Capacity, vms: usize) -> Self {
        let cuts = capacity.cuts.iter().map(|cut| Cut {
            rate: cut.rate.0 as f64,
            crossed_by: (0..vms).map(|vm| cut.members.contains(&vm)).collect(),
        });
        Self {
            bandwidth: capacity.bandwidth.0 as f64,
            cuts: cuts.collect(),
        }
    }

    /// The same for a group: members of a cut are positions in `group`.
    #[must_use]
    pub fn capacity(&self, group: &[usize]) -> Capacity {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "rates are positive and far below 2^63"
        )]
        let rate = |rate: f64| BytesPerSecond(rate as u64);
        let cuts = self.cuts.iter().map(|cut| capacity::Cut {
            rate: rate(cut.rate),
            members: (0..group.len())
                .filter(|&index| cut.crossed_by[group[index]])
                .collect(),
        });
        Capacity {
            bandwidth: rate(self.bandwidth),
            cuts: cuts.filter(|cut| !cut.members.is_empty()).collect(),
        }
    }

    /// Whether rates fit: `rates` are VMs with their rate, in bytes per second.
    pub fn hold(&self, rates: impl Iterator<Item = (usize, f64)> + Clone) -> bool {
        let fits = |sum: f64, rate: f64| sum <= rate * (1.0 + ROUNDING);
        fits(rates.clone().map(|(_, rate)| rate).sum(), self.bandwidth)
            && self.cuts.iter().all(|cut| {
                let crossing = rates.clone().filter(|(vm, _)| cut.crossed_by[*vm]);
                fits(crossing.map(|(_, rate)| rate).sum(), cut.rate)
            })
    }

    /// Whether something is free everywhere.
    #[must_use]
    pub fn are_positive(&self) -> bool {
        self.bandwidth > 0.0 && self.cuts.iter().all(|cut| cut.rate > 0.0)
    }

    /// The most that one VM alone can get, in bytes per second.
    #[must_use]
    pub fn alone(&self, vm: usize) -> f64 {
        let cuts = self.cuts.iter().filter(|cut| cut.crossed_by[vm]);
        cuts.map(|cut| cut.rate).fold(self.bandwidth, f64::min)
    }

    /// What is left for one VM beside those with these rates, in bytes per second.
    #[must_use]
    pub fn free_for(&self, vm: usize, taken: &[(usize, f64)]) -> f64 {
        let free = |rate: f64, crosses: &dyn Fn(usize) -> bool| {
            let taken = taken.iter().filter(|(other, _)| crosses(*other));
            rate - taken.map(|(_, rate)| rate).sum::<f64>()
        };
        let cuts = self.cuts.iter().filter(|cut| cut.crossed_by[vm]);
        cuts.map(|cut| free(cut.rate, &|other| cut.crossed_by[other]))
            .fold(free(self.bandwidth, &|_| true), f64::min)
            .max(0.0)
    }

    /// How long these amounts (bytes, of each VM) take at least, in seconds.
    pub fn time_for(&self, amounts: impl Iterator<Item = (usize, f64)> + Clone) -> f64 {
        let all: f64 = amounts.clone().map(|(_, bytes)| bytes).sum();
        let cuts = self.cuts.iter().map(|cut| {
            let crossing = amounts.clone().filter(|(vm, _)| cut.crossed_by[*vm]);
            crossing.map(|(_, bytes)| bytes).sum::<f64>() / cut.rate
        });
        cuts.fold(all / self.bandwidth, f64::max)
    }

    /// What each of `vms` gets when all rise alike from `least` (by VM, bytes per second) until
    /// something that they pass is full; in the order of `vms`.
    #[must_use]
    pub fn equal_parts(&self, vms: &[usize], least: &[f64]) -> Vec<f64> {
        let mut rates: Vec<f64> = vms.iter().map(|&vm| least[vm]).collect();
        let mut rising = vec![true; vms.len()];
        let places: Vec<(f64, Option<&Cut>)> = std::iter::once((self.bandwidth, None))
            .chain(self.cuts.iter().map(|cut| (cut.rate, Some(cut))))
            .collect();
        let passes = |cut: Option<&Cut>, vm: usize| cut.is_none_or(|cut| cut.crossed_by[vm]);
        while rising.contains(&true) {
            let mut least_rise = f64::INFINITY;
            let mut full: Vec<usize> = Vec::new();
            for &(rate, cut) in &places {
                let here = || (0..vms.len()).filter(|&index| passes(cut, vms[index]));
                let count = here().filter(|&index| rising[index]).count();
                if count == 0 {
                    continue;
                }
                let used: f64 = here().map(|index| rates[index]).sum();
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                let rise = ((rate - used) / f64::from(count)).max(0.0);
                if rise < least_rise {
                    least_rise = rise;
                    full = here().collect();
                }
            }
            for index in (0..vms.len()).filter(|&index| rising[index]) {
                rates[index] += least_rise;
            }
            for index in full {
                rising[index] = false;
            }
        }
        rates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            bandwidth: 30.0,
            cuts: vec![Cut {
                rate: 8.0,
                crossed_by: vec![true, true, false],
            }],
        }
    }

    #[test]
    fn parts_are_equal_until_something_is_full() {
        assert_eq!(
            limits().equal_parts(&[0, 1, 2], &[0.0; 3]),
            [4.0, 4.0, 22.0]
        );
        assert_eq!(limits().equal_parts(&[2, 1], &[0.0, 2.0, 0.0]), [22.0, 8.0]);
        assert_eq!(
            Limits::link(9.0).equal_parts(&[0, 1], &[1.0, 4.0]),
            [3.0, 6.0]
        );
        assert!(limits().equal_parts(&[], &[]).is_empty());
    }

    #[test]
    fn the_narrowest_place_decides() {
        let limits = limits();
        assert_eq!(limits.free_for(1, &[(0, 5.0)]), 3.0);
        assert_eq!(limits.free_for(2, &[(0, 5.0)]), 25.0);
        assert_eq!(limits.free_for(1, &[(0, 9.0)]), 0.0);
        assert_eq!(limits.alone(0), 8.0);
        assert_eq!(limits.time_for([(0, 16.0), (2, 14.0)].into_iter()), 2.0);
        assert!(limits.hold([(0, 8.0), (2, 22.0)].into_iter()));
        assert!(!limits.hold([(0, 5.0), (1, 4.0)].into_iter()));
    }
}
