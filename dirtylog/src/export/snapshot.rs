//! A private copy of one whole export.

use super::layout::{Header, Layout};
use crate::PageSet;

/// The bitmaps of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockBits {
    /// The block's name.
    pub name: String,
    /// How much guest memory it holds, in bytes.
    pub used_length_bytes: u64,
    /// What would still have to be sent; meaningful while [`Header::unsent_valid`].
    pub unsent: PageSet,
    /// What was dirtied in this round.
    pub dirtied: PageSet,
}

/// One export: header and bitmaps belong together, nothing in it is torn.
///
/// Its buffers are used again by the next snapshot into it, so keep one around.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    header: Option<Header>,
    blocks: Vec<BlockBits>,
    /// Whether the "dirty or unsent" bitmaps may hold anything.
    unsent_filled: bool,
}

impl Snapshot {
    /// An empty one, to be filled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The header; `None` if nothing was read into it yet.
    #[must_use]
    pub fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    /// The blocks, in the order of the export's table.
    #[must_use]
    pub fn blocks(&self) -> &[BlockBits] {
        &self.blocks
    }

    /// Makes buffers of the right sizes, if `layout` is not the one that they were made for.
    pub(super) fn fit(&mut self, layout: &Layout) {
        let fits = self.blocks.len() == layout.blocks.len()
            && self.blocks.iter().zip(&layout.blocks).all(|(own, block)| {
                own.name == block.name
                    && own.used_length_bytes == block.used_length_bytes
                    && own.dirtied.pages() == block.pages
            });
        if fits {
            return;
        }
        let fresh = layout.blocks.iter().map(|block| BlockBits {
            name: block.name.clone(),
            used_length_bytes: block.used_length_bytes,
            unsent: PageSet::new(block.pages),
            dirtied: PageSet::new(block.pages),
        });
        self.blocks = fresh.collect();
    }

    /// The parts to fill. The header goes first: a snapshot that is interrupted has none.
    pub(super) fn parts(&mut self) -> (&mut Option<Header>, &mut [BlockBits], &mut bool) {
        self.header = None;
        (&mut self.header, &mut self.blocks, &mut self.unsent_filled)
    }
}
