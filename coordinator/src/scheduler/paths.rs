//! What the paths between hosts carry, from what the streams on them achieve.
//!
//! A move is told a bandwidth, and paces its streams to it. Where the path carries that, the pace is the
//! limit, and nothing is to be learned. Where it carries less, data waits in a stream that gets less than
//! its share: the sum of what all streams of the path achieve then is what it carries.
//!
//! Each path is judged for itself, in windows of a second: less is believed when two windows in a row
//! say so, and the higher of them counts. Once less was found, the streams are paced to it, and only by
//! filling that can they show that there is more again: a rate that is filled grows by a twentieth of
//! itself, and by more each time, until it is not filled any more, or is what was told. After every time
//! that less was found it rests before it grows, longer from time to time. In between is a band in which
//! nothing changes, so that nothing swings.
//!
//! The reserve of the application's own traffic comes off what a path carries, as it came off what was
//! told. Where there is one the band is narrow: streams that fill the path would leave nothing of it.

use std::collections::BTreeMap;

use rate_limiter::BytesPerSecond;

use crate::application::{HostId, VmId};
use crate::capacity::Allowance;

/// From one host to another.
pub type Path = (HostId, HostId);

/// Length of a window, in microseconds, at least: reports come every second, a little early or late.
const WINDOW_US: i64 = 900_000;
/// Windows in a row that have to say that a path carries less.
const BELIEVED: u32 = 2;
/// A stream wanted more if its data waited for the path in this part of the window …
const WAITED: f64 = 0.25;
/// … and it got less than this part of its share; with a reserve, than [`NARROW`]. Shares are told only
/// when they have changed by a twentieth, so that this has to be less than what that, and the first
/// growth, leave.
const SHORT: f64 = 0.88;
const NARROW: f64 = 0.97;
/// A share of which so much is used is filled.
const FILLED: f64 = 0.97;
/// Growth in a window, in parts of the rate: at first, and at most.
const GROWTH: f64 = 0.05;
const GROWTH_AT_MOST: f64 = 0.25;
/// A rate is said again when it differs by more than this part of itself.
const NEWS: f64 = 0.25;
/// Windows that it rests for after less was found: at first, and at most.
const REST: u32 = 3;
const REST_AT_MOST: u32 = 30;
/// No path is taken to carry less than this part of what was told: one that is dead is cut.
const LEAST: f64 = 0.01;

/// A stream as its source last reported it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stream {
    /// Whose it is.
    pub vm: VmId,
    /// From where to where.
    pub path: Path,
    /// When the report was made: unix time in microseconds.
    pub at_us: i64,
    /// Bytes sent until then.
    pub sent_bytes: u64,
    /// For how long its data has waited for the path until then, in milliseconds.
    pub waited_ms: u64,
    /// What it is allotted, in bytes per second.
    pub share: f64,
    /// Whether it would use all of that: a VM that is held sends what it dirties, and no more.
    pub copies: bool,
}

/// The begin of a stream's window.
#[derive(Debug, Clone, Copy)]
struct Mark {
    at_us: i64,
    sent_bytes: u64,
    waited_ms: u64,
    share: f64,
    copies: bool,
}

/// What is known of a path.
#[derive(Debug, Clone, Default)]
struct Known {
    marks: BTreeMap<VmId, Mark>,
    /// What it carries, where that is less than what was told; bytes per second.
    carries: Option<f64>,
    /// What was achieved in windows that said so, in a row.
    short: Vec<f64>,
    growth: f64,
    /// What was said of it last.
    said: Option<f64>,
    /// Windows until it may grow, and how many there will be the next time.
    rest: u32,
    next_rest: u32,
}

/// A path carries another rate than was thought.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// Which.
    pub path: Path,
    /// What may be used of it from now on; `None`: again all that was told.
    pub rate: Option<BytesPerSecond>,
    /// Whether a person should know: it differs from what was said last by more than the search for its
    /// rate makes it swing.
    pub is_news: bool,
}

/// What is known of all paths.
#[derive(Debug, Clone)]
pub struct Paths {
    /// What a move may use of the bandwidth; nothing is ever more.
    told: f64,
    /// Whether that is a rate, and not only that nothing limits.
    is_told: bool,
    reserve: f64,
    paths: BTreeMap<Path, Known>,
}

/// What a window says.
enum Verdict {
    /// So much was achieved, and a stream wanted more.
    Short(f64),
    /// Who copies used all of its share.
    Filled,
    /// Neither.
    Nothing,
}

impl Paths {
    /// Nothing was found yet: the paths carry what is told.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
    pub fn new(allowance: &Allowance) -> Self {
        Self {
            told: allowance.for_move().0 as f64,
            is_told: allowance.usable().is_some(),
            reserve: allowance.reserve.0 as f64,
            paths: BTreeMap::new(),
        }
    }

    /// The paths that carry less than was told, with what may be used of each.
    pub fn narrow(&self) -> impl Iterator<Item = (Path, BytesPerSecond)> + '_ {
        let found = self.paths.iter();
        found.filter_map(|(path, known)| Some((*path, self.usable(known.carries?))))
    }

    /// Takes what all streams that are under way have done; which paths are found to carry another
    /// rate.
    pub fn observe(&mut self, streams: &[Stream]) -> Vec<Change> {
        if !self.is_told {
            return Vec::new();
        }
        let mut by_path: BTreeMap<Path, Vec<Stream>> = BTreeMap::new();
        for stream in streams {
            by_path.entry(stream.path).or_default().push(*stream);
        }
        let (told, reserve) = (self.told, self.reserve);
        let mut changed = Vec::new();
        for (path, streams) in by_path {
            let known = self.paths.entry(path).or_default();
            let before = known.carries;
            let Some(verdict) = known.window(&streams, reserve) else {
                continue;
            };
            known.judge(&verdict, told, reserve);
            if known.carries != before {
                let carries = known.carries;
                let is_news = known.is_news();
                // The streams are told other shares: what they do from now on is another window.
                known.marks.clear();
                changed.push(Change {
                    path,
                    rate: carries.map(|rate| self.usable(rate)),
                    is_news,
                });
            }
        }
        changed
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rates are positive and far below 2^63"
    )]
    fn usable(&self, carries: f64) -> BytesPerSecond {
        let rate = (carries - self.reserve).max(self.told * LEAST);
        BytesPerSecond((rate as u64).max(1))
    }
}

impl Known {
    /// Goes on with the window; what it says if it is over.
    fn window(&mut self, streams: &[Stream], reserve: f64) -> Option<Verdict> {
        let is_same = self.marks.len() == streams.len()
            && streams
                .iter()
                .all(|stream| self.marks.contains_key(&stream.vm));
        if !is_same {
            self.begin(streams);
            return None;
        }
        let marked = || {
            streams
                .iter()
                .map(|stream| (stream, self.marks[&stream.vm]))
        };
        // A clock that was set back begins anew.
        if marked().any(|(stream, mark)| stream.at_us < mark.at_us) {
            self.begin(streams);
            return None;
        }
        if marked().any(|(stream, mark)| stream.at_us.saturating_sub(mark.at_us) < WINDOW_US) {
            return None;
        }
        let least = if reserve > 0.0 { NARROW } else { SHORT };
        let mut all = 0.0;
        let mut is_short = false;
        // The least part of its share that one of those that copy has used.
        let mut used: Option<f64> = None;
        for (stream, mark) in marked() {
            let rate = stream.rate_since(&mark);
            all += rate;
            if !stream.copies || !mark.copies {
                continue;
            }
            is_short |=
                stream.has_waited_since(&mark) && rate < least * stream.share.min(mark.share);
            let part = rate / stream.share.max(mark.share).max(1.0);
            used = Some(used.map_or(part, |used| used.min(part)));
        }
        self.begin(streams);
        Some(if is_short {
            Verdict::Short(all)
        } else if used.is_some_and(|part| part >= FILLED) {
            Verdict::Filled
        } else {
            Verdict::Nothing
        })
    }

    /// Whether what it carries is worth saying; counts as said.
    fn is_news(&mut self) -> bool {
        let is_near = match (self.carries, self.said) {
            (Some(now), Some(said)) => (now - said).abs() <= NEWS * said,
            (now, said) => now.is_none() && said.is_none(),
        };
        if !is_near {
            self.said = self.carries;
        }
        !is_near
    }

    fn begin(&mut self, streams: &[Stream]) {
        let mark = |stream: &Stream| Mark {
            at_us: stream.at_us,
            sent_bytes: stream.sent_bytes,
            waited_ms: stream.waited_ms,
            share: stream.share,
            copies: stream.copies,
        };
        self.marks = streams
            .iter()
            .map(|stream| (stream.vm, mark(stream)))
            .collect();
    }

    fn judge(&mut self, verdict: &Verdict, told: f64, reserve: f64) {
        match *verdict {
            Verdict::Short(achieved) => {
                self.short.push(achieved);
                self.growth = GROWTH;
                if self.short.len() < BELIEVED as usize {
                    return;
                }
                let found = self.short.drain(..).fold(0.0, f64::max);
                let found = found.clamp(told * LEAST, told + reserve);
                self.next_rest = (self.next_rest * 2).clamp(REST, REST_AT_MOST);
                self.rest = self.next_rest;
                self.carries = Some(self.carries.map_or(found, |before| before.min(found)));
            }
            Verdict::Filled if self.rest == 0 => {
                self.short.clear();
                let more = self.carries.map(|carries| carries * (1.0 + self.growth));
                self.growth = (self.growth * 2.0).min(GROWTH_AT_MOST);
                self.carries = more.filter(|more| *more < told + reserve);
            }
            Verdict::Filled => {
                self.short.clear();
                self.rest -= 1;
            }
            Verdict::Nothing => {
                self.short.clear();
                self.rest = self.rest.saturating_sub(1);
                self.growth = GROWTH;
            }
        }
    }
}

impl Stream {
    #[allow(
        clippy::cast_precision_loss,
        reason = "bytes and microseconds of a window"
    )]
    fn rate_since(&self, mark: &Mark) -> f64 {
        let bytes = self.sent_bytes.saturating_sub(mark.sent_bytes);
        bytes as f64 * 1e6 / self.at_us.saturating_sub(mark.at_us).max(1) as f64
    }

    /// Whether its data waited for the path for a good part of the window.
    #[allow(clippy::cast_precision_loss, reason = "milliseconds of a window")]
    fn has_waited_since(&self, mark: &Mark) -> bool {
        let waited = self.waited_ms.saturating_sub(mark.waited_ms) as f64 * 1e3;
        let window = self.at_us.saturating_sub(mark.at_us).max(1) as f64;
        waited >= WAITED * window
    }
}

#[cfg(test)]
mod tests;
