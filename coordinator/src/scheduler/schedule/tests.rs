use proptest::prelude::*;

use super::*;

/// COMMA's Table 4, in MB: dirty set and memory, highest and mean dirty rate.
const LIGHT: Load = load(1124.0, 2.0, 1.0);
const DATABASE: Load = load(2048.0, 15.0, 7.5);

const fn load(left_bytes: f64, max_dirty_rate: f64, dirty_rate: f64) -> Load {
    Load {
        left_bytes,
        max_dirty_rate,
        dirty_rate,
    }
}

fn all(loads: &[Load]) -> Vec<usize> {
    (0..loads.len()).collect()
}

fn comma(loads: &[Load], limits: &Limits) -> Option<Schedule> {
    delayed(loads, limits, &by_start(loads, &all(loads)))
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0)
}

/// What a VM's steps carry beyond what it dirties, in bytes.
fn carried(vm: &VmSchedule, dirty_rate: f64, duration_s: f64) -> f64 {
    let ends = vm.bandwidth.iter().skip(1).map(|step| step.0);
    vm.bandwidth
        .iter()
        .zip(ends.chain([duration_s]))
        .map(|((from, rate), to)| (rate - dirty_rate) * (to - from))
        .sum()
}

fn rate_at(vm: &VmSchedule, at_s: f64) -> f64 {
    let steps = vm.bandwidth.iter().rev();
    steps
        .into_iter()
        .find(|(from, _)| *from <= at_s)
        .map_or(0.0, |(_, rate)| *rate)
}

#[test]
fn durations_of_table_4() {
    let link = Limits::link(32.0);
    for (loads, expected) in [
        (vec![LIGHT], 36.258_064_516),
        (vec![DATABASE], 83.591_836_735),
        (vec![LIGHT, DATABASE], 124.344_086_022),
        (vec![LIGHT, LIGHT, DATABASE], 167.112_401_313),
        (vec![DATABASE, DATABASE], 233.177_228_786),
    ] {
        let schedule = comma(&loads, &link).expect("valid");
        assert!(
            (schedule.duration_s - expected).abs() < 1e-8,
            "{loads:?}: {}",
            schedule.duration_s
        );
    }
}

#[test]
fn three_databases_are_no_valid_group() {
    assert_eq!(comma(&[DATABASE; 3], &Limits::link(32.0)), None);
}

#[test]
fn saturated_groups_never_converge() {
    // Nothing is left above the mean rate.
    let busy = load(100.0, 16.0, 16.0);
    assert_eq!(comma(&[busy, busy], &Limits::link(32.0)), None);
    assert!(comma(&[busy], &Limits::link(32.0)).is_some());
}

#[test]
fn nothing_left_takes_no_time() {
    let schedule = comma(&[load(0.0, 1.0, 1.0), LIGHT], &Limits::link(32.0)).expect("valid");
    assert!(near(schedule.duration_s, 1124.0 / 31.0));
    let idle = schedule.vms.iter().find(|vm| vm.vm == 0).expect("there");
    assert!(near(idle.start_s, schedule.duration_s) && idle.bandwidth.is_empty());
    assert_eq!(
        comma(&[], &Limits::link(1.0)).expect("empty").duration_s,
        0.0
    );
}

#[test]
fn the_latest_starter_gets_the_rest() {
    let schedule = comma(&[LIGHT, DATABASE], &Limits::link(32.0)).expect("valid");
    let [light, database] = &schedule.vms[..] else {
        panic!("two VMs");
    };
    assert_eq!((light.vm, database.vm), (0, 1));
    assert_eq!(light.start_s, 0.0);
    assert_eq!(database.bandwidth, vec![(database.start_s, 30.0)]);
    let rates: Vec<f64> = light.bandwidth.iter().map(|step| step.1).collect();
    assert_eq!(rates, [32.0, 2.0]);
    assert!(near(light.bandwidth[1].0, database.start_s));
}

#[test]
fn two_interfaces_work_side_by_side() {
    // Each VM can have 16 of 32: neither waits for the other.
    let cut = |vm: usize| Cut {
        rate: 16.0,
        crossed_by: (0..2).map(|other| other == vm).collect(),
    };
    let limits = Limits {
        bandwidth: 32.0,
        cuts: vec![cut(0), cut(1)],
    };
    let schedule = comma(&[LIGHT, LIGHT], &limits).expect("valid");
    assert!(near(schedule.duration_s, 1124.0 / 15.0));
    assert!(near(limits.alone(1), 16.0));
    assert_eq!(comma(&[load(1.0, 17.0, 1.0)], &limits), None);
}

#[test]
fn every_order_is_visited_once() {
    for count in 0..6_usize {
        let mut seen = std::collections::BTreeSet::new();
        let mut visits = 0;
        for_each_order(&mut (0..count).collect::<Vec<_>>(), &mut |order| {
            visits += 1;
            seen.insert(order.to_vec());
        });
        assert_eq!(visits, (1..=count).product::<usize>());
        assert_eq!(seen.len(), visits);
    }
}

/// Loads whose highest dirty rates use a part of the bandwidth, 100.
fn group(most: usize) -> impl Strategy<Value = Vec<Load>> {
    let one = (1.0..1000.0_f64, 0.1..1.0_f64, 0.0..0.95_f64);
    (prop::collection::vec(one, 1..=most), 0.05..1.0_f64).prop_map(|(parts, used)| {
        let sum: f64 = parts.iter().map(|part| part.1).sum();
        let loads = parts.into_iter().map(|(left, part, mean)| {
            let most = 100.0 * used * part / sum;
            load(left, most, most * mean)
        });
        loads.collect()
    })
}

proptest! {
    #[test]
    fn invariants_of_the_papers_order(loads in group(8)) {
        let link = Limits::link(100.0);
        let schedule = comma(&loads, &link).expect("valid");
        let duration = schedule.duration_s;
        prop_assert!(near(schedule.vms[0].start_s, 0.0));
        for vm in &schedule.vms {
            let load = loads[vm.vm];
            prop_assert!(near(carried(vm, load.dirty_rate, duration), load.left_bytes));
            for (_, rate) in &vm.bandwidth {
                prop_assert!(*rate >= load.max_dirty_rate * (1.0 - 1e-12));
            }
            prop_assert!(near(vm.bandwidth[0].0, vm.start_s));
        }
        for part in 0..50 {
            let at = duration * (f64::from(part) + 0.5) / 50.0;
            let sum: f64 = schedule.vms.iter().map(|vm| rate_at(vm, at)).sum();
            prop_assert!(near(sum, 100.0), "{sum} at {at}");
        }
        let left: f64 = loads.iter().map(|load| load.left_bytes).sum();
        let mean: f64 = loads.iter().map(|load| load.dirty_rate).sum();
        prop_assert!(duration <= left / (100.0 - mean) * (1.0 + 1e-9));
        prop_assert!(duration >= left / 100.0 * (1.0 - 1e-9));
        for load in &loads {
            prop_assert!(duration >= load.left_bytes / (100.0 - load.dirty_rate) * (1.0 - 1e-9));
        }
    }

    #[test]
    fn a_smaller_group_is_no_slower_and_two_are_no_faster_than_one(
        loads in group(8),
        split in any::<u8>(),
    ) {
        let link = Limits::link(100.0);
        let whole = comma(&loads, &link).expect("valid").duration_s;
        let part = |member: &dyn Fn(usize) -> bool| {
            let group: Vec<usize> = all(&loads).into_iter().filter(|&vm| member(vm)).collect();
            delayed(&loads, &link, &by_start(&loads, &group)).expect("valid").duration_s
        };
        for gone in 0..loads.len() {
            prop_assert!(part(&|vm| vm != gone) <= whole * (1.0 + 1e-9));
        }
        let (a, b) = (part(&|vm| split >> vm & 1 == 1), part(&|vm| split >> vm & 1 == 0));
        prop_assert!(whole >= (a + b) * (1.0 - 1e-9), "{whole} {a} {b}");
    }

    #[test]
    fn any_order_carries_everything_within_the_limits(
        loads in group(6).prop_shuffle(),
        narrow in prop::collection::vec((any::<u8>(), 0.3..1.0_f64), 0..4),
    ) {
        let cuts = narrow.iter().map(|&(crossed, rate)| Cut {
            rate: 100.0 * rate,
            crossed_by: (0..loads.len()).map(|vm| crossed >> vm & 1 == 1).collect(),
        });
        let limits = Limits { bandwidth: 100.0, cuts: cuts.collect() };
        let Some(schedule) = delayed(&loads, &limits, &all(&loads)) else {
            let least = loads.iter().map(|load| load.max_dirty_rate).enumerate();
            prop_assert!(!limits.hold(least));
            return Ok(());
        };
        for vm in &schedule.vms {
            let load = loads[vm.vm];
            prop_assert!(near(carried(vm, load.dirty_rate, schedule.duration_s), load.left_bytes));
            prop_assert!(vm.bandwidth.iter().all(|step| step.1 >= load.max_dirty_rate * (1.0 - 1e-12)));
        }
        for part in 0..20 {
            let at = schedule.duration_s * (f64::from(part) + 0.5) / 20.0;
            let rates = schedule.vms.iter().map(|vm| (vm.vm, rate_at(vm, at) * (1.0 - 1e-9)));
            prop_assert!(limits.hold(rates));
        }
        let best = best_order(&loads, &limits, &all(&loads)).expect("valid");
        prop_assert!(best.duration_s <= schedule.duration_s * (1.0 + 1e-9));
    }
}
