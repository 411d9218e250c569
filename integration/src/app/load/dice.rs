//! Numbers that are the same in every run (splitmix64).

use std::time::Duration;

#[derive(Debug)]
pub(super) struct Dice(pub(super) u64);

impl Dice {
    /// One of several that have nothing to do with each other.
    pub(super) fn of(seed: u64, number: u64) -> Self {
        let mut dice = Self(seed);
        let high = u64::from(dice.next()) << 32;
        Self((high | u64::from(dice.next())).wrapping_add(number << 20))
    }

    pub(super) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from((z ^ (z >> 31)) >> 32).unwrap_or(0)
    }

    /// From 0 to below 1.
    pub(super) fn roll(&mut self) -> f64 {
        f64::from(self.next()) / (f64::from(u32::MAX) + 1.0)
    }

    /// A time that is distributed exponentially with this mean.
    pub(super) fn exponential(&mut self, mean: Duration) -> Duration {
        mean.mul_f64(-(1.0 - self.roll()).ln())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn think_times_have_their_mean_and_are_the_same_for_a_seed() {
        let mean = Duration::from_millis(700);
        let times = |seed, number| {
            let mut dice = Dice::of(seed, number);
            let times = (0..20_000).map(move |_| dice.exponential(mean).as_secs_f64());
            times.collect::<Vec<_>>()
        };
        let all = times(1, 0);
        let found = all.iter().sum::<f64>() / 20_000.0;
        assert!((found - 0.7).abs() < 0.02, "{found}");
        // Of an exponential distribution 1/e are above the mean.
        let above = all.iter().filter(|time| **time > 0.7).count();
        assert!((7000..7700).contains(&above), "{above}");
        assert_eq!(all, times(1, 0));
        assert!(all != times(1, 1) && all != times(2, 0));
    }
}
