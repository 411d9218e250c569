//! Dirty rate, writable working set and heat: what successive rounds say about a guest.
//!
//! A dirty rate always belongs to an interval: a page that is written a thousand times in a round
//! counts once, so longer rounds show lower rates. Compare rates of rounds of similar length.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use crate::{PageRun, PageSet, Pages, SizeMismatch, index, scan};

/// Distinct pages dirtied a second.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct PagesPerSecond(pub f64);

impl PagesPerSecond {
    /// The same in bytes a second.
    #[must_use]
    pub fn bytes_per_second(self, page_size_bytes: u32) -> f64 {
        self.0 * f64::from(page_size_bytes)
    }
}

impl fmt::Display for PagesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} pages/s", self.0)
    }
}

/// The dirty rate over the latest rounds.
#[derive(Debug, Clone)]
pub struct DirtyRate {
    rounds: VecDeque<(Pages, Duration)>,
    window: usize,
}

impl DirtyRate {
    /// Remembers up to `window` rounds, at least one.
    #[must_use]
    pub fn new(window: usize) -> Self {
        Self {
            rounds: VecDeque::new(),
            window: window.max(1),
        }
    }

    /// Adds a round. One without any length says nothing and is left out.
    pub fn add(&mut self, dirtied: Pages, duration: Duration) {
        if duration.is_zero() {
            return;
        }
        if self.rounds.len() == self.window {
            self.rounds.pop_front();
        }
        self.rounds.push_back((dirtied, duration));
    }

    /// The rate of the latest round.
    #[must_use]
    pub fn latest(&self) -> Option<PagesPerSecond> {
        self.rounds.back().map(|&round| rate(round))
    }

    /// Pages over time, of all rounds remembered.
    #[must_use]
    pub fn mean(&self) -> Option<PagesPerSecond> {
        let pages = self.rounds.iter().map(|(pages, _)| pages.0).sum();
        let duration: Duration = self.rounds.iter().map(|(_, duration)| duration).sum();
        (!duration.is_zero()).then(|| rate((Pages(pages), duration)))
    }

    /// The highest rate of a round.
    #[must_use]
    pub fn max(&self) -> Option<PagesPerSecond> {
        let rates = self.rounds.iter().map(|&round| rate(round));
        rates.max_by(|a, b| a.0.total_cmp(&b.0))
    }
}

#[allow(clippy::cast_precision_loss)]
fn rate((pages, duration): (Pages, Duration)) -> PagesPerSecond {
    PagesPerSecond(pages.0 as f64 / duration.as_secs_f64())
}

/// The writable working set, measured as VMbuddies (5.2) does: pages accumulate from the
/// beginning of the test, one peeks at their number regularly, and when two consecutive peeks
/// find the same number, the set is stable.
#[derive(Debug, Clone)]
pub struct WorkingSet {
    accumulated: PageSet,
    peeks: Vec<Pages>,
}

impl WorkingSet {
    /// Begins a test on a guest of `pages`.
    #[must_use]
    pub fn new(pages: Pages) -> Self {
        Self {
            accumulated: PageSet::new(pages),
            peeks: Vec::new(),
        }
    }

    /// Adds what was dirtied since the last peek, and peeks: the set's size, once it is stable.
    ///
    /// # Errors
    /// The guest's size has changed: begin anew.
    pub fn peek(&mut self, dirtied: &PageSet) -> Result<Option<Pages>, SizeMismatch> {
        self.accumulated.union_with(dirtied)?;
        self.peeks.push(self.accumulated.count());
        Ok(self.stable())
    }

    /// The size that the latest two peeks agree on.
    #[must_use]
    pub fn stable(&self) -> Option<Pages> {
        match self.peeks[..] {
            [.., before, latest] if before == latest => Some(latest),
            _ => None,
        }
    }

    /// The size at each peek: how the set grew.
    #[must_use]
    pub fn peeks(&self) -> &[Pages] {
        &self.peeks
    }

    /// The pages themselves.
    #[must_use]
    pub fn accumulated(&self) -> &PageSet {
        &self.accumulated
    }
}

/// How hot each region of memory is: the share of its pages that a round dirties, averaged with
/// weights that halve with age.
#[derive(Debug, Clone)]
pub struct HeatMap {
    regions: Vec<PageRun>,
    heat: Vec<f64>,
    half_life: Duration,
    begun: bool,
}

impl HeatMap {
    /// Divides `pages` into `regions` of nearly equal size, or fewer if there are fewer pages.
    #[must_use]
    pub fn new(pages: Pages, regions: usize, half_life: Duration) -> Self {
        let count = (regions as u64).min(pages.0);
        let (each, more) = match count {
            0 => (0, 0),
            count => (pages.0 / count, pages.0 % count),
        };
        let regions: Vec<PageRun> = (0..count)
            .map(|region| PageRun {
                first: region * each + region.min(more),
                count: Pages(each + u64::from(region < more)),
            })
            .collect();
        Self {
            heat: vec![0.0; regions.len()],
            regions,
            half_life,
            begun: false,
        }
    }

    /// Adds a round.
    ///
    /// # Errors
    /// The guest's size has changed: begin anew.
    #[allow(clippy::cast_precision_loss)]
    pub fn add(&mut self, dirtied: &PageSet, duration: Duration) -> Result<(), SizeMismatch> {
        let expected = Pages(self.regions.last().map_or(0, |region| region.end()));
        if dirtied.pages() != expected {
            return Err(SizeMismatch {
                expected,
                found: dirtied.pages(),
            });
        }
        let kept = match (self.begun, self.half_life.as_secs_f64()) {
            (false, _) | (_, 0.0) => 0.0,
            (true, half_life) => (-duration.as_secs_f64() / half_life).exp2(),
        };
        self.begun = true;
        for (heat, region) in self.heat.iter_mut().zip(&self.regions) {
            let share = count_in(dirtied, *region) as f64 / region.count.0 as f64;
            *heat = *heat * kept + share * (1.0 - kept);
        }
        Ok(())
    }

    /// The regions and the heat of each, 0 to 1.
    pub fn cells(&self) -> impl ExactSizeIterator<Item = (PageRun, f64)> {
        self.regions.iter().copied().zip(self.heat.iter().copied())
    }
}

/// How many pages of a set lie in `region`: whole words by the vectors, the ends by bits.
fn count_in(set: &PageSet, region: PageRun) -> u64 {
    let bits = &set.bits()[index(region.first)..index(region.end())];
    match bits.domain() {
        bitvec::domain::Domain::Enclave(part) => u64::from(part.load_value().count_ones()),
        bitvec::domain::Domain::Region { head, body, tail } => {
            let ends = head.into_iter().chain(tail);
            let ends: u64 = ends.map(|p| u64::from(p.load_value().count_ones())).sum();
            ends + scan::count(body)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn set(pages: u64, members: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(Pages(pages));
        members.into_iter().for_each(|page| {
            set.insert(page);
        });
        set
    }

    #[test]
    fn rates_are_weighted_by_time_and_forget() {
        let mut rate = DirtyRate::new(2);
        assert_eq!((rate.latest(), rate.mean(), rate.max()), (None, None, None));
        rate.add(Pages(1_000_000), SECOND);
        rate.add(Pages(100), SECOND / 2);
        rate.add(Pages(7), Duration::ZERO);
        rate.add(Pages(100), 2 * SECOND);
        assert_eq!(rate.latest(), Some(PagesPerSecond(50.0)));
        assert_eq!(rate.mean(), Some(PagesPerSecond(80.0)));
        assert_eq!(rate.max(), Some(PagesPerSecond(200.0)));
        assert!((rate.mean().unwrap().bytes_per_second(4096) - 327_680.0).abs() < 1e-6);
    }

    #[test]
    fn a_working_set_is_stable_when_two_peeks_agree() {
        let mut wws = WorkingSet::new(Pages(1000));
        let peeks: [(&[u64], Option<u64>); 5] = [
            (&[1, 2], None),
            (&[2, 3], None),
            (&[1, 3], Some(3)),
            (&[999], None), // a new phase: no longer stable
            (&[], Some(4)),
        ];
        for (dirtied, stable) in peeks {
            let found = wws.peek(&set(1000, dirtied.iter().copied())).unwrap();
            assert_eq!(found, stable.map(Pages));
        }
        assert_eq!(wws.peeks(), [2, 3, 3, 4, 4].map(Pages));
        assert!(wws.peek(&PageSet::new(Pages(999))).is_err());
    }

    #[test]
    fn regions_cover_all_pages_once_and_cool_down() {
        let mut map = HeatMap::new(Pages(1003), 10, SECOND);
        let regions: Vec<PageRun> = map.cells().map(|(region, _)| region).collect();
        let mut next = 0;
        for region in &regions {
            assert_eq!(region.first, next);
            assert!((100..=101).contains(&region.count.0));
            next = region.end();
        }
        assert_eq!(next, 1003);
        map.add(&set(1003, regions[3].first..regions[3].end()), SECOND)
            .unwrap();
        let heat: Vec<f64> = map.cells().map(|(_, heat)| heat).collect();
        assert!((heat[3] - 1.0).abs() < 1e-9 && heat[2] == 0.0 && heat[4] == 0.0);
        map.add(&PageSet::new(Pages(1003)), SECOND).unwrap();
        assert!((map.cells().nth(3).unwrap().1 - 0.5).abs() < 1e-9);
        assert_eq!(HeatMap::new(Pages(3), 10, SECOND).cells().len(), 3);
        assert_eq!(HeatMap::new(Pages(0), 10, SECOND).cells().len(), 0);
    }

    #[test]
    fn parts_are_counted_as_bit_by_bit() {
        let set = set(500, (0..500).filter(|page| page % 3 == 1));
        for (first, count) in [(0, 500), (1, 62), (10, 20), (63, 2), (64, 128), (100, 399)] {
            let count = Pages(count);
            let run = PageRun { first, count };
            let expected = (run.first..run.end()).filter(|&p| set.contains(p)).count();
            assert_eq!(count_in(&set, run), expected as u64, "{run:?}");
        }
    }
}
