use proptest::prelude::*;
use rate_limiter::BytesPerSecond;

use super::*;
use crate::capacity::Cut;

fn stops(all: &[(f64, f64)]) -> Vec<Stop> {
    let stop = |&(remaining_bytes, overhead_s)| Stop {
        remaining_bytes,
        overhead_s,
    };
    all.iter().map(stop).collect()
}

fn only(bandwidth: u64) -> Capacity {
    Capacity {
        bandwidth: BytesPerSecond(bandwidth),
        cuts: Vec::new(),
    }
}

#[test]
fn golden_values() {
    let plain = stops(&[(10.0, 0.0), (20.0, 0.0), (70.0, 0.0)]);
    let all = stop_and_copy(&only(125), &plain).unwrap();
    assert!((all.downtime_s - 0.8).abs() < 1e-12);
    assert!((all.rates_bytes_per_s[2] - 87.5).abs() < 1e-9);
    let slow = stops(&[(10.0, 0.05), (20.0, 0.05), (70.0, 0.2)]);
    let all = stop_and_copy(&only(125), &slow).unwrap();
    assert!((all.downtime_s - 0.960_459_527).abs() < 1e-9, "{all:?}");
    assert!((all.rates_bytes_per_s.iter().sum::<f64>() - 125.0).abs() < 1e-9);
}

#[test]
fn a_narrow_interface_and_a_long_overhead_set_the_downtime() {
    let capacity = Capacity {
        cuts: vec![Cut {
            rate: BytesPerSecond(50),
            members: vec![2],
        }],
        ..only(125)
    };
    let plain = stops(&[(10.0, 0.0), (20.0, 0.0), (70.0, 0.0)]);
    assert_eq!(stop_and_copy(&capacity, &plain).unwrap().downtime_s, 1.4);
    let idle = stop_and_copy(&capacity, &stops(&[(0.0, 0.0), (0.0, 2.5), (1.0, 0.0)])).unwrap();
    assert_eq!(idle.downtime_s, 2.5);
    assert_eq!(idle.rates_bytes_per_s, [0.0, 0.0, 0.4]);
    let nothing = stop_and_copy(&capacity, &stops(&[(0.0, 0.0); 3])).unwrap();
    assert_eq!(nothing.downtime_s, 0.0);
    assert_eq!(nothing.rates_bytes_per_s, [0.0; 3]);
    assert!(stop_and_copy(&only(0), &plain).is_err());
    assert!(stop_and_copy(&only(1), &stops(&[(-1.0, 0.0)])).is_err());
    assert!(stop_and_copy(&only(1), &stops(&[(1.0, f64::NAN)])).is_err());
}

#[test]
fn the_time_until_it_fits() {
    assert_eq!(fits_in(100.0, 25.0, 125.0, 0.4), Some(0.5));
    assert_eq!(fits_in(50.0, 200.0, 125.0, 0.4), Some(0.0));
    assert_eq!(fits_in(51.0, 125.0, 125.0, 0.4), None);
}

fn look(now_s: f64, downtime_s: f64, dirty_bytes_per_s: f64) -> Look {
    Look {
        now_s,
        downtime_s,
        remaining_bytes: downtime_s * 100.0,
        dirty_bytes_per_s,
        bandwidth_bytes_per_s: 100.0,
    }
}

#[test]
fn a_group_that_converges_is_released_when_it_fits() {
    let mut judge = Judge::new(Rule::default());
    let verdict = judge.look(look(0.0, 1.3, 50.0));
    assert_eq!(
        verdict,
        Verdict::Wait {
            expected_s: Some(2.0)
        }
    );
    assert_eq!(judge.look(look(2.0, 0.3, 50.0)), Verdict::Release);
}

#[test]
fn a_hot_group_is_released_at_its_best_moment_or_not_at_all() {
    let mut judge = Judge::new(Rule::default());
    let waits = Verdict::Wait { expected_s: None };
    for now in [0.0, 1.0] {
        let verdict = judge.look(look(now, 1.0, 95.0));
        assert!(
            matches!(
                verdict,
                Verdict::Wait {
                    expected_s: Some(_)
                }
            ),
            "not hot yet"
        );
    }
    assert_eq!(judge.look(look(2.0, 1.0, 95.0)), waits);
    // Looks from t = 2 on, until 12; from 7 on it takes what is as good as the best, 0.9.
    assert_eq!(judge.look(look(5.0, 0.9, 95.0)), waits);
    assert_eq!(judge.look(look(8.0, 1.0, 95.0)), waits);
    assert_eq!(judge.clone().look(look(9.0, 0.9, 95.0)), Verdict::Release);
    assert_eq!(judge.clone().look(look(12.0, 1.4, 95.0)), Verdict::Release);
    let hot = judge.look(look(12.0, 1.6, 95.0));
    assert_eq!(hot, Verdict::TooHot { best_s: 0.9 });
    let anew = judge.look(look(13.0, 1.6, 95.0));
    assert!(matches!(
        anew,
        Verdict::Wait {
            expected_s: Some(_)
        }
    ));
}

proptest! {
    #[test]
    fn all_finish_together_and_no_cut_is_exceeded(
        all in prop::collection::vec((0.0..1e9_f64, 0.0..1.0_f64), 1..20),
        bandwidth in 1_000..1_000_000_000_u64,
        narrow in 1_000..1_000_000_000_u64,
    ) {
        let stops = stops(&all);
        let members: Vec<usize> = (0..stops.len()).step_by(2).collect();
        let capacity = Capacity {
            cuts: vec![Cut { rate: BytesPerSecond(narrow), members: members.clone() }],
            ..only(bandwidth)
        };
        let found = stop_and_copy(&capacity, &stops).unwrap();
        for (stop, rate) in stops.iter().zip(&found.rates_bytes_per_s) {
            if stop.remaining_bytes > 0.0 {
                let time = stop.overhead_s + stop.remaining_bytes / rate;
                prop_assert!((time / found.downtime_s - 1.0).abs() < 1e-9);
            }
        }
        let rates = &found.rates_bytes_per_s;
        let total = rates.iter().sum::<f64>() / bandwidth as f64;
        let cut = members.iter().map(|&vm| rates[vm]).sum::<f64>() / narrow as f64;
        prop_assert!(total <= 1.0 + 1e-9 && cut <= 1.0 + 1e-9);
        // Not a moment longer than needed, or than an overhead.
        let longest = stops.iter().map(|stop| stop.overhead_s).fold(0.0, f64::max);
        prop_assert!(
            total.max(cut) > 1.0 - 1e-6 || (found.downtime_s - longest).abs() < 1e-9
        );
    }
}
