//! When held VMs switch over, and how they share the bandwidth then (VMbuddies 3.1; COMMA 3.2.2).
//!
//! In wait-and-copy each held VM takes its dirty rate, and the laggards share the surplus:
//! [`wait_and_copy`]. All are released when what is left fits the downtime that is wanted:
//! [`Judge`]. Then they are paused at one instant, and their shares make all finish together:
//! [`stop_and_copy`].

use super::input::{AllocateError, MAX_BYTES, check, check_bandwidth};
use crate::capacity::Capacity;

pub use crate::capacity::{Demand, shares as wait_and_copy};

/// What one VM has to do while it is paused.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stop {
    /// R: dirty memory and device state left to send.
    pub remaining_bytes: f64,
    /// c: what its switchover takes beside sending.
    pub overhead_s: f64,
}

/// How a group switches over.
#[derive(Debug, Clone, PartialEq)]
pub struct StopAndCopy {
    /// D: from the common pause until the last VM runs at its destination.
    pub downtime_s: f64,
    /// Each VM's share.
    pub rates_bytes_per_s: Vec<f64>,
}

/// The shortest common downtime, and the shares that reach it: over the bandwidth and over every
/// cut Σ R/(D − c) is at most the rate, so b = R/(D − c).
///
/// Without overheads this is also how COMMA copies what does not change (Eq. 2): in proportion to
/// what there is.
///
/// # Errors
/// The input makes no sense.
#[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
pub fn stop_and_copy(capacity: &Capacity, stops: &[Stop]) -> Result<StopAndCopy, AllocateError> {
    for (index, stop) in stops.iter().enumerate() {
        let (bytes, overhead) = (stop.remaining_bytes, stop.overhead_s);
        let amount = "0 to 1e18 bytes";
        check("what is left", Some(index), bytes, 0.0..=MAX_BYTES, amount)?;
        let time = "0 to 1e6 s";
        check("the overhead", Some(index), overhead, 0.0..=1e6, time)?;
    }
    let everyone: Vec<usize> = (0..stops.len()).collect();
    let cuts = capacity.cuts.iter().map(|cut| (cut.rate, &cut.members));
    let mut downtime: f64 = 0.0;
    for (rate, members) in cuts.chain([(capacity.bandwidth, &everyone)]) {
        check_bandwidth(rate.0 as f64)?;
        let stops: Vec<Stop> = members.iter().map(|&vm| stops[vm]).collect();
        downtime = downtime.max(common_downtime(rate.0 as f64, &stops));
    }
    let share = |stop: &Stop| {
        if stop.remaining_bytes == 0.0 {
            0.0
        } else {
            stop.remaining_bytes / (downtime - stop.overhead_s)
        }
    };
    Ok(StopAndCopy {
        downtime_s: downtime,
        rates_bytes_per_s: stops.iter().map(share).collect(),
    })
}

/// Σ R/(D − c) = B by Newton's method from the left: convex and falling, so it never goes past.
fn common_downtime(bandwidth: f64, stops: &[Stop]) -> f64 {
    let alone = stops
        .iter()
        .map(|stop| stop.overhead_s + stop.remaining_bytes / bandwidth);
    let mut downtime = alone.fold(0.0, f64::max);
    for _ in 0..100 {
        let (mut sum, mut slope) = (0.0, 0.0);
        for stop in stops.iter().filter(|stop| stop.remaining_bytes > 0.0) {
            let time = downtime - stop.overhead_s;
            sum += stop.remaining_bytes / time;
            slope += stop.remaining_bytes / (time * time);
        }
        let step = (sum - bandwidth) / slope;
        // Where there is nothing to send it is 0/0.
        if !step.is_finite() || step <= downtime * 1e-15 {
            break;
        }
        downtime += step;
    }
    downtime
}

/// How long until what is left fits `max_downtime_s`, in seconds: t = (ΣR − B·D)/(B − Σd). 0 where
/// it fits, `None` where it never does.
#[must_use]
pub fn fits_in(
    remaining_bytes: f64,
    dirty_bytes_per_s: f64,
    bandwidth_bytes_per_s: f64,
    max_downtime_s: f64,
) -> Option<f64> {
    let excess = remaining_bytes - bandwidth_bytes_per_s * max_downtime_s;
    if excess <= 0.0 {
        return Some(0.0);
    }
    let surplus = bandwidth_bytes_per_s - dirty_bytes_per_s;
    (surplus > 0.0).then(|| excess / surplus)
}

/// When a held group is released.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// The downtime that is wanted.
    pub max_downtime_s: f64,
    /// The downtime that must not be exceeded.
    pub hard_downtime_s: f64,
    /// ε: the group does not converge if Σd ≥ (1 − ε)·B.
    pub epsilon: f64,
    /// K: in so many looks in a row.
    pub looks: u32,
    /// How long the best moment is looked for then.
    pub horizon_s: f64,
}

impl Default for Rule {
    fn default() -> Self {
        Self {
            max_downtime_s: 0.3,
            hard_downtime_s: 1.5,
            epsilon: 0.05,
            looks: 3,
            horizon_s: 10.0,
        }
    }
}

/// What to do with a held group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// Switch over now.
    Release,
    /// It gets less: it fits after so many seconds, as far as one can tell.
    Wait {
        /// The time.
        expected_s: Option<f64>,
    },
    /// The horizon is over, and no moment kept the hard limit: throttle, or give up.
    TooHot {
        /// The shortest downtime that there would have been.
        best_s: f64,
    },
}

/// Applies a [`Rule`] to one look after another.
#[derive(Debug, Clone)]
pub struct Judge {
    rule: Rule,
    hot: u32,
    /// Since when the best moment is looked for, and the downtime then.
    search: Option<(f64, f64)>,
}

/// What a group looks like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Look {
    /// When.
    pub now_s: f64,
    /// D, were it released now ([`stop_and_copy`]).
    pub downtime_s: f64,
    /// ΣR.
    pub remaining_bytes: f64,
    /// Σd.
    pub dirty_bytes_per_s: f64,
    /// B.
    pub bandwidth_bytes_per_s: f64,
}

impl Judge {
    /// Of a group that has just been held.
    #[must_use]
    pub fn new(rule: Rule) -> Self {
        Self {
            rule,
            hot: 0,
            search: None,
        }
    }

    /// What to do now. After [`Verdict::TooHot`] it begins anew.
    ///
    /// A group that does not converge is released at the best moment: the first half of the
    /// horizon shows how good one can be, the second takes one that is as good.
    pub fn look(&mut self, look: Look) -> Verdict {
        let rule = self.rule;
        if look.downtime_s <= rule.max_downtime_s {
            return Verdict::Release;
        }
        let is_hot = look.dirty_bytes_per_s >= (1.0 - rule.epsilon) * look.bandwidth_bytes_per_s;
        self.hot = if is_hot { self.hot + 1 } else { 0 };
        if self.hot >= rule.looks && self.search.is_none() {
            self.search = Some((look.now_s, f64::INFINITY));
        }
        let Some((since, best)) = &mut self.search else {
            return Verdict::Wait {
                expected_s: fits_in(
                    look.remaining_bytes,
                    look.dirty_bytes_per_s,
                    look.bandwidth_bytes_per_s,
                    rule.max_downtime_s,
                ),
            };
        };
        let elapsed = look.now_s - *since;
        let as_good = look.downtime_s <= *best;
        *best = best.min(look.downtime_s);
        if as_good && elapsed >= rule.horizon_s / 2.0 && look.downtime_s <= rule.hard_downtime_s {
            return Verdict::Release;
        }
        if elapsed < rule.horizon_s {
            return Verdict::Wait { expected_s: None };
        }
        let best_s = *best;
        if look.downtime_s <= rule.hard_downtime_s {
            return Verdict::Release;
        }
        *self = Self::new(rule);
        Verdict::TooHot { best_s }
    }
}

#[cfg(test)]
mod tests;
