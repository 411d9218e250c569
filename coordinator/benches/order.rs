//! Grouping and ordering: what the searches take, and how good their answers are.
//!
//! Applications of three tiers (web, app, database; COMMA's Table 4 scaled per VM), with traffic
//! inside each of several services and a little between them, and random graphs. Printed first:
//! costs of the searches against each other, over many instances; then times.

use std::hint::black_box;
use std::time::{Duration, Instant};

use coordinator::scheduler::group::ByDelayedStart;
use coordinator::scheduler::impact::Traffic;
use coordinator::scheduler::order::large::{self, Effort};
use coordinator::scheduler::order::{Ordered, Problem, Search, find, rest};
use coordinator::scheduler::schedule::{Limits, Load};
use criterion::{BenchmarkId, Criterion};

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    /// From 0 to 1.
    fn unit(&mut self) -> f64 {
        f64::from((self.next() >> 32) as u32) / f64::from(u32::MAX)
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Tiered,
    Random,
}

struct Instance {
    loads: Vec<Load>,
    traffic: Traffic,
    limits: Limits,
}

impl Instance {
    fn new(kind: Kind, vms: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let loads = (0..vms).map(|vm| {
            let database = match kind {
                Kind::Tiered => vm % 3 == 2,
                Kind::Random => random.unit() < 0.33,
            };
            let (left, most) = if database {
                (2048e6, 15e6)
            } else {
                (1124e6, 2e6)
            };
            let max_dirty_rate = (most * random.between(0.7, 1.0)).round();
            Load {
                left_bytes: (left * random.between(0.5, 1.5)).round(),
                max_dirty_rate,
                dirty_rate: max_dirty_rate * random.between(0.3, 0.7),
            }
        });
        let loads = loads.collect();
        let mut pairs = Vec::new();
        for a in 0..vms {
            for b in 0..a {
                let chance = match kind {
                    // Tiers next to each other in services of 9 VMs; few lines between services.
                    Kind::Tiered if a / 9 == b / 9 && a % 3 != b % 3 && a % 3 + b % 3 != 2 => 0.8,
                    Kind::Tiered => 0.5 / vms as f64,
                    Kind::Random => (4.0 / vms as f64).min(1.0),
                };
                if random.unit() < chance {
                    pairs.push((a, b, random.between(1e3, 100e3).round()));
                }
            }
        }
        Self {
            loads,
            traffic: Traffic::between(vms, pairs),
            limits: Limits::link(32e6),
        }
    }

    fn with<R>(&self, act: impl FnOnce(&Problem<'_, ByDelayedStart<'_>>) -> R) -> R {
        act(&Problem {
            time: &ByDelayedStart::new(&self.loads, &self.limits),
            traffic: &self.traffic,
            tiers: None,
        })
    }

    fn find(&self, search: Search) -> Ordered {
        self.with(|problem| find(problem, search)).expect("valid")
    }
}

const KINDS: [(&str, Kind); 2] = [("tiered", Kind::Tiered), ("random", Kind::Random)];

/// How much more the large search and COMMA's heuristic cost than the optimum.
fn gaps() {
    for (name, kind) in KINDS {
        for vms in [16, 17, 18] {
            let (mut large, mut heuristic, mut hits) = (0.0, 0.0, 0);
            const INSTANCES: u32 = 10;
            for seed in 0..u64::from(INSTANCES) {
                let instance = Instance::new(kind, vms, seed);
                let least = instance.find(Search::Exact).impact_bytes;
                let found = instance.find(Search::Large).impact_bytes;
                large += found / least - 1.0;
                heuristic += instance.find(Search::Heuristic).impact_bytes / least - 1.0;
                hits += u32::from(found <= least * (1.0 + 1e-9));
            }
            let percent = |sum: f64| 100.0 * sum / f64::from(INSTANCES);
            println!(
                "{name}, {vms} VMs: above the optimum on average: large {:.2} % ({hits} of {INSTANCES} optimal), heuristic {:.0} %",
                percent(large),
                percent(heuristic)
            );
        }
    }
}

/// The large search against COMMA's groups in the best affordable order.
fn against_the_heuristic() {
    for (name, kind) in KINDS {
        for vms in [50, 100, 200, 500, 1000] {
            let instance = Instance::new(kind, vms, 1);
            let begun = Instant::now();
            let heuristic = instance.find(Search::Heuristic).impact_bytes;
            let first = begun.elapsed();
            let begun = Instant::now();
            let large = instance.find(Search::Large).impact_bytes;
            println!(
                "{name}, {vms} VMs: large costs {:.3} of the heuristic, in {:.2?} ({first:.2?})",
                large / heuristic,
                begun.elapsed()
            );
        }
    }
}

fn times(criterion: &mut Criterion) {
    let mut bench = criterion.benchmark_group("order");
    for (search, sizes) in [
        (Search::Heuristic, &[9, 16, 100][..]),
        (Search::Brute, &[7]),
        (Search::Exact, &[9, 12, 16]),
        (Search::Large, &[16, 100]),
    ] {
        for &vms in sizes {
            let instance = Instance::new(Kind::Tiered, vms, 1);
            let id = BenchmarkId::new(search.to_string(), vms);
            bench.bench_function(id, |b| b.iter(|| black_box(instance.find(search))));
        }
    }
    // What a control loop can afford: from groups that are known already.
    let instance = Instance::new(Kind::Tiered, 100, 1);
    let effort = Effort {
        work_per_vm: 1000,
        rounds: 1,
        ..Effort::default()
    };
    let start = instance.find(Search::Large).groups;
    bench.bench_function(BenchmarkId::new("improve", 100), |b| {
        b.iter(|| instance.with(|problem| large::anneal::anneal(problem, &start, &effort, 1)));
    });
    // And when a tenth of the VMs has moved, and the link carries less than was told.
    let narrow = Instance {
        limits: Limits::link(24e6),
        ..instance
    };
    let first = start.iter().scan(0, |moved, group| {
        *moved += group.len();
        (*moved <= 10).then_some(group)
    });
    let mut moved = vec![false; 100];
    for &vm in first.flatten() {
        moved[vm] = true;
    }
    bench.bench_function(BenchmarkId::new("rest", 100), |b| {
        b.iter(|| {
            narrow.with(|problem| {
                let found = rest::quick(problem.time, problem.traffic, &moved, &start);
                black_box(found.expect("valid"))
            })
        });
    });
    bench.finish();
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    if std::env::args().any(|argument| argument == "--bench") {
        gaps();
        against_the_heuristic();
    }
    times(&mut criterion);
    criterion.final_summary();
}
