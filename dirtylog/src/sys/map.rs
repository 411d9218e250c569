//! A sealed memfd, mapped, seen as words that another process may change at any time.
//!
//! What could hurt is checked here, where the mapping is made. A file that shrinks under a mapping
//! kills the reader by SIGBUS: it must be sealed against shrinking, and only what lies inside it
//! is mapped. Memory of a hugetlbfs file can be missing when it is touched, which is SIGBUS too:
//! such files are refused. Every access goes through an atomic word inside the mapping's bounds.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use super::simd;
use crate::index;
use crate::scan::Words;

/// Why a file cannot be mapped safely.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Not a memfd, or one made without MFD_ALLOW_SEALING.
    #[error("the file has no seals; expected a memfd made with MFD_ALLOW_SEALING")]
    NoSeals(#[source] io::Error),
    /// The file could shrink, and accesses beyond its end kill the process (SIGBUS).
    #[error("the memfd lacks F_SEAL_SHRINK; whoever made it must add that seal before sharing it")]
    MayShrink,
    /// Huge pages may be missing when they are touched, which kills the process too.
    #[error("the memfd is backed by huge pages; expected ordinary ones (no MFD_HUGETLB)")]
    HugePages,
    /// The file does not reach as far as it must.
    #[error("the file is {found} bytes long; expected at least {expected}")]
    TooShort {
        /// How long it must be.
        expected: u64,
        /// How long it is.
        found: u64,
    },
    /// A call of the kernel failed.
    #[error("cannot {what} the memfd")]
    Os {
        /// The call.
        what: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

fn os(what: &'static str) -> impl Fn(nix::Error) -> MapError {
    move |error| MapError::Os {
        what,
        source: error.into(),
    }
}

/// The length of the file, if mapping it is safe for as long as the file exists.
fn sealed_length(fd: BorrowedFd) -> Result<u64, MapError> {
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(|e| MapError::NoSeals(e.into()))?;
    if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Err(MapError::MayShrink);
    }
    if fstatfs(fd).map_err(os("statfs"))?.filesystem_type() == HUGETLBFS_MAGIC {
        return Err(MapError::HugePages);
    }
    let length = fstat(fd).map_err(os("stat"))?.st_size;
    Ok(u64::try_from(length).unwrap_or(0))
}

/// The words of a mapping, by index. `map` is never unmapped before the slice's lifetime ends.
fn words(map: &MmapRaw) -> &[AtomicU64] {
    let words = map.len() / size_of::<AtomicU64>();
    // SAFETY: the mapping is page-aligned and `words * 8` bytes of it lie inside; they stay
    // accessible while `map` lives, because the file cannot shrink (checked before mapping) and
    // nothing unmaps or protects parts of it. Other processes change the memory, and they do so
    // outside of Rust's memory model, like device memory; atomics are what Rust has for that. In
    // a read-only mapping only relaxed loads are made, which Rust allows there.
    unsafe { std::slice::from_raw_parts(map.as_ptr().cast(), words) }
}

/// A mapping that this process can only read.
#[derive(Debug)]
pub(crate) struct ReadMap(MmapRaw);

impl ReadMap {
    /// Maps the file up to its end, or to `at_most` bytes; at least `at_least`.
    pub(crate) fn new(fd: BorrowedFd, at_least: u64, at_most: u64) -> Result<Self, MapError> {
        let found = sealed_length(fd)?;
        let mapped = found.min(at_most);
        if mapped < at_least {
            return Err(MapError::TooShort {
                expected: at_least,
                found: mapped,
            });
        }
        let map = MmapOptions::new()
            .len(index(mapped))
            .map_raw_read_only(fd.as_raw_fd());
        map.map(Self).map_err(|source| MapError::Os {
            what: "map",
            source,
        })
    }

    /// How many bytes are mapped.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    /// One word, little endian in the file.
    pub(crate) fn word(&self, index: usize) -> u64 {
        u64::from_le(words(&self.0)[index].load(Ordering::Relaxed))
    }

    /// All that was read before this call was read before all that is read after it.
    pub(crate) fn barrier() {
        fence(Ordering::Acquire);
    }

    /// Words `first..first + count`.
    pub(crate) fn words(&self, first: usize, count: usize) -> SharedWords<'_> {
        SharedWords(&words(&self.0)[first..first + count])
    }
}

/// Words of a read-only mapping: they can be loaded, and nothing else.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedWords<'a>(&'a [AtomicU64]);

impl SharedWords<'_> {
    /// How many bits are set.
    pub(crate) fn count(&self) -> u64 {
        simd::count_shared(self.0)
    }

    /// All but the last word.
    pub(crate) fn without_last(&self) -> Self {
        Self(self.0.split_last().map_or(&[], |(_, rest)| rest))
    }

    /// Copies the words; `into` has as many.
    pub(crate) fn copy_to(&self, into: &mut [u64]) {
        self.merge::<false>(into);
    }

    /// Adds the words' bits to those of `into`, which has as many.
    pub(crate) fn union_to(&self, into: &mut [u64]) {
        self.merge::<true>(into);
    }

    fn merge<const UNION: bool>(&self, into: &mut [u64]) {
        if cfg!(target_endian = "little") {
            simd::merge::<UNION>(self.0, into);
        } else {
            for (index, own) in into.iter_mut().enumerate().take(self.0.len()) {
                *own = self.word(index) | if UNION { *own } else { 0 };
            }
        }
    }
}

impl Words for SharedWords<'_> {
    fn word_count(&self) -> usize {
        self.0.len()
    }

    fn word(&self, index: usize) -> u64 {
        u64::from_le(self.0[index].load(Ordering::Relaxed))
    }

    fn next_nonzero(&self, from: usize) -> Option<(usize, u64)> {
        let rest = self.0.get(from..)?;
        // What was zero a moment ago may not be any more: each word is judged by one look.
        (from + simd::skip_shared_zeros(rest)..self.0.len())
            .map(|index| (index, self.word(index)))
            .find(|&(_, word)| word != 0)
    }
}

/// A mapping that this process writes and others read.
#[derive(Debug)]
pub(crate) struct WriteMap(MmapRaw);

impl WriteMap {
    /// Maps the first `bytes` of the file, which is made longer if it is shorter.
    pub(crate) fn new(fd: BorrowedFd, bytes: u64) -> Result<Self, MapError> {
        if sealed_length(fd)? < bytes {
            let length = i64::try_from(bytes).unwrap_or(i64::MAX);
            nix::unistd::ftruncate(fd, length).map_err(os("lengthen"))?;
        }
        let map = MmapOptions::new().len(index(bytes)).map_raw(fd.as_raw_fd());
        map.map(Self).map_err(|source| MapError::Os {
            what: "map",
            source,
        })
    }

    pub(crate) fn word(&self, index: usize) -> u64 {
        u64::from_le(words(&self.0)[index].load(Ordering::Relaxed))
    }

    pub(crate) fn store(&self, index: usize, word: u64) {
        words(&self.0)[index].store(word.to_le(), Ordering::Relaxed);
    }

    /// Stores after all that was stored before.
    pub(crate) fn store_last(&self, index: usize, word: u64) {
        words(&self.0)[index].store(word.to_le(), Ordering::Release);
    }

    /// All that was stored before this call is seen before all that is stored after it.
    pub(crate) fn barrier() {
        fence(Ordering::Release);
    }
}
