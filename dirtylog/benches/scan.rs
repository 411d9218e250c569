//! Scanning the bitmap of a 1 TiB guest (32 MiB), against the machine's read bandwidth.
//!
//! The yardstick is the C library's memcmp of equal halves: it uses the widest loads that the
//! machine has, and reads every byte once. 32 MiB may fit a cache, 512 MiB do not. On a busy
//! machine only the shares that are printed first mean something: both are measured in turns.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use dirtylog::export::{
    BlockSpec, Limits, Mode, Reader, Retries, Snapshot, Sync, Visit, Which, Writer, memfd,
};
use dirtylog::scan::{self, Runs};
use dirtylog::{PageSet, Pages};

/// A 1 TiB guest.
const PAGES: u64 = (1 << 40) / 4096;
const MIB: usize = 1 << 20;

/// Two equal halves of noise in one word of `every`, and zeros between.
fn bitmap(bytes: usize, every: usize) -> Vec<u64> {
    let half = (0..bytes / 16).map(|i| {
        let noise = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        if i % every == 0 { noise | 1 } else { 0 }
    });
    let half: Vec<u64> = half.collect();
    [&half[..], &half[..]].concat()
}

fn private(criterion: &mut Criterion) {
    for mib in [32, 512] {
        let dense = bitmap(mib * MIB, 1);
        let mut bench = criterion.benchmark_group(format!("{mib} MiB"));
        bench.throughput(Throughput::Bytes((mib * MIB) as u64));
        bench.bench_function("read bandwidth (memcmp of the halves)", |b| {
            let (left, right) = dense.split_at(dense.len() / 2);
            b.iter(|| black_box(left) == black_box(right));
        });
        bench.bench_function("count", |b| b.iter(|| scan::count(black_box(&dense))));
        // The same memory, or the bitmap would be one page of zeros over and over.
        let mut sparse = dense.clone();
        for (i, word) in sparse.iter_mut().enumerate() {
            *word = u64::from(i % 1000 == 0) << (i % 64);
        }
        runs(&mut bench, "runs, 1 word in 1000 has one", &sparse);
        sparse.fill(0);
        runs(&mut bench, "runs, none", &sparse);
        bench.finish();

        // These read two bitmaps: twice the bytes.
        let mut bench = criterion.benchmark_group(format!("2 x {mib} MiB"));
        bench.throughput(Throughput::Bytes((2 * mib * MIB) as u64));
        let mut other = dense.clone();
        bench.bench_function("read bandwidth (memcmp)", |b| {
            b.iter(|| black_box(&dense) == black_box(&other));
        });
        bench.bench_function("count_common", |b| {
            b.iter(|| scan::count_common(black_box(&dense), black_box(&other)));
        });
        bench.bench_function("union (writes one of them)", |b| {
            b.iter(|| scan::union(black_box(&mut other), black_box(&dense)));
        });
        bench.finish();
    }
}

/// Shares of the read bandwidth, from turns taken at once: what else the machine does hits both.
fn shares() {
    for mib in [32, 512] {
        let dense = bitmap(mib * MIB, 1);
        let (left, right) = dense.split_at(dense.len() / 2);
        let mut sparse = dense.clone();
        for (i, word) in sparse.iter_mut().enumerate() {
            *word = u64::from(i % 1000 == 0) << (i % 64);
        }
        let other = dense.clone();
        let mut read = || u64::from(black_box(left) == black_box(right));
        let mut read_both = || u64::from(black_box(&dense) == black_box(&other));
        let mut count = || scan::count(black_box(&dense));
        let mut common = || scan::count_common(black_box(&dense), black_box(&other));
        let mut sparse_runs = || {
            Runs::new(black_box(&sparse[..]))
                .map(|run| run.count.0)
                .sum()
        };
        // Each against reading as many bytes, of as many bitmaps.
        type Task<'a> = &'a mut dyn FnMut() -> u64;
        let tasks: [(&str, Task, Task); 3] = [
            ("count", &mut read.clone(), &mut count),
            ("count_common", &mut read_both, &mut common),
            ("runs, 1 word in 1000 has one", &mut read, &mut sparse_runs),
        ];
        for (name, read, task) in tasks {
            let mut ratios: Vec<f64> = (0..41).map(|_| seconds(read) / seconds(task)).collect();
            ratios.sort_by(f64::total_cmp);
            println!(
                "{mib} MiB, {name}: {:.0} % of the read bandwidth (quartiles {:.0} to {:.0} %)",
                100.0 * ratios[20],
                100.0 * ratios[10],
                100.0 * ratios[30],
            );
        }
    }
}

fn seconds(task: &mut dyn FnMut() -> u64) -> f64 {
    let begin = Instant::now();
    black_box(task());
    begin.elapsed().as_secs_f64()
}

fn runs(bench: &mut BenchmarkGroup<WallTime>, name: &str, words: &[u64]) {
    bench.bench_function(name, |b| {
        b.iter(|| {
            Runs::new(black_box(words))
                .map(|run| run.count.0)
                .sum::<u64>()
        });
    });
}

/// The export of a 1 TiB guest: read where it lies, copied, and written.
fn export(criterion: &mut Criterion) {
    let fd = memfd("bench").expect("a memfd");
    let mut reader = Reader::new(fd.try_clone().expect("dup"), Limits::default()).expect("reader");
    let block = BlockSpec {
        name: "pc.ram".to_owned(),
        used_length_bytes: PAGES * 4096,
    };
    let mut writer = Writer::new(fd, 4096, &[block]).expect("writer");
    let dirtied = PageSet::from_words(Pages(PAGES), bitmap(32 * MIB, 1000));
    let mut publish = move || {
        let mut update = writer.begin();
        update.dirtied(0, &dirtied);
        update.finish(Sync {
            mode: Mode::Measuring,
            round: 1,
            round_ended: true,
            round_begin: Duration::ZERO,
            time: Duration::from_secs(1),
            finished: false,
            spent: Duration::ZERO,
        });
    };
    publish();
    let mut bench = criterion.benchmark_group("export, 32 MiB");
    bench.throughput(Throughput::Bytes(32 * MIB as u64));
    bench.bench_function("count where it lies", |b| {
        b.iter(|| {
            let count = |view: dirtylog::export::View| view.count();
            let visit = reader.with_block(0, Which::Dirtied, Retries::NONE, count);
            assert!(matches!(visit, Ok(Visit::Whole(_))));
        });
    });
    bench.bench_function("runs where they lie", |b| {
        b.iter(|| {
            let runs = |view: dirtylog::export::View| view.runs().count();
            let visit = reader.with_block(0, Which::Dirtied, Retries::NONE, runs);
            assert!(matches!(visit, Ok(Visit::Whole(_))));
        });
    });
    let mut snapshot = Snapshot::new();
    bench.bench_function("snapshot", |b| {
        b.iter(|| {
            reader
                .snapshot(&mut snapshot, Retries::NONE)
                .expect("whole")
        });
    });
    bench.bench_function("write", |b| b.iter(&mut publish));
    bench.finish();
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    if std::env::args().any(|argument| argument == "--bench") {
        shares();
    }
    private(&mut criterion);
    export(&mut criterion);
    criterion.final_summary();
}
