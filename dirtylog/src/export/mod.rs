//! The dirty log that a patched QEMU writes into shared memory, and its readers.
//!
//! The reader's process makes a memfd, seals it against shrinking ([`memfd()`]) and passes it to
//! QEMU, which maps it and writes its dirty bitmaps there after every sync. Nothing flows back:
//! the writer keeps its counters to itself, and the reader maps the file read-only.
//! The file may have any size at first; the writer makes it longer when its layout needs that.
//!
//! # Format, version 1
//!
//! All integers are little endian, on any host. Offsets are bytes from the file's beginning.
//! Readers load the file only in aligned 64-bit words, so the writer must store no field by
//! parts. Reserved bytes are written as zero and ignored when read.
//!
//! **Header**, the first 4096 bytes:
//!
//! | offset | size | field |
//! |-------:|-----:|-------|
//! |  0 | 8 | magic: the bytes `MSTRDLOG` |
//! |  8 | 4 | version: 1; 0 is never valid |
//! | 12 | 4 | page size: bytes that a bit stands for, a power of two, 1 KiB to 1 GiB |
//! | 16 | 8 | sequence: odd while the writer is at work, 0 before it ever was |
//! | 24 | 8 | generation: another number whenever the page size or the table of blocks changed |
//! | 32 | 8 | syncs: how many bitmap syncs were exported |
//! | 40 | 8 | round: the pre-copy round, or the interval in measuring mode; counts from 1 in each mode |
//! | 48 | 8 | begin of that round, CLOCK_MONOTONIC in nanoseconds |
//! | 56 | 8 | time of the latest sync, same clock |
//! | 64 | 4 | flags, see below |
//! | 68 | 4 | number of blocks: at most 4096 |
//! | 72 | 8 | length in use: no byte of the layout lies beyond it; a multiple of 8 |
//! | 80 | 8 | nanoseconds that the writer spent on exporting, in sum |
//! | 88 | 4008 | reserved |
//!
//! Flags: 1 the "dirty or unsent" bitmaps are valid (only while a migration runs); 2 the round
//! ended with the latest sync; 4 a migration runs (otherwise: measuring mode); 8 the writer has
//! finished and will write no more. Readers ignore other bits.
//!
//! **Table of blocks**, from offset 4096, 320 bytes each, one for each of QEMU's RAMBlocks that
//! migrate:
//!
//! | offset | size | field |
//! |-------:|-----:|-------|
//! |   0 | 8 | used length in bytes, at least 1 |
//! |   8 | 8 | offset of the bitmap "dirty or unsent": what would still have to be sent |
//! |  16 | 8 | offset of the bitmap "dirtied in this round" |
//! |  24 | 40 | reserved |
//! |  64 | 256 | name: 1 to 255 bytes of UTF-8, then zeros; no two blocks have the same |
//!
//! **Bitmaps**: ⌈⌈used length / page size⌉ / 64⌉ words, page `p` is bit `p mod 64` (counted from
//! the lowest) of word `⌊p / 64⌋`. Their offsets are multiples of 8, they overlap neither one
//! another nor header and table. Bits beyond the last page are ignored.
//!
//! "Dirtied in this round" holds what all syncs of the round found, not only the latest one.
//!
//! # How it is written and read
//!
//! The sequence is a seqlock. The writer: store `sequence + 1` (odd), a write barrier, everything
//! else in relaxed word stores, then `sequence + 2` with release semantics. A new layout is written
//! in the same odd phase as the bitmaps that go with it. The reader: load the sequence, an acquire
//! barrier, copy words, an acquire barrier, load the sequence again; the copy is whole if both
//! loads gave the same even number. In QEMU these are `qatomic_set`, `smp_wmb`, and
//! `qatomic_store_release`; a writer that takes over a file with an odd sequence continues from it.
//!
//! # Whom must one trust?
//!
//! Nobody. The reader requires the seal, looks at a private copy of header and table, checks every
//! length and offset in it against what is mapped, and never trusts it again: a writer that lies
//! causes a [`ReadError`], one that stops in the middle [`ReadError::Torn`]. The memory that it can
//! make the reader use is bounded by [`Limits`]. The writer requires the seal too, because a
//! reader that shrank the file would kill it. (A peer can still punch a hole into the file: it
//! reads as zeros. Only if the machine then has no page left for it does an access fail.)

mod layout;
mod memfd;
mod reader;
mod rounds;
mod snapshot;
mod writer;

pub use layout::{Block, Header, LayoutError, Limits, Mode};
pub use memfd::memfd;
pub use reader::{ReadError, Reader, Retries, View, Visit, Which};
pub use rounds::{Rounds, RoundsError};
pub use snapshot::{BlockBits, Snapshot};
pub use writer::{BlockSpec, Sync, Update, WriteError, Writer};

pub use crate::sys::MapError;
