//! How far apart two moves must be: after one, the percentile in which service levels are judged
//! must come back first (Voorsluys et al.: "sufficiently spacing between migrations").

use std::time::Duration;

use serde::Serialize;

use super::load::{Action, Sample};
use super::sla::{Limit, limit_of};
use crate::clock::Micros;

/// The window is looked at so often.
const STEP: Duration = Duration::from_millis(500);
/// The percentile of the relaxed service level.
const PERCENT: usize = 90;
/// So near to what it was before counts as the same.
const NEAR: f64 = 1.1;

/// From a move's end to the moment from which on the 90th percentile over the window that ends then
/// is well; nothing where that was not seen to come.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spacing {
    /// Every action's is within its limit again, in seconds.
    pub within_limits_s: Option<f64>,
    /// That of all requests is at most a tenth above what it was before the move, in seconds.
    pub as_before_s: Option<f64>,
}

/// Of a move that took from `began` to `ended`; `samples` are what was watched, until `watched`.
#[must_use]
pub fn spacing(
    samples: &[Sample],
    (began, ended, watched): (Micros, Micros, Micros),
    limits: &[Limit],
    window: Duration,
) -> Spacing {
    let before = samples.iter().filter(|sample| sample.due < began);
    let before = percentile(before).unwrap_or(Duration::MAX);
    let inside = |end: Micros| {
        let from = end - window;
        samples.iter().filter(move |s| s.due >= from && s.due < end)
    };
    let within_limits = |end: Micros| {
        Action::USERS.into_iter().all(|action| {
            let own = inside(end).filter(|sample| sample.action == action);
            percentile(own).is_none_or(|time| time <= limit_of(action, limits))
        })
    };
    let as_before = |end: Micros| {
        percentile(inside(end))
            .is_some_and(|time| time.as_secs_f64() <= before.as_secs_f64() * NEAR)
    };
    Spacing {
        within_limits_s: well_from(ended, watched, within_limits),
        as_before_s: well_from(ended, watched, as_before),
    }
}

/// From when on it is well until the end of what was watched, in seconds after `ended`.
fn well_from(ended: Micros, watched: Micros, well: impl Fn(Micros) -> bool) -> Option<f64> {
    let mut found = None;
    let mut at = watched;
    while at >= ended && well(at) {
        found = Some(at.since(ended).as_secs_f64());
        at = at - STEP;
    }
    // Well at the first moment looked at is well at once.
    found.map(|seconds| {
        if seconds < STEP.as_secs_f64() {
            0.0
        } else {
            seconds
        }
    })
}

/// Nearest rank; nothing of nothing.
fn percentile<'a>(samples: impl Iterator<Item = &'a Sample>) -> Option<Duration> {
    let mut times: Vec<Duration> = samples.map(Sample::took).collect();
    times.sort_unstable();
    times
        .get((times.len() * PERCENT).div_ceil(100).max(1) - 1)
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::load::Ending;

    /// Ten a second for a minute; those due from 20 to 24 s take 3 s. The move ends at 24 s.
    fn minute() -> Vec<Sample> {
        let one = |number: u64| {
            let due = Micros(number * 100_000);
            let slow = (200..240).contains(&number);
            let took = Duration::from_millis(if slow { 3000 } else { 50 });
            Sample {
                action: Action::Home,
                due,
                done: due + took,
                ending: Ending::Answered,
            }
        };
        (0..600).map(one).collect()
    }

    fn watched(until: u64, limits: &[Limit]) -> Spacing {
        let at = |seconds: u64| Micros(seconds * 1_000_000);
        let moments = (at(20), at(24), at(until));
        spacing(&minute(), moments, limits, Duration::from_secs(10))
    }

    #[test]
    fn a_move_is_over_when_the_window_has_forgotten_it() {
        // At most 10 of the 100 in ten seconds may be slow: from 33 s on.
        let found = watched(60, &[]);
        assert_eq!(found.within_limits_s, Some(9.0), "{found:?}");
        assert_eq!(found.as_before_s, Some(9.0), "{found:?}");
    }

    #[test]
    fn what_violates_nothing_needs_no_spacing() {
        let limit = Limit {
            action: Action::Home,
            time: Duration::from_secs(4),
        };
        let found = watched(60, &[limit]);
        assert_eq!(found.within_limits_s, Some(0.0));
        assert_eq!(found.as_before_s, Some(9.0));
    }

    #[test]
    fn what_was_not_watched_long_enough_is_not_known() {
        let found = watched(30, &[]);
        assert_eq!((found.within_limits_s, found.as_before_s), (None, None));
    }
}
