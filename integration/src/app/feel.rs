//! What the users felt of one move, in figures.

use std::num::TryFromIntError;
use std::time::Duration;

use coordinator::MoveReport;
use serde::Serialize;

use super::load::{Ending, Sample};
use crate::bench::stats::median;
use crate::clock::Micros;

/// A second in which the mean response time is so many times its median before counts as degraded.
pub const DEGRADED: f64 = 2.0;

/// One second of requests.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Second {
    /// When it begins, in seconds after the move began; negative before it.
    pub at_s: i64,
    /// Requests that were due in it.
    pub due: u32,
    /// Requests that were answered in it.
    pub answered: u32,
    /// Requests due in it that failed.
    pub failed: u32,
    /// Mean response time of those due in it, in milliseconds.
    pub mean_ms: f64,
    /// Their greatest.
    pub max_ms: f64,
}

/// What the users felt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Feel {
    /// Requests watched.
    pub requests: usize,
    /// Those that were answered with an error.
    pub refused: usize,
    /// Those whose connection broke.
    pub lost: usize,
    /// Median of the seconds' mean response times before the move, in milliseconds.
    pub before_ms: f64,
    /// The 95th percentile before the move, in milliseconds.
    pub before_p95_ms: f64,
    /// The same of requests due in pre-copy: from the move's beginning to the first STOP.
    pub precopy_p95_ms: f64,
    /// Mean response time of requests due during the move, in milliseconds.
    pub during_ms: f64,
    /// Their 99th percentile (nearest rank).
    pub during_p99_ms: f64,
    /// The same mean after the move.
    pub after_ms: f64,
    /// `during_ms` by `before_ms`.
    pub slowdown: f64,
    /// The longest time without an answer from the application, from a second before the move on.
    pub longest_gap_s: f64,
    /// Seconds from the move's beginning on whose mean is above twice the median before.
    pub degraded_s: u32,
    /// Of these, seconds in which no VM was stopped: what the downtime does not explain.
    pub degraded_beyond_s: u32,
    /// From the last VM's resumption to the end of the last degraded second; 0 if none is later.
    pub recovery_s: f64,
    /// Every second watched.
    pub seconds: Vec<Second>,
}

/// The moments of a move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moments {
    /// When it began.
    pub began: Micros,
    /// When the last VM ran at its destination.
    pub ended: Micros,
    /// STOP and RESUME of every VM.
    pub outages: Vec<(Micros, Micros)>,
}

impl Moments {
    /// Of a move that is reported.
    ///
    /// # Errors
    /// It was before 1970.
    pub fn of(movement: &MoveReport) -> Result<Self, TryFromIntError> {
        let at = |us: i64| u64::try_from(us).map(Micros::from_unix_us);
        let began = at(movement.started_at_us)?;
        let mut outages = Vec::new();
        for vm in &movement.vms {
            if let (Some(stopped), Some(resumed)) = (vm.stopped_at_us, vm.resumed_at_us) {
                outages.push((at(stopped)?, at(resumed)?));
            }
        }
        Ok(Self {
            began,
            ended: began + Duration::from_secs_f64(movement.total_s.max(0.0)),
            outages,
        })
    }

    /// When pre-copy was over for the first VM.
    #[must_use]
    pub fn first_stop(&self) -> Micros {
        let stops = self.outages.iter().map(|(stopped, _)| *stopped);
        stops.min().unwrap_or(self.ended)
    }
}

/// What the users felt of a move; `samples` in the order of their due times.
#[must_use]
pub fn feel(samples: &[Sample], moments: &Moments) -> Feel {
    let (began, ended, stop) = (moments.began, moments.ended, moments.first_stop());
    let seconds = by_second(samples, began);
    let before: Vec<f64> = seconds
        .iter()
        .filter(|second| second.at_s < 0 && second.due > 0)
        .map(|second| second.mean_ms)
        .collect();
    let before_ms = median(&before);
    let during = times(samples, |due| due >= began && due < ended);
    let after = times(samples, |due| due >= ended);
    let precopy = times(samples, |due| due >= began && due < stop);
    let calm = times(samples, |due| due < began);
    let degraded: Vec<&Second> = seconds
        .iter()
        .filter(|second| second.at_s >= 0 && second.mean_ms > before_ms * DEGRADED)
        .collect();
    let beyond = degraded
        .iter()
        .filter(|second| !stopped_in(second, moments));
    let end_s = ended.since(began).as_secs_f64();
    let last = degraded
        .last()
        .map_or(0.0, |second| to_f64(second.at_s + 1));
    let of = |ending| {
        samples
            .iter()
            .filter(|sample| sample.ending == ending)
            .count()
    };
    Feel {
        requests: samples.len(),
        refused: of(Ending::Refused),
        lost: of(Ending::Lost),
        before_ms,
        before_p95_ms: rank(&calm, 95),
        precopy_p95_ms: rank(&precopy, 95),
        during_ms: mean(&during),
        during_p99_ms: rank(&during, 99),
        after_ms: mean(&after),
        slowdown: mean(&during) / before_ms.max(f64::MIN_POSITIVE),
        longest_gap_s: longest_gap(samples, began - Duration::from_secs(1)).as_secs_f64(),
        degraded_s: count(degraded.len()),
        degraded_beyond_s: count(beyond.count()),
        recovery_s: (last - end_s).max(0.0),
        seconds,
    }
}

/// Whether a VM was stopped in a second of the move.
fn stopped_in(second: &Second, moments: &Moments) -> bool {
    let after = Duration::from_secs(u64::try_from(second.at_s).unwrap_or(0));
    let begin = moments.began + after;
    let end = begin + Duration::from_secs(1);
    let mut outages = moments.outages.iter();
    outages.any(|(stopped, resumed)| *stopped < end && *resumed > begin)
}

/// The 95th percentile of the response times of what was due from here to there, in milliseconds.
#[must_use]
pub fn p95(samples: &[Sample], from: Micros, to: Micros) -> f64 {
    rank(&times(samples, |due| due >= from && due < to), 95)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The longest time without an answer after `from`.
fn longest_gap(samples: &[Sample], from: Micros) -> Duration {
    let answered = samples
        .iter()
        .filter(|sample| sample.ending == Ending::Answered);
    let mut done: Vec<Micros> = answered
        .map(|sample| sample.done)
        .filter(|at| *at >= from)
        .collect();
    done.sort_unstable();
    let gaps = done.windows(2).map(|pair| pair[1].since(pair[0]));
    gaps.max().unwrap_or_default()
}

fn by_second(samples: &[Sample], began: Micros) -> Vec<Second> {
    let second = |at: Micros| {
        let offset = i64::try_from(at.0).unwrap_or(0) - i64::try_from(began.0).unwrap_or(0);
        offset.div_euclid(1_000_000)
    };
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
        return Vec::new();
    };
    // The first and the last second are not whole.
    (second(first.due) + 1..second(last.due))
        .map(|at_s| {
            let due: Vec<&Sample> = samples.iter().filter(|s| second(s.due) == at_s).collect();
            let took: Vec<f64> = due.iter().map(|s| ms(s.took())).collect();
            let answered = |s: &&Sample| s.ending == Ending::Answered && second(s.done) == at_s;
            Second {
                at_s,
                due: count(due.len()),
                answered: count(samples.iter().filter(answered).count()),
                failed: count(due.iter().filter(|s| s.ending != Ending::Answered).count()),
                mean_ms: mean(&took),
                max_ms: took.iter().copied().fold(0.0, f64::max),
            }
        })
        .collect()
}

fn times(samples: &[Sample], when: impl Fn(Micros) -> bool) -> Vec<f64> {
    let these = samples.iter().filter(|sample| when(sample.due));
    these.map(|sample| ms(sample.took())).collect()
}

fn mean(values: &[f64]) -> f64 {
    let sum = values.iter().fold(0.0, |sum, value| sum + value);
    sum / f64::from(u32::try_from(values.len().max(1)).unwrap_or(u32::MAX))
}

/// Nearest rank; 0 of nothing.
fn rank(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(at).copied().unwrap_or(0.0)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn to_f64(seconds: i64) -> f64 {
    i32::try_from(seconds).map_or(f64::MAX, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::load::Action;

    /// Ten a second from -10 to 20 s. Those due from 4 to 6 s are answered at 6 s.
    fn samples() -> Vec<Sample> {
        let began = 100_000_000_u64;
        (0..300)
            .map(|number| {
                let due = Micros(began - 10_000_000 + number * 100_000);
                let stands = (140..160).contains(&number);
                let done = if stands {
                    Micros(began + 6_000_000)
                } else {
                    due + Duration::from_millis(40)
                };
                let ending = if number == 150 {
                    Ending::Refused
                } else {
                    Ending::Answered
                };
                Sample {
                    action: Action::Home,
                    due,
                    done,
                    ending,
                }
            })
            .collect()
    }

    #[test]
    fn an_outage_is_felt_by_all_that_were_due() {
        let moments = Moments {
            began: Micros(100_000_000),
            ended: Micros(105_500_000),
            outages: vec![(Micros(104_900_000), Micros(105_000_000))],
        };
        let feel = feel(&samples(), &moments);
        assert_eq!((feel.requests, feel.refused, feel.lost), (300, 1, 0));
        assert!((feel.before_ms - 40.0).abs() < 1e-9);
        assert_eq!(feel.degraded_s, 2, "{:?}", feel.seconds);
        assert_eq!(
            feel.degraded_beyond_s, 1,
            "of the second nothing was stopped"
        );
        assert!((feel.before_p95_ms - 40.0).abs() < 1e-9);
        // Of the 49 before the first STOP the last 9 waited for 2 s and less: the 47th for 1.8 s.
        assert!(
            (feel.precopy_p95_ms - 1800.0).abs() < 1e-9,
            "{}",
            feel.precopy_p95_ms
        );
        assert!((feel.recovery_s - 0.5).abs() < 1e-9);
        assert!(
            (feel.longest_gap_s - 2.06).abs() < 1e-9,
            "{}",
            feel.longest_gap_s
        );
        // 40 at 40 ms and 15 from 2 s down to 0.6 s.
        let during = (40.0 * 40.0 + (6..=20).map(|n| f64::from(n) * 100.0).sum::<f64>()) / 55.0;
        assert!((feel.during_ms - during).abs() < 1e-6);
        let outage = feel.seconds.iter().find(|second| second.at_s == 5).unwrap();
        assert_eq!((outage.due, outage.answered, outage.failed), (10, 0, 1));
    }

    #[test]
    fn nothing_is_felt_of_nothing() {
        let moments = Moments {
            began: Micros(1),
            ended: Micros(2),
            outages: Vec::new(),
        };
        assert_eq!(feel(&[], &moments).degraded_s, 0);
    }
}
