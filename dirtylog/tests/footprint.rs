//! How well footprints are predicted: 65 536 pages, ticks of one second, 10 seconds ahead.
//!
//! The error is the mean absolute error over the mean footprint, for the predictions made at each
//! tick after a warm-up. `cargo test -p dirtylog --test footprint -- --nocapture` prints them.

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

type Trace = Box<dyn FnMut(u32) -> PageSet>;

fn tick(pages: impl Iterator<Item = u64>) -> PageSet {
    let mut set = PageSet::new(Pages(PAGES));
    pages.for_each(|page| {
        set.insert(page);
    });
    set
}

fn uniform() -> Trace {
    let mut random = Random(1);
    Box::new(move |_| tick((0..2000).map(|_| random.below(PAGES))))
}

fn zipf() -> Trace {
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

fn sweep() -> Trace {
    // Round and round through 8000 pages, 1000 a tick.
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

#[derive(Debug)]
struct Errors {
    mean: f64,
    phased: f64,
    linear: f64,
    next_write: f64,
}

#[allow(clippy::cast_precision_loss)]
fn errors(name: &str, mut trace: Trace, warm_up: u32, ticks: u32) -> Errors {
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
    println!(
        "{name:>16}: mean {:5.1} %  phased {:5.1} %  linear {:5.1} %  next write {:5.1} %",
        mean * 100.0,
        phased * 100.0,
        linear * 100.0,
        next_write * 100.0
    );
    Errors {
        mean,
        phased,
        linear,
        next_write,
    }
}

#[test]
fn stationary_traces_are_predicted_within_5_percent() {
    for (name, trace) in [("uniform", uniform()), ("zipf", zipf()), ("sweep", sweep())] {
        let errors = errors(name, trace, 100, 400);
        assert!(errors.mean <= 0.05, "{name}: {errors:?}");
        // Whoever does not know whether a guest has phases loses little by assuming it.
        assert!(errors.phased <= 0.05, "{name}: {errors:?}");
    }
}

#[test]
fn phases_of_30_seconds_are_predicted_within_25_percent() {
    let exact = errors("on-off 30 s", on_off(4, |_| 30), 180, 900);
    assert!(exact.phased <= 0.25, "{exact:?}");
    assert!(exact.phased < exact.mean / 2.0, "{exact:?}");
    assert!(
        exact.phased < exact.linear.min(exact.next_write),
        "{exact:?}"
    );

    let jitter = |random: &mut Random| 27 + u32::try_from(random.below(7)).unwrap();
    let jittered = errors("on-off 27-33 s", on_off(5, jitter), 300, 1200);
    assert!(jittered.phased <= 0.25, "{jittered:?}");
}

/// Not a promise but a warning: nobody can know when a random phase ends.
#[test]
fn random_phases_are_hard() {
    let random = |random: &mut Random| {
        let seconds = -30.0 * random.unit().max(1e-9).ln();
        (1..=300)
            .find(|&whole| f64::from(whole) >= seconds)
            .unwrap_or(300)
    };
    let errors = errors("on-off random", on_off(6, random), 300, 1200);
    assert!(errors.phased < errors.mean, "{errors:?}");
}
