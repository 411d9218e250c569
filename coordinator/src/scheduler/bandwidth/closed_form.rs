//! The solver: one pace for all, so that the rates add up to the bandwidth.

use super::curve::Curve;
use super::input::{AllocateError, Limits, VmLoad, check_all};
use crate::capacity::Capacity;

/// Who sends how fast, and how long it takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// When all have finished: T.
    pub completion_s: f64,
    /// The rate of each VM, in the order in which they were given.
    pub rates_bytes_per_s: Vec<f64>,
}

/// The optimal allocation (VMbuddies 3.3.2, Eqs. 9 and 10), in closed form but for the common T.
///
/// The rates add up to the bandwidth, and all T are equal. If nothing is left to send, T is 0, and
/// what the dirty rates leave over is shared equally.
///
/// # Errors
/// The input makes no sense, or VMs without a working set dirty all that can be sent.
///
/// ```
/// use coordinator::scheduler::bandwidth::{Limits, VmLoad, allocate};
/// let vm = |dirty_rate_bytes_per_s| VmLoad {
///     remaining_bytes: 1000.0,
///     dirty_rate_bytes_per_s,
///     threshold_bytes: 0.0,
///     working_set_bytes: None,
/// };
/// let all = allocate(100.0, &[vm(10.0), vm(20.0)], &Limits::default())?;
/// assert!((all.rates_bytes_per_s[0] - 45.0).abs() < 1e-9);
/// assert!((all.completion_s - 2000.0 / 70.0).abs() < 1e-9);
/// # Ok::<(), coordinator::scheduler::bandwidth::AllocateError>(())
/// ```
pub fn allocate(
    bandwidth_bytes_per_s: f64,
    vms: &[VmLoad],
    limits: &Limits,
) -> Result<Allocation, AllocateError> {
    check_all(bandwidth_bytes_per_s, vms, limits)?;
    let curves: Vec<Curve> = vms.iter().map(|vm| Curve::new(vm, limits)).collect();
    let Some(pace) = common_pace(bandwidth_bytes_per_s, &curves)? else {
        return Ok(nothing_left(bandwidth_bytes_per_s, vms));
    };
    let mut rates: Vec<f64> = curves.iter().map(|curve| curve.rate(pace).0).collect();
    rescale(&mut rates, bandwidth_bytes_per_s);
    Ok(Allocation {
        completion_s: 1.0 / pace,
        rates_bytes_per_s: rates,
    })
}

/// The same where links and interfaces limit too: all finish together, as early as the narrowest
/// cut admits. Only that one is filled.
///
/// # Errors
/// As [`allocate`]; for the cut that the VMs cannot converge over, where there is one.
#[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
pub fn allocate_within(
    capacity: &Capacity,
    vms: &[VmLoad],
    limits: &Limits,
) -> Result<Allocation, AllocateError> {
    let mut best = allocate(capacity.bandwidth.0 as f64, vms, limits)?;
    for cut in &capacity.cuts {
        let members: Vec<VmLoad> = cut.members.iter().map(|&vm| vms[vm]).collect();
        let part = allocate(cut.rate.0 as f64, &members, limits)?;
        if part.completion_s > best.completion_s {
            let pace = 1.0 / part.completion_s;
            best.completion_s = part.completion_s;
            let rate = |vm| Curve::new(vm, limits).rate(pace).0;
            best.rates_bytes_per_s = vms.iter().map(rate).collect();
            for (&vm, &rate) in cut.members.iter().zip(&part.rates_bytes_per_s) {
                best.rates_bytes_per_s[vm] = rate;
            }
        }
    }
    Ok(best)
}

pub(super) fn nothing_left(bandwidth: f64, vms: &[VmLoad]) -> Allocation {
    let dirty = vms.iter().map(|vm| vm.dirty_rate_bytes_per_s);
    let sum: f64 = dirty.clone().sum();
    #[allow(clippy::cast_precision_loss, reason = "a number of VMs")]
    let part = (bandwidth - sum).max(0.0) / vms.len() as f64;
    let mut rates: Vec<f64> = dirty.map(|rate| rate + part).collect();
    rescale(&mut rates, bandwidth);
    Allocation {
        completion_s: 0.0,
        rates_bytes_per_s: rates,
    }
}

pub(super) fn rescale(rates: &mut [f64], bandwidth: f64) {
    let factor = bandwidth / rates.iter().sum::<f64>();
    rates.iter_mut().for_each(|rate| *rate *= factor);
}

/// Where the pace 1/T must lie: T is at least ΣM/B, and at most ΣC/B. `None`: nothing to send.
pub(super) fn bracket(
    bandwidth: f64,
    curves: &[Curve],
) -> Result<Option<(f64, f64)>, AllocateError> {
    let unbounded = curves.iter().filter(|curve| curve.cap.is_infinite());
    let dirty: f64 = unbounded.map(|curve| curve.dirty_rate).sum();
    if dirty >= bandwidth {
        return Err(AllocateError::DoesNotConverge {
            dirty_bytes_per_s: dirty,
            bandwidth_bytes_per_s: bandwidth,
        });
    }
    let memory: f64 = curves.iter().map(|curve| curve.memory).sum();
    let cap: f64 = curves.iter().map(|curve| curve.cap).sum();
    Ok((memory > 0.0).then(|| (bandwidth / cap, bandwidth / memory)))
}

/// The pace at which Σ r = B: Newton's method, kept in the bracket by bisection.
fn common_pace(bandwidth: f64, curves: &[Curve]) -> Result<Option<f64>, AllocateError> {
    let Some((mut low, mut high)) = bracket(bandwidth, curves)? else {
        return Ok(None);
    };
    let dirty: f64 = curves.iter().map(|curve| curve.dirty_rate).sum();
    // Without a threshold and a cap this is the solution.
    let mut pace = high * (1.0 - dirty / bandwidth);
    let mut error_before = f64::INFINITY;
    for _ in 0..200 {
        if !(pace > low && pace < high) {
            pace = f64::midpoint(low, high);
        }
        let (rate, slope) = curves.iter().fold((0.0, 0.0), |(rate, slope), curve| {
            let (r, s) = curve.rate(pace);
            (rate + r, slope + s)
        });
        let error = rate - bandwidth;
        if error < 0.0 {
            low = pace;
        } else {
            high = pace;
        }
        let newton = pace - error / slope;
        let next = if error.abs() <= error_before / 2.0 && newton.is_finite() {
            newton
        } else {
            f64::midpoint(low, high)
        };
        error_before = error.abs();
        if (next - pace).abs() <= pace * 1e-15 || error == 0.0 {
            return Ok(Some(next.clamp(low, high)));
        }
        pace = next;
    }
    Ok(Some(pace.clamp(low, high)))
}

#[cfg(test)]
pub(super) mod tests;
