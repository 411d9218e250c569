//! How a bandwidth is divided: pure functions, exact to the byte per second.

use std::time::Duration;

use crate::units::{Bytes, BytesPerSecond};

/// Shares of `total` in proportion to `weights`; their sum is exactly `total` (of no weights at
/// all there are no shares).
///
/// A weight that is negative or not finite counts as 0. If all are 0, the shares are equal. What
/// rounding leaves over goes to the largest fractions. Weights less than 2⁻⁴⁸ of the largest one
/// may get nothing.
#[must_use]
pub fn proportional(total: BytesPerSecond, weights: &[f64]) -> Vec<BytesPerSecond> {
    let usable = |weight: f64| {
        if weight.is_finite() {
            weight.max(0.0)
        } else {
            0.0
        }
    };
    let largest = weights.iter().copied().map(usable).fold(0.0, f64::max);
    let whole: Vec<u64> = weights
        .iter()
        .map(|&weight| fixed_point(usable(weight), largest))
        .collect();
    apportion(total, &whole)
}

/// Max-min fair shares of `total` (water-filling): nobody gets more than their demand, and what one
/// does not need goes in equal parts to those who need more. The sum is the smaller of `total` and
/// the sum of `demands`.
#[must_use]
pub fn max_min(total: BytesPerSecond, demands: &[BytesPerSecond]) -> Vec<BytesPerSecond> {
    let mut order: Vec<usize> = (0..demands.len()).collect();
    order.sort_by_key(|&index| demands[index]);
    let mut shares = vec![BytesPerSecond(0); demands.len()];
    let mut left = total.0;
    for (&index, takers) in order.iter().zip((1..=len(demands)).rev()) {
        let share = demands[index].0.min(left / takers);
        shares[index] = BytesPerSecond(share);
        left -= share;
    }
    shares
}

/// Finish-time-fair shares for the switchover of VMs that have `remaining` bytes each: all finish
/// at the same time, after D = ΣR / B. Returns D, rounded up to whole nanoseconds, and the shares
/// bᵢ = Rᵢ / D, whose sum is exactly `bandwidth`.
///
/// Shares are whole bytes per second; nobody with something remaining gets 0 as long as there is
/// 1 B/s for each. Nothing remaining: D is 0 and the shares are equal. No bandwidth, or a D that a
/// `Duration` cannot express: D is `Duration::MAX`.
#[must_use]
pub fn switchover_shares(
    bandwidth: BytesPerSecond,
    remaining: &[Bytes],
) -> (Duration, Vec<BytesPerSecond>) {
    let bytes: Vec<u64> = remaining.iter().map(|bytes| bytes.0).collect();
    let mut shares = apportion(bandwidth, &bytes);
    for index in 0..shares.len() {
        if bytes[index] > 0 && shares[index].0 == 0 {
            let richest = (0..shares.len()).max_by_key(|&index| shares[index]);
            if let Some(richest) = richest.filter(|&richest| shares[richest].0 > 1) {
                shares[richest].0 -= 1;
                shares[index].0 = 1;
            }
        }
    }
    (time_for_all(bandwidth, &bytes), shares)
}

fn time_for_all(bandwidth: BytesPerSecond, bytes: &[u64]) -> Duration {
    let sum: u128 = bytes.iter().copied().map(u128::from).sum();
    if sum == 0 {
        return Duration::ZERO;
    }
    if bandwidth.0 == 0 {
        return Duration::MAX;
    }
    let nanos = sum
        .saturating_mul(1_000_000_000)
        .div_ceil(u128::from(bandwidth.0));
    u64::try_from(nanos / 1_000_000_000).map_or(Duration::MAX, |seconds| {
        // The remainder is below 10^9 and fits.
        let rest = u32::try_from(nanos % 1_000_000_000).unwrap_or(0);
        Duration::new(seconds, rest)
    })
}

/// Divides `total` by `weights` with the largest-remainder method; equally if all are 0.
fn apportion(total: BytesPerSecond, weights: &[u64]) -> Vec<BytesPerSecond> {
    let sum: u128 = weights.iter().copied().map(u128::from).sum();
    if sum == 0 {
        return max_min(total, &vec![total; weights.len()]);
    }
    // Both factors have 64 bits: the product fits, and the share is at most `total`.
    let exact = |weight: u64| u128::from(total.0) * u128::from(weight);
    let mut shares: Vec<u64> = weights
        .iter()
        .map(|&weight| u64::try_from(exact(weight) / sum).unwrap_or(total.0))
        .collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(exact(weights[index]) % sum));
    let mut left = total.0 - shares.iter().sum::<u64>();
    for index in order {
        if left == 0 {
            break;
        }
        shares[index] += 1;
        left -= 1;
    }
    shares.into_iter().map(BytesPerSecond).collect()
}

/// `weight / largest` in steps of 2⁻⁴⁸.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a quotient of 0..=1 times 2^48"
)]
fn fixed_point(weight: f64, largest: f64) -> u64 {
    if largest <= 0.0 {
        return 0;
    }
    (weight / largest * (1_u64 << 48) as f64).round() as u64
}

fn len<T>(slice: &[T]) -> u64 {
    u64::try_from(slice.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rates(shares: &[BytesPerSecond]) -> Vec<u64> {
        shares.iter().map(|share| share.0).collect()
    }

    fn sum(shares: &[BytesPerSecond]) -> u128 {
        shares.iter().map(|share| u128::from(share.0)).sum()
    }

    #[test]
    fn proportional_examples() {
        let total = BytesPerSecond(100);
        assert_eq!(rates(&proportional(total, &[1.0, 3.0])), [25, 75]);
        assert_eq!(rates(&proportional(total, &[1.0, 1.0, 1.0])), [34, 33, 33]);
        assert_eq!(rates(&proportional(total, &[0.0, 0.0])), [50, 50]);
        assert_eq!(
            rates(&proportional(total, &[f64::NAN, 2.0, -1.0])),
            [0, 100, 0]
        );
        assert_eq!(rates(&proportional(total, &[1e-310, 2e-310])), [33, 67]);
        assert!(proportional(total, &[]).is_empty());
    }

    #[test]
    fn max_min_examples() {
        let total = BytesPerSecond(50);
        let fill = |demands: &[u64]| {
            let demands: Vec<_> = demands.iter().copied().map(BytesPerSecond).collect();
            rates(&max_min(total, &demands))
        };
        assert_eq!(fill(&[10, 40, 40]), [10, 20, 20]);
        assert_eq!(fill(&[40, 10, u64::MAX]), [20, 10, 20]);
        assert_eq!(fill(&[1, 2, 3]), [1, 2, 3]);
        assert!(fill(&[]).is_empty());
    }

    #[test]
    fn switchover_examples() {
        let all = |bandwidth, remaining: &[u64]| {
            let remaining: Vec<_> = remaining.iter().copied().map(Bytes).collect();
            let (time, shares) = switchover_shares(BytesPerSecond(bandwidth), &remaining);
            (time, rates(&shares))
        };
        assert_eq!(
            all(50_000_000, &[3_000_000, 2_000_000]),
            (Duration::from_millis(100), vec![30_000_000, 20_000_000])
        );
        assert_eq!(all(10, &[0, 0]), (Duration::ZERO, vec![5, 5]));
        assert_eq!(all(0, &[1]), (Duration::MAX, vec![0]));
        let (time, shares) = all(1_000, &[1_000_000_000_000, 1]);
        assert_eq!(shares, [999, 1], "a share of 0 would never finish");
        assert_eq!(time, Duration::new(1_000_000_000, 1_000_000));
    }

    proptest! {
        #[test]
        fn proportional_is_exact(
            total: u64,
            weights in prop::collection::vec(0.0..1e9_f64, 1..20),
        ) {
            let shares = proportional(BytesPerSecond(total), &weights);
            prop_assert_eq!(sum(&shares), u128::from(total));
            let all: f64 = weights.iter().sum();
            for (share, weight) in shares.iter().zip(&weights) {
                if all > 0.0 {
                    let exact = total as f64 * weight / all;
                    let error = (share.0 as f64 - exact).abs();
                    prop_assert!(error <= 1.0 + total as f64 * 1e-12, "{share:?} {exact}");
                }
            }
        }

        #[test]
        fn max_min_fills_from_below(total: u64, demands in prop::collection::vec(any::<u64>(), 1..20)) {
            let demands: Vec<_> = demands.into_iter().map(BytesPerSecond).collect();
            let shares = max_min(BytesPerSecond(total), &demands);
            prop_assert_eq!(sum(&shares), u128::from(total).min(sum(&demands)));
            let most = shares.iter().max().unwrap().0;
            for (share, demand) in shares.iter().zip(&demands) {
                prop_assert!(share <= demand);
                // Whoever wants more has as much as anybody, up to the indivisible byte.
                prop_assert!(share == demand || share.0 + 1 >= most);
            }
        }

        #[test]
        fn all_finish_together(
            bandwidth in 1_000_000..1_000_000_000_u64,
            remaining in prop::collection::vec(0..100_000_000_u64, 1..20),
        ) {
            let remaining: Vec<_> = remaining.into_iter().map(Bytes).collect();
            let (time, shares) = switchover_shares(BytesPerSecond(bandwidth), &remaining);
            prop_assert_eq!(sum(&shares), u128::from(bandwidth));
            for (share, bytes) in shares.iter().zip(&remaining) {
                if bytes.0 > 0 {
                    let took = bytes.0 as f64 / share.0 as f64;
                    let slack = 1.0 + 2.0 / share.0 as f64;
                    prop_assert!(took <= time.as_secs_f64() * slack + 1e-6, "{took} {time:?}");
                }
            }
        }
    }
}
