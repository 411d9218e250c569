//! One limit: a token bucket in exact integer arithmetic.
//!
//! The level is kept in byte·ns/s ("nanobytes"): one byte is 10⁹ of them, and every nanosecond
//! adds as many of them as the rate has bytes per second. No division happens on refill, so nothing
//! is rounded and nothing drifts, however often or seldom the bucket is looked at.
//!
//! [`take`](TokenBucket::take) may drive the level below zero. That debt is paid back before
//! anything is ready again, so that large reads average out. It is bounded by the burst or one
//! second of the rate, whichever is more; what is taken beyond that is forgiven.

use std::time::{Duration, Instant};

use crate::units::{Bytes, BytesPerSecond};

/// Nanobytes in a byte, and nanoseconds in a second.
const NANO: i128 = 1_000_000_000;

/// A token bucket: `rate` on average, `burst` at once.
///
/// A rate of 0 blocks: nothing is available and nothing ever gets ready. "No limit" is the
/// absence of a bucket.
///
/// A `now` earlier than one seen before is treated as that one: it neither panics nor adds tokens.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    rate: BytesPerSecond,
    burst: Bytes,
    /// Nanobytes at `refilled`; negative in debt.
    level: i128,
    refilled: Instant,
}

impl TokenBucket {
    /// A full bucket.
    #[must_use]
    pub fn new(rate: BytesPerSecond, burst: Bytes, now: Instant) -> Self {
        Self::with_tokens(rate, burst, burst, now)
    }

    /// A bucket that holds `tokens` at the start, at most `burst`.
    #[must_use]
    pub fn with_tokens(rate: BytesPerSecond, burst: Bytes, tokens: Bytes, now: Instant) -> Self {
        let mut bucket = Self {
            rate,
            burst,
            level: nanobytes(tokens),
            refilled: now,
        };
        bucket.clamp_level();
        bucket
    }

    /// The rate, in bytes per second.
    #[must_use]
    pub fn rate(&self) -> BytesPerSecond {
        self.rate
    }

    /// How many bytes the bucket can hold.
    #[must_use]
    pub fn burst(&self) -> Bytes {
        self.burst
    }

    /// Changes the rate at once; the tokens gathered so far stay, capped by the burst.
    ///
    /// A debt was made at the old rate. It never takes longer to pay back at the new one: with a
    /// lower rate it shrinks in proportion, with a higher rate it stays the same number of bytes.
    /// A rate of 0 drops the tokens.
    pub fn set_rate(&mut self, now: Instant, rate: BytesPerSecond) {
        self.refill(now);
        if self.level < 0 && 0 < rate.0 && rate < self.rate {
            // Rounds towards more debt. The product fits for rates below 500 TB/s; above, the
            // division comes first.
            let debt = self.level.unsigned_abs();
            let (new, old) = (u128::from(rate.0), u128::from(self.rate.0));
            let scaled = debt.checked_mul(new).map_or_else(
                || (debt / old + 1).saturating_mul(new),
                |product| product.div_ceil(old),
            );
            self.level = 0_i128.saturating_sub_unsigned(scaled.min(debt));
        }
        self.rate = rate;
        self.clamp_level();
    }

    /// Changes the burst at once; tokens above it are lost.
    pub fn set_burst(&mut self, now: Instant, burst: Bytes) {
        self.refill(now);
        self.burst = burst;
        self.clamp_level();
    }

    /// The whole bytes the bucket holds at `now`; 0 in debt.
    #[must_use]
    pub fn available(&self, now: Instant) -> Bytes {
        Bytes(u64::try_from(self.level_at(now) / NANO).unwrap_or(0))
    }

    /// Takes `bytes`, into debt if need be (see the module's text for its bound).
    pub fn take(&mut self, now: Instant, bytes: Bytes) {
        self.refill(now);
        self.level = self.level.saturating_sub(nanobytes(bytes));
        self.clamp_level();
    }

    /// When the bucket holds `bytes`, if nothing is taken until then: `now` if it does already,
    /// `None` if never (the rate is 0, or the time is beyond what the clock can express).
    ///
    /// More than the burst counts as the burst: a full bucket is ready for anything, and
    /// [`take`](Self::take) then goes into debt.
    #[must_use]
    pub fn ready_at(&self, now: Instant, bytes: Bytes) -> Option<Instant> {
        if self.rate.0 == 0 {
            return None;
        }
        let missing = nanobytes(bytes.min(self.burst)) - self.level_at(now);
        if missing <= 0 {
            return Some(now);
        }
        let nanos = missing.unsigned_abs().div_ceil(u128::from(self.rate.0));
        let wait = Duration::from_nanos(u64::try_from(nanos).ok()?);
        now.max(self.refilled).checked_add(wait)
    }

    /// Whether the invariants hold: no more tokens than the burst, no more debt than its bound,
    /// no tokens at rate 0.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        (-self.most_debt()..=self.most_tokens()).contains(&self.level)
    }

    fn most_tokens(&self) -> i128 {
        if self.rate.0 == 0 {
            0
        } else {
            nanobytes(self.burst)
        }
    }

    fn most_debt(&self) -> i128 {
        nanobytes(self.burst.max(Bytes(self.rate.0)))
    }

    fn clamp_level(&mut self) {
        self.level = self.level.clamp(-self.most_debt(), self.most_tokens());
        debug_assert!(self.is_valid(), "{self:?}");
    }

    fn level_at(&self, now: Instant) -> i128 {
        let elapsed = now.saturating_duration_since(self.refilled).as_nanos();
        let gain = u128::from(self.rate.0).saturating_mul(elapsed);
        let room = self.most_tokens().abs_diff(self.level);
        self.level.saturating_add_unsigned(gain.min(room))
    }

    fn refill(&mut self, now: Instant) {
        self.level = self.level_at(now);
        self.refilled = self.refilled.max(now);
    }
}

fn nanobytes(bytes: Bytes) -> i128 {
    i128::from(bytes.0) * NANO
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn fills_exactly_however_often_it_is_looked_at() {
        let start = Instant::now();
        let rate = BytesPerSecond(3);
        let mut bucket = TokenBucket::with_tokens(rate, Bytes(1000), Bytes(0), start);
        for step in 1..=100_000_u64 {
            // 3 B/s in steps of 1 ms: 0.003 byte each, none of it lost.
            bucket.take(start + MS * u32::try_from(step).unwrap(), Bytes(0));
        }
        assert_eq!(bucket.available(start + 100_000 * MS), Bytes(300));
    }

    #[test]
    fn is_ready_at_the_promised_nanosecond_and_not_before() {
        let start = Instant::now();
        let rate = BytesPerSecond(7_000_003);
        let bucket = TokenBucket::with_tokens(rate, Bytes(100_000), Bytes(17), start);
        let ready = bucket.ready_at(start, Bytes(40_000)).unwrap();
        assert_eq!(bucket.available(ready), Bytes(40_000));
        let before = ready.checked_sub(Duration::from_nanos(1)).unwrap();
        assert_eq!(bucket.available(before), Bytes(39_999));
        assert_eq!(bucket.ready_at(ready, Bytes(40_000)), Some(ready));
    }

    #[test]
    fn more_than_the_burst_is_ready_when_full_and_paid_back_afterwards() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(BytesPerSecond(1_000), Bytes(100), start);
        assert_eq!(bucket.ready_at(start, Bytes(500)), Some(start));
        bucket.take(start, Bytes(500));
        assert_eq!(bucket.available(start + 400 * MS), Bytes(0));
        assert_eq!(
            bucket.ready_at(start, Bytes(0)),
            Some(start + 400 * MS),
            "a debt of 400 B at 1 kB/s"
        );
        assert_eq!(bucket.available(start + 450 * MS), Bytes(50));
    }

    #[test]
    fn debt_is_bounded_and_keeps_its_time_when_the_rate_falls() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(BytesPerSecond(1_000_000), Bytes(100), start);
        bucket.take(start, Bytes(u64::MAX));
        assert_eq!(bucket.ready_at(start, Bytes(0)), Some(start + 1000 * MS));
        let half = start + 500 * MS;
        bucket.set_rate(half, BytesPerSecond(1_000));
        assert_eq!(bucket.ready_at(half, Bytes(0)), Some(start + 1000 * MS));
        bucket.set_rate(half, BytesPerSecond(500_000));
        assert_eq!(bucket.ready_at(half, Bytes(0)), Some(half + MS), "500 B");
        assert!(bucket.is_valid());
    }

    #[test]
    fn rate_zero_blocks() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(BytesPerSecond(1_000), Bytes(100), start);
        bucket.set_rate(start, BytesPerSecond(0));
        assert_eq!(bucket.available(start + 1000 * MS), Bytes(0));
        assert_eq!(bucket.ready_at(start, Bytes(0)), None);
        bucket.set_rate(start + 1000 * MS, BytesPerSecond(1_000));
        assert_eq!(
            bucket.ready_at(start + 1000 * MS, Bytes(10)),
            Some(start + 1010 * MS),
            "the blocked second has added nothing"
        );
    }

    #[test]
    fn time_going_backwards_adds_nothing() {
        let start = Instant::now();
        let later = start + 50 * MS;
        let mut bucket =
            TokenBucket::with_tokens(BytesPerSecond(1_000), Bytes(100), Bytes(0), start);
        bucket.take(later, Bytes(50));
        assert_eq!(bucket.available(start), Bytes(0));
        assert_eq!(bucket.ready_at(start, Bytes(1)), Some(later + MS));
        bucket.take(start, Bytes(0));
        assert_eq!(bucket.available(later), Bytes(0));
    }

    #[test]
    fn extremes_do_not_overflow() {
        let start = Instant::now();
        let far = start + Duration::from_secs(1 << 40);
        let most = u64::MAX;
        let mut bucket = TokenBucket::new(BytesPerSecond(most), Bytes(most), start);
        bucket.take(start, Bytes(most));
        bucket.take(start, Bytes(most));
        bucket.set_rate(start, BytesPerSecond(most - 1));
        assert!(bucket.is_valid());
        assert_eq!(bucket.available(far), Bytes(most));
        let slow = TokenBucket::with_tokens(BytesPerSecond(1), Bytes(most), Bytes(0), start);
        assert_eq!(
            slow.ready_at(start, Bytes(most)),
            None,
            "585 thousand million years"
        );
    }
}
