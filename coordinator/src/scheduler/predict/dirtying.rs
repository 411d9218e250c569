//! D(w): how many distinct bytes a guest dirties in a window of `w` seconds.

use std::sync::Arc;

use crate::scheduler::bandwidth::{InputError, MAX_BYTES, check};

/// How a guest dirties its memory, or its disk.
#[derive(Debug, Clone, PartialEq)]
pub enum Dirtying {
    /// At a constant rate, until the whole working set is dirty: D(w) = min(d·w, W). VMbuddies'
    /// model (3.3.1), and a guest that sweeps through its memory.
    Sweep {
        /// d.
        rate_bytes_per_s: f64,
        /// W; infinite where nothing bounds it.
        working_set_bytes: f64,
    },
    /// Writes that hit a hot set at random: D(w) = H·(1 − e^(−d·w/H)).
    Uniform {
        /// d: pages written a second, in bytes.
        rate_bytes_per_s: f64,
        /// H.
        hot_set_bytes: f64,
    },
    /// Measured.
    Curve(Curve),
}

/// A measured D(w), linear between its points. Beyond the last one it goes on with its last slope,
/// up to the guest's size.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    tick_s: f64,
    bytes: Arc<[f64]>,
    size_bytes: f64,
}

impl Curve {
    /// D(0), D(tick), D(2·tick) …, as `dirtylog`'s `Footprint::curve` gives it times the page size;
    /// `size_bytes` is the guest's whole memory.
    ///
    /// # Errors
    /// It does not begin at 0, it falls, it has less than two points, or it exceeds the size.
    pub fn new(
        tick_s: f64,
        bytes: impl IntoIterator<Item = f64>,
        size_bytes: f64,
    ) -> Result<Self, InputError> {
        let expected = "a time above 0, up to 1e6 s";
        check(
            "the tick of a footprint",
            None,
            tick_s,
            1e-6..=1e6,
            expected,
        )?;
        let expected = "0 to 1e18 bytes";
        check(
            "the guest's size",
            None,
            size_bytes,
            0.0..=MAX_BYTES,
            expected,
        )?;
        let bytes: Arc<[f64]> = bytes.into_iter().collect();
        let mut before = 0.0;
        for &point in bytes.iter() {
            let expected = "a curve that begins at 0 and rises up to the guest's size";
            let range = before..=size_bytes;
            check("a point of a footprint", None, point, range, expected)?;
            before = point;
        }
        let first = bytes.first().copied().unwrap_or(f64::NAN);
        let expected = "0: nothing is dirtied in no time";
        check(
            "the footprint's first point",
            None,
            first,
            0.0..=0.0,
            expected,
        )?;
        #[allow(clippy::cast_precision_loss, reason = "a number of points")]
        let points = bytes.len() as f64;
        let expected = "a footprint of two points or more";
        let range = 2.0..=f64::INFINITY;
        check("the number of points", None, points, range, expected)?;
        Ok(Self {
            tick_s,
            bytes,
            size_bytes,
        })
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index, kept in the range of the points"
    )]
    fn at(&self, window_s: f64) -> f64 {
        let last = self.bytes.len() - 1;
        let ticks = window_s / self.tick_s;
        let below = (ticks.floor() as usize).min(last - 1);
        let (a, b) = (self.bytes[below], self.bytes[below + 1]);
        (a + (b - a) * (ticks - below as f64)).min(self.size_bytes)
    }

    /// The window whose footprint is `dirty`; infinite if none is.
    #[allow(clippy::cast_precision_loss, reason = "a number of points")]
    fn window(&self, dirty: f64) -> f64 {
        let last = self.bytes.len() - 1;
        let below = self.bytes.partition_point(|&point| point <= dirty);
        let below = below.saturating_sub(1).min(last - 1);
        let (a, b) = (self.bytes[below], self.bytes[below + 1]);
        if dirty <= a {
            return below as f64 * self.tick_s;
        }
        if a == b || dirty >= self.size_bytes {
            return f64::INFINITY;
        }
        (below as f64 + (dirty - a) / (b - a)) * self.tick_s
    }
}

impl Dirtying {
    /// A guest that dirties nothing.
    pub const NONE: Self = Self::Sweep {
        rate_bytes_per_s: 0.0,
        working_set_bytes: 0.0,
    };

    /// Whether it makes sense, as VM `vm`'s.
    ///
    /// # Errors
    /// A value that does not.
    pub(crate) fn validate(&self, vm: Option<usize>) -> Result<(), InputError> {
        let (rate, set) = match *self {
            Self::Sweep {
                rate_bytes_per_s,
                working_set_bytes,
            } => {
                let is_bounded = working_set_bytes != f64::INFINITY;
                (
                    rate_bytes_per_s,
                    if is_bounded { working_set_bytes } else { 0.0 },
                )
            }
            Self::Uniform {
                rate_bytes_per_s,
                hot_set_bytes,
            } => (rate_bytes_per_s, hot_set_bytes),
            Self::Curve(_) => return Ok(()),
        };
        check("the dirty rate", vm, rate, 0.0..=MAX_BYTES, "0 to 1e18 B/s")?;
        check(
            "the working set",
            vm,
            set,
            0.0..=MAX_BYTES,
            "0 to 1e18 bytes",
        )
    }

    /// The most that can be dirty.
    #[must_use]
    pub fn set_bytes(&self) -> f64 {
        match self {
            &Self::Sweep {
                working_set_bytes: set,
                ..
            }
            | &Self::Uniform {
                hot_set_bytes: set, ..
            } => set,
            Self::Curve(curve) => curve.size_bytes,
        }
    }

    /// D(w) in bytes.
    #[must_use]
    pub fn dirtied(&self, window_s: f64) -> f64 {
        self.grown(0.0, window_s)
    }

    /// How much is dirty `window_s` after `dirty` bytes were: D(w₀ + w), where D(w₀) is what there
    /// is. Never less than there is.
    #[must_use]
    pub fn grown(&self, dirty: f64, window_s: f64) -> f64 {
        match self {
            &Self::Sweep {
                rate_bytes_per_s,
                working_set_bytes,
            } => (dirty + rate_bytes_per_s * window_s)
                .min(working_set_bytes)
                .max(dirty),
            &Self::Uniform {
                rate_bytes_per_s,
                hot_set_bytes,
            } => {
                if hot_set_bytes <= dirty {
                    return dirty;
                }
                let clean = hot_set_bytes - dirty;
                dirty - clean * (-rate_bytes_per_s * window_s / hot_set_bytes).exp_m1()
            }
            Self::Curve(curve) => {
                let before = curve.window(dirty);
                if before.is_finite() {
                    curve.at(before + window_s).max(dirty)
                } else {
                    dirty
                }
            }
        }
    }

    /// The highest dirty rate, D′(0) in bytes a second: what a guest dirties of which everything is
    /// clean, as at the end of pre-copy (COMMA 3.2.2, the maximal dirty rate of Eq. 3).
    #[must_use]
    pub fn max_rate_bytes_per_s(&self) -> f64 {
        match self {
            &Self::Sweep {
                rate_bytes_per_s,
                working_set_bytes: set,
            }
            | &Self::Uniform {
                rate_bytes_per_s,
                hot_set_bytes: set,
            } => {
                if set > 0.0 {
                    rate_bytes_per_s
                } else {
                    0.0
                }
            }
            Self::Curve(curve) => curve.bytes[1] / curve.tick_s,
        }
    }

    /// The mean dirty set at the end of a copy that takes `copy_s`, if pages are sent evenly over it,
    /// whatever they are written: each is dirty if it was written after it was sent, so it is the mean
    /// of D over windows of 0 to `copy_s`. To about 1e-4 of itself (Simpson's rule).
    ///
    /// COMMA's dirty set (4.6): "written and not-yet-migrated at the end of pre-copy". A sender that
    /// takes its bitmap once, before the copy, finds D(`copy_s`).
    #[must_use]
    pub fn after_copy_bytes(&self, copy_s: f64) -> f64 {
        const PARTS: u32 = 512;
        let at = |part| self.dirtied(copy_s * f64::from(part) / f64::from(PARTS));
        let inner = (1..PARTS).map(|part| at(part) * if part % 2 == 1 { 4.0 } else { 2.0 });
        (at(0) + inner.sum::<f64>() + at(PARTS)) / (3.0 * f64::from(PARTS))
    }
}

#[cfg(test)]
mod tests {
    use dirtylog::footprint::Footprint;
    use dirtylog::{PageSet, Pages};
    use proptest::prelude::*;

    use super::*;

    fn near(found: f64, expected: f64, tolerance: f64) {
        assert!(
            (found - expected).abs() <= tolerance * expected.abs().max(1e-9),
            "{found} {expected}"
        );
    }

    fn kinds() -> [Dirtying; 3] {
        [
            Dirtying::Sweep {
                rate_bytes_per_s: 10.0,
                working_set_bytes: 100.0,
            },
            Dirtying::Uniform {
                rate_bytes_per_s: 10.0,
                hot_set_bytes: 100.0,
            },
            Dirtying::Curve(Curve::new(2.0, [0.0, 20.0, 30.0, 35.0], 40.0).unwrap()),
        ]
    }

    #[test]
    fn examples() {
        let [sweep, uniform, curve] = kinds();
        assert_eq!(sweep.dirtied(4.0), 40.0);
        assert_eq!(sweep.dirtied(40.0), 100.0);
        assert_eq!(sweep.grown(120.0, 1.0), 120.0);
        near(
            uniform.dirtied(10.0),
            100.0 * (1.0 - (-1.0_f64).exp()),
            1e-12,
        );
        assert_eq!(
            [1.0, 3.0, 7.0, 8.0, 99.0].map(|w| curve.dirtied(w)),
            [10.0, 25.0, 37.5, 40.0, 40.0]
        );
        assert_eq!(curve.grown(25.0, 1.0), 30.0);
        assert_eq!(kinds().map(|kind| kind.max_rate_bytes_per_s()), [10.0; 3]);
        // The mean of min(10·w, 100) over 0 to 20 s, and of the exponential.
        near(sweep.after_copy_bytes(20.0), 75.0, 1e-4);
        near(
            uniform.after_copy_bytes(10.0),
            100.0 * (-1.0_f64).exp(),
            1e-9,
        );
        assert_eq!(Dirtying::NONE.after_copy_bytes(5.0), 0.0);
    }

    #[test]
    fn a_curve_that_is_none_is_refused() {
        assert!(Curve::new(1.0, [0.0], 1.0).is_err());
        assert!(Curve::new(1.0, [], 1.0).is_err());
        assert!(Curve::new(1.0, [1.0, 2.0], 5.0).is_err());
        assert!(Curve::new(1.0, [0.0, 2.0, 1.0], 5.0).is_err());
        assert!(Curve::new(1.0, [0.0, 6.0], 5.0).is_err());
        assert!(Curve::new(0.0, [0.0, 1.0], 5.0).is_err());
        let error = Curve::new(1.0, [0.0, f64::NAN], 5.0).unwrap_err();
        assert!(error.to_string().contains("begins at 0"), "{error}");
    }

    /// The estimator's curve of a guest that writes at random predicts what the model says.
    #[test]
    fn a_measured_footprint_is_the_model_of_the_guest() {
        const PAGES: u64 = 4096;
        const WRITES: u64 = 200; // a tick, over the first quarter of memory
        let mut footprint = Footprint::new(Pages(PAGES), 40);
        let mut random = 1_u64;
        for _ in 0..400 {
            let mut tick = PageSet::new(Pages(PAGES));
            for _ in 0..WRITES {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                tick.insert((random >> 33) % (PAGES / 4));
            }
            footprint.add(&tick).unwrap();
        }
        let curve = Curve::new(0.5, footprint.curve(), 4096.0).unwrap();
        let measured = Dirtying::Curve(curve);
        let model = Dirtying::Uniform {
            rate_bytes_per_s: 400.0,
            hot_set_bytes: 1024.0,
        };
        for window in [0.5, 1.0, 3.0, 10.0, 20.0] {
            near(measured.dirtied(window), model.dirtied(window), 0.01);
        }
        near(
            measured.after_copy_bytes(20.0),
            model.after_copy_bytes(20.0),
            0.01,
        );
    }

    proptest! {
        #[test]
        fn time_adds_up(kind in 0..3_usize, a in 0.0..20.0_f64, b in 0.0..20.0_f64) {
            let kind = &kinds()[kind];
            let (once, twice) = (kind.dirtied(a + b), kind.grown(kind.dirtied(a), b));
            prop_assert!((once - twice).abs() < 1e-9, "{once} {twice}");
            prop_assert!(kind.dirtied(a) <= once + 1e-9);
        }
    }
}
