//! What an exported dirty log says, interval by interval.

use std::time::Duration;

use dirtylog::export::{Limits, Mode, Reader, Retries, Rounds, RoundsError};
use dirtylog::footprint::Footprint;
use dirtylog::rate::{DirtyRate, HeatMap, WorkingSet};
use dirtylog::{Bitmap, PageSet, Pages, SizeMismatch};

use super::{RATES, whole};
use crate::protocol::dirty::{DirtyRound, DirtySource, DirtyStartArgs, Heat, Predicted};

/// After so long an interval counts half in the heat map.
const HALF_LIFE: Duration = Duration::from_secs(2);
/// Predictions look this many intervals ahead at most: what is known of each costs 12 bytes.
const MAX_HORIZON: usize = 100_000;
/// A delay that is this close to a whole number of intervals is one.
const CLOSE: f64 = 0.02;
/// Memory that a VM may have beside its RAM, for its devices' ROMs and video memory.
const DEVICES_BYTES: u64 = 16 << 30;
/// Header and table of the blocks.
const TABLE_BYTES: u64 = 2 << 20;

/// How long the export of a VM with so much RAM may become: twice what it should be.
#[must_use]
pub fn limits(memory_bytes: u64) -> Limits {
    let most = Limits::default().file_bytes;
    let pages = memory_bytes.saturating_mul(2).saturating_add(DEVICES_BYTES) / 4096;
    let bitmaps = pages / 8 * 2;
    Limits {
        file_bytes: bitmaps.saturating_add(TABLE_BYTES).min(most),
    }
}

/// What a look at the log found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    /// No interval has ended since the last look.
    Nothing,
    /// An interval.
    Round(Box<DirtyRound>),
    /// A migration runs: its rounds are no intervals.
    Migrating,
}

/// An export that is being read.
#[derive(Debug)]
pub struct Log {
    wanted: DirtyStartArgs,
    rounds: Rounds,
    seen: u64,
    dirtied: PageSet,
    count: u64,
    rate: DirtyRate,
    guest: Guest,
    /// Length of all intervals, to tell how long one is.
    measured: Duration,
}

/// What is remembered of the guest's pages: as long as its size stays.
#[derive(Debug)]
struct Guest {
    set: WorkingSet,
    footprint: Footprint,
    heat: HeatMap,
}

impl Guest {
    fn new(pages: Pages, wanted: &DirtyStartArgs) -> Self {
        let longest = wanted.delays_ms.iter().max().copied().unwrap_or(0);
        let ticks = longest.div_ceil(wanted.interval_ms.max(1)) + 1;
        let horizon = usize::try_from(ticks).unwrap_or(MAX_HORIZON);
        Self {
            set: WorkingSet::new(pages),
            footprint: Footprint::new(pages, horizon.min(MAX_HORIZON)),
            heat: HeatMap::new(pages, wanted.heat_cells, HALF_LIFE),
        }
    }

    fn add(&mut self, dirtied: &PageSet, duration: Duration) -> Result<(), SizeMismatch> {
        self.set.peek(dirtied)?;
        self.footprint.add(dirtied)?;
        if self.heat.cells().len() > 0 {
            self.heat.add(dirtied, duration)?;
        }
        Ok(())
    }
}

impl Log {
    /// The log that `reader` will see.
    #[must_use]
    pub fn new(reader: Reader, wanted: DirtyStartArgs) -> Self {
        Self {
            guest: Guest::new(Pages(0), &wanted),
            wanted,
            rounds: Rounds::new(reader, Retries::default()),
            seen: 0,
            dirtied: PageSet::default(),
            count: 0,
            rate: DirtyRate::new(RATES),
            measured: Duration::ZERO,
        }
    }

    /// Looks whether an interval has ended. Cheap while none has.
    ///
    /// # Errors
    /// The export cannot be read, or QEMU has ended it.
    pub fn look(&mut self) -> Result<Look, RoundsError> {
        let sequence = self.rounds.sequence();
        if sequence == self.seen {
            return Ok(Look::Nothing);
        }
        let round = self.rounds.collect(&mut self.dirtied)?;
        self.seen = sequence;
        let Some(header) = self.rounds.snapshot().header() else {
            return Ok(Look::Nothing);
        };
        let page_size = header.page_size_bytes;
        if header.mode == Mode::Migrating {
            return Ok(Look::Migrating);
        }
        let Some((round, duration)) = round.and_then(|r| Some((r, r.duration?))) else {
            return Ok(Look::Nothing);
        };
        if self.guest.add(&self.dirtied, duration).is_err() {
            // The guest's size has changed: what was known of its pages is worth nothing.
            self.guest = Guest::new(self.dirtied.pages(), &self.wanted);
            let fits = self.guest.add(&self.dirtied, duration);
            debug_assert!(fits.is_ok(), "made for this size");
        }
        let dirtied = self.dirtied.count();
        self.rate.add(dirtied, duration);
        self.count += 1;
        self.measured += duration;
        Ok(Look::Round(Box::new(self.figures(
            page_size,
            dirtied,
            duration,
            round.missed,
        ))))
    }

    fn figures(
        &self,
        page_size: u32,
        dirtied: Pages,
        duration: Duration,
        missed: u64,
    ) -> DirtyRound {
        let bytes = |pages: Pages| pages.0.saturating_mul(page_size.into());
        let rate = |rate: Option<dirtylog::rate::PagesPerSecond>| {
            rate.map_or(0, |rate| whole(rate.bytes_per_second(page_size)))
        };
        DirtyRound {
            vm: self.wanted.vm.clone(),
            source: DirtySource::Export,
            round: self.count,
            duration_us: u64::try_from(duration.as_micros()).unwrap_or(u64::MAX),
            missed,
            dirtied_bytes: bytes(dirtied),
            dirty_rate_bytes_per_s: rate(self.rate.latest()),
            mean_dirty_rate_bytes_per_s: rate(self.rate.mean()),
            max_dirty_rate_bytes_per_s: rate(self.rate.max()),
            working_set_bytes: self.guest.set.peeks().last().map(|pages| bytes(*pages)),
            working_set_stable: Some(self.guest.set.stable().is_some()),
            predicted: self.predict(page_size),
            heat: self.heat(page_size),
            disks: Vec::new(),
        }
    }

    fn predict(&self, page_size: u32) -> Vec<Predicted> {
        let interval =
            self.measured.as_secs_f64() / f64::from(u32::try_from(self.count).unwrap_or(u32::MAX));
        let curve: Vec<f64> = self.guest.footprint.curve().collect();
        let predicted = |&delay_ms: &u64| {
            let ticks = Duration::from_millis(delay_ms).as_secs_f64() / interval;
            let pages = at(&curve, ticks);
            Predicted {
                delay_ms,
                dirty_bytes: pages.map(|pages| whole(pages * f64::from(page_size))),
            }
        };
        self.wanted.delays_ms.iter().map(predicted).collect()
    }

    fn heat(&self, page_size: u32) -> Option<Heat> {
        let cells = self.guest.heat.cells();
        let span = self.dirtied.pages().0.saturating_mul(page_size.into());
        (cells.len() > 0).then(|| Heat {
            span_bytes: span,
            percent: cells.map(|(_, heat)| percent(heat)).collect(),
        })
    }
}

/// The curve at a point between its values; `None` beyond its end.
fn at(curve: &[f64], point: f64) -> Option<f64> {
    let point = if (point - point.round()).abs() < CLOSE {
        point.round()
    } else {
        point
    };
    let before = usize::try_from(whole(point.floor())).ok()?;
    let (low, part) = (*curve.get(before)?, point.fract());
    if part == 0.0 {
        return Some(low);
    }
    Some(low + (curve.get(before + 1)? - low) * part)
}

/// A share, 0 to 1, in percent: only what is cold is 0.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "0 to 100"
)]
fn percent(share: f64) -> u8 {
    // What is left of a write after fifteen half-lives is no heat.
    (share * 100.0 - 0.003).ceil().clamp(0.0, 100.0) as u8
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use dirtylog::export::{BlockSpec, Sync, Writer, memfd};

    use super::*;

    const PAGES: u64 = 6400;

    fn wanted() -> DirtyStartArgs {
        DirtyStartArgs {
            vm: "db".into(),
            interval_ms: 100,
            duration_ms: 1000,
            delays_ms: vec![100, 250, 300],
            heat_cells: 64,
            disks: false,
        }
    }

    struct Exporting {
        writer: Writer,
        log: Log,
        round: u32,
    }

    fn block(pages: u64) -> BlockSpec {
        BlockSpec {
            name: "pc.ram".into(),
            used_length_bytes: pages * 4096,
        }
    }

    impl Exporting {
        fn new() -> Self {
            let fd: OwnedFd = memfd("test").expect("a memfd");
            let copy = fd.try_clone().expect("a descriptor");
            let writer = Writer::new(copy, 4096, &[block(PAGES)]).expect("a writer");
            let reader = Reader::new(fd, limits(PAGES * 4096)).expect("a reader");
            let log = Log::new(reader, wanted());
            Self {
                writer,
                log,
                round: 0,
            }
        }

        fn sync(&mut self, pages: u64, dirtied: std::ops::Range<u64>, mode: Mode) -> Look {
            let mut set = PageSet::new(Pages(pages));
            dirtied.for_each(|page| {
                set.insert(page);
            });
            let begin = Duration::from_millis(100) * self.round;
            self.round += 1;
            let mut update = self.writer.begin();
            update.dirtied(0, &set);
            update.finish(Sync {
                mode,
                round: self.round.into(),
                round_ended: true,
                round_begin: begin,
                time: begin + Duration::from_millis(100),
                finished: false,
                spent: Duration::ZERO,
            });
            self.log.look().expect("readable")
        }

        fn interval(&mut self, dirtied: std::ops::Range<u64>) -> DirtyRound {
            match self.sync(PAGES, dirtied, Mode::Measuring) {
                Look::Round(round) => *round,
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_sweep_is_measured_and_foreseen() {
        let mut export = Exporting::new();
        assert_eq!(export.log.look().expect("empty"), Look::Nothing);
        let mut last = None;
        // 100 pages each interval, round and round through 400.
        for round in 0..12 {
            let first = round % 4 * 100;
            last = Some(export.interval(first..first + 100));
            assert_eq!(export.log.look().expect("nothing new"), Look::Nothing);
        }
        let last = last.expect("rounds");
        assert_eq!(
            (last.round, last.missed, last.duration_us),
            (12, 0, 100_000)
        );
        assert_eq!(last.dirtied_bytes, 409_600);
        assert_eq!(last.dirty_rate_bytes_per_s, 4_096_000);
        assert_eq!(last.mean_dirty_rate_bytes_per_s, 4_096_000);
        assert_eq!(last.working_set_bytes, Some(4 * 409_600));
        assert_eq!(last.working_set_stable, Some(true));
        let bytes: Vec<_> = last.predicted.iter().map(|p| p.dirty_bytes).collect();
        assert_eq!(bytes, [Some(409_600), Some(1_024_000), Some(1_228_800)]);
        let heat = last.heat.expect("a heat map");
        assert_eq!(heat.span_bytes, PAGES * 4096);
        // Four cells of a hundred pages are warm, the others are cold.
        assert!(heat.percent[..4].iter().all(|&p| p > 0), "{heat:?}");
        assert!(heat.percent[4..].iter().all(|&p| p == 0), "{heat:?}");
    }

    #[test]
    fn nothing_is_foreseen_further_than_was_measured() {
        let mut export = Exporting::new();
        let first = export.interval(0..10);
        let bytes: Vec<_> = first.predicted.iter().map(|p| p.dirty_bytes).collect();
        assert_eq!(bytes, [Some(40_960), None, None]);
        assert_eq!(first.working_set_stable, Some(false));
    }

    #[test]
    fn missed_intervals_hotplug_and_migrations_are_noticed() {
        let mut export = Exporting::new();
        export.interval(0..10);
        export.round += 2;
        assert_eq!(export.interval(0..10).missed, 2);
        export
            .writer
            .set_blocks(&[block(2 * PAGES)])
            .expect("larger");
        let Look::Round(round) = export.sync(2 * PAGES, 5..6, Mode::Measuring) else {
            panic!("no round");
        };
        assert_eq!(round.working_set_bytes, Some(4096));
        let look = export.sync(2 * PAGES, 0..1, Mode::Migrating);
        assert_eq!(look, Look::Migrating);
    }

    #[test]
    fn a_curve_is_read_between_its_points() {
        let curve = [0.0, 10.0, 14.0];
        assert_eq!(at(&curve, 1.0), Some(10.0));
        assert_eq!(at(&curve, 1.5), Some(12.0));
        assert_eq!(at(&curve, 2.01), Some(14.0));
        assert_eq!(at(&curve, 2.5), None);
    }

    #[test]
    fn an_export_may_be_as_long_as_the_guest_needs() {
        for memory in [1 << 20, 1 << 30, 1 << 40] {
            let bitmaps = memory / 4096 / 8 * 2;
            let limit = limits(memory).file_bytes;
            assert!(limit > bitmaps, "{memory}");
            assert!(limit < 2 * bitmaps + (4 << 20), "{memory}: {limit}");
        }
        assert_eq!(limits(u64::MAX), Limits::default());
    }
}
