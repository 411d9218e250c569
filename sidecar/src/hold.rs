//! When pre-copy ends, and how a held VM is kept without spinning.
//!
//! [`Rounds`] does VMbuddies 4.2 on what stock QEMU's `query-migrate` shows: pages sent against
//! pages dirtied per round, and bounds on rounds, traffic and time. [`HoldPacer`] sets QEMU's
//! `max-bandwidth` while the VM is in wait-and-copy: a stock QEMU whose switchover is kept back
//! would otherwise synchronise its dirty bitmap tens of thousands of times a second (most of a
//! core, and the guest starves). Paced at about the dirty rate it always has a little left to
//! send, sleeps through each 100 ms slot of its rate limiter, and wakes ten times a second.

use std::time::{Duration, Instant};

use crate::protocol::command::Termination;
use crate::protocol::types::{HoldReason, RoundReport};

/// One answer of `query-migrate`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// `ram.dirty-sync-count`.
    pub syncs: u64,
    /// Memory pages sent so far, in bytes (`normal-bytes` + `duplicate` · page size).
    pub sent_bytes: u64,
    /// `ram.remaining`: dirty or unsent, as of the last synchronisation less what was sent since.
    pub remaining_bytes: u64,
    /// `ram.dirty-pages-rate` · page size.
    pub dirty_rate_bytes_per_s: u64,
    /// `ram.total`.
    pub total_bytes: u64,
}

/// Follows the rounds of one migration and says when its pseudo-synchropoint is reached.
#[derive(Debug)]
pub struct Rounds {
    termination: Termination,
    max_downtime: Duration,
    started: Instant,
    at_sync: Option<(Sample, Instant)>,
    finished: Vec<RoundReport>,
    stalled: u32,
}

impl Rounds {
    /// A migration that starts now.
    #[must_use]
    pub fn new(now: Instant, termination: Termination, max_downtime: Duration) -> Self {
        Self {
            termination,
            max_downtime,
            started: now,
            at_sync: None,
            finished: Vec::new(),
            stalled: 0,
        }
    }

    /// Every finished round.
    #[must_use]
    pub fn finished(&self) -> &[RoundReport] {
        &self.finished
    }

    /// The round under way, from 1; 0 before the first sample.
    #[must_use]
    pub fn current(&self) -> u64 {
        if self.at_sync.is_some() {
            self.finished.len() as u64 + 1
        } else {
            0
        }
    }

    /// Takes a sample; `bandwidth_bytes_per_s` is what the stream achieves. Returns the round that
    /// ended with it, if one did, and why the VM is to be held, if it is.
    pub fn observe(
        &mut self,
        now: Instant,
        sample: Sample,
        bandwidth_bytes_per_s: u64,
    ) -> (Option<RoundReport>, Option<HoldReason>) {
        let Some((start, since)) = self.at_sync else {
            if sample.total_bytes > 0 && sample.syncs > 0 {
                self.at_sync = Some((sample, now));
            }
            return (None, None);
        };
        if sample.syncs <= start.syncs {
            return (None, self.bound(now, &sample));
        }
        self.at_sync = Some((sample, now));
        let sent = sample.sent_bytes.saturating_sub(start.sent_bytes);
        let dirtied = (sample.remaining_bytes + sent).saturating_sub(start.remaining_bytes);
        let round = RoundReport {
            round: self.finished.len() as u64 + 1,
            sent_bytes: sent,
            dirtied_bytes: dirtied,
            duration_ms: millis(now.saturating_duration_since(since)),
        };
        self.finished.push(round);
        if fits(
            sample.remaining_bytes,
            bandwidth_bytes_per_s,
            self.max_downtime,
        ) {
            return (Some(round), Some(HoldReason::Converged));
        }
        #[allow(clippy::cast_precision_loss, reason = "a ratio is wanted")]
        let kept_up = dirtied as f64 >= (1.0 - self.termination.stall_epsilon) * sent as f64;
        self.stalled = if round.round > 1 && kept_up {
            self.stalled + 1
        } else {
            0
        };
        let in_vain = self.termination.stall_rounds;
        if in_vain.is_some_and(|most| self.stalled >= most) {
            return (Some(round), Some(HoldReason::Stalled));
        }
        (Some(round), self.bound(now, &sample))
    }

    /// Takes a round that a patched QEMU counted; false if it is known.
    pub fn add(&mut self, round: RoundReport) -> bool {
        let is_new = self
            .finished
            .last()
            .is_none_or(|last| last.round < round.round);
        if is_new {
            self.finished.push(round);
        }
        is_new
    }

    /// For a patched QEMU, which keeps the other bounds: whether pre-copy has taken too long.
    pub fn is_overdue(&mut self, now: Instant, sample: Sample) -> bool {
        self.at_sync = Some((sample, now));
        let limit = self.termination.max_precopy_ms;
        limit > 0 && millis(now.saturating_duration_since(self.started)) >= limit
    }

    /// Whether a bound on rounds or traffic is reached.
    #[must_use]
    pub fn is_bounded(&self, sample: Option<Sample>) -> bool {
        let rounds = u32::try_from(self.finished.len()).unwrap_or(u32::MAX);
        let traffic = sample.is_some_and(|sample| self.is_much(&sample));
        let bound = self.termination.max_rounds;
        bound.is_some_and(|most| rounds >= most) || traffic
    }

    #[allow(
        clippy::cast_precision_loss,
        reason = "a factor of the memory is compared"
    )]
    fn is_much(&self, sample: &Sample) -> bool {
        let bound = self.termination.max_memory_factor;
        let most = bound.map(|factor| factor * sample.total_bytes as f64);
        sample.total_bytes > 0 && most.is_some_and(|most| sample.sent_bytes as f64 >= most)
    }

    /// Whether rounds that no longer help end pre-copy.
    #[must_use]
    pub fn looks_for_stalls(&self) -> bool {
        self.termination.stall_rounds.is_some()
    }

    fn bound(&self, now: Instant, sample: &Sample) -> Option<HoldReason> {
        let longest = self.termination.max_precopy_ms;
        let time = longest > 0 && millis(now.saturating_duration_since(self.started)) >= longest;
        (time || self.is_bounded(Some(*sample))).then_some(HoldReason::Bounded)
    }
}

fn fits(remaining_bytes: u64, bandwidth_bytes_per_s: u64, limit: Duration) -> bool {
    u128::from(remaining_bytes) * 1000 <= u128::from(bandwidth_bytes_per_s) * limit.as_millis()
}

/// Milliseconds, saturating.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Chooses `max-bandwidth` for a held VM.
///
/// b = d + (R − R*)/τ with R* = 100 ms of d: below R* QEMU is given less than the guest dirties, so
/// that it never runs dry (and spins); above, more, so that what remains does not grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HoldPacer {
    set_bytes_per_s: u64,
}

/// For guests that dirty nothing: a pass costs about 30 bytes, so this is some passes per slot.
const FLOOR_BYTES_PER_S: u64 = 4096;
/// How fast what is too much is worked off.
const HORIZON: Duration = Duration::from_millis(500);

impl HoldPacer {
    /// Starts at `dirty_rate_bytes_per_s`.
    #[must_use]
    pub fn new(dirty_rate_bytes_per_s: u64) -> Self {
        Self {
            set_bytes_per_s: dirty_rate_bytes_per_s.max(FLOOR_BYTES_PER_S),
        }
    }

    /// The limit in force, in bytes per second.
    #[must_use]
    pub fn current(&self) -> u64 {
        self.set_bytes_per_s
    }

    /// Takes what QEMU shows; the new limit if it is worth setting.
    pub fn observe(&mut self, remaining_bytes: u64, dirty_rate_bytes_per_s: u64) -> Option<u64> {
        let goal = dirty_rate_bytes_per_s / 10;
        let over = i128::from(remaining_bytes) - i128::from(goal);
        let correction = over * 1000 / i128::from(millis(HORIZON));
        let wanted = i128::from(dirty_rate_bytes_per_s) + correction;
        let wanted = u64::try_from(wanted.max(0)).unwrap_or(u64::MAX);
        let wanted = wanted.max(FLOOR_BYTES_PER_S);
        let change = wanted.abs_diff(self.set_bytes_per_s);
        if change <= self.set_bytes_per_s / 20 {
            return None;
        }
        self.set_bytes_per_s = wanted;
        Some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn sample(syncs: u64, sent: u64, remaining: u64) -> Sample {
        Sample {
            syncs,
            sent_bytes: sent * MIB,
            remaining_bytes: remaining * MIB,
            dirty_rate_bytes_per_s: 10 * MIB,
            total_bytes: 256 * MIB,
        }
    }

    fn rounds(now: Instant) -> Rounds {
        Rounds::new(now, Termination::default(), Duration::from_millis(300))
    }

    #[test]
    fn converges_when_the_rest_fits_the_downtime() {
        let now = Instant::now();
        let mut rounds = rounds(now);
        let b = 50 * MIB;
        assert_eq!(rounds.observe(now, sample(1, 0, 256), b), (None, None));
        // The estimate dips below the threshold just before QEMU synchronises: no convergence.
        let later = now + Duration::from_secs(5);
        assert_eq!(rounds.observe(later, sample(1, 250, 6), b), (None, None));
        let (round, reason) = rounds.observe(later, sample(2, 256, 50), b);
        assert_eq!(
            round.map(|r| (r.round, r.sent_bytes, r.dirtied_bytes)),
            Some((1, 256 * MIB, 50 * MIB))
        );
        assert_eq!(reason, None);
        let (_, reason) = rounds.observe(later, sample(3, 306, 15), b);
        assert_eq!(reason, Some(HoldReason::Converged));
    }

    #[test]
    fn stalls_when_rounds_no_longer_help() {
        let now = Instant::now();
        let mut rounds = rounds(now);
        rounds.observe(now, sample(1, 0, 256), 1);
        let mut reasons = Vec::new();
        for i in 1..6 {
            reasons.push(
                rounds
                    .observe(now, sample(1 + i, 256 + 60 * (i - 1), 60), 1)
                    .1,
            );
        }
        assert_eq!(reasons[..2], [None, None]);
        assert_eq!(reasons[2], Some(HoldReason::Stalled));
    }

    #[test]
    fn bounds_hold() {
        let now = Instant::now();
        let mut rounds = rounds(now);
        rounds.observe(now, sample(1, 0, 256), 1);
        assert_eq!(
            rounds.observe(now, sample(1, 800, 100), 1).1,
            Some(HoldReason::Bounded)
        );
    }

    /// Rounds of 60 of 256 MiB that dirty as much as they send.
    fn stalling(termination: Termination) -> Vec<Option<HoldReason>> {
        let now = Instant::now();
        let mut rounds = Rounds::new(now, termination, Duration::from_millis(300));
        rounds.observe(now, sample(1, 0, 256), 1);
        let mut end = |i: u64| {
            rounds
                .observe(now, sample(1 + i, 256 + 60 * (i - 1), 60), 1)
                .1
        };
        (1..100).map(&mut end).collect()
    }

    #[test]
    fn xens_rule_sends_on_until_a_bound() {
        let reasons = stalling(Termination::XEN);
        let end = reasons.iter().position(Option::is_some);
        // The tenth round passes 3 times the memory: 256 + 9 * 60 >= 768 MiB.
        assert_eq!(
            end.map(|at| (at, reasons[at])),
            Some((9, Some(HoldReason::Bounded)))
        );
        let rounds = Termination {
            max_memory_factor: None,
            ..Termination::XEN
        };
        let reasons = stalling(rounds);
        let end = reasons.iter().position(Option::is_some);
        assert_eq!(
            end.map(|at| (at, reasons[at])),
            Some((29, Some(HoldReason::Bounded)))
        );
    }

    #[test]
    fn qemus_rule_ends_only_by_converging() {
        assert!(stalling(Termination::QEMU).iter().all(Option::is_none));
        let now = Instant::now();
        let mut rounds = Rounds::new(now, Termination::QEMU, Duration::from_millis(300));
        rounds.observe(now, sample(1, 0, 256), 50 * MIB);
        let (_, reason) = rounds.observe(now, sample(2, 2560, 15), 50 * MIB);
        assert_eq!(reason, Some(HoldReason::Converged));
    }

    #[test]
    fn the_pacer_settles_near_the_dirty_rate_and_keeps_a_little() {
        let mut pacer = HoldPacer::new(10 * MIB);
        let mut remaining = 20 * MIB;
        for _ in 0..100 {
            pacer.observe(remaining, 10 * MIB);
            let sent = (pacer.current() / 10).min(remaining);
            remaining = remaining + MIB - sent;
        }
        assert!(remaining.abs_diff(MIB) < MIB / 2, "{remaining}");
        assert!(pacer.current().abs_diff(10 * MIB) < MIB);
    }

    #[test]
    fn an_idle_guest_gets_the_floor() {
        let mut pacer = HoldPacer::new(0);
        assert_eq!(pacer.current(), FLOOR_BYTES_PER_S);
        assert_eq!(pacer.observe(0, 0), None);
        assert!(pacer.observe(MIB, 0).is_some());
    }
}
