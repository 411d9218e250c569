use proptest::prelude::*;
use rate_limiter::BytesPerSecond;

use super::super::policies::{Lll, Oba, Parallel, Sequential, Timetable};
use super::super::{Disk, Guest, Load, Phase, Traffic};
use super::*;
use crate::capacity::Cut;
use crate::scheduler::bandwidth::release::Rule;
use crate::scheduler::bandwidth::{Limits, VmLoad, allocate};
use crate::scheduler::phases::TrackerSettings;
use crate::scheduler::predict::{Dirtying, End, Migration, Termination, precopy};

const MB: f64 = 1e6;

fn sweep(rate: f64, set: f64) -> Dirtying {
    Dirtying::Sweep {
        rate_bytes_per_s: rate,
        working_set_bytes: set,
    }
}

fn guest(memory: f64, dirtying: Dirtying) -> Guest {
    Guest {
        memory_bytes: memory,
        load: Load::steady(dirtying),
        disk: None,
        overhead_s: 0.0,
    }
}

fn scenario(guests: Vec<Guest>, bandwidth: f64) -> Scenario {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let bandwidth = BytesPerSecond(bandwidth as u64);
    Scenario {
        guests,
        capacity: Capacity {
            bandwidth,
            cuts: Vec::new(),
        },
        termination: Termination::XEN,
        least_round_s: 0.001,
        horizon_s: 1e5,
    }
}

/// Releases at once: VMbuddies' synchropoint.
fn at_once() -> Rule {
    Rule {
        max_downtime_s: f64::INFINITY,
        ..Rule::default()
    }
}

/// VMbuddies' three tiers with D&H's working sets, dirtying 5, 8 and 20 MB/s.
fn tiers() -> Vec<Guest> {
    [(5.0, 166.0), (8.0, 212.0), (20.0, 818.0)]
        .map(|(d, w)| guest(1024.0 * MB, sweep(d * MB, w * MB)))
        .to_vec()
}

fn loads(guests: &[Guest]) -> Vec<VmLoad> {
    let load = |guest: &Guest| VmLoad {
        remaining_bytes: guest.memory_bytes,
        dirty_rate_bytes_per_s: guest.load.phases[0].dirtying.max_rate_bytes_per_s(),
        threshold_bytes: 204_800.0,
        working_set_bytes: Some(guest.load.phases[0].dirtying.set_bytes()),
    };
    guests.iter().map(load).collect()
}

fn oba(guests: &[Guest]) -> Oba {
    let settings = TrackerSettings::default();
    Oba::new(loads(guests), Limits::default(), settings, 1.0, at_once())
}

fn near(found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance * expected.abs(),
        "{found} {expected}"
    );
}

#[test]
fn one_vm_moves_as_predicted() {
    for dirtying in [
        sweep(20.0 * MB, 500.0 * MB),
        sweep(60.0 * MB, 500.0 * MB),
        Dirtying::Uniform {
            rate_bytes_per_s: 30.0 * MB,
            hot_set_bytes: 200.0 * MB,
        },
    ] {
        for termination in [
            Termination::XEN,
            Termination::INTELLIGENT,
            Termination::Qemu {
                max_downtime_s: 20.0,
            },
        ] {
            let mut one = scenario(vec![guest(1000.0 * MB, dirtying.clone())], 50.0 * MB);
            one.guests[0].overhead_s = 0.25;
            one.termination = termination;
            let expected = precopy(&Migration {
                to_send_bytes: 1000.0 * MB,
                dirtying: &dirtying,
                rate_bytes_per_s: 50.0 * MB,
                stop_rate_bytes_per_s: 50.0 * MB,
                overhead_s: 0.25,
                termination,
            })
            .unwrap();
            let found = simulate(&one, &mut Parallel).unwrap();
            let vm = &found.vms[0];
            near(found.completion_s(), expected.completion_s(), 1e-9);
            near(found.traffic_bytes(), expected.traffic_bytes, 1e-9);
            near(found.downtime_s(), expected.downtime_s, 1e-9);
            assert_eq!((vm.rounds, vm.end), (expected.rounds, expected.end));
            assert_eq!(vm.rates[0], (0.0, 50.0 * MB));
        }
    }
}

#[test]
fn oba_holds_all_at_the_time_that_it_computed() {
    // Working sets that do not saturate: Eq. 5 knows no others.
    let tiers = [5.0, 8.0, 20.0].map(|d| guest(1024.0 * MB, sweep(d * MB, 1024.0 * MB)));
    let mut all = scenario(tiers.to_vec(), 60.0 * MB);
    all.termination = Termination::Xen {
        threshold_bytes: 204_800.0,
        max_rounds: 30,
        traffic_factor: 10.0,
    };
    let expected = allocate(60.0 * MB, &loads(&all.guests), &Limits::default()).unwrap();
    let found = simulate(&all, &mut oba(&all.guests)).unwrap();
    near(found.completion_s(), expected.completion_s, 0.02);
    assert_eq!(found.split_s(), 0.0);
    let ready = found.vms.iter().map(|vm| vm.ready_s);
    let first = ready.clone().fold(f64::INFINITY, f64::min);
    near(first, found.completion_s(), 0.1);
    near(found.traffic_bytes(), 60.0 * MB * found.completion_s(), 0.1);

    // Those that do are faster than the closed form thinks.
    all.guests = self::tiers();
    let saturating = simulate(&all, &mut oba(&all.guests)).unwrap();
    assert!(saturating.completion_s() < 0.9 * found.completion_s());
}

#[test]
fn policies_split_as_they_should() {
    let all = scenario(tiers(), 60.0 * MB);
    let traffic = [Traffic {
        between: [0, 2],
        rate_bytes_per_s: 1000.0,
    }];
    let sequential = simulate(&all, &mut Sequential::new(vec![2, 1, 0], 3).unwrap()).unwrap();
    assert_eq!(sequential.vms[1].start_s, sequential.vms[2].finish_s);
    assert_eq!(sequential.vms[0].start_s, sequential.vms[1].finish_s);
    let split = sequential.vms[0].finish_s - sequential.vms[2].finish_s;
    assert_eq!(sequential.split_s(), split);
    near(sequential.impact_bytes(&traffic), split * 1000.0, 1e-12);
    let parallel = simulate(&all, &mut Parallel).unwrap();
    assert!(parallel.split_s() > 0.0 && parallel.split_s() < sequential.split_s());
    let lll = simulate(&all, &mut Lll::new(&[5.0, 8.0, 20.0], at_once())).unwrap();
    assert_eq!((lll.split_s(), lll.impact_bytes(&traffic)), (0.0, 0.0));
    assert_eq!(lll.vms[1].start_s, lll.vms[0].ready_s);
    assert_eq!(lll.vms[2].start_s, lll.vms[1].ready_s);
    assert!(lll.completion_s() >= sequential.completion_s() * 0.999);
}

#[test]
fn a_plan_is_followed_and_waits_for_the_group_before() {
    let pair = |memory| guest(memory, Dirtying::NONE);
    let all = scenario(
        vec![pair(100.0 * MB), pair(50.0 * MB), pair(100.0 * MB)],
        10.0 * MB,
    );
    let groups = vec![
        vec![
            (0, vec![(0.0, 10.0 * MB), (5.0, 5.0 * MB)]),
            (1, vec![(5.0, 5.0 * MB)]),
        ],
        vec![(2, vec![(1.0, 4.0 * MB)])],
    ];
    let found = simulate(&all, &mut Timetable::new(groups, 3, at_once()).unwrap()).unwrap();
    let times = found.vms.iter().map(|vm| (vm.start_s, vm.finish_s));
    for ((start, finish), expected) in times.zip([(0.0, 15.0), (5.0, 15.0), (16.0, 41.0)]) {
        near(start + 1.0, expected.0 + 1.0, 1e-3);
        near(finish, expected.1, 1e-3);
    }
    assert_eq!(found.vms[0].finish_s, found.vms[1].finish_s);

    // COMMA's stage one: rates of all before the first group, none for the second group after that.
    let groups = vec![
        vec![(0, vec![(0.0, 10.0 * MB)]), (1, vec![(0.0, 10.0 * MB)])],
        vec![(2, vec![(0.0, 10.0 * MB)])],
    ];
    let all_rates = vec![4.0 * MB, 2.0 * MB, 4.0 * MB];
    let timetable = Timetable::new(groups, 3, at_once()).unwrap();
    let found = simulate(&all, &mut timetable.after(all_rates, 10.0)).unwrap();
    // 60 and 30 MB are left of the first two, 60 MB of the third.
    for (vm, finish_s) in found.vms.iter().zip([19.0, 19.0, 25.0]) {
        assert_eq!(vm.start_s, 0.0);
        near(vm.finish_s, finish_s, 1e-3);
    }
    assert!(Timetable::new(vec![vec![(0, vec![])]], 2, at_once()).is_err());
    assert!(Sequential::new(vec![0, 0], 2).is_err());
    assert!(Sequential::new(vec![0, 2], 2).is_err());
}

/// COMMA 3.4 for a light VM and a database (Table 4): S = 1124 and 2048 MB, m = 2 and 15, d = 1 and
/// 7.5 MB/s. The database starts last, with all but 2 MB/s.
#[test]
fn delayed_starts_end_together_when_comma_says() {
    let stage_two = |set, rate| guest(set * MB, sweep(rate * MB, 1e15));
    let mut all = scenario(
        vec![stage_two(1124.0, 1.0), stage_two(2048.0, 7.5)],
        32.0 * MB,
    );
    all.termination = Termination::Qemu {
        max_downtime_s: 1e-3,
    };
    let database_s = 2048.0 / (30.0 - 7.5);
    let total_s = database_s + (1124.0 - database_s) / (32.0 - 1.0);
    let begins_s = total_s - database_s;
    let group = vec![
        (0, vec![(0.0, 32.0 * MB), (begins_s, 2.0 * MB)]),
        (1, vec![(begins_s, 30.0 * MB)]),
    ];
    let found = simulate(
        &all,
        &mut Timetable::new(vec![group], 2, at_once()).unwrap(),
    )
    .unwrap();
    near(found.completion_s(), 124.344_086_022, 1e-4);
    near(found.traffic_bytes(), 32.0 * 124.344_086_022 * MB, 1e-3);
    assert_eq!(found.split_s(), 0.0);
    for vm in &found.vms {
        near(vm.ready_s, 124.344_086_022, 1e-3);
    }
}

#[test]
fn a_shared_interface_is_honoured() {
    let mut all = scenario(vec![guest(60.0 * MB, Dirtying::NONE); 3], 30.0 * MB);
    all.capacity.cuts = vec![Cut {
        rate: BytesPerSecond(10_000_000),
        members: vec![0, 1],
    }];
    let found = simulate(&all, &mut Parallel).unwrap();
    let finish: Vec<f64> = found.vms.iter().map(|vm| vm.finish_s).collect();
    near(finish[0], 12.0, 1e-3);
    near(finish[1], 12.0, 1e-3);
    near(finish[2], 3.0, 1e-3);
}

#[test]
fn a_disk_goes_first_and_its_writes_follow() {
    let mut all = scenario(vec![guest(100.0 * MB, Dirtying::NONE)], 10.0 * MB);
    all.guests[0].disk = Some(Disk {
        size_bytes: 400.0 * MB,
        load: Load::steady(sweep(1.0 * MB, 1e12)),
        threshold_bytes: 1.0 * MB,
    });
    let found = simulate(&all, &mut Parallel).unwrap();
    // All is sent at 10 MB/s while 1 MB/s is added: 500/(10 − 1).
    near(found.completion_s(), 500.0 / 9.0, 1e-3);
    near(found.traffic_bytes(), 5000.0 / 9.0 * MB, 1e-3);
    assert_eq!(found.vms[0].end, Some(End::Converged));
}

#[test]
fn phases_come_and_go() {
    // 10 s at 40 MB/s, 10 s at nothing, over and over, sent at 20 MB/s.
    let phase = |rate| Phase {
        duration_s: 10.0,
        dirtying: sweep(rate, 1e12),
    };
    let mut all = scenario(vec![guest(100.0 * MB, Dirtying::NONE)], 20.0 * MB);
    all.guests[0].load.phases = vec![phase(40.0 * MB), phase(0.0)];
    all.termination = Termination::Qemu {
        max_downtime_s: 0.5,
    };
    let found = simulate(&all, &mut Parallel);
    // 0-5 s: all of it, 200 MB are dirtied; 5-15 s: those, 200 MB more; 15-25 s: those, 200 MB
    // more, and so on: it never ends.
    assert!(
        matches!(found, Err(SimulateError::Endless { .. })),
        "{found:?}"
    );
    all.guests[0].load.phases[1].duration_s = 20.0;
    let found = simulate(&all, &mut Parallel).unwrap();
    // 15-25 s: the 200 MB of 5-10 s, nothing is dirtied.
    near(found.completion_s(), 25.0, 1e-3);
    near(found.traffic_bytes(), 500.0 * MB, 1e-3);
}

#[test]
fn a_held_group_waits_until_it_fits_or_is_too_hot() {
    // After the bulk 100 MB are dirty: 2 s of downtime; the rounds bring them down.
    let mut all = scenario(
        vec![guest(500.0 * MB, sweep(10.0 * MB, 100.0 * MB))],
        50.0 * MB,
    );
    all.termination = Termination::Xen {
        threshold_bytes: 1.0,
        max_rounds: 1,
        traffic_factor: 3.0,
    };
    all.least_round_s = 0.1;
    let found = simulate(&all, &mut Lll::new(&[1.0], Rule::default())).unwrap();
    assert!(found.downtime_s() <= 0.3 + 1e-9 && found.vms[0].ready_s + 1.0 < found.completion_s());
    all.guests[0].load = Load::steady(sweep(80.0 * MB, 100.0 * MB));
    let error = simulate(&all, &mut Lll::new(&[1.0], Rule::default())).unwrap_err();
    let SimulateError::TooHot { group, best_s } = error else {
        panic!("{error}");
    };
    assert_eq!(group, [0]);
    near(best_s, 2.0, 0.1);
}

#[test]
fn nonsense_is_refused() {
    let good = scenario(tiers(), 60.0 * MB);
    let bad = |change: &dyn Fn(&mut Scenario)| {
        let mut bad = good.clone();
        change(&mut bad);
        simulate(&bad, &mut Parallel).unwrap_err()
    };
    bad(&|s| s.capacity.bandwidth = BytesPerSecond(0));
    bad(&|s| s.guests[1].memory_bytes = f64::NAN);
    bad(&|s| s.guests[1].overhead_s = -1.0);
    bad(&|s| s.guests[0].load.phases.clear());
    bad(&|s| s.guests[0].load.phases[0].duration_s = 0.0);
    bad(&|s| s.guests[0].load = Load::steady(sweep(-1.0, 1.0)));
    bad(&|s| s.least_round_s = 0.0);
    bad(&|s| s.horizon_s = 1.0);
    let cut = Cut {
        rate: BytesPerSecond(5),
        members: vec![3],
    };
    let error = bad(&|s| s.capacity.cuts = vec![cut.clone()]);
    assert!(error.to_string().contains("lists VM 3"), "{error}");
    let none = scenario(Vec::new(), 1.0);
    assert_eq!(simulate(&none, &mut Parallel).unwrap().completion_s(), 0.0);
    assert!(simulate(&none, &mut Lll::new(&[], at_once())).is_ok());
}

prop_compose! {
    fn any_guest()(
        memory in 1.0..500.0_f64,
        rate in 0.0..40.0_f64,
        set in 0.0..1.0_f64,
        uniform: bool,
        overhead in 0.0..0.2_f64,
        phases in prop::collection::vec(0.5..40.0_f64, 0..3),
    ) -> Guest {
        let dirtying = |rate: f64| if uniform {
            Dirtying::Uniform { rate_bytes_per_s: rate * MB, hot_set_bytes: set * memory * MB }
        } else {
            sweep(rate * MB, set * memory * MB)
        };
        let mut guest = guest(memory * MB, dirtying(rate));
        guest.overhead_s = overhead;
        if !phases.is_empty() {
            let phase = |(i, &duration_s): (usize, &f64)| Phase {
                duration_s,
                dirtying: dirtying(if i % 2 == 0 { rate } else { rate / 4.0 }),
            };
            guest.load.phases = phases.iter().enumerate().map(phase).collect();
        }
        guest
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_moves_obeys_the_links_and_arrives(
        guests in prop::collection::vec(any_guest(), 1..5),
        bandwidth in 20.0..200.0_f64,
        nic in 20.0..200.0_f64,
    ) {
        let mut all = scenario(guests, bandwidth * MB);
        all.least_round_s = 0.5;
        let members: Vec<usize> = (0..all.guests.len()).step_by(2).collect();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        all.capacity.cuts.push(Cut { rate: BytesPerSecond((nic * MB) as u64), members });
        let rates: Vec<f64> = loads(&all.guests).iter().map(|l| l.dirty_rate_bytes_per_s).collect();
        let order = (0..all.guests.len()).collect();
        let policies: [Box<dyn Policy>; 4] = [
            Box::new(Parallel),
            Box::new(Sequential::new(order, all.guests.len()).unwrap()),
            Box::new(Lll::new(&rates, at_once())),
            Box::new(oba(&all.guests)),
        ];
        let memory: f64 = all.guests.iter().map(|guest| guest.memory_bytes).sum();
        for (index, mut policy) in policies.into_iter().enumerate() {
            let found = simulate(&all, policy.as_mut()).unwrap();
            prop_assert!(found.traffic_bytes() >= memory * (1.0 - 1e-9));
            prop_assert!(found.completion_s() >= memory / (bandwidth * MB) * (1.0 - 1e-6));
            for (vm, guest) in found.vms.iter().zip(&all.guests) {
                prop_assert!(vm.start_s <= vm.ready_s && vm.ready_s <= vm.paused_s);
                prop_assert!(vm.downtime_s() >= guest.overhead_s * (1.0 - 1e-6));
                // What was sent is what the rates say.
                let ends = vm.rates.iter().skip(1).map(|r| r.0).chain([found.completion_s()]);
                let area: f64 = vm.rates.iter().zip(ends).map(|(r, end)| r.1 * (end - r.0)).sum();
                prop_assert!((area - vm.traffic_bytes).abs() <= 1e-6 * vm.traffic_bytes + 1.0);
            }
            if index >= 2 {
                prop_assert!(found.split_s() <= 1e-9);
            }
            // At every moment the rates fit the links.
            let mut times: Vec<f64> =
                found.vms.iter().flat_map(|vm| vm.rates.iter().map(|r| r.0)).collect();
            times.sort_by(f64::total_cmp);
            times.dedup();
            times.truncate(300);
            for time in times {
                let rate = |vm: &Travel| {
                    let from = vm.rates.partition_point(|r| r.0 <= time);
                    from.checked_sub(1).map_or(0.0, |index| vm.rates[index].1)
                };
                let all_rates: Vec<f64> = found.vms.iter().map(rate).collect();
                prop_assert!(all_rates.iter().sum::<f64>() <= bandwidth * MB * (1.0 + 1e-9));
                let nic_rates = all_rates.iter().step_by(2).sum::<f64>();
                prop_assert!(nic_rates <= nic * MB * (1.0 + 1e-9));
            }
        }
        // The same again is the same.
        let again = simulate(&all, &mut oba(&all.guests));
        prop_assert_eq!(again, simulate(&all, &mut oba(&all.guests)));
    }
}
