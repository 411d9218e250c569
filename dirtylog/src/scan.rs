//! Going over bitmaps by words: counts, runs, set algebra.
//!
//! The loops over slices are written so that LLVM vectorises them; where more is to be had, there
//! is a loop for AVX2, chosen at run time. The benchmark `scan` compares them with the machine's
//! read bandwidth.

use crate::{PageRun, Pages, sys};

/// Words that can be scanned: a private slice, or a bitmap shared with another process.
pub trait Words {
    /// How many there are.
    fn word_count(&self) -> usize;

    /// One of them.
    ///
    /// # Panics
    /// May panic if there is none with this index.
    fn word(&self, index: usize) -> u64;

    /// The first word from index `from` on that is not zero, with its index.
    fn next_nonzero(&self, from: usize) -> Option<(usize, u64)> {
        (from..self.word_count())
            .map(|index| (index, self.word(index)))
            .find(|&(_, word)| word != 0)
    }
}

impl Words for [u64] {
    fn word_count(&self) -> usize {
        self.len()
    }

    fn word(&self, index: usize) -> u64 {
        self[index]
    }

    fn next_nonzero(&self, from: usize) -> Option<(usize, u64)> {
        let rest = self.get(from..)?;
        let skipped = sys::skip_zeros(rest);
        let found = rest[skipped..].iter().position(|&word| word != 0)?;
        let index = from + skipped + found;
        Some((index, self[index]))
    }
}

impl<W: Words + ?Sized> Words for &W {
    fn word_count(&self) -> usize {
        (**self).word_count()
    }

    fn word(&self, index: usize) -> u64 {
        (**self).word(index)
    }

    fn next_nonzero(&self, from: usize) -> Option<(usize, u64)> {
        (**self).next_nonzero(from)
    }
}

/// The runs of set bits, in order: each as long as can be.
#[derive(Debug, Clone)]
pub struct Runs<W> {
    words: W,
    /// The word that is being looked at, and what is left of it.
    at: usize,
    left: u64,
}

impl<W: Words> Runs<W> {
    /// The runs in `words`.
    pub fn new(words: W) -> Self {
        let left = if words.word_count() > 0 {
            words.word(0)
        } else {
            0
        };
        Self { words, at: 0, left }
    }

    /// Goes on to the next word; zero after the last one.
    fn advance(&mut self) -> u64 {
        self.at += 1;
        self.left = if self.at < self.words.word_count() {
            self.words.word(self.at)
        } else {
            0
        };
        self.left
    }
}

impl<W: Words> Iterator for Runs<W> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        if self.left == 0 {
            (self.at, self.left) = self.words.next_nonzero(self.at + 1)?;
        }
        let start = self.left.trailing_zeros();
        let first = self.at as u64 * 64 + u64::from(start);
        let ones = (self.left >> start).trailing_ones();
        let mut count = u64::from(ones);
        if start + ones < 64 {
            self.left &= u64::MAX << (start + ones);
        } else {
            // The run reaches the end of its word: it may go on.
            while self.advance() == u64::MAX {
                count += 64;
            }
            let ones = self.left.trailing_ones();
            self.left &= u64::MAX << ones;
            count += u64::from(ones);
        }
        Some(PageRun {
            first,
            count: Pages(count),
        })
    }
}

/// How many bits are set.
#[must_use]
pub fn count(words: &[u64]) -> u64 {
    sys::count(words)
}

/// How many bits are set in both. Words that only one has count as zero.
#[must_use]
pub fn count_common(a: &[u64], b: &[u64]) -> u64 {
    let both = a.len().min(b.len());
    sys::count_common(&a[..both], &b[..both])
}

/// Words that are read of one half before the other half is looked at again.
const BLOCK: usize = 512;

/// The loop of [`count`] for the target's baseline.
///
/// It reads both halves of the bitmap in turn: two streams keep the prefetchers busier than one.
pub(crate) fn count_loop(words: &[u64]) -> u64 {
    let half = words.len() / 2 / BLOCK * BLOCK;
    let (first, rest) = words.split_at(half);
    let (second, rest) = rest.split_at(half);
    let blocks = first.chunks_exact(BLOCK).zip(second.chunks_exact(BLOCK));
    let ones = |words: &[u64]| -> u64 {
        let ones = words.iter().map(|word| u64::from(word.count_ones()));
        ones.sum()
    };
    blocks.map(|(a, b)| ones(a) + ones(b)).sum::<u64>() + ones(rest)
}

/// The loop of [`count_common`], to be compiled for several instruction sets; two streams by its
/// nature.
#[inline(always)]
pub(crate) fn count_common_loop(a: &[u64], b: &[u64]) -> u64 {
    let both = a.iter().zip(b);
    both.map(|(a, b)| u64::from((a & b).count_ones())).sum()
}

/// `target |= other`, over the words that both have.
pub fn union(target: &mut [u64], other: &[u64]) {
    for (target, other) in target.iter_mut().zip(other) {
        *target |= other;
    }
}

/// `target &= !other`, over the words that both have.
pub fn difference(target: &mut [u64], other: &[u64]) {
    for (target, other) in target.iter_mut().zip(other) {
        *target &= !other;
    }
}

/// `target &= other`, over the words that both have.
pub fn intersection(target: &mut [u64], other: &[u64]) {
    for (target, other) in target.iter_mut().zip(other) {
        *target &= other;
    }
}

/// Words looked at together when clean ones are skipped: two cache lines.
const SKIP: usize = 16;

/// How many words can be skipped because they are zero, for the target's baseline.
pub(crate) fn skip_zeros_loop(words: &[u64]) -> usize {
    let clean = |chunk: &&[u64]| chunk.iter().fold(0, |all, word| all | word) == 0;
    SKIP * words.chunks_exact(SKIP).take_while(clean).count()
}
