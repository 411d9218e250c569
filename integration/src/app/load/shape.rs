//! How heavy a load is over time: VMbuddies' workloads (5.1).

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

/// A changing rate is summed up in steps of this many seconds.
const STEP_S: f64 = 0.005;
/// A rate below that is reckoned as that: a load that never sends anything never ends a wait.
const LEAST: f64 = 0.01;

/// The course of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Course {
    /// Always the low level: VMbuddies' "static and light".
    Static,
    /// The low and the high level in turn, a period each: "dynamic and heavy".
    OnOff,
    /// Evenly from the low level to the high one and back within a period: "symmetric waves".
    Waves,
}

/// A course between two levels: requests per second of an open loop, users of a closed one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Shape {
    /// Its course.
    pub course: Course,
    /// The low level.
    pub low: f64,
    /// The high level.
    pub high: f64,
    /// See [`Course`].
    pub period: Duration,
}

impl Shape {
    /// The same all the time.
    #[must_use]
    pub fn constant(level: f64) -> Self {
        Self {
            course: Course::Static,
            low: level,
            high: level,
            period: Duration::from_secs(1),
        }
    }

    /// The level so many seconds after the load began.
    #[must_use]
    pub fn level(&self, at_s: f64) -> f64 {
        let periods = at_s / self.period.as_secs_f64().max(STEP_S);
        match self.course {
            Course::Static => self.low,
            Course::OnOff if periods.rem_euclid(2.0) < 1.0 => self.low,
            Course::OnOff => self.high,
            Course::Waves => {
                let share = 1.0 - (2.0 * periods.rem_euclid(1.0) - 1.0).abs();
                self.low + (self.high - self.low) * share
            }
        }
    }

    /// The highest level that it ever has.
    #[must_use]
    pub fn highest(&self) -> f64 {
        match self.course {
            Course::Static => self.low,
            Course::OnOff | Course::Waves => self.low.max(self.high),
        }
    }

    /// When the next request is due after the one at `at_s`, with the level as requests per second:
    /// when its integral has grown by one.
    #[must_use]
    pub fn next_due(&self, at_s: f64) -> f64 {
        if self.course == Course::Static {
            return at_s + 1.0 / self.low.max(LEAST);
        }
        let (mut at, mut left) = (at_s, 1.0);
        loop {
            let rate = self.level(at + STEP_S / 2.0).max(LEAST);
            if rate * STEP_S >= left {
                return at + left / rate;
            }
            left -= rate * STEP_S;
            at += STEP_S;
        }
    }

    /// In words, with the unit of its levels.
    #[must_use]
    pub fn text(&self, unit: &str) -> String {
        let (low, high, period) = (self.low, self.high, self.period);
        match self.course {
            Course::Static => format!("{low} {unit}"),
            Course::OnOff => format!("{low} and {high} {unit} in turn, {period:?} each"),
            Course::Waves => format!("waves from {low} to {high} {unit} in {period:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(course: Course) -> Shape {
        Shape {
            course,
            low: 10.0,
            high: 50.0,
            period: Duration::from_secs(20),
        }
    }

    /// Requests due within each second.
    fn due(shape: &Shape, seconds: usize) -> Vec<usize> {
        let mut counts = vec![0; seconds];
        let mut at = shape.next_due(0.0);
        while let Some(count) = counts
            .iter_mut()
            .zip(1_u32..)
            .find(|(_, s)| at < f64::from(*s))
        {
            *count.0 += 1;
            at = shape.next_due(at);
        }
        counts
    }

    #[test]
    fn levels_are_those_of_the_phase() {
        let on_off = shape(Course::OnOff);
        let levels = [0.0, 19.9, 20.1, 39.9, 40.1].map(|at| on_off.level(at));
        assert_eq!(levels, [10.0, 10.0, 50.0, 50.0, 10.0]);
        let waves = shape(Course::Waves);
        for (at, level) in [
            (0.0, 10.0),
            (5.0, 30.0),
            (10.0, 50.0),
            (15.0, 30.0),
            (25.0, 30.0),
        ] {
            assert!(
                (waves.level(at) - level).abs() < 1e-9,
                "{at}: {}",
                waves.level(at)
            );
        }
        assert!((Shape::constant(7.0).level(1e6) - 7.0).abs() < 1e-9);
    }

    #[test]
    fn as_many_are_due_as_the_level_says() {
        let on_off = due(&shape(Course::OnOff), 40);
        assert!(
            on_off[1..19].iter().all(|n| n.abs_diff(10) <= 1),
            "{on_off:?}"
        );
        assert!(
            on_off[21..39].iter().all(|n| n.abs_diff(50) <= 1),
            "{on_off:?}"
        );
        let waves = due(&shape(Course::Waves), 40);
        // 30 a second on the average.
        assert!(waves.iter().sum::<usize>().abs_diff(1200) <= 3, "{waves:?}");
        assert!(
            waves[10].abs_diff(48) <= 2 && waves[29].abs_diff(48) <= 2,
            "{waves:?}"
        );
        let constant = due(&Shape::constant(4.0), 10);
        assert!(constant[1..].iter().all(|n| *n == 4), "{constant:?}");
    }

    #[test]
    fn a_load_of_nothing_goes_on() {
        let waves = Shape {
            low: 0.0,
            high: 0.0,
            ..shape(Course::Waves)
        };
        assert!((waves.next_due(3.0) - 103.0).abs() < 1e-6);
    }
}
