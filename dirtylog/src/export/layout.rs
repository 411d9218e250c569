//! Header and table of blocks: parsed from a private copy of their words, or not at all.

use std::time::Duration;

use crate::{Pages, index, words_for};

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"MSTRDLOG");
pub(super) const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: u64 = 4096;
pub(super) const ENTRY_BYTES: u64 = 320;
pub(super) const NAME_BYTES: usize = 256;
pub(super) const MAX_BLOCKS: u32 = 4096;
pub(super) const PAGE_SIZES: std::ops::RangeInclusive<u32> = 1 << 10..=1 << 30;

/// Words of the header, by index.
pub(super) mod word {
    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION_PAGE_SIZE: usize = 1;
    pub(crate) const SEQUENCE: usize = 2;
    pub(crate) const GENERATION: usize = 3;
    pub(crate) const SYNCS: usize = 4;
    pub(crate) const ROUND: usize = 5;
    pub(crate) const ROUND_BEGIN: usize = 6;
    pub(crate) const TIME: usize = 7;
    pub(crate) const FLAGS_BLOCKS: usize = 8;
    pub(crate) const USED: usize = 9;
    pub(crate) const SPENT: usize = 10;
    /// How many words of the header are in use.
    pub(crate) const COUNT: usize = 11;
}

/// Flags of the header.
pub(super) mod flag {
    pub(crate) const UNSENT_VALID: u32 = 1;
    pub(crate) const ROUND_ENDED: u32 = 2;
    pub(crate) const MIGRATING: u32 = 4;
    pub(crate) const FINISHED: u32 = 8;
}

/// What a reader is ready to spend on a writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The longest file, in bytes. The reader maps no more and allocates no more than this.
    pub file_bytes: u64,
}

impl Default for Limits {
    /// 1 GiB: both bitmaps of a guest of 16 TiB.
    fn default() -> Self {
        Self {
            file_bytes: 1 << 30,
        }
    }
}

/// What the writer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// It logs without migrating; a round is an interval.
    Measuring,
    /// A migration runs; a round is a pre-copy round.
    Migrating,
}

/// The header, as of one export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes that a bit stands for.
    pub page_size_bytes: u32,
    /// The number of the layout.
    pub generation: u64,
    /// How many bitmap syncs were exported.
    pub syncs: u64,
    /// The round that the latest sync belongs to.
    pub round: u64,
    /// When that round began (CLOCK_MONOTONIC).
    pub round_begin: Duration,
    /// When the latest sync was made (CLOCK_MONOTONIC).
    pub time: Duration,
    /// Whether the round ended with the latest sync.
    pub round_ended: bool,
    /// Whether the "dirty or unsent" bitmaps are valid.
    pub unsent_valid: bool,
    /// What the writer is doing.
    pub mode: Mode,
    /// Whether the writer will write no more.
    pub finished: bool,
    /// How many blocks there are.
    pub blocks: u32,
    /// How long the file must at least be, in bytes.
    pub used_bytes: u64,
    /// Time that the writer spent on exporting, in sum.
    pub spent: Duration,
}

/// A RAMBlock of the exporting VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// QEMU's name for it.
    pub name: String,
    /// How much guest memory it holds, in bytes.
    pub used_length_bytes: u64,
    /// How many pages these are.
    pub pages: Pages,
    /// Index of the first word of the bitmap "dirty or unsent".
    pub(super) unsent_word: usize,
    /// Index of the first word of the bitmap "dirtied in this round".
    pub(super) dirtied_word: usize,
}

impl Block {
    /// How many words each of its bitmaps has.
    pub(super) fn words(&self) -> usize {
        words_for(self.pages.0)
    }
}

/// The blocks of a generation, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) generation: u64,
    pub(super) page_size_bytes: u32,
    pub(super) used_bytes: u64,
    pub(super) blocks: Vec<Block>,
}

/// What is wrong with the header or the table of blocks: the writer is broken or hostile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Not this format.
    #[error("this is no dirty log: the magic number is {0:#018x}")]
    Magic(u64),
    /// A format that is not known here.
    #[error(
        "the dirty log has version {0}; expected {VERSION}: use matching versions of both sides"
    )]
    Version(u32),
    /// No size that a page can have.
    #[error("a page size of {0} bytes; expected a power of two from 1 KiB to 1 GiB")]
    PageSize(u32),
    /// More blocks than allowed.
    #[error("{0} blocks; expected at most {MAX_BLOCKS}")]
    TooManyBlocks(u32),
    /// The length in use cannot be right.
    #[error("a length in use of {found} bytes; expected a multiple of 8 from {least} to {most}")]
    Used {
        /// What the header says.
        found: u64,
        /// Header and table need as much.
        least: u64,
        /// The reader's limit.
        most: u64,
    },
    /// A block without memory, or with more than can be.
    #[error("block {block} has an impossible length of {bytes} bytes")]
    Length {
        /// The block's index in the table.
        block: usize,
        /// Its used length.
        bytes: u64,
    },
    /// A name that is empty, not terminated or not UTF-8.
    #[error("block {0} has no valid name; expected 1 to 255 bytes of UTF-8, then zeros")]
    Name(usize),
    /// Two blocks with one name.
    #[error("two blocks are named `{0}`")]
    DuplicateName(String),
    /// A bitmap that is not where bitmaps can be.
    #[error("a bitmap of block {block}, at byte {offset}, is misaligned or out of bounds")]
    Offset {
        /// The block's index in the table.
        block: usize,
        /// The bitmap's offset in the file.
        offset: u64,
    },
    /// Bitmaps that share bytes.
    #[error("two bitmaps overlap at byte {0}")]
    Overlap(u64),
    /// The generation stayed, and still something changed that belongs to it.
    #[error("the layout changed, but its generation did not")]
    SilentChange,
}

/// The lower half of a word.
#[allow(clippy::cast_possible_truncation)]
const fn low(word: u64) -> u32 {
    word as u32
}

/// The upper half of a word.
const fn high(word: u64) -> u32 {
    low(word >> 32)
}

impl Header {
    /// How many blocks the header's words speak of; not more than allowed, true or not.
    pub(super) fn block_count(words: &[u64; word::COUNT]) -> u32 {
        high(words[word::FLAGS_BLOCKS]).min(MAX_BLOCKS)
    }

    /// Whether the header's words call the "dirty or unsent" bitmaps valid.
    pub(super) fn is_unsent_valid(words: &[u64; word::COUNT]) -> bool {
        low(words[word::FLAGS_BLOCKS]) & flag::UNSENT_VALID != 0
    }

    /// Parses the header's words.
    pub(super) fn parse(words: &[u64; word::COUNT], limits: Limits) -> Result<Self, LayoutError> {
        if words[word::MAGIC] != MAGIC {
            return Err(LayoutError::Magic(words[word::MAGIC]));
        }
        let version = low(words[word::VERSION_PAGE_SIZE]);
        if version != VERSION {
            return Err(LayoutError::Version(version));
        }
        let page_size_bytes = high(words[word::VERSION_PAGE_SIZE]);
        if !page_size_bytes.is_power_of_two() || !PAGE_SIZES.contains(&page_size_bytes) {
            return Err(LayoutError::PageSize(page_size_bytes));
        }
        let flags = low(words[word::FLAGS_BLOCKS]);
        let blocks = high(words[word::FLAGS_BLOCKS]);
        if blocks > MAX_BLOCKS {
            return Err(LayoutError::TooManyBlocks(blocks));
        }
        let used_bytes = words[word::USED];
        let least = HEADER_BYTES + u64::from(blocks) * ENTRY_BYTES;
        if used_bytes % 8 != 0 || !(least..=limits.file_bytes).contains(&used_bytes) {
            return Err(LayoutError::Used {
                found: used_bytes,
                least,
                most: limits.file_bytes,
            });
        }
        let has = |flag| flags & flag != 0;
        Ok(Self {
            page_size_bytes,
            generation: words[word::GENERATION],
            syncs: words[word::SYNCS],
            round: words[word::ROUND],
            round_begin: Duration::from_nanos(words[word::ROUND_BEGIN]),
            time: Duration::from_nanos(words[word::TIME]),
            round_ended: has(flag::ROUND_ENDED),
            unsent_valid: has(flag::UNSENT_VALID),
            mode: if has(flag::MIGRATING) {
                Mode::Migrating
            } else {
                Mode::Measuring
            },
            finished: has(flag::FINISHED),
            blocks,
            used_bytes,
            spent: Duration::from_nanos(words[word::SPENT]),
        })
    }
}

impl Layout {
    /// Whether this is the layout that `header` speaks of.
    pub(super) fn describes(&self, header: &Header) -> Result<bool, LayoutError> {
        if self.generation != header.generation {
            return Ok(false);
        }
        let same = self.page_size_bytes == header.page_size_bytes
            && self.used_bytes == header.used_bytes
            && self.blocks.len() == index(u64::from(header.blocks));
        if same {
            Ok(true)
        } else {
            Err(LayoutError::SilentChange)
        }
    }

    /// How many words the table of `blocks` has.
    pub(super) fn table_words(blocks: u32) -> usize {
        index(u64::from(blocks) * ENTRY_BYTES / 8)
    }

    /// Parses the table's words, which are as many as the header says.
    pub(super) fn parse(header: &Header, table: &[u64]) -> Result<Self, LayoutError> {
        let entries = table.chunks_exact(index(ENTRY_BYTES / 8));
        let blocks: Result<Vec<_>, _> = entries
            .enumerate()
            .map(|(block, entry)| Self::parse_block(header, block, entry))
            .collect();
        let layout = Self {
            generation: header.generation,
            page_size_bytes: header.page_size_bytes,
            used_bytes: header.used_bytes,
            blocks: blocks?,
        };
        layout.check_names()?;
        layout.check_overlap()?;
        Ok(layout)
    }

    fn parse_block(header: &Header, block: usize, entry: &[u64]) -> Result<Block, LayoutError> {
        let bytes = entry[0];
        let pages = bytes.div_ceil(u64::from(header.page_size_bytes));
        if pages == 0 || pages.div_ceil(8) > header.used_bytes {
            return Err(LayoutError::Length { block, bytes });
        }
        let first_free = HEADER_BYTES + u64::from(header.blocks) * ENTRY_BYTES;
        let word_of = |offset: u64| {
            let end = offset.checked_add(words_for(pages) as u64 * 8);
            let inside = offset >= first_free && end.is_some_and(|end| end <= header.used_bytes);
            if offset % 8 != 0 || !inside {
                return Err(LayoutError::Offset { block, offset });
            }
            Ok(index(offset / 8))
        };
        Ok(Block {
            unsent_word: word_of(entry[1])?,
            dirtied_word: word_of(entry[2])?,
            name: parse_name(&entry[8..]).ok_or(LayoutError::Name(block))?,
            used_length_bytes: bytes,
            pages: Pages(pages),
        })
    }

    fn check_names(&self) -> Result<(), LayoutError> {
        let mut names: Vec<&str> = self.blocks.iter().map(|block| &*block.name).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(LayoutError::DuplicateName(pair[0].to_owned())),
            None => Ok(()),
        }
    }

    fn check_overlap(&self) -> Result<(), LayoutError> {
        let bitmaps = |block: &Block| {
            let words = block.words();
            [block.unsent_word, block.dirtied_word].map(|first| (first, first + words))
        };
        let mut all: Vec<_> = self.blocks.iter().flat_map(bitmaps).collect();
        all.sort_unstable();
        match all.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => Err(LayoutError::Overlap(pair[1].0 as u64 * 8)),
            None => Ok(()),
        }
    }
}

/// The name in a table entry's last words: zero-terminated, and zeros after that.
fn parse_name(words: &[u64]) -> Option<String> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let length = bytes.iter().position(|&byte| byte == 0)?;
    let (name, padding) = bytes.split_at(length);
    if name.is_empty() || padding.iter().any(|&byte| byte != 0) {
        return None;
    }
    String::from_utf8(name.to_vec()).ok()
}
