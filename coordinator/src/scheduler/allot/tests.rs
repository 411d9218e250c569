use proptest::prelude::*;
use rate_limiter::BytesPerSecond;

use super::*;
use crate::capacity::Cut;

mod stages;

const B: f64 = 32e6;

fn link() -> Capacity {
    Capacity {
        bandwidth: BytesPerSecond(32_000_000),
        cuts: Vec::new(),
    }
}

fn vm(progress: Progress, left: f64, max: f64, mean: f64) -> Moving {
    Moving {
        progress,
        left_bytes: left,
        dirty_rate: mean,
        nominal_dirty_rate: mean,
        max_dirty_rate: max,
        working_set: None,
        in_vain: false,
    }
}

/// L and D of COMMA's tables: stage two of a light VM and of a database.
fn light(progress: Progress) -> Moving {
    vm(progress, 1124e6, 2e6, 1e6)
}

fn database(progress: Progress) -> Moving {
    vm(progress, 2048e6, 15e6, 7.5e6)
}

fn close(found: f64, expected: f64) {
    assert!(
        (found - expected).abs() <= 1e-6 * expected.abs().max(1.0),
        "{found} is not {expected}"
    );
}

#[test]
fn together_all_start_and_finish_at_once() {
    use Progress::{Copying, Waiting};
    let vms = [light(Waiting), database(Copying), light(Waiting)];
    let found = allot(Scheme::Together, &link(), &vms);
    assert_eq!(found.runs, [true; 3]);
    close(found.rates.iter().sum(), B);
    let finish: Vec<f64> = vms
        .iter()
        .zip(&found.rates)
        .map(|(vm, rate)| vm.left_bytes / (rate - vm.dirty_rate))
        .collect();
    close(finish[0], finish[1]);
    close(finish[1], finish[2]);
}

#[test]
fn a_vm_that_is_held_in_vain_rests_while_others_copy() {
    use Progress::{Copying, Held};
    let hot = |progress| Moving {
        in_vain: true,
        ..vm(progress, 100e6, 20e6, 15e6)
    };
    for scheme in [Scheme::Together, Scheme::InTurn, Scheme::Delayed] {
        let found = allot(scheme, &link(), &[hot(Held), light(Copying)]);
        assert!(found.rates[0] < 0.01 * B, "{scheme}: {:?}", found.rates);
        assert!(found.rates[1] > 0.98 * B, "{scheme}: {:?}", found.rates);
    }
    let found = allot(Scheme::Together, &link(), &[hot(Held), light(Held)]);
    assert!(found.rates[0] > 14e6, "{:?}", found.rates);
}

#[test]
fn held_vms_get_what_they_dirty_and_no_more() {
    use Progress::{Copying, Held};
    for scheme in [Scheme::Together, Scheme::InTurn] {
        let vms = [database(Held), light(Copying)];
        let found = allot(scheme, &link(), &vms);
        close(found.rates[0], 7.5e6);
        close(found.rates[1], B - 7.5e6);
    }
    // COMMA keeps the highest rate for those that have started.
    let found = allot(Scheme::Delayed, &link(), &[database(Held), light(Copying)]);
    close(found.rates[0], 15e6);
    close(found.rates[1], B - 15e6);
}

#[test]
fn in_turn_the_largest_dirty_rate_comes_last() {
    use Progress::{Copying, Held, Waiting};
    let start = [database(Waiting), light(Waiting)];
    let found = allot(Scheme::InTurn, &link(), &start);
    assert_eq!(found.runs, [false, true]);
    assert_eq!(found.rates, [0.0, B]);
    let copying = [database(Waiting), light(Copying)];
    assert_eq!(allot(Scheme::InTurn, &link(), &copying).runs, [false, true]);
    let ready = [database(Waiting), light(Held)];
    let found = allot(Scheme::InTurn, &link(), &ready);
    assert_eq!(found.runs, [true, true]);
    assert_eq!(found.rates, [B - 1e6, 1e6]);
}

/// The schedule of COMMA 3.4, asked step by step: its T is COMMA's for {L, D}.
#[test]
fn delayed_starts_come_out_as_planned_when_time_passes() {
    let mut vms = [light(Progress::Waiting), database(Progress::Waiting)];
    let mut now = 0.0;
    let step = 0.05;
    let mut started = [None; 2];
    while vms.iter().any(|vm| vm.left_bytes > 1.0) && now < 200.0 {
        let found = allot(Scheme::Delayed, &link(), &vms);
        let sum: f64 = found.rates.iter().sum();
        assert!(sum <= B * (1.0 + 1e-9), "{found:?}");
        for (index, vm) in vms.iter_mut().enumerate() {
            if found.runs[index] && vm.progress == Progress::Waiting {
                vm.progress = Progress::Copying;
                started[index] = Some(now);
            }
            if vm.progress == Progress::Copying {
                let net = (found.rates[index] - vm.dirty_rate) * step;
                vm.left_bytes = (vm.left_bytes - net).max(0.0);
            }
        }
        now += step;
    }
    assert!((now - 124.344_086).abs() < 0.3, "{now}");
    // The earlier starter goes first, the other one when what is left of it fits.
    assert!(started.iter().flatten().any(|at| *at == 0.0), "{started:?}");
    assert!(started.iter().flatten().any(|at| *at > 1.0), "{started:?}");
}

#[test]
fn what_does_not_fit_is_shared_by_what_is_left() {
    let hot = vm(Progress::Copying, 100e6, 40e6, 40e6);
    for scheme in [Scheme::Together, Scheme::InTurn, Scheme::Delayed] {
        let found = allot(scheme, &link(), &[hot, hot]);
        assert!(found.rates.iter().all(|rate| rate.is_finite()), "{scheme}");
        assert!(found.rates.iter().sum::<f64>() > 0.0, "{scheme}");
    }
}

#[test]
fn a_narrow_interface_is_honoured() {
    let capacity = Capacity {
        cuts: vec![Cut {
            rate: BytesPerSecond(4_000_000),
            members: vec![0],
        }],
        ..link()
    };
    for scheme in [Scheme::Together, Scheme::InTurn, Scheme::Delayed] {
        let vms = [light(Progress::Copying), light(Progress::Waiting)];
        let found = allot(scheme, &capacity, &vms);
        assert!(found.rates[0] <= 4e6 * (1.0 + 1e-9), "{scheme}: {found:?}");
    }
}

fn any_vm() -> impl Strategy<Value = Moving> {
    let progress = prop_oneof![
        Just(Progress::Waiting),
        Just(Progress::Copying),
        Just(Progress::Held)
    ];
    let amounts = (
        0.0..4e9,
        0.0..20e6,
        1.0..3.0,
        proptest::option::of(0.0..1e9),
    );
    (progress, amounts).prop_map(|(progress, (left, mean, times, set))| Moving {
        working_set: set,
        ..vm(progress, left, mean * times, mean)
    })
}

proptest! {
    #[test]
    fn nothing_is_absurd(vms in proptest::collection::vec(any_vm(), 1..8), scheme in 0..3) {
        let scheme = [Scheme::Together, Scheme::InTurn, Scheme::Delayed]
            [usize::try_from(scheme).unwrap_or(0)];
        let found = allot(scheme, &link(), &vms);
        prop_assert_eq!(found.rates.len(), vms.len());
        for (index, vm) in vms.iter().enumerate() {
            prop_assert!(found.rates[index].is_finite() && found.rates[index] >= 0.0);
            prop_assert!(found.runs[index] || vm.progress == Progress::Waiting);
            prop_assert!(found.runs[index] || found.rates[index] == 0.0);
        }
        // Whoever waits is started at some time: now, when another is ready, or when it is due.
        let somebody = found.runs.iter().any(|&runs| runs) || found.next_start.is_some();
        prop_assert!(somebody);
        let waits = found.runs.iter().any(|&runs| !runs);
        let moves = vms.iter().zip(&found.runs)
            .any(|(vm, &runs)| runs && vm.progress != Progress::Held);
        prop_assert!(!waits || moves || found.next_start.is_some());
    }
}
