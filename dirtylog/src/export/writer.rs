//! Writing an export: for tests, for VMMs in Rust, and as the model for the C side.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::MapError;
use super::layout::{
    ENTRY_BYTES, HEADER_BYTES, MAGIC, MAX_BLOCKS, Mode, NAME_BYTES, PAGE_SIZES, VERSION, flag, word,
};
use crate::sys::WriteMap;
use crate::{PageSet, Pages, index, words_for};

/// A block that is to be exported.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BlockSpec {
    /// Its name, 1 to 255 bytes.
    pub name: String,
    /// How much guest memory it holds, in bytes.
    pub used_length_bytes: u64,
}

/// What is said of a sync, beside its bitmaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sync {
    /// What is being done.
    pub mode: Mode,
    /// The round that the sync belongs to, from 1.
    pub round: u64,
    /// Whether the round ended with it.
    pub round_ended: bool,
    /// When the round began (CLOCK_MONOTONIC).
    pub round_begin: Duration,
    /// When the sync was made (CLOCK_MONOTONIC).
    pub time: Duration,
    /// Whether it is the last one.
    pub finished: bool,
    /// How long exporting it took.
    pub spent: Duration,
}

/// Why nothing can be exported.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The file cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// No page has such a size.
    #[error("a page size of {0} bytes; expected a power of two from 1 KiB to 1 GiB")]
    PageSize(u32),
    /// The blocks cannot be told apart or put down.
    #[error(
        "block `{0}`: expected a new name of 1 to 255 bytes without zeros, a length above 0, \
         and at most {MAX_BLOCKS} blocks"
    )]
    Block(String),
}

/// Where a block's bitmaps are.
#[derive(Debug, Clone, Copy)]
struct Place {
    pages: u64,
    unsent_word: usize,
    dirtied_word: usize,
}

/// Writes exports into a memfd.
#[derive(Debug)]
pub struct Writer {
    fd: OwnedFd,
    map: WriteMap,
    page_size_bytes: u32,
    blocks: Vec<BlockSpec>,
    places: Vec<Place>,
    used_bytes: u64,
    /// The header's counters. The file is not asked for them: others can write to it too.
    sequence: u64,
    generation: u64,
    syncs: u64,
    spent: Duration,
    /// The table in the file is not that of `blocks`.
    table_pending: bool,
}

impl Writer {
    /// Maps `fd` for exports of `blocks`. Readers see nothing of it before the first update.
    ///
    /// # Errors
    /// The file cannot be mapped safely, or there cannot be such blocks.
    pub fn new(
        fd: OwnedFd,
        page_size_bytes: u32,
        blocks: &[BlockSpec],
    ) -> Result<Self, WriteError> {
        if !page_size_bytes.is_power_of_two() || !PAGE_SIZES.contains(&page_size_bytes) {
            return Err(WriteError::PageSize(page_size_bytes));
        }
        let map = WriteMap::new(fd.as_fd(), HEADER_BYTES)?;
        let mut writer = Self {
            sequence: map.word(word::SEQUENCE),
            generation: map.word(word::GENERATION),
            fd,
            map,
            page_size_bytes,
            blocks: Vec::new(),
            places: Vec::new(),
            used_bytes: 0,
            syncs: 0,
            spent: Duration::ZERO,
            table_pending: true,
        };
        writer.set_blocks(blocks)?;
        Ok(writer)
    }

    /// Changes the blocks (hot-plug, resize): readers see them with the next update.
    ///
    /// # Errors
    /// The file cannot be made longer, or there cannot be such blocks.
    pub fn set_blocks(&mut self, blocks: &[BlockSpec]) -> Result<(), WriteError> {
        let mut names = HashSet::new();
        for (number, block) in (0..).zip(blocks) {
            let name = &block.name;
            let good = !name.is_empty() && name.len() < NAME_BYTES && !name.contains('\0');
            let fits = block.used_length_bytes > 0 && number < MAX_BLOCKS;
            if !good || !fits || !names.insert(name) {
                return Err(WriteError::Block(name.clone()));
            }
        }
        let mut end = HEADER_BYTES + blocks.len() as u64 * ENTRY_BYTES;
        let mut places = Vec::new();
        for block in blocks {
            let pages = block
                .used_length_bytes
                .div_ceil(self.page_size_bytes.into());
            // Bitmaps begin on cache lines of their own.
            let bytes = (words_for(pages) as u64 * 8).next_multiple_of(64);
            let unsent = end.next_multiple_of(64);
            places.push(Place {
                pages,
                unsent_word: index(unsent / 8),
                dirtied_word: index((unsent + bytes) / 8),
            });
            end = unsent + 2 * bytes;
        }
        self.map = WriteMap::new(self.fd.as_fd(), end)?;
        self.used_bytes = end;
        self.places = places;
        self.blocks = blocks.to_vec();
        self.table_pending = true;
        Ok(())
    }

    /// Begins an update: until it is finished, readers wait or keep what they have.
    ///
    /// If the blocks changed, all bitmaps begin empty. Otherwise those that are not written again
    /// stay as they were.
    pub fn begin(&mut self) -> Update<'_> {
        self.sequence |= 1;
        self.map.store(word::SEQUENCE, self.sequence);
        WriteMap::barrier();
        if self.table_pending {
            self.write_table();
            self.table_pending = false;
        }
        Update {
            writer: self,
            unsent_valid: false,
        }
    }

    fn write_table(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        let store = |index, word| self.map.store(index, word);
        let page_size = u64::from(self.page_size_bytes) << 32;
        store(word::MAGIC, MAGIC);
        store(word::VERSION_PAGE_SIZE, u64::from(VERSION) | page_size);
        store(word::GENERATION, self.generation);
        store(word::USED, self.used_bytes);
        let entry_words = index(ENTRY_BYTES / 8);
        let mut first = index(HEADER_BYTES / 8);
        for (block, place) in self.blocks.iter().zip(&self.places) {
            let mut entry = vec![0; entry_words];
            entry[0] = block.used_length_bytes;
            entry[1] = place.unsent_word as u64 * 8;
            entry[2] = place.dirtied_word as u64 * 8;
            for (bytes, word) in block.name.as_bytes().chunks(8).zip(&mut entry[8..]) {
                let mut padded = [0; 8];
                padded[..bytes.len()].copy_from_slice(bytes);
                *word = u64::from_le_bytes(padded);
            }
            for (offset, word) in entry.into_iter().enumerate() {
                store(first + offset, word);
            }
            first += entry_words;
        }
        for word in first..index(self.used_bytes / 8) {
            store(word, 0);
        }
    }
}

/// An update that is being written. Dropped unfinished, it leaves the export unreadable until the
/// next one: that is what readers of a writer that died see.
#[derive(Debug)]
pub struct Update<'a> {
    writer: &'a mut Writer,
    unsent_valid: bool,
}

impl Update<'_> {
    /// Writes the bitmap "dirtied in this round" of block `index`.
    ///
    /// # Panics
    /// There is no such block, or it has another number of pages.
    pub fn dirtied(&mut self, index: usize, pages: &PageSet) {
        let place = self.writer.places[index];
        self.write(place.dirtied_word, place.pages, pages);
    }

    /// Writes the bitmap "dirty or unsent" of block `index`, and makes these bitmaps valid.
    ///
    /// # Panics
    /// There is no such block, or it has another number of pages.
    pub fn unsent(&mut self, index: usize, pages: &PageSet) {
        let place = self.writer.places[index];
        self.write(place.unsent_word, place.pages, pages);
        self.unsent_valid = true;
    }

    fn write(&self, first: usize, pages: u64, set: &PageSet) {
        assert_eq!(set.pages(), Pages(pages), "a bitmap of another size");
        for (offset, &word) in set.words().iter().enumerate() {
            self.writer.map.store(first + offset, word);
        }
    }

    /// Lets readers see the update.
    pub fn finish(self, sync: Sync) {
        let writer = self.writer;
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let set = |flag, on| if on { flag } else { 0 };
        let flags = set(flag::UNSENT_VALID, self.unsent_valid)
            | set(flag::ROUND_ENDED, sync.round_ended)
            | set(flag::MIGRATING, sync.mode == Mode::Migrating)
            | set(flag::FINISHED, sync.finished);
        let blocks = writer.blocks.len() as u64;
        writer.syncs += 1;
        writer.spent = writer.spent.saturating_add(sync.spent);
        writer.sequence = writer.sequence.wrapping_add(1);
        let map = &writer.map;
        map.store(word::SYNCS, writer.syncs);
        map.store(word::ROUND, sync.round);
        map.store(word::ROUND_BEGIN, nanos(sync.round_begin));
        map.store(word::TIME, nanos(sync.time));
        map.store(word::FLAGS_BLOCKS, u64::from(flags) | blocks << 32);
        map.store(word::SPENT, nanos(writer.spent));
        map.store_last(word::SEQUENCE, writer.sequence);
    }
}
