//! Readers of files that hold anything: a result or an error, never a crash.

mod raw;

use dirtylog::export::{Limits, Retries, Snapshot, Which};
use proptest::prelude::*;
use raw::{RawExport, block};

/// Values that lie near something that matters, or anywhere.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0..0x4000_u64),
        (0..64_u32).prop_map(|bit| 1 << bit),
        (0..64_u64).prop_map(|n| u64::MAX - n),
    ]
}

proptest! {
    /// Whatever the file holds, reading it gives a result or an error, and never more pages than
    /// there are.
    #[test]
    fn corrupted_files_are_survived(
        lies in proptest::collection::vec(
            (prop_oneof![0..12_usize, 512..600_usize, 0..1000_usize], value()),
            0..6,
        ),
    ) {
        let raw = RawExport::new(&[block("a", 100), block("b", 5000)]);
        let limits = Limits { file_bytes: 1 << 20 };
        let mut reader = raw.reader(limits);
        let mut snapshot = Snapshot::new();
        prop_assert!(reader.snapshot(&mut snapshot, Retries::NONE).is_ok());
        for (word, value) in lies {
            raw.store(word, value);
            let fresh = raw.reader(limits).snapshot(&mut Snapshot::new(), Retries::NONE);
            let known = reader.snapshot(&mut snapshot, Retries::NONE);
            if fresh.is_ok() && known.is_ok() {
                for block in snapshot.blocks() {
                    prop_assert!(block.dirtied.count() <= block.dirtied.pages());
                }
            }
            for index in 0..3 {
                let _ = reader.with_block(index, Which::Unsent, Retries::NONE, |view| {
                    (view.count(), view.runs().count())
                });
            }
        }
    }

    /// The same with nothing right to begin with.
    #[test]
    fn random_files_are_survived(words in proptest::collection::vec(value(), 0..700)) {
        let raw = RawExport::new(&[]);
        for (index, word) in words.into_iter().enumerate() {
            raw.store(index + 1, word);
        }
        let mut reader = raw.reader(Limits { file_bytes: 1 << 20 });
        let _ = reader.snapshot(&mut Snapshot::new(), Retries::NONE);
    }
}
