//! One clock for all that the testbed observes: CLOCK_MONOTONIC in microseconds, and what it is
//! on the wall.

use std::ops::{Add, Sub};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// A moment: microseconds of CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Micros(pub u64);

impl Micros {
    /// The present moment.
    #[must_use]
    pub fn now() -> Self {
        Self(read(ClockId::CLOCK_MONOTONIC))
    }

    /// The same moment in microseconds since 1970.
    #[must_use]
    pub fn unix_us(self) -> u64 {
        let (wall, now) = (read(ClockId::CLOCK_REALTIME), Self::now().0);
        (wall + self.0).saturating_sub(now)
    }

    /// The moment that is `unix_us` microseconds after the beginning of 1970, as QEMU's and
    /// Muster's events tell it.
    #[must_use]
    pub fn from_unix_us(unix_us: u64) -> Self {
        let (wall, now) = (read(ClockId::CLOCK_REALTIME), Self::now().0);
        Self((now + unix_us).saturating_sub(wall))
    }

    /// The time from `earlier` to this moment; zero if that is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Micros {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(us))
    }
}

impl Sub<Duration> for Micros {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Self(self.0.saturating_sub(us))
    }
}

fn read(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |time| {
        u64::try_from(Duration::from(time).as_micros()).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_and_monotonic_time_convert_both_ways() {
        let now = Micros::now();
        let back = Micros::from_unix_us(now.unix_us());
        assert!(back.since(now).max(now.since(back)) < Duration::from_millis(50));
    }
}
