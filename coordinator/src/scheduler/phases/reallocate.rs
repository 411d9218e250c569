//! Allocating anew, with what remains, when a load or the bandwidth has changed.

use super::tracker::{Tracker, TrackerSettings};
use crate::capacity::Capacity;
use crate::scheduler::bandwidth::{AllocateError, Allocation, Limits, VmLoad, allocate_within};

/// What was measured of a VM in pre-copy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// What it would have to send if it dirtied nothing more.
    pub remaining_bytes: f64,
    /// Dirtied a second since the last report.
    pub dirty_rate_bytes_per_s: f64,
}

/// Keeps an allocation fit for what the VMs do (VMbuddies 3.4).
#[derive(Debug, Clone)]
pub struct Reallocator {
    limits: Limits,
    /// Threshold and working set; the rest is replaced by what is measured.
    vms: Vec<VmLoad>,
    trackers: Vec<Tracker>,
    bandwidth: u64,
}

/// A bandwidth that has changed by this part is allocated anew.
const BANDWIDTH_CHANGE: f64 = 0.1;

impl Reallocator {
    /// For the VMs of one group, from `now_s` on.
    #[must_use]
    pub fn new(now_s: f64, vms: Vec<VmLoad>, limits: Limits, settings: TrackerSettings) -> Self {
        Self {
            limits,
            trackers: vec![Tracker::new(now_s, settings); vms.len()],
            vms,
            bandwidth: 0,
        }
    }

    /// Takes what was measured of each VM, in their order: the allocation from now on, if it is to
    /// change. The first report always gives one.
    ///
    /// # Errors
    /// As [`allocate_within`]: the VMs as they are now cannot converge. The old allocation is as
    /// good as any; throttle them, or move fewer at once.
    ///
    /// # Panics
    /// If there are not as many measurements as VMs.
    #[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
    pub fn report(
        &mut self,
        now_s: f64,
        measured: &[Measured],
        capacity: &Capacity,
    ) -> Result<Option<Allocation>, AllocateError> {
        assert_eq!(
            measured.len(),
            self.vms.len(),
            "one measurement for each VM"
        );
        let bandwidth = capacity.bandwidth.0;
        let before = self.bandwidth as f64;
        let mut must = (bandwidth as f64 - before).abs() > BANDWIDTH_CHANGE * before;
        for (tracker, sample) in self.trackers.iter_mut().zip(measured) {
            must |= tracker.add(now_s, sample.dirty_rate_bytes_per_s).is_some();
        }
        if !must {
            return Ok(None);
        }
        self.bandwidth = bandwidth;
        let vms = self.vms.iter_mut().zip(&self.trackers).zip(measured);
        for ((vm, tracker), sample) in vms {
            vm.remaining_bytes = sample.remaining_bytes;
            vm.dirty_rate_bytes_per_s = tracker.rate_bytes_per_s();
        }
        allocate_within(capacity, &self.vms, &self.limits).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use rate_limiter::BytesPerSecond;

    use super::*;

    fn capacity(rate: u64) -> Capacity {
        Capacity {
            bandwidth: BytesPerSecond(rate),
            cuts: Vec::new(),
        }
    }

    fn measured(remaining: [f64; 2], rates: [f64; 2]) -> Vec<Measured> {
        let one = |(remaining_bytes, dirty_rate_bytes_per_s)| Measured {
            remaining_bytes,
            dirty_rate_bytes_per_s,
        };
        remaining.into_iter().zip(rates).map(one).collect()
    }

    #[test]
    fn a_new_phase_is_allocated_for_at_once_with_what_remains() {
        let vm = VmLoad {
            remaining_bytes: 1000.0,
            dirty_rate_bytes_per_s: 0.0,
            threshold_bytes: 0.0,
            working_set_bytes: None,
        };
        let mut all = Reallocator::new(
            0.0,
            vec![vm; 2],
            Limits::default(),
            TrackerSettings::default(),
        );
        let mut rates = |now, remaining, rates, bandwidth| {
            let found = all.report(now, &measured(remaining, rates), &capacity(bandwidth));
            found.map(|found| found.map(|found| found.rates_bytes_per_s))
        };
        let first = rates(0.0, [1000.0, 1000.0], [10.0, 20.0], 100)
            .unwrap()
            .unwrap();
        assert!((first[0] - 45.0).abs() < 1e-9 && (first[1] - 55.0).abs() < 1e-9);
        assert_eq!(rates(1.0, [900.0, 900.0], [10.0, 21.0], 100), Ok(None));
        assert_eq!(
            rates(2.0, [800.0, 800.0], [40.0, 20.0], 100),
            Ok(None),
            "a peak?"
        );
        let second = rates(3.0, [700.0, 350.0], [40.0, 20.0], 100)
            .unwrap()
            .unwrap();
        let dirty = (40.0, 20.5);
        let surplus = 100.0 - dirty.0 - dirty.1;
        assert!(
            (second[0] - dirty.0 - surplus * 2.0 / 3.0).abs() < 0.5,
            "{second:?}"
        );
        assert_eq!(rates(4.0, [600.0, 300.0], [40.0, 20.0], 95), Ok(None));
        assert!(
            rates(5.0, [600.0, 300.0], [40.0, 20.0], 80)
                .unwrap()
                .is_some()
        );
        let error = rates(6.0, [500.0, 300.0], [40.0, 20.0], 50).unwrap_err();
        assert!(matches!(error, AllocateError::DoesNotConverge { .. }));
    }
}
