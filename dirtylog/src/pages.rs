//! [`PageSet`]: a bitmap of one's own, one bit a page.

use std::fmt;

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;

use crate::scan::{self, Runs};
use crate::{index, valid_bits, words_for};

/// A number of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Pages(pub u64);

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages", self.0)
    }
}

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// The first of them.
    pub first: u64,
    /// How many there are; at least one.
    pub count: Pages,
}

impl PageRun {
    /// The page after the last one.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.first + self.count.0
    }
}

/// Two bitmaps of different sizes cannot be combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the bitmaps have different sizes: expected {expected}, found {found}")]
pub struct SizeMismatch {
    /// The size of the bitmap that was to be changed or compared.
    pub expected: Pages,
    /// The size of the other one.
    pub found: Pages,
}

/// A set of pages out of a fixed number: a private bitmap in 64-bit words, first page lowest.
///
/// Whole-bitmap operations go by words ([`scan`]); [`PageSet::bits`] gives the view by bits.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {})", self.count().0, self.pages)
    }
}

impl PageSet {
    /// The empty set out of `pages`.
    #[must_use]
    pub fn new(pages: Pages) -> Self {
        Self {
            words: vec![0; words_for(pages.0)],
            pages: pages.0,
        }
    }

    /// The set that `words` describes; missing words are empty, bits beyond `pages` are dropped.
    #[must_use]
    pub fn from_words(pages: Pages, mut words: Vec<u64>) -> Self {
        words.resize(words_for(pages.0), 0);
        let mut set = Self {
            words,
            pages: pages.0,
        };
        set.mask_tail();
        set
    }

    /// How many pages it is a set out of.
    #[must_use]
    pub const fn pages(&self) -> Pages {
        Pages(self.pages)
    }

    /// Its words; bits beyond the last page are zero.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Its bits, for views of parts and single pages.
    #[must_use]
    pub fn bits(&self) -> &BitSlice<u64, Lsb0> {
        &BitSlice::from_slice(&self.words)[..index(self.pages)]
    }

    /// Its bits, to change them.
    pub fn bits_mut(&mut self) -> &mut BitSlice<u64, Lsb0> {
        &mut BitSlice::from_slice_mut(&mut self.words)[..index(self.pages)]
    }

    /// Empties it and makes it a set out of `pages`.
    pub fn reset(&mut self, pages: Pages) {
        self.words.clear();
        self.words.resize(words_for(pages.0), 0);
        self.pages = pages.0;
    }

    /// Adds one page; whether it was new.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn insert(&mut self, page: u64) -> bool {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let (word, bit) = (index(page / 64), 1 << (page % 64));
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    /// Adds consecutive pages.
    ///
    /// # Panics
    /// If the last one does not exist.
    pub fn insert_run(&mut self, run: PageRun) {
        self.bits_mut()[index(run.first)..index(run.end())].fill(true);
    }

    /// Whether it contains `page`.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[index(page / 64)] >> (page % 64) & 1 == 1
    }

    /// How many pages it contains.
    #[must_use]
    pub fn count(&self) -> Pages {
        Pages(scan::count(&self.words))
    }

    /// Whether it contains none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        scan::Words::next_nonzero(&self.words[..], 0).is_none()
    }

    /// Its pages as runs, in order.
    #[must_use]
    pub fn runs(&self) -> Runs<&[u64]> {
        Runs::new(&self.words[..])
    }

    /// Adds the pages of `other`.
    ///
    /// # Errors
    /// The sizes differ; nothing was changed. So it is with the operations below.
    pub fn union_with(&mut self, other: &Self) -> Result<(), SizeMismatch> {
        self.same_size(other)?;
        scan::union(&mut self.words, &other.words);
        Ok(())
    }

    /// Removes the pages of `other`.
    ///
    /// # Errors
    /// The sizes differ.
    pub fn subtract(&mut self, other: &Self) -> Result<(), SizeMismatch> {
        self.same_size(other)?;
        scan::difference(&mut self.words, &other.words);
        Ok(())
    }

    /// Keeps only the pages that are in `other` too.
    ///
    /// # Errors
    /// The sizes differ.
    pub fn intersect_with(&mut self, other: &Self) -> Result<(), SizeMismatch> {
        self.same_size(other)?;
        scan::intersection(&mut self.words, &other.words);
        Ok(())
    }

    /// How many pages are in both, without building their intersection.
    ///
    /// # Errors
    /// The sizes differ.
    pub fn common(&self, other: &Self) -> Result<Pages, SizeMismatch> {
        self.same_size(other)?;
        Ok(Pages(scan::count_common(&self.words, &other.words)))
    }

    fn same_size(&self, other: &Self) -> Result<(), SizeMismatch> {
        if self.pages == other.pages {
            return Ok(());
        }
        Err(SizeMismatch {
            expected: self.pages(),
            found: other.pages(),
        })
    }

    /// The words, for backends to fill; [`PageSet::mask_tail`] must follow.
    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Clears the bits beyond the last page.
    pub(crate) fn mask_tail(&mut self) {
        if let Some(last) = self.words.len().checked_sub(1) {
            self.words[last] &= valid_bits(self.pages, last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_stays_clear() {
        let set = PageSet::from_words(Pages(70), vec![u64::MAX; 5]);
        assert_eq!((set.words().len(), set.count()), (2, Pages(70)));
        assert!(!set.contains(70) && set.contains(69));
        assert_eq!(set.bits().len(), 70);
        assert_eq!(PageSet::from_words(Pages(0), vec![1]).runs().next(), None);
    }

    #[test]
    fn different_sizes_are_refused() {
        let mut set = PageSet::new(Pages(64));
        let other = PageSet::new(Pages(65));
        let error = set.union_with(&other).unwrap_err();
        assert_eq!((error.expected, error.found), (Pages(64), Pages(65)));
        assert!(set.subtract(&other).is_err() && set.common(&other).is_err());
    }

    #[test]
    fn runs_and_single_pages_are_inserted() {
        let mut set = PageSet::new(Pages(200));
        assert!(set.insert(199) && !set.insert(199));
        let run = PageRun {
            first: 60,
            count: Pages(70),
        };
        set.insert_run(run);
        assert_eq!(set.runs().next(), Some(run));
        assert_eq!(set.count(), Pages(71));
        set.reset(Pages(10));
        assert!(set.is_empty());
    }
}
