//! Dirty bitmaps of virtual machines: where they come from, how they are scanned, what they say.
//!
//! - [`Bitmap`]: a log of dirtied pages that is read round by round; its backends are
//!   [`MemoryLog`] (one's own memory), [`export::Rounds`] (what a patched QEMU exports) and, for
//!   a VMM that embeds this crate, `kvm::SlotLog` and `kvm::RingLog` (feature `kvm`);
//! - [`PageSet`] and [`scan`]: private bitmaps, their algebra, counts and runs;
//! - [`rate`]: dirty rate, writable working set, heat of memory regions;
//! - [`footprint`]: how many distinct pages will be dirtied within a time to come.
//!
//! ```
//! use dirtylog::{Bitmap, MemoryLog, PageSet, Pages};
//!
//! let log = MemoryLog::new(Pages(1000));
//! log.mark(17);
//! log.mark(18);
//!
//! let mut dirtied = PageSet::default();
//! (&log).collect(&mut dirtied)?;
//! assert_eq!(dirtied.count(), Pages(2));
//! let run = dirtied.runs().next().unwrap();
//! assert_eq!((run.first, run.count), (17, Pages(2)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Code that `unsafe` is needed for (mappings shared with another process, ioctls) is in one
//! private module, `sys`; everything else is refused it.

#![deny(unsafe_code)]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("dirtylog needs a 64-bit target: bitmaps and offsets are indexed by 64 bits");

mod bitmap;
pub mod export;
pub mod footprint;
#[cfg(feature = "kvm")]
pub mod kvm;
mod pages;
pub mod rate;
pub mod scan;
#[allow(unsafe_code)]
mod sys;

pub use bitmap::{Bitmap, MemoryLog, Round};
pub use pages::{PageRun, PageSet, Pages, SizeMismatch};

/// Bits in a word of every bitmap.
pub(crate) const WORD_BITS: u64 = 64;

/// A 64-bit count as an index: the same on the 64-bit targets that this crate admits.
#[allow(clippy::cast_possible_truncation)]
pub(crate) const fn index(n: u64) -> usize {
    n as usize
}

/// How many words hold a bit for each of `pages`.
pub(crate) const fn words_for(pages: u64) -> usize {
    index(pages.div_ceil(WORD_BITS))
}

/// The valid bits of word `word` of a bitmap of `pages`.
pub(crate) const fn valid_bits(pages: u64, word: usize) -> u64 {
    let before = word as u64 * WORD_BITS;
    match pages.saturating_sub(before) {
        0 => 0,
        left if left >= WORD_BITS => u64::MAX,
        left => (1 << left) - 1,
    }
}
