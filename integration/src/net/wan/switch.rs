//! What the WAN does with a frame, without reading or writing one.
//!
//! A switch that learns on which port a hardware address is. From port to port a frame takes a
//! path, and all ports of one site take the same paths to those of another. A path is a line of
//! some rate, behind a queue of some length, and a way of some time after it: a frame is through
//! the line at `max(now, line is free) + size / rate`, and arrives a delay later.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::time::Duration;

use rate_limiter::BytesPerSecond;

use crate::clock::Micros;

/// The header that a tap puts before a frame (struct virtio_net_hdr).
pub const HEADER: usize = 10;
/// Addresses are forgotten, all at once, when there are more.
const ADDRESSES: usize = 4096;
/// What may be under way on all paths together.
const UNDER_WAY: usize = 128 << 20;

/// A hardware address.
pub type Mac = [u8; 6];

/// One way between two sites.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Path {
    /// How long a frame is on its way after it has left.
    pub delay: Duration,
    /// What the line carries; all there is, if none.
    pub rate: Option<BytesPerSecond>,
    /// The share of frames that is lost, 0 to 1. A frame of segmentation offload (64 KiB) is lost
    /// as a whole.
    pub loss: f64,
    /// How long a frame may wait for the line before it is dropped.
    pub queue: Duration,
}

impl Path {
    /// Within a site: all there is, at once.
    pub const OPEN: Self = Self {
        delay: Duration::ZERO,
        rate: None,
        loss: 0.0,
        queue: Duration::from_secs(1),
    };
}

/// What a path has carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Bytes as they would be on a wire: with the headers of every segment.
    pub bytes: u64,
    /// Frames that were dropped because the queue was full.
    pub dropped: u64,
    /// Frames that were lost on purpose.
    pub lost: u64,
}

#[derive(Debug)]
struct Line {
    path: Path,
    free_at: Micros,
    count: Count,
}

/// A frame on its way, ordered by its arrival.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arrival {
    at: Micros,
    order: u64,
    port: usize,
    frame: std::sync::Arc<[u8]>,
}

/// The switch. See the module.
#[derive(Debug)]
pub struct Switch {
    /// The site of every port.
    sites: Vec<usize>,
    /// By the sites where it begins and ends.
    lines: BTreeMap<(usize, usize), Line>,
    learned: HashMap<Mac, usize>,
    /// Between sites, by source and destination.
    pairs: BTreeMap<(Mac, Mac), u64>,
    arrivals: BinaryHeap<Reverse<Arrival>>,
    under_way: usize,
    order: u64,
    chance: u64,
}

impl Switch {
    /// A switch whose ports are in these sites, all paths open.
    #[must_use]
    pub fn new(sites: &[usize]) -> Self {
        let lines = sites
            .iter()
            .flat_map(|from| sites.iter().map(move |to| (*from, *to)));
        let line = || Line {
            path: Path::OPEN,
            free_at: Micros(0),
            count: Count::default(),
        };
        Self {
            sites: sites.to_vec(),
            lines: lines.map(|ends| (ends, line())).collect(),
            learned: HashMap::new(),
            pairs: BTreeMap::new(),
            arrivals: BinaryHeap::new(),
            under_way: 0,
            order: 0,
            chance: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Changes the paths between two sites, both ways, from the next frame on.
    pub fn set_path(&mut self, one: usize, other: usize, path: Path) {
        for ends in [(one, other), (other, one)] {
            if let Some(line) = self.lines.get_mut(&ends) {
                line.path = path;
            }
        }
    }

    /// What went from one site to another.
    #[must_use]
    pub fn count(&self, from: usize, to: usize) -> Count {
        self.lines
            .get(&(from, to))
            .map_or(Count::default(), |line| line.count)
    }

    /// The bytes between sites, by hardware address of sender and receiver.
    #[must_use]
    pub fn pairs(&self) -> &BTreeMap<(Mac, Mac), u64> {
        &self.pairs
    }

    /// Takes a frame, with its header, that came in at a port.
    pub fn take(&mut self, now: Micros, port: usize, frame: &[u8]) {
        let (Some(to), Some(from)) = (address(frame, 0), address(frame, 6)) else {
            return;
        };
        if self.learned.len() >= ADDRESSES {
            self.learned.clear();
        }
        self.learned.insert(from, port);
        let size = size_on_wire(frame);
        let known = self.learned.get(&to).copied().filter(|_| to[0] & 1 == 0);
        let frame: std::sync::Arc<[u8]> = frame.into();
        for out in 0..self.sites.len() {
            if out != port && known.is_none_or(|known| known == out) {
                self.send(now, port, out, &frame, size, (from, to));
            }
        }
    }

    fn send(
        &mut self,
        now: Micros,
        port: usize,
        out: usize,
        frame: &std::sync::Arc<[u8]>,
        size: u64,
        pair: (Mac, Mac),
    ) {
        let ends = (self.sites[port], self.sites[out]);
        let by_chance = self.next_chance();
        let Some(line) = self.lines.get_mut(&ends) else {
            return;
        };
        let path = line.path;
        let starts = line.free_at.max(now);
        if starts.since(now) > path.queue || self.under_way + frame.len() > UNDER_WAY {
            line.count.dropped += 1;
            return;
        }
        let takes = path
            .rate
            .map_or(0, |rate| size.saturating_mul(1_000_000) / rate.0.max(1));
        line.free_at = starts + Duration::from_micros(takes);
        line.count.bytes += size;
        if ends.0 != ends.1 {
            *self.pairs.entry(pair).or_default() += size;
        }
        if by_chance < path.loss {
            line.count.lost += 1;
            return;
        }
        self.order += 1;
        self.under_way += frame.len();
        self.arrivals.push(Reverse(Arrival {
            at: line.free_at + path.delay,
            order: self.order,
            port: out,
            frame: std::sync::Arc::clone(frame),
        }));
    }

    /// When the next frame arrives.
    #[must_use]
    pub fn next_arrival(&self) -> Option<Micros> {
        self.arrivals.peek().map(|Reverse(arrival)| arrival.at)
    }

    /// The next frame that has arrived, and at which port.
    pub fn arrived(&mut self, now: Micros) -> Option<(usize, std::sync::Arc<[u8]>)> {
        if self.next_arrival()? > now {
            return None;
        }
        let Reverse(arrival) = self.arrivals.pop()?;
        self.under_way = self.under_way.saturating_sub(arrival.frame.len());
        Some((arrival.port, arrival.frame))
    }

    /// A number from 0 to 1 (xorshift).
    fn next_chance(&mut self) -> f64 {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        let high = u32::try_from(self.chance >> 32).unwrap_or(0);
        f64::from(high) / f64::from(u32::MAX)
    }
}

fn address(frame: &[u8], at: usize) -> Option<Mac> {
    frame.get(HEADER + at..HEADER + at + 6)?.try_into().ok()
}

/// A frame of segmentation offload becomes several on a wire, each with headers of its own.
fn size_on_wire(frame: &[u8]) -> u64 {
    let size = frame.len().saturating_sub(HEADER);
    let word = |at: usize| usize::from(u16::from_le_bytes([frame[at], frame[at + 1]]));
    let (headers, segment) = (word(2), word(4));
    let segments = match size.checked_sub(headers) {
        Some(payload) if frame[1] != 0 && segment > 0 => payload.div_ceil(segment).max(1),
        _ => 1,
    };
    u64::try_from(size + (segments - 1) * headers).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: u8 = 2;
    const B: u8 = 4;

    fn frame(from: u8, to: u8, size: usize) -> Vec<u8> {
        let mut frame = vec![0; HEADER + size];
        frame[HEADER..HEADER + 6].fill(to);
        frame[HEADER + 6..HEADER + 12].fill(from);
        frame
    }

    fn wan(path: Path) -> Switch {
        let mut switch = Switch::new(&[0, 0, 1]);
        switch.set_path(0, 1, path);
        switch
    }

    fn ports(switch: &mut Switch, now: Micros) -> Vec<usize> {
        std::iter::from_fn(|| switch.arrived(now))
            .map(|(port, _)| port)
            .collect()
    }

    #[test]
    fn addresses_are_learned_and_move() {
        let mut switch = wan(Path::OPEN);
        let now = Micros(1);
        switch.take(now, 0, &frame(A, 0xff, 60));
        assert_eq!(ports(&mut switch, now), [1, 2], "flooded, but not back");
        switch.take(now, 2, &frame(B, A, 60));
        assert_eq!(ports(&mut switch, now), [0]);
        switch.take(now, 2, &frame(A, 0xff, 60));
        assert_eq!(ports(&mut switch, now), [0, 1]);
        switch.take(now, 1, &frame(B, A, 60));
        assert_eq!(ports(&mut switch, now), [2], "it is elsewhere now");
    }

    #[test]
    fn a_path_has_a_rate_a_delay_and_a_queue() {
        let mut switch = wan(Path {
            delay: Duration::from_millis(25),
            rate: Some(BytesPerSecond(1_000_000)),
            loss: 0.0,
            queue: Duration::from_millis(2),
        });
        let now = Micros(1_000_000);
        switch.take(now, 2, &frame(B, 0xff, 12));
        assert_eq!(ports(&mut switch, Micros(2_000_000)), [0, 1]);
        let now = now + Duration::from_secs(1);
        for _ in 0..5 {
            switch.take(now, 0, &frame(A, B, 1000));
        }
        // Each takes 1 ms; the fourth waits for 3.
        assert_eq!(switch.next_arrival(), Some(now + Duration::from_millis(26)));
        assert_eq!(ports(&mut switch, now + Duration::from_millis(27)).len(), 2);
        assert_eq!(ports(&mut switch, now + Duration::from_secs(1)).len(), 1);
        let count = switch.count(0, 1);
        assert_eq!((count.bytes, count.dropped), (3000, 2));
        assert_eq!(switch.pairs()[&([A; 6], [B; 6])], 3000);
    }

    #[test]
    fn loss_is_the_share_that_was_asked_for() {
        let mut switch = wan(Path {
            loss: 0.1,
            ..Path::OPEN
        });
        for _ in 0..10_000 {
            switch.take(Micros(1), 2, &frame(B, 0xff, 60));
        }
        let lost = switch.count(1, 0).lost;
        assert!((1800..2200).contains(&lost), "{lost} of 20000");
    }

    #[test]
    fn segments_have_headers_of_their_own() {
        let mut large = frame(A, B, 14_514);
        large[1] = 1;
        large[2..4].copy_from_slice(&54_u16.to_le_bytes());
        large[4..6].copy_from_slice(&1446_u16.to_le_bytes());
        assert_eq!(size_on_wire(&large), 10 * 1500);
        assert_eq!(size_on_wire(&frame(A, B, 60)), 60);
    }

    #[test]
    fn what_is_no_frame_is_passed_over() {
        let mut switch = wan(Path::OPEN);
        switch.take(Micros(1), 0, &[0; HEADER + 11]);
        switch.take(Micros(1), 0, &[]);
        assert_eq!(switch.next_arrival(), None);
    }
}
