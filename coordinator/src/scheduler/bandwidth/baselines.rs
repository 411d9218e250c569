//! The sequential baselines of VMbuddies: NS and LLL.

use super::curve::Curve;
use super::input::{AllocateError, Limits, VmLoad, check_all};

/// One VM's pre-copy in a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Turn {
    /// Which, by its position.
    pub vm: usize,
    /// When it begins.
    pub start_s: f64,
    /// When it is ready to switch over.
    pub end_s: f64,
    /// Its rate in between.
    pub rate_bytes_per_s: f64,
}

/// VMs that pre-copy one after another.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// The turns, in order.
    pub turns: Vec<Turn>,
    /// What is sent until the last one ends, in bytes, with what the held ones send again.
    pub traffic_bytes: f64,
}

impl Sequence {
    /// When the last turn ends.
    #[must_use]
    pub fn completion_s(&self) -> f64 {
        self.turns.last().map_or(0.0, |turn| turn.end_s)
    }
}

/// NS (VMbuddies 5.1): one after another in the order given, each with the whole bandwidth and
/// switched over at once.
///
/// # Errors
/// The input makes no sense, or a VM without a working set does not converge.
pub fn no_synchronisation(
    bandwidth_bytes_per_s: f64,
    vms: &[VmLoad],
    limits: &Limits,
) -> Result<Sequence, AllocateError> {
    check_all(bandwidth_bytes_per_s, vms, limits)?;
    sequence(bandwidth_bytes_per_s, vms, limits, 0..vms.len(), |_| 0.0)
}

/// LLL, Largest memory Load VM Last (VMbuddies 3.2): in ascending order of the dirty rates; who is
/// ready waits for the others, and takes its dirty rate from the bandwidth until then.
///
/// # Errors
/// The input makes no sense, the held VMs leave nothing, or a VM without a working set does not
/// converge with what they leave.
pub fn lll(
    bandwidth_bytes_per_s: f64,
    vms: &[VmLoad],
    limits: &Limits,
) -> Result<Sequence, AllocateError> {
    check_all(bandwidth_bytes_per_s, vms, limits)?;
    let mut order: Vec<usize> = (0..vms.len()).collect();
    order.sort_by(|&a, &b| {
        let rate = |vm: usize| vms[vm].dirty_rate_bytes_per_s;
        rate(a).total_cmp(&rate(b))
    });
    let held = |vm: &VmLoad| vm.dirty_rate_bytes_per_s;
    sequence(bandwidth_bytes_per_s, vms, limits, order, held)
}

fn sequence(
    bandwidth: f64,
    vms: &[VmLoad],
    limits: &Limits,
    order: impl IntoIterator<Item = usize>,
    held: impl Fn(&VmLoad) -> f64,
) -> Result<Sequence, AllocateError> {
    let (mut now, mut taken, mut traffic) = (0.0, 0.0, 0.0);
    let mut turns = Vec::with_capacity(vms.len());
    for vm in order {
        let curve = Curve::new(&vms[vm], limits);
        let rate = bandwidth - taken;
        let endless = curve.cap.is_infinite() && curve.memory > 0.0;
        if rate <= 0.0 || (endless && rate <= curve.dirty_rate) {
            return Err(AllocateError::DoesNotConverge {
                dirty_bytes_per_s: taken + if endless { curve.dirty_rate } else { 0.0 },
                bandwidth_bytes_per_s: bandwidth,
            });
        }
        let time = if curve.memory > 0.0 {
            curve.time(rate)
        } else {
            0.0
        };
        turns.push(Turn {
            vm,
            start_s: now,
            end_s: now + time,
            rate_bytes_per_s: rate,
        });
        traffic += bandwidth * time;
        now += time;
        taken += held(&vms[vm]);
    }
    Ok(Sequence {
        turns,
        traffic_bytes: traffic,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::allocate;
    use super::super::closed_form::tests::{tiers, vm};
    use super::*;

    #[test]
    fn the_largest_load_is_last_and_the_others_take_their_part() {
        let vms = [
            vm(300.0, 20.0, 0.0, None),
            vm(100.0, 10.0, 0.0, None),
            vm(100.0, 5.0, 0.0, None),
        ];
        let all = lll(60.0, &vms, &Limits::default()).unwrap();
        let order: Vec<usize> = all.turns.iter().map(|turn| turn.vm).collect();
        assert_eq!(order, [2, 1, 0]);
        let rates: Vec<f64> = all.turns.iter().map(|turn| turn.rate_bytes_per_s).collect();
        assert_eq!(rates, [60.0, 55.0, 45.0]);
        let expected = 100.0 / 55.0 + 100.0 / 45.0 + 300.0 / 25.0;
        assert!((all.completion_s() - expected).abs() < 1e-9);
        assert!((all.traffic_bytes - 60.0 * expected).abs() < 1e-9);

        let alone = no_synchronisation(60.0, &vms, &Limits::default()).unwrap();
        let expected = 300.0 / 40.0 + 100.0 / 50.0 + 100.0 / 55.0;
        assert!((alone.completion_s() - expected).abs() < 1e-9);
        assert_eq!(alone.turns[2].start_s, alone.turns[1].end_s);
    }

    #[test]
    fn holds_that_leave_nothing_are_an_error() {
        let vms = [vm(1.0, 6.0, 0.0, Some(1.0)), vm(1.0, 4.0, 0.0, Some(1.0))];
        assert!(lll(10.0, &vms, &Limits::default()).is_ok());
        let error = lll(4.0, &vms, &Limits::default()).unwrap_err();
        let expected = AllocateError::DoesNotConverge {
            dirty_bytes_per_s: 4.0,
            bandwidth_bytes_per_s: 4.0,
        };
        assert_eq!(error, expected);
        assert!(no_synchronisation(4.0, &vms, &Limits::default()).is_ok());
        let endless = [vm(1.0, 6.0, 0.0, None)];
        assert!(no_synchronisation(6.0, &endless, &Limits::default()).is_err());
    }

    proptest! {
        /// Without cap and threshold no order of turns beats sending all at once: every turn's
        /// surplus is at most B − Σ of what is held and its own, never more than the whole need.
        #[test]
        fn holding_costs_what_the_held_dirty(
            loads in prop::collection::vec((1.0..1e6_f64, 0.0..1e2_f64), 2..8),
            surplus in 1.0..1e4_f64,
        ) {
            let vms: Vec<VmLoad> = loads.iter().map(|&(m, d)| vm(m, d, 0.0, None)).collect();
            let dirty: f64 = loads.iter().map(|load| load.1).sum();
            let limits = Limits::default();
            let last = lll(dirty + surplus, &vms, &limits).unwrap();
            let ns = no_synchronisation(dirty + surplus, &vms, &limits).unwrap();
            let all = allocate(dirty + surplus, &vms, &limits).unwrap();
            let slack = 1.0 + 1e-9;
            prop_assert!(ns.completion_s() <= last.completion_s() * slack);
            prop_assert!(last.completion_s() <= all.completion_s * slack);
        }
    }

    #[test]
    fn in_this_model_lll_is_faster_than_oba() {
        // A held VM is charged d in both, but one that waits for its turn is charged nothing in LLL:
        // without a bound on what each dirties, LLL wins. Saturating working sets turn that round.
        let all = allocate(60.0, &tiers(), &Limits::default()).unwrap();
        let last = lll(60.0, &tiers(), &Limits::default()).unwrap();
        assert!(last.completion_s() < all.completion_s);
    }
}
