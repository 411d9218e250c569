//! One limit of the hierarchy, or none: a bucket with the burst and the quantum of its rate.

use std::time::Instant;

use crate::bucket::TokenBucket;
use crate::units::{Bytes, BytesPerSecond};

/// The smallest quantum: 4 KiB.
pub(super) const MIN_QUANTUM: Bytes = Bytes(4 << 10);
/// The largest quantum, also that of no limit: 256 KiB.
pub(super) const MAX_QUANTUM: Bytes = Bytes(256 << 10);
/// A quantum is what passes in this time, in ms.
const QUANTUM_MS: u128 = 4;
/// A burst is what passes in this time, in ms: less than 1 ms left over, a quantum, 10 ms of lateness.
const BURST_MS: u128 = 15;
/// The smallest burst: 16 KiB.
const MIN_BURST: Bytes = Bytes(16 << 10);

/// What a quantum is divided by for the least that allows a grant: 1 ms of the rate.
const LEAST_DIVISOR: u64 = 4;

/// A limit, or none.
///
/// Whether it allows does not depend on the leaf: so none below it can keep others from being
/// served by contenting itself with less.
#[derive(Debug, Clone)]
pub(super) struct Limit {
    bucket: Option<TokenBucket>,
    quantum: Bytes,
}

impl Limit {
    pub(super) fn new(now: Instant, limit: Option<BytesPerSecond>) -> Self {
        let mut new = Self {
            bucket: None,
            quantum: MAX_QUANTUM,
        };
        new.set(now, limit);
        new
    }

    pub(super) fn get(&self) -> Option<BytesPerSecond> {
        self.bucket.as_ref().map(TokenBucket::rate)
    }

    /// Changes the limit at once. Where there was none, the bucket starts with one quantum.
    pub(super) fn set(&mut self, now: Instant, limit: Option<BytesPerSecond>) {
        let Some(rate) = limit else {
            *self = Self {
                bucket: None,
                quantum: MAX_QUANTUM,
            };
            return;
        };
        let burst = passing(rate, BURST_MS).max(MIN_BURST);
        self.quantum = passing(rate, QUANTUM_MS).clamp(MIN_QUANTUM, MAX_QUANTUM);
        match &mut self.bucket {
            Some(bucket) => {
                bucket.set_rate(now, rate);
                bucket.set_burst(now, burst);
            }
            None => {
                let bucket = TokenBucket::with_tokens(rate, burst, self.quantum, now);
                self.bucket = Some(bucket);
            }
        }
    }

    /// Whether the bucket holds enough for a grant.
    pub(super) fn allows(&self, now: Instant) -> bool {
        let least = Bytes(self.quantum.0 / LEAST_DIVISOR);
        self.bucket.as_ref().is_none_or(|bucket| {
            bucket
                .ready_at(now, least)
                .is_some_and(|ready| ready <= now)
        })
    }

    /// A quantum, or what the bucket holds if that is less.
    pub(super) fn held(&self, now: Instant) -> Bytes {
        match &self.bucket {
            Some(bucket) => bucket.available(now).min(self.quantum),
            None => self.quantum,
        }
    }

    /// When the bucket holds a quantum: `now` if it does, `None` if never (a limit of 0).
    pub(super) fn ready_at(&self, now: Instant) -> Option<Instant> {
        match &self.bucket {
            Some(bucket) => bucket.ready_at(now, self.quantum),
            None => Some(now),
        }
    }

    pub(super) fn take(&mut self, now: Instant, bytes: Bytes) {
        if let Some(bucket) = &mut self.bucket {
            bucket.take(now, bytes);
        }
    }

    pub(super) fn is_valid(&self) -> bool {
        (MIN_QUANTUM..=MAX_QUANTUM).contains(&self.quantum)
            && self
                .bucket
                .as_ref()
                .is_none_or(|bucket| bucket.is_valid() && self.quantum <= bucket.burst())
    }
}

fn passing(rate: BytesPerSecond, ms: u128) -> Bytes {
    let bytes = u128::from(rate.0) * ms / 1000;
    Bytes(u64::try_from(bytes).unwrap_or(u64::MAX))
}
