//! Change points of a series: least squares with a penalty for each change, solved exactly (optimal
//! partitioning; Jackson et al. 2005).

/// Consecutive samples of about the same level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segment {
    /// Its first sample.
    pub first: usize,
    /// The first sample after it.
    pub end: usize,
    /// The mean of its samples.
    pub mean: f64,
}

impl Segment {
    /// How many samples it has.
    #[must_use]
    pub fn samples(&self) -> usize {
        self.end - self.first
    }
}

/// What counts as a change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sensitivity {
    /// Levels that differ by less than this part of the higher one are the same phase.
    pub least_change: f64,
    /// A phase has so many samples at least. One makes every peak a phase.
    pub least_samples: usize,
}

impl Default for Sensitivity {
    fn default() -> Self {
        Self {
            least_change: 0.25,
            least_samples: 2,
        }
    }
}

/// The segments of a series, in order and without gaps. Samples that are no numbers count as 0.
/// O(n²).
///
/// The noise is estimated from the differences of neighbours, of which a change makes few; single
/// peaks are taken out by a median of three.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "numbers of samples")]
pub fn segments(series: &[f64], sensitivity: &Sensitivity) -> Vec<Segment> {
    let n = series.len();
    let series: Vec<f64> = series
        .iter()
        .map(|x| if x.is_finite() { *x } else { 0.0 })
        .collect();
    if n == 0 {
        return Vec::new();
    }
    let least = sensitivity.least_samples.max(1);
    let smooth = median_of_three(&series, least);
    let mut sums = vec![(0.0, 0.0); n + 1];
    for (i, x) in smooth.iter().enumerate() {
        sums[i + 1] = (sums[i].0 + x, sums[i].1 + x * x);
    }
    // Σ (x − mean)² over first..end.
    let cost = |first: usize, end: usize| {
        let (sum, squares) = (sums[end].0 - sums[first].0, sums[end].1 - sums[first].1);
        (squares - sum * sum / (end - first) as f64).max(0.0)
    };
    let penalty = 10.0 * noise(&series).powi(2) * (n as f64).ln().max(1.0);
    // best[e]: least cost of the first e samples, and where their last segment begins.
    let mut best = vec![(f64::INFINITY, 0); n + 1];
    best[0] = (-penalty, 0);
    for end in least..=n {
        let firsts = std::iter::once(0).chain(least..=end - least);
        let costs = firsts.map(|first| (best[first].0 + cost(first, end) + penalty, first));
        if let Some(cheapest) = costs.min_by(|a, b| a.0.total_cmp(&b.0)) {
            best[end] = cheapest;
        }
    }
    let mut found = Vec::new();
    let mut end = n;
    while end > 0 {
        let first = best[end].1;
        found.push(segment(&series, first, end));
        end = first;
    }
    found.reverse();
    merge(&series, found, sensitivity.least_change)
}

/// VMbuddies 3.4: successive parts are combined if they differ too little, the most alike first.
fn merge(series: &[f64], mut all: Vec<Segment>, least_change: f64) -> Vec<Segment> {
    loop {
        let change = |pair: &[Segment]| {
            let (a, b) = (pair[0].mean.abs(), pair[1].mean.abs());
            let difference = (pair[0].mean - pair[1].mean).abs();
            if difference > 0.0 {
                difference / a.max(b)
            } else {
                0.0
            }
        };
        let changes = all.windows(2).map(change).enumerate();
        let Some((at, least)) = changes.min_by(|a, b| a.1.total_cmp(&b.1)) else {
            return all;
        };
        if least >= least_change {
            return all;
        }
        let next = all.remove(at + 1);
        all[at] = segment(series, all[at].first, next.end);
    }
}

#[allow(clippy::cast_precision_loss, reason = "a number of samples")]
fn segment(series: &[f64], first: usize, end: usize) -> Segment {
    Segment {
        first,
        end,
        mean: series[first..end].iter().sum::<f64>() / (end - first) as f64,
    }
}

/// Without peaks of one sample, unless those may be phases.
fn median_of_three(series: &[f64], least: usize) -> Vec<f64> {
    let mut smooth = series.to_vec();
    if least > 1 {
        for (window, out) in series.windows(3).zip(&mut smooth[1..]) {
            let (a, b, c) = (window[0], window[1], window[2]);
            *out = a.max(b).min(a.min(b).max(c));
        }
        // The ends have one neighbour; a peak there takes its value.
        let n = smooth.len();
        if n > 2 {
            smooth[0] = smooth[1];
            smooth[n - 1] = smooth[n - 2];
        }
    }
    smooth
}

/// The standard deviation of the noise: from the median of the absolute differences, and at least a
/// hundredth of the largest sample.
fn noise(series: &[f64]) -> f64 {
    let mut differences: Vec<f64> = series.windows(2).map(|w| (w[1] - w[0]).abs()).collect();
    differences.sort_by(f64::total_cmp);
    let median = differences
        .get(differences.len() / 2)
        .copied()
        .unwrap_or_default();
    let largest = series.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    // 0.6745: the median of |x| of a normal distribution; √2: of a difference of two.
    (median / (0.6745 * std::f64::consts::SQRT_2)).max(0.01 * largest)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Noise of mean 0 and standard deviation 1, the same for the same seed.
    pub(in crate::scheduler) fn gauss(seed: u64) -> impl Iterator<Item = f64> {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        std::iter::repeat_with(move || {
            let uniform = |state: &mut u64| {
                *state ^= *state << 13;
                *state ^= *state >> 7;
                *state ^= *state << 17;
                #[allow(clippy::cast_precision_loss)]
                let unit = (*state >> 11) as f64 / (1_u64 << 53) as f64;
                unit
            };
            (0..12).map(|_| uniform(&mut state)).sum::<f64>() - 6.0
        })
        .skip(10)
    }

    fn ends(series: &[f64]) -> Vec<usize> {
        let found = segments(series, &Sensitivity::default());
        found.iter().map(|segment| segment.end).collect()
    }

    #[test]
    fn levels_are_told_apart_and_peaks_are_not() {
        assert_eq!(ends(&[]), [0; 0]);
        assert_eq!(ends(&[5.0]), [1]);
        assert_eq!(ends(&[0.0; 10]), [10]);
        let steps = [[10.0; 8], [50.0; 8], [10.0; 8]].concat();
        assert_eq!(ends(&steps), [8, 16, 24]);
        let mut peaked = steps.clone();
        peaked[4] = 60.0;
        peaked[12] = f64::NAN;
        assert_eq!(ends(&peaked), [8, 16, 24]);
        let slight = [[10.0; 8], [12.0; 8]].concat();
        assert_eq!(ends(&slight), [16], "less than a quarter");
        let means: Vec<f64> = segments(&steps, &Sensitivity::default())
            .iter()
            .map(|segment| segment.mean)
            .collect();
        assert_eq!(means, [10.0, 50.0, 10.0]);
    }

    proptest! {
        // Noise can look like a change, and in a random series it did. The same series each time, so
        // that this test says something about the code.
        #![proptest_config(ProptestConfig {
            rng_seed: proptest::test_runner::RngSeed::Fixed(1),
            failure_persistence: None,
            cases: 2048,
            ..ProptestConfig::default()
        })]

        #[test]
        fn changes_are_found_in_noise_and_none_elsewhere(
            seed: u64,
            lengths in prop::collection::vec(10..40_usize, 1..8),
            low in 1e5..1e6_f64,
            factor in 2.5..20.0_f64,
            // As a part of the step.
            noise in 0.0..0.15_f64,
        ) {
            let mut series = Vec::new();
            let mut expected = Vec::new();
            let mut random = gauss(seed);
            for (index, &length) in lengths.iter().enumerate() {
                let level = if index % 2 == 0 { low } else { low * factor };
                let step = low * (factor - 1.0);
                series.extend(random.by_ref().take(length).map(|x| level + x * noise * step));
                expected.push(series.len());
            }
            let found = ends(&series);
            prop_assert_eq!(found.len(), expected.len(), "{:?} {:?}", found, expected);
            for (found, expected) in found.iter().zip(&expected) {
                prop_assert!(found.abs_diff(*expected) <= 2, "{found} {expected}");
            }
        }
    }
}
