//! What an allocation costs (OBA, VMbuddies 3.3), by the number of VMs.
//!
//! 96 VMs are what the paper's Figure 17 ends with.

use std::hint::black_box;
use std::time::Instant;

use coordinator::scheduler::bandwidth::{Limits, VmLoad, allocate, published, rounds};
use criterion::{BenchmarkId, Criterion};

/// 1 to 9 GiB with working sets of 5 to 80 %, and a bandwidth that some outrun.
fn instance(count: u32) -> (f64, Vec<VmLoad>) {
    let vm = |index: u32| {
        let memory = f64::from(1 << 30) * f64::from(1 + index % 9);
        VmLoad {
            remaining_bytes: memory,
            dirty_rate_bytes_per_s: 1e5 * f64::from(1 + index * 7 % 101),
            threshold_bytes: 204_800.0,
            working_set_bytes: Some(memory * f64::from(5 + index * 13 % 76) / 100.0),
        }
    };
    (8e6 * f64::from(count), (0..count).map(vm).collect())
}

/// The median and the slowest of a thousand, which a loaded machine disturbs less than a mean.
fn medians() {
    for count in [3, 10, 96, 1000] {
        let (bandwidth, vms) = instance(count);
        let limits = Limits::default();
        let mut micros: Vec<f64> = (0..1000)
            .map(|_| {
                let begin = Instant::now();
                let all = allocate(black_box(bandwidth), black_box(&vms), &limits);
                black_box(all.expect("an allocation"));
                begin.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        micros.sort_by(f64::total_cmp);
        println!(
            "{count} VMs: median {:.1} us, 99 % below {:.1} us",
            micros[500], micros[990]
        );
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    if std::env::args().any(|argument| argument == "--bench") {
        medians();
    }
    let limits = Limits::default();
    let mut bench = criterion.benchmark_group("closed form");
    for count in [3, 10, 96, 1000] {
        let (bandwidth, vms) = instance(count);
        bench.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| allocate(black_box(bandwidth), black_box(&vms), &limits));
        });
    }
    bench.finish();
    let mut bench = criterion.benchmark_group("whole rounds");
    for count in [3, 96] {
        let (bandwidth, vms) = instance(count);
        bench.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| rounds::allocate(black_box(bandwidth), black_box(&vms), &limits));
        });
    }
    bench.finish();
    let mut bench = criterion.benchmark_group("Algorithm 2 as published");
    let settings = published::Settings::default();
    let (bandwidth, vms) = instance(3);
    bench.bench_function(BenchmarkId::from_parameter(3), |b| {
        b.iter(|| published::allocate(black_box(bandwidth), black_box(&vms), &limits, &settings));
    });
    bench.finish();
    criterion.final_summary();
}
