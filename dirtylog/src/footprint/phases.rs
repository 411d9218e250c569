//! Footprints of guests with phases: the past is asked what followed when it looked like now.

use std::collections::VecDeque;

use super::intervals::Intervals;
use crate::{PageSet, Pages, SizeMismatch};

/// How the past is remembered and compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Phases {
    /// How many ticks before a moment make its recent past. As long as the phases are, or longer:
    /// only then can their ends be foreseen.
    pub recent: usize,
    /// How many ticks are remembered: some of each phase, at least.
    pub memory: usize,
    /// How little two pasts must differ to count as alike: the root mean square difference of the
    /// logarithms of their ticks' dirtied pages. 0.1 is a difference of 10 %.
    pub likeness: f64,
}

impl Default for Phases {
    /// A minute of recent past out of twenty minutes, with ticks of a second.
    fn default() -> Self {
        Self {
            recent: 60,
            memory: 1200,
            likeness: 0.3,
        }
    }
}

/// What is remembered of a tick.
#[derive(Debug, Clone)]
struct Tick {
    /// ln(1 + dirtied pages).
    level: f64,
    /// Pages whose backward interval exceeds `j`, by `j`.
    exceeding: Box<[u32]>,
}

/// The footprint, averaged over past moments with weights: the more a moment's recent past
/// resembles the present one, the more it counts.
///
/// The window that began at tick `s` dirtied Σ_j (pages of tick `s + j` whose backward interval
/// exceeds `j`): the numbers that [`Footprint`](super::Footprint) averages over all ticks are kept
/// for each tick here. 4 bytes a page, and 4 · horizon bytes for each tick remembered.
#[derive(Debug, Clone)]
pub struct PhasedFootprint {
    intervals: Intervals,
    horizon: usize,
    phases: Phases,
    /// The latest ticks, oldest first.
    ticks: VecDeque<Tick>,
}

impl PhasedFootprint {
    /// For a guest of `pages`, and windows of up to `horizon` ticks.
    #[must_use]
    pub fn new(pages: Pages, horizon: usize, phases: Phases) -> Self {
        Self {
            intervals: Intervals::new(pages, horizon),
            horizon,
            phases,
            ticks: VecDeque::new(),
        }
    }

    /// Adds a tick.
    ///
    /// # Errors
    /// The guest's size has changed: begin anew.
    pub fn add(&mut self, dirtied: &PageSet) -> Result<(), SizeMismatch> {
        let exceeding = self.intervals.add(dirtied)?.into();
        if self.ticks.len() == self.phases.memory.max(1) {
            self.ticks.pop_front();
        }
        self.ticks.push_back(Tick {
            level: level(dirtied.count()),
            exceeding,
        });
        Ok(())
    }

    /// How many distinct pages the next `ticks` will dirty; `None` if too few ticks were seen, or
    /// they exceed the horizon.
    #[must_use]
    pub fn predict(&self, ticks: usize) -> Option<f64> {
        if ticks > self.horizon || ticks > self.ticks.len() {
            return None;
        }
        let weights = self.weights();
        (0..ticks).map(|j| self.step(&weights, j)).sum()
    }

    /// The weighted mean of what a window's tick `j` adds to it.
    fn step(&self, weights: &[f64], j: usize) -> Option<f64> {
        // The window that begins at tick `begin` has its tick `j` at `begin + j`.
        let ticks = self.ticks.iter().skip(j);
        let known = weights.iter().zip(ticks).filter_map(|(weight, tick)| {
            let pages = f64::from(*tick.exceeding.get(j)?);
            Some((weight, pages))
        });
        let (total, sum) = known.fold((0.0, 0.0), |(total, sum), (weight, pages)| {
            (total + weight, sum + weight * pages)
        });
        (total > 0.0).then(|| sum / total)
    }

    /// The weight of each moment that a remembered tick begins at.
    fn weights(&self) -> Vec<f64> {
        let recent = self.phases.recent;
        let levels: Vec<f64> = self.ticks.iter().map(|tick| tick.level).collect();
        let Some((past, present)) = levels
            .len()
            .checked_sub(recent)
            .map(|past| (past, &levels[past..]))
            .filter(|&(past, _)| past > 0)
        else {
            return vec![1.0; levels.len()]; // nothing can be compared yet
        };
        let pasts = levels.windows(recent).take(past);
        let distances: Vec<f64> = pasts.map(|before| distance(before, present)).collect();
        // The most alike moment counts fully, however unlike it is.
        let least = distances.iter().copied().fold(f64::INFINITY, f64::min);
        let scale = 2.0 * self.phases.likeness.powi(2).max(f64::MIN_POSITIVE);
        let likeness = |distance: f64| ((least - distance) / scale).exp();
        // The first `recent` ticks have no complete past. A little weight for every moment keeps
        // windows defined whose ends have not been seen from the most alike ones.
        let complete = distances.into_iter().map(likeness);
        let weights = std::iter::repeat_n(0.0, recent).chain(complete);
        weights.map(|weight| weight.max(1e-9)).collect()
    }
}

#[allow(clippy::cast_precision_loss)]
fn level(dirtied: Pages) -> f64 {
    (dirtied.0 as f64).ln_1p()
}

/// The mean square difference.
#[allow(clippy::cast_precision_loss)]
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| (a - b).powi(2));
    squares.sum::<f64>() / a.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_phase_is_foreseen() {
        let phases = Phases {
            recent: 6,
            memory: 100,
            ..Phases::default()
        };
        let mut footprint = PhasedFootprint::new(Pages(100), 4, phases);
        assert_eq!(footprint.predict(1), None);
        // Three ticks on, three off, over and over.
        for tick in 0..60 {
            let mut dirtied = PageSet::new(Pages(100));
            if tick / 3 % 2 == 0 {
                (0..50).for_each(|page| {
                    dirtied.insert(page);
                });
            }
            footprint.add(&dirtied).unwrap();
            if tick >= 30 {
                for w in 1..=4 {
                    let on = (tick + 1..=tick + w).any(|tick| tick / 3 % 2 == 0);
                    let expected = if on { 50.0 } else { 0.0 };
                    let found = footprint.predict(w).unwrap();
                    assert!((found - expected).abs() < 0.5, "{tick}+{w}: {found}");
                }
            }
        }
        assert_eq!(footprint.predict(5), None);
    }
}
