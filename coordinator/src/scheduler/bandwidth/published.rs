//! Algorithm 2 of VMbuddies as printed, for comparison with the closed form.
//!
//! A line T = S + λ sweeps the curves upwards from S, the least time of any VM at the whole
//! bandwidth; λ is corrected by a quasi-secant (Eqs. 11 and 12) of the distance |Σr − B|. T(r) is
//! Eq. 5 with the rounds of Eq. 6 for r > d, and Eq. 8 else: not monotone at r = d, and with jumps.
//! So it need not settle: neither where a curve jumps, nor once λ has gone past the solution, as the
//! distance has lost its sign. The paper draws the first step at random; here it is given.

use super::closed_form::Allocation;
use super::curve::Curve;
use super::input::{AllocateError, Limits, VmLoad, check, check_all};
use super::rounds::{inverse_rate, whole_rounds};

/// What Algorithm 2 leaves open.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// q, the first step of λ, as a part of S. Above 0; the paper: random.
    pub first_step: f64,
    /// δ, as a part of the bandwidth: the distance at which it ends. Above 0.
    pub tolerance: f64,
    /// It is given up after so many steps of λ.
    pub max_iterations: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            first_step: 1e-3,
            tolerance: 1e-9,
            max_iterations: 1000,
        }
    }
}

/// Algorithm 2: a bandwidth for each VM, with a sum within δ of the whole.
///
/// # Errors
/// The input makes no sense, or it does not settle.
pub fn allocate(
    bandwidth_bytes_per_s: f64,
    vms: &[VmLoad],
    limits: &Limits,
    settings: &Settings,
) -> Result<Allocation, AllocateError> {
    check_all(bandwidth_bytes_per_s, vms, limits)?;
    let expected = "a part above 0, up to 1000";
    for (what, value) in [
        ("the first step", settings.first_step),
        ("the tolerance", settings.tolerance),
    ] {
        check(what, None, value, f64::MIN_POSITIVE..=1e3, expected)?;
    }
    let curves: Vec<Curve> = vms.iter().map(|vm| Curve::new(vm, limits)).collect();
    let times = curves
        .iter()
        .map(|curve| time(curve, bandwidth_bytes_per_s));
    let least = times.fold(f64::INFINITY, f64::min);
    let mut step = settings.first_step * least;
    let mut lambda = 0.0;
    let mut distance_before = None;
    for iterations in 1..=settings.max_iterations {
        let roots = curves.iter().map(|curve| root(curve, least + lambda));
        let Some(rates) = roots.collect::<Option<Vec<f64>>>() else {
            return Err(AllocateError::NotSettled { iterations });
        };
        let distance = (rates.iter().sum::<f64>() - bandwidth_bytes_per_s).abs();
        if distance <= settings.tolerance * bandwidth_bytes_per_s {
            return Ok(Allocation {
                completion_s: least + lambda,
                rates_bytes_per_s: rates,
            });
        }
        if let Some(before) = distance_before {
            step *= distance / (before - distance); // Eq. 12
        }
        distance_before = Some(distance);
        lambda += step;
        if !lambda.is_finite() {
            return Err(AllocateError::NotSettled { iterations });
        }
    }
    Err(AllocateError::NotSettled {
        iterations: settings.max_iterations,
    })
}

/// Eq. 5 with Eq. 6, or Eq. 8.
fn time(curve: &Curve, rate: f64) -> f64 {
    if rate <= curve.dirty_rate {
        return curve.cap / rate;
    }
    let q = curve.dirty_rate / rate;
    let rounds = rounds(curve, rate);
    let sum = (0..rounds).fold(1.0, |sum, _| sum * q + 1.0);
    curve.memory / rate * sum
}

fn rounds(curve: &Curve, rate: f64) -> u32 {
    if curve.dirty_rate == 0.0 || curve.memory == 0.0 {
        return 0;
    }
    whole_rounds(curve, rate)
}

/// Newton's method on f(r) = T, the rounds counted anew at each step. `None`: no root was found.
fn root(curve: &Curve, wanted: f64) -> Option<f64> {
    let mut rate = curve.dirty_rate + curve.memory / wanted;
    for _ in 0..100 {
        // The rounds of a rate, then the rate of these rounds, until they agree.
        let n = rounds(curve, rate);
        let next = 1.0 / inverse_rate(curve, n, wanted, 1.0 / rate);
        if next <= curve.dirty_rate {
            let capped = curve.cap / wanted;
            return (capped <= curve.dirty_rate).then_some(capped);
        }
        if rounds(curve, next) == n {
            return (next.is_finite() && next > 0.0).then_some(next);
        }
        rate = next;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::closed_form::tests::{tiers, vm};
    use super::*;

    #[test]
    fn it_agrees_with_the_closed_form_where_it_settles() {
        let limits = Limits::default();
        let all = allocate(60.0, &tiers(), &limits, &Settings::default()).unwrap();
        assert!((all.completion_s - 113.770_886_299).abs() < 1e-6, "{all:?}");
        let two = [vm(1000.0, 0.0, 1.0, None), vm(3000.0, 0.0, 1.0, None)];
        let all = allocate(100.0, &two, &limits, &Settings::default()).unwrap();
        assert!((all.completion_s - 40.0).abs() < 1e-6, "{all:?}");
        assert!((all.rates_bytes_per_s[1] - 75.0).abs() < 1e-6);
    }

    #[test]
    fn where_it_does_not_settle_it_says_so() {
        let far = Settings {
            first_step: 900.0,
            max_iterations: 50,
            ..Settings::default()
        };
        let error = allocate(60.0, &tiers(), &Limits::default(), &far).unwrap_err();
        assert!(matches!(error, AllocateError::NotSettled { .. }), "{error}");
        let bad = Settings {
            tolerance: f64::NAN,
            ..far
        };
        let error = allocate(60.0, &tiers(), &Limits::default(), &bad).unwrap_err();
        assert!(matches!(error, AllocateError::Input(_)), "{error}");
    }

    #[test]
    fn eq_5_and_eq_8_do_not_meet() {
        // What the closed form repairs: a higher rate takes longer.
        let curve = Curve::new(&tiers()[2], &Limits::default());
        assert!(time(&curve, 20.1) > time(&curve, 19.9));
        assert!(curve.time(20.1) < curve.time(19.9));
    }
}
