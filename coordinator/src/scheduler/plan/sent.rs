//! How long a VM takes to be sent at a rate, and how far it is after a while.
//!
//! Without a known working set, data is dirtied for as long as it is sent: T(r) = left / (r − d), the
//! model of COMMA and Pacer. Where the working set W is known, what is dirtied saturates, and the VM
//! switches over when what is left fits its downtime D. While M bytes cross, w = min(d·M/r, W) are
//! dirtied; then:
//!
//! > T(r) = M/r + w/r                             where w ≤ r·D: that is what the stop carries
//! > T(r) = M/r + (w − r·D)/(r − d) + D           else, for r > d
//!
//! A guest that writes to a small working set without a pause so switches over after its first round,
//! however high its dirty rate is. Nothing takes longer than what bounds the traffic (VMbuddies 3.3.1).

use crate::scheduler::schedule::Load;

/// A VM as these models see it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sent {
    /// What is to be sent.
    pub load: Load,
    /// What is sent at most, in bytes; infinite without a known working set.
    pub cap: f64,
    /// The writable working set, where it is known, in bytes.
    pub working_set: Option<f64>,
    /// How long the VM may stand still at the end, in seconds.
    pub stop_s: f64,
}

/// How far a VM is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sending {
    /// Not sent once yet, in bytes; without a known working set, all that is left.
    once: f64,
    /// Dirtied since it was sent, in bytes.
    dirty: f64,
    /// Sent so far, in bytes.
    carried: f64,
}

impl Sending {
    /// Nothing was sent yet.
    pub(super) fn of(vm: &Sent) -> Self {
        Self {
            once: vm.load.left_bytes,
            dirty: 0.0,
            carried: 0.0,
        }
    }
}

impl Sent {
    /// How long it takes at this rate (bytes per second), in seconds; infinite where it never ends.
    #[must_use]
    pub fn time(&self, rate: f64) -> f64 {
        self.time_from(&Sending::of(self), rate)
    }

    /// How long what is left takes at this rate (bytes per second), in seconds: not sent yet at all, or
    /// dirtied since.
    #[must_use]
    pub fn time_left(&self, is_first_round: bool, rate: f64) -> f64 {
        let mut sending = Sending::of(self);
        if !is_first_round && self.working_set.is_some() {
            (sending.once, sending.dirty) = (0.0, sending.once);
        }
        self.time_from(&sending, rate)
    }

    /// How long it still takes at this rate (bytes per second), in seconds.
    pub(super) fn time_from(&self, sending: &Sending, rate: f64) -> f64 {
        if sending.once <= 0.0 && sending.dirty <= 0.0 {
            return 0.0;
        }
        let surplus = rate - self.load.dirty_rate;
        let once = sending.once / rate;
        let converged = match self.working_set {
            Some(set) => {
                let dirty = (sending.dirty + self.load.dirty_rate * once).min(set);
                let fits = rate * self.stop_s;
                if dirty <= fits {
                    once + dirty / rate
                } else if surplus > 0.0 {
                    once + (dirty - fits) / surplus + self.stop_s
                } else {
                    f64::INFINITY
                }
            }
            None if surplus > 0.0 => sending.once / surplus,
            None => f64::INFINITY,
        };
        converged.min((self.cap - sending.carried).max(0.0) / rate)
    }

    /// Goes on for so many seconds at this rate (bytes per second).
    pub(super) fn go_on(&self, sending: &mut Sending, rate: f64, seconds: f64) {
        sending.carried += rate * seconds;
        let dirty_rate = self.load.dirty_rate;
        let Some(set) = self.working_set else {
            sending.once = (sending.once + (dirty_rate - rate) * seconds).max(0.0);
            return;
        };
        let once = if rate > 0.0 {
            (sending.once / rate).min(seconds)
        } else {
            seconds
        };
        sending.once = (sending.once - rate * once).max(0.0);
        let dirty = (sending.dirty + dirty_rate * once).min(set);
        sending.dirty = (dirty + (dirty_rate - rate) * (seconds - once)).clamp(0.0, set);
    }

    /// The rate at which it takes so many seconds: T(r) falls wherever it is finite.
    pub(super) fn rate_for(&self, seconds: f64) -> f64 {
        if self.load.left_bytes <= 0.0 {
            return 0.0;
        }
        // At the first it takes longer, at the second not: everything, and all that is dirtied.
        let mut low = self.load.left_bytes / seconds;
        let mut high = 2.0 * (low + self.load.dirty_rate);
        for _ in 0..STEPS {
            if high - low <= PRECISION * high {
                break;
            }
            let middle = low + (high - low) / 2.0;
            if self.time(middle) > seconds {
                low = middle;
            } else {
                high = middle;
            }
        }
        high
    }
}

/// A rate is found to this part of itself.
const PRECISION: f64 = 1e-12;
const STEPS: u32 = 100;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sent(left: f64, dirty_rate: f64, working_set: Option<f64>, stop_s: f64) -> Sent {
        Sent {
            load: Load {
                left_bytes: left,
                max_dirty_rate: 2.0 * dirty_rate,
                dirty_rate,
            },
            cap: f64::INFINITY,
            working_set,
            stop_s,
        }
    }

    #[test]
    fn a_small_working_set_crosses_after_the_first_round() {
        // 160 MiB, 10 MiB of them always dirty, at 47 MB/s: what is left fits 300 ms.
        let hot = sent(167.8, 16.0, Some(10.5), 0.3);
        assert!((hot.time(47.0) - (167.8 + 10.5) / 47.0).abs() < 1e-9);
        // At a third of it, which is below the dirty rate, it does not fit, and never will.
        assert_eq!(hot.time(15.7), f64::INFINITY);
        // Between: it is sent until it fits, and stops.
        let expected = 167.8 / 20.0 + (10.5 - 6.0) / 4.0 + 0.3;
        assert!((hot.time(20.0) - expected).abs() < 1e-9);
    }

    #[test]
    fn without_a_working_set_it_is_the_linear_model() {
        assert!((sent(1000.0, 10.0, None, 0.3).time(45.0) - 1000.0 / 35.0).abs() < 1e-12);
        // And with one that never saturates, and no time to stop.
        let large = sent(1000.0, 10.0, Some(1e9), 0.0);
        assert!((large.time(45.0) - 1000.0 / 35.0).abs() < 1e-9);
    }

    #[test]
    fn it_can_be_cut_anywhere() {
        let vm = sent(100.0, 10.0, Some(20.0), 0.1);
        let whole = vm.time(30.0);
        let mut sending = Sending::of(&vm);
        for _ in 0..10 {
            vm.go_on(&mut sending, 30.0, whole / 20.0);
        }
        assert!((vm.time_from(&sending, 30.0) - whole / 2.0).abs() < 1e-9);
    }

    proptest! {
        #[test]
        fn rate_inverts_time(
            left in 1.0..1e6, dirty in 0.0..100.0, set in 0.0..1e5, stop in 0.0..2.0, times in 1.01..50.0,
        ) {
            let vm = sent(left, dirty, Some(set), stop);
            let rate = dirty * times + 1.0;
            let found = vm.rate_for(vm.time(rate));
            prop_assert!((found - rate).abs() <= 1e-6 * rate, "{found} {rate}");
        }

        #[test]
        fn more_takes_no_longer(
            left in 1.0..1e6, dirty in 0.0..100.0, set in 0.0..1e5, stop in 0.0..2.0,
            rate in 1.0..200.0, more in 1.0..2.0,
        ) {
            let vm = sent(left, dirty, Some(set), stop);
            prop_assert!(vm.time(rate * more) <= vm.time(rate) * (1.0 + 1e-9));
        }
    }
}
