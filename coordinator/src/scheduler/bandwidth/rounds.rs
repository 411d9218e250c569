//! OBA with whole rounds, as Eq. 6 of VMbuddies counts them.
//!
//! With n = min(⌈log(V/M) / log(d/r)⌉, N) the time Σ M·dⁱ/rⁱ⁺¹ (Eq. 5) falls in jumps, where a
//! higher rate saves a round. In a jump no rate takes exactly the time wanted; the lowest one that
//! takes no longer is right: r(T) = inf {r : T(r) ≤ T}. So not all finish at the very same time.

use super::closed_form::{Allocation, bracket, nothing_left, rescale};
use super::curve::Curve;
use super::input::{AllocateError, Limits, VmLoad, check_all};

/// An allocation, and the rounds that each VM needs with it.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundAllocation {
    /// The rates, and the time that no VM exceeds.
    pub allocation: Allocation,
    /// n: rounds of pre-copy after the first copy; `None` where the traffic reaches its cap (Eq. 7).
    pub rounds: Vec<Option<u32>>,
}

/// The optimal allocation with whole rounds.
///
/// # Errors
/// As [`allocate`](super::allocate).
pub fn allocate(
    bandwidth_bytes_per_s: f64,
    vms: &[VmLoad],
    limits: &Limits,
) -> Result<RoundAllocation, AllocateError> {
    check_all(bandwidth_bytes_per_s, vms, limits)?;
    let curves: Vec<Curve> = vms.iter().map(|vm| Curve::new(vm, limits)).collect();
    let Some((mut low, mut high)) = bracket(bandwidth_bytes_per_s, &curves)? else {
        return Ok(RoundAllocation {
            allocation: nothing_left(bandwidth_bytes_per_s, vms),
            rounds: vec![Some(0); vms.len()],
        });
    };
    let error = |pace: f64| {
        let rates = curves.iter().map(|curve| stepped_rate(curve, pace).0);
        rates.sum::<f64>() - bandwidth_bytes_per_s
    };
    // Illinois: the secant, with the weight of an end halved that stays.
    let (mut at_low, mut at_high) = (error(low).min(0.0), error(high).max(0.0));
    for step in 0..300 {
        let secant = (low * at_high - high * at_low) / (at_high - at_low);
        // Whatever the function does: a third of the steps halve the bracket.
        let pace = if step % 3 != 2 && secant > low && secant < high {
            secant
        } else {
            f64::midpoint(low, high)
        };
        let here = error(pace);
        if here < 0.0 {
            (low, at_low) = (pace, here);
            at_high /= 2.0;
        } else {
            (high, at_high) = (pace, here);
            at_low /= 2.0;
        }
        if here == 0.0 || high - low <= high * 1e-15 {
            break;
        }
    }
    let (mut rates, rounds): (Vec<f64>, Vec<_>) =
        curves.iter().map(|curve| stepped_rate(curve, high)).unzip();
    rescale(&mut rates, bandwidth_bytes_per_s);
    Ok(RoundAllocation {
        allocation: Allocation {
            completion_s: 1.0 / high,
            rates_bytes_per_s: rates,
        },
        rounds,
    })
}

/// The lowest rate with which the VM finishes in 1/`pace` seconds, and its rounds.
fn stepped_rate(curve: &Curve, pace: f64) -> (f64, Option<u32>) {
    let (d, time) = (curve.dirty_rate, 1.0 / pace);
    let (smooth, _) = curve.rate(pace);
    let capped = curve.cap * pace;
    if capped <= smooth {
        return (capped, None);
    }
    if d == 0.0 || curve.memory == 0.0 {
        return (smooth, Some(0));
    }
    let rounds = whole_rounds(curve, smooth);
    // At the smooth rate so many whole rounds take at least the time.
    let mut rate = 1.0 / inverse_rate(curve, rounds, time, 1.0 / smooth);
    if rounds > 0 && rounds < curve.max_rounds {
        // From this rate on one round less will do, and takes no longer than the time.
        let shortest = (curve.memory / curve.threshold).powf(1.0 / f64::from(rounds - 1));
        rate = rate.min(d * shortest);
    }
    let rate = rate.max(d);
    if capped <= rate {
        (capped, None)
    } else {
        (rate, Some(rounds))
    }
}

/// Eq. 6.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked to be between 0 and N"
)]
pub(super) fn whole_rounds(curve: &Curve, rate: f64) -> u32 {
    let exact = (curve.threshold / curve.memory).ln() / (curve.dirty_rate / rate).ln();
    // A rate at which a whole number of rounds is enough must not need one more by rounding.
    let rounds = (exact - exact * 1e-13).ceil();
    if rounds < f64::from(curve.max_rounds) {
        rounds.max(0.0) as u32
    } else {
        curve.max_rounds
    }
}

/// The u = 1/r with which `rounds` rounds take `time`: M·Σ dⁱ·uⁱ⁺¹ = T by Newton's method. The
/// left side is convex and rises, so from any start but the first step it comes from the right.
pub(super) fn inverse_rate(curve: &Curve, rounds: u32, time: f64, start: f64) -> f64 {
    let (m, d) = (curve.memory, curve.dirty_rate);
    let mut u = start;
    for _ in 0..200 {
        // Horner: p = Σ (d·u)ⁱ and its derivative by u.
        let (mut p, mut slope) = (1.0, 0.0);
        for _ in 0..rounds {
            slope = slope * d * u + p * d;
            p = p * d * u + 1.0;
        }
        let step = (m * u * p - time) / (m * (p + u * slope));
        if !step.is_finite() {
            break;
        }
        u -= step;
        if step.abs() <= u * 1e-15 {
            break;
        }
    }
    u
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::closed_form::tests::{tiers, vm};
    use super::*;

    /// Eqs. 5, 6 and 8, with the cap.
    pub(crate) fn time(curve: &Curve, rate: f64) -> f64 {
        let capped = curve.cap / rate;
        if rate <= curve.dirty_rate {
            return capped;
        }
        let rounds = whole_rounds(curve, rate);
        let q = curve.dirty_rate / rate;
        let sum = (0..rounds).fold(1.0, |sum, _| sum * q + 1.0);
        (curve.memory / rate * sum).min(capped)
    }

    #[test]
    fn golden_values() {
        let all = allocate(60.0, &tiers(), &Limits::default()).unwrap();
        assert_eq!(all.rounds, [Some(9), Some(12), Some(24)]);
        let found = all.allocation.completion_s;
        assert!((found - 113.770_886_299).abs() < 1e-9, "{found}");
    }

    proptest! {
        #[test]
        fn the_rate_is_the_lowest_that_takes_no_longer(
            memory in 1e3..1e11_f64,
            dirty in 0.0..1e8_f64,
            threshold in 1e-6..0.9_f64,
            working_set in prop::option::of(0.0..1.0_f64),
            pace in 1e-5..1.0_f64,
            max_rounds in 1..40_u32,
        ) {
            let vm = vm(memory, dirty, threshold * memory, working_set.map(|w| w * memory));
            let curve = Curve::new(&vm, &Limits { max_rounds, ..Limits::default() });
            let (rate, _) = stepped_rate(&curve, pace);
            prop_assert!(time(&curve, rate * (1.0 + 1e-9)) * pace <= 1.0 + 1e-9);
            if rate > dirty * (1.0 + 1e-6) || rate < dirty * (1.0 - 1e-6) {
                prop_assert!(time(&curve, rate * (1.0 - 1e-7)) * pace > 1.0 - 1e-9);
            }
        }

        #[test]
        fn the_bandwidth_is_used_and_nobody_is_late(
            loads in prop::collection::vec((1e3..1e11_f64, 0.0..1e8_f64, 0.0..1.0_f64), 1..30),
            bandwidth in 1e3..1e11_f64,
        ) {
            let vms: Vec<VmLoad> =
                loads.iter().map(|&(m, d, w)| vm(m, d, m / 5000.0, Some(m * w))).collect();
            let limits = Limits::default();
            let all = allocate(bandwidth, &vms, &limits).unwrap().allocation;
            let sum: f64 = all.rates_bytes_per_s.iter().sum();
            prop_assert!((sum / bandwidth - 1.0).abs() < 1e-9);
            for (vm, &rate) in vms.iter().zip(&all.rates_bytes_per_s) {
                let late = time(&Curve::new(vm, &limits), rate * (1.0 + 1e-9));
                prop_assert!(late <= all.completion_s * (1.0 + 1e-9), "{late} {all:?}");
            }
            // Whole rounds never take less than the round parts of the closed form.
            let smooth = super::super::allocate(bandwidth, &vms, &limits).unwrap();
            prop_assert!(all.completion_s >= smooth.completion_s * (1.0 - 1e-3));
        }
    }
}
