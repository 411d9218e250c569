use proptest::prelude::*;
use rate_limiter::BytesPerSecond;

use super::*;
use crate::capacity::Cut;

pub(in crate::scheduler) fn vm(
    memory: f64,
    dirty: f64,
    threshold: f64,
    working_set: Option<f64>,
) -> VmLoad {
    VmLoad {
        remaining_bytes: memory,
        dirty_rate_bytes_per_s: dirty,
        threshold_bytes: threshold,
        working_set_bytes: working_set,
    }
}

/// VMbuddies' three tiers: D&H's working sets of Table 2, 1 GiB each, 50 pages as threshold.
pub(in crate::scheduler) fn tiers() -> [VmLoad; 3] {
    [(5.0, 166.0), (8.0, 212.0), (20.0, 818.0)].map(|(d, w)| vm(1024.0, d, 0.195_312_5, Some(w)))
}

fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-9, "{found} {expected}");
}

#[test]
fn golden_values() {
    let two = [vm(1000.0, 10.0, 0.0, None), vm(1000.0, 20.0, 0.0, None)];
    let all = allocate(100.0, &two, &Limits::default()).unwrap();
    near(all.completion_s, 2000.0 / 70.0);
    near(all.rates_bytes_per_s[0], 45.0);
    near(all.rates_bytes_per_s[1], 55.0);

    let all = allocate(60.0, &tiers(), &Limits::default()).unwrap();
    near(all.completion_s, 113.766_801_320);
    let expected = [14.000_255_214, 17.000_060_445, 28.999_684_340];
    for (rate, expected) in all.rates_bytes_per_s.iter().zip(expected) {
        near(*rate, expected);
    }
}

#[test]
fn the_cap_lets_vms_finish_that_never_converge() {
    // Σd = 33 exceeds B = 5: all send their cap.
    let all = allocate(5.0, &tiers(), &Limits::default()).unwrap();
    let caps = [166.0, 212.0, 818.0].map(|w: f64| (1024.0 + 24.0 * w).min(3.0 * 1024.0 + w));
    near(all.completion_s, caps.iter().sum::<f64>() / 5.0);
    for (rate, cap) in all.rates_bytes_per_s.iter().zip(caps) {
        near(*rate, cap / all.completion_s);
    }
}

#[test]
fn what_cannot_be_is_an_error() {
    let endless = [vm(1.0, 3.0, 0.0, None), vm(1.0, 7.0, 0.0, None)];
    let error = allocate(10.0, &endless, &Limits::default()).unwrap_err();
    assert_eq!(
        error,
        AllocateError::DoesNotConverge {
            dirty_bytes_per_s: 10.0,
            bandwidth_bytes_per_s: 10.0
        }
    );
    assert!(error.to_string().contains("raise the bandwidth"), "{error}");
    let done = [vm(0.0, 3.0, 1.0, None), vm(0.0, 1.0, 0.0, Some(5.0))];
    let all = allocate(10.0, &done, &Limits::default()).unwrap();
    assert_eq!(all.completion_s, 0.0);
    assert_eq!(all.rates_bytes_per_s, [6.0, 4.0]);
}

#[test]
fn the_narrowest_cut_sets_the_time() {
    let vms = [
        vm(1000.0, 10.0, 0.0, None),
        vm(1000.0, 20.0, 0.0, None),
        vm(100.0, 0.0, 0.0, None),
    ];
    let mut capacity = Capacity {
        bandwidth: BytesPerSecond(200),
        cuts: vec![Cut {
            rate: BytesPerSecond(100),
            members: vec![0, 1],
        }],
    };
    let all = allocate_within(&capacity, &vms, &Limits::default()).unwrap();
    near(all.completion_s, 2000.0 / 70.0);
    for (rate, expected) in all.rates_bytes_per_s.iter().zip([45.0, 55.0, 3.5]) {
        near(*rate, expected);
    }
    // One that is wide enough changes nothing.
    capacity.cuts[0].rate = BytesPerSecond(199);
    let wide = allocate_within(&capacity, &vms, &Limits::default()).unwrap();
    assert_eq!(wide, allocate(200.0, &vms, &Limits::default()).unwrap());
    capacity.cuts[0].rate = BytesPerSecond(30);
    assert!(allocate_within(&capacity, &vms, &Limits::default()).is_err());
}

prop_compose! {
    fn load()(
        memory in 1e3..1e11_f64,
        dirty in 0.0..1.0_f64,
        threshold in 0.0..0.1_f64,
        working_set in 0.0..1.0_f64,
    ) -> VmLoad {
        vm(memory, dirty * 1e8, threshold * memory, Some(working_set * memory))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn the_bandwidth_is_used_and_all_finish_together(
        vms in prop::collection::vec(load(), 1..100),
        bandwidth in 1e3..1e11_f64,
    ) {
        let limits = Limits::default();
        let all = allocate(bandwidth, &vms, &limits).unwrap();
        let sum: f64 = all.rates_bytes_per_s.iter().sum();
        prop_assert!((sum / bandwidth - 1.0).abs() < 1e-9);
        for (vm, &rate) in vms.iter().zip(&all.rates_bytes_per_s) {
            let time = Curve::new(vm, &limits).time(rate);
            prop_assert!((time / all.completion_s - 1.0).abs() < 1e-9, "{time} {all:?}");
        }
        // More bandwidth, or one VM less, is never slower; scale does not matter.
        let more = allocate(bandwidth * 1.1, &vms, &limits).unwrap();
        prop_assert!(more.completion_s < all.completion_s);
        if vms.len() > 1 {
            let less = allocate(bandwidth, &vms[1..], &limits).unwrap();
            prop_assert!(less.completion_s < all.completion_s);
        }
        let scaled: Vec<VmLoad> = vms
            .iter()
            .map(|v| vm(
                v.remaining_bytes * 8.0,
                v.dirty_rate_bytes_per_s * 8.0,
                v.threshold_bytes * 8.0,
                v.working_set_bytes.map(|w| w * 8.0),
            ))
            .collect();
        let again = allocate(bandwidth * 8.0, &scaled, &limits).unwrap();
        prop_assert!((again.completion_s / all.completion_s - 1.0).abs() < 1e-12);
    }

    #[test]
    fn without_threshold_and_cap_it_is_a_quotient(
        loads in prop::collection::vec((1.0..1e9_f64, 0.0..1e3_f64), 1..20),
        surplus in 0.01..1e6_f64,
    ) {
        let vms: Vec<VmLoad> = loads.iter().map(|&(m, d)| vm(m, d, 0.0, None)).collect();
        let dirty: f64 = loads.iter().map(|load| load.1).sum();
        let memory: f64 = loads.iter().map(|load| load.0).sum();
        let all = allocate(dirty + surplus, &vms, &Limits::default()).unwrap();
        prop_assert!((all.completion_s * surplus / memory - 1.0).abs() < 1e-6);
    }

    #[test]
    fn whatever_comes_in_no_nan_comes_out(
        bandwidth in any::<f64>(),
        raw in prop::collection::vec(
            (any::<f64>(), any::<f64>(), any::<f64>(), prop::option::of(any::<f64>())), 0..4),
        signs in any::<bool>(),
        rounds: u32,
        factor in any::<f64>(),
    ) {
        // Half of the time with their signs taken off: more get past the checks.
        let sign = |x: f64| if signs { x } else { x.abs() };
        let vms: Vec<VmLoad> = raw
            .iter()
            .map(|&(m, d, v, w)| vm(sign(m), sign(d), sign(v), w.map(sign)))
            .collect();
        for limits in [
            Limits { max_rounds: rounds, traffic_factor: sign(factor), ..Limits::default() },
            Limits::default(),
        ] {
            for all in [
                allocate(sign(bandwidth), &vms, &limits),
                crate::scheduler::bandwidth::rounds::allocate(sign(bandwidth), &vms, &limits)
                    .map(|all| all.allocation),
            ].into_iter().flatten() {
                prop_assert!(all.completion_s >= 0.0 && all.completion_s.is_finite());
                prop_assert!(all.rates_bytes_per_s.iter().all(|&r| r >= 0.0 && r.is_finite()));
            }
        }
    }
}
