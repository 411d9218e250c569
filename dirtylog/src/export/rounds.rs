//! An export as a [`Bitmap`]: one round after the other, all blocks in one row.

use super::{Mode, ReadError, Reader, Retries, Snapshot};
use crate::{Bitmap, PageSet, Pages, Round, words_for};

/// Why a round of an export cannot be collected.
#[derive(Debug, thiserror::Error)]
pub enum RoundsError {
    /// The export cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The writer will write no more rounds.
    #[error("the export is finished: its last round was {round}")]
    Finished {
        /// The last round.
        round: u64,
    },
}

/// The rounds of an export.
///
/// The blocks' pages follow one another in the table's order, each block beginning at the next
/// multiple of 64 pages: [`Rounds::first_page`] says where.
///
/// The writer ends the rounds, not the reader: a round that ends before the previous one was
/// collected replaces it, which [`Round::missed`] tells.
#[derive(Debug)]
pub struct Rounds {
    reader: Reader,
    retries: Retries,
    snapshot: Snapshot,
    last: Option<(Mode, u64)>,
}

impl Rounds {
    /// The rounds that `reader` will see from now on.
    #[must_use]
    pub fn new(reader: Reader, retries: Retries) -> Self {
        Self {
            reader,
            retries,
            snapshot: Snapshot::new(),
            last: None,
        }
    }

    /// The latest export, as it was when [`Bitmap::collect`] looked last.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The sequence number of the export: while it stays, there is nothing to collect. Costs one
    /// load.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.reader.sequence()
    }

    /// The page of the row that block `index` begins with.
    #[must_use]
    pub fn first_page(&self, index: usize) -> u64 {
        let before = self.snapshot.blocks().iter().take(index);
        before.map(|block| row_pages(&block.dirtied)).sum()
    }
}

/// How many pages of the row a block takes.
fn row_pages(set: &PageSet) -> u64 {
    set.words().len() as u64 * 64
}

impl Bitmap for Rounds {
    type Error = RoundsError;

    fn pages(&self) -> Pages {
        let Some((last, before)) = self.snapshot.blocks().split_last() else {
            return Pages(0);
        };
        let row: u64 = before.iter().map(|block| row_pages(&block.dirtied)).sum();
        Pages(row + last.dirtied.pages().0)
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<Option<Round>, RoundsError> {
        match self.reader.snapshot(&mut self.snapshot, self.retries) {
            Err(ReadError::Empty) => return Ok(None),
            other => other?,
        }
        let Some(header) = self.snapshot.header() else {
            return Ok(None);
        };
        let this = (header.mode, header.round);
        if !header.round_ended || self.last == Some(this) {
            if header.finished {
                return Err(RoundsError::Finished {
                    round: header.round,
                });
            }
            return Ok(None);
        }
        let before = match self.last {
            Some((mode, round)) if mode == header.mode && round < header.round => round,
            Some(_) => 0, // another migration, or none any more: it counts from 1
            None => header.round - header.round.min(1), // what was before us is no loss
        };
        let round = Round {
            number: header.round,
            duration: header.time.checked_sub(header.round_begin),
            missed: header.round.saturating_sub(before).saturating_sub(1),
        };
        self.last = Some(this);
        into.reset(self.pages());
        let mut first = 0;
        for block in self.snapshot.blocks() {
            let words = block.dirtied.words();
            into.words_mut()[first..first + words_for(block.dirtied.pages().0)]
                .copy_from_slice(words);
            first += words.len();
        }
        Ok(Some(round))
    }
}
