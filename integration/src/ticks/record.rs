//! What one VM's ticks say: where it ran, how long it stood still, and whether it was ever two.

use std::ops::Range;
use std::time::Duration;

use serde::Serialize;

use crate::clock::Micros;

/// One tick as it arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tick {
    /// When.
    pub at: Micros,
    /// From which QEMU: index into [`Record::sources`].
    pub source: u16,
    /// The low byte of the guest's counter.
    pub byte: u8,
}

/// All ticks of one VM, whatever QEMU it ran in.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// The time between two ticks of a guest that is left alone.
    pub period: Duration,
    /// The QEMUs that connected, by the host each runs on.
    pub sources: Vec<String>,
    /// The ticks, in order.
    pub ticks: Vec<Tick>,
}

/// The VM stopped in one QEMU and went on in another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switchover {
    /// The host it left.
    pub from: String,
    /// The host it came to.
    pub to: String,
    /// Its last tick there.
    pub last: Micros,
    /// Its first tick here.
    pub first: Micros,
    /// How long it stood still: the gap less one tick period.
    pub downtime: Duration,
    /// The counter went on by one: no tick was lost, none came twice.
    pub continuous: bool,
}

/// A QEMU ticked again after another one had: two copies of the VM ran. Split brain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap {
    /// The host of the QEMU that ticked again.
    pub host: String,
    /// The host of the QEMU that ticked in between.
    pub other: String,
    /// When it ticked again.
    pub at: Micros,
}

/// The counter did not go on by one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Break {
    /// When.
    pub at: Micros,
    /// The byte that had to come.
    pub expected: u8,
    /// The byte that came.
    pub found: u8,
}

/// The longest time without a tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The tick before it.
    pub from: Micros,
    /// The tick after it.
    pub to: Micros,
}

impl Gap {
    /// Its length.
    #[must_use]
    pub fn length(self) -> Duration {
        self.to.since(self.from)
    }
}

/// How regularly a VM ticked.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GapStats {
    /// Ticks looked at.
    pub ticks: usize,
    /// Ticks per second.
    pub hz: f64,
    /// Median gap between ticks.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Record {
    /// The part of the record in a span of time.
    #[must_use]
    pub fn window(&self, span: Range<Micros>) -> Self {
        let from = self.ticks.partition_point(|tick| tick.at < span.start);
        let to = self.ticks.partition_point(|tick| tick.at < span.end);
        Self {
            period: self.period,
            sources: self.sources.clone(),
            ticks: self.ticks[from..to.max(from)].to_vec(),
        }
    }

    /// Every move to another QEMU.
    #[must_use]
    pub fn switchovers(&self) -> Vec<Switchover> {
        self.pairs()
            .filter(|(before, after)| before.source != after.source)
            .map(|(before, after)| Switchover {
                from: self.host(before.source),
                to: self.host(after.source),
                last: before.at,
                first: after.at,
                downtime: after.at.since(before.at).saturating_sub(self.period),
                continuous: after.byte == before.byte.wrapping_add(1),
            })
            .collect()
    }

    /// Every time a QEMU ticked again after another had ticked. Must be empty.
    #[must_use]
    pub fn overlaps(&self) -> Vec<Overlap> {
        let mut seen = vec![false; self.sources.len()];
        let mut overlaps = Vec::new();
        let mut last: Option<Tick> = None;
        for tick in &self.ticks {
            if let Some(before) = last.filter(|before| before.source != tick.source) {
                if seen[usize::from(tick.source)] {
                    overlaps.push(Overlap {
                        host: self.host(tick.source),
                        other: self.host(before.source),
                        at: tick.at,
                    });
                }
            }
            seen[usize::from(tick.source)] = true;
            last = Some(*tick);
        }
        overlaps
    }

    /// Every place where the counter did not go on by one. Must be empty.
    #[must_use]
    pub fn breaks(&self) -> Vec<Break> {
        self.pairs()
            .filter(|(before, after)| after.byte != before.byte.wrapping_add(1))
            .map(|(before, after)| Break {
                at: after.at,
                expected: before.byte.wrapping_add(1),
                found: after.byte,
            })
            .collect()
    }

    /// The longest gap between two ticks.
    #[must_use]
    pub fn longest_gap(&self) -> Option<Gap> {
        self.pairs()
            .map(|(before, after)| Gap {
                from: before.at,
                to: after.at,
            })
            .max_by_key(|gap| gap.length())
    }

    /// How regular the ticks are; nothing if there are fewer than two.
    #[must_use]
    pub fn gaps(&self) -> Option<GapStats> {
        let mut gaps: Vec<_> = self.pairs().map(|(a, b)| b.at.since(a.at)).collect();
        let total: Duration = gaps.iter().sum();
        gaps.sort_unstable();
        let ms = |gap: &Duration| gap.as_secs_f64() * 1e3;
        let rank = |percent: usize| gaps.get((gaps.len() * percent / 100).min(gaps.len() - 1));
        let count = u32::try_from(gaps.len()).unwrap_or(u32::MAX);
        Some(GapStats {
            ticks: self.ticks.len(),
            max_ms: gaps.last().map(ms)?,
            hz: f64::from(count) / total.as_secs_f64().max(1e-9),
            p50_ms: rank(50).map(ms)?,
            p99_ms: rank(99).map(ms)?,
        })
    }

    /// The hosts from which a tick came at `since` or later: where the VM runs.
    #[must_use]
    pub fn running(&self, since: Micros) -> Vec<String> {
        let mut hosts: Vec<String> = Vec::new();
        for tick in self.ticks.iter().rev().take_while(|tick| tick.at >= since) {
            let host = &self.sources[usize::from(tick.source)];
            if !hosts.contains(host) {
                hosts.push(host.clone());
            }
        }
        hosts
    }

    fn pairs(&self) -> impl Iterator<Item = (Tick, Tick)> + '_ {
        self.ticks.windows(2).map(|pair| (pair[0], pair[1]))
    }

    fn host(&self, source: u16) -> String {
        self.sources[usize::from(source)].clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(ticks: &[(u64, u16, u8)]) -> Record {
        Record {
            period: Duration::from_millis(1),
            sources: vec!["a".into(), "b".into()],
            ticks: ticks
                .iter()
                .map(|&(ms, source, byte)| Tick {
                    at: Micros(ms * 1000),
                    source,
                    byte,
                })
                .collect(),
        }
    }

    #[test]
    fn a_move_is_seen_with_its_downtime() {
        let record = record(&[(0, 0, 254), (1, 0, 255), (22, 1, 0), (23, 1, 1)]);
        let moves = record.switchovers();
        assert_eq!(moves.len(), 1);
        assert_eq!((moves[0].from.as_str(), moves[0].to.as_str()), ("a", "b"));
        assert_eq!(moves[0].downtime, Duration::from_millis(20));
        assert!(moves[0].continuous && record.breaks().is_empty());
        assert!(record.overlaps().is_empty());
        assert_eq!(
            record.longest_gap().unwrap().length(),
            Duration::from_millis(21)
        );
        assert_eq!(record.running(Micros(22_000)), ["b"]);
        assert_eq!(record.running(Micros(1_000)), ["b", "a"]);
    }

    #[test]
    fn two_running_copies_are_seen() {
        let record = record(&[(0, 0, 7), (1, 1, 8), (2, 0, 8), (3, 1, 9)]);
        let overlaps = record.overlaps();
        assert_eq!(overlaps.len(), 2);
        assert_eq!(overlaps[0].host, "a");
        assert_eq!(overlaps[0].at, Micros(2000));
        assert_eq!(record.breaks().len(), 1);
        assert_eq!(record.running(Micros(0)).len(), 2);
    }

    #[test]
    fn lost_and_repeated_ticks_are_breaks() {
        assert_eq!(record(&[(0, 0, 7), (1, 1, 9)]).breaks()[0].expected, 8);
        assert_eq!(record(&[(0, 0, 7), (1, 1, 7)]).breaks()[0].found, 7);
        assert!(!record(&[(0, 0, 7), (1, 1, 7)]).switchovers()[0].continuous);
    }

    #[test]
    fn statistics_of_a_window() {
        let all: Vec<_> = (0..=100_u8).map(|n| (u64::from(n), 0, n)).collect();
        let record = record(&all).window(Micros(10_000)..Micros(21_000));
        assert_eq!(record.ticks.len(), 11);
        let stats = record.gaps().unwrap();
        assert!((stats.hz - 1000.0).abs() < 1e-6 && (stats.p99_ms - 1.0).abs() < 1e-6);
        assert!(record.window(Micros(0)..Micros(1)).gaps().is_none());
    }
}
