//! What segments amount to.

use super::segments::{Segment, Sensitivity, segments};

/// How a dirty rate behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pattern {
    /// One level.
    Steady {
        /// Its mean.
        rate_bytes_per_s: f64,
    },
    /// Two levels in turns of about the same length (VMbuddies, Figure 6 a).
    OnOff(OnOff),
    /// Neither: windows of fixed length (Figure 6 b).
    Irregular,
}

/// Two phases in turns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OnOff {
    /// The higher level.
    pub on_bytes_per_s: f64,
    /// The lower level.
    pub off_bytes_per_s: f64,
    /// How long the higher one lasts, in the mean.
    pub on_s: f64,
    /// How long the lower one lasts.
    pub off_s: f64,
    /// Whether the series ends in the higher one.
    pub is_on: bool,
    /// For how long it has then.
    pub elapsed_s: f64,
}

impl OnOff {
    /// When the present phase ends, from the end of the series; 0 if it is over time.
    #[must_use]
    pub fn next_change_s(&self) -> f64 {
        let length = if self.is_on { self.on_s } else { self.off_s };
        (length - self.elapsed_s).max(0.0)
    }
}

/// Lengths, and levels, of phases of one kind may differ by so much from their mean.
const REGULAR: f64 = 0.35;

impl Pattern {
    /// Of a series with a sample every `tick_s` seconds.
    #[must_use]
    pub fn of(series: &[f64], tick_s: f64, sensitivity: &Sensitivity) -> Self {
        let all = segments(series, sensitivity);
        match all[..] {
            [] => Self::Steady {
                rate_bytes_per_s: 0.0,
            },
            [only] => Self::Steady {
                rate_bytes_per_s: only.mean,
            },
            _ => on_off(&all, tick_s).map_or(Self::Irregular, Self::OnOff),
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "numbers of samples")]
fn on_off(all: &[Segment], tick_s: f64) -> Option<OnOff> {
    // The first and the last phase are cut off: their length says nothing.
    let [_, whole @ .., last] = all else {
        return None;
    };
    let middle = {
        let means = all.iter().map(|segment| segment.mean);
        f64::midpoint(
            means.clone().fold(f64::INFINITY, f64::min),
            means.fold(f64::NEG_INFINITY, f64::max),
        )
    };
    let is_on = |segment: &Segment| segment.mean > middle;
    if all
        .windows(2)
        .any(|pair| is_on(&pair[0]) == is_on(&pair[1]))
    {
        return None;
    }
    let level = |on| regular(all.iter().filter(|s| is_on(s) == on).map(|s| s.mean));
    let length = |on| {
        let lengths = whole.iter().filter(|s| is_on(s) == on);
        regular(lengths.map(|s| s.samples() as f64 * tick_s))
    };
    Some(OnOff {
        on_bytes_per_s: level(true)?,
        off_bytes_per_s: level(false)?,
        on_s: length(true)?,
        off_s: length(false)?,
        is_on: is_on(last),
        elapsed_s: last.samples() as f64 * tick_s,
    })
}

/// The mean of values that are all near it; of a level near 0 nothing is asked.
#[allow(clippy::cast_precision_loss, reason = "a number of phases")]
fn regular(values: impl Iterator<Item = f64> + Clone) -> Option<f64> {
    let count = values.clone().count();
    if count == 0 {
        return None;
    }
    let mean = values.clone().sum::<f64>() / count as f64;
    let mut values = values;
    values
        .all(|value| (value - mean).abs() <= REGULAR * mean.abs().max(1.0))
        .then_some(mean)
}

#[cfg(test)]
mod tests {
    use super::super::segments::tests::gauss;
    use super::*;

    fn of(series: &[f64]) -> Pattern {
        Pattern::of(series, 1.0, &Sensitivity::default())
    }

    /// VMbuddies' D&H: 30 s of heavy load, 30 s of light load, and so on.
    fn heavy_and_light(seconds: usize, noise: f64) -> Vec<f64> {
        let level = |second: usize| if second / 30 % 2 == 0 { 20e6 } else { 5e6 };
        let noisy = (0..seconds).map(level).zip(gauss(7));
        noisy.map(|(level, x)| level * (1.0 + noise * x)).collect()
    }

    #[test]
    fn on_and_off_are_found_in_noise() {
        let Pattern::OnOff(found) = of(&heavy_and_light(160, 0.15)) else {
            panic!("{:?}", of(&heavy_and_light(160, 0.15)));
        };
        assert!(
            (found.on_bytes_per_s / 20e6 - 1.0).abs() < 0.05,
            "{found:?}"
        );
        assert!(
            (found.off_bytes_per_s / 5e6 - 1.0).abs() < 0.05,
            "{found:?}"
        );
        assert!((found.on_s - 30.0).abs() <= 1.0 && (found.off_s - 30.0).abs() <= 1.0);
        assert!(!found.is_on, "{found:?}");
        assert!((found.next_change_s() - 20.0).abs() <= 2.0, "{found:?}");
    }

    #[test]
    fn what_is_not_on_and_off_is_not_taken_for_it() {
        let steady: Vec<f64> = gauss(1).take(100).map(|x| 1e6 * (10.0 + x)).collect();
        assert!(
            matches!(of(&steady), Pattern::Steady { rate_bytes_per_s } if (rate_bytes_per_s / 1e7 - 1.0).abs() < 0.05)
        );
        assert_eq!(
            of(&[]),
            Pattern::Steady {
                rate_bytes_per_s: 0.0
            }
        );
        // Two levels, of which neither was seen whole.
        assert_eq!(of(&heavy_and_light(45, 0.0)), Pattern::Irregular);
        // Waves (L&SW): 240 s up and down.
        let wave = |s: i32| 1e6 + 1e5 * f64::from((s % 240 - 120).abs());
        let waves: Vec<f64> = (0..960).map(wave).collect();
        assert_eq!(of(&waves), Pattern::Irregular);
        // Phases of no regular length.
        let lengths = [20, 5, 3, 40, 9, 80, 30];
        let ragged: Vec<f64> = lengths
            .iter()
            .enumerate()
            .flat_map(|(i, &n)| vec![if i % 2 == 0 { 1e6 } else { 9e6 }; n])
            .collect();
        assert_eq!(of(&ragged), Pattern::Irregular);
    }
}
