//! One pre-copy migration, round by round.

use super::dirtying::Dirtying;
use super::termination::{End, Progress, Round, Termination};
use crate::scheduler::bandwidth::{InputError, MAX_BYTES, check};

/// A migration to predict.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Migration<'a> {
    /// What the first round sends: the memory, or in COMMA's stage two the dirty set.
    pub to_send_bytes: f64,
    /// How the guest dirties it.
    pub dirtying: &'a Dirtying,
    /// The rate of pre-copy.
    pub rate_bytes_per_s: f64,
    /// The rate of stop-and-copy.
    pub stop_rate_bytes_per_s: f64,
    /// What the switchover takes beside sending.
    pub overhead_s: f64,
    /// When pre-copy ends.
    pub termination: Termination,
}

/// What a migration will take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Until the guest is paused.
    pub precopy_s: f64,
    /// From then until it runs at the destination.
    pub downtime_s: f64,
    /// What is sent, downtime included.
    pub traffic_bytes: f64,
    /// What is sent in the downtime.
    pub left_bytes: f64,
    /// Rounds after the first copy.
    pub rounds: u32,
    /// Why pre-copy ends. `None`: it never does, and the other values are as of the moment when that
    /// is certain.
    pub end: Option<End>,
}

impl Prediction {
    /// Until the guest runs at its destination.
    #[must_use]
    pub fn completion_s(&self) -> f64 {
        self.precopy_s + self.downtime_s
    }
}

/// Predicts a migration: each round sends what was dirtied in the one before, vᵢ₊₁ = D(vᵢ/r)
/// (VMbuddies, Eqs. 1 and 2, with any D).
///
/// # Errors
/// The input makes no sense.
pub fn precopy(migration: &Migration) -> Result<Prediction, InputError> {
    const AMOUNT: &str = "0 to 1e18 bytes";
    const RATE: &str = "a rate above 0, up to 1e18 B/s";
    let rate = migration.rate_bytes_per_s;
    let stop_rate = migration.stop_rate_bytes_per_s;
    let amount = migration.to_send_bytes;
    check("what is to be sent", None, amount, 0.0..=MAX_BYTES, AMOUNT)?;
    check("the rate", None, rate, 1e-9..=MAX_BYTES, RATE)?;
    check(
        "the rate of stop-and-copy",
        None,
        stop_rate,
        1e-9..=MAX_BYTES,
        RATE,
    )?;
    let overhead = migration.overhead_s;
    check("the overhead", None, overhead, 0.0..=1e6, "0 to 1e6 s")?;
    migration.dirtying.validate(None)?;

    let mut progress = Progress::new(migration.termination, amount);
    let mut to_send = amount;
    let mut now = 0.0;
    let end = loop {
        let time = to_send / rate;
        let dirtied = migration.dirtying.dirtied(time);
        now += time;
        let end = progress.round_ended(Round {
            sent_bytes: to_send,
            dirtied_bytes: dirtied,
            rate_bytes_per_s: stop_rate,
        });
        // D rises: once a round is not shorter than the last, none will be.
        let is_endless =
            matches!(migration.termination, Termination::Qemu { .. }) && dirtied >= to_send;
        to_send = dirtied;
        if end.is_some() || is_endless {
            break end;
        }
    };
    Ok(Prediction {
        precopy_s: now,
        downtime_s: overhead + to_send / stop_rate,
        traffic_bytes: progress.sent_bytes() + to_send,
        left_bytes: to_send,
        rounds: progress.rounds(),
        end,
    })
}

/// How long a dirty set takes while the guest goes on dirtying: t₂ = S/(r − d) (Pacer; COMMA 3.4);
/// `None` if it never ends.
#[must_use]
pub fn stage_two_s(
    dirty_set_bytes: f64,
    dirty_bytes_per_s: f64,
    rate_bytes_per_s: f64,
) -> Option<f64> {
    let surplus = rate_bytes_per_s - dirty_bytes_per_s;
    if dirty_set_bytes <= 0.0 {
        return Some(0.0);
    }
    (surplus > 0.0).then(|| dirty_set_bytes / surplus)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sweep(rate_bytes_per_s: f64, working_set_bytes: f64) -> Dirtying {
        Dirtying::Sweep {
            rate_bytes_per_s,
            working_set_bytes,
        }
    }

    fn migration(dirtying: &Dirtying, rate: f64, termination: Termination) -> Migration<'_> {
        Migration {
            to_send_bytes: 1024.0,
            dirtying,
            rate_bytes_per_s: rate,
            stop_rate_bytes_per_s: rate,
            overhead_s: 0.0,
            termination,
        }
    }

    fn xen(threshold_bytes: f64) -> Termination {
        Termination::Xen {
            threshold_bytes,
            max_rounds: 30,
            traffic_factor: 30.0,
        }
    }

    #[test]
    fn eq_5_of_vmbuddies() {
        // The third VM of the golden allocation with whole rounds: n = 24.
        let dirtying = sweep(20.0, f64::INFINITY);
        let found = precopy(&migration(&dirtying, 29.0, xen(0.195_312_5))).unwrap();
        let q: f64 = 20.0 / 29.0;
        let n = (0.195_312_5_f64 / 1024.0).log(q).ceil();
        let sum = (1.0 - q.powf(n + 1.0)) / (1.0 - q);
        assert!((found.completion_s() - 1024.0 / 29.0 * sum).abs() < 1e-9);
        assert!((found.traffic_bytes - 1024.0 * sum).abs() < 1e-9);
        assert_eq!(
            (f64::from(found.rounds) + 1.0, found.end),
            (n, Some(End::Converged))
        );
        assert!((found.left_bytes - 1024.0 * q.powf(n)).abs() < 1e-9);
    }

    #[test]
    fn a_working_set_that_is_dirtied_faster_than_sent_ends_by_a_bound() {
        let dirtying = sweep(40.0, 100.0);
        let bounded = Termination::Xen {
            threshold_bytes: 1.0,
            max_rounds: 30,
            traffic_factor: 3.0,
        };
        let found = precopy(&migration(&dirtying, 20.0, bounded)).unwrap();
        assert_eq!(found.end, Some(End::Traffic));
        // 1024 + 21 · 100 exceed 3 · 1024; then 100 in the downtime.
        assert_eq!(
            (found.rounds, found.left_bytes, found.downtime_s),
            (21, 100.0, 5.0)
        );
        let lasting = Termination::Qemu {
            max_downtime_s: 1.0,
        };
        let never = precopy(&migration(&dirtying, 20.0, lasting)).unwrap();
        assert_eq!(never.end, None);
        let fits = Termination::Qemu {
            max_downtime_s: 5.0,
        };
        assert_eq!(
            precopy(&migration(&dirtying, 20.0, fits)).unwrap().end,
            Some(End::Converged)
        );
        let smart = precopy(&migration(&dirtying, 20.0, Termination::INTELLIGENT)).unwrap();
        assert_eq!(
            smart.end,
            Some(End::Converged),
            "the whole set is below its threshold"
        );
    }

    #[test]
    fn stage_two() {
        assert_eq!(stage_two_s(1124.0, 1.0, 32.0), Some(1124.0 / 31.0));
        assert_eq!(stage_two_s(1.0, 32.0, 32.0), None);
        assert_eq!(stage_two_s(0.0, 32.0, 32.0), Some(0.0));
        // Rounds without end come to the same.
        let dirtying = sweep(7.5, f64::INFINITY);
        let stage = Migration {
            to_send_bytes: 2048.0,
            ..migration(&dirtying, 32.0, xen(1e-9))
        };
        let found = precopy(&stage).unwrap();
        assert!((found.completion_s() - 2048.0 / 24.5).abs() < 1e-9);
    }

    #[test]
    fn nonsense_is_refused() {
        let dirtying = sweep(1.0, 1.0);
        for bad in [
            Migration {
                to_send_bytes: -1.0,
                ..migration(&dirtying, 1.0, xen(1.0))
            },
            Migration {
                rate_bytes_per_s: 0.0,
                ..migration(&dirtying, 1.0, xen(1.0))
            },
            Migration {
                overhead_s: f64::NAN,
                ..migration(&dirtying, 1.0, xen(1.0))
            },
            migration(&sweep(f64::NAN, 1.0), 1.0, xen(1.0)),
            migration(&sweep(1.0, -1.0), 1.0, xen(1.0)),
        ] {
            assert!(precopy(&bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn a_higher_rate_is_faster_and_nothing_is_lost(
            memory in 1e6..1e10_f64,
            dirty in 0.0..1e8_f64,
            set in 0.0..1.0_f64,
            rate in 1e6..1e9_f64,
            uniform: bool,
        ) {
            let dirtying = if uniform {
                Dirtying::Uniform { rate_bytes_per_s: dirty, hot_set_bytes: set * memory }
            } else {
                sweep(dirty, set * memory)
            };
            let at = |rate| {
                let asked = Migration { to_send_bytes: memory, ..migration(&dirtying, rate, Termination::XEN) };
                precopy(&asked).unwrap()
            };
            let found = at(rate);
            prop_assert!(found.end.is_some() && found.traffic_bytes >= memory);
            prop_assert!(found.traffic_bytes <= 3.0 * memory + 2.0 * set * memory + 1.0);
            prop_assert!((found.completion_s() * rate / found.traffic_bytes - 1.0).abs() < 1e-9);
            prop_assert!(at(rate * 2.0).completion_s() < found.completion_s());
        }
    }
}
