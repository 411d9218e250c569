//! Medians with their spread.

use serde::Serialize;

/// What a set of measurements says. Quantiles are values that were measured (nearest rank).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// How many.
    pub n: usize,
    /// The least.
    pub min: f64,
    /// A quarter is not above it.
    pub q1: f64,
    /// Half is not above it.
    pub median: f64,
    /// Three quarters are not above it.
    pub q3: f64,
    /// 95 % are not above it.
    pub p95: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// Of these values; nothing if there are none.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let rank = |percent: usize| {
            let at = (sorted.len() * percent).div_ceil(100).max(1) - 1;
            sorted.get(at).copied()
        };
        let even = sorted.len() % 2 == 0;
        let upper = sorted.get(sorted.len() / 2).copied()?;
        let median = if even {
            f64::midpoint(rank(50)?, upper)
        } else {
            upper
        };
        Some(Self {
            n: sorted.len(),
            min: rank(0)?,
            q1: rank(25)?,
            median,
            q3: rank(75)?,
            p95: rank(95)?,
            max: rank(100)?,
        })
    }
}

/// Between which of these values their median lies with a confidence of at least 95 %, whatever
/// their distribution (order statistics); nothing if they are too few to say.
#[must_use]
pub fn interval(values: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    // P(fewer than k of n are below the median), k rising, as long as both tails are under 5 %.
    let n = sorted.len();
    let mut term = 0.5_f64.powi(i32::try_from(n).ok()?);
    let (mut tail, mut k) = (term, 0);
    while 2.0 * tail <= 0.05 {
        k += 1;
        #[allow(clippy::cast_precision_loss, reason = "some dozens of values")]
        let next = (n + 1 - k) as f64 / k as f64;
        term *= next;
        tail += term;
    }
    let low = k.checked_sub(1)?;
    Some((*sorted.get(low)?, *sorted.get(n.checked_sub(k)?)?))
}

/// The median, or NaN of nothing.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    Spread::of(values).map_or(f64::NAN, |spread| spread.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_median_is_that_of_the_tables() {
        let values = |n: u32| (1..=n).map(f64::from).collect::<Vec<_>>();
        assert_eq!(interval(&values(20)), Some((6.0, 15.0)));
        assert_eq!(interval(&values(10)), Some((2.0, 9.0)));
        assert_eq!(interval(&values(6)), Some((1.0, 6.0)));
        assert_eq!(interval(&values(5)), None);
    }

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let values: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        let spread = Spread::of(&values).unwrap();
        assert_eq!(
            (spread.n, spread.min, spread.q1, spread.q3),
            (20, 1.0, 5.0, 15.0)
        );
        assert_eq!((spread.median, spread.p95, spread.max), (10.5, 19.0, 20.0));
        assert_eq!(Spread::of(&[3.0]).unwrap().median, 3.0);
        assert_eq!(Spread::of(&[]), None);
        assert!(median(&[f64::NAN]).is_nan());
    }
}
