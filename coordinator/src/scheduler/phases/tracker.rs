//! A dirty rate while it is measured: whether its phase has changed.

/// What a [`Tracker`] takes for a change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrackerSettings {
    /// A sample is off if it differs by more than this part of the phase's mean …
    pub least_change: f64,
    /// … and by more than so many standard deviations.
    pub deviations: f64,
    /// So many samples in a row that are off, all above or all below, begin a phase.
    pub confirmations: usize,
    /// Without a change, the rate is taken anew after this time (VMbuddies' window, Figure 16).
    pub window_s: f64,
}

impl Default for TrackerSettings {
    fn default() -> Self {
        Self {
            least_change: 0.25,
            deviations: 4.0,
            confirmations: 2,
            window_s: 30.0,
        }
    }
}

/// Why a rate is to be used anew.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Change {
    /// Another phase has begun.
    Phase {
        /// Its rate, as far as it has been seen.
        rate_bytes_per_s: f64,
    },
    /// A window is over.
    Window {
        /// The mean over it.
        rate_bytes_per_s: f64,
    },
}

/// Follows one VM's dirty rate.
#[derive(Debug, Clone)]
pub struct Tracker {
    settings: TrackerSettings,
    phase: Mean,
    window: Mean,
    window_began_s: f64,
    /// Samples off the phase, all on one side.
    off: Vec<f64>,
}

impl Tracker {
    /// Begins at `now_s`.
    #[must_use]
    pub fn new(now_s: f64, settings: TrackerSettings) -> Self {
        Self {
            settings,
            phase: Mean::default(),
            window: Mean::default(),
            window_began_s: now_s,
            off: Vec::new(),
        }
    }

    /// The present phase's rate; 0 before the first sample.
    #[must_use]
    pub fn rate_bytes_per_s(&self) -> f64 {
        self.phase.mean
    }

    /// Takes a sample. One that is negative or no number is left out. The first one is a change.
    pub fn add(&mut self, now_s: f64, rate_bytes_per_s: f64) -> Option<Change> {
        if !(rate_bytes_per_s >= 0.0 && rate_bytes_per_s.is_finite()) {
            return None;
        }
        self.window.add(rate_bytes_per_s);
        if self.phase.count == 0 {
            return Some(self.begin(now_s, &[rate_bytes_per_s]));
        }
        if self.is_off(rate_bytes_per_s) {
            let is_above = rate_bytes_per_s > self.phase.mean;
            let mean = self.phase.mean;
            self.off.retain(|&sample| (sample > mean) == is_above);
            self.off.push(rate_bytes_per_s);
            if self.off.len() >= self.settings.confirmations.max(1) {
                let off = std::mem::take(&mut self.off);
                return Some(self.begin(now_s, &off));
            }
        } else {
            self.off.clear();
            self.phase.add(rate_bytes_per_s);
        }
        if now_s - self.window_began_s < self.settings.window_s {
            return None;
        }
        // A phase that has drifted goes on with the window's level.
        let rate = self.window.mean;
        self.phase = std::mem::take(&mut self.window);
        self.window_began_s = now_s;
        Some(Change::Window {
            rate_bytes_per_s: rate,
        })
    }

    fn begin(&mut self, now_s: f64, samples: &[f64]) -> Change {
        self.phase = Mean::default();
        self.window = Mean::default();
        for &sample in samples {
            self.phase.add(sample);
            self.window.add(sample);
        }
        self.window_began_s = now_s;
        Change::Phase {
            rate_bytes_per_s: self.phase.mean,
        }
    }

    fn is_off(&self, sample: f64) -> bool {
        let distance = (sample - self.phase.mean).abs();
        let least = self.settings.least_change * self.phase.mean;
        distance > least.max(self.settings.deviations * self.phase.deviation())
    }
}

/// Mean and deviation of what was seen (Welford).
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    count: u32,
    mean: f64,
    squares: f64,
}

impl Mean {
    fn add(&mut self, sample: f64) {
        self.count = self.count.saturating_add(1);
        let off = sample - self.mean;
        self.mean += off / f64::from(self.count);
        self.squares += off * (sample - self.mean);
    }

    fn deviation(&self) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        (self.squares / f64::from(self.count - 1)).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::super::segments::tests::gauss;
    use super::*;

    fn phases(samples: &[f64]) -> Vec<(usize, Change)> {
        let settings = TrackerSettings {
            window_s: 1e9,
            ..TrackerSettings::default()
        };
        let mut tracker = Tracker::new(0.0, settings);
        let changes = (0_u32..).zip(samples).enumerate();
        changes
            .filter_map(|(at, (now, &rate))| Some((at, tracker.add(f64::from(now), rate)?)))
            .collect()
    }

    #[test]
    fn a_phase_is_noticed_with_its_second_sample_and_a_peak_is_not() {
        let samples = [[10.0; 5], [30.0; 5], [10.0; 5]].concat();
        let phase = |rate_bytes_per_s| Change::Phase { rate_bytes_per_s };
        let expected = [(0, phase(10.0)), (6, phase(30.0)), (11, phase(10.0))];
        assert_eq!(phases(&samples), expected);
        let mut peaks = samples.clone();
        peaks[2] = 90.0;
        peaks[4] = 0.0;
        peaks[8] = f64::NAN;
        assert_eq!(phases(&peaks), expected);
    }

    #[test]
    fn noise_is_no_change() {
        let noisy: Vec<f64> = gauss(3).take(500).map(|x| 100.0 + 15.0 * x).collect();
        // The first samples say little about the noise; after them there must be nothing.
        assert!(
            phases(&noisy).iter().all(|&(at, _)| at < 10),
            "{:?}",
            phases(&noisy)
        );
    }

    #[test]
    fn windows_end_where_no_phase_does() {
        let settings = TrackerSettings {
            window_s: 10.0,
            ..TrackerSettings::default()
        };
        let mut tracker = Tracker::new(0.0, settings);
        let mut windows = Vec::new();
        for second in 1..=30 {
            let now = f64::from(second);
            // A slow drift.
            if let Some(Change::Window { rate_bytes_per_s }) = tracker.add(now, 100.0 + now) {
                windows.push((now, rate_bytes_per_s));
            }
        }
        // The first window began with the first sample, at 1.
        assert_eq!(windows, [(11.0, 106.0), (21.0, 116.5)]);
        assert!((tracker.rate_bytes_per_s() - 121.0).abs() < 1.0 + 9.0);
    }
}
