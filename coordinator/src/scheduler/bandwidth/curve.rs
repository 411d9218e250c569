//! The cost of one VM's migration: T(r), and the rate that a time needs.

use super::input::{Limits, VmLoad};

/// One VM's T(r), with what does not depend on r.
#[derive(Debug, Clone, Copy)]
pub(super) struct Curve {
    /// M in bytes.
    pub memory: f64,
    /// d in bytes a second.
    pub dirty_rate: f64,
    /// V in bytes, at most M.
    pub threshold: f64,
    /// C in bytes; infinite without a working set.
    pub cap: f64,
    pub max_rounds: u32,
}

impl Curve {
    pub fn new(vm: &VmLoad, limits: &Limits) -> Self {
        // Less than a billionth of a byte is nothing.
        let memory = if vm.remaining_bytes < 1e-9 {
            0.0
        } else {
            vm.remaining_bytes
        };
        Self {
            memory,
            dirty_rate: vm.dirty_rate_bytes_per_s,
            threshold: vm.threshold_bytes.min(memory),
            cap: cap(vm, memory, limits),
            max_rounds: limits.max_rounds,
        }
    }

    /// T(r) in seconds, with a number of rounds that need not be whole.
    pub fn time(&self, rate: f64) -> f64 {
        let capped = self.cap / rate;
        if rate <= self.dirty_rate {
            return capped;
        }
        let left = self.threshold * self.dirty_rate / rate;
        ((self.memory - left) / (rate - self.dirty_rate)).min(capped)
    }

    /// The rate with which the VM finishes in 1/`pace` seconds, and its derivative by `pace`.
    ///
    /// As a function of the pace the rate is nearly a line, d + M·pace, which Newton's method likes.
    pub fn rate(&self, pace: f64) -> (f64, f64) {
        let (m, d, v) = (self.memory, self.dirty_rate, self.threshold);
        let linear = d + m * pace;
        // (d + M·x)² − 4·V·d·x without its cancellation.
        let root = ((d - m * pace).powi(2) + 4.0 * (m - v) * d * pace).sqrt();
        let geometric = f64::midpoint(linear, root);
        let capped = self.cap * pace;
        if capped <= geometric {
            return (capped, self.cap);
        }
        if root == 0.0 {
            return (geometric, m);
        }
        let slope = (m * linear - 2.0 * v * d) / root;
        (geometric, f64::midpoint(m, slope))
    }
}

/// Eq. 7: what is sent at most.
pub(super) fn cap(vm: &VmLoad, memory: f64, limits: &Limits) -> f64 {
    let Some(working_set) = vm.working_set_bytes else {
        return f64::INFINITY;
    };
    let by_rounds = memory + f64::from(limits.max_rounds) * limits.resent_share * working_set;
    by_rounds.min(limits.traffic_factor * memory + working_set)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn time_falls_with_the_rate_and_rate_inverts_it(
            memory in 1.0..1e12_f64,
            dirty in 0.0..1e3_f64,
            threshold in 0.0..0.5_f64,
            working_set in prop::option::of(0.0..1.0_f64),
            pace in 1e-9..1e3_f64,
        ) {
            let vm = VmLoad {
                remaining_bytes: memory,
                dirty_rate_bytes_per_s: dirty,
                threshold_bytes: threshold * memory,
                working_set_bytes: working_set.map(|part| part * memory),
            };
            let curve = Curve::new(&vm, &Limits::default());
            let (rate, slope) = curve.rate(pace);
            prop_assert!(rate.is_finite() && slope >= 0.0);
            let faster = curve.rate(pace * 1.001).0;
            prop_assert!(faster > rate);
            // Where r − d loses digits, T cannot have them.
            if rate > dirty * (1.0 + 1e-6) || rate <= dirty {
                prop_assert!((curve.time(rate) * pace - 1.0).abs() < 1e-6);
            }
            prop_assert!(curve.time(rate * 1.01) < curve.time(rate));
        }
    }
}
