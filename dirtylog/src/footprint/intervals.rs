//! Backward intervals, and the mean footprint that follows from them.

use crate::{PageSet, Pages, SizeMismatch, index};

/// When each page was dirtied last.
#[derive(Debug, Clone)]
pub(super) struct Intervals {
    /// The tick, counted from 1; 0: never.
    last: Vec<u32>,
    ticks: u32,
    /// How many pages had which interval in this tick; the last entry: that one or a longer one.
    counts: Vec<u32>,
    /// How many pages had an interval that exceeds `j`, by `j`.
    exceeding: Vec<u32>,
}

impl Intervals {
    pub(super) fn new(pages: Pages, horizon: usize) -> Self {
        Self {
            last: vec![0; index(pages.0)],
            ticks: 0,
            counts: vec![0; horizon + 1],
            exceeding: vec![0; horizon],
        }
    }

    pub(super) fn ticks(&self) -> u32 {
        self.ticks
    }

    /// Adds a tick: how many pages were dirtied in it whose backward interval exceeds `j`, for
    /// each `j` below the horizon of which that is known.
    pub(super) fn add(&mut self, dirtied: &PageSet) -> Result<&[u32], SizeMismatch> {
        let expected = Pages(self.last.len() as u64);
        if dirtied.pages() != expected {
            return Err(SizeMismatch {
                expected,
                found: dirtied.pages(),
            });
        }
        if self.ticks == u32::MAX {
            // After 13 years of ten ticks a second: begin anew.
            self.last.fill(0);
            self.ticks = 0;
        }
        self.ticks += 1;
        let horizon = self.exceeding.len();
        self.counts.fill(0);
        for run in dirtied.runs() {
            for last in &mut self.last[index(run.first)..index(run.end())] {
                let interval = index(u64::from(self.ticks - *last));
                // Never: longer than any that can be told yet.
                let interval = if *last == 0 { horizon } else { interval };
                self.counts[interval.min(horizon)] += 1;
                *last = self.ticks;
            }
        }
        let mut longer = 0;
        for j in (0..horizon).rev() {
            longer += self.counts[j + 1];
            self.exceeding[j] = longer;
        }
        let known = horizon.min(index(self.ticks.into()));
        Ok(&self.exceeding[..known])
    }
}

/// The mean footprint over all ticks seen. A tick costs O(dirtied pages + horizon).
#[derive(Debug, Clone)]
pub struct Footprint {
    intervals: Intervals,
    /// For each `j`: the sum over ticks `t ≥ j` of pages whose interval exceeds `j`.
    sums: Vec<u64>,
}

impl Footprint {
    /// For a guest of `pages`, and windows of up to `horizon` ticks.
    #[must_use]
    pub fn new(pages: Pages, horizon: usize) -> Self {
        Self {
            intervals: Intervals::new(pages, horizon),
            sums: vec![0; horizon],
        }
    }

    /// Adds a tick.
    ///
    /// # Errors
    /// The guest's size has changed: begin anew.
    pub fn add(&mut self, dirtied: &PageSet) -> Result<(), SizeMismatch> {
        let exceeding = self.intervals.add(dirtied)?;
        if exceeding.len() == 1 {
            self.sums.fill(0); // the first tick
        }
        for (sum, &pages) in self.sums.iter_mut().zip(exceeding) {
            *sum += u64::from(pages);
        }
        Ok(())
    }

    /// How many distinct pages a window of `ticks` will dirty, in the mean; `None` if not as many
    /// ticks were seen, or they exceed the horizon.
    #[must_use]
    pub fn predict(&self, ticks: usize) -> Option<f64> {
        self.curve().nth(ticks)
    }

    /// The footprint of 0, 1, 2 … ticks, as far as is known.
    #[allow(clippy::cast_precision_loss)]
    pub fn curve(&self) -> impl Iterator<Item = f64> {
        let seen = u64::from(self.intervals.ticks());
        let known = self.sums.iter().zip((1..=seen).rev());
        let steps = known.scan(0.0, |total, (&sum, ticks)| {
            *total += sum as f64 / ticks as f64;
            Some(*total)
        });
        std::iter::once(0.0).chain(steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tick(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(Pages(8));
        pages.iter().for_each(|&page| {
            set.insert(page);
        });
        set
    }

    /// What D(w) means: distinct pages, averaged over the windows seen.
    fn by_definition(trace: &[&[u64]], j: usize) -> f64 {
        // q(j), tick by tick: pages not dirtied in the j ticks before t.
        let new = |t: usize| {
            let before = &trace[t - j..t];
            let old = |page| before.iter().any(|tick| tick.contains(page));
            trace[t].iter().filter(|page| !old(*page)).count()
        };
        let ticks = j..trace.len();
        let sum: usize = ticks.clone().map(new).sum();
        f64::from(u32::try_from(sum).unwrap()) / f64::from(u32::try_from(ticks.len()).unwrap())
    }

    #[test]
    fn it_is_the_mean_of_what_windows_dirty() {
        let trace: [&[u64]; 7] = [&[0, 1], &[1], &[], &[0, 2, 7], &[7], &[1, 7], &[0]];
        let mut footprint = Footprint::new(Pages(8), 5);
        assert_eq!(
            (footprint.predict(0), footprint.predict(1)),
            (Some(0.0), None)
        );
        for pages in trace {
            footprint.add(&tick(pages)).unwrap();
        }
        let mut expected = 0.0;
        for w in 1..=5 {
            expected += by_definition(&trace, w - 1);
            let found = footprint.predict(w).unwrap();
            assert!((found - expected).abs() < 1e-12, "{w}: {found} {expected}");
        }
        assert_eq!(footprint.predict(6), None);
        assert!(footprint.add(&PageSet::new(Pages(9))).is_err());
    }

    #[test]
    fn a_tick_of_everything_is_never_exceeded() {
        let mut footprint = Footprint::new(Pages(8), 3);
        for _ in 0..10 {
            footprint.add(&tick(&[0, 1, 2, 3, 4, 5, 6, 7])).unwrap();
        }
        let curve: Vec<f64> = footprint.curve().collect();
        assert_eq!(curve, [0.0, 8.0, 8.0, 8.0]);
    }
}
