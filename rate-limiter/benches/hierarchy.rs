//! What a turn costs: `poll` and `charge`, by the number of backlogged leaves.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use rate_limiter::{BytesPerSecond, Hierarchy, Poll};

fn turn(criterion: &mut Criterion) {
    let mut bench = criterion.benchmark_group("poll+charge");
    for leaves in [3_u32, 16, 100] {
        let mut now = Instant::now();
        let link = BytesPerSecond(10_000_000_000);
        let mut limiter = Hierarchy::new(now, Some(link));
        let groups = [None, Some(link)].map(|limit| limiter.add_group(now, limit));
        for (index, &group) in (0..leaves).zip(groups.iter().cycle()) {
            let leaf = limiter.add_leaf(now, group);
            limiter.set_backlogged(leaf, true);
            if index % 3 == 0 {
                let rate = BytesPerSecond(link.0 / u64::from(leaves));
                limiter.set_leaf_limit(now, leaf, Some(rate));
            }
        }
        bench.bench_function(BenchmarkId::from_parameter(leaves), |bencher| {
            bencher.iter(|| {
                now += Duration::from_micros(30);
                if let Poll::Grant { leaf, bytes } = black_box(limiter.poll(now)) {
                    limiter.charge(now, leaf, bytes);
                }
            });
        });
    }
    bench.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    turn(&mut criterion);
    criterion.final_summary();
}
