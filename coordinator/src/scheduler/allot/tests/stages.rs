//! COMMA's two stages: the bulk copy, and VMs that are parked after it.

use super::*;

const PARKED: Progress = Progress::Parked {
    bytes_per_s: 65_536,
};

/// Lets everybody copy for a step.
fn copy(capacity: &Capacity, vms: &mut [Moving], step: f64) {
    let found = bulk(capacity, vms);
    let sum: f64 = found.rates.iter().sum();
    assert!(sum <= capacity.bandwidth_f64() * (1.0 + 1e-9), "{found:?}");
    for (vm, rate) in vms.iter_mut().zip(found.rates) {
        if vm.progress == Progress::Copying {
            vm.left_bytes -= rate * step;
        }
    }
}

#[test]
fn stage_one_ends_for_all_at_once() {
    let sizes = [1e9, 2e9, 5e8];
    let mut vms = sizes.map(|size| vm(Progress::Copying, size, 2e6, 1e6));
    let first = bulk(&link(), &vms);
    assert_eq!(first.runs, [true; 3]);
    // Eq. 2: in proportion to the sizes, and all of the bandwidth.
    close(first.rates.iter().sum(), B);
    close(first.rates[1], 2.0 * first.rates[0]);
    close(first.rates[2], 0.5 * first.rates[0]);
    // What goes wrong on the way is made up for.
    vms[0].left_bytes += 3e8;
    let mut time = 0.0;
    while vms.iter().all(|vm| vm.left_bytes > 1e6) {
        copy(&link(), &mut vms, 0.01);
        time += 0.01;
    }
    assert!(vms.iter().all(|vm| vm.left_bytes < 4e6), "{vms:?}");
    assert!((time - 3.8e9 / B).abs() < 0.5, "{time}");
}

#[test]
fn who_is_copied_is_parked_and_the_rest_goes_on() {
    let vms = [
        vm(PARKED, 1e8, 2e6, 1e6),
        vm(Progress::Copying, 1e9, 2e6, 1e6),
        vm(Progress::Waiting, 3e9, 2e6, 1e6),
    ];
    let found = bulk(&link(), &vms);
    assert_eq!(found.runs, [false, true, true]);
    close(found.rates[0], 65_536.0);
    close(found.rates.iter().sum(), B);
    close(found.rates[2], 3.0 * found.rates[1]);
    let done = bulk(&link(), &[vms[0]; 3]);
    assert_eq!(done.rates, [65_536.0; 3]);
    assert_eq!(done.runs, [false; 3]);
}

#[test]
fn a_narrow_place_slows_all_of_stage_one() {
    let capacity = Capacity {
        cuts: vec![Cut {
            rate: BytesPerSecond(4_000_000),
            members: vec![0],
        }],
        ..link()
    };
    let vms = [1e9, 2e9].map(|size| vm(Progress::Copying, size, 2e6, 1e6));
    let found = bulk(&capacity, &vms);
    close(found.rates[0], 4e6);
    close(found.rates[1], 8e6);
}

#[test]
fn a_parked_vm_gets_little_and_never_much_of_a_small_link() {
    let rate = |bandwidth, vms| parked_rate(BytesPerSecond(bandwidth), vms).0;
    assert_eq!(rate(32_000_000, 3), 65_536);
    assert_eq!(rate(1_250_000_000, 3), 1_250_000);
    assert_eq!(rate(1_000_000, 3), 10_000);
    assert_eq!(rate(1_000_000, 100), 1_000);
    assert_eq!(rate(1, 100), 1);
}

/// The schedule of COMMA 3.4 once more, from VMs that are parked.
#[test]
fn in_its_turn_a_group_starts_what_was_parked_as_planned() {
    let mut vms = [light(PARKED), database(PARKED)];
    let (step, mut now) = (0.05, 0.0);
    let mut started = [None; 2];
    while vms.iter().any(|vm| vm.left_bytes > 1.0) && now < 200.0 {
        let found = allot(Scheme::Delayed, &link(), &vms);
        assert!(found.rates.iter().sum::<f64>() <= B * (1.0 + 1e-9));
        for (index, vm) in vms.iter_mut().enumerate() {
            if found.runs[index] && vm.progress == PARKED {
                vm.progress = Progress::Copying;
                started[index] = Some(now);
            }
            if vm.progress == Progress::Copying {
                let net = (found.rates[index] - vm.dirty_rate) * step;
                vm.left_bytes = (vm.left_bytes - net).max(0.0);
            } else {
                assert_eq!(found.rates[index], 65_536.0);
            }
        }
        now += step;
    }
    // The parked one's pace costs a little.
    assert!((now - 124.344_086).abs() < 0.6, "{now}");
    assert!(started.iter().flatten().any(|at| *at > 1.0), "{started:?}");
}

#[test]
fn highest_rates_that_just_fit_do_so_beside_parked_vms() {
    // 15 + 15 + 2 = 32: valid by Eq. 3, but not beside what a VM of another group gets.
    let less = Capacity {
        bandwidth: BytesPerSecond(32_000_000 - 65_536),
        ..link()
    };
    let vms = [database(PARKED), database(PARKED), light(PARKED)];
    let found = allot(Scheme::Delayed, &less, &vms);
    assert!(found.runs.contains(&false), "{found:?}");
    let sum: f64 = found.rates.iter().sum();
    assert!(sum <= less.bandwidth_f64() * (1.0 + 1e-9), "{sum}");
}

fn any_parked() -> impl Strategy<Value = Moving> {
    let rate = (1_u64..65_536).prop_map(|bytes_per_s| Progress::Parked { bytes_per_s });
    (any_vm(), proptest::option::of(rate)).prop_map(|(vm, parked)| Moving {
        progress: parked.unwrap_or(vm.progress),
        ..vm
    })
}

proptest! {
    #[test]
    fn parked_vms_keep_their_rate_within_the_bandwidth(
        vms in proptest::collection::vec(any_parked(), 1..8),
        narrow in proptest::option::of(1_000_000_u64..32_000_000),
    ) {
        let cut = narrow.map(|rate| Cut { rate: BytesPerSecond(rate), members: vec![0] });
        let capacity = Capacity { cuts: cut.into_iter().collect(), ..link() };
        let held = |vm: &Moving| vm.progress == Progress::Held;
        let held_sum: f64 = vms.iter().filter(|vm| held(vm)).map(|vm| vm.max_dirty_rate).sum();
        let dirty: f64 = vms.iter().map(|vm| vm.dirty_rate).sum();
        for found in [bulk(&capacity, &vms), allot(Scheme::Delayed, &capacity, &vms)] {
            for (index, vm) in vms.iter().enumerate() {
                prop_assert!(found.rates[index].is_finite() && found.rates[index] >= 0.0);
                if let (Progress::Parked { bytes_per_s }, false) = (vm.progress, found.runs[index]) {
                    prop_assert_eq!(found.rates[index], bytes_per_s as f64);
                }
            }
            // Held ones get what they dirty, whatever the link carries; and where nothing converges
            // the rates are but weights.
            if held_sum < 1e6 && dirty < B / 2.0 && (narrow.is_none() || !held(&vms[0])) {
                let sum: f64 = found.rates.iter().sum();
                prop_assert!(sum <= B * (1.0 + 1e-6), "{} {:?}", sum, found);
            }
        }
    }
}
