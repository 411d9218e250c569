//! Pacer's prediction: each page is written again at its mean interval.

use crate::{PageSet, Pages, SizeMismatch, index};

/// What is known of a page; ticks count from 1.
#[derive(Debug, Clone, Copy, Default)]
struct Page {
    first: u32,
    last: u32,
    writes: u32,
}

/// Predicts each page's next write from its last one and the mean of its intervals.
#[derive(Debug, Clone)]
pub struct NextWrite {
    pages: Vec<Page>,
    ticks: u32,
}

impl NextWrite {
    /// For a guest of `pages`.
    #[must_use]
    pub fn new(pages: Pages) -> Self {
        Self {
            pages: vec![Page::default(); index(pages.0)],
            ticks: 0,
        }
    }

    /// Adds a tick.
    ///
    /// # Errors
    /// The guest's size has changed: begin anew.
    pub fn add(&mut self, dirtied: &PageSet) -> Result<(), SizeMismatch> {
        let expected = Pages(self.pages.len() as u64);
        if dirtied.pages() != expected {
            return Err(SizeMismatch {
                expected,
                found: dirtied.pages(),
            });
        }
        self.ticks = self.ticks.saturating_add(1);
        for run in dirtied.runs() {
            for page in &mut self.pages[index(run.first)..index(run.end())] {
                if page.writes == 0 {
                    page.first = self.ticks;
                }
                page.last = self.ticks;
                page.writes = page.writes.saturating_add(1);
            }
        }
        Ok(())
    }

    /// How many pages have a predicted write within the next `ticks`: of those with at least two
    /// writes, last + k · mean interval for the smallest k that lies ahead.
    #[must_use]
    pub fn predict(&self, ticks: u32) -> Pages {
        let end = f64::from(self.ticks) + f64::from(ticks);
        let due = |page: &&Page| page.next(self.ticks).is_some_and(|next| next <= end);
        Pages(self.pages.iter().filter(due).count() as u64)
    }
}

impl Page {
    fn next(&self, now: u32) -> Option<f64> {
        if self.writes < 2 {
            return None;
        }
        let mean = f64::from(self.last - self.first) / f64::from(self.writes - 1);
        let steps = (f64::from(now - self.last) / mean).floor() + 1.0;
        Some(f64::from(self.last) + steps * mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periodic_pages_are_predicted() {
        let mut model = NextWrite::new(Pages(3));
        for tick in 1..=20 {
            let mut dirtied = PageSet::new(Pages(3));
            if tick % 5 == 0 {
                dirtied.insert(0); // 5, 10, 15, 20: next at 25
            }
            if tick % 7 == 0 {
                dirtied.insert(1); // 7, 14: next at 21
            }
            if tick == 3 {
                dirtied.insert(2); // once: never again
            }
            model.add(&dirtied).unwrap();
        }
        let predicted = [0, 1, 4, 5, 100].map(|ticks| model.predict(ticks));
        assert_eq!(predicted, [0, 1, 1, 2, 2].map(Pages));
        assert!(model.add(&PageSet::new(Pages(2))).is_err());
    }
}
