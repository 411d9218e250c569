//! Traces of known shape (65 536 pages, ticks of one second), and how well their footprints are
//! predicted 10 seconds ahead. Shared with the testbed's benchmark.
//!
//! The error is the mean absolute error over the mean footprint, for the predictions made at each
//! tick after a warm-up.

use std::collections::VecDeque;

use dirtylog::footprint::{Footprint, NextWrite, PhasedFootprint, Phases};
use dirtylog::{PageSet, Pages};

const PAGES: u64 = 65_536;
const AHEAD: usize = 10;
const HORIZON: usize = 60;

/// xorshift64*: reproducible.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64)
            .try_into()
            .unwrap()
    }

    fn unit(&mut self) -> f64 {
        f64::from(u32::try_from(self.next() >> 32).unwrap()) / f64::from(u32::MAX)
    }
}

/// The pages that are dirtied in each tick.
pub type Trace = Box<dyn FnMut(u32) -> PageSet>;

fn tick(pages: impl Iterator<Item = u64>) -> PageSet {
    let mut set = PageSet::new(Pages(PAGES));
    pages.for_each(|page| {
        set.insert(page);
    });
    set
}

/// 2000 writes a tick, anywhere.
pub fn uniform() -> Trace {
    let mut random = Random(1);
    Box::new(move |_| tick((0..2000).map(|_| random.below(PAGES))))
}

/// 4000 writes a tick: the page of rank r is r times rarer than the first.
pub fn zipf() -> Trace {
    let mut random = Random(2);
    let mut total = 0.0;
    let weights = (1..=PAGES).map(|rank| {
        total += 1.0 / f64::from(u32::try_from(rank).unwrap());
        total
    });
    let cumulated: Vec<f64> = weights.collect();
    Box::new(move |_| {
        tick((0..4000).map(|_| {
            let at = random.unit() * total;
            let rank = cumulated.partition_point(|&sum| sum < at) as u64;
            rank.min(PAGES - 1) * 40_503 % PAGES // scattered over memory
        }))
    })
}

/// Round and round through 8000 pages, 1000 a tick.
pub fn sweep() -> Trace {
    Box::new(|now| tick((0..1000).map(move |i| (u64::from(now) * 1000 + i) % 8000)))
}

/// Busy and idle by turns; `dwell` gives the length of the next phase.
fn on_off(seed: u64, mut dwell: impl FnMut(&mut Random) -> u32 + 'static) -> Trace {
    let mut random = Random(seed);
    let (mut on, mut left) = (false, 0);
    Box::new(move |_| {
        if left == 0 {
            on = !on;
            left = dwell(&mut random).max(1);
        }
        left -= 1;
        let writes = if on { 2000 } else { 50 };
        tick((0..writes).map(|_| random.below(16_384)))
    })
}

/// Busy and idle for 30 ticks each.
pub fn phases() -> Trace {
    on_off(4, |_| 30)
}

/// The same for 27 to 33 ticks.
pub fn jittered_phases() -> Trace {
    on_off(5, |random| 27 + u32::try_from(random.below(7)).unwrap())
}

/// Exponentially distributed phases of 30 ticks on average.
pub fn random_phases() -> Trace {
    on_off(6, |random| {
        let seconds = -30.0 * random.unit().max(1e-9).ln();
        (1..=300)
            .find(|&whole| f64::from(whole) >= seconds)
            .unwrap_or(300)
    })
}

/// Relative errors of the predictions.
#[derive(Debug)]
pub struct Errors {
    /// `Footprint`.
    pub mean: f64,
    /// `PhasedFootprint`.
    pub phased: f64,
    /// The present rate times the delay.
    pub linear: f64,
    /// `NextWrite`.
    pub next_write: f64,
}

/// Follows a trace and predicts the footprint of the next 10 ticks after each tick of `ticks`, once
/// `warm_up` are over.
#[allow(clippy::cast_precision_loss, reason = "some thousands of pages")]
pub fn errors(mut trace: Trace, warm_up: u32, ticks: u32) -> Errors {
    let mut mean = Footprint::new(Pages(PAGES), HORIZON);
    let mut phased = PhasedFootprint::new(Pages(PAGES), HORIZON, Phases::default());
    let mut next_write = NextWrite::new(Pages(PAGES));
    let mut latest: VecDeque<PageSet> = VecDeque::new();
    let mut open: VecDeque<[f64; 4]> = VecDeque::new();
    let (mut sums, mut total) = ([0.0; 4], 0.0);
    for now in 0..ticks {
        let dirtied = trace(now);
        mean.add(&dirtied).unwrap();
        phased.add(&dirtied).unwrap();
        next_write.add(&dirtied).unwrap();
        let rate = dirtied.count().0 as f64;
        latest.push_back(dirtied);
        if latest.len() > AHEAD {
            latest.pop_front();
        }
        if open.len() == AHEAD {
            // What was predicted before these ten ticks.
            let mut union = PageSet::new(Pages(PAGES));
            for tick in &latest {
                union.union_with(tick).unwrap();
            }
            let actual = union.count().0 as f64;
            let predicted = open.pop_front().unwrap();
            for (sum, predicted) in sums.iter_mut().zip(predicted) {
                *sum += (predicted - actual).abs();
            }
            total += actual;
        }
        if now >= warm_up {
            open.push_back([
                mean.predict(AHEAD).unwrap(),
                phased.predict(AHEAD).unwrap(),
                rate * AHEAD as f64,
                next_write.predict(10).0 as f64,
            ]);
        }
    }
    let [mean, phased, linear, next_write] = sums.map(|sum| sum / total);
    Errors {
        mean,
        phased,
        linear,
        next_write,
    }
}
