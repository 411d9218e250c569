//! Reading an export, whoever wrote it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::layout::{HEADER_BYTES, Header, Layout, LayoutError, word};
use super::{Block, Limits, MapError, Snapshot};
use crate::scan::{Runs, Words};
use crate::sys::{ReadMap, SharedWords};
use crate::{PageSet, Pages, SizeMismatch, index, valid_bits};

/// Why an export cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be mapped, or is shorter than its header says.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Nothing was exported yet. Try again later.
    #[error("nothing was exported yet")]
    Empty,
    /// The writer was at work each time. It is slow, or it died in the middle.
    #[error("the writer was at work at each of {attempts} attempts (sequence {sequence})")]
    Torn {
        /// How often it was tried.
        attempts: u32,
        /// The sequence number that was seen last; odd: the writer has not finished.
        sequence: u64,
    },
    /// The writer wrote nonsense.
    #[error("the dirty log is invalid: {0}")]
    Layout(#[from] LayoutError),
    /// There is no such block in the current layout.
    #[error("there is no block {index}: the export has {blocks}")]
    NoBlock {
        /// What was asked for.
        index: usize,
        /// How many there are.
        blocks: usize,
    },
}

/// How often to try again when the writer is at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// Attempts in all, at least one.
    pub attempts: u32,
    /// The pause before the next attempt, if the writer has not finished.
    pub pause: Duration,
}

impl Retries {
    /// One attempt that never sleeps, for an event loop.
    pub const NONE: Self = Self {
        attempts: 1,
        pause: Duration::ZERO,
    };
}

impl Default for Retries {
    /// Up to 20 ms of pauses: the writer needs a few milliseconds for a guest of 1 TiB.
    fn default() -> Self {
        Self {
            attempts: 100,
            pause: Duration::from_micros(200),
        }
    }
}

/// Which bitmap of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Which {
    /// "Dirty or unsent".
    Unsent,
    /// "Dirtied in this round".
    Dirtied,
}

/// What a visitor returned, and whether it saw one export or a mixture of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visit<T> {
    /// All words were of one export.
    Whole(T),
    /// The writer was at work meanwhile. Fine for a heat map, useless for a decision.
    Torn(T),
}

/// A bitmap where it lies, in shared memory: its words may change between two looks.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    words: SharedWords<'a>,
    pages: u64,
}

impl View<'_> {
    /// How many pages it is about.
    #[must_use]
    pub fn pages(&self) -> Pages {
        Pages(self.pages)
    }

    /// How many pages are set.
    #[must_use]
    pub fn count(&self) -> Pages {
        let last = self.word_count().checked_sub(1).map(|last| self.word(last));
        let last = u64::from(last.unwrap_or(0).count_ones());
        Pages(self.words.without_last().count() + last)
    }

    /// The runs of set pages.
    pub fn runs(&self) -> Runs<Self> {
        Runs::new(*self)
    }

    /// Copies it.
    pub fn copy_to(&self, into: &mut PageSet) {
        if into.pages() != self.pages() {
            into.reset(self.pages());
        }
        self.words.copy_to(into.words_mut());
        into.mask_tail();
    }

    /// Adds its pages to `into`.
    ///
    /// # Errors
    /// The sizes differ; nothing was changed.
    pub fn union_to(&self, into: &mut PageSet) -> Result<(), SizeMismatch> {
        if into.pages() != self.pages() {
            return Err(SizeMismatch {
                expected: into.pages(),
                found: self.pages(),
            });
        }
        self.words.union_to(into.words_mut());
        into.mask_tail();
        Ok(())
    }
}

impl Words for View<'_> {
    fn word_count(&self) -> usize {
        self.words.word_count()
    }

    fn word(&self, index: usize) -> u64 {
        self.words.word(index) & valid_bits(self.pages, index)
    }

    fn next_nonzero(&self, from: usize) -> Option<(usize, u64)> {
        let (index, word) = self.words.next_nonzero(from)?;
        // In the last word, only bits beyond the last page may be set; then there are no more.
        let word = word & valid_bits(self.pages, index);
        (word != 0).then_some((index, word))
    }
}

/// Reads the export in a memfd.
#[derive(Debug)]
pub struct Reader {
    fd: OwnedFd,
    limits: Limits,
    map: ReadMap,
    layout: Option<Layout>,
}

impl Reader {
    /// Maps `fd`, which need not have been written to yet.
    ///
    /// # Errors
    /// It is no memfd that can be mapped safely, or shorter than a header.
    pub fn new(fd: OwnedFd, limits: Limits) -> Result<Self, MapError> {
        let map = ReadMap::new(fd.as_fd(), HEADER_BYTES, limits.file_bytes)?;
        Ok(Self {
            fd,
            limits,
            map,
            layout: None,
        })
    }

    /// The sequence number: another one whenever something was exported. Costs one load.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.map.word(word::SEQUENCE)
    }

    /// The header of the latest export.
    ///
    /// # Errors
    /// Nothing, nothing whole or nothing valid is there.
    pub fn header(&mut self, retries: Retries) -> Result<Header, ReadError> {
        self.retry(retries, |reader| reader.try_refresh(true))
    }

    /// The blocks of the latest export.
    ///
    /// # Errors
    /// Nothing, nothing whole or nothing valid is there.
    pub fn blocks(&mut self, retries: Retries) -> Result<&[Block], ReadError> {
        self.header(retries)?;
        Ok(self.known_blocks())
    }

    /// Copies the latest export.
    ///
    /// # Errors
    /// Nothing, nothing whole or nothing valid is there; `into` holds anything then.
    pub fn snapshot(&mut self, into: &mut Snapshot, retries: Retries) -> Result<(), ReadError> {
        self.retry(retries, |reader| reader.try_snapshot(into))
    }

    /// Shows a bitmap of block `index` to `visitor`, without copying it.
    ///
    /// # Errors
    /// As for [`Reader::header`]; or there is no such block.
    pub fn with_block<T>(
        &mut self,
        index: usize,
        which: Which,
        retries: Retries,
        visitor: impl FnOnce(View) -> T,
    ) -> Result<Visit<T>, ReadError> {
        let generation = self.header(retries)?.generation;
        let blocks = self.known_blocks();
        let block = blocks.get(index).ok_or(ReadError::NoBlock {
            index,
            blocks: blocks.len(),
        })?;
        let first = match which {
            Which::Unsent => block.unsent_word,
            Which::Dirtied => block.dirtied_word,
        };
        let view = View {
            words: self.map.words(first, block.words()),
            pages: block.pages.0,
        };
        let begin = self.sequence();
        ReadMap::barrier();
        let same_layout = self.map.word(word::GENERATION) == generation;
        let value = visitor(view);
        ReadMap::barrier();
        if same_layout && begin % 2 == 0 && self.sequence() == begin {
            Ok(Visit::Whole(value))
        } else {
            Ok(Visit::Torn(value))
        }
    }

    fn known_blocks(&self) -> &[Block] {
        self.layout.as_ref().map_or(&[], |layout| &layout.blocks)
    }

    /// Calls `once` until it finds the export whole.
    fn retry<T>(
        &mut self,
        retries: Retries,
        mut once: impl FnMut(&mut Self) -> Result<Option<T>, ReadError>,
    ) -> Result<T, ReadError> {
        let attempts = retries.attempts.max(1);
        for attempt in 0..attempts {
            if attempt > 0 && self.sequence() % 2 == 1 {
                std::thread::sleep(retries.pause);
            }
            if let Some(value) = once(self)? {
                return Ok(value);
            }
        }
        Err(ReadError::Torn {
            attempts,
            sequence: self.sequence(),
        })
    }

    /// What `read` returns, if the writer did nothing meanwhile.
    fn whole<T>(&self, read: impl FnOnce(&ReadMap) -> T) -> Result<Option<T>, ReadError> {
        let begin = self.sequence();
        if begin == 0 {
            return Err(ReadError::Empty);
        }
        if begin % 2 == 1 {
            return Ok(None);
        }
        ReadMap::barrier();
        let value = read(&self.map);
        ReadMap::barrier();
        Ok((self.sequence() == begin).then_some(value))
    }

    /// Looks at the header, and at the table if that is a new one.
    fn try_refresh(&mut self, may_remap: bool) -> Result<Option<Header>, ReadError> {
        let known = self.layout.as_ref().map(|layout| layout.generation);
        let copied = self.whole(|map| {
            let header = header_words(map);
            let table = if known == Some(header[word::GENERATION]) {
                Vec::new()
            } else {
                table_words(map, &header)
            };
            (header, table)
        })?;
        let Some((words, table)) = copied else {
            return Ok(None);
        };
        let header = Header::parse(&words, self.limits)?;
        if header.used_bytes > self.map.bytes() {
            let fd = self.fd.as_fd();
            self.map = ReadMap::new(fd, header.used_bytes, self.limits.file_bytes)?;
            // Once more with all of the table in view. Whatever the header says by then, it is
            // not followed further: that would be for as long as the writer likes.
            return if may_remap {
                self.try_refresh(false)
            } else {
                Ok(None)
            };
        }
        match &self.layout {
            Some(layout) if layout.describes(&header)? => {}
            _ => self.layout = Some(Layout::parse(&header, &table)?),
        }
        Ok(Some(header))
    }

    fn try_snapshot(&mut self, into: &mut Snapshot) -> Result<Option<()>, ReadError> {
        if self.try_refresh(true)?.is_none() {
            return Ok(None);
        }
        let Some(layout) = &self.layout else {
            return Ok(None);
        };
        into.fit(layout);
        let (own_header, blocks, unsent_filled) = into.parts();
        let copied = self.whole(|map| {
            let header = header_words(map);
            let unsent_valid = Header::is_unsent_valid(&header);
            for (block, own) in layout.blocks.iter().zip(blocks) {
                copy(map, block.dirtied_word, &mut own.dirtied);
                if unsent_valid {
                    copy(map, block.unsent_word, &mut own.unsent);
                } else if *unsent_filled {
                    own.unsent.words_mut().fill(0);
                }
            }
            *unsent_filled = unsent_valid;
            header
        })?;
        let Some(words) = copied else {
            return Ok(None);
        };
        let header = Header::parse(&words, self.limits)?;
        if !layout.describes(&header)? {
            return Ok(None); // it changed after the refresh
        }
        *own_header = Some(header);
        Ok(Some(()))
    }
}

fn header_words(map: &ReadMap) -> [u64; word::COUNT] {
    std::array::from_fn(|index| map.word(index))
}

/// The table's words, as far as they are mapped; the header may be nonsense still.
fn table_words(map: &ReadMap, header: &[u64; word::COUNT]) -> Vec<u64> {
    let first = index(HEADER_BYTES / 8);
    let mapped = index(map.bytes() / 8).saturating_sub(first);
    let count = Layout::table_words(Header::block_count(header)).min(mapped);
    let mut table = vec![0; count];
    map.words(first, count).copy_to(&mut table);
    table
}

fn copy(map: &ReadMap, first: usize, own: &mut PageSet) {
    let words = own.words().len();
    map.words(first, words).copy_to(own.words_mut());
    own.mask_tail();
}
