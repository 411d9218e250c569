//! [`Bitmap`]: what every source of dirty pages can do; and the one in our own memory.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::{PageSet, Pages, index, words_for};

/// A log of dirtied pages that is read round by round.
///
/// A round ends when it is collected, or, where the writer of the log ends it (the export of
/// QEMU), when the writer says so.
pub trait Bitmap {
    /// Why a round cannot be collected.
    type Error: std::error::Error + Send + Sync + 'static;

    /// How many pages the log is about, as far as is known.
    fn pages(&self) -> Pages;

    /// Replaces `into` by the pages that were dirtied in the round that has ended, and begins the
    /// next one.
    ///
    /// Every write is in exactly one round, or, if it happens while this runs, in one or both of
    /// the two rounds that it lies between: never in none. `None`: no round has ended since the
    /// last call, and `into` is as it was.
    ///
    /// # Errors
    /// The source fails or says nonsense; `into` holds anything then.
    fn collect(&mut self, into: &mut PageSet) -> Result<Option<Round>, Self::Error>;
}

/// A round that was collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Its number, as the source counts.
    pub number: u64,
    /// How long it was, if the source knows.
    pub duration: Option<Duration>,
    /// Rounds that ended before it and that nobody can collect any more.
    pub missed: u64,
}

/// A log in our own memory, that any number of threads may mark.
#[derive(Debug)]
pub struct MemoryLog {
    words: Box<[AtomicU64]>,
    pages: u64,
    rounds: AtomicU64,
}

impl MemoryLog {
    /// A clean log of `pages`.
    #[must_use]
    pub fn new(pages: Pages) -> Self {
        Self {
            words: (0..words_for(pages.0)).map(|_| AtomicU64::new(0)).collect(),
            pages: pages.0,
            rounds: AtomicU64::new(0),
        }
    }

    /// Notes that `page` was written.
    ///
    /// The write itself must come before: it is in the memory of whoever collects the mark.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn mark(&self, page: u64) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        // Release, to the acquiring swap of the collector: one instruction per marked page on
        // any machine, and none is sequentially consistent.
        self.words[index(page / 64)].fetch_or(1 << (page % 64), Ordering::Release);
    }
}

impl Bitmap for &MemoryLog {
    type Error = Infallible;

    fn pages(&self) -> Pages {
        Pages(self.pages)
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<Option<Round>, Infallible> {
        into.reset(Pages(self.pages));
        for (shared, own) in self.words.iter().zip(into.words_mut()) {
            // Clean words are only read, so that their cache lines stay shared.
            if shared.load(Ordering::Relaxed) != 0 {
                *own = shared.swap(0, Ordering::Acquire);
            }
        }
        Ok(Some(Round {
            number: self.rounds.fetch_add(1, Ordering::Relaxed) + 1,
            duration: None,
            missed: 0,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_mark_is_lost_between_threads() {
        let log = MemoryLog::new(Pages(100_000));
        let mut collected = PageSet::new(Pages(100_000));
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let log = &log;
                scope.spawn(move || (thread..100_000).step_by(2).for_each(|page| log.mark(page)));
            }
            let mut part = PageSet::default();
            while collected.count() < Pages(100_000) {
                let Ok(round) = (&log).collect(&mut part);
                assert!(round.is_some());
                assert_eq!(collected.common(&part).unwrap(), Pages(0));
                collected.union_with(&part).unwrap();
                std::thread::yield_now();
            }
        });
    }
}
