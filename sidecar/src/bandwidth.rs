//! The rate of a path, from samples of what a probe's destination has acknowledged.
//!
//! TCP begins slowly: only the second half of the time counts. Whether the rate still grew is told
//! by comparing the last two quarters.

/// Samples are at least so far apart, in microseconds.
const STEP_US: u64 = 1000;
/// The last quarter may be faster than the one before by this factor, which settled rates differ by.
const SETTLED_FACTOR: f64 = 1.25;

/// Bytes acknowledged by a time, both from the probe's begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sample {
    at_us: u64,
    bytes: u64,
}

/// The samples of a probe, in the order of time.
#[derive(Debug, Default, Clone)]
pub struct Samples {
    samples: Vec<Sample>,
}

/// What they say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathRate {
    /// The rate without slow start, in bytes per second.
    pub bytes_per_s: u64,
    /// Whether it had stopped to grow.
    pub settled: bool,
}

impl Samples {
    /// Adds one; one that is too near to the one before replaces nothing and is left out.
    pub fn add(&mut self, at_us: u64, bytes: u64) {
        let is_late = |last: &Sample| at_us >= last.at_us.saturating_add(STEP_US);
        if self.samples.last().is_none_or(is_late) {
            self.samples.push(Sample { at_us, bytes });
        }
    }

    /// The rate until the last sample; `None` where nothing was acknowledged in the second half.
    #[must_use]
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at most 2^30 bytes in a millisecond"
    )]
    pub fn rate(&self) -> Option<PathRate> {
        let end = self.samples.last()?.at_us;
        let from = |quarter: u64| {
            let at_us = end / 4 * quarter;
            self.samples.partition_point(|sample| sample.at_us < at_us)
        };
        let between = |from: usize, to: usize| {
            let (from, to) = (self.samples.get(from)?, self.samples.get(to)?);
            let micros = to.at_us.checked_sub(from.at_us).filter(|us| *us > 0)?;
            let bytes = to.bytes.saturating_sub(from.bytes);
            Some(bytes as f64 * 1e6 / micros as f64)
        };
        let last = self.samples.len() - 1;
        // Of very few samples the half may be the last one itself.
        let middle = from(2).min(last.checked_sub(1)?);
        let rate = between(middle, last).filter(|rate| *rate >= 1.0)?;
        let quarters = between(middle, from(3)).zip(between(from(3), last));
        Some(PathRate {
            bytes_per_s: rate as u64,
            settled: quarters.is_some_and(|(before, after)| after <= before * SETTLED_FACTOR),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rate: impl Fn(u64) -> u64, duration_us: u64) -> Option<PathRate> {
        let mut samples = Samples::default();
        let mut bytes = 0;
        for at_us in (0..=duration_us).step_by(1000) {
            samples.add(at_us, bytes);
            bytes += rate(at_us) / 1000;
        }
        samples.rate()
    }

    #[test]
    fn slow_start_is_left_out() {
        // Doubles every 10 ms until it is at 50 MB/s, after 160 ms.
        let rate = |at_us: u64| 50_000_000u64 >> (16_u64.saturating_sub(at_us / 10_000));
        let found = of(rate, 500_000).expect("bytes");
        assert!(
            found.bytes_per_s.abs_diff(50_000_000) < 500_000,
            "{found:?}"
        );
        assert!(found.settled);
    }

    #[test]
    fn a_burst_at_the_beginning_is_left_out() {
        let rate = |at_us: u64| {
            if at_us < 50_000 {
                900_000_000
            } else {
                10_000_000
            }
        };
        let found = of(rate, 500_000).expect("bytes");
        assert!(
            found.bytes_per_s.abs_diff(10_000_000) < 100_000,
            "{found:?}"
        );
        assert!(found.settled);
    }

    #[test]
    fn a_rate_that_still_grows_is_not_settled() {
        let found = of(|at_us| 1_000_000 << (at_us / 50_000), 500_000).expect("bytes");
        assert!(!found.settled, "{found:?}");
    }

    #[test]
    fn nothing_acknowledged_is_no_rate() {
        assert_eq!(of(|_| 0, 500_000), None);
        // A peer that hangs after a while.
        assert_eq!(
            of(|at| if at < 100_000 { 1 << 20 } else { 0 }, 500_000),
            None
        );
        assert_eq!(Samples::default().rate(), None);
        let mut one = Samples::default();
        one.add(0, 0);
        assert_eq!(one.rate(), None);
        one.add(10, 5);
        assert_eq!(one.rate(), None);
        one.add(2000, 4000);
        assert_eq!(one.rate().map(|found| found.bytes_per_s), Some(2_000_000));
    }

    #[test]
    fn counters_that_go_back_do_no_harm() {
        let mut samples = Samples::default();
        for (at_us, bytes) in [(0, 9), (5000, u64::MAX), (9000, 0), (u64::MAX, 3)] {
            samples.add(at_us, bytes);
        }
        let _ = samples.rate();
    }
}
