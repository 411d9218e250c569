//! Service levels, as Voorsluys et al. judge a migration (Cloudstone's): in any window of five
//! minutes the 90th (or, strictly, the 99th) percentile of an action's response times must not be
//! above its limit.

use std::str::FromStr;
use std::time::Duration;

use hdrhistogram::Histogram;
use rate_limiter::units;
use serde::Serialize;

use super::load::{Action, Sample};

/// Windows begin this far apart.
const STEP: Duration = Duration::from_secs(1);
/// Response times are told to a thousandth, from a microsecond to an hour.
const DIGITS: u8 = 3;
const LONGEST_US: u64 = 3_600_000_000;
/// The percentiles that are judged: relaxed and strict.
pub const PERCENTILES: [f64; 2] = [90.0, 99.0];

/// The limit of one action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Whose.
    pub action: Action,
    /// The longest response time.
    pub time: Duration,
}

/// What is no limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no limit; expected home, search, detail or add, `=`, and a time, such as `home=1s`"
)]
pub struct NoLimit(String);

impl FromStr for Limit {
    type Err = NoLimit;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || NoLimit(text.to_owned());
        let (name, time) = text.split_once('=').ok_or_else(bad)?;
        let action = Action::USERS
            .into_iter()
            .find(|action| action.name() == name);
        Ok(Self {
            action: action.ok_or_else(bad)?,
            time: units::parse_duration(time).map_err(|_| bad())?,
        })
    }
}

/// Cloudstone's limit of an action.
#[must_use]
pub fn cloudstone(action: Action) -> Duration {
    Duration::from_secs(match action {
        Action::Home | Action::Count | Action::Fill => 1,
        Action::Search | Action::Detail => 2,
        Action::Add => 4,
    })
}

/// The limit of an action: the last one given for it, else Cloudstone's.
#[must_use]
pub fn limit_of(action: Action, limits: &[Limit]) -> Duration {
    let own = limits.iter().rev().find(|limit| limit.action == action);
    own.map_or_else(|| cloudstone(action), |limit| limit.time)
}

/// How an action did at one percentile.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Verdict {
    /// The action.
    pub action: Action,
    /// Its limit in seconds.
    pub limit_s: f64,
    /// The percentile, such as 99.
    pub percentile: f64,
    /// The highest that it was in any window, in seconds.
    pub worst_s: f64,
    /// Windows that were judged; they begin a second apart.
    pub windows: u32,
    /// Windows in which it was above the limit.
    pub violations: u32,
}

/// Judges every action that users do, in windows of `window` that begin a second apart. What is
/// shorter than one window is judged as one.
#[must_use]
pub fn judge(samples: &[Sample], limits: &[Limit], window: Duration) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for action in Action::USERS {
        let limit = limit_of(action, limits);
        let mut these: Vec<&Sample> = samples.iter().filter(|s| s.action == action).collect();
        these.sort_by_key(|sample| sample.due);
        verdicts.extend(judge_one(action, &these, limit, window));
    }
    verdicts
}

fn judge_one(
    action: Action,
    samples: &[&Sample],
    limit: Duration,
    window: Duration,
) -> Vec<Verdict> {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
        return Vec::new();
    };
    let Ok(mut times) = Histogram::<u64>::new_with_bounds(1, LONGEST_US, DIGITS) else {
        return Vec::new();
    };
    let mut verdicts = PERCENTILES.map(|percentile| Verdict {
        action,
        limit_s: limit.as_secs_f64(),
        percentile,
        worst_s: 0.0,
        windows: 0,
        violations: 0,
    });
    let mut end = first.due + window;
    loop {
        times.reset();
        for sample in samples
            .iter()
            .filter(|s| s.due >= end - window && s.due < end)
        {
            let took = u64::try_from(sample.took().as_micros()).unwrap_or(u64::MAX);
            times.saturating_record(took.max(1));
        }
        if !times.is_empty() {
            for verdict in &mut verdicts {
                let value = times.value_at_quantile(verdict.percentile / 100.0);
                let seconds = Duration::from_micros(value).as_secs_f64();
                verdict.worst_s = verdict.worst_s.max(seconds);
                verdict.windows += 1;
                verdict.violations += u32::from(seconds > verdict.limit_s);
            }
        }
        if end > last.due {
            return verdicts.into();
        }
        end = end + STEP;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::load::Ending;
    use crate::clock::Micros;

    /// Ten a second for a minute; those due from 30 to 33 s take `slow`.
    fn minute(slow: Duration) -> Vec<Sample> {
        (0..600)
            .map(|number| {
                let due = Micros(number * 100_000);
                let took = if (300..330).contains(&number) {
                    slow
                } else {
                    Duration::from_millis(50)
                };
                Sample {
                    action: Action::Home,
                    due,
                    done: due + took,
                    ending: Ending::Answered,
                }
            })
            .collect()
    }

    #[test]
    fn a_short_outage_breaks_the_strict_level_only() {
        // 30 of 600 are 5 %: within the 90th percentile of a minute, beyond the 99th.
        let verdicts = judge(
            &minute(Duration::from_secs(2)),
            &[],
            Duration::from_secs(60),
        );
        let [relaxed, strict] = verdicts[..] else {
            panic!("{verdicts:?}")
        };
        assert_eq!((relaxed.percentile, relaxed.violations), (90.0, 0));
        assert_eq!(
            (strict.percentile, strict.violations),
            (99.0, strict.windows)
        );
        assert!((strict.worst_s - 2.0).abs() < 0.01, "{strict:?}");
    }

    #[test]
    fn windows_slide() {
        // In a window of 10 s, 3 s of slow answers are 30 %.
        let verdicts = judge(
            &minute(Duration::from_secs(2)),
            &[],
            Duration::from_secs(10),
        );
        let relaxed = verdicts[0];
        assert_eq!(relaxed.windows, 51);
        // More than 10 of 100 in it: it begins from 22 to 31 s.
        assert_eq!(relaxed.violations, 10);
        let own = [Limit {
            action: Action::Home,
            time: Duration::from_secs(3),
        }];
        let verdicts = judge(
            &minute(Duration::from_secs(2)),
            &own,
            Duration::from_secs(10),
        );
        assert_eq!(verdicts[1].violations, 0);
    }

    #[test]
    fn limits_are_read() {
        let limit: Limit = "add=1.5s".parse().unwrap();
        assert_eq!(
            (limit.action, limit.time),
            (Action::Add, Duration::from_millis(1500))
        );
        for text in ["add", "fill=1s", "add=fast"] {
            assert!(text.parse::<Limit>().is_err(), "{text}");
        }
    }
}
