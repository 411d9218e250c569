//! A caller in virtual time that is always late, and a receiver that counts.

use std::time::{Duration, Instant};

use rate_limiter::{Bytes, BytesPerSecond, Hierarchy, LeafId, Poll};

/// Decimal megabytes per second.
pub const fn mb(rate: u64) -> BytesPerSecond {
    BytesPerSecond(rate * 1_000_000)
}

pub const fn ms(time: u64) -> Duration {
    Duration::from_millis(time)
}

/// How late the caller comes back after a deadline.
#[derive(Debug, Clone, Copy)]
pub enum Lateness {
    /// By this much, always.
    Always(Duration),
    /// By 0 to this much, at random.
    UpTo(Duration),
}

/// What has arrived: when, from whom, how many bytes.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    pub at: Instant,
    pub leaf: LeafId,
    pub bytes: Bytes,
}

pub struct Sim {
    pub limiter: Hierarchy,
    pub start: Instant,
    pub now: Instant,
    pub arrivals: Vec<Arrival>,
    lateness: Lateness,
    random: u64,
}

impl Sim {
    pub fn new(link: Option<BytesPerSecond>, lateness: Lateness) -> Self {
        let start = Instant::now();
        Self {
            limiter: Hierarchy::new(start, link),
            start,
            now: start,
            arrivals: Vec::new(),
            lateness,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Moves everything that is granted until `time` has passed; some limit must bound it.
    pub fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            match self.limiter.poll(self.now) {
                Poll::Grant { leaf, bytes } => {
                    self.limiter.charge(self.now, leaf, bytes);
                    self.arrivals.push(Arrival {
                        at: self.now,
                        leaf,
                        bytes,
                    });
                }
                Poll::Wait(deadline) => {
                    assert!(deadline > self.now, "a deadline that has passed");
                    self.now = (deadline + self.late()).min(end);
                    if self.now == end {
                        break;
                    }
                }
                Poll::Idle => {
                    self.now = end;
                    break;
                }
            }
        }
        assert!(self.limiter.is_valid());
    }

    /// The fewest and the most bytes that arrive from `leaves` (or all) in any window of `length`
    /// that lies between `from` (since the start) and now.
    pub fn windows(&self, leaves: &[LeafId], from: Duration, length: Duration) -> (u64, u64) {
        let wanted = |arrival: &&Arrival| leaves.is_empty() || leaves.contains(&arrival.leaf);
        let from = self.start + from;
        let seen: Vec<&Arrival> = self.arrivals.iter().filter(wanted).collect();
        let mut before = vec![0];
        for arrival in &seen {
            before.push(before[before.len() - 1] + arrival.bytes.0);
        }
        let count = |begin: usize, end: usize| before[end.max(begin)] - before[begin];
        let mut fewest = u64::MAX;
        let mut most = 0;
        let starts = seen
            .iter()
            .map(|arrival| arrival.at)
            .filter(|&at| at >= from);
        for at in starts.chain([from]).filter(|&at| at + length <= self.now) {
            let to = at + length;
            let closed = seen.partition_point(|arrival| arrival.at < at);
            let open = seen.partition_point(|arrival| arrival.at <= at);
            most = most.max(count(
                closed,
                seen.partition_point(|arrival| arrival.at <= to),
            ));
            fewest = fewest.min(count(open, seen.partition_point(|arrival| arrival.at < to)));
        }
        assert!(fewest < u64::MAX, "no window of {length:?}");
        (fewest, most)
    }

    /// Holds every window of 1 s, and some longer ones, against `rate`; the tolerance in %.
    #[track_caller]
    pub fn assert_rate(
        &self,
        leaves: &[LeafId],
        from: Duration,
        rate: BytesPerSecond,
        tolerance: f64,
    ) {
        for length in [ms(1000), ms(1370), ms(2000)] {
            let (fewest, most) = self.windows(leaves, from, length);
            let exact = rate.0 as f64 * length.as_secs_f64();
            let error = |bytes: u64| (bytes as f64 / exact - 1.0) * 100.0;
            let (low, high) = (error(fewest), error(most));
            assert!(
                low >= -tolerance && high <= tolerance,
                "{rate} in {length:?}: {low:+.2} % to {high:+.2} %, allowed {tolerance} %"
            );
        }
    }

    fn late(&mut self) -> Duration {
        match self.lateness {
            Lateness::Always(time) => time,
            Lateness::UpTo(most) => {
                // xorshift64
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                let nanos = u64::try_from(most.as_nanos()).unwrap();
                Duration::from_nanos(self.random % (nanos + 1))
            }
        }
    }
}
