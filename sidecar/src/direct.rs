//! The direct transport: the sidecars connect, and QEMU has the socket.
//!
//! ```text
//! QEMU ═══════════════ TCP, paced by the kernel ═══════════════► QEMU -incoming
//!   └ the sidecar keeps the socket, too: to pace it, to see how far it is, to cut it
//! sidecar ◄──────────── companion: a byte every 500 ms ────────► sidecar
//! ```
//!
//! No byte of the stream passes a sidecar. What a relay notices by itself has to be looked for: a
//! socket that a sidecar keeps stays open when its QEMU dies, and a stream goes on when a sidecar
//! dies. So whoever loses a QEMU shuts the stream down, and so does who hears nothing any more on
//! the companion, a connection of its own for each VM.
//!
//! Without I/O: [`Progress`] is what TCP_INFO says, [`Stall`] notices that a stream does not get on,
//! [`Heartbeat`] that the other sidecar is silent, [`Appetite`] how much of its share a stream takes.
//! `daemon::direct` has the sockets.

use std::time::{Duration, Instant};

use rate_limiter::{BytesPerSecond, Demand};

/// The channel number of a companion's hello.
pub const COMPANION: u16 = u16::MAX;
/// How often each side says that it is alive.
const BEAT: Duration = Duration::from_millis(500);
/// A side that has said nothing for so long hangs.
const SILENCE: Duration = Duration::from_millis(2500);
/// Bytes that wait for so long without any being acknowledged mean a dead peer …
const STALL: Duration = Duration::from_millis(2500);
/// … and so much longer as the largest burst of a paced socket takes.
const BURST_BYTES: u64 = 256 * 1024;
/// A stream that does not fill its share may take a quarter more than it did, and so much. It is
/// also what a stream gets at least, whatever the weights: the kernel works out when a socket may
/// send again as it sends, so that after 64 KiB at a very low pace it stands still for a second,
/// however high the next pace is.
const HEADROOM: u64 = 1 << 20;
/// Bytes that wait in the socket go within this time, whatever the weights: QEMU may be blocked
/// behind them, and then obeys nothing.
const DRAIN: Duration = Duration::from_millis(100);
/// How far QEMU may be ahead of a paced wire: what waits in the socket is what QEMU counts as sent.
const AHEAD: Duration = Duration::from_millis(10);
const LEAST_AHEAD: u64 = 64 * 1024;
const MOST_AHEAD: u64 = 4 << 20;

/// How far a connection is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that the other end has acknowledged.
    pub acked_bytes: u64,
    /// Bytes that came.
    pub received_bytes: u64,
    /// Bytes in the socket that were not sent yet.
    pub unsent_bytes: u64,
    /// Segments that were sent and not acknowledged yet.
    pub unacked_segments: u32,
    /// Smoothed round-trip time in microseconds.
    pub rtt_us: u32,
}

impl Progress {
    /// Whether something is on its way or waits to be.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.unsent_bytes > 0 || self.unacked_segments > 0
    }
}

/// Notices that bytes wait and none is acknowledged.
#[derive(Debug, Default)]
pub struct Stall {
    acked_bytes: u64,
    since: Option<Instant>,
}

impl Stall {
    /// Takes what the kernel says; true if nothing has moved for too long. `bytes_per_s` is the pace
    /// that the kernel keeps. Only what is seen counts: a sidecar that slept judges afresh.
    pub fn observe(&mut self, now: Instant, seen: Progress, bytes_per_s: Option<u64>) -> bool {
        let moved = seen.acked_bytes != self.acked_bytes;
        self.acked_bytes = seen.acked_bytes;
        if moved || !seen.is_waiting() {
            self.since = None;
            return false;
        }
        let since = *self.since.get_or_insert(now);
        let burst = bytes_per_s.map_or(Duration::ZERO, |rate| {
            Duration::from_millis(BURST_BYTES.saturating_mul(1000) / rate.max(1))
        });
        now.saturating_duration_since(since) >= STALL.saturating_add(burst)
    }
}

/// Says when to beat, and whether the other side still does.
#[derive(Debug)]
pub struct Heartbeat {
    heard: Instant,
    beat_at: Instant,
}

impl Heartbeat {
    /// A companion that was just connected.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            heard: now,
            beat_at: now,
        }
    }

    /// The other side said something.
    pub fn hear(&mut self, now: Instant) {
        self.heard = now;
    }

    /// Whether it is time to say something; counts as said.
    pub fn beats(&mut self, now: Instant) -> bool {
        let due = self.beat_at <= now;
        if due {
            self.beat_at = now + BEAT;
        }
        due
    }

    /// Whether the other side has been silent for too long. Hear what has come first.
    #[must_use]
    pub fn is_silent(&self, now: Instant) -> bool {
        self.heard + SILENCE <= now
    }

    /// When to look again.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.beat_at.min(self.heard + SILENCE)
    }
}

/// How much of its share a stream takes.
#[derive(Debug, Default)]
pub struct Appetite {
    last: Option<(Instant, u64)>,
    rates: [u64; 2],
}

impl Appetite {
    /// Takes what the kernel says, and the pace that it keeps; what the stream would take from now
    /// on. One that fills its pace takes what it gets; the others, at most a little more than they
    /// did: twice as much if bytes wait, which may be a burst or the beginning of more. Also
    /// returns how many bytes were acknowledged since the last time.
    pub fn observe(
        &mut self,
        now: Instant,
        seen: Progress,
        bytes_per_s: Option<u64>,
    ) -> (Demand, u64) {
        let acked = seen.acked_bytes;
        let (at, before) = self.last.replace((now, acked)).unwrap_or((now, acked));
        let moved = acked.saturating_sub(before);
        let micros = now.saturating_duration_since(at).as_micros();
        let rate = (u128::from(moved) * 1_000_000).checked_div(micros);
        if let Some(rate) = rate {
            self.rates = [self.rates[1], u64::try_from(rate).unwrap_or(u64::MAX)];
        }
        let most = self.rates[0].max(self.rates[1]);
        let waits = seen.unsent_bytes > 0;
        let least = least(seen.unsent_bytes);
        if waits && bytes_per_s.is_none_or(|pace| most >= pace / 10 * 7) {
            return (Demand::EVERYTHING.with_least(least), moved);
        }
        let more = if waits { most } else { most / 4 };
        let wanted = BytesPerSecond(most.saturating_add(more).saturating_add(HEADROOM));
        (Demand::at_most(wanted).with_least(least), moved)
    }
}

impl Appetite {
    /// Whether bytes wait although the stream stays below the pace: then it is the path that limits.
    #[must_use]
    pub fn is_kept_short(&self, seen: Progress, bytes_per_s: Option<u64>) -> bool {
        let most = self.rates[0].max(self.rates[1]);
        seen.unsent_bytes > 0 && bytes_per_s.is_none_or(|pace| most < pace / 10 * 9)
    }
}

/// What a stream gets whatever the weights, with so many bytes waiting in its socket.
fn least(unsent_bytes: u64) -> BytesPerSecond {
    let per_s = unsent_bytes.saturating_mul(1000) / crate::hold::millis(DRAIN).max(1);
    BytesPerSecond(per_s.max(HEADROOM))
}

/// How many bytes QEMU may be ahead of a wire of this pace.
#[must_use]
pub fn ahead(bytes_per_s: Option<u64>) -> Option<u32> {
    let bytes = bytes_per_s?.saturating_mul(crate::hold::millis(AHEAD)) / 1000;
    u32::try_from(bytes.clamp(LEAST_AHEAD, MOST_AHEAD)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn seen(acked_bytes: u64, unsent_bytes: u64) -> Progress {
        Progress {
            acked_bytes,
            unsent_bytes,
            ..Progress::default()
        }
    }

    #[test]
    fn a_stream_stalls_only_with_bytes_that_wait() {
        let now = Instant::now();
        let mut stall = Stall::default();
        assert!(!stall.observe(now, seen(10, 0), None));
        assert!(!stall.observe(now + 9000 * MS, seen(10, 0), None), "idle");
        assert!(!stall.observe(now + 9100 * MS, seen(10, 5), None));
        assert!(!stall.observe(now + 11_000 * MS, seen(11, 5), None), "slow");
        assert!(!stall.observe(now + 11_100 * MS, seen(11, 5), None));
        assert!(!stall.observe(now + 13_500 * MS, seen(11, 5), None));
        assert!(stall.observe(now + 13_700 * MS, seen(11, 5), None));
        // At 100 kB/s a burst takes 2.6 s.
        assert!(!stall.observe(now + 13_700 * MS, seen(11, 5), Some(100_000)));
        assert!(stall.observe(now + 17_000 * MS, seen(11, 5), Some(100_000)));
    }

    #[test]
    fn silence_is_noticed_and_sleep_is_not() {
        let now = Instant::now();
        let mut heart = Heartbeat::new(now);
        assert!(heart.beats(now) && !heart.beats(now + 499 * MS) && heart.beats(now + 500 * MS));
        assert!(!heart.is_silent(now + 2499 * MS) && heart.is_silent(now + 2500 * MS));
        heart.hear(now + 9000 * MS);
        assert!(!heart.is_silent(now + 9000 * MS));
        assert_eq!(heart.deadline(), now + 1000 * MS);
    }

    #[test]
    fn appetite_follows_what_is_taken() {
        let now = Instant::now();
        let mut appetite = Appetite::default();
        let mut look = |at, seen, pace| appetite.observe(now + at * MS, seen, pace);
        let at_most = |rate| Demand::at_most(BytesPerSecond(rate + HEADROOM));
        let headroom = BytesPerSecond(HEADROOM);
        let everything = Demand::EVERYTHING.with_least(headroom);
        assert_eq!(look(0, seen(1000, 1), None).0, everything);
        let (demand, moved) = look(100, seen(401_000, 0), None);
        assert_eq!(moved, 400_000);
        assert_eq!(demand, at_most(5_000_000).with_least(headroom));
        let (demand, _) = look(200, seen(401_000, 0), None);
        assert_eq!(demand, at_most(5_000_000).with_least(headroom));
        let (demand, _) = look(300, seen(401_000, 0), None);
        assert_eq!(demand, at_most(0).with_least(headroom));
        // Bytes that wait are no sign of hunger where the pace is far from reached.
        let (demand, _) = look(400, seen(501_000, 9), Some(90_000_000));
        assert_eq!(demand, at_most(2_000_000).with_least(headroom));
        // They go within 100 ms all the same.
        let (demand, _) = look(500, seen(601_000, 400_000), Some(1_200_000));
        let drained = BytesPerSecond(4_000_000);
        assert_eq!(demand, Demand::EVERYTHING.with_least(drained));
    }

    #[test]
    fn a_stream_below_its_pace_with_bytes_that_wait_is_kept_short_by_the_path() {
        let now = Instant::now();
        let mut appetite = Appetite::default();
        for step in 0..4 {
            let at = now + Duration::from_millis(50) * step;
            appetite.observe(at, seen(u64::from(step) * 1_000_000, 9), Some(50_000_000));
        }
        // 20 MB/s of 50.
        assert!(appetite.is_kept_short(seen(0, 9), Some(50_000_000)));
        assert!(appetite.is_kept_short(seen(0, 9), None));
        assert!(!appetite.is_kept_short(seen(0, 0), Some(50_000_000)));
        assert!(!appetite.is_kept_short(seen(0, 9), Some(21_000_000)));
    }

    #[test]
    fn qemu_is_ahead_by_some_milliseconds() {
        assert_eq!(ahead(None), None);
        assert_eq!(ahead(Some(50_000_000)), Some(500_000));
        assert_eq!(ahead(Some(1)), Some(65_536));
    }
}
