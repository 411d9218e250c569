//! Scanning the bitmap of a 1 TiB guest (32 MiB), against the machine's read bandwidth.
//!
//! The yardstick is the C library's memcmp of the bitmap's two halves, which are equal: it uses
//! the widest loads that the machine has and reads every byte once.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use dirtylog::scan;

/// 1 TiB in pages of 4 KiB, a bit each, in words.
const WORDS: usize = (1 << 40) / 4096 / 64;

/// Two equal halves; one word in `every` has a few bits set.
fn bitmap(every: usize) -> Vec<u64> {
    let half = (0..WORDS / 2).map(|i| {
        let noise = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        if i % every == 0 { noise | 1 } else { 0 }
    });
    let half: Vec<u64> = half.collect();
    [&half[..], &half[..]].concat()
}

fn scanning(criterion: &mut Criterion) {
    let sparse = bitmap(1000);
    let dense = bitmap(1);
    let mut bench = criterion.benchmark_group("32MiB");
    bench.throughput(Throughput::Bytes(WORDS as u64 * 8));
    bench.bench_function("read bandwidth (memcmp of the halves)", |b| {
        let (left, right) = sparse.split_at(WORDS / 2);
        b.iter(|| black_box(left) == black_box(right));
    });
    bench.bench_function("count, dense", |b| {
        b.iter(|| scan::count(black_box(&dense)))
    });
    bench.bench_function("count, sparse", |b| {
        b.iter(|| scan::count(black_box(&sparse)))
    });
    bench.bench_function("runs, empty", |b| {
        let empty = vec![0_u64; WORDS];
        b.iter(|| scan::Runs::new(black_box(&empty[..])).count());
    });
    bench.bench_function("runs, 1 word in 1000", |b| {
        b.iter(|| {
            scan::Runs::new(black_box(&sparse[..]))
                .map(|run| run.count.0)
                .sum::<u64>()
        });
    });
    bench.finish();

    // These touch two bitmaps: twice the bytes are read.
    let mut bench = criterion.benchmark_group("2x32MiB");
    bench.throughput(Throughput::Bytes(WORDS as u64 * 16));
    bench.bench_function("read bandwidth (memcmp)", |b| {
        let copy = sparse.clone();
        b.iter(|| black_box(&sparse) == black_box(&copy));
    });
    bench.bench_function("count_common", |b| {
        b.iter(|| scan::count_common(black_box(&dense), black_box(&sparse)));
    });
    bench.bench_function("union (also writes)", |b| {
        let mut target = sparse.clone();
        b.iter(|| scan::union(black_box(&mut target), black_box(&dense)));
    });
    bench.finish();
}

fn main() {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    scanning(&mut criterion);
    criterion.final_summary();
}
