//! Start-time fair queueing: who is next, by weight.
//!
//! Each flow has a start tag: the virtual time at which its next grant may begin. The flow with the
//! smallest tag is served, the queue's virtual time becomes that tag, and the flow's tag grows by
//! bytes / weight. Integers of 128 bits hold all of it without drift for thousands of years.

use crate::units::Bytes;

/// Virtual time, in bytes · 2^64 / weight.
pub(super) type VirtualTime = u128;

/// The number of fractional bits of a [`Weight`].
const WEIGHT_BITS: u32 = 20;

/// No single charge counts for more than this in virtual time: 1 TiB.
const MOST_BYTES: u64 = 1 << 40;

/// A weight in fixed point; a sum of weights, for a group.
pub(super) type Weight = u64;

/// The weight 1.
pub(super) const ONE: Weight = 1 << WEIGHT_BITS;

/// The fixed-point weight next to `weight`, clamped to 2⁻²⁰..=2²⁰; `None` unless it is finite and
/// above 0.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "the value is clamped to 1..=2^40 just before the cast"
)]
pub(super) fn weight_from(weight: f64) -> Option<Weight> {
    if !weight.is_finite() || weight <= 0.0 {
        return None;
    }
    let most = (1_u64 << (2 * WEIGHT_BITS)) as f64;
    Some((weight * ONE as f64).round().clamp(1.0, most) as Weight)
}

/// A flow's place in its queue.
#[derive(Debug, Clone)]
pub(super) struct Flow {
    tag: VirtualTime,
    weight: Weight,
}

impl Flow {
    /// A flow that may begin at `start`; a `weight` of 0 counts as the smallest one.
    pub(super) fn new(start: VirtualTime, weight: Weight) -> Self {
        Self {
            tag: start,
            weight: weight.max(1),
        }
    }

    pub(super) fn tag(&self) -> VirtualTime {
        self.tag
    }

    pub(super) fn weight(&self) -> Weight {
        self.weight
    }

    /// Gives up any credit from before `virtual_time`.
    pub(super) fn catch_up(&mut self, virtual_time: VirtualTime) {
        self.tag = self.tag.max(virtual_time);
    }

    /// Changes the weight, also for what the flow has had in advance: the bytes it is ahead of
    /// `virtual_time` stay the same.
    pub(super) fn set_weight(&mut self, virtual_time: VirtualTime, weight: Weight) {
        let weight = weight.max(1);
        let (old, new) = (u128::from(self.weight), u128::from(weight));
        let ahead = self.tag.saturating_sub(virtual_time);
        if ahead > 0 && old != new {
            let scaled = ahead.checked_mul(old).map_or_else(
                || (ahead / new).saturating_mul(old),
                |product| product / new,
            );
            self.tag = virtual_time.saturating_add(scaled);
        }
        self.weight = weight;
    }

    pub(super) fn spend(&mut self, bytes: Bytes) {
        self.tag = self.tag.saturating_add(self.cost(bytes));
    }

    pub(super) fn refund(&mut self, bytes: Bytes) {
        self.tag = self.tag.saturating_sub(self.cost(bytes));
    }

    fn cost(&self, bytes: Bytes) -> VirtualTime {
        (u128::from(bytes.0.min(MOST_BYTES)) << 64) / u128::from(self.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_checked_and_clamped() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(weight_from(bad), None, "{bad}");
        }
        assert_eq!(weight_from(1.0), Some(ONE));
        assert_eq!(weight_from(0.5), Some(ONE / 2));
        assert_eq!(weight_from(1e-300), Some(1));
        assert_eq!(weight_from(1e300), Some(1 << 40));
    }

    #[test]
    fn a_new_weight_counts_for_what_was_had_in_advance() {
        let mut flow = Flow::new(1 << 100, 1);
        flow.spend(Bytes(4096));
        let mut other = flow.clone();
        flow.set_weight(1 << 100, ONE);
        let mut direct = Flow::new(1 << 100, ONE);
        direct.spend(Bytes(4096));
        assert_eq!(flow.tag(), direct.tag());
        // What is behind has no advance to scale.
        other.set_weight(1 << 120, ONE);
        assert!(other.tag() < 1 << 120);
    }
}
